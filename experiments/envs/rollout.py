"""Whole episodes of a policy, many at once; every episode of an environment has the same length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from experiments.envs.tasks import Task
from experiments.envs.vector import make_vec_env
from ood.features import Features, find_features
from rewardmodels import Clips, InvalidInput

Array = NDArray[Any]
Policy = Callable[[Array, Array], Array]
"""From observations `(N, *obs)` and standard normal noise `(N, *act)` to actions `(N, *act)`."""

_AT_ONCE = 32  # above that the policy's share of a step is small
_BATCH = 100


@dataclass(frozen=True, eq=False)
class Episodes:
    """N whole episodes of T steps.

    Attributes:
        first: `(N, *obs)`, observations of the resets.
        observations: `(N, T, *obs)`, each after the action.
        actions: `(N, T, *act)`.
        rewards: `(N, T)`, the task's own.
        states: `(N, T, s)`, simulator states before acting; None where there are none.
    """

    first: Array
    observations: Array
    actions: Array
    rewards: NDArray[np.float64]
    states: Array | None = None

    def __getitem__(self, rows: slice) -> Episodes:
        columns = (getattr(self, field.name) for field in fields(Episodes))
        return Episodes(*(None if x is None else x[rows] for x in columns))  # type: ignore[arg-type]

    def features(self, features: str | Features = "transition") -> list[Tensor]:
        """Features of each episode's frames, N of `(T, F)`, as a detector of `ood` takes them.

        Args:
            features: A name in `ood.features.FEATURES`, or a function.
        """
        n, steps = self.rewards.shape
        before = np.concatenate([self.first[:, None], self.observations[:, :-1]], 1)
        frames = [
            x.reshape(n * steps, *x.shape[2:]) for x in (before, self.actions, self.observations)
        ]
        found = find_features(features)(*frames)
        return list(torch.from_numpy(found.reshape(n, steps, -1)))

    def clips(self) -> Clips:
        """Return the episodes as N clips, in single precision."""
        states = None if self.states is None else _tensor(self.states)
        observations, actions = _tensor(self.observations), _tensor(self.actions)
        return Clips(observations, actions, rewards=_tensor(self.rewards), states=states)


class SeededEnvs:
    """Environments that step together, each reset with a seed of its own.

    Args:
        envs: Of one kind.
        seeds: One for each.
    """

    def __init__(self, envs: Sequence[gym.Env[Any, Any]], seeds: Sequence[int]) -> None:
        self.envs, self.seeds = envs, seeds

    def reset(self) -> Array:
        """Reset all; return the observations `(N, *obs)`."""
        pairs = zip(self.envs, self.seeds, strict=True)
        return np.stack([env.reset(seed=seed)[0] for env, seed in pairs])

    def step(self, actions: Array) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Step all, as a vector environment of Stable-Baselines3 does."""
        steps = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        observations = np.stack([x[0] for x in steps])
        ends = np.array([x[2] or x[3] for x in steps])
        infos = [{"terminal_observation": x} for x in observations]
        return observations, np.array([float(x[1]) for x in steps]), ends, infos


def rollout(envs: Any, act: Callable[[Array, int], Array]) -> Episodes:
    """Play one whole episode in each environment.

    Args:
        envs: A vector environment of `make_vec_env`, or `SeededEnvs`.
        act: From observations `(N, *obs)` and the step to actions `(N, *act)`.
    """
    first = before = np.asarray(envs.reset())
    steps: list[tuple[Any, ...]] = []
    ended = False
    while not ended:
        actions = act(before, len(steps))
        states = envs.states() if hasattr(envs, "states") else None
        after, rewards, ends, infos = envs.step(actions)
        ended = bool(ends[0])
        before = np.stack([info["terminal_observation"] for info in infos]) if ended else after
        steps.append((before, actions, rewards, states))
    columns = zip(*steps, strict=True)
    return Episodes(first, *(None if c[0] is None else np.stack(c, 1) for c in columns))  # type: ignore[arg-type]


