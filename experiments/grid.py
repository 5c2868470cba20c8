"""A study: a grid of cells, each a pure function of its settings, that may be stopped and resumed.

A cell's result is one file, named by what decides it and written whole or not at all, by the
process that called `run_study`: workers need no disk in common with it. So a study can be killed,
gone on with, made larger, and run by several processes at once, which share what is left; a
cell that stands there is never computed again.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from experiments.grid_files import (
    Cell,
    Record,
    Result,
    StudyIncomplete,
    as_read,
    cell_file,
    no_room,
    read_cell,
    remember,
    write_record,
)
from experiments.grid_workers import Submit, check_workers, workers
from experiments.training.run_directory import versions
from rewardmodels.errors import InvalidInput

__all__ = ["Cell", "Result", "StudyIncomplete", "cell_file", "read_study", "run_study"]

_LIVES = 3  # workers that a cell may lose before it is given up


def run_study(
    function: Callable[..., Result],
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int = 1,
    backend: str = "loky",
    address: str | None = None,
    progress: bool = True,
) -> list[Result]:
    """Computes what isn't there yet, and returns every cell's result in the order of the cells.

    A cell that raises doesn't stop the others. One whose worker dies (out of memory, a lost
    machine) is computed again, the third time with no other beside it. With loky and `jobs=1` all
    happens in this process, and its death ends the study; the same call goes on.

    Args:
        function: Called as `function(**cell)`; returns plain data. It stands at the top of a
            module, as other processes import it.
        cells: The grid. A directory remembers what it saw of it in `study.json`; it may grow.
        out: Directory of the results. Functions of one module may share it.
        jobs: Cells at once.
        backend: "loky" for processes on this machine, "ray" or "dask" for a cluster (with the
            extras `rewardmodels[ray]` and `rewardmodels[dask]`).
        address: The cluster's, as Ray or Dask writes it; None starts one of `jobs` workers here,
            or takes the one that `ray.init` has connected to.
        progress: Show a progress bar on standard error, with the time left.

    Raises:
        InvalidInput: No cells, fewer than one job, an address without a cluster, an extra that
            isn't installed, or a directory that can't be written to or holds another study or
            results of an incompatible version.
        UnknownName: No such backend.
        UnreadableFile: A damaged `study.json`, or a result that may not be read.
        StudyIncomplete: Cells that raised or lost their workers, once all others are done; or
            a result that couldn't be written, as when a disk is full.
    """
    if not cells:
        raise InvalidInput("cells: expected at least one, got none.")
    if jobs < 1:
        raise InvalidInput(f"jobs: expected at least 1, got {jobs}.")
    check_workers(backend, address)
    files = {cell_file(function, cell, out): cell for cell in cells}
    remember(function, cells, out)
    results = {file: record["result"] for file in files if (record := read_cell(file))}
    if missing := len(files) - len(results):
        jobs = min(jobs, missing)
        with (
            tqdm(total=len(files), initial=len(results), smoothing=0, disable=not progress) as bar,
            workers(backend, jobs, address) as submit,
        ):
            failed = _fill(function, files, results, submit, jobs, bar)
        if failed:
            some = [f"{dict(files[file])}: {why}" for file, why in list(failed.items())[:5]]
            raise StudyIncomplete(
                f"study: expected {len(files)} results, got {len(results)}. "
                f"{len(failed)} failed; {'; '.join(some)}. The rest is kept in {out}, beside a "
                "traceback of each failure (*.error); the same call tries only those again."
            )
    return [results[cell_file(function, cell, out)] for cell in cells]


def read_study(out: Path, function: str | None = None) -> list[dict[str, Any]]:
    """Every result that stands in a study's directory, as rows: settings, seconds and figures.

    Args:
        out: Directory of `run_study`.
        function: Name of the function whose cells to read; None for all.

    Returns:
        A row a cell, in the order of the files' names.

    Raises:
        InvalidInput: A directory that isn't a study's.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as out:
        ...     _ = run_study(dict, [{"seed": 0}, {"seed": 1}], Path(out), progress=False)
        ...     sorted(row["seed"] for row in read_study(Path(out)))
        [0, 1]
    """
    if not (out / "study.json").is_file():
        raise InvalidInput(f"out: expected a study's directory, got {out}: no study.json there.")
    found = [record for file in sorted(out.glob(f"{'?' * 20}.json")) if (record := read_cell(file))]
    return [
        {**record["cell"], "seconds": record["seconds"], **record["result"]}
        for record in found
        if function in (None, record.get("function"))
    ]


def _fill(
    function: Callable[..., Result],
    files: Mapping[Path, Cell],
    results: dict[Path, Result],
    submit: Submit,
    jobs: int,
    bar: tqdm,
) -> dict[Path, str]:
    """Adds the results that are missing; returns why those failed that did.

    What is being computed is locked, since the system frees a dead process's locks.
    """
    waiting = deque(file for file in files if file not in results)
    flying: dict[Future, tuple[Path, FileLock]] = {}
    deaths: Counter[Path] = Counter()
    failed: dict[Path, str] = {}

    def last_life(file: Path) -> bool:  # spent alone: loky's others die with the one
        return deaths[file] == _LIVES - 1

    try:
        while waiting or flying:
            for _ in range(len(waiting)):
                if len(flying) == jobs or any(last_life(file) for file, _ in flying.values()):
                    break
                file = waiting.popleft()
                lock = FileLock(file.with_suffix(".lock"))
                if (flying and last_life(file)) or not _taken(lock):
                    waiting.append(file)
                elif record := read_cell(file):  # another process was faster
                    file.with_suffix(".lock").unlink(missing_ok=True)
                    lock.release()
                    results[file] = record["result"]
                    bar.update()
                else:
                    flying[_start(submit, function, files[file])] = file, lock
            if waiting and not flying:
                bar.set_postfix_str("other processes compute what is left")
                time.sleep(0.5)
                continue
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                file, lock = flying[future]
                try:
                    record = future.result()
                except Exception as error:  # `_compute` lets none out: its worker is gone
                    deaths[file] += 1
                    if deaths[file] < _LIVES:
                        waiting.append(file)
                    said = [type(error).__name__, *str(error).strip().splitlines()]
                    why = f"its worker failed {deaths[file]} times, last by {': '.join(said[:2])}"
                    record = {"error": why, "traceback": said}
                if "result" in record:
                    write_record(file, record)
                    results[file] = record["result"]
                    for suffix in (".error", ".lock"):  # who locks it anew sees the result
                        file.with_suffix(suffix).unlink(missing_ok=True)
                    bar.update()
                elif file not in waiting:
                    failed[file] = record["error"]
                    write_record(file.with_suffix(".error"), {"cell": dict(files[file]), **record})
                    bar.set_postfix(failed=len(failed))
                del flying[future]
                lock.release()
    finally:
        for _, lock in flying.values():
            lock.release()
    return failed


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    except OSError as error:
        raise no_room(Path(lock.lock_file), error) from error
    return True


def _start(submit: Submit, function: Callable[..., Result], cell: Cell) -> Future:
    try:
        return submit(_compute, function, dict(cell))
    except Exception as error:  # workers that have just died, or a cluster that went away
        failed: Future = Future()
        failed.set_exception(error)
        return failed


def _compute(function: Callable[..., Result], cell: Cell) -> Record:
    started = time.perf_counter()
    try:
        result = as_read(function(**cell))
    except Exception as error:
        trace = traceback.format_exc().splitlines()
        return {"error": f"{type(error).__name__}: {error}", "traceback": trace}
    about = {"function": function.__qualname__, "cell": cell, "versions": versions()}
    return {**about, "seconds": time.perf_counter() - started, "result": result}
