"""Tasks: Gymnasium environments whose episodes all have the same length.

An episode that ends when the agent falls reveals the reward by its length, so early termination is
switched off everywhere, and every end is a truncation. A new task is a line in `TASKS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from experiments.envs.backflip import Floats, backflips, observe, progress
from rewardmodels.errors import InvalidInput, UnknownName


@dataclass(frozen=True)
class Task:
    """An environment with a fixed horizon.

    Args:
        name: In `TASKS`.
        env_id: Gymnasium id.
        horizon: Steps in every episode.
        kwargs: Further arguments of `gymnasium.make`.
        ends_early: True if the environment may terminate and has no flag against it, so that
            `FixedHorizon` has to go on, which EnvPool can't.
        reward: Maps observations after the actions, `(B, *obs)`, and actions to rewards `(B,)`, in
            place of the environment's own.
        observe: Maps the environment's own observations, `(..., *obs)`, to those of policies and
            predictors.
        counts: Events that a policy is judged by, by name: maps an episode's observations
            `(T, *obs)` to a number.

    Raises:
        InvalidInput: If `horizon` is less than 1.
    """

    name: str
    env_id: str
    horizon: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    ends_early: bool = False
    reward: Callable[[Floats, Floats], Floats] | None = None
    observe: Callable[[Floats], Floats] | None = None
    counts: Mapping[str, Callable[[Floats], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise InvalidInput(f"horizon: expected at least 1 step, got {self.horizon}.")

    def observed(self, observations: Floats) -> Floats:
        """Map the environment's own observations, `(..., *obs)`, to those of the agent."""
        return observations if self.observe is None else self.observe(observations)


_NO_TERMINATION = {"terminate_when_unhealthy": False}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("HalfCheetah", "HalfCheetah-v5", 1000),
        Task("Hopper", "Hopper-v5", 1000, _NO_TERMINATION),
        Task("Walker2d", "Walker2d-v5", 1000, _NO_TERMINATION),
        Task("Ant", "Ant-v5", 1000, _NO_TERMINATION),
        Task("Swimmer", "Swimmer-v5", 1000),
        Task("Reacher", "Reacher-v5", 50),
        Task("Pendulum", "Pendulum-v1", 200),
        # Its reward is 1 while the pole is within 0.2 rad of upright and 0 otherwise, so past
        # its termination the return counts the steps for which the pole was up. A pole that fell
        # can't be swung up again: of 1,000 steps 985 taught nothing, and after 106,496 steps of PPO
        # the pole stood for 12; of 100 steps it stood for all.
        Task("InvertedPendulum", "InvertedPendulum-v5", 100, ends_early=True),
        Task(
            "backflip",
            "Hopper-v5",
            1000,
            _NO_TERMINATION,
            reward=progress,
            observe=observe,
            counts={"backflips": backflips},
        ),
    )
}


def find_task(name: str) -> Task:
    """Return the task of that name, or one made of a Gymnasium id with a time limit.

    Raises:
        UnknownName: If it is neither a task nor a Gymnasium id.
        InvalidInput: If the id was registered without `max_episode_steps`, so has no horizon.

    Example:
        >>> find_task("Hopper").horizon
        1000
        >>> find_task("CartPole-v1").horizon
        500
    """
    if name in TASKS:
        return TASKS[name]
    if name not in gym.registry:
        # Gymnasium knows hundreds of ids: only those that look alike are worth listing.
        raise UnknownName("task", name, [*TASKS, *difflib.get_close_matches(name, gym.registry)])
    horizon = gym.registry[name].max_episode_steps
    if horizon is None:
        raise InvalidInput(
            f"task: expected an environment with a time limit, got {name!r}, which was registered "
            "without max_episode_steps. Register it with one, or make a Task with a horizon."
        )
    return Task(name, name, horizon, ends_early=True)


class FixedHorizon(gym.Wrapper[Any, Any, Any, Any]):
    """Environment that goes on past termination, so that only a time limit ends an episode."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, _, truncated, info = self.env.step(action)
        return observation, reward, False, truncated, info


class TaskWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """Environment with a task's own observations and reward."""

    def __init__(self, env: gym.Env[Any, Any], task: Task) -> None:
        super().__init__(env)
        self.task = task
        space = env.observation_space
        if task.observe is not None and isinstance(space, Box):
            example = task.observe(np.zeros(space.shape, space.dtype))
            self.observation_space = Box(-np.inf, np.inf, example.shape, example.dtype.type)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        return self.task.observed(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        observation = self.task.observed(observation)
        if self.task.reward is not None:
            reward = float(self.task.reward(observation[None], np.asarray(action)[None])[0])
        return observation, reward, terminated, truncated, info


def make_env(task: Task, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Make a Gymnasium environment whose episodes last `task.horizon` steps."""
    env: gym.Env[Any, Any] = gym.make(
        task.env_id,
        render_mode=render_mode,
        max_episode_steps=task.horizon,
        disable_env_checker=True,  # it looks at every reset and step of every copy
        **task.kwargs,
    )
    env = FixedHorizon(env)
    return TaskWrapper(env, task) if task.observe or task.reward else env


def simulator_state(simulator: Any) -> NDArray[np.float64] | None:
    """Return `qpos` and `qvel` of a MuJoCo environment, `state` of a classic one, or None."""
    if hasattr(simulator, "set_state"):
        return np.concatenate([simulator.data.qpos, simulator.data.qvel])
    return np.array(simulator.state, float) if hasattr(simulator, "state") else None
