"""Rollouts of a trained policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from experiments.envs.tasks import Task
from experiments.envs.vector import make_vec_env
from rewardmodels import Clips


def play(
    agent: BaseAlgorithm,
    normalised: VecNormalize,
    task: Task,
    *,
    episodes: int,
    seed: int,
) -> Clips:
    """Plays whole episodes, all at once.

    Args:
        agent: Who acts.
        normalised: Holds the statistics by which the agent's inputs were normalised.
        task: The task.
        episodes: How many.
        seed: Of the first states; the actions' comes with the caller's.

    Returns:
        `episodes` clips with the task's own reward and, where there are any, simulator states.
    """
    venv = make_vec_env(task, episodes, seed)
    seen: Any = venv.reset()
    frames = []
    for step in range(task.horizon):
        if getattr(agent, "use_sde", False) and step % agent.sde_sample_freq == 0:
            policy: Any = agent.policy
            policy.reset_noise(episodes)  # which `predict` leaves alone
        action, _ = agent.predict(normalised.normalize_obs(seen))  # explores, as in training
        states = venv.states()
        seen, rewards, ends, infos = venv.step(action)
        led_to = np.stack([i["terminal_observation"] for i in infos]) if ends.all() else seen
        frames.append((led_to, action, rewards, states))
    venv.close()
    observations, actions, rewards, states = zip(*frames, strict=True)
    return Clips(
        _stack(observations),
        _stack(actions),
        rewards=_stack(rewards),
        states=None if states[0] is None else _stack(states),
    )


def _stack(steps: tuple[np.ndarray, ...]) -> torch.Tensor:
    stacked = torch.from_numpy(np.stack(steps, 1))
    return stacked.float() if stacked.is_floating_point() else stacked
