"""Whether a guard keeps its promise, what it finds, and what it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.figures import check_settings, publish
from experiments.benchmarks.guard_cost import SCALED, scale_cost, step_cost
from experiments.benchmarks.guard_promise import ALPHA, false_alarm_rates, highest_rate
from experiments.benchmarks.guard_selective import selective_cell
from experiments.datasets.pools import make_pool
from experiments.envs.guard_episodes import train
from experiments.envs.shifts import Severity
from experiments.envs.tasks import find_task
from experiments.grid import run_study
from experiments.studies.drift import ARMS, study_drift
from experiments.studies.drift_figures import drift_kept
from experiments.studies.guard import guard_cell, worlds
from experiments.studies.guard_tables import COSTLY, FOUND
from ood import DETECTORS, DynamicsEnsemble

TASKS = ("HalfCheetah", "Hopper", "Walker2d", "Swimmer")
DETECTOR, STATISTIC = "DynamicsEnsemble", "MEWMA"

_STEPS = 300_000
_QUICK_STEPS = 102_400
# As many policies as are labelled and asked about, and the fewest updates that tell them apart.
_QUICK_POOL = {"steps": 12_288, "levels": 7, "episodes": 2}
_PROMISE = {"calibrations": 10, "calibration": 52, "tests": 100, "familiar": 40, "horizon": 200}
_QUICK_PROMISE = {"calibrations": 4, "calibration": 26, "tests": 10, "familiar": 5, "horizon": 50}
_DETECTION = {
    "horizon": 400, "onset": 150, "familiar": 300, "calibration": 132, "tests": 40,
}  # fmt: skip
_QUICK_DETECTION = {"horizon": 200, "onset": 75, "familiar": 30, "calibration": 40, "tests": 5}
# Indexed by `quick`.
_WATCHED, _FRAMES, _PAIRS, _SEEDS = (3000, 300), (10**6, 10**5), (5000, 1000), (3, 1)
_SEVERITY: Severity = "middle"
_SMALL = f"{__name__}.SmallDynamics"


class SmallDynamics(DynamicsEnsemble):
    """A detector that learns in seconds, for trends.

    Args:
        observation_size: As its parent's.
        seed: As its parent's.
    """

    def __init__(self, observation_size: int, seed: int = 0) -> None:
        super().__init__(observation_size, members=2, hidden=(64, 64), steps=1500, seed=seed)


def benchmark_guard(
    quick: bool = False,
    json: Path | None = None,
    tasks: Sequence[str] = TASKS,
    jobs: int = 1,
    pools: Path = Path("runs/pools"),
    out: Path = Path("runs/benchmark-guard"),
    drift: Path = Path("runs/study-drift"),
) -> dict[str, Any]:
    """Measures false alarms against their promise, shifts found, and time.

    Args:
        quick: In about two minutes of a processor, for trends: HalfCheetah, and little of all.
        json: File for the figures; they are printed too.
        tasks: Of which one agent each is trained on the task's own reward.
        jobs: Processes side by side.
        pools: Where the episodes of unseen policies are kept.
        out: Where agents and cells are kept; a second call goes on with those that are there.
        drift: The same of `rewardmodels study drift`.

    Returns:
        Flat keys. `false_alarm.<Task>.<detector>.<statistic>` at a promised 0.05, and
        `false_alarm_limit`, which one that keeps the promise exceeds in one case of 20; per task
        and over all `found` (share of episodes without an alarm before the onset, of shifts of
        middle severity that cost 20% of the return or more), `found_of_all` (where those with
        one count as missed), `shifts_found` (share of the shifts that are found in half of their
        episodes or more), `median_delay_steps` and `auroc` (mean), `shifts.<Task>` with
        each one's own figures, those that cost less included; `step_us` and `share_of_step`,
        and as `step_us.<detector>` and `step_share.<detector>` those of three;
        `fit_million_seconds`, `score_million_us` and `memory_million_mb` of the default detector,
        and by detector; `confident_mispredictions_passed`, the share of confident mispredictions
        on clips of unseen policies that are given at 80% coverage; `drift_kept` by a guard and
        `drift_lost` on a frozen reward, of the best true return; and `rests_on`, by the same keys,
        how many episodes, steps, frames or pairs a figure comes from.

    Raises:
        InvalidInput: No tasks, less than one job, or a file in no directory.
        UnknownName: A task that there isn't.
    """
    check_settings(json, jobs=jobs, tasks=len(tasks))
    tasks = tasks[:1] if quick else tasks
    for task in tasks:
        find_task(task)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if quick else Path(out)
        steps = _QUICK_STEPS if quick else _STEPS
        agents = {task: out / f"{task}-{steps}-steps.safetensors" for task in tasks}
        for task, agent in agents.items():
            if not agent.exists():
                train(find_task(task), steps, agent)
        figures = cost(agents[tasks[0]], tasks[0], quick)
        figures |= detection(agents, out, jobs, quick)
        figures |= promise(agents, out, jobs, quick)
        figures |= selection(tasks, Path(folder) if quick else pools, out, jobs, quick)
        figures |= drifted(out / "drift" if quick else drift, jobs, quick)
    figures["rests_on"] = rests_on(figures, tasks, quick)
    return publish(figures, json)


def cost(agent: Path, task: str, quick: bool) -> dict[str, Any]:
    """Microseconds a step, and what a million frames cost; a tenth of them if quick."""
    step = step_cost(task, agent, steps=_WATCHED[quick])
    figures: dict[str, Any] = {
        name: value for name, value in step.items() if name.startswith(("step_", "share_"))
    }
    small = {"Mahalanobis": SCALED["Mahalanobis"], "KNN": SCALED["KNN"],
             "SmallDynamics": lambda: SmallDynamics(17)}  # fmt: skip
    scaled = {
        name: scale_cost(make, _FRAMES[quick])
        for name, make in (small if quick else SCALED).items()
    }
    for key, name in (
        ("fit_million_seconds", "fit_seconds"), ("score_million_us", "score_us"),
        ("memory_million_mb", "memory_mb"),
    ):  # fmt: skip
        figures |= {f"{key}.{detector}": each[name] for detector, each in scaled.items()}
        figures[key] = scaled["SmallDynamics" if quick else DETECTOR][name]
    return figures


def promise(agents: dict[str, Path], out: Path, jobs: int, quick: bool) -> dict[str, Any]:
    """False alarms of every detector and statistic, on each task."""
    settings = _QUICK_PROMISE if quick else _PROMISE
    names = [_SMALL, "Mahalanobis"] if quick else sorted(set(DETECTORS) - {"Joint"})
    cells = [
        {"task": task, "agent": str(agent), "detector": name, **settings}
        for task, agent in agents.items() for name in names
    ]  # fmt: skip
    found = run_study(promise_cell, cells, out / "promise", jobs=jobs)
    figures: dict[str, Any] = {
        f"false_alarm.{cell['task']}.{pair.rpartition('.')[2].replace(' ', '.')}": rate
        for cell, rates in zip(cells, found, strict=True)
        for pair, rate in rates.items()
    }
    numbers = (settings[name] for name in ("calibrations", "calibration", "tests"))
    return figures | {"alpha": ALPHA, "false_alarm_limit": highest_rate(*numbers)}


def promise_cell(task: str, agent: str, detector: str, **settings: int) -> dict[str, float]:
    """One detector's rates on one task."""
    torch.set_num_threads(1)
    return false_alarm_rates(task, Path(agent), [detector], **settings)


