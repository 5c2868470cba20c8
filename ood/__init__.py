"""When to stop trusting: detectors of the unfamiliar, and guards that act on them.

Episodes of the policy at work come first (`record_episodes`), in two lots. From one a detector
(`Mahalanobis`, `KNN`, `DynamicsEnsemble` and others) learns what is familiar. From the other a
`Monitor` takes the threshold that a statistic of the scores (`Spike`, `EWMA`, `CUSUM`) or of
signed errors (`MEWMA`) exceeds in no more than a promised share of new episodes. A `Guard` runs the
monitor beside the agent, and halts it, asks, or lets another policy take over. For drift so slow
that no episode is strange, whole episodes' scores go to a `ConformalMartingale` or to
`ShiryaevRoberts`.

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

from ood.adapters import Epistemic, Joint, SklearnDetector
from ood.conformal import Threshold, calibrate, calibrate_stream, conformal_quantile
from ood.density import KNN, MixtureDensity
from ood.detectors import Mahalanobis, OODDetector, RelativeMahalanobis
from ood.distillation import RandomNetworkDistillation
from ood.dynamics import DynamicsEnsemble
from ood.events import Event, EventLog
from ood.guard import Guard, VectorGuard
from ood.martingales import ConformalMartingale, ShiryaevRoberts
from ood.monitor import Monitor, Reading, StaleThreshold
from ood.recording import record_episodes
from ood.rules import AlarmResponse
from ood.saving import DETECTORS, agent_fingerprint, load_monitor, save_monitor
from ood.selective import Selection, confidence_for, confident_errors, select
from ood.sequential import CUSUM, EWMA, MEWMA, STATISTICS, Spike, Statistic

__all__ = [
    "CUSUM",
    "DETECTORS",
    "EWMA",
    "KNN",
    "MEWMA",
    "STATISTICS",
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
    "confidence_for",
    "confident_errors",
    "conformal_quantile",
    "load_monitor",
    "record_episodes",
    "save_monitor",
    "select",
]
