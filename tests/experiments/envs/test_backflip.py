import json
from dataclasses import replace
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest

from experiments.envs.backflip import _MASS, backflips, clearances, progress
from experiments.envs.tasks import TASKS, find_task, make_env
from experiments.envs.vector import make_vec_env
from experiments.training.learn import learn

from ..studying import tiny

TASK = find_task("backflip")
STANDING = [1.2, 0.0, 0.0, 0.0, 0.0]


def jump(turns, frames=100, lift=1.5):
    """A made-up jump from standing to standing, with whole or part turns backwards on the way."""
    poses = np.tile(np.array(STANDING), (frames, 1))
    poses[:, 0] += lift * np.sin(np.linspace(0, np.pi, frames))
    poses[:, 1] = np.linspace(0, -2 * np.pi * turns, frames)
    return poses


def grounded(poses):
    """The same, with the lowest point on the ground all the time."""
    return poses - np.minimum(*clearances(poses))[:, None] * np.eye(5)[0]


def onto_the_back(poses):
    """The same, but that the body is on the ground as its head comes below its hip."""
    poses = poses.copy()
    frame = np.flatnonzero(np.cos(poses[:, 1]) < 0)[0]
    poses[frame, 0] -= clearances(poses[frame])[0]
    return poses


def after(*parts):
    """One after the other, each turning on from where the one before stopped."""
    parts = [part.copy() for part in parts]
    for before, part in pairwise(parts):
        part[:, 1] += before[-1, 1]
    return np.concatenate(parts)


def wrapped(poses):
    poses = poses.copy()
    poses[:, 1] = (poses[:, 1] + np.pi) % (2 * np.pi) - np.pi
    return poses


@pytest.mark.parametrize("kept", [lambda poses: poses, wrapped])
@pytest.mark.parametrize(
    ("poses", "count"),
    [
        (jump(0), 0),
        (jump(1), 1),
        (jump(-1), 0),
        (jump(2), 2),
        (jump(0.5), 0),
        (after(jump(1), jump(1), jump(1)), 3),
        (after(jump(-1), jump(1)), 1),
        (after(jump(1), jump(-1)), 1),
        (after(jump(0.6), jump(-0.6)), 0),  # there and back
        (after(jump(0.25), jump(-0.25), jump(0.25), jump(-0.25)), 0),
        (jump(1)[:80], 0),  # the video ends in the air
        (grounded(jump(1)), 0),  # over the head
        (onto_the_back(jump(1)), 0),
        (np.tile([0.05, -np.pi / 2, 0, 0, 0], (50, 1)), 0),
        (jump(1)[:1], 0),
        (jump(1)[:0], 0),
    ],
)
def test_only_whole_backward_turns_landed_on_the_foot_count(poses, count, kept):
    assert backflips(kept(poses)) == count


def test_a_turn_that_ends_off_the_foot_counts_once_it_stands():
    lying = np.tile([0.1, -2 * np.pi - 0.45 * np.pi, 0.0, 0.0, 0.0], (20, 1))
    fallen = np.concatenate([jump(1)[:-1], lying])
    assert backflips(fallen) == 0
    sitting = grounded(np.tile([0.3, -2 * np.pi, -2.0, 0.0, 0.0], (20, 1)))
    assert clearances(sitting)[0].max() < 0.01
    assert backflips(np.concatenate([jump(1)[:-1], sitting])) == 0
    # It then gets up: a flip with a stumble, since nothing touched while it was upside down.
    up = np.array([[1.2, -2 * np.pi, 0.0, 0.0, 0.0]])
    assert backflips(np.concatenate([fallen, up])) == 1


def test_clearances_are_those_of_mujocos_geometries():
    env = gym.make("Hopper-v5").unwrapped
    model, data = env.model, env.data
    rng = np.random.default_rng(0)
    poses = rng.uniform([0.5, -9, -2.6, -2.6, -0.8], [3, 9, 0, 0, 0.8], (50, 5))
    for pose in poses:
        env.set_state(np.array([rng.normal(), *pose]), np.zeros(6))
        lowest = {}
        for geom in range(1, model.ngeom):
            axis = data.geom_xmat[geom].reshape(3, 3)[:, 2]
            radius, half = model.geom_size[geom][:2]
            height = data.geom_xpos[geom][2] - half * abs(axis[2]) - radius
            lowest[model.geom(geom).name.removesuffix("_geom")] = height
        body, foot = clearances(pose)
        assert foot == pytest.approx(lowest["foot"], abs=1e-9)
        assert body == pytest.approx(min(lowest["torso"], lowest["thigh"]), abs=1e-9)
        assert min(body, foot) == pytest.approx(min(lowest.values()), abs=1e-9)


def test_masses_are_mujocos():
    model = gym.make("Hopper-v5").unwrapped.model
    np.testing.assert_allclose(_MASS, model.body_mass[1:], atol=0.005)


