"""The command `rewardmodels`: every setting by flag or YAML, every class by name or import path."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

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
        command, rest = _chosen(arguments)
        return _run(command, rest)
    except _Refused as error:
        print(f"rewardmodels: error: {error}", file=sys.stderr)
        return 2
    except _Interrupted as interruption:
        print(f"\nrewardmodels: interrupted. {interruption}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nrewardmodels: interrupted before any work was done.", file=sys.stderr)
        return 130


def _chosen(arguments: list[str]) -> tuple[Callable[[list[str]], None], list[str]]:
    """The sub-command that the first words name, and the words after them."""
    for words, (_, command) in _COMMANDS.items():
        name = words.split()
        if arguments[: len(name)] == name:
            return command, arguments[len(name) :]
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


def _run(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    from rewardmodels.errors import RewardModelsError

    try:
        command(arguments)
    except RewardModelsError as error:
        raise _Refused(str(error)) from error
    return 0


def _learn(arguments: list[str]) -> None:
    from experiments.config import LearnConfig
    from experiments.learn import learn
    from rewardmodels.errors import InvalidInput

    parser = _parser("learn")
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


def _demo(arguments: list[str]) -> None:
    from experiments.demo import demo

    parser = _parser("demo")
    parser.add_function_arguments(demo)
    _call("demo", parser, demo, arguments)


def _benchmark_learn(arguments: list[str]) -> None:
    from experiments.benchmarks.learn import benchmark_learn

    parser = _parser("benchmark learn")
    parser.add_argument(
        "--quick", action="store_true", help="in under 50 seconds, for trends: one task, one seed"
    )
    parser.add_function_arguments(benchmark_learn, skip={"quick"})
    _call("benchmark learn", parser, benchmark_learn, arguments)


def _benchmark_predictors(arguments: list[str]) -> None:
    from experiments.benchmarks.predictors import benchmark_predictors

    parser = _parser("benchmark predictors")
    parser.add_argument(
        "--quick", action="store_true", help="in about two minutes, for trends: one task, one seed"
    )
    parser.add_function_arguments(benchmark_predictors, skip={"quick"})
    _call("benchmark predictors", parser, benchmark_predictors, arguments)


def _benchmark_queries(arguments: list[str]) -> None:
    from experiments.benchmarks.queries import benchmark_queries

    parser = _parser("benchmark queries")
    parser.add_argument(
        "--quick", action="store_true", help="in about a minute, for trends: one task, two seeds"
    )
    parser.add_function_arguments(benchmark_queries, skip={"quick"})
    _call("benchmark queries", parser, benchmark_queries, arguments)


def _pool(arguments: list[str]) -> None:
    from experiments.minari_pools import export_pool

    parser = _parser("pool")
    parser.add_function_arguments(export_pool)
    _call("pool", parser, export_pool, arguments)


def _study_predictors(arguments: list[str]) -> None:
    from experiments.studies.predictors import study_predictors

    parser = _parser("study predictors")
    parser.add_function_arguments(study_predictors)
    _call("study predictors", parser, study_predictors, arguments)


def _study_strategies(arguments: list[str]) -> None:
    from experiments.studies.strategies import study_strategies

    parser = _parser("study strategies")
    parser.add_function_arguments(study_strategies)
    _call("study strategies", parser, study_strategies, arguments)


def _study_feedback(arguments: list[str]) -> None:
    from experiments.studies.feedback import study_feedback

    parser = _parser("study feedback")
    parser.add_function_arguments(study_feedback)
    _call("study feedback", parser, study_feedback, arguments)


def _study_guard(arguments: list[str]) -> None:
    from experiments.studies.guard import study_guard

    parser = _parser("study guard")
    parser.add_function_arguments(study_guard)
    _call("study guard", parser, study_guard, arguments)


def _call(
    words: str, parser: ArgumentParser, function: Callable[..., object], arguments: list[str]
) -> None:
    settings = _parse(parser, arguments)
    again = shlex.join(["rewardmodels", *words.split(), *arguments])
    with _interruptible(lambda: f"The same command goes on: {again}"):
        function(**settings)


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


_COMMANDS = {
    "learn": ("learn a task from comparisons of behaviour", _learn),
    "demo": ("learn HalfCheetah from 100 comparisons, beside a reward of zero", _demo),
    "pool": ("record an agent at every stage of its training, as a Minari data set", _pool),
    "study predictors": (
        "compare predictors: whether their uncertainty may be believed",
        _study_predictors,
    ),
    "study strategies": (
        "compare query strategies: the comparisons that they save over uniform ones",
        _study_strategies,
    ),
    "study feedback": (
        "measure how many comparisons are needed, by schedule and by teacher",
        _study_feedback,
    ),
    "study guard": (
        "compare detectors and statistics: which changes of the world they find, and how soon",
        _study_guard,
    ),
    "benchmark predictors": (
        "measure calibration, uncertainty and cost of every predictor",
        _benchmark_predictors,
    ),
    "benchmark queries": (
        "measure what queries save over random ones, and how long choosing takes",
        _benchmark_queries,
    ),
    "benchmark learn": ("measure returns, throughput and the scoring of pairs", _benchmark_learn),
}

# Classes by name: LearnConfig's own defaults are objects, which no help text can show.
_DEFAULTS = {
    "model": {
        "class_path": "rewardmodels.DeepEnsemble",
        # As in experiments.config, which takes seconds to import.
        "init_args": {"activation": "leaky_relu", "weight_decay": 0.01},
    },
    "strategy": {"class_path": "active.BALD"},
    "teacher": {"class_path": "active.SyntheticTeacher"},
}
