"""Vector environments of a task: EnvPool's where it can run it, else Gymnasium's."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from experiments.envs.tasks import Task, make_env, simulator_state
from rewardmodels.errors import InvalidInput, RewardModelsError, UnknownName

MAX_SEED = 2**31 - 10_001  # EnvPool's are 32 bits, and each copy of an environment has its own

Backend = Literal["auto", "gymnasium", "envpool"]
FloatArray = NDArray[np.float32]


def make_vec_env(
    task: Task, n_envs: int, seed: int, backend: Backend = "auto", *, threads: int | None = None
) -> TaskVecEnv:
    """Make copies of a task that step together, with Stable-Baselines3's `VecEnv` interface.

    All copies start together and every episode is as long, so all end at the same step; PPO
    learned HalfCheetah no worse for it (one seed). Observations are float32, whatever the
    simulator's precision. EnvPool's infos hold only what an episode's end needs,
    `terminal_observation` and `TimeLimit.truncated`.

    Args:
        task: From `TASKS` or `find_task`.
        n_envs: Number of copies.
        seed: Copy `i` starts from `seed + i`, and each later episode of Gymnasium's from a seed
            derived from that. The backends draw different initial states.
        backend: `"auto"` takes EnvPool where it is installed and can hold the task's horizon.
            Gymnasium's copies step one after the other in this process: on two cores that was
            2.6 times as fast as Stable-Baselines3's `SubprocVecEnv`.
        threads: EnvPool's worker threads; None takes every core this process may use.

    Raises:
        UnknownName: If there is no such backend.
        InvalidInput: If `n_envs` is less than 1, or EnvPool is asked for where it isn't
            installed or can't hold the task's horizon.
    """
    if n_envs < 1:
        raise InvalidInput(f"n_envs: expected at least 1, got {n_envs}.")
    if backend not in ("auto", "gymnasium", "envpool"):
        raise UnknownName("backend", backend, ["auto", "gymnasium", "envpool"])
    obstacle = _why_no_envpool(task)
    if backend == "envpool" and obstacle:
        raise InvalidInput(
            f"backend: expected one that can run {task.name}, got 'envpool': "
            f"{obstacle}. Pass backend='gymnasium'."
        )
    if backend == "gymnasium" or obstacle:
        return GymnasiumVecEnv(task, n_envs, seed)
    return EnvPoolVecEnv(task, n_envs, seed, threads)


def _why_no_envpool(task: Task) -> str:
    if find_spec("envpool") is None:
        return "it isn't installed (pip install 'rewardmodels[fast]')"
    if task.ends_early:
        return "there the environment's own termination can't be switched off"
    import envpool

    if task.env_id not in envpool.list_all_envs():
        return f"it doesn't know {task.env_id}"
    unknown = set(task.kwargs) - set(envpool.make_spec(task.env_id)._config_keys)
    return f"there {task.env_id} has no setting {', '.join(sorted(unknown))}" if unknown else ""


class SeededEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Environment whose episodes are seeded by their number, so that each can be begun again.

    Attributes:
        first_seed: Seed of the first episode; later ones' are derived from it.
        episodes: Number of episodes begun since that seed was set.
    """

    first_seed, episodes = 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.first_seed, self.episodes = seed, 0
        seed = self.first_seed
        if self.episodes:
            draw = np.random.SeedSequence([self.first_seed, self.episodes])
            seed = int(draw.generate_state(1)[0])
        self.episodes += 1
        return self.env.reset(seed=seed, options=options)


class GymnasiumVecEnv(DummyVecEnv):
    """Gymnasium's environments, stepped one after the other."""

    def __init__(self, task: Task, n_envs: int, seed: int) -> None:
        super().__init__([lambda: SeededEpisodes(make_env(task)) for _ in range(n_envs)])
        self.task = task
        self.observation_space = _in_float32(self.observation_space)
        self.seed(seed)

    def reset(self) -> FloatArray:
        return np.asarray(super().reset(), self.observation_space.dtype)

    def step_wait(self) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], list[dict[str, Any]]]:
        observations, rewards, dones, infos = super().step_wait()
        dtype, name = self.observation_space.dtype, "terminal_observation"
        for i in np.flatnonzero(dones):
            infos[i][name] = np.asarray(infos[i][name], dtype)
        return np.asarray(observations, dtype), rewards, dones, infos

    def episodes(self) -> list[int]:
        """Return the number of episodes that each copy has begun."""
        return [env.episodes for env in self.envs]  # type: ignore[attr-defined]

    def resume(self, episodes: Sequence[int], actions: Sequence[NDArray[Any]]) -> None:
        """Go on from where another process was, by repeating the current episodes.

        That is exact for environments that draw only from the generator that `reset` seeds.

        Args:
            episodes: As `episodes()` returned it there.
            actions: Of each copy, those since its episode began, `(T, *act)`.
        """
        for env, seed, begun, taken in zip(self.envs, self._seeds, episodes, actions, strict=True):
            env.first_seed, env.episodes = seed, begun - 1  # type: ignore[attr-defined]
            env.reset()
            for action in taken:
                env.step(action)
        self._reset_seeds()

    def states(self) -> FloatArray | None:
        """Return the simulators' states at the current observation, as `render_states` takes them.

        Returns:
            `(n_envs, s)`, or None if the environment shows neither `qpos` nor `state`.
        """
        states = [simulator_state(env.unwrapped) for env in self.envs]
        return None if any(s is None for s in states) else np.array(states, np.float32)