def frame(**parts):
    observation = np.zeros(11)
    observation[:5] = STANDING
    for name, value in parts.items():
        at = ["z", "angle", "thigh", "leg", "foot", "x_", "z_", "angle_", "thigh_", "leg_", "foot_"]
        observation[at.index(name)] = value
    return observation


@pytest.mark.parametrize(
    ("observation", "paid"),
    [
        (frame(z=2.0, angle_=-3.0), 2.0 + 3.0),
        (frame(z=2.0, angle_=3.0), 2.0 - 3.0),
        (frame(z=2.0, angle=np.pi), 2.0),  # upside down costs nothing up there
        (frame(), 1.2),  # on the foot, upright
        (frame(angle_=-3.0), 1.2 + 3.0),
        (frame(angle_=3.0), 1.2 - 3.0),
        (frame(angle=-np.pi / 3, thigh=-np.pi / 3, z=1.1), 1.1 - 4 * 0.5),  # leaning on it
        (frame(z=0.05, angle=np.pi / 2), 0.05 - 4 - 8),  # lying
        (frame(z=0.05, angle=np.pi / 2, angle_=-3.0), 0.05 - 4 - 8),  # turning there is for nothing
        (frame(z=0.05, angle=np.pi / 2, angle_=3.0), 0.05 - 4 - 8 - 3.0),
        (frame(z=0.05, angle=2 * np.pi / 3), 0.05 - 4 * 1.5 - 8),  # on the head
        (frame(z=0.25, thigh=-2.0), 0.25 - 8),  # sitting upright
        # Limbs that turn against each other: only what the body does as a whole counts.
        (frame(z=2.0, angle_=-12.16, thigh_=-15.83), 2.0),
        (frame(z=2.0, foot_=5.0), 2.0 + 5.0 * 5.32 / 15.83),
    ],
)
def test_progress_is_the_whole_bodys_turning_off_all_but_the_foot(observation, paid):
    others = np.random.default_rng(0).normal(size=(3, 11))
    batch = np.concatenate([others[:2], observation[None], others[2:]])
    assert progress(batch, np.zeros((4, 3)))[2] == pytest.approx(paid, abs=1e-6)


def test_both_backends_give_the_same_frames_and_keep_the_angle_in_bounds():
    task = replace(TASK, horizon=150)
    rng = np.random.default_rng(0)
    single = make_env(task)
    single.reset(seed=0)
    for backend in ("envpool", "gymnasium"):
        venv = make_vec_env(task, 4, seed=1, backend=backend, threads=1)
        seen = [venv.reset()]
        for _ in range(150):
            states = venv.states()
            action = rng.uniform(-1, 1, (4, 3)).astype(np.float32)
            observations, rewards, ends, infos = venv.step(action)
            led_to = [i["terminal_observation"] for i in infos] if ends.all() else observations
            np.testing.assert_allclose(rewards, progress(np.stack(led_to), action), atol=1e-5)
            assert observations.dtype == np.float32
            seen.append(observations)
        assert ends.all()
        assert np.abs(np.stack(seen)[..., 1]).max() <= np.pi + 1e-6
        single.unwrapped.set_state(*np.split(states[0].astype(float), [6]))
        observation, reward, *_ = single.step(action[0])
        np.testing.assert_allclose(observation, led_to[0], atol=1e-3)
        assert reward == pytest.approx(rewards[0], abs=1e-3)


def test_touch_sensors_are_added_and_the_angle_is_wrapped():
    observations = np.random.default_rng(0).uniform(-20, 20, (40, 11)).astype(np.float32)
    observations[:, 0] = np.linspace(-0.5, 2.0, 40)
    seen = TASK.observed(observations)
    assert seen.dtype == np.float32
    np.testing.assert_allclose(np.exp(1j * seen[:, 1]), np.exp(1j * observations[:, 1]), atol=1e-5)
    assert np.abs(seen[:, 1]).max() <= np.pi + 1e-6
    others = np.arange(11) != 1
    np.testing.assert_array_equal(seen[:, :11][:, others], observations[:, others])
    body, foot = clearances(observations)
    np.testing.assert_array_equal(seen[:, 11:], np.stack([body < 0.01, foot < 0.01], 1))
    assert 0 < seen[:, 11].sum() < 40
    assert find_task("Hopper").observed(observations) is observations


def test_observations_are_in_the_environments_space():
    env = make_env(TASK)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.shape == observation.shape == (13,)
    assert observation in env.observation_space


def test_a_run_counts_backflips(tmp_path, monkeypatch):
    counts = iter([3, 1, 5])
    monkeypatch.setitem(TASK.counts, "backflips", lambda episode: next(counts))
    monkeypatch.setitem(TASKS, "backflip", replace(TASK, horizon=100))
    config = tiny(tmp_path / "run", task="backflip", steps=64, rounds=1, comparisons=8, evaluate=3)
    result = learn(config, progress=False)
    assert result == json.loads((config.out / "result.json").read_text())
    assert result["backflips"] == [3, 1, 5]
    assert result["backflips_per_1000_steps"] == 30
    page = (config.out / "report.html").read_text()
    assert "1 to 5" in page
