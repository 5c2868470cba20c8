"""The agents of the studies: Stable-Baselines3's algorithms, with settings that learn the tasks."""

from __future__ import annotations

from typing import Any

import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from experiments.tasks import Task
from rewardmodels.errors import UnknownName

ALGORITHMS = ("PPO", "SAC", "TD3", "A2C", "DDPG")

_PPO: dict[str, Any] = {
    "n_steps": 64,
    "batch_size": 256,
    "n_epochs": 10,
    "learning_rate": 3e-4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "policy_kwargs": {"log_std_init": -0.5, "net_arch": [64, 64]},
}
PPO_ENVS = 32
PPO_SETTINGS: dict[str, dict[str, Any]] = {}


def ppo_settings(task: Task) -> dict[str, Any]:
    """PPO's settings for a task: those that all share, with the task's own in front."""
    return _PPO | PPO_SETTINGS.get(task.name, {})


def make_agent(
    algorithm: str,
    env: VecEnv,
    task: Task,
    seed: int,
    tensorboard_log: str | None = None,
    **overrides: Any,
) -> BaseAlgorithm:
    """An untrained agent of Stable-Baselines3, on the CPU unless `device` says otherwise.

    Args:
        algorithm: The name of a class in `stable_baselines3`, such as `"PPO"` or `"SAC"`.
        env: The environments; for PPO with observations and rewards normalised (`VecNormalize`).
        task: Whose settings to take.
        seed: Of the networks, the actions and the environments (PyTorch's, NumPy's and Python's
            global generators too: Stable-Baselines3 draws from those).
        tensorboard_log: Directory to log to.
        overrides: Arguments of the algorithm, in place of the settings.

    Raises:
        UnknownName: If Stable-Baselines3 has no such algorithm.
    """
    found = getattr(stable_baselines3, algorithm, None)
    if not (isinstance(found, type) and issubclass(found, BaseAlgorithm)):
        raise UnknownName("algorithm", algorithm, ALGORITHMS)
    settings = ppo_settings(task) if algorithm == "PPO" else {}
    settings = {"device": "cpu", **settings, **overrides}
    return found("MlpPolicy", env, seed=seed, tensorboard_log=tensorboard_log, **settings)
