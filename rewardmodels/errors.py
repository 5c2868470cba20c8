"""The library's exceptions: one small family, so that one `except` catches what we refuse."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RewardModelsError(Exception):
    """Base of every error the library raises on purpose."""


class InvalidInput(RewardModelsError, ValueError):
    """An argument has a value, a shape or a type that can't be used."""


class UnknownName(RewardModelsError, ValueError):
    """A name that isn't among the ones known here.

    Args:
        what: What the name should have named, e.g. `"task"`.
        name: The name that came.
        known: The names that would have done.

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
    """A reward model was asked about clips before it was fitted."""


class UnreadableFile(RewardModelsError):
    """A file that is damaged, of another format, or of a newer version."""


class FitDiverged(RewardModelsError, RuntimeError):
    """A fit's loss stopped being a finite number; the last good model was kept."""
