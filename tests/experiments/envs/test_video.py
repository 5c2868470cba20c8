"""Videos decode to what was written."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from experiments.envs import rendering as video
from experiments.envs.rendering import write_video
from rewardmodels.errors import InvalidInput, RewardModelsError

COLOURS = np.array([[200, 40, 40], [40, 180, 60], [30, 60, 210], [128, 128, 128]], dtype=np.uint8)


def plain(n_frames: int, height: int, width: int) -> np.ndarray:
    """Frames of one colour each, `(T, H, W, 3)`."""
    colours = COLOURS[np.arange(n_frames) % len(COLOURS)]
    return np.broadcast_to(colours[:, None, None], (n_frames, height, width, 3)).copy()


def decode(path: Path) -> tuple[np.ndarray, float]:
    """RGB frames `(T, H, W, 3)` and their rate, by BT.709's own formula, limited range."""
    with av.open(str(path)) as file:
        rate = file.streams.video[0].average_rate
        assert rate is not None
        planes = np.stack([f.to_ndarray(format="yuv444p") for f in file.decode(video=0)])
    luma, blue, red = ((planes.astype(float) - 16) / [[[[219]], [[224]], [[224]]]]).swapaxes(0, 1)
    r = luma + 2 * (1 - 0.2126) * (red - 0.5)
    b = luma + 2 * (1 - 0.0722) * (blue - 0.5)
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    return (255 * np.stack([r, g, b], axis=-1)).round(), float(rate)


def test_decodes_to_the_same_frames(tmp_path: Path) -> None:
    frames = plain(23, 48, 64)
    write_video(frames, tmp_path / "a.mp4", fps=20)
    decoded, rate = decode(tmp_path / "a.mp4")
    assert decoded.shape == frames.shape
    assert rate == 20
    # Limited-range 4:2:0 rounds by a level or two; a wrong matrix moves green by more than 15.
    assert np.abs(decoded - frames).max() <= 6


def test_is_h264_that_browsers_play_and_starts_with_its_index(tmp_path: Path) -> None:
    write_video(plain(3, 16, 16), tmp_path / "a.mp4", fps=30)
    with av.open(str(tmp_path / "a.mp4")) as file:
        context = file.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited
    raw = (tmp_path / "a.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 15), (15, 15), (1, 1)])
def test_odd_sides_gain_a_row_or_column(tmp_path: Path, height: int, width: int) -> None:
    frames = plain(2, height, width)
    write_video(frames, tmp_path / "a.mp4", fps=10)
    decoded, _ = decode(tmp_path / "a.mp4")
    assert decoded.shape == (2, height + height % 2, width + width % 2, 3)
    assert np.abs(decoded[:, :height, :width] - frames).max() <= 6


def test_fractional_rate(tmp_path: Path) -> None:
    write_video(plain(5, 16, 16), tmp_path / "a.mp4", fps=1 / 0.008)  # Hopper's time step
    assert decode(tmp_path / "a.mp4")[1] == pytest.approx(125)


@pytest.mark.parametrize(
    ("frames", "name", "fps", "words"),
    [
        (np.zeros((4, 8, 8), np.uint8), "a.mp4", 10, r"frames: .*\(4, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "a.mp4", 10, r"frames: .*\(0, 8, 8, 3\)"),
        (np.zeros((1, 8, 8, 4), np.uint8), "a.mp4", 10, r"frames: .*\(1, 8, 8, 4\)"),
        (np.zeros((1, 8, 8, 3)), "a.mp4", 10, "frames: .*uint8.*float64"),
        (np.zeros((1, 8, 8, 3), np.uint8), "a.avi", 10, "path: .*a.avi"),
        (np.zeros((1, 8, 8, 3), np.uint8), "a.mp4", 0, "fps: .*0"),
        (np.zeros((1, 8, 8, 3), np.uint8), "a.mp4", float("nan"), "fps: .*nan"),
    ],
)
def test_refuses(tmp_path: Path, frames: np.ndarray, name: str, fps: float, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        write_video(frames, tmp_path / name, fps)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_older_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.mp4"
    target.write_bytes(b"older")
    monkeypatch.setattr(video, "_CODECS", ("no-such-codec",))
    with pytest.raises(RewardModelsError, match="no-such-codec"):
        write_video(plain(2, 16, 16), target, fps=10)
    assert target.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("codec", sorted(set(video._CODECS[1:]) & av.codecs_available))
def test_the_other_encoders_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    monkeypatch.setattr(video, "_CODECS", (codec,))
    write_video(plain(6, 64, 64), tmp_path / "a.mp4", fps=10)
    decoded, rate = decode(tmp_path / "a.mp4")
    assert rate == 10
    # These start at a lower quality than x264's, and flicker a little between plain colours.
    assert np.abs(decoded - plain(6, 64, 64)).max() <= 12
