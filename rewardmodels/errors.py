"""Exceptions of the library, with one base class."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral

from torch import Tensor


class RewardModelsError(Exception):
    """Base class of all errors that the library raises on purpose."""


class InvalidInput(RewardModelsError, ValueError):
    """An argument has a value, a shape or a type that can't be used."""


def require(name: str, valid: bool, expected: str, got: object) -> None:
    """Raise InvalidInput about an argument unless it is valid.

    Args:
        name: The argument.
        valid: Whether its value can be used.
        expected: What it should have been.
        got: What it was, and what to do; made into a string only if it is refused.

    Example:
        >>> require("epochs", 0 >= 1, "at least 1", 0)
        Traceback (most recent call last):
            ...
        rewardmodels.errors.InvalidInput: epochs: expected at least 1, got 0.
    """
    if not valid:
        raise InvalidInput(f"{name}: expected {expected}, got {got}.")


def require_rows(name: str, valid: Tensor, expected: str, got: Tensor) -> None:
    """Raise InvalidInput about the first of Q rows that isn't valid.

    Args:
        name: The argument.
        valid: `(Q,)` bool.
        expected: What each row should have been.
        got: `(Q,)` or `(Q, n)`, what they were.
    """
    if not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        require(name, False, expected, f"{got[row].tolist()} in row {row}")


def check_positive(**numbers: int) -> None:
    """Raise InvalidInput for a number that isn't whole or is below 1, with its name."""
    for name, value in numbers.items():
        require(name, is_whole(value), "a whole number of at least 1", repr(value))
        require(name, value >= 1, "at least 1", value)


def is_whole(value: object) -> bool:
    """True for integers, NumPy's included, but not for bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


class UnknownName(RewardModelsError, ValueError):
    """A name that isn't among the known ones; the message suggests a close one.

    Args:
        what: Kind of thing that is named, e.g. `"task"`.
        name: The unknown name.
        known: The known names.

    Example:
        >>> print(UnknownName("task", "Hoper", ["Ant", "Hopper"]))
        task: expected one of Ant, Hopper; got 'Hoper'. Did you mean 'Hopper'?
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        message = f"{what}: expected one of {', '.join(known)}; got {name!r}."
        close = difflib.get_close_matches(name, known, n=1)
        if close:
            message += f" Did you mean {close[0]!r}?"
        super().__init__(message)


class NotFitted(RewardModelsError, RuntimeError):
    """A reward model was used before it was fitted."""


class UnreadableFile(RewardModelsError):
    """A file that is damaged, of another format, or of a newer version."""


class FitDiverged(RewardModelsError, RuntimeError):
    """The loss of a fit stopped being finite; the last good weights were kept."""
