"""Comparisons from a table with a row for each: features in columns, or ids of rows of a matrix."""

from __future__ import annotations

import json
import re
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewardmodels.arrays import ArrayLike, as_tensor
from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, UnknownName, require

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.floating[Any]]

_SIDES = {"first": "second", "chosen": "rejected"}
_SPLITS = {"train": False, "test": True, "validation": True}
_MOST_ANSWERS = 10_000_000


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    The two sides of a comparison are `first` and `second`, with `preference`, or `chosen` and
    `rejected`. Each is one column of lists of numbers, of row numbers of a matrix, or of texts, or
    several columns: `first_price` and `first_time` beside `second_price` and `second_time`. A
    table of single items has the column `item`, columns `item_price` and so on, or columns of the
    features' own names.

    Args:
        first: Name, or prefix, of the first side; None for "first" or "chosen", whichever is there.
        second: Of the second side; None for "second" or "rejected".
        preference: Probability that the second is preferred; without such a column the first side
            is the preferred one if it is named "chosen".
        margin: By how many nats the preferred one is better: what was preferred with certainty is
            then preferred with the probability sigmoid(margin).
        group: Equal where rows belong together, such as one person's, or those about one prompt.
        weight: Whole number of answers that a row stands for.
        split: "train" or "test"; "validation" is the same as "test".
        item: Name, or prefix, of single items.
        prompt: What the texts of a row answer.
    """

    first: str | None = None
    second: str | None = None
    preference: str = "preference"
    margin: str = "margin"
    group: str = "group"
    weight: str = "weight"
    split: str = "split"
    item: str = "item"
    prompt: str = "prompt"

    def sides(self, frame: pd.DataFrame, *, whole: bool = False) -> tuple[str, str]:
        """Names, or prefixes, of the two sides in a table.

        Args:
            frame: The table.
            whole: Each side has to be one column.

        Raises:
            InvalidInput: They aren't there.
        """
        for first, second in _SIDES.items():
            sides = self.first or first, self.second or second
            if all(side in frame or (_prefixed(frame, side, self) and not whole) for side in sides):
                return sides
        many = "" if whole else "first_… and second_…, or chosen_… and rejected_…, or "
        raise InvalidInput(
            f"table: expected columns {many}first and second, or chosen and rejected; got "
            f"{', '.join(_plain(frame)[:20])}. Name yours by Columns(first=…, second=…), or "
            "--columns.first and --columns.second."
        )


@dataclass(frozen=True, eq=False)
class PreferenceTable:
    """Comparisons of items, and what a table says of each.

    Args:
        comparisons: Q comparisons of clips of one frame without action; equal items are one clip.
        names: Names of the D features.
        rows: `(Q,)` long, the table's row that each comparison comes from; the first is 0.
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
        names: Sequence[str] | None = None,
        labelled: bool = True,
    ) -> PreferenceTable:
        """Read a data frame, or anything else with columns by name.

        Args:
            frame: Q rows.
            columns: Names of its columns; None for the usual ones.
            features: `(N, D)`, one item a row, where the table has row numbers of it (from 0).
            names: Names of the features that are needed, in their order; None for all.
            labelled: False for pairs that weren't compared yet: their preference is 0.5.

        Raises:
            InvalidInput: Missing columns, or numbers that can't be used, with the row.
            UnknownName: A column of `columns` that isn't there.

        Example:
            >>> import pandas as pd
            >>> offers = {"first_price": [3.0, 1.0], "second_price": [2.0, 2.0]}
            >>> table = PreferenceTable.from_frame(pd.DataFrame(offers | {"preference": [1, 0]}))
            >>> len(table), table.names, table.differences().tolist()
            (2, ('price',), [[-1.0], [1.0]])
        """
        columns = columns or Columns()
        frame = _frame(frame, columns)
        sides = columns.sides(frame, whole=features is not None)
        if features is not None:
            items = _matrix(features, names)
            pairs = np.stack([_ids(frame, side, items) for side in sides], 1)
            named = tuple(names or map(str, range(items.shape[1])))
        else:
            if names is None:  # else more may be there than a model needs
                odd = {*_prefixed(frame, sides[0], columns)} ^ {
                    *_prefixed(frame, sides[1], columns)
                }
                expected = f"the same features of {sides[0]} and {sides[1]}"
                require("table", not odd, expected, f"one only of {', '.join(sorted(odd)[:5])}")
            first, named = _items(frame, sides[0], names, columns)
            # In the order of the first side's, or lists as long as its.
            second, _ = _items(frame, sides[1], named, columns)
            values, pairs = _distinct(np.concatenate([first, second]))
            items = as_tensor("table", values)
        equal = pairs[:, 0] == pairs[:, 1]
        check_rows(" and ".join(sides), ~equal, "two different items", ["equal ones"] * len(frame))
        preference: Floats = np.full(len(frame), 0.5)
        if labelled:
            preference = _preference(frame, columns, sides[0])
        rows = np.arange(len(frame))
        if columns.weight in frame:
            weight = whole_numbers(frame, columns.weight, 1, _MOST_ANSWERS)
            most = f"at most {_MOST_ANSWERS} answers in all"
            require(columns.weight, weight.sum() <= _MOST_ANSWERS, most, weight.sum())
            rows = rows.repeat(weight)
        index = torch.from_numpy(rows)
        groups, tested = _groups(frame, columns), None
        if columns.split in frame:
            split = frame[columns.split]
            check_rows(columns.split, split.isin(_SPLITS), f"one of {', '.join(_SPLITS)}", split)
            test = split.map(_SPLITS).to_numpy(bool)
            tested = as_tensor(columns.split, test)[index]
            require(
                columns.split,
                0 < test.sum() < len(test),
                "rows of train and of test",
                f"{split[0]} only",
            )
        tensors = torch.from_numpy(pairs), as_tensor("preference", preference)
        comparisons = Comparisons(Clips.of_items(items), *tensors)[index]
        return cls(comparisons, named, index, None if groups is None else groups[index], tested)

    def check(self) -> None:
        """Refuse a table from which nothing can be learned, and warn of what may mislead.

        Warnings are of pairs with contradicting preferences, of a single group, and of pairs and
        groups that are on both sides of a split.

        Raises:
            InvalidInput: Fewer than two rows, or ties only.
        """
        require("table", len(self.rows.unique()) > 1, "at least two rows", len(self.rows.unique()))
        pairs, preference = self.comparisons.pairs, self.comparisons.preference
        decided = bool((preference != 0.5).any())
        require("preference", decided, "rows in which one side is preferred", "ties (0.5) only")
        low, high = pairs.sort(1).values.T
        pair = (low * len(self.comparisons.clips) + high).numpy()
        toward_high = torch.where(pairs[:, 0] == low, preference, 1 - preference)
        rows = self.rows.numpy()
        lower, higher = (
            dict(zip(pair[some][::-1], rows[some][::-1], strict=True))  # each pair's first row
            for some in ((toward_high < 0.5).numpy(), (toward_high > 0.5).numpy())
        )
        if both := lower.keys() & higher.keys():
            one, other = min(sorted((lower[key], higher[key])) for key in both)
            _warn(
                f"{len(both)} pair(s) have preferences that contradict each other, such as those "
                f"of rows {one} and {other} (the first is row 0)."
            )
        if self.groups is not None and len(self.groups.unique()) == 1:
            _warn("All rows are of one group: how well others are predicted can't be measured.")
        for what, keys in {"pair(s)": pair, "group(s)": self.groups}.items():
            if self.tested is not None and keys is not None:
                tested = self.tested.numpy()
                shared = np.intersect1d(keys[tested], keys[~tested])
                if len(shared):
                    row = int(rows[tested][np.isin(keys[tested], shared)][0])
                    _warn(
                        f"{len(shared)} {what} of the test are in the training too, such as that "
                        f"of row {row} (the first is row 0): tests on them are too good."
                    )

    def differences(self) -> Tensor:
        """Features `(Q, D)` of the second item minus those of the first, summed over frames."""
        clips = self.comparisons.clips

        def summed(index: Tensor) -> Tensor:
            some = clips[index]
            parts = (some.observations, some.actions)
            frames = torch.cat([part[..., None].flatten(2).float() for part in parts], 2)
            return (frames * some.mask[..., None]).sum(1)

        first, second = self.comparisons.pairs.T
        return summed(second) - summed(first)

    def __getitem__(self, index: Any) -> PreferenceTable:
        optional = (None if x is None else x[index] for x in (self.groups, self.tested))
        return PreferenceTable(self.comparisons[index], self.names, self.rows[index], *optional)


