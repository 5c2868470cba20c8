"""The learned reward in any training loop: NumPy, Gymnasium, Stable-Baselines3 and imitation.

A frame is an action and the observation *after* it, so that the reward of an episode's last step is
that of its last observation, never of the first one of the next episode.

This module imports Stable-Baselines3, and `import rewardmodels` doesn't.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.errors import require
from rewardmodels.model import RewardModel
from rewardmodels.posterior import ReturnPosterior
from rewardmodels.scoring import FrameScorer

Array = NDArray[Any]
RewardFunction = Callable[[Array, Array], Array]
"""Maps observations `(B, *obs)` and the actions `(B, *act)` before them to rewards `(B,)`."""


class HasFramePosterior(Protocol):
    """Model of a reward: a fitted `RewardModel` or a `Calibrated` one."""

    def frame_posterior(self, observations: Tensor, actions: Tensor) -> ReturnPosterior:
        """Joint posterior over the rewards of B frames."""


class LearnedReward:
    r"""Reward of frames on NumPy arrays, $a (\mu - \kappa \sigma) + b$, for any loop.

    $\mu$ and $\sigma$ are the posterior mean and standard deviation. Comparisons fix neither the
    scale of a reward nor its zero: a and b are free (see `rescaled`).

    Args:
        model: A fitted model, a calibrated one, or a model's `frame_scorer()`: a snapshot that
            takes a tenth of the time for a single frame.
        pessimism: $\kappa$, standard deviations subtracted.
        scale: a.
        shift: b.

    Raises:
        NotFitted: The model isn't fitted.
        InvalidInput: A number that isn't finite.

    Example:
        >>> from rewardmodels import Calibrated, Comparisons, DeepEnsemble, fit
        >>> clips = Clips(torch.randn(80, 5, 3), torch.randn(80, 5, 1))
        >>> comparisons = Comparisons(clips, torch.arange(80).view(40, 2), torch.ones(40))
        >>> model = fit(DeepEnsemble(members=3), comparisons[:10], epochs=1)
        >>> calibrated = Calibrated(model).calibrate(comparisons[10:], random=True)
        >>> reward = LearnedReward(calibrated, pessimism=1.0)
        >>> reward(np.zeros((7, 3)), np.zeros((7, 1))).shape
        (7,)
    """

    def __init__(
        self,
        model: HasFramePosterior | FrameScorer,
        pessimism: float = 0.0,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        for name, value in (("pessimism", pessimism), ("scale", scale), ("shift", shift)):
            require(name, math.isfinite(value), "a finite number", value)
        if isinstance(model, RewardModel):
            model.check_fitted()
        self.model, self.pessimism = model, pessimism
        self.scale, self.shift = scale, shift

    def __call__(self, observations: ArrayLike, actions: ArrayLike) -> Array:
        """Rewards `(B,)` of observations `(B, *obs)` and the actions `(B, *act)` before them.

        Raises:
            InvalidInput: Frames of other shapes than the model's, or that aren't finite numbers.
        """
        if isinstance(self.model, FrameScorer):
            mean, std = self.model.batch(observations, actions)
            return self.scale * (mean - self.pessimism * std) + self.shift
        frames = _tensor("observations", observations), _tensor("actions", actions)
        posterior = self.model.frame_posterior(*frames)
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


class LearnedRewardWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """Gymnasium wrapper that replaces the environment's reward by a learned one.

    The environment's own reward of a step is in `info["task_reward"]`. The wrapper has to see
    observations like those that were compared: put what changes them (a normalisation, say) around
    it.

    Args:
        env: Environment whose observations and actions are arrays or numbers.
        reward: A fitted or calibrated model, a `LearnedReward` (with pessimism, say), or any other
            function of observations and actions.

    Attributes:
        reward: The function in use; may be replaced at any time, as after a refit.

    Raises:
        InvalidInput: Observations or actions of another kind, or no reward.
        NotFitted: The model isn't fitted.

    Example:
        >>> from rewardmodels import Comparisons, DeepEnsemble, fit
        >>> clips = Clips(torch.randn(20, 5, 3), torch.randn(20, 5, 1))
        >>> comparisons = Comparisons(clips, torch.arange(20).view(10, 2), torch.ones(10))
        >>> model = fit(DeepEnsemble(members=3), comparisons, epochs=1)
        >>> env = LearnedRewardWrapper(gym.make("Pendulum-v1"), LearnedReward(model, pessimism=1.0))
        >>> _ = env.reset(seed=0)
        >>> observation, reward, *_, info = env.step(env.action_space.sample())
        >>> type(reward).__name__, info["task_reward"] < 0
        ('float', True)
    """

    def __init__(self, env: gym.Env[Any, Any], reward: RewardFunction | HasFramePosterior) -> None:
        super().__init__(env)
        _check_spaces(env)
        # For one frame at a time the snapshot is quicker.
        self.reward = _function(
            reward.frame_scorer() if isinstance(reward, RewardModel) else reward
        )

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As `gymnasium.Env.step`, with the learned reward."""
        observation, task_reward, terminated, truncated, info = self.env.step(action)
        rewards = _rewards(self.reward, np.asarray(observation)[None], np.asarray(action)[None])
        info = {**info, "task_reward": float(task_reward)}
        return observation, float(rewards[0]), terminated, truncated, info


