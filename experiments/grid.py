"""The cells of a study: computed here, on Ray or on Dask, kept as files, resumable.

A cell is a pure function of its settings. Its result is one file, named by the settings and written
atomically by the process that called `run_cells`, so workers need no shared disk. A study can be
killed, resumed, enlarged, and run by several processes at once, which share the remaining cells;
a finished cell is never computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from joblib import cpu_count
from joblib.externals.loky import get_reusable_executor
from tqdm import tqdm

from experiments.training.run_directory import versions
from rewardmodels.errors import InvalidInput, RewardModelsError, UnknownName, UnreadableFile
from rewardmodels.saving import write_text_atomically

FORMAT = 1

_ATTEMPTS = 3  # workers that may die under a cell before it is given up

Cell = Mapping[str, Any]
"""Settings of a cell: names and plain values (numbers, text, lists of them)."""

Result = dict[str, Any]

Record = dict[str, Any]
"""Content of a cell's file: its settings, result, seconds and versions."""


class StudyIncomplete(RewardModelsError, RuntimeError):
    """Some cells of a study have no result; the finished ones are kept."""


BACKENDS = {"loky": "joblib", "ray": "ray", "dask": "distributed"}  # the module that each needs

Submit = Callable[..., Future]
"""Takes a function and its arguments; returns the future of its result."""


@dataclass(frozen=True)
class Run:
    """Place and manner of computing the cells of a study.

    Args:
        out: Directory of the results; a second call with the same directory resumes.
        jobs: Cells at once. With loky and 1, they are computed in this process.
        backend: "loky" for processes on this machine, "ray" or "dask" for a cluster (extras
            `rewardmodels[ray]` and `rewardmodels[dask]`).
        address: The cluster's, as Ray or Dask writes it; None starts one of `jobs` workers here,
            or takes the one that `ray.init` has connected to.

    Raises:
        InvalidInput: Fewer than one job, an address without a cluster, or a missing extra.
        UnknownName: No such backend.
    """

    out: Path
    jobs: int = 1
    backend: Literal["loky", "ray", "dask"] = "loky"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InvalidInput(f"jobs: expected at least 1, got {self.jobs}.")
        if self.backend not in BACKENDS:
            raise UnknownName("backend", self.backend, BACKENDS)
        if self.address is not None and self.backend == "loky":
            raise InvalidInput(
                "address: expected none with loky, which stays on this machine, got "
                f"{self.address!r}. Pass backend='ray' or 'dask' for a cluster."
            )
        if find_spec(BACKENDS[self.backend]) is None:
            raise InvalidInput(
                f"backend: expected {self.backend} to be installed, got none; pip install "
                f"'rewardmodels[{self.backend}]' brings it."
            )


