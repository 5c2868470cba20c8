"""Classes by registered name or import path, and objects as plain data: settings read and written.

A new class is one line in the registry of its kind; `KINDS` says which registry that is. The flags
of `rewardmodels learn` and the lists of the studies both look names up here.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import active
from ood import DETECTORS, STATISTICS, OODDetector, Statistic
from rewardmodels import InvalidInput, RewardModel, UnknownName, UnreadableFile
from rewardmodels.saving import PREDICTORS, load

_OWN_PACKAGES = ("rewardmodels", "active", "ood", "experiments")


@dataclass(frozen=True)
class Kind:
    """Classes that serve one purpose.

    Args:
        base: Class that all of them extend.
        registered: Classes, or partial constructors, by name.
    """

    base: type
    registered: Mapping[str, Callable[..., Any]]

    def classes(self) -> dict[str, Callable[..., Any]]:
        """Registered names and our other concrete classes that were imported, by name."""
        own = _concrete_subclasses(self.base)
        own.pop(self.base.__name__, None)
        return {**own, **self.registered}


KINDS: dict[str, Kind] = {
    "model": Kind(RewardModel, PREDICTORS),
    "strategy": Kind(active.QueryStrategy, active.STRATEGIES),
    "schedule": Kind(active.Schedule, active.SCHEDULES),
    "teacher": Kind(active.Teacher, active.TEACHERS),
    "rule": Kind(active.BatchRule, active.BATCH_RULES),
    "detector": Kind(OODDetector, DETECTORS),
    "statistic": Kind(Statistic, STATISTICS),
}


def find_class(
    kind: str, name: str, registered: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """Return the class of a registered name or import path.

    Args:
        kind: Key of `KINDS`.
        name: Of the class, with or without keyword arguments: "WhenUnsure",
            "WhenUnsure(level=0.2)", "my_package.MySchedule".
        registered: Names in place of the kind's own.

    Returns:
        The class; with arguments, a `functools.partial` of it.

    Raises:
        UnknownName: No such class.
        InvalidInput: A class of another kind, or one without such arguments.

    Example:
        >>> find_class("schedule", "WhenUnsure(level=0.2)")().level
        0.2
    """
    path, bracket, _ = name.partition("(")
    known = KINDS[kind].classes() if registered is None else registered
    found = known[path] if path in known else _import_class(kind, path, known)
    if not bracket:
        return found
    arguments = _keyword_arguments(kind, name)
    try:
        inspect.signature(found).bind_partial(**arguments)
    except TypeError as error:
        accepted = ", ".join(inspect.signature(found).parameters)
        raise InvalidInput(
            f"{kind}: expected {path} with some of {accepted}; got {name}."
        ) from error
    return partial(found, **arguments)


def import_named(argument: str, module: str) -> ModuleType:
    """Import a module that the user named.

    Args:
        argument: In which it was named.
        module: Its name.

    Raises:
        InvalidInput: There is none of that name, or it raises when it is imported.
    """
    try:
        return import_module(module)
    except Exception as error:  # the user's code may raise anything
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"{argument}: expected a module that can be imported from here, got {module!r}: "
            f"{type(error).__name__}: {reason}"
        ) from error


def make_named(kind: str, name: str, **offered: Any) -> Any:
    """Make an object of a kind by its registered name or import path.

    Args:
        kind: Key of `KINDS`.
        name: As `find_class` takes it.
        offered: Arguments that its constructor gets if it takes them.

    Raises:
        UnknownName: There is none.
        InvalidInput: It can't be made of these arguments.

    Example:
        >>> make_named("detector", "DynamicsEnsemble", observation_size=17, seed=1).seed
        1
    """
    cls = find_class(kind, name)
    taken = offered.keys() & inspect.signature(cls).parameters
    try:
        return cls(**{name: offered[name] for name in taken})
    except TypeError as error:
        raise InvalidInput(
            f"{kind}: expected a class that can be made of its settings alone, got {name}: {error}"
        ) from error


def load_model(file: Path, settings: Mapping[str, Any]) -> Any:
    """Load the model of a run of these settings, which name its class and its network.

    Its checksum is the one in `result.json` or `reward.json` beside it, unless an earlier version
    wrote that.

    Raises:
        UnknownName: The class can't be imported from here.
        UnreadableFile: Another kind of file, a damaged one, or one of another class or run.
    """
    checksum = _model_checksum(file)
    model = settings.get("model")
    if not isinstance(model, Mapping) or "class_path" not in model:
        return load(file, checksum=checksum)
    network = (model.get("init_args") or {}).get("network")
    if network is not None:
        module, _, name = network.rpartition(".")
        network = getattr(import_named("model.network", module), name, None)
    cls: Any = find_class("model", model["class_path"])
    return load(file, cls, network=network, checksum=checksum)


def _model_checksum(file: Path) -> str | None:
    for beside in (file.with_name("result.json"), file.with_name("reward.json")):
        with suppress(FileNotFoundError):
            try:
                known = json.loads(beside.read_text("utf-8"))
            except (ValueError, RecursionError) as error:
                raise UnreadableFile(
                    f"{beside}: expected a file of a run, got a damaged one ({error})."
                ) from error
            return known.get("model") if isinstance(known, dict) else None
    return None


def _import_class(
    kind: str, path: str, known: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    module, _, short = path.rpartition(".")
    if not module:
        raise UnknownName(kind, path, known)
    found, base = getattr(import_named(kind, module), short, None), KINDS[kind].base
    if found is None:
        raise UnknownName(kind, path, known)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InvalidInput(f"{kind}: expected a {base.__name__}, got {path}.")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(vars(found)["__abstractmethods__"]))
        raise InvalidInput(f"{kind}: expected {path} to define {missing}, got an abstract class.")
    return found


def _keyword_arguments(kind: str, name: str) -> dict[str, Any]:
    """Literal keyword arguments of a call written as text."""
    try:
        call = ast.parse(name, mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise InvalidInput(
        f"{kind}: expected a name with plain keyword arguments, such as Name(share=0.2), got "
        f"{name}."
    )


def foreign_imports(settings: Any) -> list[str]:
    """List texts in settings, read from YAML, for which anything but our own may be imported.

    Example:
        >>> foreign_imports({"model": {"class_path": "rewardmodels.DeepEnsemble"}, "seed": 1})
        []
        >>> foreign_imports({"strategy": {"class_path": "theirs.Mine"}, "task": "theirs:Env-v0"})
        ['theirs.Mine', 'theirs:Env-v0']
    """
    if settings is None or isinstance(settings, bool | int | float):
        return []
    if isinstance(settings, Mapping):
        if "config" in settings:  # another file, of which the parser would read all
            return ["config"]
        # A teacher's `file` is only read.
        parts = [x for k, x in settings.items() if not (k == "file" and isinstance(x, str))]
    elif isinstance(settings, list | tuple):
        parts = list(settings)
    else:
        return [] if _is_ours(str(settings)) else [str(settings)]
    return sorted({name for part in parts for name in foreign_imports(part)})


def _is_ours(text: str) -> bool:
    if re.fullmatch(r"[\w /+-]*", text):  # a name without a module; what else might be YAML again
        return True
    module, _, name = text.rpartition(".")
    if module.partition(".")[0] not in _OWN_PACKAGES or not name.isidentifier():
        return False
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _concrete_subclasses(base: type) -> dict[str, type]:
    own = base.__module__.split(".")[0] in _OWN_PACKAGES and not inspect.isabstract(base)
    found = {base.__name__: base} if own else {}
    subclasses: list[type] = type.__subclasses__(base)
    for cls in subclasses:
        found |= _concrete_subclasses(cls)
    return found


def describe_settings(config: Any) -> dict[str, Any]:
    """Describe a dataclass of settings as the command line's YAML, without its `out`."""
    return {
        field.name: describe(getattr(config, field.name))
        for field in fields(config)
        if field.name != "out"
    }


def describe(value: Any) -> Any:
    """Describe a setting as plain data; an object by its class path and constructor arguments.

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
        for name, acquisition in active.ACQUISITIONS.items():
            if value is acquisition:
                return name
        if "<" not in value.__qualname__:
            return f"{value.__module__}.{value.__qualname__}"
    if inspect.isfunction(value) or inspect.isclass(value) or isinstance(value, partial):
        raise InvalidInput(
            f"{value}: expected a function or class at the top level of a module, "
            "which a repeated run can import; move it there."
        )
    attributes = vars(value)
    if isinstance(value, RewardModel):
        attributes = {**value.hparams, "network": value.make_network}
    arguments = constructor_arguments(type(value))
    if missing := [name for name in arguments if name not in attributes]:
        raise InvalidInput(
            f"{type(value).__name__}: expected each constructor argument kept as an attribute, so "
            f"that the run can be repeated; {', '.join(missing)} isn't."
        )
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": path, "init_args": {n: describe(attributes[n]) for n in arguments}}


def constructor_arguments(cls: type) -> list[str]:
    """List the arguments of a class's constructor, including those passed on as `**options`.

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
        names += [
            p.name
            for p in parameters
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in names
        ]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names
