from dataclasses import replace

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from experiments.envs.tasks import TASKS, find_task
from experiments.envs.vector import make_vec_env
from experiments.training import agents
from experiments.training.agents import (
    PPO_ENVS,
    PPO_SETTINGS,
    load_policy,
    make_agent,
    ppo_settings,
    train_agent,
)
from rewardmodels.errors import InvalidInput, UnknownName

PENDULUM = TASKS["Pendulum"]


def pendulums(n_envs=2, seed=0):
    return make_vec_env(PENDULUM, n_envs, seed, threads=1)


@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "SAC", "TD3", "DDPG"])
def test_an_algorithm_is_found_by_name_and_learns_on(algorithm):
    agent = make_agent(algorithm, pendulums(), PENDULUM, seed=0)
    assert type(agent) is getattr(sb3, algorithm)
    assert agent.device.type == "cpu"
    before = torch.cat([p.detach().flatten().clone() for p in agent.policy.parameters()])
    small = {"PPO": 2048, "A2C": 20}.get(algorithm, 2010)
    agent.learn(small)
    after = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("n_envs", [8, PPO_ENVS, 64])
def test_an_update_sees_as_many_steps_in_whole_minibatches(name, n_envs):
    settings = ppo_settings(TASKS[name], n_envs)
    assert settings["n_steps"] * n_envs == 2048
    assert 2048 % settings["batch_size"] == 0


def test_every_setting_is_for_a_task_we_have():
    assert set(PPO_SETTINGS) <= set(TASKS)


def test_overrides_come_before_settings():
    agent = make_agent("PPO", pendulums(), PENDULUM, 0, n_steps=16, batch_size=32, gamma=0.5)
    assert (agent.n_steps, agent.batch_size, agent.gamma) == (16, 32, 0.5)
    assert agent.n_epochs == ppo_settings(PENDULUM)["n_epochs"]


def test_off_policy_takes_a_gradient_step_for_every_transition():
    agent = make_agent("SAC", pendulums(4), PENDULUM, 0, learning_starts=100, batch_size=8)
    agent.learn(140)
    # Learning starts with the first step past 100 transitions.
    assert agent._n_updates == 40


def test_the_seed_decides_what_is_learned():
    def learned(seed):
        venv = VecNormalize(pendulums(seed=9))  # the agent's seed is what counts
        agent = make_agent("PPO", venv, PENDULUM, seed, n_steps=32, batch_size=64).learn(128)
        return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])

    torch.testing.assert_close(learned(1), learned(1), rtol=0, atol=0)
    assert not torch.equal(learned(1), learned(2))


def test_names_that_do_not_exist():
    with pytest.raises(UnknownName, match="Did you mean 'PPO'"):
        make_agent("PPO2", pendulums(), PENDULUM, 0)
    with pytest.raises(UnknownName, match="algorithm"):
        make_agent("HerReplayBuffer", pendulums(), PENDULUM, 0)
    with pytest.raises(UnknownName, match="Did you mean 'gamma'"):
        make_agent("PPO", pendulums(), PENDULUM, 0, gama=0.9)
    with pytest.raises(InvalidInput, match="DQN"):
        make_agent("DQN", pendulums(), PENDULUM, 0)


@pytest.mark.slow
def test_ppo_learns_to_run_within_200_000_steps():
    # Random actions give about -280; three seeds gave 1087 to 1581.
    task = find_task("HalfCheetah")
    venv = VecNormalize(VecMonitor(make_vec_env(task, PPO_ENVS, seed=0)))
    agent = make_agent("PPO", venv, task, seed=0).learn(200_000)
    returns = [episode["r"] for episode in agent.ep_info_buffer]
    assert np.mean(returns[-20:]) > 500


def test_a_saved_policy_acts_as_it_did(tmp_path, monkeypatch):
    made = []
    make = agents.make_agent
    monkeypatch.setattr(agents, "make_agent", lambda *given: made.append(make(*given)) or made[-1])
    short = replace(TASKS["Reacher"], horizon=20)
    train_agent(short, 64, tmp_path / "agent.safetensors")
    agent, normalised = made[0], made[0].get_vec_normalize_env()
    policy = load_policy(short, tmp_path / "agent.safetensors")
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
