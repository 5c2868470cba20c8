"""Agents: Stable-Baselines3's algorithms, with settings that learn the tasks."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tqdm import tqdm

from experiments.envs.rollout import Array, Policy
from experiments.envs.tasks import Task
from experiments.envs.vector import make_vec_env
from rewardmodels.errors import InvalidInput, UnknownName
from rewardmodels.fitting import isolated_randomness
from rewardmodels.saving import atomic_path

PPO_ENVS = 32  # environments that PPO's settings were measured with
AGENT_FILE = "agent.pt"  # in a checkpoint: `training_state`, which runs no code when loaded
PPO_ROLLOUT = 2048  # steps between two updates, over all environments together

# On the tasks' own rewards these gave, as the mean return of the last 20 episodes (of 1000 steps,
# without termination), one number a seed:
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

# Settings that differ from task to task. A jump with a turn takes dozens of steps that go together:
# after 600,000 steps on a reward for turning in the air (one seed) a Hopper whose noise is drawn at
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
    """Return PPO's arguments for a task, with `PPO_ROLLOUT` steps per update.

    Example:
        >>> from experiments.envs.tasks import find_task
        >>> ppo_settings(find_task("Hopper"), n_envs=32)["n_steps"]
        64
    """
    return {"n_steps": max(1, PPO_ROLLOUT // n_envs), **_PPO, **PPO_SETTINGS.get(task.name, {})}


def make_agent(
    algorithm: str, env: VecEnv, task: Task, seed: int, **overrides: Any
) -> BaseAlgorithm:
    """Make an untrained agent of Stable-Baselines3, with settings that learn the task.

    Call `torch.set_num_threads(1)` before learning: these networks are too small to share, and
    two threads on two busy cores took ten times as long.

    Args:
        algorithm: Name of a class of `stable_baselines3`, such as `"PPO"` or `"SAC"`.
        env: The task's environments. PPO's settings are for `PPO_ENVS` of them, with observations
            and rewards normalised (`VecNormalize`).
        task: Determines the settings.
        seed: Of the networks, the actions and `env`. Stable-Baselines3 draws from the global
            generators of PyTorch, NumPy and Python, and sets all three.
        overrides: Arguments of the algorithm's class, in place of the settings'. `device` is
            the CPU by default: for networks this small a GPU is slower.

    Raises:
        UnknownName: Stable-Baselines3 has no such algorithm, or the algorithm no such argument.
        InvalidInput: The algorithm can't act in the task's action space.

    Example:
        >>> from experiments.envs.tasks import find_task
        >>> from experiments.envs.vector import make_vec_env
        >>> task = find_task("Pendulum")
        >>> agent = make_agent("PPO", make_vec_env(task, 4, seed=0), task, seed=0, gamma=0.9)
        >>> agent.gamma, agent.n_steps
        (0.9, 512)
    """
    exported = {name: getattr(stable_baselines3, name) for name in stable_baselines3.__all__}
    algorithms = [n for n, cls in exported.items() if hasattr(cls, "learn")]
    if algorithm not in algorithms:
        raise UnknownName("algorithm", algorithm, algorithms)
    cls = exported[algorithm]
    arguments = set(inspect.signature(cls).parameters)
    for name in overrides:
        if name not in arguments:
            raise UnknownName(f"{algorithm}'s argument", name, arguments)
    settings: dict[str, Any] = {}
    if algorithm == "PPO":
        settings = ppo_settings(task, env.num_envs)
    elif issubclass(cls, OffPolicyAlgorithm):
        # A gradient step for every transition, as with the single environment that
        # Stable-Baselines3's own settings were found with.
        settings = {"gradient_steps": -1, "learning_starts": 10 * task.horizon}
    try:
        return cls("MlpPolicy", env, seed=seed, **{"device": "cpu", **settings, **overrides})
    except AssertionError as error:
        # Stable-Baselines3's own check of the action space is an assert.
        raise InvalidInput(
            f"algorithm: expected one for {task.name}'s actions, {env.action_space}, got "
            f"{algorithm!r}: {error}"
        ) from error


@contextmanager
def ppo_on_own_reward(task: Task, seed: int) -> Iterator[tuple[BaseAlgorithm, VecNormalize]]:
    """Make an untrained PPO agent, and its environments with the task's own reward.

    Inside the block all is seeded and on one thread; after it the caller's global generators and
    number of threads are as before.
    """
    threads, python, numpy = torch.get_num_threads(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        torch.set_num_threads(1)
        with (
            isolated_randomness(seed),
            closing(VecNormalize(make_vec_env(task, PPO_ENVS, seed))) as normalised,
        ):
            yield make_agent("PPO", normalised, task, seed), normalised
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def progress_bar(steps: int, done: int = 0, *, show: bool = True) -> tqdm:
    """Make a progress bar of environment steps, for `train_until`."""
    return tqdm(
        total=steps, initial=done, unit=" steps", unit_scale=True, mininterval=1, disable=not show
    )


def train_until(agent: BaseAlgorithm, step: int, bar: tqdm) -> None:
    """Train an agent up to a step, and show how far it is."""

    def advance(*_: Any) -> bool:
        bar.update(min(agent.num_timesteps, bar.total) - bar.n)  # rollouts are whole
        return True

    if step > agent.num_timesteps:
        left = step - agent.num_timesteps
        agent.learn(left, callback=advance, reset_num_timesteps=False)


def train_agent(task: Task, steps: int, file: Path) -> None:
    """Train PPO on the task's own reward, and write its policy and observation statistics."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with ppo_on_own_reward(task, 0) as (agent, normalised):
        if steps:
            agent.learn(steps)
        moments: Any = normalised.obs_rms
        tensors = {f"policy.{name}": value for name, value in agent.policy.state_dict().items()}
        tensors |= {"mean": torch.from_numpy(moments.mean), "var": torch.from_numpy(moments.var)}
        with atomic_path(file) as temporary:
            save_file(tensors, temporary)


