"""Directory of a run: settings, metrics, checkpoints and result, written atomically and read back.

- `config.yaml`: settings, as `rewardmodels learn --config` takes them
- `metrics.csv`: a row for each round (also in `tensorboard/`)
- `answers.sqlite`: queries and comparisons (`active.FeedbackStore`)
- `checkpoints/0007/`: state from which the next round starts; no file of it runs code when read
- `result.json`: evaluation of the final policy; marks the run as complete
- `frames.npz`: predicted and true reward of frames that the final policy visits
- `model.safetensors`: the reward model
- `report.html`: the report, with `figures/` and `video.mp4`
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from experiments.registry import describe_settings, foreign_imports
from rewardmodels.errors import InvalidInput, UnreadableFile
from rewardmodels.saving import atomic_path, write_text_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Floats = NDArray[np.float64]

METRICS = (
    *("step", "comparisons", "queries", "skipped", "episodes", "task_return", "learned_return"),
    *("held_out_accuracy", "held_out_log_loss", "train_log_loss", "reward_correlation"),
    *("mean_information", "seconds"),
)

_DAMAGED = (
    *(ValueError, TypeError, KeyError, OSError, EOFError, RecursionError, BadZipFile),
    yaml.YAMLError,
)
_RUN_FILES = ("config.yaml", "result.json", "answers.sqlite", "checkpoints", "metrics.csv")


class RunDirectory:
    """Reader and writer of a run's directory.

    Nothing is cached, since another process may be writing. Reading a damaged file raises
    UnreadableFile.

    Args:
        path: The directory; it need not exist yet.

    Attributes:
        rows: Metrics of the rounds that this process logged or restored.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.settings_file = self.path / "config.yaml"
        self.rows: list[dict[str, float]] = []
        self._board: SummaryWriter | None = None

    @property
    def exists(self) -> bool:
        """True once a run was started here."""
        return self.settings_file.is_file()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the run was started with; empty if none was."""
        return self._read("config.yaml", _read_settings) or {}

    @property
    def result(self) -> dict[str, Any] | None:
        """Content of `result.json`, or None while the run is incomplete."""
        return self._read("result.json", _read_result)

    @property
    def metrics(self) -> pd.DataFrame:
        """Rows of `metrics.csv`, one a round; an empty cell is NaN."""
        found = self._read("metrics.csv", lambda file: pd.read_csv(file, dtype=float))
        return pd.DataFrame() if found is None else found

    @property
    def frames(self) -> dict[str, Floats]:
        """Arrays `predicted`, `std` and `true` of `frames.npz`, each `(M,)`; empty without any."""
        return self._read("frames.npz", _read_frames) or {}

    @property
    def checkpoints(self) -> list[Path]:
        """Directories of complete checkpoints; the newest is the last."""
        return sorted(p for p in (self.path / "checkpoints").glob("[0-9]*") if p.is_dir())

    @property
    def task(self) -> str | None:
        """Name of the task, or None if neither result nor settings have it."""
        return (self.result or {}).get("task", self.settings.get("task"))

    @property
    def reward(self) -> str:
        """Kind of reward that the policy maximises."""
        return str(self.settings.get("reward"))

    @property
    def final_return(self) -> float:
        """Mean true return of the evaluation, or of the last round while there is none."""
        return self.outcome("final_return", "task_return")

    def curve(self, x: str, y: str) -> tuple[Floats, Floats]:
        """Columns `x` and `y` of the metrics where both are finite, each `(rows,)`."""
        both = self.metrics.reindex(columns=[x, y]).to_numpy(float)
        xs, ys = both[np.isfinite(both).all(1)].T
        return xs, ys

    def outcome(self, key: str, column: str | None = None) -> float:
        """Number of the result, or else of the last round that has it, or NaN."""
        value = (self.result or {}).get(key)
        if value is not None:
            return float(value)
        values, _ = self.curve(column or key, column or key)
        return float(values[-1]) if len(values) else float("nan")

    def check_readable(self) -> None:
        """Raise unless the directory holds a run, with undamaged files.

        Raises:
            InvalidInput: No `config.yaml` or no `metrics.csv`.
            UnreadableFile: One of its files is damaged.
        """
        for name in ("config.yaml", "metrics.csv"):
            if not (self.path / name).is_file():
                raise InvalidInput(
                    f"{self.path}: expected a run's directory, with config.yaml and metrics.csv, "
                    f"got one without {name}. `rewardmodels learn --out {self.path}` makes one."
                )
        _ = self.settings, self.result, self.metrics, self.frames

    def check_trusted(self, *, only: Sequence[str] = (), given: Any = None) -> None:
        """Raise if the run's settings name something to import that may be a stranger's.

        Args:
            only: Settings that are used; all if there are none.
            given: Settings that the user gave, whose names are trusted.

        Raises:
            InvalidInput: There is such a name.
            UnreadableFile: The settings are damaged.
        """
        settings = self.settings
        used = {name: settings.get(name) for name in only} if only else settings
        if foreign := sorted({*foreign_imports(used)} - {*foreign_imports(given)}):
            raise InvalidInput(
                f"trust: expected settings that name only classes of rewardmodels, got "
                f"{self.settings_file}, for which {', '.join(map(repr, foreign))} would be "
                "imported, and could run any code. Pass --trust if you trust who wrote it."
            )

    def check_writable(self, config: Any, *, resume: bool) -> None:
        """Raise unless a run with these settings can be started or resumed here.

        Raises:
            InvalidInput: The directory holds a run and `resume` is off, or holds none and `resume`
                is on, or holds one with other settings.
            UnreadableFile: The settings in it are damaged.
        """
        wanted = flatten(yaml.safe_load(yaml.safe_dump(describe_settings(config))))
        if resume:
            if not self.exists:
                raise InvalidInput(
                    f"out: expected a run to go on with, got {self.path}, which has none."
                )
            if changed := [
                f"{name} ({wanted.get(name)} in place of {value})"
                for name, value in flatten(self.settings).items()
                if wanted.get(name) != value
            ]:
                raise InvalidInput(
                    f"resume: expected the settings that {self.path} was started with, got another "
                    f"{', '.join(changed)}. Leave that out, or start a new run in another --out."
                )
            return
        if found := [name for name in _RUN_FILES if (self.path / name).exists()]:
            raise InvalidInput(
                f"out: expected a new directory, got {self.path}, which already holds a run "
                f"({found[0]}). Pass --resume to go on with it, or another --out."
            )
        above = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InvalidInput(
                f"out: expected a directory that can be written to, got {self.path}: {above} "
                "isn't one."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working on the run; a killed one leaves no lock.

        The directory is made, and removed again unless the run is started in the block.

        Raises:
            InvalidInput: Another process works on the run, or the directory can't be made.
        """
        new = [p for p in (self.path, *self.path.parents) if not p.exists()]
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout as error:
            raise InvalidInput(
                f"out: expected a run that no other process works on, got {self.path}. Wait for "
                "that process or stop it, or pass another --out."
            ) from error
        except OSError as error:
            raise InvalidInput(
                f"out: expected a directory that can be written to, got {self.path}: {error}."
            ) from error
        try:
            yield
        finally:
            lock.release()
            if new and not self.exists:
                (self.path / ".lock").unlink(missing_ok=True)
                with suppress(OSError):  # something else is in it by now
                    for folder in new:
                        folder.rmdir()

    def start(self, config: Any) -> None:
        """Make the directory and its `config.yaml`; an existing one stays as it is."""
        if not self.exists:
            self.path.mkdir(parents=True, exist_ok=True)
            settings = yaml.safe_dump(describe_settings(config), sort_keys=False)
            write_text_atomically(self.settings_file, settings)

    def log(self, row: dict[str, float]) -> None:
        """Add a row to `metrics.csv` and to TensorBoard.

        A row of a step that was logged before, by a process killed before its checkpoint, takes
        that row's place in both.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow, and no reader needs it

        self.rows.append(row)
        table = pd.DataFrame(self.rows, columns=METRICS).to_csv(index=False)
        write_text_atomically(self.path / "metrics.csv", table)
        step = int(row["step"])
        # One file a process: TensorBoard reads those of one second in no order, and each purges.
        if self._board is None:
            self._board = SummaryWriter(self.path / "tensorboard", purge_step=step)
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def checkpoint(self, number: int, write: Callable[[Path], None]) -> None:
        """Write a checkpoint by `write(directory)`; the one before is kept as a spare."""
        folder = self.path / "checkpoints"
        for stale in folder.glob(".*.part"):  # of a process that was killed
            shutil.rmtree(stale)
        folder.mkdir(exist_ok=True)
        with atomic_path(folder / f"{number:04d}") as part:
            part.mkdir()
            write(part)
            (part / "rows.json").write_text(json.dumps(self.rows))
        for old in self.checkpoints[:-2]:
            shutil.rmtree(old)

    def restore(self, read: Callable[[Path, int], None]) -> None:
        """Call `read` with the newest checkpoint and its number, if there is one.

        Raises:
            UnreadableFile: The checkpoint is damaged.
        """
        if not (found := self.checkpoints):
            return
        newest = found[-1]
        check_pickled(newest)
        try:
            self.rows = json.loads((newest / "rows.json").read_text())
            read(newest, int(newest.name))
        except Exception as error:
            raise UnreadableFile(
                f"{newest}: expected a whole checkpoint, got a damaged one ({in_short(error)}). "
                "Delete this directory to go on from the one before; no comparison is lost by that."
            ) from error

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`, which marks the run as complete."""
        write_text_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        """Content of a file, or None if there is no such file."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            content = read(file)
            if not isinstance(content, Mapping | pd.DataFrame):
                raise TypeError(f"it holds a {type(content).__name__}, and no names with values")
        except _DAMAGED as error:
            reason = in_short(error)
            hint = " Delete it to resume from the last checkpoint." if name == "result.json" else ""
            raise UnreadableFile(
                f"{file}: expected a file of a run, got a damaged one ({reason}).{hint}"
            ) from error
        return content


def in_short(error: Exception) -> str:
    """Say in one line what was wrong: the first sentence of an error that may have pages."""
    return " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__


def check_pickled(checkpoint: Path) -> None:
    """Raise UnreadableFile for a checkpoint of an earlier version, whose files could run code."""
    for name in ("agent.zip", "normalise.pkl", "replay.pkl"):
        if (checkpoint / name).exists():
            raise UnreadableFile(
                f"{checkpoint}: expected a checkpoint without code, got one of an earlier version, "
                f"whose {name} could run any when it is read. Start a new run in another --out."
            )


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    names = ("rewardmodels", "torch", "lightning", "stable-baselines3", "gymnasium", "mujoco")
    found = {name: version(name) for name in names}
    with suppress(PackageNotFoundError):
        found["envpool"] = version("envpool")
    return {"python": platform.python_version(), **found}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested settings as the command line's flags do.

    Example:
        >>> flatten({"seed": 1, "model": {"class_path": "Mine", "init_args": {"members": 3}}})
        {'seed': 1, 'model': 'Mine', 'model.members': 3}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            flat[prefix.rstrip(".") if name == "class_path" else prefix + name] = value
    return flat


def _read_settings(file: Path) -> Any:
    found = yaml.safe_load(file.read_text("utf-8"))
    for name in ("task", "reward", "algorithm"):
        if isinstance(found, Mapping) and not isinstance(found.get(name, ""), str):
            raise ValueError(f"{name} is {found[name]!r}, and no text")
    return found


def _read_result(file: Path) -> Any:
    found = json.loads(file.read_text("utf-8"))
    if not isinstance(found, Mapping):
        return found
    counts = [n.removesuffix("_per_1000_steps") for n in found if n.endswith("_per_1000_steps")]
    needed = ["task", "reward", "steps", "comparisons", "final_return", *counts]
    lists = ["final_returns", *counts]
    for name in {**dict.fromkeys(needed), **found}:
        value = found.get(name)
        if name in ("task", "reward", "algorithm", "video_note", "model"):
            valid = isinstance(value, str)
        elif name == "versions":
            valid = isinstance(value, Mapping)
        elif name in lists:
            valid = isinstance(value, list) and value != []
            valid = valid and all(isinstance(x, int | float) for x in value or ())
        else:
            valid = isinstance(value, int | float)
        if not valid and (value is not None or name in [*needed, *lists, "versions"]):
            raise ValueError(f"{name} is {value!r:.50}")
    return found


def _read_frames(file: Path) -> dict[str, Floats]:
    with file.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
        found = {name: np.asarray(arrays[name], float) for name in ("predicted", "std", "true")}
    if len({array.shape for array in found.values()}) > 1 or found["true"].ndim != 1:
        raise ValueError(f"expected one shape (M,), got {[a.shape for a in found.values()]}")
    finite = np.all([np.isfinite(array) for array in found.values()], axis=0)
    return {name: array[finite] for name, array in found.items()} if finite.any() else {}
