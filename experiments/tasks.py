"""The tasks of the studies: Gymnasium environments whose episodes all have the same length.

An episode that ends when the agent falls tells the agent, by its length, what the reward should be
learned for, so early termination is switched off everywhere. An episode's end then never depends
on what happened in it, and every end is a truncation.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rewardmodels.errors import InvalidInput, RewardModelsError, UnknownName

Backend = Literal["auto", "gymnasium", "envpool"]
FloatArray = NDArray[np.float32]


class RenderingUnavailable(RewardModelsError, RuntimeError):
    """This machine or environment can't draw pictures; the message says what to install."""


@dataclass(frozen=True)
class Task:
    """An environment with a fixed horizon.

    Args:
        name: What the studies call it.
        env_id: Its Gymnasium id.
        horizon: Steps in every episode.
        kwargs: What `gymnasium.make` is given besides.
        ends_early: Whether the environment may terminate by itself with no flag against it, so
            that `FixedHorizon` has to play on, which EnvPool can't.

    Raises:
        InvalidInput: If `horizon` is less than 1.
    """

    name: str
    env_id: str
    horizon: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    ends_early: bool = False

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise InvalidInput(f"horizon: expected at least 1 step, got {self.horizon}.")


_FALLEN_OR_NOT = {"terminate_when_unhealthy": False}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("HalfCheetah", "HalfCheetah-v5", 1000),
        Task("Hopper", "Hopper-v5", 1000, _FALLEN_OR_NOT),
        Task("Walker2d", "Walker2d-v5", 1000, _FALLEN_OR_NOT),
        Task("Ant", "Ant-v5", 1000, _FALLEN_OR_NOT),
        Task("Swimmer", "Swimmer-v5", 1000),
        Task("Reacher", "Reacher-v5", 50),
        Task("Pendulum", "Pendulum-v1", 200),
        # Its reward is 1 while the pole is within 0.2 rad of upright and 0 otherwise, so past
        # its termination the return counts the steps for which the pole was up.
        Task("InvertedPendulum", "InvertedPendulum-v5", 1000, ends_early=True),
    )
}


def find_task(name: str) -> Task:
    """The task of that name, or one made of any registered Gymnasium id with a time limit.

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
    """Plays on past termination, so that only a time limit inside it ends an episode."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As `gymnasium.Env.step`, with `terminated` always False."""
        observation, reward, _, truncated, info = self.env.step(action)
        return observation, reward, False, truncated, info


