"""Tasks: Gymnasium environments whose episodes all have the same length.

An episode that ends when the agent falls reveals the reward by its length, so early termination is
switched off everywhere, and every end is a truncation. A new task is a line in `TASKS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import DtypeObservation, FlattenObservation
from numpy.typing import NDArray

from experiments.envs.backflip import Floats, backflips, observe, progress
from experiments.registry import import_named
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


def find_task(name: str, horizon: int | None = None) -> Task:
    """Return the task of that name, or one made of a Gymnasium id.

    Args:
        name: In `TASKS`, a registered id, or an id after the module that registers it, as
            `gymnasium.make` takes it: "my_package:MyEnv-v0".
        horizon: Steps in every episode; None for the task's own, or the id's time limit.

    Raises:
        UnknownName: If it is neither a task nor a Gymnasium id.
        InvalidInput: If the module can't be imported, or there is neither a horizon nor a time
            limit (`max_episode_steps`).

    Example:
        >>> find_task("Hopper").horizon
        1000
        >>> find_task("CartPole-v1").horizon
        500
        >>> find_task("gymnasium.envs:CartPole-v1", horizon=50).horizon
        50
    """
    if name in TASKS:
        return TASKS[name] if horizon is None else replace(TASKS[name], horizon=horizon)
    module, _, env_id = name.rpartition(":")
    if module:
        import_named("task", module)
    if env_id not in gym.registry:
        # Gymnasium knows hundreds of ids: only those that look alike are worth listing.
        raise UnknownName("task", name, [*TASKS, *difflib.get_close_matches(env_id, gym.registry)])
    if horizon is None:
        horizon = gym.registry[env_id].max_episode_steps
    if horizon is None:
        raise InvalidInput(
            f"horizon: expected the steps of an episode, since {name!r} was registered without "
            "max_episode_steps, got none. Pass --horizon, or register it with a limit."
        )
    return Task(name, env_id, horizon, ends_early=True)


class FixedHorizon(gym.Wrapper[Any, Any, Any, Any]):
    """Environment that goes on past termination, so that only a time limit ends an episode.

    Raises:
        InvalidInput: In `step`, if the environment ends an episode before the horizon by a time
            limit of its own, or can't go on past its termination.
    """

    def __init__(self, env: gym.Env[Any, Any], task: Task) -> None:
        super().__init__(env)
        self.task, self.steps, self.terminated = task, 0, False

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self.steps, self.terminated = 0, False
        return self.env.reset(**options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            if not self.terminated:
                raise
            raise InvalidInput(
                f"task: expected an environment that goes on past its termination, got "
                f"{self.task.name}, which raises {type(error).__name__}: {error}. Let it repeat "
                "its last observation until the time limit."
            ) from error
        self.steps += 1
        self.terminated |= terminated
        if truncated and self.steps < self.task.horizon:
            raise InvalidInput(
                f"horizon: expected at most the {self.steps} steps after which {self.task.name} "
                f"itself ends an episode, got {self.task.horizon}. Pass --horizon {self.steps}."
            )
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
    """Make a Gymnasium environment whose episodes last `task.horizon` steps.

    Its observations are a box: a discrete one is one-hot, a dictionary or a tuple is flattened, and
    whole numbers other than an image's are in single precision.

    Raises:
        InvalidInput: If Gymnasium can't make it, or its observations can't be a box.
    """
    try:
        env: gym.Env[Any, Any] = gym.make(
            task.env_id,
            **({} if render_mode is None else {"render_mode": render_mode}),
            max_episode_steps=task.horizon,
            disable_env_checker=True,  # it looks at every reset and step of every copy
            **task.kwargs,
        )
    except Exception as error:  # an environment of the user's own may raise anything
        raise InvalidInput(
            f"task: expected an environment that can be made here, got {task.name}: "
            f"{type(error).__name__}: {error}"
        ) from error
    env = FixedHorizon(env, task)
    env = TaskWrapper(env, task) if task.observe or task.reward else env
    if not isinstance(env.observation_space, Box):
        if not env.observation_space.is_np_flattenable:
            raise InvalidInput(
                f"task: expected observations that are numbers, got {task.name} with "
                f"{env.observation_space}. Wrap it so that they are a gymnasium.spaces.Box."
            )
        env = FlattenObservation(env)
    if env.observation_space.dtype == np.uint8 or np.issubdtype(
        env.observation_space.dtype, np.floating
    ):
        return env
    return DtypeObservation(env, np.float32)


def check_env(task: Task) -> None:
    """Raise InvalidInput unless a whole episode of random actions can be played."""
    with make_env(task) as env:
        env.action_space.seed(0)
        try:
            observations = [env.reset(seed=0)[0]]
            for _ in range(task.horizon):
                observation, reward, *_ = env.step(env.action_space.sample())
                observations.append(observation)
                float(reward)
            if shapes := {np.shape(x) for x in observations} - {env.observation_space.shape}:
                raise ValueError(f"observations of shape {shapes}")
        except InvalidInput:
            raise
        except Exception as error:  # an environment of the user's own may raise anything
            raise InvalidInput(
                f"task: expected an environment with Gymnasium's interface, got {task.name}: "
                f"{type(error).__name__}: {error}. gymnasium.utils.env_checker.check_env says more."
            ) from error


def has_mujoco_state(simulator: Any) -> bool:
    """Return whether an environment has the state of Gymnasium's MuJoCo environments."""
    return hasattr(simulator, "set_state") and hasattr(simulator, "data")


def simulator_state(simulator: Any) -> NDArray[np.float64] | None:
    """Return `qpos` and `qvel` of a MuJoCo environment, a numeric `state` of another, or None."""
    if has_mujoco_state(simulator):
        return np.concatenate([simulator.data.qpos, simulator.data.qvel])
    try:
        state = np.array(getattr(simulator, "state", None), float)
    except (TypeError, ValueError):
        return None
    return None if np.isnan(state).any() or state.size == 0 else state.reshape(-1)
