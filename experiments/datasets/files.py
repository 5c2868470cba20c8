"""Files of preferences: CSV, Parquet, JSON lines, or a Hugging Face data set saved on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from experiments.datasets.embedding import embed_columns
from experiments.datasets.minari import episodes_from_minari, is_minari
from rewardmodels import Clips, InvalidInput, UnreadableFile
from rewardmodels.arrays import ArrayLike
from rewardmodels.errors import require
from rewardmodels.tables import Columns, ItemTable, PreferenceTable, check_rows, whole_numbers

_COPIES = 3  # of a file's bytes, while it is read
_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json")
_MATRICES = (".npy", ".safetensors")


@dataclass(frozen=True)
class PreferenceFile:
    """A file of comparisons, or of single items, and how to read it.

    Args:
        path: CSV, Parquet, JSON lines, or the folder of a Hugging Face data set.
        columns: Names of its columns.
        features: Matrix of items (.npy or .safetensors), of which the file has row numbers; or
            `minari:` and a data set's name or folder, of which it has clips: `first_episode` and
            `first_start` beside `second_episode` and `second_start`, all from 0, and `length` in
            frames (without it, to the episode's end).
        embed: Folder of a sentence-transformers or transformers model, where the file has texts.
    """

    path: Path
    columns: Columns = field(default_factory=Columns)
    features: Path | None = None
    embed: Path | None = None

    def frame(self) -> pd.DataFrame:
        """The table, one row a comparison.

        Raises:
            InvalidInput: No such file, an empty one, one of another kind, or one too large for this
                machine's memory.
            UnreadableFile: A damaged file.
        """
        require("file", self.path.exists(), "one that exists", self.path)
        folder = self.path.is_dir()
        suffix = self.path.suffix.lower()
        expected = f"{', '.join(_SUFFIXES)}, or the folder of a Hugging Face data set"
        require("file", folder or suffix in _SUFFIXES, expected, self.path.name)
        _check_size(self.path)
        try:
            if folder:
                frame = _read_dataset(self.path)
            elif suffix == ".parquet":
                _need("pyarrow", "parquet", "Parquet files")
                frame = pd.read_parquet(self.path)
            elif suffix in (".csv", ".tsv"):
                # A text may well be "None" or "NA".
                strict: Any = {"keep_default_na": False, "na_values": [""], "low_memory": False}
                frame = pd.read_csv(self.path, sep="\t" if suffix == ".tsv" else ",", **strict)
            else:
                frame = _read_json(self.path)
        except (OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            if isinstance(error, InvalidInput):
                raise
            what = " ".join(str(error).split())
            raise UnreadableFile(
                f"{self.path}: expected a table ({suffix or 'datasets'}), got a damaged one: {what}"
            ) from error
        require("file", len(frame) > 0, "at least one row", f"none in {self.path}")
        return frame

    def read(self, *, names: Sequence[str] | None = None, labelled: bool = True) -> PreferenceTable:
        """The comparisons.

        Args:
            names: Names of the features that a model was fitted to; None for all.
            labelled: False for pairs that weren't compared yet.

        Raises:
            InvalidInput: What `frame` or `PreferenceTable` refuses, or labels from which nothing
                can be learned.
            UnreadableFile: A damaged file.
        """
        if self.features is not None and is_minari(str(self.features)):
            table = self._trajectories(names, labelled)
        else:
            frame, features, named = self._read(names, pairs=True)
            table = PreferenceTable.from_frame(
                frame, self.columns, features=features, names=named or names, labelled=labelled
            )
        if labelled:
            table.check()
        return table

    def items(self, *, names: Sequence[str] | None = None) -> ItemTable:
        """Single items, to be scored; arguments and errors are those of `read`."""
        frame, features, named = self._read(names, pairs=False)
        return ItemTable.from_frame(frame, self.columns, features=features, names=named or names)

    def _read(
        self, names: Sequence[str] | None, *, pairs: bool
    ) -> tuple[pd.DataFrame, ArrayLike | None, Sequence[str] | None]:
        both = self.features is not None and self.embed is not None
        require("features", not both, "a matrix, or a model that makes one of texts", "both")
        features = None if self.features is None else read_matrix(self.features)
        frame = self.frame()
        if self.embed is None:
            return frame, features, None
        columns = self.columns
        sides = columns.sides(frame, whole=True) if pairs else (columns.item,)
        frame, features, named = embed_columns(frame, sides, columns.prompt, self.embed)
        _check_names("embed", names, named)
        return frame, features, named

    def _trajectories(self, names: Sequence[str] | None, labelled: bool) -> PreferenceTable:
        """Comparisons of clips of a Minari data set's episodes."""
        require("embed", self.embed is None, "none for trajectories", self.embed)
        frame, episodes = self.frame(), episodes_from_minari(str(self.features))
        sides = self.columns.sides(frame)
        length = None
        if "length" in frame:
            length = whole_numbers(frame, "length", 1, episodes.length)
        spans = np.concatenate([_spans(frame, side, episodes, length) for side in sides])
        distinct, places = np.unique(spans, axis=0, return_inverse=True)
        ids = zip(sides, places.reshape(2, -1), strict=True)
        # The table checks everything but the clips themselves.
        table = PreferenceTable.from_frame(
            frame.assign(**dict(ids)),
            replace(self.columns, first=sides[0], second=sides[1]),
            features=np.zeros((len(distinct), 1)),
            labelled=labelled,
        )
        episode, start, frames = torch.from_numpy(distinct).T
        at = torch.arange(int(frames.max()))
        index = episode[:, None], (start[:, None] + at).clamp_max(episodes.length - 1)
        clips = Clips(
            episodes.observations[index], episodes.actions[index], mask=at < frames[:, None]
        )
        named = tuple(
            f"{kind} {i}"
            for kind, values in {"observation": clips.observations, "action": clips.actions}.items()
            for i in range(values[0, 0].numel())
        )
        _check_names("features", names, named)
        return replace(table, comparisons=replace(table.comparisons, clips=clips), names=named)


def _check_names(name: str, expected: Sequence[str] | None, names: Sequence[str]) -> None:
    if expected is not None:
        same = list(expected) == list(names)
        got = f"{len(names)} from {names[0]} to {names[-1]}"
        ends = f"{expected[0]} to {expected[-1]}"
        require(name, same, f"the model's {len(expected)} features from {ends}", got)


def _spans(
    frame: pd.DataFrame, side: str, episodes: Clips, length: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Episode, first frame and number of frames `(Q, 3)` of a side's clips."""
    for part in ("episode", "start"):
        require(f"{side}_{part}", f"{side}_{part}" in frame, "a column of that name", "none")
    episode = whole_numbers(frame, f"{side}_episode", 0, len(episodes) - 1)
    start = whole_numbers(frame, f"{side}_start", 0, episodes.length - 1)
    left = episodes.lengths.numpy()[episode] - start
    length = left if length is None else length
    inside = (length <= left) & (left > 0)
    check_rows(f"{side}_start", inside, "a clip within its episode", frame[f"{side}_start"])
    return np.stack([episode, start, length], 1)


def read_matrix(path: Path) -> ArrayLike:
    """Map a matrix `(N, D)` into memory, without reading it.

    Args:
        path: A .npy file, or a .safetensors file with one tensor.

    Raises:
        InvalidInput: No such file, or one of another kind.
        UnreadableFile: A damaged file.
    """
    require("features", path.is_file(), "a file that exists", path)
    require("features", path.suffix in _MATRICES, " or ".join(_MATRICES), path.name)
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="c")  # a private map, as PyTorch wants to write
        with safe_open(path, "pt") as file:
            tensors = list(file.keys())
            require("features", len(tensors) == 1, "a file with one tensor", tensors[:10])
            return file.get_tensor(tensors[0])
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise UnreadableFile(f"{path}: expected a matrix, got a damaged file: {error}") from error


def _read_dataset(folder: Path) -> pd.DataFrame:
    """A Hugging Face data set; a dictionary of them gets its keys as the column `split`."""
    _need("datasets", "text", "folders of Hugging Face data sets")
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(folder))
    if not isinstance(data, DatasetDict):
        return data.to_pandas()
    parts = [part.to_pandas().assign(split=name) for name, part in data.items()]
    return pd.concat(parts, ignore_index=True)