def play(
    make: Callable[[], gym.Env[Any, Any]],
    policy: Policy,
    episodes: int,
    seed: int,
    *,
    first: int = 0,
    halts: Sequence[float] | Array | None = None,
) -> Episodes:
    """Play episodes, of which number i has the i-th of the seed's first states and noise.

    So two environments can be compared on the same episodes, and an episode doesn't depend on how
    many are played.

    Args:
        make: Makes the environment.
        policy: Acts.
        episodes: Number of episodes.
        seed: Of all of them.
        first: Number of the first.
        halts: For each episode the step from which on it is halted, as by `ood.Guard`: zeros
            replace the actions. Infinity never halts.

    Raises:
        InvalidInput: Less than one episode, or another number of halts.

    Example:
        >>> from experiments.envs.tasks import find_task, make_env
        >>> pendulum = lambda: make_env(find_task("Pendulum"))
        >>> episodes = play(pendulum, lambda observations, noise: noise, 3, seed=0)
        >>> len(episodes.features()), episodes.features()[0].shape, episodes.rewards.shape
        (3, torch.Size([200, 7]), (3, 200))
    """
    if episodes < 1:
        raise InvalidInput(f"episodes: expected at least one, got {episodes}.")
    halting = np.full(episodes, np.inf) if halts is None else np.asarray(halts, np.float64)
    if len(halting) != episodes:
        raise InvalidInput(
            f"halts: expected one for each of {episodes} episodes, got {len(halting)}."
        )
    envs = [make() for _ in range(min(episodes, _AT_ONCE))]
    shape, parts = envs[0].action_space.shape or (), []
    for start in range(0, episodes, _AT_ONCE):
        numbers = range(first + start, first + min(start + _AT_ONCE, episodes))
        states = [np.random.SeedSequence([seed, n]).generate_state(2) for n in numbers]
        draws = [np.random.default_rng(int(noise)) for _, noise in states]

        def act(observations: Array, step: int, draws: Any = draws, start: int = start) -> Array:
            noise = np.stack([draw.standard_normal(shape) for draw in draws])
            actions = policy(observations, noise)
            actions[halting[start : start + len(draws)] <= step] = 0
            return actions

        seeds = [int(reset) for reset, _ in states]
        parts.append(rollout(SeededEnvs(envs[: len(seeds)], seeds), act))
    for env in envs:
        env.close()
    return _cat(parts)


def play_batch(task: Task, policy: Policy, episodes: int, seed: int) -> Episodes:
    """Play episodes of a task in the fastest vector environment there is."""
    draw, parts, left = np.random.default_rng(seed), [], episodes
    while left > 0:
        n = min(_BATCH, left)
        left -= n
        with closing(make_vec_env(task, n, int(draw.integers(2**30)))) as envs:
            shape = (n, *(envs.action_space.shape or ()))
            parts.append(rollout(envs, lambda x, _: policy(x, draw.standard_normal(shape))))  # noqa: B023
    return _cat(parts)


def play_agent(
    agent: BaseAlgorithm, normalised: VecNormalize, task: Task, *, episodes: int, seed: int
) -> Clips:
    """Play episodes of an agent that explores, as in training, all at once.

    The agent draws from the global generators; the seed decides the first states. `normalised`
    holds the statistics by which the agent's inputs are normalised.

    Returns:
        Clips with the task's own reward and, where there are any, simulator states.
    """

    def act(observations: Array, step: int) -> Array:
        if getattr(agent, "use_sde", False) and step % agent.sde_sample_freq == 0:
            policy: Any = agent.policy
            policy.reset_noise(episodes)  # which `predict` doesn't do
        inputs: Any = normalised.normalize_obs(observations)
        return agent.predict(inputs)[0]

    with closing(make_vec_env(task, episodes, seed)) as envs:
        return rollout(envs, act).clips()


def _cat(parts: Sequence[Episodes]) -> Episodes:
    columns = zip(*([getattr(p, f.name) for f in fields(Episodes)] for p in parts), strict=True)
    return Episodes(*(None if c[0] is None else np.concatenate(c) for c in columns))  # type: ignore[arg-type]


def _tensor(values: Array) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.float() if tensor.is_floating_point() else tensor
