"""Whether queries teach more than random ones, and how long choosing them takes."""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from active import GreedyInformation, KCenter, QueryStrategy, all_pairs
from experiments.benchmarks.figures import QUICK_POOL, check_settings, publish
from experiments.datasets.pools import make_pool
from experiments.grid import read_study, run_study
from experiments.studies.feedback import BUDGETS, study_feedback
from experiments.studies.feedback import TASKS as FEEDBACK_TASKS
from experiments.studies.feedback_savings import at_same_budget, unsure_ratio
from experiments.studies.strategies import TASKS, pool_cell
from experiments.studies.strategy_tables import ratios
from experiments.studies.summary import by
from experiments.training.agents import PPO_ROLLOUT
from rewardmodels import SampledPosterior

DEFAULT, REFERENCE = GreedyInformation.__name__, "Uniform"

_AT = 160
_STUDY_CELLS, _STUDY_JOBS = 6 * 10, 2


def benchmark_queries(
    quick: bool = False,
    json: Path | None = None,
    seeds: int = 10,
    jobs: int = 1,
    steps: int = 300_000,
    pools: Path = Path("runs/pools"),
    out: Path = Path("runs/study-strategies"),
    feedback: Path = Path("runs/study-feedback"),
) -> dict[str, Any]:
    """Measures the comparisons that questions and asking when unsure save, and what choosing takes.

    Args:
        quick: In about two minutes, for trends: one task and its own small pool, two seeds, and
            four runs of `learn` that are too short to learn much.
        json: File for the figures; they are printed too.
        seeds: Draws of candidates, tests, first batches and initial weights, on each task; half as
            many runs of each kind of `learn`.
        jobs: Processes side by side.
        steps: For which `learn` trains a policy.
        pools: Where the agents' episodes are kept.
        out: Where cells are kept, the same as of `rewardmodels study strategies`; a second call
            goes on with those that are there.
        feedback: The same of `rewardmodels study feedback`.

    Returns:
        Flat keys: `labels_ratio.<Task>` and `unsure_ratio.<Task>` with their intervals; for the
        same budget, `unsure_asked.<Task>`, a share of it, and `unsure_return_gap.<Task>`, the
        return when unsure less the constant schedule's;
        `greedy_seconds` and `kcenter_seconds` for 100 queries, and `study_minutes`, what a study of
        6 strategies and 10 seeds on a task takes two processes, from what each cell took.
    """
    check_settings(json, seeds=seeds, jobs=jobs, steps=steps)
    figures: dict[str, Any] = {
        "greedy_seconds": seconds_to_select(GreedyInformation(samples=100), clips=1000),
        "kcenter_seconds": seconds_to_select(KCenter(samples=100), clips=1000, pairs=1000),
    }
    with tempfile.TemporaryDirectory() as folder:
        if quick:
            pools = out = Path(folder)
        tasks = ("Hopper",) if quick else TASKS
        made: dict[str, Any] = QUICK_POOL if quick else {}
        for task in tasks:
            make_pool(task, folder=pools, **made)
        cells = [
            {"task": task, "strategy": strategy, "seed": seed, "predictor": "LaplaceHead",
             "budget": 200, "batch": 20, "clips": 200, "length": 25, "tests": 1000,
             "pools": str(pools), **made}
            for seed in range(2 if quick else seeds)
            for task in tasks
            for strategy in (REFERENCE, DEFAULT)
        ]  # fmt: skip
        results = run_study(pool_cell, cells, out / "cells", jobs=jobs)
        taken = [row["seconds"] for row in read_study(out / "cells", pool_cell.__qualname__)]
        figures["study_minutes"] = statistics.mean(taken) * _STUDY_CELLS / _STUDY_JOBS / 60
        budgets = (16, 32) if quick else BUDGETS
        learned = partial(
            study_feedback,
            tasks=("Hopper",) if quick else FEEDBACK_TASKS,
            arms=("task", "zero"),
            predictor="LaplaceHead" if quick else None,
            steps=PPO_ROLLOUT if quick else steps,
            seeds=1 if quick else max(1, seeds // 2),
            jobs=jobs,
            out=out / "feedback" if quick else feedback,
        )
        learned(schedules=("Constant",), budgets=budgets)
        runs = learned(schedules=("WhenUnsure",), budgets=budgets[-1:])  # with those of before
    for task, some in by(runs, "task").items():
        ratio, *interval = unsure_ratio(some)
        figures[f"unsure_ratio.{task}"] = ratio
        figures[f"unsure_ratio_interval.{task}"] = interval
        if found := at_same_budget(some):
            figures[f"unsure_asked.{task}"], figures[f"unsure_return_gap.{task}"] = found[:2]
            figures[f"unsure_return_gap_interval.{task}"] = list(found[2:])
    rows = [{**cell, **result} for cell, result in zip(cells, results, strict=True)]
    for task, (ratio, low, high) in ratios(rows, DEFAULT, _AT).items():
        figures[f"labels_ratio.{task}"] = ratio
        figures[f"labels_ratio_interval.{task}"] = [low, high]
    return publish(figures, json)


def seconds_to_select(
    strategy: QueryStrategy, *, clips: int, pairs: int | None = None, n: int = 100
) -> float:
    """Median seconds for n queries, on one thread.

    Args:
        strategy: That chooses.
        clips: Whose returns are believed to be one of 100 equally likely rows.
        pairs: How many of their pairs, drawn at random, may be asked about; None for all.
        n: Queries.
    """
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    belief = SampledPosterior(torch.randn(100, clips, generator=draw))
    candidates = all_pairs(clips)
    if pairs is not None:
        candidates = candidates[torch.randperm(len(candidates), generator=draw)[:pairs]]
    taken = []
    with threadpool_limits(1):
        for _ in range(3):
            started = time.perf_counter()
            chosen = strategy.select(belief, candidates, n, generator=draw)
            taken.append(time.perf_counter() - started)
            assert len(chosen.unique()) == n
    return statistics.median(taken)
