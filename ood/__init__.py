"""Out-of-distribution detection: detectors, thresholds with a promise, and guards.

First record episodes of the policy (`record_episodes`), in two lots. A detector (`Mahalanobis`,
`KNN`, `DynamicsEnsemble` and others) is fitted to one. By the other a `Monitor` finds the threshold
that a statistic of the scores (`Spike`, `EWMA`, `CUSUM`, `MEWMA`) exceeds in no more than a
promised share of new episodes. A `Guard` runs the monitor beside the agent, and halts it, asks, or
lets another policy take over. Environments without episodes have `Monitor.calibrate_stream`, with
`ConformalMartingale` or `ShiryaevRoberts` as the statistic.

Example:
    >>> import gymnasium, numpy, torch
    >>> env = gymnasium.make("Pendulum-v1", max_episode_steps=50)
    >>> policy = lambda observation: numpy.tanh(observation[1:2])
    >>> episodes = record_episodes(env, policy, 50, "transition", seed=0)
    >>> monitor = Monitor(Mahalanobis().fit(torch.cat(episodes[:20])), CUSUM())
    >>> threshold = monitor.calibrate(episodes[20:], alpha=0.1)
    >>> guard = Guard(env, monitor, "transition")
    >>> env.unwrapped.m = 4.0  # the pendulum has become four times as heavy
    >>> observation, info = guard.reset(seed=1)
    >>> for _ in range(50):
    ...     observation, *_, info = guard.step(policy(observation))
    >>> info["guard"]["acting"], info["guard"]["reason"].split(":")[0]
    ('halted', 'Mahalanobis')
"""

from ood.conformal import Threshold, calibrate, calibrate_stream
from ood.density import KNN, MixtureDensity
from ood.detectors import (
    Epistemic,
    Joint,
    Mahalanobis,
    OODDetector,
    RelativeMahalanobis,
    SklearnDetector,
)
from ood.dynamics import DynamicsEnsemble, RandomNetworkDistillation
from ood.guard import AlarmResponse, Event, EventLog, Guard, VectorGuard
from ood.monitor import (
    DETECTORS,
    Monitor,
    Reading,
    StaleThreshold,
    agent_fingerprint,
    load_monitor,
    record_episodes,
    save_monitor,
)
from ood.pausing import PauseOnAlarm
from ood.selective import Selection, confident_errors, select
from ood.sequential import (
    CUSUM,
    EWMA,
    MEWMA,
    STATISTICS,
    STREAM_STATISTICS,
    ConformalMartingale,
    ShiryaevRoberts,
    Spike,
    Statistic,
)

__all__ = [
    "CUSUM",
    "DETECTORS",
    "EWMA",
    "KNN",
    "MEWMA",
    "STATISTICS",
    "STREAM_STATISTICS",
    "AlarmResponse",
    "ConformalMartingale",
    "DynamicsEnsemble",
    "Epistemic",
    "Event",
    "EventLog",
    "Guard",
    "Joint",
    "Mahalanobis",
    "MixtureDensity",
    "Monitor",
    "OODDetector",
    "PauseOnAlarm",
    "RandomNetworkDistillation",
    "Reading",
    "RelativeMahalanobis",
    "Selection",
    "ShiryaevRoberts",
    "SklearnDetector",
    "Spike",
    "StaleThreshold",
    "Statistic",
    "Threshold",
    "VectorGuard",
    "agent_fingerprint",
    "calibrate",
    "calibrate_stream",
    "confident_errors",
    "load_monitor",
    "record_episodes",
    "save_monitor",
    "select",
]
