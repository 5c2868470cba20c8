"""PauseOnAlarm: pause training before a policy is updated on behaviour that wasn't compared.

A learned reward is accurate about behaviour like that which was compared. A policy that is trained
on it for long leaves that behaviour for wherever the reward errs upwards (Gao et al. 2023,
arXiv:2210.10760). `ood.Guard` stops an agent that acts; this callback stops one that learns, with
the same monitor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from ood.features import Features, find_features
from ood.monitor import Monitor, Stream
from rewardmodels.errors import require

Array = NDArray[Any]


class PauseOnAlarm(BaseCallback):
    r"""Callback that ends `learn`, falsely in at most a share $\alpha / s$ of episodes.

    Assumes that the policy acts as in calibration. Each copy of the environment is watched by its
    own stream of the monitor, which begins anew with each episode. Training pauses once a share s
    of the copies have raised an alarm in their present episodes. Each does so falsely with
    probability at most $\alpha$, the promise of the monitor's threshold, so by Markov's inequality
    $P(\text{pause}) \le \alpha / s$, however similar the copies are. No policy is updated on frames
    of the rollout that was cut short.

    After a pause, ask about the present policy, refit, calibrate on its episodes, pass the new
    monitor to `watch`, and call `learn` again with `reset_num_timesteps=False`. All algorithms of
    Stable-Baselines3 work, with or without `VecNormalize`; the monitor sees observations as they
    were before normalisation.

    Args:
        monitor: Calibrated on whole episodes of policies whose behaviour was compared.
        features: Input of its detector, as of `ood.Guard`.
        share: s, of the copies, above 0.

    Attributes:
        paused: True if the last `learn` ended by an alarm.
        alarmed: `(n,)` bool, copies with an alarm in their present episode.

    Raises:
        InvalidInput: A share that isn't in (0, 1].
        UnknownName: No features of that name.

    Example:
        >>> import torch
        >>> from stable_baselines3 import PPO
        >>> from ood import Mahalanobis
        >>> draw = torch.Generator().manual_seed(0)
        >>> episodes = 0.01 * torch.randn(40, 50, 4, generator=draw)  # unlike a pendulum
        >>> monitor = Monitor(Mahalanobis().fit(episodes[:20].flatten(0, 1)))
        >>> threshold = monitor.calibrate(list(episodes[20:]), alpha=0.1)
        >>> pause = PauseOnAlarm(monitor)
        >>> agent = PPO("MlpPolicy", "Pendulum-v1", n_steps=64, device="cpu").learn(64, pause)
        >>> pause.paused, agent.num_timesteps < 64
        (True, True)
    """

    def __init__(
        self, monitor: Monitor, features: str | Features = "observation_action", share: float = 0.5
    ) -> None:
        super().__init__()
        require("share", 0 < share <= 1, "a share of the copies in (0, 1]", share)
        self.features, self.share = find_features(features), share
        self.paused = False
        self.alarmed = np.zeros(0, bool)
        self._stream: Stream | None = None
        self._before: Array = np.zeros(0)
        self.watch(monitor)

    def watch(self, monitor: Monitor) -> None:
        """Go on with another monitor, or the same, without the alarms so far.

        Raises:
            NotFitted: As `ood.Monitor.check`.
            StaleThreshold: Likewise.
        """
        monitor.check()
        self.monitor = monitor
        if self._stream is not None:
            self._start_stream(self._stream.steps)

    def _start_stream(self, steps: NDArray[np.int64]) -> None:
        """Start to watch copies that are at these steps of their episodes."""
        self._stream = self.monitor.stream(len(steps))
        self._stream.steps[:] = steps
        self.alarmed = np.zeros(len(steps), bool)

    def _on_training_start(self) -> None:
        self.paused = False
        now, copies = self._unnormalised(self.model._last_obs), self.training_env.num_envs
        if self._stream is None or len(self._stream.steps) != copies:
            self._start_stream(np.zeros(copies, np.int64))
        else:  # a copy that isn't where it was left has been reset
            moved = (now != self._before).reshape(copies, -1).any(1)
            self._stream.reset(moved)
            self.alarmed[moved] = False
        self._before = now

    def _on_step(self) -> bool:
        assert self._stream is not None
        ended = self.locals["dones"]
        now = self._unnormalised(self.locals["new_obs"])
        after = now.copy()
        for copy in np.flatnonzero(ended):
            last = self.locals["infos"][copy]["terminal_observation"]
            normalised = self.model.get_vec_normalize_env()
            after[copy] = last if normalised is None else normalised.unnormalize_obs(last)
        actions = self.locals.get("clipped_actions", self.locals["actions"])
        self.alarmed |= self._stream.update(self.features(self._before, actions, after)).alarm
        self.paused = bool(self.alarmed.mean() >= self.share)
        self._stream.reset(ended)
        if not self.paused:
            self.alarmed[ended] = False
        self._before = now
        return not self.paused

    def _unnormalised(self, observations: Any) -> Array:
        normalised = self.model.get_vec_normalize_env()
        return np.array(observations if normalised is None else normalised.get_original_obs())
