"""What a run of `learn` left behind, as figures, sentences and tables read it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import yaml
from numpy.typing import NDArray

from experiments.analysis.plots import ARMS, OTHER, Arm
from rewardmodels.errors import InvalidInput, UnreadableFile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read; what isn't there yet is empty.

    Attributes:
        path: The directory.
        metrics: Columns of `metrics.csv`, each `(rounds,)`; an empty cell is NaN.
        result: `result.json`, empty before the run has ended.
        settings: `config.yaml`.
        frames: `frames.npz`: `predicted`, `std` and `true`, each `(M,)`, or empty.
    """

    path: Path
    metrics: Mapping[str, Floats]
    result: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    frames: Mapping[str, Floats] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> RunFiles:
        """Read a run directory.

        Raises:
            InvalidInput: If it has no `config.yaml` or no `metrics.csv`.
            UnreadableFile: If one of its files is damaged.
        """
        for name in ("config.yaml", "metrics.csv"):
            if not (path / name).is_file():
                raise InvalidInput(
                    f"{path}: expected a run's directory, with config.yaml and metrics.csv, got "
                    f"one without {name}. `rewardmodels learn --out {path}` makes one."
                )
        return cls(
            path,
            _read(path / "metrics.csv", _columns),
            _read(path / "result.json", lambda file: json.loads(file.read_text("utf-8"))),
            _read(path / "config.yaml", lambda file: yaml.safe_load(file.read_text("utf-8"))),
            _read(path / "frames.npz", _arrays),
        )

    @property
    def arm(self) -> Arm:
        """How the run is called and drawn."""
        kind = self.result.get("reward", self.settings.get("reward"))
        return ARMS.get(kind, OTHER) if isinstance(kind, str) else OTHER

    def curve(self, x: str, y: str) -> tuple[Floats, Floats]:
        """Columns `x` and `y` of the metrics where both have a value, each `(rows,)`."""
        none = np.empty(0)
        xs, ys = self.metrics.get(x, none), self.metrics.get(y, none)
        if len(xs) != len(ys):
            return none, none
        there = np.isfinite(xs) & np.isfinite(ys)
        return xs[there], ys[there]

    def last(self, column: str) -> float:
        """A column's last value, or NaN."""
        values = self.metrics.get(column, np.empty(0))
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else float("nan")

    def outcome(self, key: str, column: str | None = None) -> float:
        """A number of the result, or else of the last round that has it, or NaN."""
        value = self.result.get(key)
        known = isinstance(value, int | float) and np.isfinite(value)
        return float(value) if known else self.last(column or key)  # type: ignore[arg-type]

    @property
    def final_returns(self) -> list[float]:
        """True return of each evaluation episode."""
        returns = self.result.get("final_returns")
        known = returns if isinstance(returns, list) else []
        return [float(r) for r in known if isinstance(r, int | float) and np.isfinite(r)]

    @property
    def final_return(self) -> float:
        """Mean true return of the evaluation, or of the last round while there is none."""
        return self.outcome("final_return", "task_return")


def _read(path: Path, reader: Callable[[Path], Mapping[str, Any] | None]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = reader(path) or {}
        if not isinstance(content, Mapping):
            raise TypeError(f"expected names with values, got a {type(content).__name__}")
    except (
        ValueError,
        TypeError,
        KeyError,
        OSError,
        EOFError,
        BadZipFile,
        yaml.YAMLError,
    ) as error:
        raise UnreadableFile(f"{path}: can't be read, {error}") from error
    return content


def _columns(path: Path) -> dict[str, Floats]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, restval=""))
    names = [name for name in (rows[0] if rows else ()) if name is not None]
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def _arrays(path: Path) -> dict[str, Floats]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name], float) for name in ("predicted", "std", "true")}
    if len({array.shape for array in arrays.values()}) > 1 or arrays["true"].ndim != 1:
        raise ValueError(f"expected one shape (M,), got {[a.shape for a in arrays.values()]}")
    there = np.all([np.isfinite(array) for array in arrays.values()], axis=0)
    return {name: array[there] for name, array in arrays.items()} if there.any() else {}


def correlation(frames: Mapping[str, Floats]) -> float:
    """Pearson correlation of learned and true reward over frames; NaN where either is constant."""
    predicted, true = frames["predicted"], frames["true"]
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, true)[0, 1])
