"""Videos of clips: drawn from states or pictures, any environment's, once each."""

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
from experiments.labelling.videos import SIZE_PX, ClipRenderer, Videos, best_clip
from rewardmodels import Clips, InvalidInput, SampledPosterior


class Lamp(gym.Env[Any, Any]):
    """As bright as its state says: neither MuJoCo nor classic control, and its size is its own."""

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


def put(run: Path, clips: Clips) -> None:
    with FeedbackStore(run / "answers.sqlite") as store:
        store.add_queries(clips, torch.tensor([[0, 1]]), round=0)


def test_any_environment_with_rgb_array_and_a_state_is_drawn(lamp):
    frames = render_states(find_task(lamp), np.array([[10.0], [200.0]]), 32, 24)
    assert frames.shape == (2, 24, 32, 3)
    assert np.unique(frames[0]).tolist() == [10]
    assert np.unique(frames[1]).tolist() == [200]


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


def test_a_clip_is_drawn_once_by_what_it_shows(lamp, tmp_path, monkeypatch):
    states = torch.tensor([[[40.0], [80.0], [120.0]]]).repeat(2, 1, 1)
    clips = Clips(torch.rand(2, 3, 1), torch.rand(2, 3, 1), states=states)
    put(tmp_path, clips)
    renderer = ClipRenderer(tmp_path, lamp)
    name = renderer.clip(1)
    assert decoded(renderer.folder / name).shape == (3, SIZE_PX, SIZE_PX, 3)
    shades = decoded(renderer.folder / name).mean((1, 2, 3))
    assert shades == pytest.approx([40, 80, 120], abs=3)
    monkeypatch.setattr(renderer, "_renderer", None)
    monkeypatch.setattr(module, "Renderer", None)  # cannot be called any more
    assert renderer.clip(2) == name  # other observations, the same states
    assert [file.name for file in renderer.folder.iterdir()] == [name]
    renderer.close()


def test_pictures_as_observations_need_no_simulator(tmp_path):
    pictures = torch.randint(0, 255, (2, 4, 1, 1, 3), dtype=torch.uint8).expand(2, 4, 20, 30, 3)
    put(tmp_path, Clips(pictures, torch.zeros(2, 4, 1)))
    renderer = ClipRenderer(tmp_path, "Hopper")
    seen = decoded(renderer.folder / renderer.clip(2))
    assert np.abs(seen.mean((1, 2)) - pictures[1, :, 0, 0].numpy()).max() < 8
    renderer.close()


def test_an_environment_that_shows_no_state_is_refused_with_a_reason(tmp_path):
    put(tmp_path, Clips(torch.rand(2, 4, 2), torch.rand(2, 4, 1)))
    renderer = ClipRenderer(tmp_path, "Hopper")
    with pytest.raises(RenderingUnavailable, match="simulator states or images"):
        renderer.clip(1)
    renderer.close()


def test_somebody_who_waits_comes_first(tmp_path):
    async def order() -> list[Any]:
        videos, asked = Videos(tmp_path, "Hopper"), []

        async def ask(process: object, job: Any) -> Path:
            asked.append(job)
            await asyncio.sleep(0)
            return tmp_path / f"{job}"

        videos._draw = ask  # type: ignore[assignment,method-assign]
        videos._process = object()  # type: ignore[assignment]
        videos.start()
        videos.prefetch([1, 2, 3, 4])
        videos.prefetch([2, 3])  # known already
        assert await videos.get(4) == tmp_path / "4"
        for job in (1, 2, 3):
            await videos.get(job)
        await videos.get(1)
        videos.forget(1)
        await videos.get(1)
        videos._process = None
        await videos.stop()
        return asked

    asked = asyncio.run(order())
    assert asked.index(4) <= 1  # at once, or after what was being drawn
    assert sorted(asked) == [1, 1, 2, 3, 4]


def test_the_best_clip_is_the_one_of_highest_learned_return(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints" / "0003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    steps, envs = 40, 2
    worth = np.zeros((steps, envs, 1), np.float32)
    worth[17:22, 1] = 1.0
    states = np.arange(steps * envs, dtype=np.float32).reshape(steps, envs, 1)
    np.savez(
        folder / "history.npz", steps=steps, observations=worth, actions=worth,
        rewards=-worth[..., 0], ends=np.zeros((steps, envs), bool), states=states,
    )  # fmt: skip

    class Sums:
        def posterior(self, clips: Clips) -> SampledPosterior:
            return SampledPosterior(clips.observations.sum((1, 2))[None])

    monkeypatch.setattr(module, "load", lambda path: Sums())
    assert best_clip(tmp_path, 5).tolist() == states[17:22, 1].tolist()
    (folder / "model.safetensors").unlink()
    assert best_clip(tmp_path, 5) is None


def test_the_process_answers_a_line_for_a_line(lamp, tmp_path, monkeypatch, capfd):
    states = torch.rand(2, 3, 1)
    put(tmp_path, Clips(torch.rand(2, 3, 1), torch.rand(2, 3, 1), states=states))
    monkeypatch.setattr(module.sys, "argv", ["drawing", str(tmp_path), lamp])
    monkeypatch.setattr(module.sys, "stdin", ["1\n", "9\n", '"best"\n'])
    monkeypatch.setattr(module.os, "dup2", lambda *_: None)  # the test's own output is needed
    module.main()
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert (tmp_path / "videos" / said[0]["file"]).is_file()
    assert "expected clips in" in said[1]["error"]
    assert said[2]["file"] is None
