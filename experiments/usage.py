"""What jsonargparse refuses, said in our words: the argument, what was expected, what came."""

from __future__ import annotations

import inspect
import re
from difflib import get_close_matches
from importlib import import_module

from jsonargparse import ArgumentParser

from active import QueryStrategy, Schedule, Teacher
from active.rules import BatchRule
from experiments.registry import constructor_arguments
from rewardmodels.errors import InvalidInput, RewardModelsError, UnknownName
from rewardmodels.model import RewardModel

# What extends each, by the name of the argument that takes one.
_KINDS: dict[str, type] = {
    "model": RewardModel,
    "strategy": QueryStrategy,
    "schedule": Schedule,
    "teacher": Teacher,
    "rule": BatchRule,
}
_OURS = ("rewardmodels", "active", "ood", "experiments")
_NO_SETTINGS = ("help", "config", "resume", "print_config", "print_shtab")
_FLAGS = ("config", "resume", "print_config")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "Sequence": "a list",
    "NoneType": "none",
}


def refusal(message: str, parser: ArgumentParser) -> RewardModelsError:
    """Turns jsonargparse's message, often of several lines, into one of our errors."""
    text = " ".join(message.split())
    keys = re.findall(r'Parser key "([^"]+)"', text)
    argument = ".".join(keys)
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        return _unknown_flag(found[1], parser)
    if found := re.search(r"argument (\S+): expected one argument", text):
        return InvalidInput(f"{found[1]}: expected a value, got none.")
    if found := re.search(r"the following arguments are required: (\S+)", text):
        return InvalidInput(f"{found[1].rstrip(',')}: expected a value, got none.")
    if found := re.search(r"[Oo]ption '([\w.]+)' is not accepted", text):
        if path := re.search(r"class_path '([^']+)'", text):
            return _unknown_option(argument, found[1], path[1])
        return UnknownName("config", found[1], _settings(parser))
    if found := re.search(r"Expected a dot import path string: (\S*)", text):
        return _unknown_class(argument, found[1])
    if found := re.search(r"instantiatable class, but (\S+) is abstract", text):
        return _unknown_class(argument, found[1])
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\S+)", text):
        return _unknown_class(argument, found[1])
    # What may be a function, too.
    if found := re.search(r"or a callable class: (.*?)\.? - .* Given value: (.*)", text):
        return InvalidInput(
            f"{argument}: expected the import path of a torch Module, or of a function annotated "
            f"to return one, got {found[2]!r}: {found[1]}. Name one that can be imported from here."
        )
    if found := re.search(r"class_path '([^']+)': (?!Parser key)(.*)", text):
        reason = found[2].rstrip(".")
        return InvalidInput(f"{argument}: expected a class, got {found[1]!r}: {reason}.")
    if found := re.search(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)", text):
        return UnknownName(argument, found[2], re.findall(r"'([^']+)'", found[1]))
    if found := re.search(r"Expected an? <class '([\w.]+)'>\. Got value: (.*)", text):
        return InvalidInput(f"{argument}: expected {_type(found[1])}, got {found[2]!r}.")
    if found := re.search(r"Subtypes: \[(.*?)\] .*Given value: (.*)", text):
        kinds = " or ".join(map(_type, re.findall(r"<class '([\w.]+)'>", found[1])))
        return InvalidInput(f"{argument}: expected {kinds}, got {found[2]!r}.")
    if found := re.search(r"File does not exist: '(.+?)'", text):
        return InvalidInput(f"{argument}: expected a file, got {found[1]}, which doesn't exist.")
    if found := re.search(r"(?:Unexpected config|Problems parsing config): (.*)", text):
        return InvalidInput(f"config: expected YAML with settings by name, got {found[1]!r}.")
    return InvalidInput(re.sub(r'Parser key "([^"]+)":?', r"\1:", text))


def _type(name: str) -> str:
    name = name.rsplit(".", 1)[-1]
    return _TYPES.get(name, f"a {name}")


def _settings(parser: ArgumentParser) -> list[str]:
    return [a.dest for a in parser._actions if a.dest not in _NO_SETTINGS and "." not in a.dest]


def _unknown_flag(flag: str, parser: ArgumentParser) -> RewardModelsError:
    if not flag.startswith("-"):
        return InvalidInput(f"arguments: expected flags, such as --seed 1, got {flag!r}.")
    name = flag.split("=")[0].lstrip("-")
    close = get_close_matches(name, [*_settings(parser), *_FLAGS], n=1)
    hint = f"Did you mean --{close[0]}?" if close else f"`{parser.prog} --help` lists them."
    return InvalidInput(f"--{name}: expected a flag of `{parser.prog}`, got an unknown one. {hint}")


def _unknown_option(argument: str, name: str, path: str) -> RewardModelsError:
    module, _, short = path.rpartition(".")
    known = sorted(constructor_arguments(getattr(import_module(module), short)))
    return UnknownName(f"{argument} ({short})", name, known)


def _unknown_class(argument: str, name: str) -> RewardModelsError:
    kind = _KINDS.get(argument.rsplit(".", 1)[-1])
    known = sorted(_names(kind)) if kind else []
    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    expected = f"one of {', '.join(known)} or an import path" if known else "an import path"
    if kind and "." in name:
        expected += f" of a {kind.__name__}"
    return InvalidInput(f"{argument}: expected {expected}; got {name!r}.{hint}")


def _names(kind: type) -> set[str]:
    """Names of our own classes that extend `kind` and can be made."""
    below = set().union(*map(_names, kind.__subclasses__()))
    ours = kind.__module__.split(".")[0] in _OURS and not inspect.isabstract(kind)
    return below | ({kind.__name__} if ours else set())
