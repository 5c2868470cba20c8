"""Studies of the cells of `conftest.py`, and what they computed."""

from experiments.grid import Run, run_cells


def grid(log, *n, **more):
    return [{"n": k, "log": str(log), **more} for k in n]


def computed(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def names(out):
    return {file.name for file in out.iterdir()}


def run(function, cells, out, **options):
    return run_cells(function, cells, Run(out, **options), progress=False)