def detection(agents: dict[str, Path], out: Path, jobs: int, quick: bool) -> dict[str, Any]:
    """What the default detector and statistic find, by task and over all."""
    settings, name = (_QUICK_DETECTION, _SMALL) if quick else (_DETECTION, DETECTOR)
    cells = [
        {"task": task, "detector": name, "seed": 0, "statistics": [STATISTIC],
         "shifts": worlds(replace(find_task(task), horizon=settings["horizon"]), None, [_SEVERITY]),
         "severities": [_SEVERITY], "alpha": ALPHA, "agent": str(agent), **settings}
        for task, agent in agents.items()
    ]  # fmt: skip
    results = run_study(guard_cell, cells, out / "cells", jobs=jobs)
    figures: dict[str, Any] = {}
    every: list[dict[str, Any]] = []
    for cell, result in zip(cells, results, strict=True):
        task, shifts = cell["task"], {}
        for row in result["rows"]:
            lost = (row["return"] - row["shifted return"]) / abs(row["return"])
            shifts[row["shift"]] = {
                "lost": lost,
                **{name: row[name] for name in ("found", "found of all", "delay", "auroc")},
            }
        figures[f"shifts.{task}"] = shifts
        figures |= {f"{k}.{task}": v for k, v in summary(list(shifts.values())).items()}
        every += shifts.values()
    return figures | summary(every)


