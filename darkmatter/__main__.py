"""The command line: ``python -m darkmatter COMMAND``; each command hands over to its room."""

from __future__ import annotations

import argparse
import errno
import io
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from . import __version__, outputs, presets
from .errors import DarkmatterError

Arguments = argparse.Namespace
PARTS = ("ladder", "elsewhere", "on_error")  # of the SAEs that a preset has trained

# What each command can be tried with; that of `--help` ends with it.
EXAMPLES = {
    "plan": "--preset gemma-2-9b --gpu h100", "train": "--preset smollm2 --part ladder --jobs 2",
    "ship": "--preset smollm2", "survey": "--preset smoke --json survey.json",
    "converge": "--preset smollm2", "vary": "--preset smollm2",
    "decompose": "--site blocks.15.hook_resid_post --sae artifact:smollm2-l15-w4096-k32 "
                 "--contexts 60 --json result.json",
    "export": "--preset smollm2 --out saes", "book": "--preset smoke", "read": "--preset smollm2",
    "run": "grid.yaml --backend local", "check": "--preset smollm2", "lab": "--port 8889",
}


def main(words: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done; 1: a fault of the program; 2: a mistake in what was asked; 130: Ctrl-C; 141: who read
    the output has closed it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack some of our letters
            stream.reconfigure(errors="replace")
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.command != "lab":  # jupyter's own options
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_warn, warnings.showwarning)
            arguments.do(arguments)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error, sys.argv[1:] if words is None else words)
    return 0


def _explain(error: BaseException, words: list[str]) -> int:
    """Say on the terminal why a command ended early; returns its exit code."""
    if isinstance(error, BrokenPipeError):  # such as `| head`: Python must not flush as it ends
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 — open until then
        return 141
    if isinstance(error, KeyboardInterrupt):
        code, sentence = 130, "\ndarkmatter: Interrupted; run the same command again to go on."
    elif isinstance(error, DarkmatterError):
        code, sentence = 2, f"darkmatter: {error}"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        code, sentence = 2, ("darkmatter: The disk is full. Free some space, or set "
                             "DARKMATTER_CACHE to another disk, and run the same command again to "
                             "go on.")
    else:
        traceback.print_exception(error)
        code, sentence = 1, ("darkmatter: This is a fault of the program, not of what was asked. "
                             "Please report it with the lines above and this command: "
                             f"python -m darkmatter {shlex.join(words)}")
    print(sentence, file=sys.stderr)
    return code


def _warn(others: Callable[..., None], message: Warning | str, category: type[Warning], file: str,
          *rest: Any) -> None:
    """This project's own warnings are for who reads the terminal, without the line of code."""
    if category is UserWarning and Path(file).is_relative_to(Path(__file__).parent):
        print(f"darkmatter: {message}", file=sys.stderr)
    else:
        others(message, category, file, *rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m darkmatter",
                                     description="What an SAE's error is made of.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(do: Callable[[Arguments], None], preset: str = "") -> argparse.ArgumentParser:
        name, text = do.__name__.strip("_"), (do.__doc__ or "").splitlines()[0]
        new = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  python -m darkmatter {name} {EXAMPLES.get(name, '')}".rstrip())
        new.set_defaults(do=do)
        if preset:
            new.add_argument("--preset", default=preset, help="a preset's name, or a YAML file")
        return new

    command(_presets)
    plan = command(_plan, "smollm2")
    plan.add_argument("--gpu", default="", help="a GPU to plan for, such as h100 (default: here)")
    for do in (_train, _ship):
        train = command(do, "smollm2")
        train.add_argument("--part", choices=PARTS, action="append",
                           help="only this part; give it again for more (default: all)")
        train.add_argument("--jobs", type=int, default=1,
                           help="SAEs trained at a time, one process each (default: 1)")
    survey = command(_survey, "smollm2")
    survey.add_argument("--json", type=Path, help="also write the rows to this file")
    command(_converge, "smollm2")
    command(_vary, "smollm2")
    _decompose_options(command(_decompose))
    export = command(_export, "smollm2")
    export.add_argument("--out", type=Path, required=True, help="where a directory an SAE goes")
    book = command(_book, "smollm2")
    book.add_argument("--only", nargs="+", default=[], metavar="NAME",
                      help="run just these notebooks, build no pages")
    book.add_argument("-p", nargs=2, action="append", default=[], dest="parameters",
                      metavar=("NAME", "VALUE"), help="a parameter, as papermill takes it")
    book.add_argument("--jobs", type=int, help="notebooks at a time (default: 2, or 1 on a GPU)")
    book.add_argument("--record", action="store_true",
                      help="also keep the outputs in artifacts/, for `read`")
    command(_read, "smollm2")
    run = command(_run)
    run.add_argument("grid", type=Path,
                     help="a YAML file: presets, notebooks, layer, sae, parameters, slurm")
    run.add_argument("--backend", choices=("local", "slurm"), default="local",
                     help="this machine, or a cluster")
    run.add_argument("--jobs", type=int,
                     help="runs at a time (default: one a GPU, or one; on Slurm: no limit)")
    check = command(_check, "smollm2")
    check.add_argument("--keep", action="store_true", help="make the last run the reference")
    command(_lab)
    command(_sync)
    return parser


def _decompose_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2",
                        help="a preset's name, a hub id or a model directory")
    parser.add_argument("--site", required=True, help="hook, such as blocks.15.hook_resid_post")
    parser.add_argument("--sae", required=True, help="release:sae_id, artifact:NAME, or a "
                        "directory (sae-lens, dictionary_learning, sparsify)")
    parser.add_argument("--corpus", default="smollm2", help="a preset's name, 'pile', or a file")
    parser.add_argument("--contexts", type=int, help="contexts read (default: the preset's)")
    parser.add_argument("--context-length", type=int,
                        help="tokens in a context (default: the preset's)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--report", type=Path, help="also write a page about it, an .html file")


