"""One file for a monitor: tensors and JSON, so that loading a stranger's runs no code."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ood.adapters import Joint
from ood.conformal import Threshold
from ood.density import KNN, MixtureDensity
from ood.detectors import Array, Mahalanobis, OODDetector, RelativeMahalanobis
from ood.distillation import RandomNetworkDistillation
from ood.dynamics import DynamicsEnsemble
from ood.monitor import Monitor, StaleThreshold
from ood.sequential import STATISTICS
from rewardmodels import InvalidInput
from rewardmodels.errors import UnreadableFile
from rewardmodels.saving import atomic_path

FORMAT = 1
DETECTORS: dict[str, type[OODDetector]] = {
    cls.__name__: cls
    for cls in (
        DynamicsEnsemble,
        Joint,
        KNN,
        Mahalanobis,
        MixtureDensity,
        RandomNetworkDistillation,
        RelativeMahalanobis,
    )
}
"""Those that `load_monitor` knows by name. It never imports what a file names."""


def save_monitor(monitor: Monitor, path: str | os.PathLike[str], *, agent: str = "") -> None:
    """Writes detector, statistic and threshold to one safetensors file, whole or not at all.

    Args:
        monitor: Whose detector is fitted, and whose threshold, if any, is its own.
        path: The file; one that stands there is replaced.
        agent: `agent_fingerprint` of the agent whose episodes calibrated it: its promise holds for
            no other.

    Raises:
        InvalidInput: A detector or a statistic that a file can't hold.
        NotFitted: The detector isn't fitted.
        StaleThreshold: The threshold belongs to another state of the detector.
    """
    if type(monitor.statistic).__name__ not in STATISTICS:
        raise InvalidInput(
            f"monitor: expected one of the statistics {', '.join(STATISTICS)}, got "
            f"{type(monitor.statistic).__name__}; save the detector's data, and fit it again."
        )
    arrays: dict[str, Array] = {}
    about: dict[str, Any] = {
        "format": FORMAT,
        "detector": _described(monitor.detector, "detector.", arrays),
        "statistic": [type(monitor.statistic).__name__, monitor.statistic.settings],
        "fingerprint": monitor.fingerprint,
        "agent": agent,
    }
    if monitor.threshold is not None:
        monitor.check()
        fields = asdict(monitor.threshold)
        arrays |= {f"threshold.{name}": fields.pop(name) for name in ("mean", "scale")}
        # JSON has no infinity.
        about["threshold"] = {**fields, "value": repr(monitor.threshold.value)}
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, {"ood": json.dumps(about)})


def load_monitor(path: str | os.PathLike[str], *, agent: str | None = None) -> Monitor:
    """Reads a monitor that `save_monitor` wrote; its alarms are the same.

    Args:
        path: The file.
        agent: `agent_fingerprint` of the agent that it is to watch; None where that isn't known,
            and nothing is checked.

    Raises:
        StaleThreshold: It was calibrated on another agent's episodes, or on one's that has been
            trained since.
        UnreadableFile: Not such a file, damaged, changed since, of a newer format, or of a
            detector that isn't known here.
        FileNotFoundError: There is no such file.

    Example:
        >>> load_monitor("pyproject.toml")
        Traceback (most recent call last):
            ...
        rewardmodels.errors.UnreadableFile: pyproject.toml: expected a monitor written by ...
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: expected a monitor written by ood.save_monitor.")
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["ood"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if int(about["format"]) > FORMAT:
            raise UnreadableFile(
                f"{path}: expected format {FORMAT} or older, got {about['format']}; update "
                "rewardmodels."
            )
        detector = _rebuilt(about["detector"], "detector.", arrays)
        # Whether shapes fit together shows when they are used.
        detector.score_array(np.zeros((1, detector.width)))
        name, settings = about["statistic"]
        monitor = Monitor(detector, STATISTICS[name](**settings))
        if "threshold" in about:
            fields = about["threshold"]
            fields["value"] = float(fields["value"])
            mean, scale = arrays["threshold.mean"], arrays["threshold.scale"]
            monitor.threshold = Threshold(**fields, mean=mean, scale=scale)
            monitor.check()
        changed = monitor.fingerprint != about["fingerprint"]
    except (
        SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError, StaleThreshold,
    ) as error:  # fmt: skip
        raise UnreadableFile(
            f"{path}: expected a monitor written by ood.save_monitor, got a damaged file or one of "
            f"another kind ({error!r})."
        ) from error
    if changed:
        raise UnreadableFile(f"{path}: expected what was saved, got a detector changed since.")
    if agent is not None and about.get("agent", "") != agent:
        raise StaleThreshold(
            f"{path}: expected a guard calibrated on this agent's episodes, got one of another "
            "agent, or of this one before more training; calibrate it again."
        )
    return monitor


def agent_fingerprint(*files: str | os.PathLike[str]) -> str:
    """What tells one agent from another, and from itself after more training.

    Args:
        files: All that decides what it does, in a fixed order; two of the same bytes are the same.

    Returns:
        The SHA-256 of their contents, in hexadecimal.

    Raises:
        FileNotFoundError: There is no such file.

    Example:
        >>> agent_fingerprint("pyproject.toml") == agent_fingerprint("LICENSE")
        False
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()


def _described(detector: OODDetector, prefix: str, arrays: dict[str, Array]) -> dict[str, Any]:
    name = type(detector).__name__
    if DETECTORS.get(name) is not type(detector) or not detector.saveable:
        raise InvalidInput(
            f"detector: expected one that a file can hold ({', '.join(DETECTORS)}), got a {name}; "
            "save the frames that it was fitted to, and fit it again."
        )
    arrays |= {prefix + key: value for key, value in detector.state.items()}
    if not isinstance(detector, Joint):
        return {"class": name, "settings": detector.settings}
    inner = [
        _described(member, f"{prefix}{i}.", arrays) for i, member in enumerate(detector.detectors)
    ]
    settings = {key: value for key, value in detector.settings.items() if key != "detectors"}
    return {"class": name, "settings": settings, "detectors": inner}


def _rebuilt(about: dict[str, Any], prefix: str, arrays: dict[str, Array]) -> OODDetector:
    settings = dict(about["settings"])
    if "detectors" in about:
        settings["detectors"] = [
            _rebuilt(inner, f"{prefix}{i}.", arrays) for i, inner in enumerate(about["detectors"])
        ]
        columns = settings["columns"]
        settings["columns"] = [None if pair is None else tuple(pair) for pair in columns]
    detector = DETECTORS[about["class"]](**settings)
    own = {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }
    return detector.restore(own)
