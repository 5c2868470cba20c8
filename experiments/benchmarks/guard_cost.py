"""What a guard costs: microseconds a step, and seconds and megabytes of a million frames."""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from experiments.envs.guard_episodes import Act, load_policy, play
from experiments.envs.tasks import Task, find_task, make_env
from ood import (
    CUSUM,
    KNN,
    MEWMA,
    DynamicsEnsemble,
    Guard,
    Mahalanobis,
    Monitor,
    OODDetector,
    Statistic,
)

SCALED: dict[str, Callable[[], OODDetector]] = {
    "Mahalanobis": Mahalanobis,
    "KNN": KNN,
    "DynamicsEnsemble": lambda: DynamicsEnsemble(17),
}
_NUMBERS = 17 + 6 + 17  # of a HalfCheetah's transition
# As wide as each would be: how long the networks have learned doesn't change their time. The first
# two with what a guard sees and adds up unless told otherwise.
_WATCHING: dict[str, tuple[Callable[[int], OODDetector], Statistic, str]] = {
    "Mahalanobis": (lambda size: Mahalanobis(), CUSUM(), "observation_action"),
    "KNN": (lambda size: KNN(), CUSUM(), "observation_action"),
    "DynamicsEnsemble": (lambda size: DynamicsEnsemble(size, steps=50), MEWMA(), "transition"),
}
_DEFAULT = "DynamicsEnsemble"
_FAMILIAR, _CALIBRATION = 21, 22  # episodes, of more frames than KNN keeps
_MEGABYTE = 2**20


def step_cost(task: str, agent: Path, *, steps: int = 3000, repeats: int = 3) -> dict[str, float]:
    """What a guarded step takes more than a bare one, by detector.

    A bare and a guarded environment take the same actions in turn, so that whatever else the
    machine does happens to both.

    Args:
        task: By name.
        agent: What `experiments.envs.guard_episodes.train` wrote.
        steps: Of each environment, at each repeat.
        repeats: Of which the median is taken.

    Returns:
        `step_us.<detector>`, the median guarded step less the median bare one; and
        `step_share.<detector>`, that over the median time of simulation and policy together; both
        for Mahalanobis and KNN with CUSUM, and DynamicsEnsemble with MEWMA. `step_us` and
        `share_of_step` are the last one's, as are `bare_step_us` and `policy_us`.
    """
    found = replace(find_task(task), horizon=400)
    act = load_policy(found, agent)
    figures: dict[str, float] = {}
    for name, (_, _, features) in _WATCHING.items():
        monitor = _monitor(found, act, name)
        rounds = [_step_round(found, act, monitor, features, steps) for _ in range(repeats)]
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        figures |= {
            f"step_us.{name}": middle["step_us"], f"step_share.{name}": middle["share_of_step"],
        }  # fmt: skip
        if name == _DEFAULT:
            figures |= middle
    return figures


def _monitor(task: Task, act: Act, name: str) -> Monitor:
    make, statistic, features = _WATCHING[name]
    played = play(lambda: make_env(task), act, _FAMILIAR + _CALIBRATION, seed=0, features=features)
    size = make_env(task).observation_space.shape[0]  # type: ignore[index]
    detector = make(size).fit(torch.cat(played.features[:_FAMILIAR]))
    monitor = Monitor(detector, statistic)
    threshold = monitor.calibrate(played.features[_FAMILIAR:], alpha=0.1)
    monitor.threshold = replace(threshold, value=float("inf"))  # it has to watch to the end
    return monitor


def _step_round(
    task: Task, act: Act, monitor: Monitor, features: str, steps: int
) -> dict[str, float]:
    bare, guarded = make_env(task), Guard(make_env(task), monitor, features)
    noise = np.random.default_rng(0).standard_normal((steps, 1, *bare.action_space.shape))  # type: ignore[misc]
    seen, _ = bare.reset(seed=0)
    guarded.reset(seed=0)
    taken: dict[str, list[float]] = {"policy": [], "bare": [], "guarded": []}
    for number in range(steps):
        started = time.perf_counter()
        action = act(seen[None], noise[number])[0]
        taken["policy"].append(time.perf_counter() - started)
        # Who is first finds caches that the other didn't warm.
        order = [("bare", bare), ("guarded", guarded)][:: 1 if number % 2 else -1]
        for name, env in order:
            started = time.perf_counter()
            after, _, _, ended, _ = env.step(action)
            taken[name].append(time.perf_counter() - started)
            if name == "bare":
                seen = after
        if ended:
            seen, _ = bare.reset()
            guarded.reset()
    middle = {name: 1e6 * statistics.median(each) for name, each in taken.items()}
    more = middle["guarded"] - middle["bare"]
    return {
        "step_us": more, "share_of_step": more / (middle["bare"] + middle["policy"]),
        "bare_step_us": middle["bare"], "policy_us": middle["policy"],
    }  # fmt: skip


def scale_cost(make: Callable[[], OODDetector], frames: int) -> dict[str, float]:
    """What a detector costs that learns from that many frames, of a HalfCheetah's size.

    Args:
        make: The detector.
        frames: Of correlated normal numbers.

    Returns:
        `fit_seconds`, of one processor; `score_us`, the median of one frame's score; `memory_mb`,
        what the fitted detector is pickled to.
    """
    draw = np.random.default_rng(0)
    mix = draw.standard_normal((8, _NUMBERS)).astype(np.float32)
    x = draw.standard_normal((frames, 8), dtype=np.float32) @ mix
    x += 0.1 * draw.standard_normal(x.shape, dtype=np.float32)
    features = torch.from_numpy(x)
    detector, taken = make(), []
    with threadpool_limits(1):
        # Of the processor: what else a shared machine does isn't the detector's.
        started = time.process_time()
        detector.fit(features)
        seconds = time.process_time() - started
        for row in x[:2000]:
            started = time.perf_counter()
            detector.score_array(row[None])
            taken.append(time.perf_counter() - started)
    return {
        "fit_seconds": seconds, "score_us": 1e6 * statistics.median(taken),
        "memory_mb": len(pickle.dumps(detector)) / _MEGABYTE,
    }  # fmt: skip
