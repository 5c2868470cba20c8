"""Study of backflips: their number after teaching a Hopper by comparisons alone.

A synthetic teacher compares (`envs.backflip`); Christiano et al. (2017) give no count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.analysis.page import Report, Section
from experiments.analysis.stats import bootstrap, interquartile_mean
from experiments.studies import check_least, seed_range
from experiments.training.config import LearnConfig
from experiments.training.learn import learn
from experiments.training.run_directory import RunDirectory

GRID = ("seeds", "first_seed")
QUICK = {"seeds": 1, "comparisons": 32, "steps": 4096}


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Args:
        comparisons: Comparisons that each run may ask for.
        steps: Training steps of each; None takes the task's default.
        seeds: Number of runs.
        first_seed: The first of their seeds.
        runs: Directory of the runs, each with its report and video; they resume.

    Raises:
        InvalidInput: A number out of range.
    """

    comparisons: int = 900
    steps: int | None = None
    seeds: int = 5
    first_seed: int = 0
    runs: Path = Path("runs/backflips")

    def __post_init__(self) -> None:
        check_least(self, comparisons=8, seeds=1)
        LearnConfig("backflip", comparisons=self.comparisons, steps=self.steps)


def cells(settings: Settings) -> list[dict[str, Any]]:
    """One cell for each seed."""
    return [{"seed": seed} for seed in seed_range(settings)]


def cell(settings: Settings, seed: int) -> dict[str, Any]:
    """Train one Hopper, and count the full backward turns, landed, of its evaluation."""
    name = f"seed-{seed}-{settings.comparisons}-comparisons-{settings.steps or 'default'}-steps"
    out = settings.runs / name
    config = LearnConfig(
        "backflip", comparisons=settings.comparisons, steps=settings.steps, seed=seed, out=out
    )
    result = learn(config, resume=RunDirectory(out).exists, progress=False)
    columns = {"backflips": "backflips_per_1000_steps", "asked": "comparisons",
               "correlation": "reward_correlation", "wall_seconds": "wall_seconds"}  # fmt: skip
    return {column: result[key] for column, key in columns.items()}


def report(results: pd.DataFrame) -> Report:
    """Backflips of each seed, and their interquartile mean."""
    flips = bootstrap(interquartile_mean, results["backflips"])
    columns = ["seed", "backflips", "asked", "correlation"]
    total = pd.DataFrame([{"seed": "interquartile mean", "backflips": flips}])
    table = pd.concat([results[columns].astype(object), total.astype(object)]).fillna("")
    section = Section(
        "Full backward turns, landed, in 1,000 steps",
        "Mean over the evaluation of each final policy, with the comparisons asked for and the "
        "correlation of the learned with the teacher's reward.",
        table=table,
        digits=1,
    )
    numbers = {
        "backflips": flips.value,
        "backflips_interval": flips[1:],
        "backflips_by_seed": results["backflips"].tolist(),
        "backflips_comparisons": int(results["asked"].max()),
        "backflips_wall_seconds": float(results["wall_seconds"].sum()),
    }
    return Report("Can a backflip be taught by comparisons?", [section], numbers)
