"""The learned reward in the place of the task's own, for any Stable-Baselines3 algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from experiments.training.clip_buffer import History
from rewardmodels import Clips, RewardModel

Array = NDArray[Any]
RewardFunction = Callable[[Array, Array], Array]
"""From observations `(B, *obs)` and the actions `(B, *act)` that led to them, rewards `(B,)`."""


def zero_reward(observations: Array, actions: Array) -> Array:
    """The arm that shows what an agent does for no reason at all."""
    return np.zeros(len(observations), np.float32)


def constant_reward(observations: Array, actions: Array) -> Array:
    """The arm that is paid the same for everything: where episodes have one length, for nothing."""
    return np.ones(len(observations), np.float32)


class RandomReward:
    """The arm that is paid by chance: standard normal, whatever it does.

    Args:
        seed: Of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, observations: Array, actions: Array) -> Array:
        return self._rng.standard_normal(len(observations), np.float32)


def unlearned_reward(name: str, seed: int) -> RewardFunction | None:
    """What an agent is paid that learns no reward, or that hasn't learned one yet.

    Args:
        name: Of `experiments.training.config.RewardName`.
        seed: Of a random one.

    Returns:
        None for the task's own; nothing is paid while there is none to pay for.
    """
    if name == "task":
        return None
    if name == "random":
        return RandomReward(seed)
    return constant_reward if name == "constant" else zero_reward


class LearnedReward:
    r"""$a (\mu - \kappa \sigma) + b$: a model's reward, less what it doesn't know.

    Comparisons fix neither the scale of a reward nor its zero: a and b are free.

    Args:
        model: A fitted model.
        pessimism: $\kappa$, how many standard deviations are taken off.
        scale: a.
        shift: b.
    """

    def __init__(
        self, model: RewardModel, pessimism: float = 0.0, scale: float = 1.0, shift: float = 0.0
    ) -> None:
        self.model, self.pessimism = model, pessimism
        self.scale, self.shift = scale, shift

    def __call__(self, observations: Array, actions: Array) -> Array:
        belief = self.model.frame_posterior(
            torch.from_numpy(observations), torch.from_numpy(actions)
        )
        reward = belief.mean
        if self.pessimism:
            reward = reward - self.pessimism * belief.variance.sqrt()
        paid: Array = self.scale * reward.cpu().numpy() + self.shift
        return paid

    def moments(self, clips: Clips) -> tuple[float, float]:
        """Mean and standard deviation of what the clips' frames are paid."""
        observations, actions = (x.flatten(0, 1) for x in (clips.observations, clips.actions))
        paid = self(observations.numpy(), actions.numpy())
        return float(paid.mean()), float(paid.std())

    def anchored(self, clips: Clips, mean: float = 0.0, std: float = 1.0) -> LearnedReward:
        """The same reward with a and b such that the clips' frames have this mean and this std.

        At first these are 0 and 1 (Christiano et al. 2017, §2.2.1, normalise to zero mean and
        constant standard deviation). At a refit they are what the reward before had there: else
        each refit moves the value of all states, and while the critic follows, the clipping of
        its large gradients holds the policy back.
        """
        plain = LearnedReward(self.model, self.pessimism)
        raw_mean, raw_std = plain.moments(clips)
        scale = std / max(raw_std, 1e-6)
        return LearnedReward(self.model, self.pessimism, scale, mean - scale * raw_mean)


class RewardWrapper(VecEnvWrapper):
    """Pays `reward` for each step in place of the task's own, and records what happened.

    A frame is an action and the observation that it led to. Tasks pay for what an action brings
    about: HalfCheetah's reward correlated 0.86 with one learned from such frames, and 0.60 where
    the frame held the observation before the action (400 comparisons).

    Attributes:
        reward: What is paid; None for the task's own. May be replaced at any time.
        episode_returns: `(task's own, paid)` returns of episodes ended since last emptied.
    """

    def __init__(self, venv: VecEnv, history: History, reward: RewardFunction | None) -> None:
        super().__init__(venv)
        self.history, self.reward = history, reward
        self.episode_returns: list[tuple[float, float]] = []
        self._sums = np.zeros((2, self.num_envs))

    def reset(self) -> Any:
        """As the environments' own."""
        self._sums[:] = 0
        self.history.break_off()
        return self.venv.reset()

    def step_async(self, actions: Array) -> None:
        """As the environments' own."""
        # A choice stays a whole number.
        kind = np.int64 if isinstance(self.action_space, spaces.Discrete) else np.float32
        self._action: NDArray[np.floating | np.integer] = np.array(actions, dtype=kind)
        self._states = self.venv.states() if hasattr(self.venv, "states") else None
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """As the environments' own, but for the reward."""
        observations, task_rewards, ends, infos = self.venv.step_wait()
        led_to = cast(Array, observations)  # the tasks' are arrays, never dicts
        if ends.any():
            led_to = led_to.copy()
            for copy in np.flatnonzero(ends):
                led_to[copy] = infos[copy]["terminal_observation"]
        rewards = task_rewards
        if self.reward is not None:
            rewards = self.reward(led_to, self._action)
        self.history.add(led_to, self._action, task_rewards, ends, self._states)
        self._sums += task_rewards, rewards
        if ends.any():
            self.episode_returns += [(float(a), float(b)) for a, b in self._sums[:, ends].T]
            self._sums[:, ends] = 0
        return observations, rewards, ends, infos


def relabel(agent: OffPolicyAlgorithm, reward: RewardFunction, *, at_once: int = 65536) -> None:
    """Pays a replay buffer anew, as a changed reward makes every stored one stale.

    Args:
        agent: An off-policy algorithm with some transitions in its buffer.
        reward: What is paid now.
        at_once: Transitions per call of `reward`.
    """
    buffer = agent.replay_buffer
    assert buffer is not None
    size = buffer.size()
    if size == 0:  # before the first step
        return
    observations = buffer.next_observations[:size].reshape(-1, *buffer.obs_shape)
    actions = buffer.actions[:size].reshape(len(observations), -1)
    if isinstance(agent.action_space, spaces.Discrete):
        actions = actions[:, 0].astype(np.int64)
    else:
        actions = agent.policy.unscale_action(actions).astype(np.float32)
    paid = [
        reward(observations[i : i + at_once], actions[i : i + at_once])
        for i in range(0, len(observations), at_once)
    ]
    buffer.rewards[:size] = np.concatenate(paid).reshape(size, -1)
