"""Comparisons from a table with a row for each: features in columns, or ids of rows of a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rewardmodels.arrays import ArrayLike, as_tensor
from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, require

if TYPE_CHECKING:
    import pandas as pd

_SIDES = {"first": "second", "chosen": "rejected"}


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    The two sides of a comparison are `first` and `second`, with `preference`, or `chosen` and
    `rejected`. Each is one column of lists of numbers, or of row numbers of a matrix, or several:
    `first_price` and `first_time` beside `second_price` and `second_time`.

    Args:
        first: Name, or prefix, of the first side; None for "first" or "chosen", whichever is there.
        second: Of the second side; None for "second" or "rejected".
        preference: Probability that the second is preferred; without such a column the first side
            is the preferred one if it is named "chosen".
        margin: By how many nats the preferred one is better: what was preferred with certainty is
            then preferred with the probability sigmoid(margin).
        group: Equal where rows belong together, such as one person's, or those about one prompt.
        weight: Whole number of answers that a row stands for.
        split: "train" or "test".
    """

    first: str | None = None
    second: str | None = None
    preference: str = "preference"
    margin: str = "margin"
    group: str = "group"
    weight: str = "weight"
    split: str = "split"


@dataclass(frozen=True, eq=False)
class PreferenceTable:
    """Comparisons of items, and what a table says of each.

    Args:
        comparisons: Q comparisons of clips of one frame without action.
        names: Names of the D features.
        rows: `(Q,)` long, the table's row that each comparison comes from.
        groups: `(Q,)` long, equal where rows belong together; None for no such column.
        tested: `(Q,)` bool, True for rows of the split "test"; None for no such column.
    """

    comparisons: Comparisons
    names: tuple[str, ...]
    rows: Tensor
    groups: Tensor | None = None
    tested: Tensor | None = None

    def __len__(self) -> int:
        return len(self.comparisons)

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame | Mapping[str, Any],
        columns: Columns | None = None,
        *,
        features: ArrayLike | None = None,
    ) -> PreferenceTable:
        """Read a data frame, or anything else with columns by name.

        Args:
            frame: Q rows.
            columns: Names of its columns; None for the usual ones.
            features: `(N, D)`, one item a row, where the table has row numbers of it.

        Raises:
            InvalidInput: Missing columns, or numbers that can't be used; with the row.
        """
        import pandas as pd

        frame = frame if isinstance(frame, pd.DataFrame) else pd.DataFrame(dict(frame))
        columns = columns or Columns()
        require("table", len(frame) > 0, "at least one row", "none")
        first, second = sides(frame, columns)
        if features is not None:
            items, named = as_tensor("features", features), None
            pairs = torch.stack([_ids(frame, side, len(items)) for side in (first, second)], 1)
        else:
            found = {side: _numbers(frame, side) for side in (first, second)}
            named = found[first][1]
            expected = f"the same features as {first}, {', '.join(named)}"
            require(second, found[second][1] == named, expected, found[second][1])
            items = torch.cat([found[side][0] for side in (first, second)])
            pairs = torch.arange(len(items)).view(2, -1).T
        names = tuple(map(str, range(items.shape[1]) if named is None else named))
        preference = _preference(frame, columns, first)
        rows = torch.arange(len(frame))
        if columns.weight in frame:
            rows = rows.repeat_interleave(_whole(frame, columns.weight))
        comparisons = Comparisons(Clips.of_items(items), pairs, preference)[rows]
        groups = tested = None
        if columns.group in frame:
            groups = torch.from_numpy(frame[columns.group].factorize(use_na_sentinel=False)[0])
            groups = groups.long()[rows]
        if columns.split in frame:
            tested = as_tensor(columns.split, (frame[columns.split] == "test").to_numpy())[rows]
        return cls(comparisons, names, rows, groups, tested)

    def differences(self) -> Tensor:
        """Features `(Q, D)` of the second item minus those of the first."""
        items = self.comparisons.clips.observations[:, 0]
        first, second = self.comparisons.pairs.T
        return items[second] - items[first]

    def __getitem__(self, index: Any) -> PreferenceTable:
        optional = (None if x is None else x[index] for x in (self.groups, self.tested))
        return PreferenceTable(self.comparisons[index], self.names, self.rows[index], *optional)


@dataclass(frozen=True, eq=False)
class ItemTable:
    """Single items of a table.

    Args:
        items: N clips of one frame without action.
        names: Names of the D features.
        rows: `(N,)` long, the table's row of each.
        groups: `(N,)` long, equal where rows belong together; None for no such column.
    """

    items: Clips
    names: tuple[str, ...]
    rows: Tensor
    groups: Tensor | None = None

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, names: Sequence[str], columns: Columns | None = None
    ) -> ItemTable:
        """Read the features of these names, one column each.

        Raises:
            InvalidInput: Columns that aren't there, or numbers that can't be used.
        """
        columns = columns or Columns()
        missing = [name for name in names if name not in frame]
        expected = f"columns first_… and second_…, or of the features {', '.join(names[:5])} …"
        require("table", not missing, expected, f"none of the name {missing[:1]}")
        items = Clips.of_items(as_tensor("features", frame[list(names)].to_numpy()).float())
        groups = None
        if columns.group in frame:
            numbers = frame[columns.group].factorize(use_na_sentinel=False)[0]
            groups = torch.from_numpy(numbers).long()
        return cls(items, tuple(names), torch.arange(len(frame)), groups)


def sides(frame: pd.DataFrame, columns: Columns) -> tuple[str, str]:
    """Names, or prefixes, of the columns of the first and of the second side.

    Raises:
        InvalidInput: There are no such columns.
    """
    given = [columns.first, columns.second]
    for first, second in _SIDES.items():
        sides = given[0] or first, given[1] or second
        if all(side in frame or _features(frame, side) for side in sides):
            return sides
    raise InvalidInput(
        "table: expected columns first_… and second_…, or chosen_… and rejected_…, or two lists or "
        f"ids of these names; got {', '.join(map(str, frame.columns)) or 'none'}. Name yours by "
        "`Columns`, or --columns.first and --columns.second."
    )


def _features(frame: pd.DataFrame, side: str) -> list[str]:
    return [name for name in map(str, frame.columns) if name.startswith(f"{side}_")]


def _numbers(frame: pd.DataFrame, side: str) -> tuple[Tensor, list[str]]:
    """Features `(Q, D)` of a side, and their names."""
    if names := _features(frame, side):
        values = as_tensor(side, frame[names].to_numpy()).float()
        return values, [name.removeprefix(f"{side}_") for name in names]
    values = as_tensor(side, np.stack(frame[side].to_list())).float()
    return values, [str(j) for j in range(values.shape[1])]


def _ids(frame: pd.DataFrame, side: str, n: int) -> Tensor:
    return _whole(frame, side)


def _whole(frame: pd.DataFrame, name: str) -> Tensor:
    return as_tensor(name, frame[name].to_numpy()).long()


def _preference(frame: pd.DataFrame, columns: Columns, first: str) -> Tensor:
    """Probability `(Q,)` that the second side is preferred."""
    if columns.preference in frame:
        preference = as_tensor(columns.preference, frame[columns.preference].to_numpy()).float()
    else:
        require(columns.preference, first == "chosen", "a column of that name", "none")
        preference = torch.zeros(len(frame))
    if columns.margin in frame:
        margin = as_tensor(columns.margin, frame[columns.margin].to_numpy()).float()
        preference = 0.5 + (preference - 0.5) * (2 * margin.sigmoid() - 1)
    return preference
