"""Rewards of frames, and the wrapper that replaces the task's own, against naive loops."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from experiments.training.clip_buffer import ClipBuffer
from experiments.training.rewards import LearnedReward, RewardWrapper, relabel, zero_reward
from rewardmodels import Clips, Comparisons, DeepEnsemble, SampledPosterior, fit

HORIZON = 5


def pendulums(n, clip_buffer, reward, seed=0):
    make = [lambda: gym.make("Pendulum-v1", max_episode_steps=HORIZON) for _ in range(n)]
    venv = DummyVecEnv(make)
    venv.seed(seed)
    return RewardWrapper(venv, clip_buffer, reward)


def weighted(observations, actions):
    """A reward that tells every frame from every other."""
    return observations @ np.array([1.0, 10.0, 100.0]) + 1000 * actions[:, 0]


def some_clips(n=20, frames=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Clips(
        torch.randn(n, frames, 3, generator=draw), torch.randn(n, frames, 1, generator=draw)
    )


@pytest.fixture(scope="module")
def model():
    clips = some_clips()
    pairs = torch.arange(20).view(10, 2)
    better = (clips.observations.sum((1, 2))[pairs].diff(dim=1) > 0).float().squeeze(1)
    return fit(DeepEnsemble(members=3, hidden=(16,)), Comparisons(clips, pairs, better), epochs=3)


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


@pytest.mark.parametrize("kappa", [0.0, 1.5])
def test_the_learned_reward_is_the_lower_bound_of_the_posterior(model, kappa):
    clips = some_clips(30, seed=3)
    observations, actions = clips.observations.flatten(0, 1), clips.actions.flatten(0, 1)
    posterior = model.frame_posterior(observations, actions)
    lower = posterior.mean - kappa * posterior.variance.sqrt()
    rewards = LearnedReward(model, kappa).rescaled(clips)(observations.numpy(), actions.numpy())
    normalised = (lower - lower.mean()) / lower.std(unbiased=False)
    np.testing.assert_allclose(rewards, normalised, rtol=1e-3, atol=1e-4)


class Stretched:
    """A model whose reward is the first number of an observation, times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def frame_posterior(self, observations, actions):
        return SampledPosterior(self.factor * observations[None, :, 0])


@pytest.mark.parametrize("factor", [0.01, 50.0])
def test_the_scale_of_the_learned_reward_does_not_depend_on_the_model(factor):
    clips = some_clips()
    frames = clips.observations.flatten(0, 1).numpy(), clips.actions.flatten(0, 1).numpy()
    first = frames[0][:, 0]
    rewards = LearnedReward(Stretched(factor)).rescaled(clips)(*frames)
    np.testing.assert_allclose(rewards, (first - first.mean()) / first.std(), rtol=1e-3, atol=1e-5)


def test_a_refit_keeps_mean_and_std_of_the_latest_clips():
    clips = some_clips()
    old = LearnedReward(Stretched(3.0), 0.0, 0.5, 7.0)
    new = LearnedReward(Stretched(-20.0)).rescaled(clips, *old.moments(clips))
    frames = clips.observations.flatten(0, 1).numpy(), clips.actions.flatten(0, 1).numpy()
    first = frames[0][:, 0]
    moments = (1.5 * first.mean() + 7, 1.5 * first.std())
    assert new.moments(clips) == pytest.approx(moments, rel=1e-4)
    # The new reward is the negative of the old, so frames change places about the mean.
    np.testing.assert_allclose(new(*frames) + old(*frames), 2 * old(*frames).mean(), rtol=1e-3)


def test_rewards_of_a_replay_buffer_are_recomputed():
    clip_buffer = ClipBuffer(100, 2)
    env = VecNormalize(pendulums(2, clip_buffer, zero_reward))
    agent = SAC("MlpPolicy", env, buffer_size=400, learning_starts=1000, seed=0)
    agent.learn(64)
    buffer = agent.replay_buffer
    assert not buffer.rewards.any()
    relabel(agent, weighted, batch_size=7)
    size = buffer.size()
    assert size == clip_buffer.steps
    for row in range(size):
        for copy in range(2):
            observation = clip_buffer._columns["observations"][row, copy]
            action = clip_buffer._columns["actions"][row, copy]
            expected = weighted(observation[None], action[None])[0]
            assert buffer.rewards[row, copy] == pytest.approx(expected, rel=1e-4, abs=1e-2)
    assert not buffer.rewards[size:].any()