class EnvPoolVecEnv(VecEnv):
    """EnvPool's environments, with Stable-Baselines3's way of starting the next episode.

    EnvPool gives an episode's last observation and, to whatever action comes next, the new
    episode's first; Stable-Baselines3 wants both at once. So those that ended are reset here.
    """

    def __init__(self, task: Task, n_envs: int, seed: int, threads: int | None = None) -> None:
        model = make_env(task)
        super().__init__(n_envs, _in_float32(model.observation_space), model.action_space)
        self.task = task
        self._model = model.unwrapped
        self._threads = threads or _cores()
        self._ids = np.arange(n_envs, dtype=np.int32)
        # Handed out at every step but an episode's last: 64 new dicts cost more than a copy.
        self._nothing: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        self._pool: Any = None
        self._positions: dict[str, NDArray[np.float64]] = {}
        self._observations: FloatArray | None = None
        self._episodes = 0
        self.seed(seed)

    def reset(self) -> FloatArray:
        """Reset all episodes; after `seed`, from the seed."""
        if self._pool is None or self._seeds[0] is not None:
            self._pool, self._episodes = self._make_pool(), 0
            self._reset_seeds()
        self._episodes += 1
        observations, info = self._pool.reset()
        self._positions = {k: info[k] for k in ("x_position", "y_position") if k in info}
        self._observations = self.task.observed(observations.astype(np.float32))
        return self._observations.copy()

    def _make_pool(self) -> Any:
        import envpool

        pool = envpool.make(
            self.task.env_id, env_type="gymnasium", num_envs=self.num_envs,
            num_threads=min(self._threads, self.num_envs), seed=self._seeds[0] or 0,
            max_episode_steps=self.task.horizon, **self.task.kwargs,
        )  # fmt: skip
        with warnings.catch_warnings():
            # EnvPool makes its spaces when first asked, with bounds in float64 for float32.
            warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)
            _ = pool.observation_space, pool.action_space
        return pool

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = actions
        self._pool.send(actions, self._ids)

    def step_wait(self) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], list[dict[str, Any]]]:
        """Finish the step; where an episode ended, with the next one's first observation."""
        observations, rewards, terminated, truncated, info = self._pool.recv()
        observations = self.task.observed(observations.astype(np.float32))
        if self.task.reward is not None:
            rewards = self.task.reward(observations, self._actions)
        dones = terminated | truncated
        self._positions = {k: info[k] for k in self._positions}
        infos = self._nothing
        if dones.any():
            ended = self._ids[dones]
            infos = [{} for _ in self._ids]
            for i in ended:
                infos[i]["terminal_observation"] = observations[i].copy()
                infos[i]["TimeLimit.truncated"] = True
            first, info = self._pool.reset(ended)
            self._episodes += 1  # of every copy: all episodes are as long
            observations[info["env_id"]] = self.task.observed(first)
            for name, position in self._positions.items():
                position[info["env_id"]] = info[name]
        self._observations = observations
        return observations.copy(), rewards, dones, infos

    def episodes(self) -> list[int]:
        """Return the number of episodes that each copy has begun."""
        return [self._episodes] * self.num_envs

    def resume(self, episodes: Sequence[int], actions: Sequence[NDArray[Any]]) -> None:
        """Go on from where another process was; see `GymnasiumVecEnv.resume`.

        EnvPool's generators can't be set, so all resets are repeated too.
        """
        for _ in range(max(episodes)):
            self.reset()
        for action in np.stack(actions, 1):
            self.step(action)

    def states(self) -> FloatArray | None:
        """Rebuild the simulators' states `(n_envs, s)`, or None if observations don't hold them.

        From what the observation says and the position that it leaves out: velocities are as
        clipped as the observation's (at ±10 for Hopper and Walker2d).

        Raises:
            RewardModelsError: If the environments haven't been reset yet.
        """
        o = self._observations
        if o is None:
            raise RewardModelsError("states: expected running environments; call reset() first.")
        family = self.task.env_id.rpartition("-v")[0]
        if family == "Pendulum":
            return np.stack([np.arctan2(o[:, 1], o[:, 0]), o[:, 2]], 1)
        if family == "Reacher":
            angles = np.arctan2(o[:, 2:4], o[:, 0:2])
            return np.concatenate([angles, o[:, 4:8], np.zeros_like(angles)], 1)
        if family in ("HalfCheetah", "Hopper", "Walker2d", "Swimmer", "Ant"):
            model = self._model.model  # type: ignore[attr-defined]
            left_out = np.stack(list(self._positions.values()), 1).astype(np.float32)
            rest = model.nq + model.nv - left_out.shape[1]
            return np.concatenate([left_out, o[:, :rest]], 1)
        return None

    def close(self) -> None:
        self._pool = None

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None for _ in self._get_indices(indices)]
        raise AttributeError(f"EnvPool's environments have no attribute {attr_name!r} to show.")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"EnvPool's environments have no attribute {attr_name!r} to set.")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kw: Any) -> list[Any]:
        raise AttributeError(f"EnvPool's environments have no method {method_name!r} to call.")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


TaskVecEnv = GymnasiumVecEnv | EnvPoolVecEnv


def _in_float32(space: gym.Space[Any]) -> gym.Space[Any]:
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        return space
    return Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)


def _cores() -> int:
    # A job on a shared machine may be given fewer cores than there are.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
