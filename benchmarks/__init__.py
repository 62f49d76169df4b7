"""How fast the package is beside the paper's own formulations: `make bench`, or ``python -m
benchmarks --help``.

A row measures two ways of doing one thing in alternating pairs, in one run on one machine, after a
check that both give the same answer. The records are small JSON files in artifacts/bench/, one a
machine, which the page 17_speed shows.
"""