def run_cells(
    function: Callable[..., Result], cells: Sequence[Cell], run: Run, *, progress: bool = True
) -> list[Result]:
    """Compute the missing cells, and return the results of all in the order of the cells.

    A cell that raises doesn't stop the others. One whose worker dies (out of memory, a lost
    machine) is computed again, the third time alone.

    Args:
        function: Called as `function(**cell)`; returns plain data. Other processes import it, so
            it stands at the top of a module.
        cells: The grid. The directory remembers it in `study.json`; it may grow.
        run: Where and how.
        progress: Show a progress bar on standard error, with the time left.

    Raises:
        InvalidInput: No cells, or a directory that can't be written to or holds another study or
            results of an incompatible version.
        UnreadableFile: A damaged `study.json`, or a result that can't be read.
        StudyIncomplete: Cells that raised or lost their workers, once all others are done; or a
            result that couldn't be written, as when a disk is full.
    """
    if not cells:
        raise InvalidInput("cells: expected at least one, got none.")
    out = run.out
    files = {cell_file(function, cell, out): cell for cell in cells}
    remember(function, cells, out)
    results = {file: record["result"] for file in files if (record := read_cell(file))}
    if missing := len(files) - len(results):
        jobs = min(run.jobs, missing)
        with (
            tqdm(total=len(files), initial=len(results), smoothing=0, disable=not progress) as bar,
            workers(run.backend, jobs, run.address) as submit,
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


def read_cells(
    function: Callable[..., Result], cells: Sequence[Cell], out: Path
) -> list[tuple[Cell, Record]]:
    """Return the cells that have a result, each with its record.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as out:
        ...     _ = run_cells(dict, [{"seed": 0}], Run(Path(out)), progress=False)
        ...     [(cell, record)] = read_cells(dict, [{"seed": 0}, {"seed": 1}], Path(out))
        >>> record["result"]
        {'seed': 0}
    """
    records = [(cell, read_cell(cell_file(function, cell, out))) for cell in cells]
    return [(cell, record) for cell, record in records if record]


def cell_file(function: Callable[..., Result], cell: Cell, out: Path) -> Path:
    """Path of a cell's result: a hash of the function's name and all settings."""
    settings = json.dumps([function.__qualname__, dict(cell)], sort_keys=True, default=str)
    return out / f"{hashlib.sha256(settings.encode()).hexdigest()[:20]}.json"


def remember(function: Callable[..., Result], cells: Sequence[Cell], out: Path) -> None:
    """Add these cells to `study.json`; refuse a directory that holds another study.

    `study.json` holds the module of the study's functions, the versions that began it, and for
    each function every setting with its values so far.

    Raises:
        InvalidInput: It can't be written to, or holds cells of another module or version.
        UnreadableFile: A damaged `study.json`.
        StudyIncomplete: `study.json` couldn't be written.
    """
    file, name, ours = out / "study.json", _module(function), versions()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / "study.lock").acquire()
    except OSError as error:
        raise InvalidInput(f"out: expected a directory to write to, got {out}: {error}.") from error
    with lock:
        new: Record = {"format": FORMAT, "study": name, "versions": ours, "functions": {}}
        try:
            study = json.loads(file.read_text("utf-8")) if file.exists() else new
            axes = study["functions"].setdefault(function.__qualname__, {})
            format_, version = study["format"], study["versions"]["rewardmodels"]
            other = study["study"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnreadableFile(
                f"{file}: expected the description of a study, got a damaged file "
                f"({error!r}). Delete it, and run the study again: no result depends on it."
            ) from error
        if other != name:
            raise InvalidInput(
                f"out: expected a directory of {name}, or a new one, got {out}, which holds "
                f"{other}. Give another."
            )
        mine = ours["rewardmodels"]
        # Until 1.0 a minor release may break.
        if format_ != FORMAT or version.split(".")[:2] != mine.split(".")[:2]:
            raise InvalidInput(
                f"out: expected results of rewardmodels {mine} (format {FORMAT}), got {out}, which "
                f"holds those of {version} (format {format_}); the two may differ. Give another "
                "directory, or go on with that version."
            )
        before = json.dumps(axes)
        for cell in _as_read([dict(cell) for cell in cells]):
            for axis, value in cell.items():
                if value not in (seen := axes.setdefault(axis, [])):
                    seen.append(value)
        if json.dumps(axes) != before or not file.exists():
            write_record(file, study)


def _module(function: Callable[..., Result]) -> str:
    """Module of a function; of the module that Python was started with, its import name."""
    if function.__module__ != "__main__":
        return function.__module__
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name if spec else Path(getattr(main, "__file__", "__main__")).stem


def read_cell(file: Path) -> Record | None:
    """Return a cell's record; None without one, or with a damaged one, which is renamed.

    Raises:
        UnreadableFile: The system refuses to read the file.
    """
    try:
        record: Record = json.loads(file.read_text("utf-8"))
        _ = record["cell"], record["seconds"], record["result"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableFile(f"{file}: expected a cell's result, got {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        aside = file.with_suffix(".damaged")
        warnings.warn(
            f"{file}: expected a cell's result, got a damaged file ({error!r}). It is kept as "
            f"{aside.name}; running the study computes the cell again.",
            stacklevel=2,
        )
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(file, aside)
        return None
    return record


def write_record(file: Path, record: Record) -> None:
    """Write a record atomically.

    Raises:
        StudyIncomplete: It couldn't be written, as when a disk is full.
    """
    with _having_room(file):
        write_text_atomically(file, json.dumps(record, indent=1, default=_plain))


@contextmanager
def _having_room(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudyIncomplete(
            f"out: expected room for {file}, got {error}. All that was written before is kept: "
            "make room, and the same call goes on."
        ) from error


def _as_read(value: Any) -> Any:
    """Pass a value through JSON, so that a first run returns what a second one reads."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    """Convert NumPy's and PyTorch's numbers to Python's, and anything else to text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _fill(
    function: Callable[..., Result],
    files: Mapping[Path, Cell],
    results: dict[Path, Result],
    submit: Submit,
    jobs: int,
    bar: tqdm,
) -> dict[Path, str]:
    """Add the missing results; return the reason of each failure.

    A running cell is locked by a file lock, which the system frees when the process dies.
    """
    waiting = deque(file for file in files if file not in results)
    running: dict[Future, tuple[Path, FileLock]] = {}
    deaths: Counter[Path] = Counter()
    failed: dict[Path, str] = {}

    def last_attempt(file: Path) -> bool:  # made alone: a dying loky worker takes the others along
        return deaths[file] == _ATTEMPTS - 1

    try:
        while waiting or running:
            for _ in range(len(waiting)):
                if len(running) == jobs or any(last_attempt(file) for file, _ in running.values()):
                    break
                file = waiting.popleft()
                lock = FileLock(file.with_suffix(".lock"))
                if (running and last_attempt(file)) or not _acquire(lock):
                    waiting.append(file)
                elif record := read_cell(file):  # another process was faster
                    file.with_suffix(".lock").unlink(missing_ok=True)
                    lock.release()
                    results[file] = record["result"]
                    bar.update()
                else:
                    running[_start(submit, function, files[file])] = file, lock
            if waiting and not running:
                bar.set_postfix_str("other processes compute what is left")
                time.sleep(0.5)
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                file, lock = running[future]
                try:
                    record = future.result()
                except Exception as error:  # `_compute` lets none out: its worker is gone
                    deaths[file] += 1
                    if deaths[file] < _ATTEMPTS:
                        waiting.append(file)
                    lines = [type(error).__name__, *str(error).strip().splitlines()]
                    why = f"its worker failed {deaths[file]} times, last by {': '.join(lines[:2])}"
                    record = {"error": why, "traceback": lines}
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
                del running[future]
                lock.release()
    finally:
        for _, lock in running.values():
            lock.release()
    return failed


def _acquire(lock: FileLock) -> bool:
    with _having_room(Path(lock.lock_file)):
        try:
            lock.acquire(blocking=False)
        except Timeout:  # which is an OSError too
            return False
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
        result = _as_read(function(**cell))
    except Exception as error:
        trace = traceback.format_exc().splitlines()
        return {"error": f"{type(error).__name__}: {error}", "traceback": trace}
    record = {"function": function.__qualname__, "cell": cell, "versions": versions()}
    return {**record, "seconds": time.perf_counter() - started, "result": result}


@contextmanager
def workers(backend: str, jobs: int, address: str | None) -> Iterator[Submit]:
    """Start workers, or join a cluster's, as of `Run`; those that it started end with the block.

    joblib's own Ray backend returns results only when all are there, and its look-ahead takes
    calls long before they start. So each backend's futures are used directly.

    Yields:
        A `Submit`. A call whose worker dies has a future that raises.

    Raises:
        InvalidInput: No cluster answers at the address.
    """
    here = backend == "loky" and jobs == 1
    start = {"loky": _loky, "ray": _ray, "dask": _dask}[backend]
    with nullcontext(_call_here) if here else start(jobs, address) as submit:
        yield submit


def _call_here(function: Callable[..., Any], *arguments: Any) -> Future:
    done: Future = Future()
    done.set_result(function(*arguments))
    return done


@contextmanager
def _loky(jobs: int, address: str | None) -> Iterator[Submit]:
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // jobs)))
    options = {"max_workers": jobs, "env": {"OMP_NUM_THREADS": threads}}
    try:
        # Asked for at each call, as it makes new workers where one has died.
        yield lambda *call: get_reusable_executor(**options).submit(*call)
    finally:
        get_reusable_executor(**options).shutdown(wait=True, kill_workers=True)


@contextmanager
def _dask(jobs: int, address: str | None) -> Iterator[Submit]:
    from distributed import Client

    local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": ":0"}
    with _reaching(address):
        started = Client(address) if address else Client(**local)
    with started as client:
        yield client.get_executor().submit


@contextmanager
def _ray(jobs: int, address: str | None) -> Iterator[Submit]:
    import ray

    joined = ray.is_initialized()
    if not joined:
        # Workers here find the modules that this process finds; a cluster has paths of its own.
        path = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
        local = {"address": "local", "num_cpus": jobs, "runtime_env": path}
        where = {"address": address} if address else local
        with _reaching(address):
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    try:
        call = ray.remote(max_retries=0)(lambda function, *arguments: function(*arguments))
        yield lambda *arguments: call.remote(*arguments).future()
    finally:
        if not joined:
            ray.shutdown()


@contextmanager
def _reaching(address: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # no connection, or none in time
        if address is None:
            raise
        raise InvalidInput(
            f"address: expected that of a cluster that answers, got {address!r}: {error}."
        ) from error
