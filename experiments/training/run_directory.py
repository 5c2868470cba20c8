"""A run's directory: settings, metrics, checkpoints, result, each written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from experiments.registry import describe_settings
from rewardmodels import InvalidInput, UnreadableFile
from rewardmodels.saving import atomic_path, write_text_atomically

METRICS = (
    "step",
    "comparisons",
    "queries",
    "skipped",
    "episodes",
    "task_return",
    "learned_return",
    "held_out_accuracy",
    "held_out_log_loss",
    "train_log_loss",
    "reward_correlation",
    "mean_information",
    "seconds",
)


class Run:
    """What is kept of one run.

    Args:
        path: The run directory; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, float]] = []
        self._board: SummaryWriter | None = None

    def check(self, config: Any, *, resume: bool) -> None:
        """Refuses what `start` couldn't begin or go on with, and writes nothing.

        Raises:
            InvalidInput: The directory holds a run and `resume` is off, or holds none and `resume`
                is on, or holds one with other settings.
            UnreadableFile: The settings that it holds are damaged.
        """
        file = self.path / "config.yaml"
        wanted = yaml.safe_load(yaml.safe_dump(describe_settings(config)))
        if resume and not file.exists():
            raise InvalidInput(
                f"out: expected a run to go on with, got {self.path}, which has none."
            )
        if not resume:
            if found := [name for name in _MADE if (self.path / name).exists()]:
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
        elif changed := _changed(_settings(file), wanted):
            raise InvalidInput(
                f"resume: expected the settings that {self.path} was started with, got another "
                f"{changed}. Leave that out, or start a new run in another --out."
            )

    def start(self, config: Any) -> None:
        """Makes the directory with its `config.yaml`; one that is there stays as it is."""
        file = self.path / "config.yaml"
        if not file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text_atomically(file, yaml.safe_dump(describe_settings(config), sort_keys=False))

    def log(self, row: dict[str, float]) -> None:
        """Adds a row to `metrics.csv` and to TensorBoard.

        A row of a step that was logged before, by a process killed before its checkpoint, takes
        that row's place in both.
        """
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text_atomically(self.path / "metrics.csv", text.getvalue())
        step = int(row["step"])
        # One file a process: TensorBoard reads those of one second in no order, and each purges.
        if self._board is None:
            self._board = SummaryWriter(self.path / "tensorboard", purge_step=step)
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def checkpoint(self, number: int, write: Callable[[Path], None]) -> None:
        """Keeps what `write` puts into a fresh directory; the one before stays as a spare."""
        folder = self.path / "checkpoints"
        for stale in folder.glob(".*.part"):  # of a process that was killed
            shutil.rmtree(stale)
        folder.mkdir(exist_ok=True)
        with atomic_path(folder / f"{number:04d}") as part:
            part.mkdir()
            write(part)
            (part / "rows.json").write_text(json.dumps(self.rows))
        for old in self._checkpoints()[:-2]:
            shutil.rmtree(old)

    def restore(self, read: Callable[[Path, int], None]) -> None:
        """Lets `read` take up the newest checkpoint and its number, if there is one.

        Raises:
            UnreadableFile: The checkpoint is damaged.
        """
        if not (found := self._checkpoints()):
            return
        newest = found[-1]
        try:
            self.rows = json.loads((newest / "rows.json").read_text())
            read(newest, int(newest.name))
        except Exception as error:
            raise UnreadableFile(
                f"{newest}: expected a whole checkpoint, got a damaged one ({error}). Delete this "
                "directory to go on from the one before; no answer is lost by that."
            ) from error

    def finish(self, result: dict[str, Any]) -> None:
        """Writes `result.json`, which marks the run as complete."""
        write_text_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is incomplete."""
        file = self.path / "result.json"
        if not file.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise UnreadableFile(
                f"{file}: expected the result of a run, got a damaged file ({error}). Delete it "
                "to make it again from the last checkpoint."
            ) from error
        return found

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in (self.path / "checkpoints").glob("[0-9]*") if p.is_dir())


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("rewardmodels", "torch", "lightning", "stable-baselines3", "gymnasium", "mujoco")
    found = {name: version(name) for name in names}
    with suppress(PackageNotFoundError):
        found["envpool"] = version("envpool")
    return {"python": platform.python_version(), **found}


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs, in words; a setting that came with a later version doesn't count."""
    before, now = _flat(old), _flat(new)
    return ", ".join(
        f"{name} ({now.get(name)} in place of {value})"
        for name, value in before.items()
        if now.get(name) != value
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            inner = prefix if name == "init_args" else f"{prefix}{name}."
            flat |= _flat(value, inner)
        else:
            flat[prefix.rstrip(".") if name == "class_path" else prefix + name] = value
    return flat


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected settings by name, got {type(found).__name__}")
    except (ValueError, yaml.YAMLError) as error:
        raise UnreadableFile(
            f"{file}: expected the settings of a run, got a damaged file "
            f"({' '.join(str(error).split())})."
        ) from error
    return found


# Any of these is the trace of a run.
_MADE = ("config.yaml", "result.json", "answers.sqlite", "checkpoints", "metrics.csv")