def _need(module: str, extra: str, what: str) -> None:
    got = f"none; pip install 'rewardmodels[{extra}]' brings it"
    require(module, find_spec(module) is not None, f"it to be installed for {what}", got)


def _read_json(path: Path) -> pd.DataFrame:
    """One object a line, or a list of objects."""
    text = path.read_text("utf-8").strip()
    if text.startswith("["):
        records = json.loads(text)
    else:
        records = []
        for row, line in enumerate(text.split("\n")):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{error} in row {row} (the first is row 0)") from error
    odd = [row for row, record in enumerate(records) if not isinstance(record, dict)]
    if odd:
        raise ValueError(f"no object with columns by name in row {odd[0]} (the first is row 0)")
    return pd.DataFrame(records)


def _check_size(path: Path) -> None:
    """Refuse what doesn't fit into memory, before it is read."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    require("file", size > 0, "at least one row", f"nothing in {path}")
    free = available_memory()
    expected = f"at most {free / _COPIES / 2**30:.1f} GiB, a third of the memory that is free"
    got = (
        f"{size / 2**30:.1f} GiB; put the features into a .npy matrix (--features), which is "
        "mapped into memory, and their row numbers into the file"
    )
    require("file", _COPIES * size <= free, expected, got)


def available_memory() -> float:
    """Bytes of memory that are free on this machine; infinity if it doesn't tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
