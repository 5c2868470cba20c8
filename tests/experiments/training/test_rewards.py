"""The wrapper that replaces the task's own reward and records frames, against naive loops."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from experiments.training.clip_buffer import ClipBuffer
from experiments.training.rewards import RewardWrapper, zero_reward

HORIZON = 5


def pendulums(n, clip_buffer, reward, seed=0):
    make = [lambda: gym.make("Pendulum-v1", max_episode_steps=HORIZON) for _ in range(n)]
    venv = DummyVecEnv(make)
    venv.seed(seed)
    return RewardWrapper(venv, clip_buffer, reward)


def weighted(observations, actions):
    """A reward that tells every frame from every other."""
    return observations @ np.array([1.0, 10.0, 100.0]) + 1000 * actions[:, 0]


def test_a_frame_is_an_action_and_the_observation_after_it():
    calls = []

    def reward(observations, actions):
        calls.append((observations.copy(), actions.copy()))
        return weighted(observations, actions)

    clip_buffer = ClipBuffer(50, 3)
    env = pendulums(3, clip_buffer, reward, seed=7)
    env.reset()
    rng = np.random.default_rng(0)
    alone = [gym.make("Pendulum-v1", max_episode_steps=HORIZON) for _ in range(3)]
    for i, one in enumerate(alone):
        one.reset(seed=7 + i)
    for _ in range(2 * HORIZON):
        actions = rng.uniform(-2, 2, (3, 1)).astype(np.float32)
        observations, rewards, _, _ = env.step(actions)
        after, own, _, truncated, _ = zip(
            *(one.step(action) for one, action in zip(alone, actions, strict=True)), strict=True
        )
        first = [
            one.reset()[0] if ended else last
            for one, ended, last in zip(alone, truncated, after, strict=True)
        ]
        np.testing.assert_array_equal(observations, first)
        np.testing.assert_array_equal(calls[-1][0], after)
        np.testing.assert_array_equal(calls[-1][1], actions)
        np.testing.assert_allclose(rewards, weighted(np.array(after), actions), rtol=1e-6)
        row = (clip_buffer.steps - 1) % clip_buffer.capacity
        for name, expected in (
            ("observations", after), ("actions", actions), ("rewards", own), ("ends", truncated),
        ):  # fmt: skip
            np.testing.assert_allclose(clip_buffer._columns[name][row], expected, rtol=1e-5)


@pytest.mark.parametrize("reward", [None, zero_reward, weighted])
def test_episode_returns_are_sums_of_rewards(reward):
    env = pendulums(2, ClipBuffer(50, 2), reward)
    env.reset()
    rewards = [env.step(np.full((2, 1), 0.5, np.float32))[1] for _ in range(2 * HORIZON)]
    own, replaced = np.array(env.episode_returns).T
    halves = np.reshape(rewards, (2, HORIZON, 2)).sum(1).ravel()
    np.testing.assert_allclose(replaced, halves, rtol=1e-5)
    assert (own < 0).all()
    if reward is None:
        np.testing.assert_array_equal(own, replaced)


def test_an_episode_cut_off_by_a_reset_has_no_return():
    env = pendulums(2, ClipBuffer(50, 2), None)
    for steps in (HORIZON - 1, HORIZON):
        env.reset()
        for _ in range(steps):
            env.step(np.zeros((2, 1), np.float32))
    assert len(env.episode_returns) == 2
    clips = env.clip_buffer.sample(HORIZON, 9, np.random.default_rng(0))
    assert len(clips) == 2, "no clip crosses the reset"
