"""Files of preferences: CSV, Parquet, JSON lines, or a Hugging Face data set saved on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from rewardmodels import InvalidInput
from rewardmodels.tables import Columns, PreferenceTable


@dataclass(frozen=True)
class PreferenceFile:
    """A file of comparisons and how to read it.

    Args:
        path: CSV, Parquet, JSON lines, or the folder of a Hugging Face data set.
        columns: Names of its columns.
        features: Matrix of items (.npy or .safetensors), of which the file has row numbers.
        embed: Folder of a sentence-transformers or transformers model, where the file has texts.
    """

    path: Path
    columns: Columns = field(default_factory=Columns)
    features: Path | None = None
    embed: Path | None = None

    def frame(self) -> pd.DataFrame:
        """The table, one row a comparison."""
        if not self.path.exists():
            raise InvalidInput(f"file: expected one that exists, got {self.path}.")
        return pd.read_csv(self.path)

    def read(self) -> PreferenceTable:
        """The comparisons."""
        features = None if self.features is None else np.load(self.features, mmap_mode="c")
        return PreferenceTable.from_frame(self.frame(), self.columns, features=features)
