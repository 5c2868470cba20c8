"""The command `rewardmodels`: every setting by flag or YAML, every class by name or import path."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from argparse import Action, ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from sqlite3 import OperationalError
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

if TYPE_CHECKING:
    from rewardmodels.errors import RewardModelsError

_QUICK = "a minute or two, for trends"

Command = Callable[[str, list[str]], None]
"""Called with the words that name the command, and the arguments that follow them."""


class _Exit(Exception):
    """End of the command: a line for standard error, and the exit code."""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 for success, 2 for input that can't be used (with a line that says why on standard
        error), 130 for an interruption, 143 for SIGTERM.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that a user's own class can be named by its path
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except _Exit as end:
        message, code = end.args
    except KeyboardInterrupt:
        message, code = "\nrewardmodels: interrupted before any work was done.", 130
    else:
        return 0
    print(message, file=sys.stderr)
    return int(code)


def _run(arguments: list[str]) -> None:
    for words, (_, command) in _COMMANDS.items():
        name = words.split()
        if arguments[: len(name)] == name:
            from rewardmodels.errors import RewardModelsError

            try:
                return command(words, arguments[len(name) :])
            except RewardModelsError as error:
                raise _Exit(f"rewardmodels: error: {error}", 2) from error
            # A full disk, a name that is too long, no permission.
            except (OSError, OperationalError) as error:
                file, why = (getattr(error, name, None) for name in ("filename", "strerror"))
                reason = f"{file or 'system'}: {why or error}"
                raise _Exit(f"rewardmodels: error: {reason}.", 2) from error
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                    raise
                reason = "memory: expected settings that this machine has memory for, got too large"
                why = " ".join(str(error).split())[:200]
                raise _Exit(f"rewardmodels: error: {reason} ones ({why}).", 2) from error
    groups = {words.split()[0] for words in _COMMANDS if " " in words}
    group = arguments[0] if arguments and arguments[0] in groups else ""
    rest = arguments[1:] if group else arguments
    known = [words for words in _COMMANDS if words.startswith(group)]
    if rest[:1] == ["--version"] and not group:
        print(version("rewardmodels"))
    elif rest and rest[0] not in ("-h", "--help"):
        given = f"{group} {rest[0]}".strip()
        close = get_close_matches(given, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        expected = f"expected one of {', '.join(known)}; got {given!r}."
        raise _Exit(f"rewardmodels: error: command: {expected}{hint}", 2)
    else:
        print(f"usage: {f'rewardmodels {group}'.strip()} COMMAND [--help] …\n")
        print("Learn rewards from comparisons, with calibrated uncertainty.\n\ncommands:")
        for words in known:
            print(f"  {words:22}{_COMMANDS[words][0]}")
        print("\nEach command has its own --help.")


def _learn(words: str, arguments: list[str]) -> None:
    # Each command imports its own modules when it runs: Lightning alone takes seconds.
    import yaml

    from experiments.registry import describe_settings, foreign_imports
    from experiments.training.config import LearnConfig
    from experiments.training.learn import learn
    from experiments.training.run_directory import RunDirectory
    from rewardmodels.errors import InvalidInput, RewardModelsError

    arguments = _expand_classes(arguments)
    parser = _parser(words)
    parser.add_argument("--config", action="config", help="YAML with any of these settings")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    trust = "import what the settings of the run to resume name, though you haven't named it"
    parser.add_argument("--trust", action="store_true", help=trust)
    parser.add_class_arguments(LearnConfig)
    parser.set_defaults(_DEFAULTS)
    if {"-h", "--help"} & {*arguments}:
        task = re.search(r"--task[= ](\S+)", " ".join(arguments))
        with suppress(RewardModelsError):  # help is shown for an unknown task too
            taken = describe_settings(LearnConfig(task[1]) if task else LearnConfig())
            unset = [name for name in taken if parser.get_default(name) is None]
            parser.set_defaults({name: taken[name] for name in unset})
    settings = _parse(parser, arguments)
    run = RunDirectory(settings.out)
    if settings.resume:
        if not run.exists:
            raise InvalidInput(
                f"resume: expected a run to go on with, got {run.path}, which has none. Leave "
                "--resume out to start one."
            )
        given = run.settings if settings.trust else yaml.safe_load(parser.dump(settings))
        run.check_trusted(given=given)
        settings = _parse(parser, ["--config", str(run.settings_file), *arguments])
    resume = settings.resume
    values = parser.instantiate(settings)
    for name in ("resume", "config", "trust"):
        values.pop(name)
    values["out"] = run.path  # a run's settings may name another
    config = LearnConfig(**values)

    def how_to_resume() -> str:
        trust = ["--trust"] if foreign_imports(describe_settings(config)) else []
        again = ["rewardmodels", "learn", "--resume", *trust, "--out", str(run.path)]
        return f"To go on: {shlex.join(again)}" if run.exists else "Nothing was started."

    with _interruptible(how_to_resume):
        result = learn(config, resume=resume)
    print(
        f"{result['task']}, {result['reward']} reward, {result['comparisons']} comparisons: true "
        f"return {result['final_return']:.0f} after {result['steps']:,} steps.\n"
        f"Report: {run.path / 'report.html'}"
    )


def _study(words: str, arguments: list[str]) -> None:
    """Run the study in the file of that name in `experiments.studies`."""
    from experiments.grid import Run
    from experiments.studies import run_study

    name = words.split()[1]
    study = import_module(f"experiments.studies.{name}")
    parser = _parser(words)
    parser.add_argument("--quick", action="store_true", help=_QUICK)
    parser.add_argument("--json", type=Path, help="file for the key numbers, which are printed too")
    parser.add_argument(
        "--report_only", action="store_true", help="report on the cells that are finished"
    )
    parser.add_class_arguments(study.Settings)
    parser.add_class_arguments(Run)
    out = Path(f"runs/study-{name}")
    parser.set_defaults(out=out, **(study.QUICK if "--quick" in arguments else {}))
    made = _parse(parser, arguments)
    settings = study.Settings(**{field.name: made[field.name] for field in fields(study.Settings)})
    run = Run(**{field.name: made[field.name] for field in fields(Run)})
    again = shlex.join(["rewardmodels", *words.split(), *arguments])
    with _interruptible(lambda: f"The same command goes on: {again}"):
        run_study(
            study,
            settings,
            None if made.quick and run.out == out else run,  # a fresh temporary directory
            json=made.json,
            report_only=made.report_only,
        )


def _expand_classes(arguments: Sequence[str]) -> list[str]:
    """Write registered names and calls as class paths and flags, which jsonargparse understands.

    `--schedule "WhenUnsure(level=0.2)"` becomes `--schedule active.schedule.WhenUnsure
    --schedule.level=0.2`. Import paths and unknown names stay as they are.
    """
    from experiments.registry import KINDS, find_class

    expanded: list[str] = []
    for word in arguments:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        flag = flag or (expanded[-1] if expanded else "")
        name = flag.removeprefix("--").removesuffix(".help")
        asks = flag.endswith(".help") and flag != word
        if name not in KINDS or not (asks or value.partition("(")[0] in KINDS[name].classes()):
            expanded.append(word)
            continue
        found = find_class(name, value)
        keywords = {} if asks else getattr(found, "keywords", {})
        found = getattr(found, "func", found)
        path = f"{found.__module__}.{found.__qualname__}"
        expanded.append(f"{flag}={path}" if equals else path)
        expanded += [f"{flag}.{name}={json.dumps(value)}" for name, value in keywords.items()]
    return expanded


def _call(path: str, *, positional: bool = False, config: str = "") -> Command:
    """Make a command that calls the function at `module:name`, whose parameters become flags.

    Args:
        path: Of the function; a parameter `quick` becomes a flag without a value.
        positional: Parameters without a default are positional.
        config: Dataclass of the same module that is the function's only parameter; its fields
            become the flags.
    """

    def command(words: str, arguments: list[str]) -> None:
        module, name = path.split(":")
        function = getattr(import_module(module), name)
        parser = _parser(words)
        skip: set[str | int] = {p for p in signature(function).parameters if p == "quick"}
        if skip:
            parser.add_argument("--quick", action="store_true", help=_QUICK)
        if config:
            cls = getattr(import_module(module), config)
            parser.add_class_arguments(cls, as_positional=positional)
        else:
            parser.add_function_arguments(function, as_positional=positional, skip=skip)
        off = {f"--{a.dest}" for a in parser._actions if a.default is False and a.nargs != 0}
        values = [*arguments[1:], ""]
        settings = _parse(parser, [
            f"{word}=true" if word in off and value not in ("true", "false") else word
            for word, value in zip(arguments, values, strict=False)
        ])  # fmt: skip
        again = shlex.join(["rewardmodels", *words.split(), *arguments])
        with _interruptible(lambda: f"The same command goes on: {again}"):
            function(cls(**parser.instantiate(settings))) if config else function(**settings)

    return command


class _HelpFormatter(DefaultHelpFormatter):
    """Help with the names of our classes, and without those of PyTorch."""

    def add_argument(self, action: Action) -> None:
        if not action.dest.endswith(".network.help"):  # of all of PyTorch's modules
            super().add_argument(action)

    def _expand_help(self, action: Action) -> str:
        from experiments.registry import KINDS

        kind = KINDS.get(action.dest.rpartition(".")[2])
        known = f"; one of {', '.join(kind.classes())}, or an import path" if kind else ""
        return re.sub(r", known subclasses: [^)]*", known, super()._expand_help(action))


class _Parser(ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _HelpFormatter, **options})


def _parser(words: str) -> ArgumentParser:
    return _Parser(
        prog=f"rewardmodels {words}", description=_COMMANDS[words][0], exit_on_error=False
    )


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    from rewardmodels.errors import InvalidInput

    for before, word in zip(["arguments", *arguments], arguments, strict=False):
        if re.fullmatch(r"(--[^=]+=)?\s*", word):
            name = (word.strip() or before).strip("-=")
            raise InvalidInput(f"{name}: expected a value, got an empty one.")
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise _readable_error(str(error), parser) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"config: expected YAML in UTF-8, got other bytes: {error}.") from error


@contextmanager
def _interruptible(how_to_resume: Callable[[], str]) -> Iterator[None]:
    """End in one line with how to go on after Ctrl-C (130) or SIGTERM (143)."""
    code, before = 130, signal.getsignal(signal.SIGTERM)

    def terminate(*_: Any) -> None:
        nonlocal code
        code = 143
        raise KeyboardInterrupt

    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning's Trainer answers Ctrl-C with SystemExit.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise _Exit(f"\nrewardmodels: interrupted. {how_to_resume()}", code) from None
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, before)


_NO_SETTINGS = ("help", "config", "resume", "trust", "print_config", "print_shtab")
_TYPES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text",
    "Sequence": "a list", "NoneType": "none",
}  # fmt: skip


def _readable_error(message: str, parser: ArgumentParser) -> RewardModelsError:
    """Rewrite jsonargparse's message as one line: argument, what was expected, what was given."""
    from rewardmodels.errors import InvalidInput, UnknownName

    text = " ".join(message.split())
    argument = ".".join(re.findall(r'Parser key "([^"]+)"', text))

    found = partial(re.search, string=text)
    if m := found(r"unrecognized arguments: (\S+)"):
        return InvalidInput(_unknown_flag(m[1], parser))
    if m := found(r"argument (\S+): expected one argument|arguments are required: ([^\s,]+)"):
        name = m[1] or ".".join(filter(None, (argument, m[2])))
        return InvalidInput(f"{name}: expected a value, got none.")
    if m := found(r"[Oo]ption '([\w.]+)' is not accepted"):
        if path := found(r"class_path '([^']+)\.(\w+)'"):
            cls = getattr(import_module(path[1]), path[2])
            from experiments.registry import constructor_arguments

            return UnknownName(f"{argument} ({path[2]})", m[1], sorted(constructor_arguments(cls)))
        return UnknownName("config", m[1], _settings(parser))
    if m := found(
        r"Expected a dot import path string: (\S*)|instantiatable class, but (\S+) is abstract|"
        r"Import path (\S+) does not correspond to a subclass of"
    ):
        return InvalidInput(_unknown_class(argument, m[1] or m[2] or m[3] or ""))
    # Arguments that may be a class or a function.
    if m := found(r"or a callable class: (.*?)\.? - .* Given value: (.*)"):
        return InvalidInput(
            f"{argument}: expected the import path of a torch Module, or of a function annotated "
            f"to return one, got {m[2]!r}: {m[1]}. Name one that can be imported from here."
        )
    if m := found(r"class_path '([^']+)': (?!Parser key)(.*)"):
        return InvalidInput(f"{argument}: expected a class, got {m[1]!r}: {m[2].rstrip('.')}.")
    if m := found(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)"):
        return UnknownName(argument, m[2], re.findall(r"'([^']+)'", m[1]))
    if m := found(
        r"(?:Subtypes: \[(.*?)\] .*Given|Expected an? (<class '[\w.]+'>)\. Got) value: (.*)"
    ):
        names = re.findall(r"<class '(?:\w+\.)*(\w+)'>", m[1] or m[2])
        types = " or ".join(_TYPES.get(name, f"a {name}") for name in names)
        return InvalidInput(f"{argument}: expected {types}, got {m[3]!r}.")
    if m := found(r"File does not exist: '(.+?)'"):
        return InvalidInput(f"{argument}: expected a file, got {m[1]}, which doesn't exist.")
    if m := found(r"(?:Unexpected config|Problems parsing config): (.*)"):
        return InvalidInput(f"config: expected YAML with settings by name, got {m[1]!r}.")
    return InvalidInput(re.sub(r'Parser key "([^"]+)":?', r"\1:", text))