@dataclass(frozen=True, eq=False)
class ItemTable:
    """Single items to score, and what a table says of each.

    Args:
        clips: N clips of one frame without action, one for each row.
        names: Names of the D features.
        groups: `(N,)` long, equal where rows belong together, such as answers to one prompt; None
            for no such column.
    """

    clips: Clips
    names: tuple[str, ...]
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.clips)

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame | Mapping[str, Any],
        columns: Columns | None = None,
        *,
        features: ArrayLike | None = None,
        names: Sequence[str] | None = None,
    ) -> ItemTable:
        """Read a data frame, or anything else with columns by name.

        Args:
            frame: N rows, with a column `item` of lists or of row numbers of `features`, or with
                columns of numbers.
            columns: Names of its columns; None for the usual ones.
            features: `(M, D)`, one item a row.
            names: Names of the features that a model was fitted to, in its order; None for all
                columns but those that `columns` names.

        Raises:
            InvalidInput: Missing columns, or numbers that can't be used, with the row.
            UnknownName: A column of `columns` that isn't there.
        """
        columns = columns or Columns()
        frame = _frame(frame, columns)
        if features is not None:
            require("table", columns.item in frame, f"a column {columns.item} of ids", "none")
            items = _matrix(features, names)
            ids = _ids(frame, columns.item, items)
            if not np.array_equal(ids, np.arange(len(items))):  # else nothing is copied
                items = items[torch.from_numpy(ids)]
            named = tuple(names or map(str, range(items.shape[1])))
        else:
            values, named = _items(frame, columns.item, names, columns)
            items = as_tensor("table", values)
        return cls(Clips.of_items(items), named, _groups(frame, columns))


