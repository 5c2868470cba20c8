"""What stands in a study's directory: a file for each cell, and `study.json`, which says whose."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiments.training.run_directory import versions
from rewardmodels.errors import InvalidInput, RewardModelsError, UnreadableFile
from rewardmodels.saving import write_text_atomically

FORMAT = 1

Cell = Mapping[str, Any]
"""Settings of a cell: names and plain values (numbers, text, lists of them)."""

Result = dict[str, Any]

Record = dict[str, Any]
"""What a file holds: a cell with its result and what is to be known of it."""


class StudyIncomplete(RewardModelsError, RuntimeError):
    """Some cells of a study have no result; those that have one are kept."""


def cell_file(function: Callable[..., Result], cell: Cell, out: Path) -> Path:
    """Where a cell's result stands: a name made of its function's and of all its settings."""
    settings = json.dumps([function.__qualname__, dict(cell)], sort_keys=True, default=str)
    return out / f"{hashlib.sha256(settings.encode()).hexdigest()[:20]}.json"


def remember(function: Callable[..., Result], cells: Sequence[Cell], out: Path) -> None:
    """Refuses a directory that holds something else, and adds these cells to what it remembers.

    `study.json` has the module of the study's functions, the versions that began it, and for each
    function its axes: every setting with the values seen so far.

    Args:
        function: Whose cells they are.
        cells: The grid.
        out: Directory of the study; made if need be.

    Raises:
        InvalidInput: It can't be written to, or holds cells of another module, or of a version
            whose figures may differ.
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
                f"{file}: expected what a study remembers of itself, got a damaged file "
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
        for cell in as_read([dict(cell) for cell in cells]):
            for axis, value in cell.items():
                if value not in (seen := axes.setdefault(axis, [])):
                    seen.append(value)
        if json.dumps(axes) != before or not file.exists():
            write_record(file, study)


def _module(function: Callable[..., Result]) -> str:
    """The module's name; of the one that Python was started with, that by which it's imported."""
    main = sys.modules["__main__"]
    if function.__module__ != "__main__":
        return function.__module__
    spec = getattr(main, "__spec__", None)
    return spec.name if spec else Path(getattr(main, "__file__", "__main__")).stem


def read_cell(file: Path) -> Record | None:
    """A cell's record; None where there is none, or a damaged one, which is put aside.

    Damage costs no more than the cell's time, since a cell is a function of its settings.

    Raises:
        UnreadableFile: The file is there, and the system doesn't let it be read.
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
    """Writes a file whole or not at all.

    Raises:
        StudyIncomplete: It couldn't be written, as when a disk is full.
    """
    try:
        write_text_atomically(file, json.dumps(record, indent=1, default=_plain))
    except OSError as error:
        raise no_room(file, error) from error


def no_room(file: Path, error: OSError) -> StudyIncomplete:
    """What to raise when a file can't be written."""
    return StudyIncomplete(
        f"out: expected room for {file}, got {error}. All that was written before is kept: make "
        "room, and the same call goes on."
    )


def as_read(value: Any) -> Any:
    """What JSON makes of a value, so that a first run returns what a second one reads."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    """NumPy's and PyTorch's numbers as Python's, and what else JSON doesn't know as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