class VecLearnedReward(VecEnvWrapper):
    """Stable-Baselines3 wrapper that replaces the reward of n environments by a learned one.

    Stable-Baselines3 resets an environment in the step that ends its episode; the reward of that
    step is of its `terminal_observation`. Put `VecNormalize` around it, not below: the model was
    trained on observations as they are.

    Most tasks reward what an action brings about: HalfCheetah's reward correlated 0.86 with one
    learned from frames with the observation after the action, and 0.60 where it was the one before
    (400 comparisons).

    Args:
        venv: Environments whose observations and actions are arrays or numbers.
        reward: As of `LearnedRewardWrapper`; None for the task's own.

    Attributes:
        reward: The function in use, or None; may be replaced at any time, as after a refit.
        true_observations: `(n, *obs)`, observations after the latest step, before any reset.
        taken_actions: `(n, *act)`, actions of the latest step.
        task_rewards: `(n,)`, the task's own rewards of the latest step.

    Raises:
        InvalidInput: Observations or actions of another kind, or no reward.
        NotFitted: The model isn't fitted.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from stable_baselines3.common.env_util import make_vec_env
        >>> from stable_baselines3.common.vec_env import VecNormalize
        >>> from rewardmodels import Comparisons, DeepEnsemble, fit
        >>> clips = Clips(torch.randn(20, 5, 3), torch.randn(20, 5, 1))
        >>> comparisons = Comparisons(clips, torch.arange(20).view(10, 2), torch.ones(10))
        >>> model = fit(DeepEnsemble(members=3), comparisons, epochs=1)
        >>> venv = VecLearnedReward(make_vec_env("Pendulum-v1", 2), model)
        >>> agent = PPO("MlpPolicy", VecNormalize(venv), n_steps=32, device="cpu").learn(64)
    """

    true_observations: Array
    taken_actions: Array
    task_rewards: Array

    def __init__(self, venv: VecEnv, reward: RewardFunction | HasFramePosterior | None) -> None:
        super().__init__(venv)
        _check_spaces(venv)
        self.reward = None if reward is None else _function(reward)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_async(self, actions: Array) -> None:
        # A choice stays a whole number.
        kind = np.int64 if isinstance(self.action_space, spaces.Discrete) else np.float32
        self.taken_actions = np.array(actions, dtype=kind)
        # As the reward sees it, to the last bit.
        self.venv.step_async(self.taken_actions.astype(self.action_space.dtype, copy=False))

    def step_wait(self) -> VecEnvStepReturn:
        observations, self.task_rewards, ends, infos = self.venv.step_wait()
        after = cast(Array, observations)
        if ends.any():
            after = after.copy()
            for copy in np.flatnonzero(ends):
                after[copy] = infos[copy]["terminal_observation"]
        self.true_observations, rewards = after, self.task_rewards
        if self.reward is not None:
            rewards = _rewards(self.reward, after, self.taken_actions)
        return observations, rewards, ends, infos


def imitation_reward(
    reward: RewardFunction | HasFramePosterior,
) -> Callable[[Array, Array, Array, Array], Array]:
    """Make a reward function as the package imitation calls it, from a learned reward.

    Args:
        reward: As of `LearnedRewardWrapper`.

    Returns:
        A function of `(state, action, next_state, done)`, arrays of B transitions, that returns
        rewards `(B,)`: of `next_state` and `action`, since a frame is an action and the observation
        after it. imitation's own `RewardVecEnvWrapper` takes it as `reward_fn`.

    Raises:
        InvalidInput: Neither a model nor a function.
        NotFitted: The model isn't fitted.

    Example:
        >>> from rewardmodels import Comparisons, DeepEnsemble, fit
        >>> clips = Clips(torch.randn(20, 5, 3), torch.randn(20, 5, 1))
        >>> comparisons = Comparisons(clips, torch.arange(20).view(10, 2), torch.ones(10))
        >>> reward_fn = imitation_reward(fit(DeepEnsemble(members=3), comparisons, epochs=1))
        >>> reward_fn(np.zeros((7, 3)), np.zeros((7, 1)), np.ones((7, 3)), np.zeros(7, bool)).shape
        (7,)
    """
    function = _function(reward)

    def reward_fn(state: Array, action: Array, next_state: Array, done: Array) -> Array:
        return _rewards(function, next_state, action)

    return reward_fn


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


def _function(reward: Any) -> RewardFunction:
    """Reward function of a model; a function is returned as it is."""
    if isinstance(reward, FrameScorer) or hasattr(reward, "frame_posterior"):
        return LearnedReward(reward)
    require("reward", callable(reward), "a fitted model or a function", type(reward).__name__)
    function: RewardFunction = reward
    return function


def _rewards(reward: RewardFunction, observations: Array, actions: Array) -> Array:
    rewards, shape = np.asarray(reward(observations, actions)), observations.shape[:1]
    require("reward", rewards.shape == shape, f"a function to rewards {shape}", rewards.shape)
    return rewards


def _check_spaces(env: gym.Env[Any, Any] | VecEnv) -> None:
    for name in ("observation_space", "action_space"):
        space = getattr(env, name)
        valid = not isinstance(space, spaces.Dict | spaces.Tuple)
        require("env", valid, f"an {name} of arrays or numbers", space)


def _tensor(name: str, value: ArrayLike) -> Tensor:
    array = np.array(value, order="C")  # a copy, since torch takes no negative strides
    valid = array.ndim > 0 and array.dtype.kind in "fiub"
    require(name, valid, "numbers with B as first axis", f"shape {array.shape} of {array.dtype}")
    return torch.from_numpy(array)