def check_rows(name: str, valid: ArrayLike, expected: str, got: Any) -> None:
    """Raise InvalidInput about the first of a table's rows that isn't valid.

    Args:
        name: Its column.
        valid: `(Q,)` bool.
        expected: What each row should have been.
        got: `(Q,)`, what they were.
    """
    bad = np.flatnonzero(~np.asarray(valid, bool))
    if len(bad):
        value = got.iloc[bad[0]] if hasattr(got, "iloc") else got[bad[0]]
        value = value.tolist() if hasattr(value, "tolist") else value  # a number, not NumPy's
        missing = value is None or str(value) in ("nan", "<NA>", "NaT")
        shown = "nothing" if missing else value if isinstance(got, list) else reprlib.repr(value)
        more = f", and in {len(bad) - 1} more" if len(bad) > 1 else ""
        require(name, False, expected, f"{shown} in row {bad[0]} (the first is row 0){more}")


def whole_numbers(frame: pd.DataFrame, name: str, least: int, most: int) -> NDArray[np.int64]:
    """Read a column `(Q,)` of whole numbers in a range; raise InvalidInput with the row if not."""
    values = _numbers(frame, [name], np.float64)[:, 0]
    valid = (values % 1 == 0) & (values >= least) & (values <= most)
    check_rows(name, valid, f"whole numbers from {least} to {most}", frame[name])
    return values.astype(np.int64)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _frame(frame: pd.DataFrame | Mapping[str, Any], columns: Columns) -> pd.DataFrame:
    import pandas as pd

    if isinstance(frame, Mapping):
        arrays = {name: np.asarray(x) if hasattr(x, "ndim") else x for name, x in frame.items()}
        lists = {name: list(x) if np.ndim(x) > 1 else x for name, x in arrays.items()}
        try:
            frame = pd.DataFrame(lists)
        except ValueError as error:
            raise InvalidInput(f"table: expected columns of equal lengths, got {error}.") from error
    frame = frame.set_axis(frame.columns.map(str), axis=1).reset_index(drop=True)
    require("table", len(frame) > 0, "at least one row", "none")
    twice = frame.columns[frame.columns.duplicated()]
    require("table", not len(twice), "columns of different names", f"{', '.join(twice[:5])} twice")
    for field in fields(columns):
        name = getattr(columns, field.name)
        if name != field.default and name not in frame and not _prefixed(frame, name, columns):
            raise UnknownName(f"columns.{field.name}", name, _plain(frame))
    return frame


def _plain(frame: pd.DataFrame) -> list[str]:
    """Names of columns, but of numbered ones the first only."""
    return [name for name in frame.columns if not re.search(r"_[1-9]\d*$", name)]


def _prefixed(frame: pd.DataFrame, side: str, columns: Columns) -> dict[str, str]:
    """Columns of a side by their features' names."""
    others = set(astuple(columns))
    found = [name for name in frame if name.startswith(f"{side}_") and name not in others]
    return {name.removeprefix(f"{side}_"): name for name in found}


def _matrix(features: ArrayLike, names: Sequence[str] | None) -> Tensor:
    """Check a matrix of items `(N, D)`, which isn't copied."""
    items = as_tensor("features", features)
    valid = items.ndim == 2 and min(items.shape) > 0
    require("features", valid, "shape (N, D)", tuple(items.shape))
    if names is not None:
        wide = f"{len(names)} numbers an item, as the model was fitted to"
        require("features", items.shape[1] == len(names), wide, items.shape[1])
    items = items if items.is_floating_point() else items.float()
    finite = torch.cat([part.double().sum(1).isfinite() for part in items.split(4096)])
    check_rows("features", finite, "finite numbers", ["NaN or infinity"] * len(items))
    return items


