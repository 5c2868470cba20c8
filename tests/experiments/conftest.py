"""Fixtures of several files: a demonstration's runs, and a module of cells."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.training import agents
from experiments.training import learn as learning
from experiments.training.report import write_report

from .made_runs import make_run


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three arms of a demonstration, the first with its report; to be read only."""
    folder = tmp_path_factory.mktemp("demo")
    runs = {
        "learned": make_run(folder / "learned"),
        "zero": make_run(folder / "zero", "zero", final=-12.0, video=False),
        "task": make_run(folder / "task", "task", final=900.0, video=False),
    }
    # The run itself is among the references, as a pattern like `runs/demo/*` has it.
    assert write_report(runs["learned"], references=list(runs.values())) == (
        runs["learned"] / "report.html"
    )
    return runs


@pytest.fixture
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report at the end of a run: its figures take longer than the shortest of runs."""
    monkeypatch.setattr(learning, "write_report", lambda out: None)


@pytest.fixture(scope="module")
def _short_updates() -> Iterator[None]:
    """PPO passes once over each rollout: most of a short run's time is its ten passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(agents._PPO, "n_epochs", 1)
        yield


# Other processes import it by this name; what a cell does is written to a log.
CELLS = """
import os
import signal
import sys
import time
from pathlib import Path


def _log(log, n):
    with open(log, "a") as file:  # one short write at the end of a file isn't torn
        file.write(f"{n}\\n")


def square(n, log, seed=0):
    _log(log, n)
    return {"square": n * n}


def cube(n, log):
    return {"cube": n**3}


def slow(n, log, seconds):
    _log(log, n)
    time.sleep(seconds)
    return {"square": n * n}


def fragile(n, log, once=(), always=()):
    _log(log, n)
    died = Path(f"{log}.{n}")
    if n in always or (n in once and not died.exists()):
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    return {"square": n * n}


if __name__ == "__main__":
    from experiments.grid import Run, run_cells

    out, log, n, seconds, jobs = sys.argv[1:]
    grid = [{"n": k, "log": log, "seconds": float(seconds)} for k in range(int(n))]
    found = run_cells(slow, grid, Run(Path(out), jobs=int(jobs)), progress=False)
    print(sum(result["square"] for result in found))
"""


@pytest.fixture
def cells(tmp_path, monkeypatch):
    (tmp_path / "my_study_cells.py").write_text(CELLS)
    monkeypatch.syspath_prepend(tmp_path)
    import my_study_cells

    yield my_study_cells
    del sys.modules["my_study_cells"]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"