def make_env(task: Task, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """One Gymnasium environment whose every episode lasts `task.horizon` steps."""
    env: gym.Env[Any, Any] = gym.make(
        task.env_id,
        render_mode=render_mode,
        max_episode_steps=task.horizon,
        disable_env_checker=True,  # it looks at every reset and step of every copy
        **task.kwargs,
    )
    return FixedHorizon(env)


def make_vec_env(
    task: Task, n_envs: int, seed: int, backend: Backend = "auto", *, threads: int | None = None
) -> TaskVecEnv:
    """Copies of a task that step together, under Stable-Baselines3's `VecEnv` interface.

    All copies start together and every episode is as long, so all end at the same step; PPO
    learned HalfCheetah no worse for it (one seed). Observations are float32, whatever the
    simulator's precision. EnvPool's infos hold only what an episode's end needs,
    `terminal_observation` and `TimeLimit.truncated`.

    Args:
        task: From `TASKS` or `find_task`.
        n_envs: How many copies.
        seed: Copy `i` starts from `seed + i`. The backends draw different initial states.
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


class GymnasiumVecEnv(DummyVecEnv):
    """Gymnasium's own environments, one after the other, for a task that EnvPool can't run."""

    def __init__(self, task: Task, n_envs: int, seed: int) -> None:
        super().__init__([lambda: make_env(task) for _ in range(n_envs)])
        self.task = task
        self.observation_space = _in_float32(self.observation_space)
        self.seed(seed)

    def reset(self) -> FloatArray:
        return np.asarray(super().reset(), self.observation_space.dtype)

    def step_wait(self) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], list[dict[str, Any]]]:
        observations, rewards, dones, infos = super().step_wait()
        dtype = self.observation_space.dtype
        for i in np.flatnonzero(dones):
            last = infos[i]["terminal_observation"]
            infos[i]["terminal_observation"] = np.asarray(last, dtype)
        return np.asarray(observations, dtype), rewards, dones, infos

    def states(self) -> FloatArray | None:
        """The simulators' states at the current observation, as `render_states` takes them.

        Returns:
            `(n_envs, s)`, or None if the environment shows neither `qpos` nor `state`.
        """
        states = [_state(env.unwrapped) for env in self.envs]
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
        self.seed(seed)

    def reset(self) -> FloatArray:
        """Starts every episode anew; after `seed`, from the seed."""
        if self._pool is None or self._seeds[0] is not None:
            self._pool = self._make_pool()
            self._reset_seeds()
        observations, info = self._pool.reset()
        self._positions = {k: info[k] for k in ("x_position", "y_position") if k in info}
        self._observations = observations.astype(np.float32)
        return self._observations.copy()

    def _make_pool(self) -> Any:
        import envpool

        pool = envpool.make(
            self.task.env_id,
            env_type="gymnasium",
            num_envs=self.num_envs,
            num_threads=min(self._threads, self.num_envs),
            seed=self._seeds[0] or 0,
            max_episode_steps=self.task.horizon,
            **self.task.kwargs,
        )
        with warnings.catch_warnings():
            # EnvPool makes its spaces when first asked, with bounds in float64 for float32.
            warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)
            _ = pool.observation_space, pool.action_space
        return pool

    def step_async(self, actions: NDArray[Any]) -> None:
        """Sets the worker threads going."""
        self._pool.send(actions, self._ids)

    def step_wait(self) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], list[dict[str, Any]]]:
        """The step's outcome; where an episode ended, with the next one's first observation."""
        observations, rewards, terminated, truncated, info = self._pool.recv()
        observations = observations.astype(np.float32)
        dones = terminated | truncated
        self._positions = {k: info[k] for k in self._positions}
        infos = self._nothing
        if dones.any():
            ended = self._ids[dones]
            infos = [{} for _ in self._ids]
            for i in ended:
                last = observations[i].copy()
                infos[i] = {"terminal_observation": last, "TimeLimit.truncated": True}
            first, info = self._pool.reset(ended)
            observations[info["env_id"]] = first
            for name, position in self._positions.items():
                position[info["env_id"]] = info[name]
        self._observations = observations
        return observations.copy(), rewards, dones, infos

    def states(self) -> FloatArray | None:
        """The simulators' states at the current observation, as `render_states` takes them.

        Rebuilt from what the observation says and the position that it leaves out. Velocities
        are as clipped as the observation's (at ±10 for Hopper and Walker2d).

        Returns:
            `(n_envs, s)`, or None if the observation doesn't hold the state.

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
        """Stops the worker threads."""
        self._pool = None

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The task's own settings; EnvPool's environments have no Python attributes."""
        if attr_name == "render_mode":
            return [None for _ in self._get_indices(indices)]
        raise AttributeError(f"EnvPool's environments have no attribute {attr_name!r} to show.")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not possible."""
        raise AttributeError(f"EnvPool's environments have no attribute {attr_name!r} to set.")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kw: Any) -> list[Any]:
        """Not possible."""
        raise AttributeError(f"EnvPool's environments have no method {method_name!r} to call.")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Never."""
        return [False for _ in self._get_indices(indices)]


TaskVecEnv = GymnasiumVecEnv | EnvPoolVecEnv


def _in_float32(space: gym.Space[Any]) -> gym.Space[Any]:
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        return space
    return Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)


def _cores() -> int:
    # A job on a shared machine may be given fewer cores than there are.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _state(simulator: Any) -> NDArray[np.float64] | None:
    if hasattr(simulator, "set_state"):
        return np.concatenate([simulator.data.qpos, simulator.data.qvel])
    return np.array(simulator.state, float) if hasattr(simulator, "state") else None


def render_states(
    task: Task, states: NDArray[np.floating[Any]], width: int = 240, height: int = 240
) -> NDArray[np.uint8]:
    """Pictures of simulator states, drawn off screen.

    MuJoCo's bodies are seen by the model's camera `track`, which moves along with them, and
    without shadows and reflections, which take nine tenths of the time where no GPU draws.

    Args:
        task: Whose states they are.
        states: `(T, s)`, each `qpos` and `qvel` (or, in classic control, `state`), as `states()`
            of either backend gives them.
        width: Of a picture, in pixels.
        height: Of a picture, in pixels.

    Returns:
        RGB, `(T, height, width, 3)`.

    Raises:
        InvalidInput: If `states` isn't `(T, s)` with the task's own `s`.
        RenderingUnavailable: If no OpenGL library (for MuJoCo) or no pygame (for classic
            control) is installed, or the environment's state can't be set.
    """
    with make_env(task) as env:
        env.reset(seed=0)
        simulator: Any = env.unwrapped
        now = _state(simulator)
        if now is None:
            raise RenderingUnavailable(
                f"task: expected an environment whose state can be set, got {task.name}, which "
                "has neither set_state(qpos, qvel) nor state."
            )
        wanted = np.asarray(states, np.float64)
        if wanted.ndim != 2 or wanted.shape[1] != len(now):
            raise InvalidInput(
                f"states: expected shape (T, {len(now)}) for {task.name}, got {wanted.shape}."
            )
        if hasattr(simulator, "set_state"):
            return _draw_mujoco(simulator, wanted, width, height)
    return _draw_classic(task, wanted, width, height)


def _draw_mujoco(
    simulator: Any, states: NDArray[np.float64], width: int, height: int
) -> NDArray[np.uint8]:
    import mujoco

    model, data = simulator.model, simulator.data
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    model.vis.quality.shadowsize = 0
    camera = mujoco.MjvCamera()
    camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if camera.fixedcamid >= 0:
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
    else:
        mujoco.mjv_defaultFreeCamera(model, camera)
        camera.distance = model.stat.extent  # MuJoCo stands half as far again back
    frames = np.empty((len(states), height, width, 3), np.uint8)
    whole = mujoco.MjrRect(0, 0, width, height)
    with _opengl(width, height):
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        scene = mujoco.MjvScene(model, maxgeom=1000)
        scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        everything = mujoco.MjvOption(), None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene
        for frame, state in zip(frames, states, strict=True):
            simulator.set_state(state[: model.nq], state[model.nq :])
            mujoco.mjv_updateScene(model, data, *everything)
            mujoco.mjr_render(whole, scene, context)
            mujoco.mjr_readPixels(frame, None, whole, context)
        context.free()
    return frames[:, ::-1]  # OpenGL counts rows from the bottom


@contextmanager
def _opengl(width: int, height: int) -> Iterator[None]:
    """A current OpenGL context of MUJOCO_GL's kind; where that is unset, of one that works."""
    kind = os.environ.get("MUJOCO_GL", "").lower()
    if not kind and sys.platform == "linux":
        # MuJoCo's own choice, GLFW, wants a screen. PyOpenGL can be told only once which library
        # to load, so trying EGL and then OSMesa isn't open to us: look first.
        kind = "egl" if find_library("EGL") else "osmesa"
    try:
        module = import_module(f"mujoco.{kind or 'gl_context'}")
        context = module.GLContext(width, height)
        context.make_current()
    except Exception as error:  # each library fails in its own way, AttributeError among them
        raise RenderingUnavailable(
            "MUJOCO_GL: expected an OpenGL library that draws off screen, got "
            f"{kind or 'none'!r}, which fails with {type(error).__name__}: {error}. On Debian and "
            "Ubuntu: apt-get install libegl1 libgl1-mesa-dri, or apt-get install libosmesa6 and "
            "set MUJOCO_GL=osmesa."
        ) from error
    try:
        yield
    finally:
        context.free()


def _draw_classic(
    task: Task, states: NDArray[np.float64], width: int, height: int
) -> NDArray[np.uint8]:
    if find_spec("pygame") is None:
        raise RenderingUnavailable(
            f"task: expected an environment that can be drawn here, got {task.name}, which needs "
            "pygame: pip install 'gymnasium[classic-control]'."
        )
    frames = np.empty((len(states), height, width, 3), np.uint8)
    with make_env(task, render_mode="rgb_array") as env:
        env.reset(seed=0)
        simulator: Any = env.unwrapped
        for frame, state in zip(frames, states, strict=True):
            simulator.state = state
            picture = np.asarray(env.render())
            # Classic control draws in one size only, far above ours: nearest pixels will do.
            rows = np.arange(height) * picture.shape[0] // height
            columns = np.arange(width) * picture.shape[1] // width
            frame[:] = picture[np.ix_(rows, columns)]
    return frames
