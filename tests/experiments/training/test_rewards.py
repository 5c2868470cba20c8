"""What is paid, for which frame, against naive loops."""

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


def test_a_frame_is_an_action_and_what_it_led_to():
    paid_for = []

    def reward(observations, actions):
        paid_for.append((observations.copy(), actions.copy()))
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
        observations, rewards, ends, _ = env.step(actions)
        led_to, own = [], []
        for i, one in enumerate(alone):
            observation, task_reward, _, truncated, _ = one.step(actions[i])
            led_to.append(observation)
            own.append(task_reward)
            assert truncated == ends[i]
            if truncated:
                observation, _ = one.reset()
            np.testing.assert_array_equal(observations[i], observation)
        np.testing.assert_array_equal(paid_for[-1][0], led_to)
        np.testing.assert_array_equal(paid_for[-1][1], actions)
        np.testing.assert_allclose(rewards, weighted(np.array(led_to), actions), rtol=1e-6)
        row = (clip_buffer.steps - 1) % clip_buffer.capacity
        np.testing.assert_array_equal(clip_buffer._columns["observations"][row], led_to)
        np.testing.assert_array_equal(clip_buffer._columns["actions"][row], actions)
        np.testing.assert_allclose(clip_buffer._columns["rewards"][row], own, rtol=1e-5)
        np.testing.assert_array_equal(clip_buffer._columns["ends"][row], ends)


@pytest.mark.parametrize("reward", [None, zero_reward, weighted])
def test_returns_of_episodes_are_sums_of_what_was_paid(reward):
    env = pendulums(2, ClipBuffer(50, 2), reward)
    env.reset()
    paid = [env.step(np.full((2, 1), 0.5, np.float32))[1] for _ in range(2 * HORIZON)]
    halves = np.reshape(paid, (2, HORIZON, 2)).sum(1).ravel()
    own, given = np.array(env.episode_returns).T
    np.testing.assert_allclose(given, halves, rtol=1e-5)
    assert (own < 0).all()
    if reward is None:
        np.testing.assert_array_equal(own, given)
    if reward is zero_reward:
        assert (given == 0).all()


def test_an_episode_that_a_reset_broke_off_has_no_return():
    env = pendulums(2, ClipBuffer(50, 2), None)
    env.reset()
    for _ in range(HORIZON - 1):
        env.step(np.zeros((2, 1), np.float32))
    env.reset()
    for _ in range(HORIZON):
        env.step(np.zeros((2, 1), np.float32))
    assert len(env.episode_returns) == 2
    starts = env.clip_buffer.sample(HORIZON, 9, np.random.default_rng(0))
    assert len(starts) == 2, "no clip crosses the reset"


def test_the_learned_reward_is_the_models(model):
    clips = some_clips(30, seed=3)
    observations, actions = clips.observations.flatten(0, 1), clips.actions.flatten(0, 1)
    belief = model.frame_posterior(observations, actions)
    for kappa in (0.0, 1.5):
        reward = LearnedReward(model, kappa).rescaled(clips)
        paid = reward(observations.numpy(), actions.numpy())
        lower = belief.mean - kappa * belief.variance.sqrt()
        one_by_one = [
            float(reward(o[None].numpy(), a[None].numpy())[0])
            for o, a in zip(observations[:20], actions[:20], strict=True)
        ]
        np.testing.assert_allclose(paid[:20], one_by_one, rtol=1e-4, atol=1e-5)
        normalised = (lower - lower.mean()) / lower.std(unbiased=False)
        np.testing.assert_allclose(paid, normalised, rtol=1e-3, atol=1e-4)


class Stretched:
    """A model whose reward is the first number of an observation, times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def frame_posterior(self, observations, actions):
        return SampledPosterior(self.factor * observations[None, :, 0])


def test_the_learned_rewards_scale_is_the_same_whatever_the_models():
    clips = some_clips()
    frames = clips.observations.flatten(0, 1).numpy(), clips.actions.flatten(0, 1).numpy()
    one, other = (
        LearnedReward(Stretched(factor)).rescaled(clips)(*frames) for factor in (0.01, 50.0)
    )
    first = frames[0][:, 0]
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(one, (first - first.mean()) / first.std(), rtol=1e-3, atol=1e-5)


def test_a_refit_keeps_what_the_policy_lately_did_at_its_mean_and_std():
    clips = some_clips()
    old = LearnedReward(Stretched(3.0), 0.0, 0.5, 7.0)
    new = LearnedReward(Stretched(-20.0)).rescaled(clips, *old.moments(clips))
    frames = clips.observations.flatten(0, 1).numpy(), clips.actions.flatten(0, 1).numpy()
    first = frames[0][:, 0]
    assert new.moments(clips) == pytest.approx(
        (1.5 * first.mean() + 7, 1.5 * first.std()), rel=1e-4
    )
    # The new model says the opposite of the old, so frames change places about the mean.
    np.testing.assert_allclose(new(*frames) + old(*frames), 2 * old(*frames).mean(), rtol=1e-3)


def test_a_replay_buffer_is_paid_anew():
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