def _settings(parser: ArgumentParser) -> list[str]:
    return [a.dest for a in parser._actions if a.dest not in _NO_SETTINGS and "." not in a.dest]


def _unknown_flag(flag: str, parser: ArgumentParser) -> str:
    if not flag.startswith("-"):
        return f"arguments: expected flags, such as --seed 1, got {flag!r}."
    name = flag.split("=")[0].lstrip("-")
    known = [*_settings(parser), *_NO_SETTINGS]
    close = get_close_matches(name, known, n=1)
    hint = f"Did you mean --{close[0]}?" if close else f"`{parser.prog} --help` lists them."
    return f"--{name}: expected a flag of `{parser.prog}`, got an unknown one. {hint}"


def _unknown_class(argument: str, name: str) -> str:
    from experiments.registry import KINDS

    kind = KINDS.get(argument.rsplit(".", 1)[-1])
    names = sorted(kind.classes()) if kind else []
    close = get_close_matches(name, names, n=1)
    expected = f"one of {', '.join(names)} or an import path" if kind else "an import path"
    if kind and "." in name:
        expected += f" of a {kind.base.__name__}"
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{argument}: expected {expected}; got {name!r}.{hint}"


# A new command is one entry here: its words, its help, and the function that it calls.
_COMMANDS: dict[str, tuple[str, Command]] = {
    "learn": ("learn a task from comparisons of behaviour", _learn),
    "demo": (
        "learn HalfCheetah from 100 comparisons, and from zero reward to compare",
        _call("experiments.demo:demo"),
    ),
    "label": (
        "serve the page on which people compare a run's clips",
        _call("experiments.labelling:label", positional=True),
    ),
    "guard": (
        "run a trained agent under a guard, which the first call fits and calibrates",
        _call("experiments.deploy:guard_run", positional=True, config="GuardConfig"),
    ),
    "fit": (
        "fit a reward model to a file of preferences, and report how far it can be trusted",
        _call("experiments.offline.fit:fit_file", positional=True, config="FitConfig"),
    ),
    "score": (
        "score comparisons or items by a fitted model, and flag what it doesn't know",
        _call("experiments.offline.score:score_file", positional=True, config="ScoreConfig"),
    ),
    "ask": (
        "choose which pairs to have compared next, by a fitted model",
        _call("experiments.offline.ask:ask_file", positional=True, config="AskConfig"),
    ),
    "export": (
        "write a run's comparisons, marks and ratings as CSV or Parquet",
        _call("active.feedback:export_feedback", positional=True),
    ),
    "import": (
        "read an export into a new feedback store",
        _call("active.feedback:import_feedback", positional=True),
    ),
    "pool": (
        "record an agent at every stage of its training, as a Minari data set",
        _call("experiments.datasets.minari:export_pool"),
    ),
    "study predictors": ("compare predictors: calibration, uncertainty and cost", _study),
    "study preferences": (
        "compare predictors of people's preferences with regressions and others, and withhold some",
        _study,
    ),
    "study strategies": ("compare query strategies: the comparisons that they save", _study),
    "study feedback": ("measure how many comparisons are needed, by schedule and teacher", _study),
    "study marks": ("measure how many comparisons marks of parts of clips save", _study),
    "study guard": ("measure which shifts a guard finds, and its false alarms", _study),
    "study drift": ("train on a reward learned once: frozen, asked on, or guarded", _study),
    "study backflip": ("count the backflips of Hoppers taught by comparisons", _study),
    "benchmark speed": (
        "time what has to be fast",
        _call("experiments.benchmarks.speed:benchmark_speed"),
    ),
    "benchmark scale": (
        "fit to up to 100,000 pairs of long vectors: time, memory and accuracy",
        _call("experiments.benchmarks.scale:benchmark_scale"),
    ),
    "benchmark page": (
        "measure what the page loses when it is killed, and how long people wait",
        _call("experiments.benchmarks.page:benchmark_page"),
    ),
}

# Classes by name: LearnConfig's own defaults are objects, which no help text can show.
_DEFAULTS = {
    "model": {
        "class_path": "rewardmodels.DeepEnsemble",
        # As in experiments.training.config, which takes seconds to import.
        "init_args": {"activation": "leaky_relu", "weight_decay": 0.01},
    },
    "strategy": {"class_path": "active.GreedyInformation"},
    "teacher": {"class_path": "active.SyntheticTeacher"},
}
