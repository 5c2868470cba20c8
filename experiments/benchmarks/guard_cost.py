"""What a guard costs: microseconds a step, and seconds and megabytes of a million frames."""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from experiments.guard_episodes import load_policy, play
from experiments.tasks import find_task, make_env
from ood import KNN, MEWMA, DynamicsEnsemble, Guard, Mahalanobis, Monitor, OODDetector

SCALED: dict[str, Callable[[], OODDetector]] = {
    "Mahalanobis": Mahalanobis,
    "KNN": KNN,
    "DynamicsEnsemble": lambda: DynamicsEnsemble(17),
}
_NUMBERS = 17 + 6 + 17  # of a HalfCheetah's transition
_MEGABYTE = 2**20


def step_cost(task: str, agent: Path, *, steps: int = 3000, repeats: int = 3) -> dict[str, float]:
    """What a guarded step takes more than a bare one.

    Both environments take the same actions in turn, so that whatever else the machine does
    happens to both.

    Args:
        task: By name.
        agent: What `experiments.guard_episodes.train` wrote.
        steps: Of each environment, at each repeat.
        repeats: Of which the median is taken.

    Returns:
        `step_us`, the median guarded step less the median bare one; `share_of_step`, that over
        the median time of simulation and policy together; `bare_step_us` and `policy_us`.
    """
    found = replace(find_task(task), horizon=400)
    act = load_policy(found, agent)
    episodes = play(lambda: make_env(found), act, 24, seed=0).features
    size = make_env(found).observation_space.shape[0]  # type: ignore[index]
    # As wide as it would be; how long it has learned doesn't change its time.
    detector = DynamicsEnsemble(size, steps=50).fit(torch.cat(episodes[:2]))
    monitor = Monitor(detector, MEWMA())
    threshold = monitor.calibrate(episodes[2:], alpha=0.1)
    monitor.threshold = replace(threshold, value=float("inf"))  # it has to watch to the end
    rounds = [_step_round(found, act, monitor, steps) for _ in range(repeats)]
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def _step_round(task: Any, act: Any, monitor: Monitor, steps: int) -> dict[str, float]:
    bare, guarded = make_env(task), Guard(make_env(task), monitor, "transition")
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
