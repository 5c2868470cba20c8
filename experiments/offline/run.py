"""Directory of a fitted model: `model.safetensors`, `fit.json`, `rows.csv` and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.datasets.files import PreferenceFile
from experiments.registry import find_class
from rewardmodels import Calibrated, InvalidInput, UnreadableFile, load, save
from rewardmodels.saving import write_text_atomically
from rewardmodels.tables import Columns


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
            Columns(**found["columns"]), found["names"], found["checksum"]
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadableFile(
                f"{self._about}: expected what a fit wrote, got {error}."
            ) from error
        return found

    def model(self) -> Calibrated:
        """The model that was kept.

        Raises:
            InvalidInput, UnreadableFile: As of `about`, or another model than the fit's.
        """
        about = self.about()
        file = self.path / "model.safetensors"
        cls: Any = find_class("model", about["model"].partition("(")[0])
        model: Calibrated = load(file, cls, checksum=about["checksum"])
        return model

    def source(self, file: Path, **columns: str | None) -> PreferenceFile:
        """A file to be read as the one that the model was fitted to."""
        about = self.about()
        embed, features = (about.get(name) for name in ("embed", "features"))
        given = {name: value for name, value in columns.items() if value is not None}
        return PreferenceFile(
            file,
            Columns(**{**about["columns"], **given}),
            features and Path(features),
            embed and Path(embed),
        )
