"""A guard for training: it stops before a policy is updated on what the answers don't cover.

A reward that was learned from comparisons is right about behaviour like that which was compared. A
policy that is trained on it for long leaves that behaviour for wherever the reward errs upwards
(Gao et al. 2023, arXiv 2210.10760). `ood.Guard` stops an agent that acts; this stops one that
learns, by the same monitor and the same promise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from ood import Monitor
from ood.features import Features, find_features
from ood.monitor import Stream
from rewardmodels import InvalidInput

Array = NDArray[Any]


class PauseOnAlarm(BaseCallback):
    r"""Ends `learn`, before another update, once many copies of the environment raise an alarm.

    Every copy is watched by its own stream of the monitor's statistic, begun anew with each
    episode. Training pauses as soon as a share s of the copies have raised an alarm in the episodes
    that they are in. By chance each does so with probability at most $\alpha$, the promise of the
    monitor's threshold, so by Markov's inequality

    $$P(\text{pause}) \le \alpha / s$$

    an episode, however alike the copies are, for as long as the policy acts as it did in
    calibration. Frames of a rollout that was cut short are never learned from.

    After a pause, ask about what the policy does now, refit, calibrate on its episodes, hand the
    new monitor to `watch`, and call `learn` again with `reset_num_timesteps=False`. It works with
    every algorithm of Stable-Baselines3, with or without `VecNormalize`; observations are given
    to the monitor as they were before normalisation.

    Args:
        monitor: Calibrated on whole episodes of the policies that the answers are about.
        features: What its detector sees of a step, as `ood.Guard` has it.
        share: s, of the copies, above 0.

    Attributes:
        paused: Whether the last `learn` ended by an alarm.
        alarmed: `(n,)` bool, copies with an alarm in the episode that they are in.

    Raises:
        InvalidInput: A share that isn't in (0, 1].
        UnknownName: No features of that name.

    Example:
        >>> import torch
        >>> from stable_baselines3 import PPO
        >>> from ood import Mahalanobis
        >>> draw = torch.Generator().manual_seed(0)
        >>> familiar = 0.01 * torch.randn(40, 50, 4, generator=draw)  # nothing like a pendulum
        >>> monitor = Monitor(Mahalanobis().fit(familiar[:20].flatten(0, 1)))
        >>> threshold = monitor.calibrate(list(familiar[20:]), alpha=0.1)
        >>> pause = PauseOnAlarm(monitor)
        >>> agent = PPO("MlpPolicy", "Pendulum-v1", n_steps=64, device="cpu").learn(64, pause)
        >>> pause.paused, agent.num_timesteps < 64
        (True, True)
    """

    def __init__(
        self,
        monitor: Monitor,
        features: str | Features = "observation_action",
        share: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise InvalidInput(f"share: expected a share of the copies in (0, 1], got {share}.")
        self.features, self.share = find_features(features), share
        self.paused = False
        self.alarmed = np.zeros(0, bool)
        self._stream: Stream | None = None
        self._before: Array = np.zeros(0)
        self.watch(monitor)

    def watch(self, monitor: Monitor) -> None:
        """Goes on with another monitor, or the same anew: what was raised so far is forgotten.

        Raises:
            NotFitted: As `ood.Monitor.check`.
            StaleThreshold: Likewise.
        """
        monitor.check()
        self.monitor = monitor
        if self._stream is not None:
            self._follow(self._stream.steps)

    def _follow(self, steps: NDArray[np.int64]) -> None:
        """Begins a stream of copies that have come so far in their episodes."""
        self._stream = self.monitor.stream(len(steps))
        self._stream.steps[:] = steps
        self.alarmed = np.zeros(len(steps), bool)

    def _on_training_start(self) -> None:
        self.paused = False
        now, copies = self._seen(self.model._last_obs), self.training_env.num_envs
        if self._stream is None or len(self._stream.steps) != copies:
            self._follow(np.zeros(copies, np.int64))
        else:  # a copy that isn't where it was left was reset meanwhile
            moved = (now != self._before).reshape(copies, -1).any(1)
            self._stream.reset(moved)
            self.alarmed[moved] = False
        self._before = now

    def _on_step(self) -> bool:
        assert self._stream is not None
        ended = self.locals["dones"]
        after = self._seen(self.locals["new_obs"])
        led_to = after.copy()
        for copy in np.flatnonzero(ended):
            last = self.locals["infos"][copy]["terminal_observation"]
            normalised = self.model.get_vec_normalize_env()
            led_to[copy] = last if normalised is None else normalised.unnormalize_obs(last)
        actions = self.locals.get("clipped_actions", self.locals["actions"])
        self.alarmed |= self._stream.update(self.features(self._before, actions, led_to)).alarm
        self.paused = bool(self.alarmed.mean() >= self.share)
        self._stream.reset(ended)
        if not self.paused:
            self.alarmed[ended] = False
        self._before = after
        return not self.paused

    def _seen(self, observations: Any) -> Array:
        """Observations as the environments gave them."""
        normalised = self.model.get_vec_normalize_env()
        return np.array(observations if normalised is None else normalised.get_original_obs())
