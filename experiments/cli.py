"""The command `rewardmodels`: every setting by flag or YAML, every class by name or import path."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from experiments.benchmarks.learn import benchmark_learn
from experiments.demo import demo
from experiments.learn import LearnConfig, learn
from rewardmodels import InvalidInput, RewardModelsError


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command.

    Returns:
        0 for success, 2 for input that can't be used (with a line that says why on standard
        error), 130 for an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.path.append(str(Path.cwd()))  # so that a user's own class can be named by its path
    parser, parts = _parsers()
    try:
        chosen = parser.parse_args(arguments)
        settings = chosen[chosen.subcommand]
        if chosen.subcommand == "learn":
            _learn(parts["learn"], settings, arguments[arguments.index("learn") + 1 :])
        elif chosen.subcommand == "demo":
            demo(**settings)
        elif chosen.subcommand == "benchmark":
            benchmark_learn(**settings[settings.subcommand])
    except RewardModelsError as error:
        print(f"rewardmodels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrewardmodels: interrupted; nothing that was answered is lost.", file=sys.stderr)
        return 130
    return 0


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parts = {name: ArgumentParser(description=text) for name, text in _COMMANDS.items()}
    parts["learn"].add_argument("--config", action="config", help="YAML with any of these settings")
    parts["learn"].add_argument(
        "--resume", action="store_true", help="go on with the run that stands in --out"
    )
    parts["learn"].add_class_arguments(LearnConfig)
    parts["learn"].set_defaults(_DEFAULTS)
    parts["demo"].add_function_arguments(demo)
    parts["benchmark learn"].add_function_arguments(benchmark_learn)
    parser = ArgumentParser(
        prog="rewardmodels",
        description="Learn rewards from comparisons, and know how sure of them.",
    )
    commands = parser.add_subcommands()
    for name in ("learn", "demo", "benchmark"):
        commands.add_subcommand(name, parts[name], help=_COMMANDS[name])
    kinds = parts["benchmark"].add_subcommands()
    kinds.add_subcommand("learn", parts["benchmark learn"])
    return parser, parts


_COMMANDS = {
    "learn": "Learn a task from comparisons of behaviour.",
    "demo": "See it happen: learn HalfCheetah from 100 comparisons, beside a reward of zero.",
    "benchmark": "Measure what the README says.",
    "benchmark learn": "Return, throughput and scoring of pairs.",
}

# Classes by name: LearnConfig's own defaults are objects, which no help text can show.
_DEFAULTS = {
    "model": {"class_path": "rewardmodels.DeepEnsemble"},
    "strategy": {"class_path": "active.BALD", "init_args": {"power": 1.0}},
    "schedule": {"class_path": "active.Constant"},
    "teacher": {"class_path": "active.SyntheticTeacher"},
}


def _learn(parser: ArgumentParser, settings: Namespace, arguments: list[str]) -> None:
    if settings.resume:
        config = Path(settings.out) / "config.yaml"
        if not config.exists():
            raise InvalidInput(f"resume: expected a run in --out, got {settings.out}, without one.")
        settings = parser.parse_args(["--config", str(config), *arguments])
    made = parser.instantiate(settings)
    resume = made.pop("resume")
    made.pop("config")
    result = learn(LearnConfig(**made), resume=resume)
    print(
        f"{result['task']}, {result['reward']} reward, {result['comparisons']} comparisons: true "
        f"return {result['final_return']:.0f} after {result['steps']:,} steps.\n"
        f"Report: {made['out']}/report.html"
    )