def _presets(arguments: Arguments) -> None:
    """List the presets that come with the package."""
    for name in presets.names():
        preset = presets.load(name)
        print(f"{name:<12}{preset.model}, {preset.site}, {len(preset.saes)} SAEs, "
              f"{preset.contexts} contexts of {preset.context_length} tokens")


def _plan(arguments: Arguments) -> None:
    """Say what a run will need before it starts."""
    from . import plan

    for line in plan.lines(presets.load(arguments.preset), arguments.gpu):
        print(line)


def _train(arguments: Arguments) -> None:
    """Train the preset's SAEs, going on from checkpoints."""
    _trained(arguments)


def _trained(arguments: Arguments, ship: bool = False) -> dict[str, Path]:
    """Directories of the SAEs of the parts asked for; of those on the error, only two ship."""
    from .experiments import on_error
    from .saes import training

    preset, jobs, asked = presets.load(arguments.preset), arguments.jobs, arguments.part or PARTS
    which: dict[str, Any] = {"longer": True}
    if ship:
        which = {"seeds": (0,), "targets": tuple(preset.on_error)}
    parts = {"ladder": lambda: training.run(preset, jobs=jobs),
             "elsewhere": lambda: training.elsewhere(preset, jobs),
             "on_error": lambda: on_error.run(preset, **which, jobs=jobs)}
    folders = {name: folder for part in asked for name, folder in parts[part]().items()}
    if not ship and "on_error" in asked and preset.name == presets.DEFAULT:
        on_error.collect(preset)
    return folders


def _survey(arguments: Arguments) -> None:
    """Decompose the error of every SAE of a preset."""
    from . import survey

    if arguments.json:
        outputs.check(arguments.json, [arguments.preset])
    rows = survey.run(presets.load(arguments.preset)).rows
    if arguments.json:
        _write(arguments.json, {"rows": rows.to_dict("records")})
    print(rows.to_string(index=False))


def _converge(arguments: Arguments) -> None:
    """Survey the checkpoints of the preset's SAEs: how their error changed with training."""
    from .experiments import variants

    print(variants.collect_convergence(presets.load(arguments.preset)))


def _vary(arguments: Arguments) -> None:
    """Survey the default SAE again with other choices: what moves the results."""
    from .experiments import variants

    print(variants.collect_sensitivity(presets.load(arguments.preset)))


def _decompose(arguments: Arguments) -> None:
    """Decompose the error of one SAE and print a table."""
    from . import decomposition

    names = ("model", "site", "sae", "corpus", "contexts", "context_length")
    asked = {name: getattr(arguments, name) for name in names}
    inputs = [arguments.model, arguments.sae.partition(":")[2], arguments.sae, arguments.corpus]
    for path in filter(None, (arguments.json, arguments.report)):
        outputs.check(path, inputs)
    result = decomposition.decompose(**asked)
    if arguments.json:
        _write(arguments.json, result)
    if arguments.report:
        from .book import report

        report.write(arguments.report, decomposition.settings(**asked), result)
    print(table(result))


