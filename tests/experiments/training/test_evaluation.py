"""Whole episodes, played at once, against a loop over single environments."""

import gymnasium as gym
import numpy as np
import pytest

from experiments.envs.tasks import find_task
from experiments.training import evaluation
from experiments.training.evaluation import play

make_vec_env = evaluation.make_vec_env


class Doubled:
    """Stands for VecNormalize."""

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
        evaluation, "make_vec_env", lambda t, n, seed: make_vec_env(t, n, seed, "gymnasium")
    )

    class Agent(Steered):
        def predict(self, observations):
            one, _ = super().predict(observations)
            return np.repeat(one, width, 1) / (3 - width), None

    env = gym.make(task.env_id)
    width = env.action_space.shape[0]
    clips = play(Agent(), Doubled(), task, episodes=3, seed=5)
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

    play(Agent(), Doubled(), find_task("Pendulum"), episodes=3, seed=5)
    assert drawn == [3] * 25  # of 200 steps, one draw for each episode
