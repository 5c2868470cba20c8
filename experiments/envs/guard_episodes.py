"""Whole episodes for guards: many at once, each from its own seed, in whatever world they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from experiments.envs.tasks import Task
from experiments.envs.vector import make_vec_env
from experiments.training.agents import PPO_ENVS, make_agent
from ood.features import Features, find_features, transition
from rewardmodels import InvalidInput
from rewardmodels.fitting import isolated_randomness
from rewardmodels.saving import atomic_path

Array = NDArray[Any]
Act = Callable[[Array, Array], Array]
"""From observations `(N, *obs)` and standard normal numbers `(N, *act)` to actions `(N, *act)`."""

_TOGETHER = 32  # past that the policy's share of a step is small


class Episodes(NamedTuple):
    """N whole episodes of T steps.

    Attributes:
        features: N, each `(T, F)`, by default of transitions.
        rewards: `(N, T)`, the task's own.
    """

    features: list[Tensor]
    rewards: NDArray[np.float64]

    def part(self, first: int, last: int) -> Episodes:
        """Those from `first` up to `last`."""
        return Episodes(self.features[first:last], self.rewards[first:last])


def play(
    make: Callable[[], gym.Env[Any, Any]],
    act: Act,
    episodes: int,
    seed: int,
    *,
    first: int = 0,
    features: str | Features = "transition",
    halts: Sequence[float] | Array | None = None,
) -> Episodes:
    """Plays whole episodes, of which number i has the i-th of the seed's first states and chances.

    So two worlds may be compared on the same episodes, and an episode doesn't depend on how many
    are played.

    Args:
        make: An environment; every episode of it has the same length.
        act: Who acts.
        episodes: How many.
        seed: Of all of them.
        first: Number of the first.
        features: A name of `ood.features.FEATURES`, or a function.
        halts: Of each episode, the step from which on it is halted, as by `ood.Guard`: zeros take
            the place of the actions. Infinity never halts; None halts no episode.

    Raises:
        InvalidInput: Less than one episode, or halts of another number.

    Example:
        >>> from experiments.envs.tasks import find_task, make_env
        >>> played = play(
        ...     lambda: make_env(find_task("Pendulum")), lambda seen, noise: noise, 3, seed=0
        ... )
        >>> len(played.features), played.features[0].shape, played.rewards.shape
        (3, torch.Size([200, 7]), (3, 200))
    """
    if episodes < 1:
        raise InvalidInput(f"episodes: expected at least one, got {episodes}.")
    if halts is not None and len(halts) != episodes:
        raise InvalidInput(
            f"halts: expected one for each of {episodes} episodes, got {len(halts)}."
        )
    ends = np.full(episodes, np.inf) if halts is None else np.asarray(halts, np.float64)
    see = find_features(features)
    envs = [make() for _ in range(min(episodes, _TOGETHER))]
    played, gains = [], []
    for start in range(first, first + episodes, _TOGETHER):
        numbers = range(start, min(start + _TOGETHER, first + episodes))
        halt = ends[start - first :][: len(numbers)]
        seen, paid = _play_together(envs[: len(numbers)], act, seed, numbers, see, halt)
        played += seen
        gains.append(paid)
    for env in envs:
        env.close()
    return Episodes(played, np.concatenate(gains))


def _play_together(
    envs: list[gym.Env[Any, Any]], act: Act, seed: int, numbers: range, see: Features, halt: Array
) -> tuple[list[Tensor], Array]:
    draws, first = [], []
    for env, number in zip(envs, numbers, strict=True):
        states = np.random.SeedSequence([seed, number]).generate_state(2)
        first.append(env.reset(seed=int(states[0]))[0])
        draws.append(np.random.default_rng(int(states[1])))
    before, ended = np.stack(first), False
    shape = envs[0].action_space.shape or ()
    steps: list[Array] = []
    gains: list[list[float]] = []
    while not ended:
        actions = act(before, np.stack([draw.standard_normal(shape) for draw in draws]))
        actions[halt <= len(steps)] = 0
        moved = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        after = np.stack([x[0] for x in moved])
        steps.append(see(before, actions, after))
        gains.append([float(x[1]) for x in moved])
        before, ended = after, bool(moved[0][2] or moved[0][3])
    every = torch.from_numpy(np.stack(steps, 1))
    return list(every), np.array(gains).T


def train(task: Task, steps: int, file: Path) -> None:
    """Trains PPO on the task's own reward, and writes its policy and how it sees."""
    torch.set_num_threads(1)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        isolated_randomness(0),
        closing(VecNormalize(make_vec_env(task, PPO_ENVS, 0))) as normalised,
    ):
        agent = make_agent("PPO", normalised, task, 0)
        if steps:
            agent.learn(steps)
        seen: Any = normalised.obs_rms
        tensors = {f"policy.{name}": value for name, value in agent.policy.state_dict().items()}
        tensors |= {"mean": torch.from_numpy(seen.mean), "var": torch.from_numpy(seen.var)}
        with atomic_path(file) as temporary:
            save_file(tensors, temporary)


def load_policy(task: Task, file: Path) -> Act:
    """What `train` wrote; it explores, as in training."""
    tensors = load_file(file)
    with isolated_randomness(0), closing(VecNormalize(make_vec_env(task, 1, 0))) as normalised:
        agent = make_agent("PPO", normalised, task, 0)
    seen: Any = normalised.obs_rms
    seen.mean, seen.var = (tensors.pop(name).numpy() for name in ("mean", "var"))
    agent.policy.load_state_dict({k.removeprefix("policy."): v for k, v in tensors.items()})
    policy: Any = agent.policy
    space: Any = agent.action_space
    spread = policy.log_std.detach().exp().numpy()

    def act(observations: Array, noise: Array) -> Array:
        inputs: Any = normalised.normalize_obs(observations.astype(np.float32))
        with torch.no_grad():
            mean = policy.get_distribution(torch.from_numpy(inputs)).distribution.mean.numpy()
        return np.clip(mean + spread * noise, space.low, space.high).astype(space.dtype)

    return act


def acting(agent: BaseAlgorithm, normalised: VecNormalize) -> Act:
    """Any of Stable-Baselines3's agents, which explores, as in training, by its own chance.

    Args:
        agent: Who acts; it draws from PyTorch's global generator.
        normalised: Holds the statistics by which the agent's inputs were normalised.
    """

    def act(observations: Array, noise: Array) -> Array:
        inputs: Any = normalised.normalize_obs(observations.astype(np.float32))
        return agent.predict(inputs, deterministic=False)[0]

    return act


_IN_A_BATCH = 100


def play_batch(task: Task, act: Act, episodes: int, seed: int) -> list[Tensor]:
    """Transitions `(T, F)` of whole episodes, in the backend that is fastest."""
    draw = np.random.default_rng(seed)
    played: list[Tensor] = []
    while len(played) < episodes:
        together = min(_IN_A_BATCH, episodes - len(played))
        steps = []
        with closing(make_vec_env(task, together, int(draw.integers(2**30)))) as envs:
            before: Any = envs.reset()
            for _ in range(task.horizon):
                noise = draw.standard_normal((together, *(envs.action_space.shape or ())))
                actions = act(before, noise)
                stepped: Any = envs.step(actions)
                after, _, ended, infos = stepped
                led_to = (
                    np.stack([info["terminal_observation"] for info in infos])
                    if ended.all()
                    else after
                )
                steps.append(transition(before, actions, led_to))
                before = after
        played += list(torch.from_numpy(np.stack(steps, 1)))
    return played