def _ship(arguments: Arguments) -> None:
    """Train what is missing and pack the preset's SAEs, 8 bits a weight, into artifacts/.

    Those of another preset than the default go into a folder of its name there.
    """
    from .saes import artifacts, references

    preset = presets.load(arguments.preset)
    suite = artifacts.FOLDER / ("" if preset.name == presets.DEFAULT else preset.name)
    suite.mkdir(exist_ok=True)
    refs = [*preset.saes, *preset.elsewhere.values(), *preset.on_error.values()]
    named = {artifacts.name_of(ref) for ref in refs} - {""}
    for name, folder in _trained(arguments, ship=True).items():
        if name in named or not named:  # a preset that names none ships all that it trains
            references.ship(folder, suite / f"{name}.safetensors")


def _export(arguments: Arguments) -> None:
    """Write the preset's SAEs as directories that sae_lens.SAE.load_from_disk reads."""
    from .saes import references

    references.export(presets.load(arguments.preset), arguments.out)


def _book(arguments: Arguments) -> None:
    """Run the notebooks and build the book."""
    from .book import runner

    given = {name: yaml.safe_load(value) for name, value in arguments.parameters}
    runner.build(arguments.preset, arguments.only, given, jobs=arguments.jobs,
                 record=arguments.record)


def _read(arguments: Arguments) -> None:
    """Build the book as it was last recorded; nothing is run."""
    from .book import recorded, records

    recorded.build(arguments.preset, records.HOME)


def _run(arguments: Arguments) -> None:
    """Run every combination of a grid file that is not finished yet."""
    from .book.grid import grid

    grid.run(arguments.grid, arguments.backend, arguments.jobs)


def _check(arguments: Arguments) -> None:
    """Compare the numbers of the last run with the reference's; exit code 1 where any differs."""
    from .book import reference

    if arguments.keep:
        kept = reference.keep(reference.last(arguments.preset))
        print(f"{len(kept)} records kept as the reference of {arguments.preset}")
        return
    rows = reference.check(arguments.preset)
    for row in rows.to_dict("records"):
        print(f"{row['verdict']:<7}{row['notebook']:<15}{row['value']:>12.4g}"
              f"{row['reference']:>12.4g} ±{row['tolerance']:<10.2g}{row['name']} {row['sae']}")
    print(f"{(rows.verdict == 'agree').sum()} of {len(rows)} agree. Columns: verdict, chapter, "
          f"this run, reference, tolerance ({reference.INTERVAL}; {reference.NO_INTERVAL}), "
          "metric, SAE.")
    if (rows.verdict == "differ").any():
        sys.exit(1)


def _lab(arguments: Arguments) -> None:
    """Open JupyterLab on the notebooks; further options go to it."""
    from .book import pairs, records

    pairs.lab(records.HOME, arguments.rest)


def _sync(arguments: Arguments) -> None:
    """Bring both halves of each notebook together and strip outputs."""
    from .book import pairs, records

    print(f"{len(pairs.sync(records.HOME / 'notebooks'))} pairs in sync")


def table(result: dict[str, Any]) -> str:
    """The result of ``decompose`` as text: each metric with its 95% interval, '–' for no number."""
    from .book.figures import number
    from .regression.result import LABELS

    ends = result["intervals"]
    labels = {"l0": "L0", "dead_share": "share of dead latents", **LABELS}
    rows = [(label, result[name], ends.get(name)) for name, label in labels.items()]
    rows += [(f"norm test of {name}", value, ends.get("norm_test", {}).get(name))
             for name, value in result["norm_test"].items()]
    lines = [f"{'':<32}{'value':>10}   95% interval"]
    for label, value, interval in rows:
        shown = "[{}, {}]".format(*map(number, interval)) if interval else "–"
        lines.append(f"{label:<32}{number(value):>10}   {shown}")
    lines.append(f"fitted on {result['n_fit']:,} tokens, scored on {result['n_eval']:,}")
    told: dict[str, list[str]] = {}
    for name, note in result.get("notes", {}).items():
        told.setdefault(note, []).append(name)
    return "\n".join([*lines, *(f"{', '.join(names)}: {note}" for note, names in told.items())])


def _write(path: Path, value: dict[str, Any]) -> None:
    """A result as JSON, with what it depends on besides its settings."""
    from .book import records

    outputs.write_json(path, records.plain(value | {"provenance": records.provenance("auto")}))


if __name__ == "__main__":
    sys.exit(main())
