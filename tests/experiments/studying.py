"""Studies of the cells of `conftest.py`, and what they computed."""

from experiments.grid import Run, read_cell, run_cells


def grid(log, *n, **more):
    return [{"n": k, "log": str(log), **more} for k in n]


def computed(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def names(out):
    return {file.name for file in out.iterdir()}


def finished(out):
    """Settings and result of every finished cell in a directory."""
    records = [read_cell(file) for file in sorted(out.glob(f"{'?' * 20}.json"))]
    return [{**record["cell"], **record["result"]} for record in records]


def run(function, cells, out, **options):
    return run_cells(function, cells, Run(out, **options), progress=False)
