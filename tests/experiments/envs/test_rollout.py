"""Rollouts: against loops over single environments, and the same however many are played."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from experiments.envs import rollout
from experiments.envs.rollout import play, play_agent, play_batch
from experiments.envs.tasks import TASKS, find_task, make_env
from rewardmodels import InvalidInput

SHORT = replace(TASKS["Reacher"], horizon=20)
make_vec_env = rollout.make_vec_env


def act(observations, noise):
    return np.tanh(observations[:, :2] + noise)


class Doubled:
    """Stands in for VecNormalize."""

    def normalize_obs(self, observations):
        return 2 * observations


class Steered:
    """An agent whose action is a function of what it sees."""

    def predict(self, observations):
        return np.clip(observations[:, 1:2] - observations[:, 2:3], -2, 2), None


@pytest.mark.parametrize("task", ["Pendulum", "Reacher"])
def test_returns_are_those_of_episodes_played_one_by_one(task, monkeypatch):
    task = find_task(task)
    monkeypatch.setattr(
        rollout, "make_vec_env", lambda t, n, seed: make_vec_env(t, n, seed, "gymnasium")
    )

    class Agent(Steered):
        def predict(self, observations):
            one, _ = super().predict(observations)
            return np.repeat(one, width, 1) / (3 - width), None

    env = gym.make(task.env_id)
    width = env.action_space.shape[0]
    clips = play_agent(Agent(), Doubled(), task, episodes=3, seed=5)
    assert clips.rewards.shape == (3, task.horizon)
    assert clips.mask.all()
    for i in range(3):
        seen, _ = env.reset(seed=5 + i)
        truncated, rewards, observations = False, [], []
        while not truncated:
            action, _ = Agent().predict(2 * seen[None].astype(np.float32))
            seen, reward, _, truncated, _ = env.step(action[0])
            rewards.append(reward)
            observations.append(seen)
        assert float(clips.returns[i]) == pytest.approx(sum(rewards), rel=1e-4)
        # The last frame too holds what its action led to, and not the next episode's first.
        np.testing.assert_allclose(clips.observations[i], observations, rtol=1e-3, atol=1e-3)


def test_noise_that_is_a_function_of_the_state_changes_as_in_training(monkeypatch):
    drawn = []

    class Agent(Steered):
        use_sde, sde_sample_freq = True, 8

        class policy:
            reset_noise = staticmethod(drawn.append)

    play_agent(Agent(), Doubled(), find_task("Pendulum"), episodes=3, seed=5)
    assert drawn == [3] * 25  # of 200 steps, one draw for each episode


def test_an_episode_does_not_depend_on_how_many_are_played(monkeypatch):
    every = play(lambda: make_env(SHORT), act, 5, seed=3)
    monkeypatch.setattr(rollout, "_AT_ONCE", 2)
    apart = play(lambda: make_env(SHORT), act, 3, seed=3, first=2)
    for one, two in zip(every[2:].features(), apart.features(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    np.testing.assert_array_equal(every.rewards[2:], apart.rewards)
    other = play(lambda: make_env(SHORT), act, 1, seed=4)
    assert not torch.equal(other.features()[0], every.features()[0])


def test_an_episode_is_that_of_one_environment_step_by_step():
    played = play(lambda: make_env(SHORT), act, 1, seed=0)
    first, chance = np.random.SeedSequence([0, 0]).generate_state(2)
    env, draw = make_env(SHORT), np.random.default_rng(int(chance))
    seen, _ = env.reset(seed=int(first))
    for row, paid in zip(
        played.features("observation_action")[0].numpy(), played.rewards[0], strict=True
    ):
        action = np.tanh(seen[:2] + draw.standard_normal(2))
        seen, reward, *_ = env.step(action)
        np.testing.assert_allclose(row, np.concatenate([seen, action]))
        assert paid == reward


def test_an_episode_is_halted_from_its_own_step_on():
    actions = play(lambda: make_env(SHORT), act, 3, seed=3, halts=[np.inf, 5, 0]).actions
    assert (actions[0] != 0).all()
    assert (actions[1, :5] != 0).all()
    assert not actions[1, 5:].any()
    assert not actions[2].any()
    with pytest.raises(InvalidInput, match="halts"):
        play(lambda: make_env(SHORT), act, 3, seed=3, halts=[0])
    with pytest.raises(InvalidInput, match="episodes"):
        play(lambda: make_env(SHORT), act, 0, seed=0)


def test_batched_episodes_are_whole_and_differ():
    task = find_task("Pendulum")
    found = play_batch(task, lambda seen, noise: noise.clip(-2, 2), 3, seed=0).features()
    assert [tuple(x.shape) for x in found] == [(200, 7)] * 3
    for episode in found:
        torch.testing.assert_close(episode[1:, :3], episode[:-1, 4:])
    assert not torch.equal(found[0], found[1])
