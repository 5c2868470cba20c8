"""Baseline rewards, and the wrapper by which a run replaces the task's reward and keeps frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from experiments.training.clip_buffer import ClipBuffer
from rewardmodels import Clips, Comparisons, RewardModel, fit
from rewardmodels.wrappers import Array, LearnedReward, RewardFunction, VecLearnedReward


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


class RewardWrapper(VecLearnedReward):
    """Replace the task's reward by `reward`, and record every frame.

    Attributes:
        episode_returns: `(task's own, replaced)` returns of the episodes that ended since the list
            was last cleared.
    """

    def __init__(
        self, venv: VecEnv, clip_buffer: ClipBuffer, reward: RewardFunction | None
    ) -> None:
        super().__init__(venv, reward)
        self.clip_buffer = clip_buffer
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
        return super().reset()

    def step_async(self, actions: Array) -> None:
        self._states = self.venv.states() if hasattr(self.venv, "states") else None
        super().step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, ends, infos = super().step_wait()
        self.clip_buffer.add(
            self.true_observations, self.taken_actions, self.task_rewards, ends, self._states
        )
        self._sums += self.task_rewards, rewards
        if ends.any():
            self.episode_returns += [(float(a), float(b)) for a, b in self._sums[:, ends].T]
            self._sums[:, ends] = 0
        return observations, rewards, ends, infos
