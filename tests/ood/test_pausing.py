"""Training pauses at the step that a plain loop finds, and updates no policy after an alarm."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy import stats
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from ood import CUSUM, Mahalanobis, Monitor, PauseOnAlarm, StaleThreshold
from rewardmodels import InvalidInput
from rewardmodels.errors import NotFitted

LENGTH, COPIES, SIZE = 20, 4, 3


class Replayed(gym.Env):
    """Environment whose observations are a table `(episodes, LENGTH + 1, SIZE)`."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (SIZE,), np.float32)

    def __init__(self, table):
        self.table, self.episode = table, -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.at = self.episode + 1, 0
        return self.table[self.episode, 0], {}

    def step(self, action):
        self.at += 1
        return self.table[self.episode, self.at], 0.0, False, self.at == LENGTH, {}


def envs(tables):
    return DummyVecEnv([lambda table=table: Replayed(table) for table in tables])


def ppo(env, n_steps=8):
    return PPO("MlpPolicy", env, n_steps=n_steps, batch_size=4, n_epochs=1, device="cpu", seed=0)


def normal(rng, *shape):
    return rng.standard_normal((*shape, SIZE)).astype(np.float32)


def calibrated(rng, alpha=0.1, episodes=40):
    frames = torch.from_numpy(normal(rng, 500))
    monitor = Monitor(Mahalanobis().fit(frames), CUSUM())
    monitor.calibrate(list(torch.from_numpy(normal(rng, episodes, LENGTH))), alpha)
    return monitor


def plain_loop(monitor, tables, share):
    """Steps and alarmed copies once a share of them has an alarm in its episode."""
    for episode in range(tables.shape[1]):
        streams = [monitor.stream(1) for _ in tables]
        raised = [False] * len(tables)
        for step in range(LENGTH):
            for i, stream in enumerate(streams):
                seen = tables[i, episode, step + 1][None]
                raised[i] = bool(stream.update(seen).alarm[0]) or raised[i]
            if sum(raised) >= share * len(tables):
                return (episode * LENGTH + step + 1) * len(tables), raised
    return None, raised


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_pauses_at_the_step_that_a_loop_plain_loop_finds(share, normalise):
    rng = np.random.default_rng(3)
    monitor = calibrated(rng)
    tables = normal(rng, COPIES, 6, LENGTH + 1)
    tables[:2, 2:] += 1.5  # two copies are shifted, and later all
    tables[:, 3, 9:] += 1.5
    steps, raised = plain_loop(monitor, tables, share)
    env = VecNormalize(envs(tables)) if normalise else envs(tables)
    pause = PauseOnAlarm(monitor, "observation", share)
    agent = ppo(env).learn(COPIES * LENGTH * 5, pause)
    assert pause.paused
    assert agent.num_timesteps == steps
    assert pause.alarmed.tolist() == raised


def test_the_last_observation_of_an_episode_counts():
    rng = np.random.default_rng(0)
    tables = 0 * normal(rng, COPIES, 6, LENGTH + 1)
    tables[:, 1, LENGTH] = 50  # seen only as the terminal observation
    pause = PauseOnAlarm(calibrated(rng), "observation")
    agent = ppo(envs(tables)).learn(COPIES * LENGTH * 4, pause)
    assert agent.num_timesteps == COPIES * LENGTH * 2


def test_features_get_clipped_actions_and_the_observations_after():
    rng = np.random.default_rng(0)
    seen = []

    def features(before, action, after):
        seen.append((before, action, after))
        return after

    tables = normal(rng, COPIES, 3, LENGTH + 1)
    monitor = calibrated(rng, alpha=0.03, episodes=60)
    ppo(envs(tables)).learn(COPIES * LENGTH, PauseOnAlarm(monitor, features, 1))
    before, action, after = seen[0]
    np.testing.assert_array_equal(before, tables[:, 0, 0])
    np.testing.assert_array_equal(after, tables[:, 0, 1])
    assert action.shape == (COPIES, 1)
    assert np.abs(action).max() <= 1


