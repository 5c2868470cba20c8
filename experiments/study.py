"""A study: a grid of cells, each a pure function of its settings, that may be stopped and resumed.

A cell's result is one file, named by what decides it and written whole or not at all. So a study
can be killed, gone on with, made larger, and run by several processes at once; a cell that stands
there is never computed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from tqdm import tqdm

from experiments.run import versions, write_atomically
from rewardmodels import InvalidInput, UnreadableFile

Cell = Mapping[str, Any]
"""Settings of a cell: names and plain values (numbers, text, lists of them)."""

Result = dict[str, Any]


def run_study(
    function: Callable[..., Result],
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int = 1,
    progress: bool = True,
) -> list[Result]:
    """Computes what isn't there yet, and returns every cell's result in the order of the cells.

    Args:
        function: Called as `function(**cell)`; returns plain data. It stands at the top of a
            module, as other processes import it.
        cells: The grid.
        out: Directory of the results.
        jobs: Processes side by side.
        progress: Show a progress bar on standard error.

    Raises:
        InvalidInput: No cells, or fewer than one job.
        UnreadableFile: A result that is damaged.
    """
    if not cells:
        raise InvalidInput("cells: expected at least one, got none.")
    if jobs < 1:
        raise InvalidInput(f"jobs: expected at least 1, got {jobs}.")
    files = [cell_file(function, cell, out) for cell in cells]
    missing = [(cell, file) for cell, file in zip(cells, files, strict=True) if not file.exists()]
    out.mkdir(parents=True, exist_ok=True)
    work = (delayed(_compute)(function, cell, file) for cell, file in missing)
    done = Parallel(n_jobs=min(jobs, max(1, len(missing))), return_as="generator_unordered")(work)
    bar = tqdm(done, total=len(cells), initial=len(cells) - len(missing), disable=not progress)
    for cell in bar:
        bar.set_postfix_str(" ".join(str(value) for value in cell.values()))
    return [_read(file) for file in files]


def cell_file(function: Callable[..., Result], cell: Cell, out: Path) -> Path:
    """Where a cell's result stands: a name made of its function's and of all its settings."""
    settings = json.dumps([function.__qualname__, dict(cell)], sort_keys=True, default=str)
    return out / f"{hashlib.sha256(settings.encode()).hexdigest()[:20]}.json"


def _compute(function: Callable[..., Result], cell: Cell, file: Path) -> Cell:
    started = time.perf_counter()
    result = function(**cell)
    seconds = time.perf_counter() - started
    about = {"cell": dict(cell), "seconds": seconds, "versions": versions()}
    write_atomically(file, json.dumps({**about, "result": result}, indent=1, default=str))
    return cell


def _read(file: Path) -> Result:
    try:
        result: Result = json.loads(file.read_text())["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableFile(
            f"{file}: expected a cell's result, got a damaged file ({error}). Delete it, and run "
            "the study again."
        ) from error
    return result
