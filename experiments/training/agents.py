"""The agents of the studies: Stable-Baselines3's algorithms, with settings that learn the tasks."""

from __future__ import annotations

import inspect
from os import PathLike, fspath
from typing import Any

import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from experiments.envs.tasks import Task
from rewardmodels.errors import InvalidInput, UnknownName

# How many environments PPO's settings were measured with.
PPO_ENVS = 32

# Steps between two updates, over all environments together.
PPO_ROLLOUT = 2048

# On the tasks' own rewards these gave, as the mean return of the last 20 episodes (of 1000 steps,
# without termination), one figure a seed:
#
#                 300,000 steps           600,000 steps
#   HalfCheetah   1601, 1425              3459
#   Hopper        1131, 984, 859          2106
#   Walker2d      990, 709, 817           1751
#
# One seed each on HalfCheetah: n_epochs=5 with learning_rate=6e-4 did as well (1679 at 300,000) in
# 0.7 of the time; batch_size=512 with 6e-4, 1024 from 64 environments, and gamma=0.98 did worse.
_PPO: dict[str, Any] = {
    "batch_size": 256,
    "n_epochs": 10,
    "learning_rate": 3e-4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "ent_coef": 0.0,
    "policy_kwargs": {"log_std_init": -0.5, "net_arch": [64, 64]},
}

# What a task needs otherwise. A jump with a turn takes dozens of steps that go together: after
# 600,000 steps on a reward for turning in the air (one seed) a Hopper whose noise is drawn anew at
# each step had turned 0.6 times in 500 steps, and one whose noise is a function of the state, kept
# for 8 steps (Raffin et al. 2021, arXiv 2005.05719), 3.7 times.
PPO_SETTINGS: dict[str, dict[str, Any]] = {
    "backflip": {
        "use_sde": True,
        "sde_sample_freq": 8,
        "policy_kwargs": {"log_std_init": -1.0, "net_arch": [64, 64]},
    }
}


def ppo_settings(task: Task, n_envs: int = PPO_ENVS) -> dict[str, Any]:
    """PPO's arguments for a task: those that all tasks share, but for the task's own.

    `n_steps` is such that an update sees about as many steps, however many environments there
    are.

    Example:
        >>> from experiments.envs.tasks import find_task
        >>> ppo_settings(find_task("Hopper"), n_envs=32)["n_steps"]
        64
    """
    shared = {"n_steps": max(1, PPO_ROLLOUT // n_envs), **_PPO}
    return shared | PPO_SETTINGS.get(task.name, {})


def _off_policy_settings(task: Task) -> dict[str, Any]:
    return {
        # One gradient step for every transition, as with a single environment, which is what
        # Stable-Baselines3's own settings were found with.
        "gradient_steps": -1,
        "learning_starts": 10 * task.horizon,
    }


def make_agent(
    algorithm: str,
    env: VecEnv,
    task: Task,
    seed: int,
    tensorboard_log: str | PathLike[str] | None = None,
    **overrides: Any,
) -> BaseAlgorithm:
    """An agent that hasn't learned yet, with settings that learn the task.

    Call `torch.set_num_threads(1)` before learning: these networks are too small to share, and
    two threads on two busy cores took ten times as long.

    Args:
        algorithm: A class of `stable_baselines3` by its name, such as `"PPO"` or `"SAC"`.
        env: The task's environments. PPO's settings are for `PPO_ENVS` of them, with
            observations and rewards normalised (`VecNormalize`).
        task: Whose settings to take.
        seed: Of the networks, the actions and `env`. Stable-Baselines3 draws from the global
            generators of PyTorch, NumPy and Python, and sets all three.
        tensorboard_log: A directory for TensorBoard's logs; None keeps none.
        overrides: Arguments of the algorithm's class, in place of the settings'. `device` is
            the CPU otherwise: for networks this small a GPU is slower.

    Raises:
        UnknownName: If Stable-Baselines3 has no such algorithm, or the algorithm no such argument.
        InvalidInput: If the algorithm can't act in the task's action space.

    Example:
        >>> from experiments.envs.tasks import find_task
        >>> from experiments.envs.vector import make_vec_env
        >>> task = find_task("Pendulum")
        >>> agent = make_agent("PPO", make_vec_env(task, 4, seed=0), task, seed=0, gamma=0.9)
        >>> agent.gamma, agent.n_steps
        (0.9, 512)
    """
    found = getattr(stable_baselines3, algorithm, None)
    if not (isinstance(found, type) and issubclass(found, BaseAlgorithm)):
        raise UnknownName("algorithm", algorithm, _algorithms())
    arguments = set(inspect.signature(found).parameters)
    for name in overrides:
        if name not in arguments:
            raise UnknownName(f"{algorithm}'s argument", name, arguments)
    settings: dict[str, Any] = {}
    if algorithm == "PPO":
        settings = ppo_settings(task, env.num_envs)
    elif issubclass(found, OffPolicyAlgorithm):
        settings = _off_policy_settings(task)
    try:
        return found(
            "MlpPolicy",
            env,
            seed=seed,
            tensorboard_log=None if tensorboard_log is None else fspath(tensorboard_log),
            **{"device": "cpu", **settings, **overrides},
        )
    except AssertionError as error:
        # Stable-Baselines3's own check of the action space is an assert.
        raise InvalidInput(
            f"algorithm: expected one for {task.name}'s actions, {env.action_space}, got "
            f"{algorithm!r}: {error}"
        ) from error


def _algorithms() -> list[str]:
    classes = {name: getattr(stable_baselines3, name) for name in stable_baselines3.__all__}
    return [n for n, c in classes.items() if isinstance(c, type) and issubclass(c, BaseAlgorithm)]
