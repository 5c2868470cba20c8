"""Conversion of what callers pass to tensors: lists, NumPy arrays, whatever has `__array__`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rewardmodels.errors import InvalidInput, require, require_rows

ArrayLike = Tensor | npt.ArrayLike


def as_tensor(name: str, value: ArrayLike) -> Tensor:
    """Convert an array-like of real numbers to a tensor, sharing its memory where possible.

    Args:
        name: The argument, for the error.
        value: A tensor, which is returned as it is, or anything that NumPy makes an array of.

    Raises:
        InvalidInput: Anything else, or complex numbers.

    Example:
        >>> as_tensor("pairs", [[0, 1]])
        tensor([[0, 1]])
    """
    if isinstance(value, Tensor):
        require(name, not value.is_complex(), "real numbers", value.dtype)
        return value
    expected = "real numbers, as a tensor, a NumPy array or lists of equal lengths"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name}: expected {expected}, got {error}.") from error
    got = type(value).__name__ if array.dtype == object else f"dtype {array.dtype}"
    require(name, array.dtype.kind in "biuf", expected, got)
    known = array.dtype.newbyteorder("=")
    if known.kind == "u" and known.itemsize > 1:  # torch can do little with these
        known = np.dtype(np.int64)
    elif known.itemsize > 8:
        known = np.dtype(np.float64)
    # torch warns of memory that can't be written to, and has no negative strides; those of an axis
    # of length one aren't seen by `require`.
    if min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(np.require(array, known, ["C", "W"]))


def as_integers(name: str, value: ArrayLike, shape: str, *row: int) -> Tensor:
    """Convert an array-like to long, with rows of a given shape.

    Args:
        name: The argument, for the error.
        value: Whole numbers, of any type but bool.
        shape: The expected shape in words.
        row: Length of each axis but the first.

    Raises:
        InvalidInput: Another shape, or numbers that aren't whole.
    """
    numbers = as_tensor(name, value)
    whole = numbers.dtype != torch.bool
    if numbers.is_floating_point():
        whole = bool((numbers.frac() == 0).all())  # False of NaN and infinity, too
    valid = whole and numbers.ndim > 0 and numbers.shape[1:] == row
    got = f"{numbers.dtype} of shape {tuple(numbers.shape)}"
    require(name, valid, f"integers of shape {shape}", got)
    return numbers.long()


def as_pairs(pairs: ArrayLike, n: int) -> Tensor:
    """Convert pairs of clips to long `(Q, 2)`, with indices from 0 to n - 1.

    Raises:
        InvalidInput: Another shape, numbers that aren't whole, or an index out of range.
    """
    rows = as_integers("pairs", pairs, "(Q, 2)", 2)
    valid = ((rows >= 0) & (rows < n)).all(1)
    require_rows("pairs", valid, f"indices from 0 to {n - 1} ({n} clips)", rows)
    return rows
