"""Pictures of simulator states, drawn off screen."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes.util import find_library
from importlib import import_module
from typing import Any, Self

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from experiments.envs.tasks import Task, make_env, simulator_state
from rewardmodels.errors import InvalidInput, RewardModelsError

_Draw = Callable[[NDArray[np.float64], NDArray[np.uint8]], None]
"""Draws a state into a picture."""


class RenderingUnavailable(RewardModelsError, RuntimeError):
    """This machine or environment can't draw pictures; the message says what to install."""


def render_states(
    task: Task, states: NDArray[np.floating[Any]], width: int = 240, height: int = 240
) -> NDArray[np.uint8]:
    """Pictures of simulator states, drawn off screen; many clips want a `Renderer`.

    Args:
        task: Whose states they are.
        states: `(T, s)`, each `qpos` and `qvel` (or, outside MuJoCo, `state`), as `states()`
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
    with Renderer(task, width, height) as renderer:
        return renderer.draw(states)


class Renderer:
    """Draws states of a task, clip after clip, with one environment and one OpenGL context.

    MuJoCo's bodies are seen by the model's camera `track`, which moves along with them, and
    without shadows and reflections, which take nine tenths of the time where no GPU draws. Any
    other environment with `rgb_array` and a `state` that can be set draws its own pictures.

    It belongs to the thread that made it, as OpenGL has it.

    Args:
        task: Whose states are drawn.
        width: Of a picture, in pixels.
        height: Of a picture, in pixels.
        smooth: Whether MuJoCo's edges are smoothed, which takes more than half of the time where
            no GPU draws.

    Raises:
        RenderingUnavailable: If no OpenGL library (for MuJoCo) or no pygame (for classic
            control) is installed, or the environment's state can't be set.
    """

    def __init__(
        self, task: Task, width: int = 240, height: int = 240, *, smooth: bool = True
    ) -> None:
        self.task, self._size = task, (height, width)
        with ExitStack() as stack:
            env = stack.enter_context(make_env(task))
            env.reset(seed=0)
            now = simulator_state(env.unwrapped)
            if now is None:
                raise RenderingUnavailable(
                    f"task: expected an environment whose state can be set, got {task.name}, which "
                    "has neither set_state(qpos, qvel) nor state."
                )
            self._length = len(now)
            if hasattr(env.unwrapped, "set_state"):
                self._draw = stack.enter_context(
                    _mujoco_drawer(env.unwrapped, width, height, smooth)
                )
            else:
                self._draw = stack.enter_context(_own_drawer(task, width, height))
            self._open = stack.pop_all()

    def draw(self, states: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        """Pictures of states.

        Args:
            states: `(T, s)`, as of `render_states`.

        Returns:
            RGB, `(T, height, width, 3)`.

        Raises:
            InvalidInput: If `states` isn't `(T, s)` with the task's own `s`.
        """
        wanted = np.asarray(states, np.float64)
        if wanted.ndim != 2 or wanted.shape[1] != self._length:
            raise InvalidInput(
                f"states: expected shape (T, {self._length}) for {self.task.name}, got "
                f"{wanted.shape}."
            )
        frames = np.empty((len(wanted), *self._size, 3), np.uint8)
        for frame, state in zip(frames, wanted, strict=True):
            self._draw(state, frame)
        return frames

    def close(self) -> None:
        """Gives the environment and the context back; closing twice does no harm."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _mujoco_drawer(simulator: Any, width: int, height: int, smooth: bool) -> Iterator[_Draw]:
    import mujoco

    model, data = simulator.model, simulator.data
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    model.vis.quality.shadowsize = 0
    if not smooth:
        model.vis.quality.offsamples = 0
    camera = mujoco.MjvCamera()
    camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if camera.fixedcamid >= 0:
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
    else:
        mujoco.mjv_defaultFreeCamera(model, camera)
        camera.distance = model.stat.extent  # MuJoCo stands half as far again back
    whole = mujoco.MjrRect(0, 0, width, height)
    with _opengl(width, height):
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        scene = mujoco.MjvScene(model, maxgeom=1000)
        scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        everything = mujoco.MjvOption(), None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene
        drawn = np.empty((height, width, 3), np.uint8)

        def draw(state: NDArray[np.float64], frame: NDArray[np.uint8]) -> None:
            simulator.set_state(state[: model.nq], state[model.nq :])
            mujoco.mjv_updateScene(model, data, *everything)
            mujoco.mjr_render(whole, scene, context)
            mujoco.mjr_readPixels(drawn, None, whole, context)
            frame[:] = drawn[::-1]  # OpenGL counts rows from the bottom

        try:
            yield draw
        finally:
            context.free()


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


@contextmanager
def _own_drawer(task: Task, width: int, height: int) -> Iterator[_Draw]:
    try:
        env = make_env(task, render_mode="rgb_array")
        env.reset(seed=0)
        env.render()
    except gym.error.DependencyNotInstalled as error:
        raise RenderingUnavailable(
            f"task: expected an environment that can be drawn here, got {task.name}: {error}. "
            "For classic control: pip install pygame."
        ) from error
    with env:
        simulator: Any = env.unwrapped

        def draw(state: NDArray[np.float64], frame: NDArray[np.uint8]) -> None:
            simulator.state = state
            picture = np.asarray(env.render())
            # Environments draw in a size of their own, mostly above ours: nearest pixels will do.
            rows = np.arange(height) * picture.shape[0] // height
            columns = np.arange(width) * picture.shape[1] // width
            frame[:] = picture[np.ix_(rows, columns)]

        yield draw
