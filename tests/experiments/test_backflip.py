from dataclasses import replace
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest

from experiments.backflip import backflips, clearance, progress
from experiments.tasks import find_task, make_env
from experiments.vecenvs import make_vec_env

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
    return poses - clearance(poses)[:, None] * np.eye(5)[0]


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
        (np.tile([0.05, -np.pi / 2, 0, 0, 0], (50, 1)), 0),
        (jump(1)[:1], 0),
        (jump(1)[:0], 0),
    ],
)
def test_only_whole_backward_turns_landed_on_the_foot_count(poses, count, kept):
    assert backflips(kept(poses)) == count


def test_a_turn_that_ends_lying_down_does_not_count_until_it_stands():
    lying = np.tile([0.1, -2 * np.pi - np.pi / 2, 0.0, 0.0, 0.0], (20, 1))
    fallen = np.concatenate([jump(1)[:-1], lying])
    assert backflips(fallen) == 0
    # Nor when it then gets up: between standing and standing it went round once, feet first, but
    # it was never upside down on the ground, so this is a flip with a stumble.
    up = np.array([[1.2, -2 * np.pi, 0.0, 0.0, 0.0]])
    assert backflips(np.concatenate([fallen, up])) == 1


def test_clearance_is_that_of_mujocos_geometries():
    env = gym.make("Hopper-v5").unwrapped
    model, data = env.model, env.data
    rng = np.random.default_rng(0)
    poses = rng.uniform([0.5, -9, -2.6, -2.6, -0.8], [3, 9, 0, 0, 0.8], (50, 5))
    for pose in poses:
        env.set_state(np.array([rng.normal(), *pose]), np.zeros(6))
        ends = []
        for geom in range(1, model.ngeom):
            axis = data.geom_xmat[geom].reshape(3, 3)[:, 2]
            radius, half = model.geom_size[geom][:2]
            ends += [data.geom_xpos[geom][2] + side * half * axis[2] - radius for side in (-1, 1)]
        assert clearance(pose) == pytest.approx(min(ends), abs=1e-9)


def test_progress_pays_for_turning_backwards_off_the_ground_alone():
    frames = np.zeros((4, 11))
    frames[:, :5] = STANDING
    frames[:, 0] = [2.0, 2.0, 1.2, 1.2]
    frames[:, 7] = [-3.0, 2.0, -3.0, 2.0]
    paid = progress(frames, np.zeros((4, 3)))
    np.testing.assert_allclose(paid, [3.0, -2.0, 0.0, -2.0])
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(progress(frames[order], np.zeros((4, 3))), paid[order])


def test_both_backends_tell_the_same_of_a_frame_and_keep_the_angle_in_bounds():
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
            np.testing.assert_allclose(rewards, progress(np.stack(led_to), action), rtol=1e-6)
            assert observations.dtype == np.float32
            seen.append(observations)
        assert ends.all()
        assert np.abs(np.stack(seen)[..., 1]).max() <= np.pi + 1e-6
        single.unwrapped.set_state(*np.split(states[0].astype(float), [6]))
        observation, reward, *_ = single.step(action[0])
        np.testing.assert_allclose(observation, led_to[0], atol=1e-3)
        assert reward == pytest.approx(rewards[0], abs=1e-3)


def test_angles_are_wound_and_nothing_else_is():
    observations = np.linspace(-20, 20, 22).reshape(2, 11)
    wound = TASK.wound(observations)
    np.testing.assert_allclose(np.exp(1j * wound[:, 1]), np.exp(1j * observations[:, 1]))
    assert np.abs(wound[:, 1]).max() <= np.pi
    others = np.arange(11) != 1
    np.testing.assert_array_equal(wound[:, others], observations[:, others])
    assert find_task("Hopper").wound(observations) is observations
