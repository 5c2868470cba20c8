"""Directory of a fitted model: `model.safetensors`, `fit.json`, `rows.csv` and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.datasets.files import PreferenceFile
from experiments.datasets.minari import is_minari
from experiments.registry import find_class, foreign_imports
from rewardmodels import Calibrated, InvalidInput, UnreadableFile, load, save
from rewardmodels.saving import write_text_atomically
from rewardmodels.tables import Columns, ItemTable, PreferenceTable


@dataclass(frozen=True)
class FittedRun:
    """Reader and writer of the directory.

    Args:
        path: The directory; it need not exist yet.
    """

    path: Path

    def check_writable(self) -> None:
        """Raise InvalidInput if the directory holds something else than a fit."""
        if self.path.exists() and not self.path.is_dir():
            raise InvalidInput(f"out: expected a directory, got a file, {self.path}.")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._about.is_file():
            raise InvalidInput(
                f"out: expected a directory that is empty or holds a fit, got {self.path} with "
                "other files. Name another."
            )

    @property
    def _about(self) -> Path:
        return self.path / "fit.json"

    def write(self, model: Calibrated, rows: pd.DataFrame, about: Mapping[str, Any]) -> None:
        """Write the model, its predictions, and what is known of it, in this order."""
        self.path.mkdir(parents=True, exist_ok=True)
        checksum = save(model, self.path / "model.safetensors")
        write_text_atomically(self.path / "rows.csv", rows.to_csv(index=False))
        text = json.dumps({**about, "checksum": checksum}, indent=2, default=str)
        write_text_atomically(self._about, text + "\n")

    def about(self) -> dict[str, Any]:
        """Content of `fit.json`.

        Raises:
            InvalidInput: A directory without one.
            UnreadableFile: A damaged one.
        """
        if not self._about.is_file():
            raise InvalidInput(
                f"run: expected a directory of `rewardmodels fit`, got {self.path}, which has no "
                "fit.json."
            )
        try:
            found = json.loads(self._about.read_text(encoding="utf-8"))
            Columns(**found["columns"]), found["names"], found["checksum"], found["command"]
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadableFile(
                f"{self._about}: expected what a fit wrote, got {error}."
            ) from error
        return found

    @property
    def columns(self) -> Columns:
        """Names of the columns of the file that was fitted to."""
        return Columns(**self.about()["columns"])

    def model(self, *, trust: bool = False) -> Calibrated:
        """The model that was kept.

        Args:
            trust: Import its class, which may be a stranger's code.

        Raises:
            InvalidInput: A class that isn't ours, without `trust`.
            UnreadableFile: Another model than the fit's, or a damaged one.
        """
        about = self.about()
        path = about["model"].partition("(")[0]
        if foreign_imports(path) and not trust:
            raise InvalidInput(
                f"trust: expected a model of rewardmodels, got {path!r}, whose import could run "
                "any code. Pass --trust if you trust who wrote it."
            )
        cls: Any = find_class("model", path)
        model: Calibrated = load(self.path / "model.safetensors", cls, checksum=about["checksum"])
        return model

    def read(self, file: Path) -> tuple[pd.DataFrame, PreferenceTable | ItemTable]:
        """A file with the columns of the one fitted to, and its pairs or single items.

        Raises:
            InvalidInput: Other features than the model's, or what can't be read.
            UnreadableFile: A damaged file.
        """
        about, columns = self.about(), self.columns
        features, embed = (about[name] and Path(about[name]) for name in ("features", "embed"))
        source, names = PreferenceFile(file, columns, features, embed), about["names"]
        frame = source.frame()
        try:
            clips = is_minari(str(features))
            columns.sides(frame, whole=bool(features or embed) and not clips)
        except InvalidInput:
            return frame, source.items(names=names)
        return frame, source.read(names=names, labelled=False)
