"""The command `rewardmodels`: every setting by flag or YAML, every class by name or import path."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

Command = Callable[[str, list[str]], None]
"""Given the words that name it and those that follow."""

# A sub-command's module is imported only once it was asked for: Lightning alone takes seconds.


class _Refused(Exception):
    """Words that name no command."""


class _Interrupted(Exception):
    """Ctrl-C, and how to go on."""


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command.

    Returns:
        0 for success, 2 for input that can't be used (with a line that says why on standard
        error), 130 for an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that a user's own class can be named by its path
    try:
        return _run(*_chosen(arguments))
    except _Refused as error:
        print(f"rewardmodels: error: {error}", file=sys.stderr)
        return 2
    except _Interrupted as interruption:
        print(f"\nrewardmodels: interrupted. {interruption}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nrewardmodels: interrupted before any work was done.", file=sys.stderr)
        return 130


def _chosen(arguments: list[str]) -> tuple[str, list[str]]:
    """The words that name a sub-command, and those after them."""
    for words in _COMMANDS:
        name = words.split()
        if arguments[: len(name)] == name:
            return words, arguments[len(name) :]
    parser = argparse.ArgumentParser(
        prog="rewardmodels",
        description="Learn rewards from comparisons, and know how sure of them.",
        epilog="Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=version("rewardmodels"))
    commands = parser.add_subparsers(title="commands")
    for words, (text, _) in _COMMANDS.items():
        commands.add_parser(words, help=text, add_help=False)
    if arguments and arguments[0] in ("-h", "--help", "--version"):
        parser.parse_args(arguments[:1])
    several = arguments[:1] in (["benchmark"], ["study"])
    came = " ".join(arguments[: 2 if several else 1])
    close = get_close_matches(came, _COMMANDS, n=1)
    raise _Refused(
        f"command: expected one of {', '.join(_COMMANDS)}; got {came or 'none'!r}."
        + (f" Did you mean {close[0]!r}?" if close else "")
    )


def _run(words: str, arguments: list[str]) -> int:
    from rewardmodels.errors import RewardModelsError

    _, command = _COMMANDS[words]
    try:
        command(words, arguments)
    except RewardModelsError as error:
        raise _Refused(str(error)) from error
    return 0


def _learn(words: str, arguments: list[str]) -> None:
    from experiments.people import spelled_out
    from experiments.training.config import LearnConfig
    from experiments.training.learn import learn
    from rewardmodels.errors import InvalidInput

    arguments = spelled_out(arguments)
    parser = _parser(words)
    parser.add_argument("--config", action="config", help="YAML with any of these settings")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run that stands in --out"
    )
    parser.add_class_arguments(LearnConfig)
    parser.set_defaults(_DEFAULTS)
    settings = _parse(parser, arguments)
    out = Path(settings.out)
    if settings.resume:
        if not (out / "config.yaml").is_file():
            raise InvalidInput(
                f"resume: expected a run to go on with, got {out}, which has none. Leave --resume "
                "out to start one."
            )
        settings = _parse(parser, ["--config", str(out / "config.yaml"), *arguments])
    made = parser.instantiate(settings)
    resume = made.pop("resume")
    made.pop("config")
    config = LearnConfig(**made)
    with _interruptible(
        lambda: (
            f"To go on: {shlex.join(['rewardmodels', 'learn', '--resume', '--out', str(out)])}"
            if (out / "config.yaml").is_file()
            else "Nothing was started."
        )
    ):
        result = learn(config, resume=resume)
    print(
        f"{result['task']}, {result['reward']} reward, {result['comparisons']} comparisons: true "
        f"return {result['final_return']:.0f} after {result['steps']:,} steps.\n"
        f"Report: {out / 'report.html'}"
    )


def _study(words: str, arguments: list[str]) -> None:
    """Run the study in the file of that name in `experiments.studies`."""
    from experiments.grid import Run
    from experiments.studies import run_study

    name = words.split()[1]
    study = import_module(f"experiments.studies.{name}")
    parser = _parser(words)
    parser.add_argument("--quick", action="store_true", help="a minute or two, for trends")
    parser.add_argument("--json", type=Path, help="file for the figures, which are printed too")
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


def _from(path: str, *, quick: str = "", positional: bool = False) -> Command:
    """A command that calls the function at `module:name`.

    Every argument is a flag, save those without a default if they are `positional`. `quick` is the
    help of its `--quick`, if it has one.
    """

    def command(words: str, arguments: list[str]) -> None:
        module, name = path.split(":")
        function = getattr(import_module(module), name)
        parser = _parser(words)
        if quick:
            parser.add_argument("--quick", action="store_true", help=quick)
        skip: set[str | int] | None = {"quick"} if quick else None
        parser.add_function_arguments(function, as_positional=positional, skip=skip)
        settings = _parse(parser, arguments)
        again = shlex.join(["rewardmodels", *words.split(), *arguments])
        with _interruptible(lambda: f"The same command goes on: {again}"):
            function(**settings)

    return command


def _parser(words: str) -> ArgumentParser:
    return ArgumentParser(
        prog=f"rewardmodels {words}", description=_COMMANDS[words][0], exit_on_error=False
    )


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    from experiments.usage import refusal

    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise refusal(str(error), parser) from error


@contextmanager
def _interruptible(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning's Trainer answers Ctrl-C with SystemExit.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise _Interrupted(how_to_go_on()) from None


# A command is added here, in one entry: its words, its help, and where its function stands.
_COMMANDS: dict[str, tuple[str, Command]] = {
    "learn": ("learn a task from comparisons of behaviour", _learn),
    "demo": (
        "learn HalfCheetah from 100 comparisons, beside a reward of zero",
        _from("experiments.demo:demo"),
    ),
    "label": (
        "serve the page on which people answer a run's questions",
        _from("experiments.labelling.command:label", positional=True),
    ),
    "guard": (
        "run a trained agent under a guard, which is calibrated once and kept beside it",
        _from("experiments.deploy:guard_run", positional=True),
    ),
    "export": (
        "write all answers, marks and ratings of a run as CSV or Parquet",
        _from("active.export:export_feedback", positional=True),
    ),
    "import": (
        "read what export wrote into a new store of answers",
        _from("active.export:import_feedback", positional=True),
    ),
    "pool": (
        "record an agent at every stage of its training, as a Minari data set",
        _from("experiments.datasets.minari:export_pool"),
    ),
    "study predictors": (
        "compare predictors: whether their uncertainty may be believed",
        _from("experiments.studies.predictors:study_predictors"),
    ),
    "study strategies": (
        "compare query strategies: the comparisons that they save over uniform ones",
        _from("experiments.studies.strategies:study_strategies"),
    ),
    "study feedback": (
        "measure how many comparisons are needed, by schedule and by teacher",
        _from("experiments.studies.feedback:study_feedback"),
    ),
    "study marks": ("measure how many comparisons marks of parts of clips save", _study),
    "study guard": (
        "compare detectors and statistics: which changes of the world they find, and how soon",
        _from("experiments.studies.guard:study_guard"),
    ),
    "study drift": (
        "train on a reward learned once: frozen, asked on, pessimistic or guarded",
        _from("experiments.studies.drift:study_drift"),
    ),
    "benchmark predictors": (
        "measure calibration, uncertainty and cost of every predictor",
        _from(
            "experiments.benchmarks.predictors:benchmark_predictors",
            quick="in about two minutes, for trends: one task, one seed",
        ),
    ),
    "benchmark queries": (
        "measure what queries save over random ones, and how long choosing takes",
        _from(
            "experiments.benchmarks.queries:benchmark_queries",
            quick="in about two minutes, for trends: one task, two seeds",
        ),
    ),
    "benchmark guard": (
        "measure a guard's false alarms, what it finds and what it costs",
        _from(
            "experiments.benchmarks.guard:benchmark_guard",
            quick="in about two minutes, for trends: one task, few episodes",
        ),
    ),
    "benchmark published": (
        "set a detector beside the figures that PEDM's authors printed",
        _from("experiments.benchmarks.guard_published:compare_published"),
    ),
    "benchmark backflips": (
        "count the backflips of Hoppers that were taught them by comparisons",
        _from("experiments.benchmarks.backflips:benchmark_backflips"),
    ),
    "benchmark page": (
        "measure what the page loses when it is killed, and how long people wait",
        _from(
            "experiments.benchmarks.page:benchmark_page",
            quick="in about two minutes, for trends: fewer answers and kills",
        ),
    ),
    "benchmark learn": (
        "measure returns, throughput and the scoring of pairs",
        _from(
            "experiments.benchmarks.learn:benchmark_learn",
            quick="in under 50 seconds, for trends: one task, one seed",
        ),
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