def test_no_policy_is_updated_on_the_rollout_of_an_alarm():
    rng = np.random.default_rng(0)
    tables = normal(rng, COPIES, 4, LENGTH + 1)
    tables[:, 1] += 5  # in the second episode, the first rollout
    agent = ppo(envs(tables), n_steps=2 * LENGTH)
    before = [p.clone() for p in agent.policy.parameters()]
    pause = PauseOnAlarm(calibrated(rng), "observation")
    agent.learn(COPIES * 3 * LENGTH, pause)
    assert pause.paused
    assert all(torch.equal(p, q) for p, q in zip(before, agent.policy.parameters(), strict=True))


def test_training_resumes_with_another_monitor():
    rng = np.random.default_rng(0)
    tables = normal(rng, COPIES, 8, LENGTH + 1)
    tables[:, 1:] += 5
    pause = PauseOnAlarm(calibrated(rng), "observation")
    agent = ppo(envs(tables)).learn(COPIES * LENGTH * 4, pause)
    first = agent.num_timesteps
    shifted = Monitor(Mahalanobis().fit(torch.from_numpy(normal(rng, 500) + 5)))
    shifted.calibrate(list(torch.from_numpy(normal(rng, 60, LENGTH) + 5)), 0.03)
    pause.watch(shifted)
    assert not pause.alarmed.any()
    agent.learn(COPIES * LENGTH * 3, pause, reset_num_timesteps=False)
    assert not pause.paused
    assert agent.num_timesteps >= first + COPIES * LENGTH * 3


def test_an_environment_that_was_reset_starts_an_episode():
    rng = np.random.default_rng(0)
    tables = normal(rng, COPIES, 8, LENGTH + 1)
    env = envs(tables)
    monitor = calibrated(rng, 0.03, episodes=60)
    pause, agent = PauseOnAlarm(monitor, "observation", 1), ppo(env)
    agent.learn(8 * COPIES, pause)
    assert pause._stream.steps.tolist() == [8] * COPIES
    agent.learn(8 * COPIES, pause, reset_num_timesteps=False)
    assert pause._stream.steps.tolist() == [16] * COPIES
    agent.set_env(env)
    agent.learn(8 * COPIES, pause, reset_num_timesteps=False)
    assert pause._stream.steps.tolist() == [8] * COPIES


def test_every_algorithm_pauses():
    rng = np.random.default_rng(0)
    tables = normal(rng, 1, 4, LENGTH + 1)
    tables[:, 1:] += 9
    agent = SAC("MlpPolicy", envs(tables), learning_starts=5, device="cpu", seed=0)
    pause = PauseOnAlarm(calibrated(rng), "observation")
    agent.learn(3 * LENGTH, pause)
    assert pause.paused
    assert LENGTH < agent.num_timesteps < 2 * LENGTH


def test_false_pauses_are_as_rare_as_promised():
    # With one copy, in at most a share alpha of episodes, over calibrations.
    alpha, trials, paused = 0.2, 40, 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        pause = PauseOnAlarm(calibrated(rng, alpha, episodes=16), "observation")
        ppo(envs(normal(rng, 1, 2, LENGTH + 1)), n_steps=LENGTH).learn(LENGTH, pause)
        paused += pause.paused
    assert 0 < paused <= stats.binom.ppf(0.999, trials, alpha)


def test_refuses_a_share_or_a_monitor_without_promise():
    rng = np.random.default_rng(0)
    monitor = calibrated(rng)
    with pytest.raises(InvalidInput, match="share"):
        PauseOnAlarm(monitor, share=0)
    with pytest.raises(NotFitted, match="threshold"):
        PauseOnAlarm(Monitor(monitor.detector))
    pause = PauseOnAlarm(monitor)
    monitor.detector.fit(torch.from_numpy(normal(rng, 100)))
    with pytest.raises(StaleThreshold):
        pause.watch(monitor)
