"""When does a guard notice that the world has changed, and is what it misses worth missing?

One agent is trained with PPO on the task's own reward. Of its episodes in the usual world some
teach each detector what is familiar, others give each statistic the threshold that keeps a promised
rate of false alarms (`ood.conformal`), and others test. Each test is played again, from the same
first state, in a world that changes at a known step (`experiments.envs.shifts`). The monitor only
watches, so that what the shift costs is measured on the same episodes. Then those with an alarm
are played a third time, and halted where it came: what is earned so, less what was earned
unguarded, is the harm that the guard prevented, or did. The agent is the same for every seed, which
decides the episodes, what is drawn for a shift, and the detector's own chance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from experiments.analysis.old_page import about_study, write_report
from experiments.envs.guard_episodes import load_policy, play, train
from experiments.envs.shifts import SHIFTS, Severity, shifted
from experiments.envs.tasks import Task, find_task, make_env
from experiments.grid import Result, run_study
from experiments.registry import find_class
from experiments.studies.guard_figures import along, figures, halting_steps, step_micros
from experiments.studies.guard_tables import lead, sections
from experiments.studies.limits import check_least
from experiments.studies.summary import Row, as_csv
from ood import STATISTICS, Monitor, OODDetector, Statistic
from rewardmodels import InvalidInput
from rewardmodels.fitting import isolated_randomness
from rewardmodels.saving import write_text_atomically

Array = NDArray[Any]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


def study_guard(
    task: str = "HalfCheetah",
    detectors: Sequence[str] = ("Mahalanobis", "KNN", "DynamicsEnsemble"),
    statistics: Sequence[str] = tuple(STATISTICS),
    shifts: Sequence[str] | None = None,
    severities: Sequence[Severity] = SEVERITIES,
    alpha: float = 0.1,
    steps: int = 300_000,
    horizon: int = 400,
    onset: int = 200,
    familiar: int = 10,
    calibration: int = 40,
    tests: int = 10,
    seeds: int = 5,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    address: str | None = None,
    out: Path = Path("runs/study-guard"),
) -> list[Row]:
    """Measures which shifts which detectors and statistics find, how soon, and what they cost.

    Args:
        task: A MuJoCo task that `rewardmodels learn` takes.
        detectors: Names of ours, or import paths of others.
        statistics: Names of ours, or import paths of others.
        shifts: Names; None for all those that the task can feel.
        severities: Of each shift.
        alpha: Promised chance of a false alarm in an episode.
        steps: For which the agent is trained.
        horizon: Steps per episode.
        onset: Steps before the world changes.
        familiar: Episodes that detectors learn from.
        calibration: Episodes that thresholds are taken from.
        tests: Episodes in the usual world, and in each other.
        seeds: Draws of all these episodes.
        jobs: Cells side by side.
        backend: loky for this machine, or a cluster; as `experiments.grid` has it.
        address: The cluster's; None starts one here.
        out: Where results and the agent are kept; a second call goes on with those there.

    Returns:
        A row for each detector, statistic, shift, severity and seed; `out` has them as CSV, with
        `report.html` and `tables.md`.

    Raises:
        InvalidInput: A number out of range, or a shift that the task can't feel.
        UnknownName: A task, detector, statistic or shift that there isn't.
    """
    settings = dict(locals())
    check_least(
        ("onset", onset, 1), ("horizon", horizon, onset + 1), ("steps", steps, 0),
        ("familiar", familiar, 1), ("calibration", calibration, 2), ("tests", tests, 1),
        ("seeds", seeds, 1), ("jobs", jobs, 1),
    )  # fmt: skip
    for name in detectors:
        find_class("detector", name)
    for name in statistics:
        _statistic(name)
    chosen = worlds(find_task(task), shifts, severities)
    agent = out / f"{task.replace('/', '_')}-{steps}-steps.safetensors"
    if not agent.exists():
        train(find_task(task), steps, agent)
    cells = [
        {"task": task, "detector": name, "seed": seed, "statistics": list(statistics),
         "shifts": chosen, "severities": list(severities), "alpha": alpha, "horizon": horizon,
         "onset": onset, "familiar": familiar, "calibration": calibration, "tests": tests,
         "agent": str(agent)}
        for seed in range(seeds) for name in detectors
    ]  # fmt: skip
    found = run_study(guard_cell, cells, out / "cells", jobs=jobs, backend=backend, address=address)
    rows: list[Row] = [
        {"task": task, "detector": cell["detector"], "seed": cell["seed"], **row}
        for cell, result in zip(cells, found, strict=True)
        for row in result["rows"]
    ]
    write_text_atomically(out / "rows.csv", as_csv(rows))
    made = [{**cell, **result} for cell, result in zip(cells, found, strict=True)]
    write_report(
        out,
        f"What a guard finds on {task}",
        sections(rows, alpha),
        about_study(study_guard, settings, made, out),
        lead=lead(rows),
    )
    return rows


def guard_cell(
    task: str,
    detector: str,
    seed: int,
    statistics: Sequence[str],
    shifts: Sequence[str],
    severities: Sequence[Severity],
    alpha: float,
    horizon: int,
    onset: int,
    familiar: int,
    calibration: int,
    tests: int,
    agent: str,
) -> Result:
    """What one detector finds, with each statistic, in each shifted world."""
    torch.set_num_threads(1)
    found = replace(find_task(task), horizon=horizon)
    policy, first = load_policy(found, Path(agent)), familiar + calibration
    usual = play(lambda: make_env(found), policy, first + tests, seed)
    test = usual.part(first, first + tests)
    frames = torch.cat(usual.features[:familiar])
    size = make_env(found).observation_space.shape[0]  # type: ignore[index]
    std = frames[:, -size:].double().numpy().std(0)
    with isolated_randomness(seed):
        fitted = make_detector(detector, size, seed).fit(frames)
    monitors = {name: Monitor(fitted, _statistic(name)()) for name in statistics}
    usual_values, micros = {}, {}
    for name, monitor in monitors.items():
        monitor.calibrate(usual.features[familiar:first], alpha)
        usual_values[name] = along(monitor, test)
        micros[name] = step_micros(monitor, test.features[0])
    rows = []
    for shift in shifts:
        for severity in severities:
            changed: Callable[[], gym.Env[Any, Any]] = partial(
                _changed, found, shift, severity, onset, seed, std
            )
            # The same first states and chances: what is lost is lost to the shift.
            other = play(changed, policy, tests, seed, first=first)
            for name, monitor in monitors.items():
                assert monitor.threshold is not None
                values, limit = along(monitor, other), monitor.threshold.value
                halts = halting_steps(values, limit)
                # Where nothing halts, the third play would be the second.
                guarded = (
                    other
                    if np.isinf(halts).all()
                    else play(changed, policy, tests, seed, first=first, halts=halts)
                )
                earned = {"return": test, "shifted return": other, "guarded return": guarded}
                rows.append({
                    "statistic": name, "shift": shift, "severity": severity,
                    **figures(usual_values[name], values, limit, onset),
                    **{k: float(of.rewards[:, onset:].sum(1).mean()) for k, of in earned.items()},
                    "step us": micros[name],
                })  # fmt: skip
    return {"rows": rows}


def _changed(
    task: Task, shift: str, severity: Severity, onset: int, seed: int, std: Array
) -> gym.Env[Any, Any]:
    return shifted(make_env(task), shift, severity, onset, seed, observation_std=std)


def worlds(task: Task, shifts: Sequence[str] | None, severities: Sequence[Severity]) -> list[str]:
    """The shifts to study; all that the task can feel, where none are named."""
    env, felt = make_env(task), []
    std = np.ones(env.observation_space.shape or ())
    for name in SHIFTS if shifts is None else shifts:
        try:
            for severity in severities:
                shifted(env, name, severity, 0, 0, observation_std=std)
        except InvalidInput:
            if shifts is not None:
                raise
        else:
            felt.append(name)
    return felt


def make_detector(name: str, observation_size: int, seed: int) -> OODDetector:
    """A detector by its name or import path, of transitions between observations of that size.

    Raises:
        UnknownName: There is none.

    Example:
        >>> make_detector("DynamicsEnsemble", 17, seed=1).seed
        1
    """
    cls = find_class("detector", name)
    given = {"observation_size": observation_size, "seed": seed}
    wanted = inspect.signature(cls).parameters
    made: OODDetector = cls(**{k: v for k, v in given.items() if k in wanted})
    return made


def _statistic(name: str) -> Callable[[], Statistic]:
    return find_class("statistic", name)