def restore_agent(agent: BaseAlgorithm, normalised: VecNormalize, file: Path) -> None:
    """Give an agent and its observation statistics the values that `train_agent` wrote."""
    tensors = load_file(file)
    moments: Any = normalised.obs_rms
    moments.mean, moments.var = (tensors.pop(name).numpy() for name in ("mean", "var"))
    agent.policy.load_state_dict({k.removeprefix("policy."): v for k, v in tensors.items()})


def load_policy(task: Task, file: Path) -> Policy:
    """Load the policy that `train_agent` wrote; it explores, as in training."""
    with isolated_randomness(0), closing(VecNormalize(make_vec_env(task, 1, 0))) as normalised:
        agent = make_agent("PPO", normalised, task, 0)
    restore_agent(agent, normalised, file)
    policy: Any = agent.policy
    space: Any = agent.action_space
    spread = policy.log_std.detach().exp().numpy()

    def act(observations: Array, noise: Array) -> Array:
        inputs: Any = normalised.normalize_obs(observations.astype(np.float32))
        with torch.no_grad():
            mean = policy.get_distribution(torch.from_numpy(inputs)).distribution.mean.numpy()
        return np.clip(mean + spread * noise, space.low, space.high).astype(space.dtype)

    return act


# What an algorithm counts or holds besides networks and their optimisers.
_COUNTERS = (
    *("num_timesteps", "_n_updates", "_episode_num", "_n_calls", "exploration_rate"),
    "_current_progress_remaining",
)
_LAST_STEP = ("_last_obs", "_last_original_obs", "_last_episode_starts")
_REPLAYED = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def training_state(agent: BaseAlgorithm, normalised: VecNormalize) -> dict[str, Any]:
    """Tensors and numbers from which `resume_training` goes on, without the replay buffer."""
    found = vars(agent)
    moments = (normalised.obs_rms, normalised.ret_rms)
    return {
        "parameters": agent.get_parameters(),
        "tensors": {k: v.detach() for k, v in found.items() if isinstance(v, torch.Tensor)},
        "counters": {k: found[k] for k in _COUNTERS if k in found},
        "last_step": {
            k: torch.from_numpy(found[k]) for k in _LAST_STEP if found.get(k) is not None
        },
        "moments": [_moments(each) for each in moments],
        "returns": torch.from_numpy(normalised.returns),
    }


def resume_training(agent: BaseAlgorithm, normalised: VecNormalize, state: dict[str, Any]) -> None:
    """Give an agent made with the same settings, and its environments, a `training_state`."""
    resume_policy(agent, normalised, state)
    agent.set_parameters(state["parameters"])
    for name, tensor in state["tensors"].items():
        getattr(agent, name).data.copy_(tensor)
    for name in _COUNTERS & state["counters"].keys():
        setattr(agent, name, type(getattr(agent, name))(state["counters"][name]))
    for name in _LAST_STEP & state["last_step"].keys():
        setattr(agent, name, state["last_step"][name].numpy())
    normalised.returns = state["returns"].numpy()


def resume_policy(agent: BaseAlgorithm, normalised: VecNormalize, state: dict[str, Any]) -> None:
    """Give an agent, and the statistics that its inputs are normalised by, those of a state."""
    policy: Any = agent.policy
    policy.load_state_dict(state["parameters"]["policy"])
    if agent.use_sde:
        policy.reset_noise()  # else of the weights before
    rms: Any
    for rms, (mean, var, count) in zip(
        (normalised.obs_rms, normalised.ret_rms), state["moments"], strict=True
    ):
        rms.mean, rms.var, rms.count = mean.numpy(), var.numpy(), float(count)


def _moments(rms: Any) -> list[torch.Tensor]:
    return [torch.as_tensor(x, dtype=torch.float64) for x in (rms.mean, rms.var, rms.count)]


def save_replay(agent: OffPolicyAlgorithm, file: Path) -> None:
    """Write the filled part of an agent's replay buffer to an `.npz` file."""
    buffer: Any = agent.replay_buffer
    rows = {name: getattr(buffer, name)[: buffer.size()] for name in _REPLAYED}
    np.savez(file, allow_pickle=False, pos=buffer.pos, full=buffer.full, **rows)


def load_replay(agent: OffPolicyAlgorithm, file: Path) -> None:
    """Fill an agent's replay buffer with what `save_replay` wrote."""
    buffer: Any = agent.replay_buffer
    with file.open("rb") as raw, np.load(raw, allow_pickle=False) as rows:
        buffer.pos, buffer.full = int(rows["pos"]), bool(rows["full"])
        for name in _REPLAYED:
            getattr(buffer, name)[: buffer.size()] = rows[name]


def exploring_policy(agent: BaseAlgorithm, normalised: VecNormalize) -> Policy:
    """Return an agent as a policy that explores, drawing from PyTorch's global generator.

    `normalised` holds the statistics by which the agent's inputs are normalised.
    """

    def act(observations: Array, noise: Array) -> Array:
        inputs: Any = normalised.normalize_obs(observations.astype(np.float32))
        return agent.predict(inputs, deterministic=False)[0]

    return act
