"""Whether the promised rate of false alarms is kept, over calibrations as well as episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import betabinom
from torch import Tensor

from experiments.envs.guard_episodes import Act, load_policy
from experiments.envs.tasks import Task, find_task
from experiments.envs.vector import make_vec_env
from experiments.studies.guard import make_detector
from ood import STATISTICS, Monitor
from ood.conformal import conformal_rank, episode_maxima
from ood.features import transition
from rewardmodels.fitting import isolated_randomness

ALPHA = 0.05
_STANDARDISE = 0.25  # of calibration episodes; `ood.calibrate`'s own
_TOGETHER = 100


def false_alarm_rates(
    task: str,
    agent: Path,
    detectors: Sequence[str],
    *,
    calibrations: int,
    calibration: int,
    tests: int,
    familiar: int,
    horizon: int,
    seed: int = 0,
) -> dict[str, float]:
    """Rate of false alarms an episode, of each detector with each statistic.

    The promise is over calibration and episode together, so that one calibration, however many
    episodes test it, says little: there are several, each with episodes and tests of its own. What
    a detector has learned may be the same for all.

    Args:
        task: By name.
        agent: What `experiments.envs.guard_episodes.train` wrote.
        detectors: By name.
        calibrations: R.
        calibration: Episodes of each.
        tests: m, episodes that test each.
        familiar: Episodes that detectors learn from.
        horizon: Steps of an episode.
        seed: Of the episodes and the detectors.

    Returns:
        By "detector statistic": the share of R m episodes with an alarm.
    """
    found = replace(find_task(task), horizon=horizon)
    act, each = load_policy(found, agent), calibration + tests
    episodes = play_batch(found, act, familiar + calibrations * each, seed)
    frames, rates = torch.cat(episodes[:familiar]), {}
    size = make_vec_env(found, 1, 0).observation_space.shape[0]  # type: ignore[index]
    for name in detectors:
        with isolated_randomness(seed):
            fitted = make_detector(name, size, seed).fit(frames)
        for kind, statistic in STATISTICS.items():
            monitor, alarms = Monitor(fitted, statistic()), 0
            for start in range(familiar, len(episodes), each):
                own = episodes[start : start + each]
                threshold = monitor.calibrate(own[:calibration], ALPHA, standardise=_STANDARDISE)
                seen = [monitor.scores(episode).numpy() for episode in own[calibration:]]
                maxima = episode_maxima(seen, monitor.statistic, threshold)
                alarms += int((maxima > threshold.value).sum())
            rates[f"{name} {kind}"] = alarms / (calibrations * tests)
    return rates


def highest_rate(calibrations: int, calibration: int, tests: int, draws: int = 200_000) -> float:
    r"""The rate that one that keeps the promise stays at or below in 95 cases of 100.

    Given one calibration of n maxima, alarms among m tests are beta-binomial with parameters
    $n + 1 - k$ and k, k the threshold's rank (Vovk 2012); those of several are independent.

    Example:
        >>> highest_rate(10, 52, 100)  # a binomial of 1,000 would have 0.062
        0.072
    """
    n = calibration - max(2, round(_STANDARDISE * calibration))
    rank = conformal_rank(n, ALPHA)
    alarms = betabinom(tests, n + 1 - rank, rank).rvs((draws, calibrations), random_state=0)
    return float(np.quantile(alarms.sum(1), 0.95)) / (calibrations * tests)


def play_batch(task: Task, act: Act, episodes: int, seed: int) -> list[Tensor]:
    """Transitions `(T, F)` of whole episodes, in the backend that is fastest."""
    draw = np.random.default_rng(seed)
    played: list[Tensor] = []
    while len(played) < episodes:
        together = min(_TOGETHER, episodes - len(played))
        steps = []
        with closing(make_vec_env(task, together, int(draw.integers(2**30)))) as envs:
            before: Any = envs.reset()
            for _ in range(task.horizon):
                noise = draw.standard_normal((together, *(envs.action_space.shape or ())))
                actions = act(before, noise)
                stepped: Any = envs.step(actions)
                after, _, ended, infos = stepped
                led_to = (
                    np.stack([info["terminal_observation"] for info in infos])
                    if ended.all()
                    else after
                )
                steps.append(transition(before, actions, led_to))
                before = after
        played += list(torch.from_numpy(np.stack(steps, 1)))
    return played


def worst(rates: Mapping[str, float]) -> float:
    """The highest of all detectors and statistics."""
    return max(rates.values())