def selection(
    tasks: Sequence[str], pools: Path, out: Path, jobs: int, quick: bool
) -> dict[str, Any]:
    """Confident mispredictions, and how many are given, over all tasks and seeds."""
    made: dict[str, Any] = _QUICK_POOL if quick else {}
    for task in tasks:
        make_pool(task, folder=pools, **made)
    cells = [
        {"task": task, "seed": seed, "tests": _PAIRS[quick], "pools": str(pools), **made}
        for task in tasks for seed in range(_SEEDS[quick])
    ]  # fmt: skip
    results = run_study(selective_cell, cells, out / "selective", jobs=jobs)
    wrong, passed, given = (
        sum(result[name] for result in results)
        for name in ("confident_errors", "confident_errors_given", "given")
    )
    return {
        "confident_mispredictions_passed": passed / wrong if wrong else None,
        "confident_mispredictions_of_given": passed / given, "confident_mispredictions": wrong,
    }  # fmt: skip


def drifted(out: Path, jobs: int, quick: bool) -> dict[str, float | None]:
    """What long training on a reward learned once costs, and what a guard keeps of it.

    None where no policy ever had a return above zero, of which there is no share.
    """
    small: dict[str, Any] = {
        "before": 20_480, "steps": 2 * 2048, "horizon": 100, "seeds": 1, "batch": 4, "more": 8,
        "predictor": "LaplaceHead",
    }  # fmt: skip
    rows = study_drift(
        arms=("frozen", "guarded") if quick else ARMS, jobs=jobs, out=out, **small if quick else {}
    )
    found = drift_kept(rows)
    shares = found["drift_guard_kept"], 1 - found["drift_frozen_kept"]
    kept, lost = (None if np.isnan(share) else share for share in shares)
    return {"drift_kept": kept, "drift_lost": lost}


def rests_on(figures: dict[str, Any], tasks: Sequence[str], quick: bool) -> dict[str, str]:
    """How many of what each figure comes from, in words."""
    promised = _QUICK_PROMISE if quick else _PROMISE
    found = _QUICK_DETECTION if quick else _DETECTION
    lost = [shift["lost"] for task in tasks for shift in figures[f"shifts.{task}"].values()]
    costly = sum(share >= COSTLY for share in lost)
    each = f"{found['tests']} episodes each, one agent a task"
    shifts = (
        f"{costly} {_SEVERITY} shifts on {', '.join(tasks)} that cost {COSTLY:.0%} or more, {each}"
    )
    scored = f"{_FRAMES[quick]:,} frames of 40 numbers"
    rests = {
        "found": shifts, "found_of_all": shifts, "shifts_found": shifts, "auroc": shifts,
        "median_delay_steps": f"{shifts}; of those found",
        "found_harmless": f"{len(lost) - costly} shifts that cost less, {each}",
        "step_us": f"medians of 3 times {_WATCHED[quick]:,} steps on {tasks[0]}",
        "fit_million_seconds": scored, "memory_million_mb": scored,
        "score_million_us": f"median of 2,000 single frames, after {scored}",
        "confident_mispredictions_passed":
        f"{figures['confident_mispredictions']} confident mispredictions of "
        f"{_PAIRS[quick] * _SEEDS[quick] * len(tasks):,} pairs",
        "detector": f"{_SMALL if quick else DETECTOR} {STATISTIC}",
    }  # fmt: skip
    rests["share_of_step"] = rests["step_us"]
    rests["drift_kept"] = rests["drift_lost"] = "the cells of rewardmodels study drift"
    episodes = f"{promised['tests']} episodes for each of {promised['calibrations']} calibrations"
    return rests | {f"false_alarm.{task}": episodes for task in tasks}


def summary(shifts: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Figures of the shifts that matter, and how often an alarm followed those that don't.

    Args:
        shifts: With `lost`, the share of the return, `found`, `delay` and `auroc`.

    Example:
        >>> one = {"lost": 0.5, "found": 1.0, "found of all": 0.9, "delay": 4.0, "auroc": 1.0}
        >>> missed = {**one, "found": 0.0, "found of all": 0.0, "delay": None}
        >>> summary([one, {**one, "lost": 0.1}, missed])  # doctest: +NORMALIZE_WHITESPACE
        {'found': 0.5, 'found_of_all': 0.45, 'shifts_found': 0.5, 'median_delay_steps': 4.0,
         'auroc': 1.0, 'found_harmless': 1.0}
    """
    costly = [shift for shift in shifts if shift["lost"] >= COSTLY]
    others = [shift["found"] for shift in shifts if shift["lost"] < COSTLY]
    delays = [shift["delay"] for shift in costly if shift["delay"] is not None]
    return {
        "found": _mean([shift["found"] for shift in costly]),
        "found_of_all": _mean([shift["found of all"] for shift in costly]),
        "shifts_found": _mean([shift["found"] >= FOUND for shift in costly]),
        "median_delay_steps": float(np.median(delays)) if delays else None,
        "auroc": _mean([shift["auroc"] for shift in costly]),
        "found_harmless": _mean(others),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
