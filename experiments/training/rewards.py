"""The learned reward in place of the task's own, for any Stable-Baselines3 algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from experiments.training.clip_buffer import ClipBuffer
from rewardmodels import Clips, Comparisons, RewardModel, fit

Array = NDArray[Any]
RewardFunction = Callable[[Array, Array], Array]
"""Maps observations `(B, *obs)` and the actions `(B, *act)` before them to rewards `(B,)`."""


def zero_reward(observations: Array, actions: Array) -> Array:
    """Zero for every frame, a baseline; also what a run pays before its first fit."""
    return np.zeros(len(observations), np.float32)


def baseline_reward(name: str, seed: int) -> RewardFunction | None:
    """Return the reward of a baseline, or None for the task's own.

    Args:
        name: Of `experiments.training.config.RewardName`; `learned` gets zero until the first fit.
        seed: Of the random reward, standard normal draws.
    """
    if name == "task":
        return None
    if name == "constant":  # the return depends on an episode's length alone
        return lambda observations, actions: np.ones(len(observations), np.float32)
    draw = np.random.default_rng(seed)
    if name == "random":
        return lambda observations, actions: draw.standard_normal(len(observations), np.float32)
    return zero_reward


class LearnedReward:
    r"""$a (\mu - \kappa \sigma) + b$: a model's reward, less a multiple of its uncertainty.

    Comparisons fix neither the scale of a reward nor its zero: a and b are free.

    Args:
        model: A fitted model.
        pessimism: $\kappa$, standard deviations subtracted.
        scale: a.
        shift: b.
    """

    def __init__(
        self, model: RewardModel, pessimism: float = 0.0, scale: float = 1.0, shift: float = 0.0
    ) -> None:
        self.model, self.pessimism = model, pessimism
        self.scale, self.shift = scale, shift

    def __call__(self, observations: Array, actions: Array) -> Array:
        posterior = self.model.frame_posterior(
            torch.from_numpy(observations), torch.from_numpy(actions)
        )
        reward = posterior.mean
        if self.pessimism:
            reward = reward - self.pessimism * posterior.variance.sqrt()
        scaled: Array = self.scale * reward.cpu().numpy() + self.shift
        return scaled

    def moments(self, clips: Clips) -> tuple[float, float]:
        """Mean and standard deviation of the reward over the clips' frames."""
        observations, actions = (x.flatten(0, 1) for x in (clips.observations, clips.actions))
        rewards = self(observations.numpy(), actions.numpy())
        return float(rewards.mean()), float(rewards.std())

    def rescaled(self, clips: Clips, mean: float = 0.0, std: float = 1.0) -> LearnedReward:
        """Return the same reward with a and b such that the clips' frames have these moments.

        At first these are 0 and 1 (Christiano et al. 2017, §2.2.1, normalise to zero mean and
        constant standard deviation). At a refit they are the previous reward's: otherwise each
        refit shifts the value of all states, and while the critic follows, the clipping of its
        large gradients holds the policy back.
        """
        plain = LearnedReward(self.model, self.pessimism)
        plain_mean, plain_std = plain.moments(clips)
        scale = std / max(plain_std, 1e-6)
        return LearnedReward(self.model, self.pessimism, scale, mean - scale * plain_mean)


class RewardWrapper(VecEnvWrapper):
    """Replace the task's reward by `reward`, and record every frame.

    A frame is an action and the observation after it. Most tasks reward what an action brings
    about: HalfCheetah's reward correlated 0.86 with one learned from such frames, and 0.60 where
    the frame held the observation before the action (400 comparisons).

    Attributes:
        reward: What the agent gets; None for the task's own. May be replaced at any time.
        episode_returns: `(task's own, replaced)` returns of the episodes that ended since the list
            was last cleared.
    """

    def __init__(
        self, venv: VecEnv, clip_buffer: ClipBuffer, reward: RewardFunction | None
    ) -> None:
        super().__init__(venv)
        self.clip_buffer, self.reward = clip_buffer, reward
        self.episode_returns: list[tuple[float, float]] = []
        self._sums = np.zeros((2, self.num_envs))

    def refit(
        self, model: RewardModel, comparisons: Comparisons, clips: Clips, *,
        pessimism: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        """Fit a model, and replace the reward by its own, with the old one's moments on the clips.

        `options` are those of `rewardmodels.fit`; the old reward may be the same model's.
        """
        old = self.reward
        moments = old.moments(clips) if isinstance(old, LearnedReward) else (0.0, 1.0)
        fit(model, comparisons, **options)
        self.reward = LearnedReward(model, pessimism).rescaled(clips, *moments)

    def progress(self) -> dict[str, Any]:
        """Tensors and numbers from which `resume` goes on, with the same `clip_buffer`."""
        episodes = self.venv.episodes() if hasattr(self.venv, "episodes") else []
        return {"episodes": episodes, "returns": torch.from_numpy(self._sums.copy())}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on where `progress` was taken, by repeating the current episodes."""
        self._sums[:] = progress["returns"].numpy()
        venv: Any = self.venv
        if any(progress["episodes"]):
            venv.resume(progress["episodes"], self.clip_buffer.current_actions())

    def reset(self) -> Any:
        self._sums[:] = 0
        self.clip_buffer.end_episodes()
        return self.venv.reset()

    def step_async(self, actions: Array) -> None:
        # A choice stays a whole number.
        kind = np.int64 if isinstance(self.action_space, spaces.Discrete) else np.float32
        self._action: NDArray[np.floating | np.integer] = np.array(actions, dtype=kind)
        self._states = self.venv.states() if hasattr(self.venv, "states") else None
        # As it is recorded, so that `resume` repeats it to the last bit.
        self.venv.step_async(self._action.astype(self.action_space.dtype, copy=False))

    def step_wait(self) -> VecEnvStepReturn:
        observations, task_rewards, ends, infos = self.venv.step_wait()
        after = cast(Array, observations)  # the tasks' are arrays, never dicts
        if ends.any():
            after = after.copy()
            for copy in np.flatnonzero(ends):
                after[copy] = infos[copy]["terminal_observation"]
        rewards = task_rewards
        if self.reward is not None:
            rewards = self.reward(after, self._action)
        self.clip_buffer.add(after, self._action, task_rewards, ends, self._states)
        self._sums += task_rewards, rewards
        if ends.any():
            self.episode_returns += [(float(a), float(b)) for a, b in self._sums[:, ends].T]
            self._sums[:, ends] = 0
        return observations, rewards, ends, infos


def relabel(agent: OffPolicyAlgorithm, reward: RewardFunction, *, batch_size: int = 65536) -> None:
    """Recompute the rewards in a replay buffer, all of which a refit makes stale.

    `reward` is the new one, called with `batch_size` transitions at a time.
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
    rewards = [
        reward(observations[i : i + batch_size], actions[i : i + batch_size])
        for i in range(0, len(observations), batch_size)
    ]
    buffer.rewards[:size] = np.concatenate(rewards).reshape(size, -1)
