"""Pictures against MuJoCo's own renderer; videos decode to what was written."""

import av
import mujoco
import numpy as np
import pytest

from experiments.envs import rendering
from experiments.envs.rendering import RenderingUnavailable, render_states, write_video
from experiments.envs.tasks import TASKS, make_env
from rewardmodels.errors import InvalidInput, RewardModelsError


def drawn(*args, **kwargs):
    try:
        return render_states(*args, **kwargs)
    except RenderingUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["HalfCheetah", "Hopper"])
def test_pictures_are_those_of_mujocos_own_renderer(name):
    env = make_env(TASKS[name])
    env.reset(seed=0)
    simulator = env.unwrapped
    states = np.random.default_rng(0).normal(0, 0.3, (3, simulator.model.nq + simulator.model.nv))
    frames = drawn(TASKS[name], states, width=96, height=64)
    assert frames.shape == (3, 64, 96, 3)
    assert frames.dtype == np.uint8
    renderer = mujoco.Renderer(simulator.model, 64, 96)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    for frame, state in zip(frames, states, strict=True):
        simulator.set_state(*np.split(state, [simulator.model.nq]))
        renderer.update_scene(simulator.data, "track")
        # Renderer turns shadows and reflections back on with each update.
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        assert np.abs(frame.astype(int) - renderer.render()).mean() < 1
    renderer.close()


def test_states_of_another_task_and_missing_libraries_are_refused(monkeypatch):
    with pytest.raises(InvalidInput, match="states"):
        render_states(TASKS["Hopper"], np.zeros((2, 11)))
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(RenderingUnavailable, match="MUJOCO_GL"):
        render_states(TASKS["Hopper"], np.zeros((2, 12)))


COLOURS = np.array([[200, 40, 40], [40, 180, 60], [30, 60, 210], [128, 128, 128]], dtype=np.uint8)


def plain(n_frames, height, width):
    """Frames of one colour each, `(T, H, W, 3)`."""
    colours = COLOURS[np.arange(n_frames) % len(COLOURS)]
    return np.broadcast_to(colours[:, None, None], (n_frames, height, width, 3)).copy()


def decode(path):
    """RGB frames `(T, H, W, 3)` and their rate, by BT.709's own formula, limited range."""
    with av.open(str(path)) as file:
        rate = file.streams.video[0].average_rate
        planes = np.stack([f.to_ndarray(format="yuv444p") for f in file.decode(video=0)])
    luma, blue, red = ((planes.astype(float) - 16) / [[[[219]], [[224]], [[224]]]]).swapaxes(0, 1)
    r = luma + 2 * (1 - 0.2126) * (red - 0.5)
    b = luma + 2 * (1 - 0.0722) * (blue - 0.5)
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    return (255 * np.stack([r, g, b], axis=-1)).round(), float(rate)


@pytest.mark.parametrize("fps", [20, 1 / 0.008])  # Hopper's time step
def test_decodes_to_the_same_frames(tmp_path, fps):
    frames = plain(23, 48, 64)
    write_video(frames, tmp_path / "a.mp4", fps)
    decoded, rate = decode(tmp_path / "a.mp4")
    assert decoded.shape == frames.shape
    assert rate == pytest.approx(fps)
    # Limited-range 4:2:0 rounds by a level or two; a wrong matrix moves green by more than 15.
    assert np.abs(decoded - frames).max() <= 6


def test_is_h264_that_browsers_play_and_starts_with_its_index(tmp_path):
    write_video(plain(3, 16, 16), tmp_path / "a.mp4", fps=30)
    with av.open(str(tmp_path / "a.mp4")) as file:
        context = file.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited
    raw = (tmp_path / "a.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 15), (15, 15), (1, 1)])
def test_odd_sides_gain_a_row_or_column(tmp_path, height, width):
    frames = plain(2, height, width)
    write_video(frames, tmp_path / "a.mp4", fps=10)
    decoded, _ = decode(tmp_path / "a.mp4")
    assert decoded.shape == (2, height + height % 2, width + width % 2, 3)
    assert np.abs(decoded[:, :height, :width] - frames).max() <= 6


@pytest.mark.parametrize(
    ("frames", "name", "fps", "argument"),
    [
        (np.zeros((4, 8, 8), np.uint8), "a.mp4", 10, "frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "a.mp4", 10, "frames"),
        (np.zeros((1, 8, 8, 4), np.uint8), "a.mp4", 10, "frames"),
        (np.zeros((1, 8, 8, 3)), "a.mp4", 10, "frames"),
        (np.zeros((1, 8, 8, 3), np.uint8), "a.avi", 10, "path"),
        (np.zeros((1, 8, 8, 3), np.uint8), "a.mp4", 0, "fps"),
        (np.zeros((1, 8, 8, 3), np.uint8), "a.mp4", float("nan"), "fps"),
    ],
)
def test_frames_that_cannot_be_written_are_refused(tmp_path, frames, name, fps, argument):
    with pytest.raises(InvalidInput, match=argument):
        write_video(frames, tmp_path / name, fps)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_older_video(tmp_path, monkeypatch):
    target = tmp_path / "a.mp4"
    target.write_bytes(b"older")
    monkeypatch.setattr(rendering, "_CODECS", ("no-such-codec",))
    with pytest.raises(RewardModelsError, match="no-such-codec"):
        write_video(plain(2, 16, 16), target, fps=10)
    assert target.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("codec", sorted(set(rendering._CODECS[1:]) & av.codecs_available))
def test_other_encoders_write_the_same_frames(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(rendering, "_CODECS", (codec,))
    write_video(plain(6, 64, 64), tmp_path / "a.mp4", fps=10)
    decoded, rate = decode(tmp_path / "a.mp4")
    assert rate == 10
    # These start at a lower quality than x264's, and flicker a little between plain colours.
    assert np.abs(decoded - plain(6, 64, 64)).max() <= 12
