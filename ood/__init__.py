"""When to stop trusting: detectors of the unfamiliar, and guards that act on them."""

from ood.adapters import Epistemic, Joint, SklearnDetector
from ood.conformal import Threshold, calibrate, calibrate_stream, conformal_quantile
from ood.density import KNN, MixtureDensity
from ood.detectors import Mahalanobis, OODDetector, RelativeMahalanobis
from ood.events import Event, EventLog
from ood.guard import Guard, VectorGuard
from ood.learned import DynamicsEnsemble, RandomNetworkDistillation
from ood.monitor import Monitor, Reading, StaleThreshold
from ood.recording import record
from ood.rules import Rules
from ood.sequential import CUSUM, EWMA, Spike, Statistic

__all__ = [
    "CUSUM",
    "EWMA",
    "KNN",
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
    "Rules",
    "SklearnDetector",
    "Spike",
    "StaleThreshold",
    "Statistic",
    "Threshold",
    "VectorGuard",
    "calibrate",
    "calibrate_stream",
    "conformal_quantile",
    "record",
]
