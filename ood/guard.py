"""Guards: wrappers that stop an agent which has left what its reward model or policy knows."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from ood.features import Features
from ood.keeper import Keeper
from ood.monitor import Monitor
from ood.rules import AlarmResponse
from rewardmodels import InvalidInput

Array = NDArray[Any]

_ALIVE = np.ones(1, bool)


class Guard(gym.Wrapper[Any, Any, Any, Any]):
    """Halts, asks, or lets another policy take over, once what happens is too strange.

    Each step's `info["guard"]` holds `score`, `statistic`, `threshold`, `alarm` (of this step),
    `acting` (who acts next: "agent", "halted", "waiting" or "fallback") and `reason`: in words,
    which detector and which numbers of the observation were strangest, or what failed; empty from
    the step after which the agent acts again. Where no alarm is raised, observations, rewards and
    ends are the environment's own, step for step.

    It fails safe. NaN or infinity in an observation, observations of another shape, a detector
    that isn't fitted, a threshold that isn't calibrated or belongs to another fit, a function of
    the caller's that raises, a log that can't be written: each halts the agent until the episode
    ends, and `reason` says why.

    Args:
        env: The environment; observations and actions are arrays.
        monitor: What raises alarms; calibrated on whole episodes of this environment, recorded
            with `ood.record_episodes` and the same features.
        features: What the detector sees of a step: "observation", "observation_action",
            "transition", or a function such as `ood.features.hidden(model)`.
        rules: What follows an alarm; None halts.

    Raises:
        InvalidInput: Observations or actions that aren't arrays, or no safe action.

    Example:
        >>> import torch
        >>> from ood import Mahalanobis, record_episodes
        >>> env = gym.make("Pendulum-v1", max_episode_steps=20)
        >>> act = lambda observation: np.zeros(1, np.float32)
        >>> episodes = record_episodes(env, act, 30, seed=0)
        >>> monitor = Monitor(Mahalanobis().fit(torch.cat(episodes[:10])))
        >>> threshold = monitor.calibrate(episodes[10:], alpha=0.1)
        >>> guard = Guard(env, monitor)
        >>> observation, info = guard.reset(seed=1)
        >>> *_, info = guard.step(np.zeros(1, np.float32))
        >>> info["guard"]["alarm"], info["guard"]["acting"]
        (False, 'agent')
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        monitor: Monitor,
        features: str | Features = "observation_action",
        rules: AlarmResponse | None = None,
    ) -> None:
        super().__init__(env)
        self.keeper = Keeper(
            1, monitor, features, env.observation_space, env.action_space, rules or AlarmResponse()
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As `gymnasium.Env.reset`; a guard that can't work is halted from here on."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.keeper.begin(np.asarray(observation)[None], np.ones(1, bool))
        return observation, {**info, "guard": self._info()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As `gymnasium.Env.step`, with the guard's action where the agent may not act."""
        proposed = np.asarray(action)[None]
        taken = self.keeper.actions(proposed)
        observation, reward, terminated, truncated, info = self.env.step(
            action if taken is proposed else taken[0]
        )
        self.keeper.observe(taken, np.asarray(observation)[None], _ALIVE)
        return observation, reward, terminated, truncated, {**info, "guard": self._info()}

    def answer(self, go_on: bool) -> None:
        """Answers what `ask` left open.

        Raises:
            InvalidInput: Nothing was asked.
        """
        self.keeper.answer(go_on)

    def _info(self) -> dict[str, Any]:
        keeper = self.keeper
        reading, threshold = keeper.reading, keeper.monitor.threshold
        return {
            "score": reading.score.item(),
            "statistic": reading.statistic.item(),
            "threshold": threshold.value if threshold else float("nan"),
            "alarm": reading.alarm.item(),
            "acting": keeper.acts(0),
            "reason": keeper.reasons[0],
        }


class VectorGuard(VectorWrapper[Any, Any, Any, Any, Any]):
    """`Guard` of n environments that step together; `info["guard"]` holds n of everything.

    Each environment is watched, halted and asked about alone. With Gymnasium's next-step autoreset
    the step that only resets is nobody's, and raises no alarm; with same-step autoreset an
    episode's last observation is taken from `info["final_obs"]`.

    Args:
        env: The environments.
        monitor: As for `Guard`.
        features: As for `Guard`.
        rules: As for `Guard`; functions are called for one environment at a time.

    Raises:
        InvalidInput: As for `Guard`, or environments that don't say how they reset themselves.

    Example:
        >>> from ood import Mahalanobis
        >>> envs = gym.make_vec("Pendulum-v1", 3, vectorization_mode="sync")
        >>> guard = VectorGuard(envs, Monitor(Mahalanobis()))  # not fitted
        >>> _, info = guard.reset(seed=0)
        >>> info["guard"]["acting"]
        ['halted', 'halted', 'halted']
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        monitor: Monitor,
        features: str | Features = "observation_action",
        rules: AlarmResponse | None = None,
    ) -> None:
        super().__init__(env)
        self.autoreset = env.metadata.get("autoreset_mode")
        if not isinstance(self.autoreset, AutoresetMode):
            raise InvalidInput(
                "env: expected metadata['autoreset_mode'] to be a gymnasium.vector.AutoresetMode, "
                f"got {self.autoreset!r}."
            )
        self.keeper = Keeper(
            env.num_envs,
            monitor,
            features,
            env.single_observation_space,
            env.single_action_space,
            rules or AlarmResponse(),
        )
        self.ended = np.zeros(env.num_envs, bool)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As `gymnasium.vector.VectorEnv.reset`, `reset_mask` among the options included."""
        observations, info = self.env.reset(seed=seed, options=options)
        mask = (options or {}).get("reset_mask")
        mask = np.ones(self.num_envs, bool) if mask is None else np.asarray(mask, bool)
        self.keeper.begin(np.asarray(observations), mask)
        self.ended = self.ended & ~mask
        return observations, {**info, "guard": self._info()}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As `gymnasium.vector.VectorEnv.step`, with the guard's actions where it acts."""
        proposed = np.asarray(actions)
        taken = self.keeper.actions(proposed)
        observations, rewards, terminated, truncated, info = self.env.step(
            actions if taken is proposed else taken
        )
        after, done = np.asarray(observations), np.asarray(terminated) | np.asarray(truncated)
        if self.autoreset == AutoresetMode.SAME_STEP and done.any():
            seen = after.copy()
            for i in np.flatnonzero(done):
                seen[i] = info["final_obs"][i]
            self.keeper.observe(taken, seen, np.ones(self.num_envs, bool))
            guard = self._info()
            self.keeper.begin(after, done)
            # The scores are those of the episode that ended; who acts next is the new one's.
            guard["acting"] = self.keeper.who
            for i in np.flatnonzero(done & (self.keeper.acting != 0)):
                guard["alarm"][i], guard["reason"][i] = True, self.keeper.reasons[i]
            return observations, rewards, terminated, truncated, {**info, "guard": guard}
        self.keeper.observe(taken, after, ~self.ended)
        if self.autoreset == AutoresetMode.NEXT_STEP and self.ended.any():
            self.keeper.begin(after, self.ended)
        self.ended = done
        return observations, rewards, terminated, truncated, {**info, "guard": self._info()}

    def answer(self, go_on: bool, environment: int) -> None:
        """Answers what `ask` left open about one environment.

        Raises:
            InvalidInput: Nothing was asked about it.
        """
        self.keeper.answer(go_on, environment)

    def _info(self) -> dict[str, Any]:
        keeper = self.keeper
        reading, threshold = keeper.reading, keeper.monitor.threshold
        return {
            "score": reading.score.copy(),
            "statistic": reading.statistic.copy(),
            "threshold": threshold.value if threshold else float("nan"),
            "alarm": reading.alarm.copy(),
            "acting": keeper.who,
            "reason": list(keeper.reasons),
        }
