"""The learned reward in Gymnasium, Stable-Baselines3 and imitation, against single frames."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rewardmodels import (
    Calibrated,
    Clips,
    Comparisons,
    DeepEnsemble,
    InvalidInput,
    NotFitted,
    SampledPosterior,
    fit,
)
from rewardmodels.wrappers import (
    LearnedReward,
    LearnedRewardWrapper,
    VecLearnedReward,
    imitation_reward,
    relabel,
)

HORIZON = 5


def make(name="Pendulum-v1"):
    return gym.make(name, max_episode_steps=HORIZON)


def vector(n, reward, name="Pendulum-v1", seed=0):
    venv = DummyVecEnv([lambda: make(name)] * n)
    venv.seed(seed)
    return VecLearnedReward(venv, reward)


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


@pytest.mark.parametrize("kappa", [0.0, 1.5])
def test_a_calibrated_reward_is_divided_by_the_temperature(model, kappa):
    clips = some_clips(60, seed=5)
    answers = Comparisons(clips, torch.arange(60).view(30, 2), torch.ones(30))
    calibrated = Calibrated(model).calibrate(answers, random=True)
    frames = clips.observations[:, 0].numpy(), clips.actions[:, 0].numpy()
    expected = LearnedReward(model, kappa)(*frames) / calibrated.temperature
    assert calibrated.temperature != 1
    np.testing.assert_allclose(LearnedReward(calibrated, kappa)(*frames), expected, rtol=1e-4)


def test_a_scorer_gives_the_same_reward_and_lists_and_other_types_are_taken(model):
    clips = some_clips(seed=5)
    frames = clips.observations[:, 0].numpy(), clips.actions[:, 0].numpy()
    reward = LearnedReward(model, 0.7, 2.0, 3.0)
    expected = reward(*frames)
    scored = LearnedReward(model.frame_scorer(), 0.7, 2.0, 3.0)(*frames)
    np.testing.assert_allclose(scored, expected, rtol=1e-4)
    observations, actions = frames
    observations.flags.writeable = False
    others = reward(observations.astype(np.float64)[::-1], [list(map(float, x)) for x in actions])
    np.testing.assert_allclose(others[::-1], reward(observations, actions[::-1]), rtol=1e-5)


@pytest.fixture(scope="module", params=["Pendulum-v1", "CartPole-v1"])
def task(request):
    """Name of an environment, and a model of its reward."""
    env = make(request.param)
    clips = torch.randn(20, 4, *env.observation_space.shape)
    discrete = isinstance(env.action_space, spaces.Discrete)
    actions = torch.randint(2, (20, 4)) if discrete else torch.randn(20, 4, 1)
    answers = Comparisons(Clips(clips, actions), torch.arange(20).view(10, 2), torch.ones(10))
    return request.param, fit(DeepEnsemble(members=3, hidden=(8,)), answers, epochs=2)


@pytest.mark.parametrize("kappa", [None, 1.0])
def test_all_wrappers_pay_the_reward_of_the_observation_after_the_action(task, kappa):
    name, model = task
    reward = model if kappa is None else LearnedReward(model, kappa)
    by_frame, reward_fn = LearnedReward(model, kappa or 0.0), imitation_reward(reward)
    venv = vector(2, reward, name, seed=7)
    last = venv.reset()
    singles = [LearnedRewardWrapper(make(name), reward) for _ in range(2)]
    bare = [make(name) for _ in range(2)]
    for i in range(2):
        singles[i].reset(seed=7 + i)
        bare[i].reset(seed=7 + i)
    for env in singles:
        env.action_space.seed(0)
    for step in range(1, 2 * HORIZON + 1):
        actions = np.stack([env.action_space.sample() for env in singles])
        now, rewards, ends, infos = venv.step(actions)
        assert ends.all() == (step % HORIZON == 0)
        after = []
        for i in range(2):
            observation, reward_i, *flags, info = singles[i].step(actions[i])
            expected = bare[i].step(actions[i])
            np.testing.assert_array_equal(observation, expected[0])
            assert flags == list(expected[2:4])
            assert info == {**expected[4], "task_reward": pytest.approx(expected[1])}
            assert venv.task_rewards[i] == pytest.approx(expected[1], rel=1e-5)
            after.append(observation)
            assert reward_i == pytest.approx(rewards[i], rel=1e-3, abs=1e-5)
            if ends[i]:
                singles[i].reset()
                bare[i].reset()
        after = np.stack(after)
        np.testing.assert_allclose(rewards, by_frame(after, actions), rtol=1e-5)
        np.testing.assert_array_equal(reward_fn(last, actions, after, ends), rewards)
        last = now
    assert "terminal_observation" in infos[0]


def test_refuses_what_cannot_be_a_reward(model):
    with pytest.raises(NotFitted):
        LearnedReward(DeepEnsemble())
    with pytest.raises(NotFitted):
        LearnedRewardWrapper(make(), DeepEnsemble())
    for name in ("pessimism", "scale", "shift"):
        with pytest.raises(InvalidInput, match=name):
            LearnedReward(model, **{name: float("nan")})
    for wrong in (3.0, "reward"):
        with pytest.raises(InvalidInput, match="reward"):
            VecLearnedReward(DummyVecEnv([make]), wrong)
    env = make()
    env.observation_space = spaces.Dict({"a": env.observation_space})
    with pytest.raises(InvalidInput, match="observation_space"):
        LearnedRewardWrapper(env, model)
    with pytest.raises(InvalidInput, match="observations"):
        LearnedReward(model)([{}], [[0.0]])
    column = vector(2, lambda observations, actions: np.zeros((2, 1)))
    column.reset()
    with pytest.raises(InvalidInput, match="reward"):
        column.step(np.zeros((2, 1)))


def test_rewards_of_a_replay_buffer_are_recomputed():
    frames = []

    def zero(observations, actions):
        frames.append((observations.copy(), actions.copy()))
        return np.zeros(len(observations), np.float32)

    agent = SAC("MlpPolicy", VecNormalize(vector(2, zero)), buffer_size=400, learning_starts=1000)
    agent.learn(64)
    buffer = agent.replay_buffer
    assert not buffer.rewards.any()
    relabel(agent, weighted, batch_size=7)
    assert buffer.size() == len(frames)
    expected = [weighted(*frame) for frame in frames]
    np.testing.assert_allclose(buffer.rewards[: len(frames)], expected, rtol=1e-4, atol=1e-2)
    assert not buffer.rewards[len(frames) :].any()


@pytest.mark.slow
def test_importing_the_library_imports_no_reinforcement_learning():
    code = "import rewardmodels, sys; print({'stable_baselines3', 'gymnasium'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
