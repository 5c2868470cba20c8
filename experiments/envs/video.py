"""Frames to a video file that every browser plays."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from rewardmodels.errors import InvalidInput, RewardModelsError
from rewardmodels.saving import atomic_path

# H.264 plays everywhere; the others are for builds of PyAV without libx264.
CODECS = ("libx264", "libopenh264", "libvpx-vp9")
# Simulated bodies move fast over fine checkerboards; much above 23 the squares smear.
CRF = "20"
BT709 = 1  # in ITU-T H.273, the code of both its primaries and its transfer function


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
        RewardModelsError: If this build of PyAV has none of the encoders in `CODECS`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_video(np.zeros((5, 64, 64, 3), np.uint8), f"{folder}/black.mp4", fps=25)
        ...     with av.open(f"{folder}/black.mp4") as video:
        ...         print(video.streams.video[0].frames)
        5
    """
    path = Path(path)
    frames = _checked(frames)
    if path.suffix.lower() != ".mp4":
        raise InvalidInput(f"path: expected a name ending in .mp4, got {path.name!r}.")
    if not (np.isfinite(fps) and fps > 0):
        raise InvalidInput(f"fps: expected a positive number of frames a second, got {fps!r}.")
    with atomic_path(path) as temporary:
        _encode(frames, temporary, Fraction(fps).limit_denominator(1001))


def _checked(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frames with even sides, or an error that says what is wrong with them."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InvalidInput(
            f"frames: expected shape (T, H, W, 3) with no empty axis, got {frames.shape}."
        )
    if frames.dtype != np.uint8:
        raise InvalidInput(
            f"frames: expected uint8 from 0 to 255, got {frames.dtype}. "
            "Pictures from 0 to 1 want (255 * frames).round().astype(np.uint8)."
        )
    odd_height, odd_width = frames.shape[1] % 2, frames.shape[2] % 2
    if odd_height or odd_width:
        frames = np.pad(frames, ((0, 0), (0, odd_height), (0, odd_width), (0, 0)), mode="edge")
    return frames


def _codec() -> str:
    """The best encoder that this build of PyAV has."""
    for codec in CODECS:
        if codec in av.codecs_available:
            return codec
    raise RewardModelsError(
        f"No video encoder: PyAV {av.__version__} has none of {', '.join(CODECS)}. "
        "Install PyAV's own wheel with `pip install --only-binary av av`."
    )


def _encode(frames: NDArray[np.uint8], path: Path, rate: Fraction) -> None:
    codec = _codec()
    options = {} if codec == "libopenh264" else {"crf": CRF}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream = cast(av.VideoStream, file.add_stream(codec, rate=rate, options=options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Untagged video is shown with whichever matrix the player guesses, and greens drift.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            file.mux(
                stream.encode(
                    picture.reformat(
                        format="yuv420p",
                        src_color_range="JPEG",
                        dst_color_range="MPEG",
                        dst_colorspace="ITU709",
                    )
                )
            )
        file.mux(stream.encode(None))
