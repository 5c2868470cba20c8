"""Episodes of guards: the same however many are played, and a policy that comes back as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.envs import guard_episodes
from experiments.envs.guard_episodes import load_policy, play, train
from experiments.envs.tasks import TASKS, make_env
from rewardmodels import InvalidInput

SHORT = replace(TASKS["Reacher"], horizon=20)


def act(observations, noise):
    return np.tanh(observations[:, :2] + noise)


def test_an_episode_does_not_depend_on_how_many_are_played(monkeypatch):
    every = play(lambda: make_env(SHORT), act, 5, seed=3)
    monkeypatch.setattr(guard_episodes, "_TOGETHER", 2)
    apart = play(lambda: make_env(SHORT), act, 3, seed=3, first=2)
    for one, two in zip(every.part(2, 5).features, apart.features, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    np.testing.assert_array_equal(every.rewards[2:], apart.rewards)
    other = play(lambda: make_env(SHORT), act, 1, seed=4)
    assert not torch.equal(other.features[0], every.features[0])


def test_it_is_what_one_environment_does_step_by_step():
    played = play(lambda: make_env(SHORT), act, 1, seed=0, features="observation_action")
    first, chance = np.random.SeedSequence([0, 0]).generate_state(2)
    env, draw = make_env(SHORT), np.random.default_rng(int(chance))
    seen, _ = env.reset(seed=int(first))
    for row, paid in zip(played.features[0].numpy(), played.rewards[0], strict=True):
        action = np.tanh(seen[:2] + draw.standard_normal(2))
        seen, reward, *_ = env.step(action)
        np.testing.assert_allclose(row, np.concatenate([seen, action]))
        assert paid == reward


def test_no_episodes_are_refused():
    with pytest.raises(InvalidInput, match="episodes: expected at least one, got 0"):
        play(lambda: make_env(SHORT), act, 0, seed=0)


def test_a_saved_policy_acts_as_it_did(tmp_path, monkeypatch):
    made = []
    make = guard_episodes.make_agent
    monkeypatch.setattr(
        guard_episodes, "make_agent", lambda *given: made.append(make(*given)) or made[-1]
    )
    train(SHORT, 64, tmp_path / "agent.safetensors")
    agent, normalised = made[0], made[0].get_vec_normalize_env()
    policy = load_policy(SHORT, tmp_path / "agent.safetensors")
    assert normalised.obs_rms.count > 1
    seen = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)
    inputs = normalised.normalize_obs(seen)
    expected, _ = agent.predict(inputs, deterministic=True)
    np.testing.assert_allclose(policy(seen, np.zeros((5, 2))), expected, atol=1e-6)
    # In distribution, what the agent draws: the same mean and spread.
    torch.manual_seed(0)
    drawn = agent.predict(np.repeat(inputs[:1], 20_000, 0), deterministic=False)[0]
    noise = np.random.default_rng(0).standard_normal((20_000, 2))
    ours = policy(np.repeat(seen[:1], 20_000, 0), noise)
    np.testing.assert_allclose(ours.mean(0), drawn.mean(0), atol=0.02)
    np.testing.assert_allclose(ours.std(0), drawn.std(0), atol=0.02)
    assert np.abs(ours).max() <= 1
