"""Videos of clips: drawn from simulator states or images, for any environment, once each."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pytest
import torch

from active import FeedbackStore
from experiments.envs.rendering import Renderer, RenderingUnavailable, render_states
from experiments.envs.tasks import TASKS, find_task, make_env
from experiments.labelling import videos as module
from experiments.labelling.videos import SIZE_PX, ClipRenderer, Videos, VideoUnavailable, best_clip
from rewardmodels import Clips, InvalidInput, SampledPosterior


class Lamp(gym.Env[Any, Any]):
    """As bright as its state; neither MuJoCo nor classic control, with pictures of its own size."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = gym.spaces.Box(0, 255, (1,))
    action_space = gym.spaces.Box(0, 1, (1,))

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.state = render_mode, np.zeros(1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.state, {}

    def step(self, action: Any) -> Any:
        return self.state, 0.0, False, False, {}

    def render(self) -> Any:
        return np.full((50, 70, 3), round(float(self.state[0])), np.uint8)


@pytest.fixture
def lamp():
    gym.register("Lamp-v0", Lamp, max_episode_steps=20)
    yield "Lamp-v0"
    del gym.registry["Lamp-v0"]


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def renderer_of(run: Path, clips: Clips, task: str = "Hopper") -> ClipRenderer:
    with FeedbackStore(run / "answers.sqlite") as store:
        store.add_queries(clips, torch.tensor([[0, 1]]), round=0)
    return ClipRenderer(run, task)


def test_any_environment_with_rgb_array_and_a_state_is_drawn(lamp):
    frames = render_states(find_task(lamp), np.array([[10.0], [200.0]]), 32, 24)
    assert frames.shape == (2, 24, 32, 3)
    # 70 pixels by 50 keep their shape: 32 by 23, and white around them.
    assert np.unique(frames[0, :23]).tolist() == [10]
    assert np.unique(frames[1, :23]).tolist() == [200]
    assert np.unique(frames[:, 23:]).tolist() == [255]


def test_a_renderer_draws_each_clip_as_if_it_were_the_first():
    task = TASKS["HalfCheetah"]
    with make_env(task) as env:
        env.reset(seed=0)
        rest = np.concatenate([env.unwrapped.data.qpos, env.unwrapped.data.qvel])  # type: ignore[attr-defined]
    turned = rest.copy()
    turned[2] = 2.0
    one, other = np.stack([rest, rest]), np.stack([turned])
    alone = [render_states(task, states, 64, 48) for states in (one, other)]
    with Renderer(task, 64, 48) as renderer:
        for states, expected in [(one, alone[0]), (other, alone[1]), (one, alone[0])]:
            assert np.array_equal(renderer.draw(states), expected)
        with pytest.raises(InvalidInput, match=r"\(T, 18\)"):
            renderer.draw(rest)
    assert np.abs(alone[0][0].astype(int) - alone[1][0]).mean() > 1
    with Renderer(task, 64, 48, smooth=False) as renderer:
        rough = renderer.draw(one)
    difference = np.abs(rough.astype(int) - alone[0])
    assert 0 < difference.mean() < 5  # edges only


def test_clips_of_the_same_states_share_one_video(lamp, tmp_path, monkeypatch):
    states = torch.tensor([[[40.0], [80.0], [120.0]]]).repeat(2, 1, 1)
    clips = Clips(torch.rand(2, 3, 1), torch.rand(2, 3, 1), states=states)
    renderer = renderer_of(tmp_path, clips, lamp)
    name = renderer.clip(1)
    frames = decoded(renderer.folder / name)
    assert frames.shape == (3, SIZE_PX, SIZE_PX, 3)
    middle = frames[:, SIZE_PX // 4 : -SIZE_PX // 4]
    assert middle.mean((1, 2, 3)) == pytest.approx([40, 80, 120], abs=3)
    monkeypatch.setattr(module, "write_video", None)  # must not be called again
    assert renderer.clip(2) == name
    assert [file.name for file in renderer.folder.iterdir()] == [name]
    renderer.close()


def test_images_as_observations_need_no_simulator(tmp_path):
    images = torch.randint(0, 255, (2, 4, 1, 1, 3), dtype=torch.uint8).expand(2, 4, 20, 30, 3)
    renderer = renderer_of(tmp_path, Clips(images, torch.zeros(2, 4, 1)))
    frames = decoded(renderer.folder / renderer.clip(2))
    assert np.abs(frames.mean((1, 2)) - images[1, :, 0, 0].numpy()).max() < 8
    renderer.close()


def test_a_clip_without_states_or_images_is_refused(tmp_path):
    renderer = renderer_of(tmp_path, Clips(torch.rand(2, 4, 2), torch.rand(2, 4, 1)))
    with pytest.raises(RenderingUnavailable, match="clip 1: "):
        renderer.clip(1)
    renderer.close()


def test_a_check_finds_what_keeps_clips_from_being_drawn(lamp, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("bare", "empty", "blind", "images")]
    for folder in folders:
        folder.mkdir()
    bare = Clips(torch.rand(2, 4, 2), torch.rand(2, 4, 1))
    renderers = [renderer_of(folders[0], bare), *(ClipRenderer(f, lamp) for f in folders[1:])]
    with pytest.raises(RenderingUnavailable, match="clip 1: "):
        renderers[0].check()
    renderers[1].check()
    monkeypatch.setattr(Lamp, "render", lambda self: None)
    with pytest.raises(RenderingUnavailable, match="task: "):
        renderers[2].check()
    monkeypatch.setattr(Lamp, "reset", lambda self, **_: (np.zeros((8, 8, 3), np.uint8), {}))
    monkeypatch.setattr(Lamp, "observation_space", gym.spaces.Box(0, 255, (8, 8, 3), np.uint8))
    renderers[3].check()
    for renderer in renderers:
        renderer.close()


def test_a_requested_video_overtakes_prefetched_ones(tmp_path):
    async def order() -> list[Any]:
        videos, drawn = Videos(tmp_path, "Hopper"), []

        async def draw(process: object, job: Any) -> Path:
            drawn.append(job)
            await asyncio.sleep(0)
            return tmp_path / f"{job}"

        videos._draw = draw  # type: ignore[assignment,method-assign]
        videos._process = object()  # type: ignore[assignment]
        videos.start()
        videos.prefetch([1, 2, 3, 4])
        videos.prefetch([2, 3])  # known already
        assert await videos.get(4) == tmp_path / "4"
        for job in (1, 2, 3, 1):
            await videos.get(job)
        videos.forget(1)
        await videos.get(1)
        videos._process = None
        await videos.stop()
        return drawn

    drawn = asyncio.run(order())
    assert drawn.index(4) <= 1  # at once, or after the one in progress
    assert sorted(drawn) == [1, 1, 2, 3, 4]


def test_the_best_clip_has_the_highest_learned_return(tmp_path, monkeypatch):
    assert best_clip(tmp_path) is None
    folder = tmp_path / "checkpoints" / "0003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "reward.json").write_text('[1, 0, "abc"]')
    steps, envs = 40, 2
    frame_rewards = np.zeros((steps, envs, 1), np.float32)
    frame_rewards[17:22, 1] = 1.0
    states = np.arange(steps * envs, dtype=np.float32).reshape(steps, envs, 1)
    np.savez(
        folder / "clip_buffer.npz", steps=steps, observations=frame_rewards, actions=frame_rewards,
        rewards=-frame_rewards[..., 0], ends=np.zeros((steps, envs), bool), states=states,
    )  # fmt: skip

    class Sum:
        def posterior(self, clips: Clips) -> SampledPosterior:
            return SampledPosterior(clips.observations.sum((1, 2))[None])

    models = {"abc": Sum()}  # by checksum
    monkeypatch.setattr(module, "load_model", lambda path, settings, known: models[known])
    assert best_clip(tmp_path, 5).tolist() == states[17:22, 1].tolist()
    (folder / "model.safetensors").unlink()
    assert best_clip(tmp_path, 5) is None


def test_the_process_replies_one_line_per_job(lamp, tmp_path, monkeypatch, capfd):
    states = torch.rand(2, 3, 1)
    clips = Clips(torch.rand(2, 3, 1), torch.rand(2, 3, 1), states=states)
    renderer_of(tmp_path, clips, lamp).close()
    monkeypatch.setattr(module.sys, "argv", ["videos", str(tmp_path), lamp])
    monkeypatch.setattr(module.sys, "stdin", ["1\n", "9\n", '"best"\n'])
    monkeypatch.setattr(module.os, "dup2", lambda *_: None)  # pytest's own output is needed
    module.main()
    drawn, unknown, best = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert (tmp_path / "videos" / drawn["file"]).is_file()
    assert "9" in unknown["error"]
    assert best["file"] is None


@pytest.mark.slow
def test_a_process_that_cannot_draw_gives_the_reason_and_is_replaced_when_killed(tmp_path):
    renderer_of(tmp_path, Clips(torch.rand(2, 4, 2), torch.rand(2, 4, 1))).close()

    async def check() -> None:
        videos = Videos(tmp_path, "Hopper")
        videos.start()
        try:
            for clip in (1, 77):
                with pytest.raises(VideoUnavailable, match=f"{clip}"):
                    await videos.get(clip)
            assert await videos.get("best") is None
            assert videos._process is not None
            videos._process.kill()
            with pytest.raises(VideoUnavailable, match="process has ended"):
                await videos.get(2)
            with pytest.raises(VideoUnavailable, match="clip 2: "):
                await videos.get(2)  # by a new process
        finally:
            await videos.stop()

    asyncio.run(check())
