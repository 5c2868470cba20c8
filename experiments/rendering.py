"""Pictures of simulator states, drawn off screen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.tasks import Task, make_env, simulator_state
from rewardmodels.errors import InvalidInput, RewardModelsError


class RenderingUnavailable(RewardModelsError, RuntimeError):
    """This machine or environment can't draw pictures; the message says what to install."""


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
        now = simulator_state(simulator)
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
