"""Classes by their name in a table of ours, or by import path, with arguments or without."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from rewardmodels import InvalidInput, UnknownName


def found_class(
    what: str, name: str, known: Mapping[str, Callable[..., Any]], kind: type
) -> Callable[..., Any]:
    """A class by its name in a table, or by its import path.

    Args:
        what: What it is called in an error.
        name: Of the class, with keyword arguments or without: "WhenUnsure",
            "WhenUnsure(level=0.2)", "my_package.MySchedule".
        known: The table.
        kind: What it has to extend.

    Returns:
        The class; with arguments, a `functools.partial` of it.

    Raises:
        UnknownName: There is none.
        InvalidInput: It is something else, or takes no such arguments.
    """
    path, bracket, _ = name.partition("(")
    found = known[path] if path in known else _imported(what, path, known, kind)
    if not bracket:
        return found
    arguments = _arguments(what, name)
    try:
        inspect.signature(found).bind_partial(**arguments)
    except TypeError as error:
        taken = ", ".join(inspect.signature(found).parameters)
        raise InvalidInput(f"{what}: expected {path} with some of {taken}; got {name}.") from error
    return partial(found, **arguments)


def _imported(
    what: str, path: str, known: Mapping[str, Callable[..., Any]], kind: type
) -> Callable[..., Any]:
    module, _, short = path.rpartition(".")
    try:
        found = getattr(import_module(module), short)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownName(what, path, known) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise InvalidInput(f"{what}: expected a {kind.__name__}, got {path}.")
    return found


def _arguments(what: str, name: str) -> dict[str, Any]:
    """Those in brackets, which are literals."""
    try:
        call = ast.parse(name, mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise InvalidInput(
        f"{what}: expected a name with plain keyword arguments, such as Name(share=0.2), "
        f"got {name}."
    )
