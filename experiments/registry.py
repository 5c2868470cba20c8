"""Settings as plain data: what a command line reads back, and what names a run."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

from active import ACQUISITIONS
from rewardmodels.errors import InvalidInput
from rewardmodels.model import RewardModel


def describe_settings(config: Any) -> dict[str, Any]:
    """A settings dataclass as the YAML that the command line reads, but for where it is kept."""
    return {
        field.name: describe(getattr(config, field.name))
        for field in fields(config)
        if field.name != "out"
    }


def describe(value: Any) -> Any:
    """A setting as plain data; an object as its class path and constructor arguments.

    Raises:
        InvalidInput: An object that doesn't keep a constructor argument as an attribute, or a
            function that can't be imported by its name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if inspect.isfunction(value) or inspect.isclass(value):
        for name, known in ACQUISITIONS.items():
            if value is known:
                return name
        if "<" in value.__qualname__:
            raise InvalidInput(
                f"{value.__qualname__}: expected what stands at the top of a module and can be "
                "imported to repeat the run."
            )
        return f"{value.__module__}.{value.__qualname__}"
    kept = vars(value)
    if isinstance(value, RewardModel):
        kept = {**value.hparams, "network": value.make_network}
    arguments = constructor_arguments(type(value))
    if missing := [name for name in arguments if name not in kept]:
        raise InvalidInput(
            f"{type(value).__name__}: expected each constructor argument kept as an attribute, so "
            f"that the run can be repeated; {', '.join(missing)} isn't."
        )
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": path, "init_args": {n: describe(kept[n]) for n in arguments}}


def constructor_arguments(cls: type) -> list[str]:
    """Names of what a class's constructor takes, those that `**options` hands on included.

    Example:
        >>> from rewardmodels import MCDropout
        >>> constructor_arguments(MCDropout)[:4]
        ['samples', 'rate', 'hidden', 'network']
    """
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = {parameter.kind for parameter in parameters}
        names += [
            p.name
            for p in parameters
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in names
        ]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return names
