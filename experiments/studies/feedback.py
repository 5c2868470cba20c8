"""How much feedback is needed, and need it be given evenly?

**Online.** `learn` from start to end: a policy is trained on the reward learned from so many
comparisons, asked for by a schedule and answered by a teacher, and judged by the task's own reward.
Beside it stand policies trained on the task's own reward, which is what can be hoped for, and on
trivial ones (zero, constant, random), since on many a task these do well already (Shin et al. 2023,
arXiv 2301.01392).

**Pool.** Seconds in place of minutes: no policy is trained. A strategy asks about a fixed pool of
clips, and what is judged is the learned reward's accuracy on pairs from other episodes. There is no
training to spread answers over, so schedules have no part in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from active import QueryStrategy, Schedule, Teacher
from experiments.analysis.old_page import about_study
from experiments.datasets.pools import make_pool
from experiments.envs.tasks import find_task
from experiments.grid import Result, read_study, run_study
from experiments.registry import find_class
from experiments.studies.feedback_tables import write_tables
from experiments.studies.limits import check_least
from experiments.studies.predictors import maker
from experiments.studies.strategies import pool_cell
from experiments.studies.summary import Row
from experiments.training.config import LearnConfig, RewardName, default_model, task_defaults
from experiments.training.learn import learn
from experiments.training.run_directory import RunDirectory
from rewardmodels import InvalidInput

TASKS = ("HalfCheetah", "Hopper", "Walker2d")
BUDGETS = (25, 50, 100)
ARMS: tuple[RewardName, ...] = ("task", "zero", "constant", "random")


def study_feedback(
    mode: Literal["online", "pool"] = "online",
    tasks: Sequence[str] = TASKS,
    budgets: Sequence[int] = BUDGETS,
    schedules: Sequence[str] = ("Constant", "WhenUnsure"),
    teachers: Sequence[str] = ("oracle",),
    arms: Sequence[RewardName] = ARMS,
    strategy: str = "GreedyInformation",
    predictor: str | None = None,
    steps: int = 300_000,
    seeds: int = 5,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    address: str | None = None,
    pools: Path = Path("runs/pools"),
    out: Path = Path("runs/study-feedback"),
) -> list[Row]:
    """Measures what more comparisons are worth, and how many are needed.

    Args:
        mode: "online" trains a policy in every cell, which takes minutes; "pool" only learns
            rewards, which takes seconds.
        tasks: Any that `rewardmodels learn` takes.
        budgets: Comparisons, the most that a run may ask for; a pool's curve goes to the largest.
        schedules: Constant, Hyperbolic, WhenUnsure, or import paths of others; with arguments or
            without, as in "WhenUnsure(level=0.2)". The share that is asked for first is the one
            that `learn` has for the task. In pool mode without part.
        teachers: oracle, stochastic, mistaken, myopic (as in B-Pref), or import paths of others.
        arms: Rewards that aren't learned, for comparison. In pool mode without part.
        strategy: A name of ours, or an import path.
        predictor: A name, or an import path; None takes `learn`'s own online, and `LaplaceHead` in
            pool mode.
        steps: For which a policy is trained.
        seeds: Of everything.
        jobs: Cells side by side.
        backend: loky for this machine, or a cluster; as `experiments.grid` has it.
        address: The cluster's; None starts one here.
        pools: Where pools are kept; a cluster's workers read it too.
        out: Where results are kept. A second call goes on with those that are there, and tells of
            all of its mode, so that one budget or schedule may be added at a time.

    Returns:
        A row a cell; `out` has them as CSV, with `report.html` and its figures, in a directory
        for each mode.

    Raises:
        InvalidInput: A number out of range, or nothing to do.
        UnknownName: A task, schedule, teacher, reward, strategy or predictor that there isn't.
    """
    settings = dict(locals())
    _check(tasks, budgets, schedules, teachers, strategy, predictor, steps, seeds, jobs)
    if mode == "pool":
        for task in tasks:
            make_pool(task, folder=pools)
        cells = _pool_cells(tasks, budgets, teachers, strategy, predictor, seeds, pools)
        function: Callable[..., Result] = pool_cell
    else:
        cells = _online_cells(
            tasks, budgets, schedules, teachers, arms, strategy, predictor, steps, seeds
        )
        function = online_cell
    run_study(function, cells, out / "cells", jobs=jobs, backend=backend, address=address)
    rows = _alike(read_study(out / "cells", function.__qualname__), cells)
    about = about_study(study_feedback, settings, rows, out)
    write_tables(rows, mode, out, about)
    return list(rows)


def online_cell(
    task: str,
    reward: RewardName,
    seed: int,
    steps: int,
    budget: int = 0,
    schedule: str = "",
    teacher: str = "",
    strategy: str = "",
    predictor: str | None = None,
) -> Result:
    """One run of `learn`: what its policy came to, and how it went there.

    Returns:
        The final policy's mean true return; answers received, queries put and skipped; and by
        round steps, answers, the true return, and the mean information in comparing what the policy
        lately did (`active.mean_information`), None where there was none yet.
    """
    settings: dict[str, Any] = {}
    if reward == "learned":
        settings = {
            "comparisons": budget,
            "schedule": _made_schedule(schedule, task),
            "teacher": _teacher(teacher)(),
            "strategy": _strategy(strategy)(),
            "model": maker(predictor)() if predictor else default_model(),
        }
    with TemporaryDirectory() as folder:
        config = LearnConfig(
            task, reward=reward, seed=seed, steps=steps, video=False, out=Path(folder) / "run",
            **settings,
        )  # fmt: skip
        found = learn(config, progress=False)
        metrics = RunDirectory(config.out).metrics
    curves = {
        name: [None if np.isnan(value) else float(value) for value in metrics[column]]
        for name, column in (
            ("by step", "step"), ("by answers", "comparisons"), ("by return", "task_return"),
            ("by information", "mean_information"),
        )
    }  # fmt: skip
    return {
        "return": found["final_return"],
        "comparisons": found["comparisons"],
        "queries": found["queries"],
        "skipped": found["skipped"],
        "correlation": found["reward_correlation"],
        **curves,
    }


def _alike(rows: Sequence[Row], cells: Sequence[Row]) -> list[Row]:
    """Those rows, in order, that may stand beside these cells in one figure."""
    named = ("strategy", "predictor", "steps")
    kinds = [{name: cell[name] for name in named if name in cell} for cell in cells]
    alike = [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in rows
        if {name: row[name] for name in named if name in row} in kinds
    ]
    order = ("task", "reward", "schedule", "teacher", "budget", "seed")
    return sorted(alike, key=lambda row: [str(row.get(name, "")).zfill(12) for name in order])


def _online_cells(
    tasks: Sequence[str],
    budgets: Sequence[int],
    schedules: Sequence[str],
    teachers: Sequence[str],
    arms: Sequence[RewardName],
    strategy: str,
    predictor: str | None,
    steps: int,
    seeds: int,
) -> list[Row]:
    cells: list[Row] = []
    for seed in range(seeds):
        for task in tasks:
            run = {"task": task, "seed": seed, "steps": steps}
            cells += [{**run, "reward": arm} for arm in arms]
            cells += [
                {**run, "reward": "learned", "budget": budget, "schedule": schedule,
                 "teacher": teacher, "strategy": strategy, "predictor": predictor}
                for budget in budgets for schedule in schedules for teacher in teachers
            ]  # fmt: skip
    return cells


def _pool_cells(
    tasks: Sequence[str],
    budgets: Sequence[int],
    teachers: Sequence[str],
    strategy: str,
    predictor: str | None,
    seeds: int,
    pools: Path,
) -> list[Row]:
    return [
        {"task": task, "seed": seed, "teacher": teacher, "strategy": strategy,
         "predictor": predictor or "LaplaceHead", "budget": max(budgets), "batch": 20, "clips": 200,
         "length": 25, "tests": 1000, "pools": str(pools)}
        for seed in range(seeds) for task in tasks for teacher in teachers
    ]  # fmt: skip


def _check(
    tasks: Sequence[str],
    budgets: Sequence[int],
    schedules: Sequence[str],
    teachers: Sequence[str],
    strategy: str,
    predictor: str | None,
    steps: int,
    seeds: int,
    jobs: int,
) -> None:
    """Raises for what no cell could use."""
    for name, several in (
        ("tasks", tasks), ("budgets", budgets), ("schedules", schedules), ("teachers", teachers),
    ):  # fmt: skip
        if not several:
            raise InvalidInput(f"{name}: expected at least one, got none.")
    check_least(
        ("budgets", min(budgets), 8), ("steps", steps, 1), ("seeds", seeds, 1), ("jobs", jobs, 1)
    )
    for task in tasks:
        find_task(task)
        for schedule in schedules:
            _made_schedule(schedule, task)
    for teacher in teachers:
        _teacher(teacher)
    _strategy(strategy)
    if predictor:
        maker(predictor)


def _made_schedule(name: str, task: str) -> Schedule:
    """A schedule that first asks for the share which the task needs, if it has such a setting."""
    make = find_class("schedule", name)
    said = getattr(make, "keywords", {})
    if "initial" in inspect.signature(make).parameters and "initial" not in said:
        make = partial(make, initial=task_defaults(task).schedule().initial)
    made: Schedule = make()
    return made


def _teacher(name: str) -> Callable[[], Teacher]:
    return find_class("teacher", name)


def _strategy(name: str) -> Callable[[], QueryStrategy]:
    return find_class("strategy", name)
