"""Episodes to fit detectors to and to calibrate thresholds on, as a guard will see them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ood.features import Features, find_features
from ood.rules import Policy
from rewardmodels import InvalidInput


def record_episodes(
    env: gym.Env[Any, Any],
    policy: Policy,
    episodes: int,
    features: str | Features = "observation_action",
    *,
    seed: int | None = None,
) -> list[Tensor]:
    """Plays whole episodes, and keeps the features of each step.

    Those that a detector is fitted to mustn't also calibrate its threshold.

    Args:
        env: The environment, unguarded; every episode has to end.
        policy: From one observation to an action.
        episodes: How many.
        features: As the guard's.
        seed: Of the first reset.

    Returns:
        One tensor `(T, F)` an episode.

    Raises:
        InvalidInput: Less than one episode.
        UnknownName: No features of that name.

    Example:
        >>> env = gym.make("Pendulum-v1", max_episode_steps=20)
        >>> policy = lambda observation: np.zeros(1, np.float32)
        >>> [x.shape for x in record_episodes(env, policy, 2, "transition")]
        [torch.Size([20, 7]), torch.Size([20, 7])]
    """
    if episodes < 1:
        raise InvalidInput(f"episodes: expected at least one, got {episodes}.")
    see, recorded = find_features(features), []
    for episode in range(episodes):
        before, _ = env.reset(seed=seed if episode == 0 else None)
        rows, ended = [], False
        while not ended:
            action = policy(before)
            after, _, terminated, truncated, _ = env.step(action)
            step = (np.asarray(x)[None] for x in (before, action, after))
            rows.append(np.array(see(*step)))
            before, ended = after, terminated or truncated
        recorded.append(torch.from_numpy(np.concatenate(rows)))
    return recorded