def _items(
    frame: pd.DataFrame, side: str, names: Sequence[str] | None, columns: Columns
) -> tuple[Floats, tuple[str, ...]]:
    """Features `(Q, D)` of a side, and their names: those that are needed, or None for all."""
    if side in frame and str(frame[side][0]).startswith(("[", "tensor(")):
        values = _lists(frame, side, None if names is None else len(names))
        return values, tuple(names or map(str, range(values.shape[1])))
    found = _prefixed(frame, side, columns)
    if side == columns.item and not (found and names is None):  # no prefix is needed
        others = set(astuple(columns))
        found = {name: name for name in frame if name not in others} | found
    if side in frame and not found:
        expected = "lists of numbers, row numbers of `features` or texts with `embed`"
        check_rows(side, [False], f"{expected} (--features, --embed)", frame[side])
    missing = [name for name in names or found or ["0"] if name not in found]
    got = f"none; the table has {', '.join(_plain(frame)[:20])}"
    require(side, not missing, f"a column for {', '.join(missing[:5])}", got)
    named = tuple(names or found)
    return _numbers(frame, [found[name] for name in named]), named


def _lists(frame: pd.DataFrame, side: str, size: int | None) -> Floats:
    def numbers(value: Any) -> Floats:
        try:
            with np.errstate(over="ignore"):
                value = json.loads(value) if isinstance(value, str) else value
                return np.asarray(value, np.float32)
        except (TypeError, ValueError):
            return np.empty((0, 0), np.float32)

    rows = [numbers(value) for value in frame[side]]
    given = [row.ndim == 1 and len(row) > 0 for row in rows]
    check_rows(side, given, "a list of numbers such as [0.5, 2]", frame[side])
    sizes = [len(row) for row in rows]
    size = size or sizes[0]
    check_rows(side, [n == size for n in sizes], f"{size} numbers, as in other rows", sizes)
    values = np.stack(rows)
    check_rows(side, _finite(values), "finite numbers", ["NaN or infinity"] * len(rows))
    return values


def _numbers(frame: pd.DataFrame, names: list[str], dtype: type = np.float32) -> Floats:
    """Columns as an array `(Q, D)` of finite numbers."""
    import pandas as pd

    for name, kind in frame[names].dtypes.items():
        require(str(name), getattr(kind, "kind", "O") in "biufO", "numbers", kind)
    try:
        with np.errstate(over="ignore"):
            values = frame[names].to_numpy(dtype)
    except (TypeError, ValueError):
        found = [pd.to_numeric(frame[name].astype(object), errors="coerce") for name in names]
        values = np.stack(found, 1).astype(dtype)
    finite = _finite(values)
    if not finite.all():
        bad = ~np.isfinite(values[~finite][0])
        name = names[int(bad.argmax())]
        check_rows(name, np.isfinite(values[:, bad.argmax()]), "a finite number", frame[name])
    return values


def _finite(values: Floats) -> NDArray[np.bool_]:
    """Rows `(Q,)` of finite numbers; a sum needs less memory than a mask."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(values.sum(1))
    unsure = np.flatnonzero(~finite)
    finite[unsure] = np.isfinite(values[unsure]).all(1)
    return finite


def _distinct(values: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Distinct items `(N, D)` in their order, and the pairs `(Q, 2)` of the first and second Q."""
    import pandas as pd

    values += 0  # the two zeros are equal
    codes, _ = pd.factorize(np.array([hash(row.tobytes()) for row in values]))
    first = np.unique(codes, return_index=True)[1]
    return values[first] if len(first) < len(values) else values, codes.reshape(2, -1).T


def _ids(frame: pd.DataFrame, name: str, items: Tensor) -> NDArray[np.int64]:
    return whole_numbers(frame, name, 0, len(items) - 1)


def _groups(frame: pd.DataFrame, columns: Columns) -> Tensor | None:
    if columns.group not in frame:
        return None
    column = frame[columns.group]
    check_rows(columns.group, column.notna(), "a group", column)
    return torch.from_numpy(column.map(str).factorize()[0]).long()


def _preference(frame: pd.DataFrame, columns: Columns, first: str) -> Floats:
    """Probability `(Q,)` that the second side is preferred."""
    preference: Floats = np.zeros(len(frame))
    if columns.preference in frame:
        preference = _numbers(frame, [columns.preference], np.float64)[:, 0]
        valid = (preference >= 0) & (preference <= 1)
        expected = "P(second is preferred) from 0 to 1"
        check_rows(columns.preference, valid, expected, frame[columns.preference])
    else:
        expected = "a column of that name, or sides chosen and rejected"
        require(columns.preference, first == "chosen", expected, "none")
    if columns.margin in frame:
        margin = _numbers(frame, [columns.margin], np.float64)[:, 0]
        check_rows(columns.margin, margin >= 0, "at least 0", frame[columns.margin])
        preference = 0.5 + (preference - 0.5) * np.tanh(margin / 2)  # 2 sigmoid(margin) - 1
    return preference
