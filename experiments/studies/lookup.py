"""Classes by their name in a table of ours, or by import path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from rewardmodels import InvalidInput, UnknownName


def found_class(
    what: str, name: str, known: Mapping[str, Callable[..., Any]], kind: type
) -> Callable[..., Any]:
    """A class by its name in a table, or by its import path.

    Args:
        what: What it is called in an error.
        name: Of the class.
        known: The table.
        kind: What it has to extend.

    Raises:
        UnknownName: There is none.
        InvalidInput: It is something else.
    """
    if name in known:
        return known[name]
    module, _, short = name.rpartition(".")
    try:
        found = getattr(import_module(module), short)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownName(what, name, known) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise InvalidInput(f"{what}: expected a {kind.__name__}, got {name}.")
    return found
