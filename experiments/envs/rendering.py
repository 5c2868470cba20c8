"""Rendering: pictures of simulator states, drawn off screen, and video files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes.util import find_library
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, Self, cast

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from experiments.envs.tasks import Task, has_mujoco_state, make_env, simulator_state
from rewardmodels.errors import InvalidInput, RewardModelsError
from rewardmodels.saving import atomic_path

# H.264 plays everywhere; the others are for builds of PyAV without libx264.
_CODECS = ("libx264", "libopenh264", "libvpx-vp9")
# Simulated bodies move fast over fine checkerboards; much above 23 the squares smear.
_CRF = "20"
_BT709 = 1  # in ITU-T H.273, the code of both its primaries and its transfer function

_Draw = Callable[[NDArray[np.float64], NDArray[np.uint8]], None]
"""Draws a state into a picture."""


class RenderingUnavailable(RewardModelsError, RuntimeError):
    """Pictures can't be rendered here; the message says what to install."""


def render_states(
    task: Task, states: NDArray[np.floating[Any]], width: int = 240, height: int = 240
) -> NDArray[np.uint8]:
    """Render simulator states once; see `Renderer` and its `draw`."""
    with Renderer(task, width, height) as renderer:
        return renderer.draw(states)


def check_renderable(task: Task) -> None:
    """Raise RenderingUnavailable unless people can be shown clips of a task.

    They are drawn from its states, or are its observations, if those are pictures in RGB.
    """
    with make_env(task) as env:
        space = env.observation_space
    if space.dtype != np.uint8 or (space.shape or ())[2:] != (3,):
        Renderer(task, 64, 64, smooth=False).close()


class Renderer:
    """Renderer of a task's states, with one environment and one OpenGL context.

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
                    "has neither set_state(qpos, qvel) nor a numeric state."
                )
            self._length = len(now)
            if has_mujoco_state(env.unwrapped):
                drawer = _mujoco_drawer(env.unwrapped, width, height, smooth)
            else:
                drawer = _own_drawer(task, width, height)
            self._draw = stack.enter_context(drawer)
            self._open = stack.pop_all()

    def draw(self, states: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        """Render states.

        Args:
            states: `(T, s)`, each `qpos` and `qvel` (or, outside MuJoCo, `state`), as `states()`
                of either backend gives them.

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
        """Close the environment and the context; closing twice does no harm."""
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
    """Make an OpenGL context of MUJOCO_GL's kind current; if that is unset, one that works."""
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
        simulator: Any = env.unwrapped

        def picture(state: NDArray[np.float64]) -> NDArray[Any]:
            like = np.asarray(simulator.state)
            whole = state.reshape(like.shape).astype(like.dtype)
            simulator.state = whole if whole.ndim else whole.item()
            drawn = np.asarray(env.render())
            if drawn.ndim != 3 or drawn.shape[2] != 3:
                raise ValueError(f"render() gives {drawn.dtype} of shape {drawn.shape}")
            return drawn

        env.reset(seed=0)
        env.action_space.seed(0)
        first = cast(NDArray[np.float64], simulator_state(simulator))
        before = picture(first).astype(float)
        for _ in range(min(10, task.horizon)):
            env.step(env.action_space.sample())
        last = picture(cast(NDArray[np.float64], simulator_state(simulator)))
        again = picture(first)
        if np.abs(again - before).sum() > np.abs(again - last.astype(float)).sum():
            raise ValueError("its picture doesn't follow its state")
    except Exception as error:  # an environment of the user's own may raise anything
        reason = " ".join(str(error).split())
        raise RenderingUnavailable(
            f"task: expected an environment that draws its state in render_mode='rgb_array', got "
            f"{task.name}: {reason}"
        ) from error
    with env:

        def draw(state: NDArray[np.float64], frame: NDArray[np.uint8]) -> None:
            drawn = picture(state)
            # Environments draw in a size and shape of their own, mostly above ours: nearest pixels
            # will do, with white around them.
            factor = max(drawn.shape[0] / height, drawn.shape[1] / width)
            sides = [max(1, round(side / factor)) for side in drawn.shape[:2]]
            rows, columns = (np.arange(n) * drawn.shape[i] // n for i, n in enumerate(sides))
            top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
            frame[:] = 255
            frame[top : top + sides[0], left : left + sides[1]] = drawn[np.ix_(rows, columns)]

        yield draw


def write_video(frames: NDArray[np.uint8], path: str | os.PathLike[str], fps: float) -> None:
    """Write frames to an MP4 file (H.264, 4:2:0, index in front so that it streams).

    The file appears under `path` only once it is whole. 4:2:0 video has even sides: an odd
    height or width gains one row or column, a copy of the last.

    Args:
        frames: Pictures in RGB, `(T, H, W, 3)`, uint8, T, H and W at least 1.
        path: Where to write; the suffix must be `.mp4`, the directory must exist.
        fps: Frames a second.

    Raises:
        InvalidInput: If the frames' shape or type, the suffix or `fps` can't be used.
        RewardModelsError: If this build of PyAV has none of the encoders in `_CODECS`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_video(np.zeros((5, 64, 64, 3), np.uint8), f"{folder}/black.mp4", fps=25)
        ...     with av.open(f"{folder}/black.mp4") as video:
        ...         print(video.streams.video[0].frames)
        5
    """
    path, frames = Path(path), np.asarray(frames)
    if path.suffix.lower() != ".mp4":
        raise InvalidInput(f"path: expected a name ending in .mp4, got {path.name!r}.")
    if not (np.isfinite(fps) and fps > 0):
        raise InvalidInput(f"fps: expected a positive number of frames a second, got {fps!r}.")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InvalidInput(
            f"frames: expected shape (T, H, W, 3) with no empty axis, got {frames.shape}."
        )
    if frames.dtype != np.uint8:
        raise InvalidInput(
            f"frames: expected uint8 from 0 to 255, got {frames.dtype}. "
            "Pictures from 0 to 1 want (255 * frames).round().astype(np.uint8)."
        )
    codec = next((codec for codec in _CODECS if codec in av.codecs_available), None)
    if codec is None:
        raise RewardModelsError(
            f"No video encoder: PyAV {av.__version__} has none of {', '.join(_CODECS)}. "
            "Install PyAV's own wheel with `pip install --only-binary av av`."
        )
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_path(path) as temporary:
        _encode(frames, temporary, codec, Fraction(fps).limit_denominator(1001))


def _encode(frames: NDArray[np.uint8], path: Path, codec: str, rate: Fraction) -> None:
    options = {} if codec == "libopenh264" else {"crf": _CRF}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream = cast(av.VideoStream, file.add_stream(codec, rate=rate, options=options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Untagged video is shown with whichever matrix the player guesses, and greens drift.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = _BT709
        stream.codec_context.color_trc = _BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = rgb.reformat(
                format="yuv420p", src_color_range="JPEG", dst_color_range="MPEG",
                dst_colorspace="ITU709",
            )  # fmt: skip
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
