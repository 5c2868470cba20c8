"""When to stop trusting: detectors of the unfamiliar, and guards that act on them."""

from ood.adapters import Epistemic, Joint, SklearnDetector
from ood.conformal import Threshold, calibrate, calibrate_stream, conformal_quantile
from ood.density import KNN, MixtureDensity
from ood.detectors import Mahalanobis, OODDetector, RelativeMahalanobis
from ood.events import Event, EventLog
from ood.guard import Guard, VectorGuard
from ood.learned import DynamicsEnsemble, RandomNetworkDistillation
from ood.martingales import ConformalMartingale, ShiryaevRoberts
from ood.monitor import Monitor, Reading, StaleThreshold
from ood.recording import record
from ood.rules import Rules
from ood.saving import load_monitor, save_monitor
from ood.selective import Selection, confidence_for, confident_errors, select
from ood.sequential import CUSUM, EWMA, Spike, Statistic

__all__ = [
    "CUSUM",
    "EWMA",
    "KNN",
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
    "Rules",
    "Selection",
    "ShiryaevRoberts",
    "SklearnDetector",
    "Spike",
    "StaleThreshold",
    "Statistic",
    "Threshold",
    "VectorGuard",
    "calibrate",
    "calibrate_stream",
    "confidence_for",
    "confident_errors",
    "conformal_quantile",
    "load_monitor",
    "record",
    "save_monitor",
    "select",
]
