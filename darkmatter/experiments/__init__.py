"""One file an experiment: what a chapter measures beyond the survey."""
