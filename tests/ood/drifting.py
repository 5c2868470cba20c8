"""A world that turns strange at known steps, and guards of who acts in it."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from ood import (
    Guard,
    Mahalanobis,
    Monitor,
    Spike,
    Threshold,
    record_episodes,
)

HORIZON = 12
NAN = float("nan")


class Drift(gym.Env):
    """Observations are noise plus what `strange` says of the step; the action is written down."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, strange: dict[int, Any] | None = None, horizon: int = HORIZON) -> None:
        self.strange, self.horizon = strange or {}, horizon

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count, self.done = 0, []
        return self._observe(), {"start": True}

    def step(self, action):
        self.step_count += 1
        self.done.append(np.array(action))
        end = self.step_count >= self.horizon
        return self._observe(), float(action[0]), False, end, {"n": self.step_count}

    def _observe(self):
        return self.np_random.standard_normal(3) + self.strange.get(self.step_count, 0.0)


ACTION = np.array([0.5, -0.5], np.float32)


def act(observation):
    return ACTION


def monitor(threshold: Threshold | None = None, statistic=None) -> Monitor:
    detector = Mahalanobis().fit(
        torch.cat(record_episodes(Drift(), act, 100, "observation", seed=0))
    )
    return Monitor(detector, statistic or Spike(), threshold or Threshold(8.0))


def run(guard, steps=HORIZON, seed=1):
    _, info = guard.reset(seed=seed)
    infos = [info["guard"]]
    for _ in range(steps):
        *_, info = guard.step(ACTION)
        infos.append(info["guard"])
    return infos


def guarded(strange=None, *, rules=None, watch=None, **kwargs) -> Guard:
    env = Drift(strange, **kwargs)
    return Guard(env, watch or monitor(), "observation", rules)


def acting(infos):
    return [info["acting"] for info in infos]
