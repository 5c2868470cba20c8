"""Monitor: a detector, a statistic and a threshold; recording episodes for it, and saving it."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood.conformal import Threshold, calibrate, calibrate_stream
from ood.density import KNN, MixtureDensity
from ood.detectors import Array, Joint, Mahalanobis, OODDetector, RelativeMahalanobis, as_array
from ood.dynamics import DynamicsEnsemble, RandomNetworkDistillation
from ood.features import Features, find_features
from ood.sequential import CUSUM, STATISTICS, STREAM_STATISTICS, Statistic, root_mean_square
from rewardmodels.errors import (
    InvalidInput,
    NotFitted,
    RewardModelsError,
    UnreadableFile,
    check_positive,
    require,
)
from rewardmodels.saving import open_described, write_described

FORMAT = 2
_ARRAYS = ("mean", "scale", "maxima")  # of a threshold
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
"""Detectors by name, for files and the command line. `load_monitor` imports no others."""

Policy = Callable[[Array], Any]
"""From one observation `(*obs,)` to an action."""


class StaleThreshold(RewardModelsError, RuntimeError):
    """A threshold of another monitor, or of this one before a refit of its detector."""


class Reading(NamedTuple):
    """Output of a monitor for one step of n environments.

    Attributes:
        score: `(n,)`, of the detector, or the root mean square of its residuals where the statistic
            reads these; infinite where features aren't finite.
        statistic: `(n,)`.
        alarm: `(n,)` bool.
    """

    score: NDArray[np.float64]
    statistic: NDArray[np.float64]
    alarm: NDArray[np.bool_]


class Monitor:
    """Alarm in at most a promised share of normal episodes, for any detector and any statistic.

    Assumes that calibration episodes and new ones are exchangeable: the same policy in the same
    environment, none of them seen when the detector was fitted (see `ood.conformal`).

    Args:
        detector: Scores one frame.
        statistic: Accumulates the scores; `CUSUM` by default.
        threshold: From `ood.conformal`; None until `calibrate`.

    Example:
        >>> from ood import Mahalanobis
        >>> draw = torch.Generator().manual_seed(0)
        >>> monitor = Monitor(Mahalanobis().fit(torch.randn(1000, 3, generator=draw)))
        >>> episodes = torch.randn(40, 50, 3, generator=draw)
        >>> monitor.calibrate(list(episodes), alpha=0.1).episodes
        30
        >>> stream = monitor.stream(1)
        >>> [bool(stream.update(np.full((1, 3), x)).alarm) for x in (0.1, 3.0, 3.0, float("nan"))]
        [False, False, True, True]
    """

    def __init__(
        self,
        detector: OODDetector,
        statistic: Statistic | None = None,
        threshold: Threshold | None = None,
    ) -> None:
        self.detector = detector
        self.statistic = statistic or CUSUM()
        self.threshold = threshold

    def calibrate(
        self,
        episodes: Sequence[Tensor],
        alpha: float,
        *,
        standardise: float = 0.25,
        window: int = 25,
    ) -> Threshold:
        """Set the threshold by whole episodes that the detector wasn't fitted to.

        Args:
            episodes: N, each `(T_i, F)` features of its steps.
            alpha: Largest chance of a false alarm in an episode.
            standardise: As `ood.conformal.calibrate`, like `window` and what it raises.
            window: Steps.

        Raises:
            NotFitted: The detector isn't fitted.
        """
        scores = [self.scores(episode) for episode in episodes]
        found = calibrate(scores, self.statistic, alpha, standardise=standardise, window=window)
        self.threshold = replace(found, fingerprint=self.fingerprint)
        return self.threshold

    def calibrate_stream(
        self, features: Tensor, alpha: float, *, block: int, standardise: float = 0.25
    ) -> Threshold:
        """Set the threshold by a stream `(L, F)`, for environments without episodes.

        The detector wasn't fitted to it. See `ood.conformal.calibrate_stream`, whose arguments,
        promises and errors these are.
        """
        found = calibrate_stream(
            self.scores(features), self.statistic, alpha, block=block, standardise=standardise
        )
        self.threshold = replace(found, fingerprint=self.fingerprint)
        return self.threshold

    def scores(self, features: Tensor) -> Tensor:
        """Scores `(B,)` of frames `(B, F)`, or residuals `(B, D)` for a multivariate statistic."""
        detector = self.detector
        return (detector.residuals if self.statistic.multivariate else detector.score)(features)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of detector and statistic: a threshold holds for both."""
        statistic = f"{type(self.statistic).__name__}{self.statistic.settings}"
        return f"{self.detector.fingerprint} {statistic}"

    def check(self) -> None:
        """Raise unless the promise holds for the detector and the statistic as they are now.

        Raises:
            NotFitted: The detector isn't fitted, or there is no threshold.
            InvalidInput: NaN or infinity in what the detector has learned.
            StaleThreshold: The threshold belongs to another state of the detector.
        """
        self.detector.check_state()
        if self.threshold is None:
            raise NotFitted("threshold: expected a calibrated one, got none; call calibrate first.")
        wanted = self.threshold.fingerprint
        if wanted and wanted != self.fingerprint:
            raise StaleThreshold(
                f"threshold: expected one calibrated for this {type(self.detector).__name__} and "
                f"{type(self.statistic).__name__}, got one for others, such as those before a "
                "refit; call calibrate again, with episodes held out from that fit."
            )

    def stream(self, n: int) -> Stream:
        """Start to watch n environments; raises as `check` does."""
        self.check()
        return Stream(self, n)

    def explain(self, features: Array | Tensor, names: Sequence[str] | None = None) -> str:
        """Describe which detector and which features made one frame's score high.

        Args:
            features: `(F,)`.
            names: F names; None for numbers.
        """
        frame = torch.as_tensor(as_array(features))
        names = names or [f"feature[{i}]" for i in range(len(frame))]
        broken = ~frame.isfinite()
        if bool(broken.any()):
            which = ", ".join(names[int(i)] for i in broken.nonzero()[:3].flatten())
            return f"NaN or infinity in {which}"
        share = self.detector.explain(frame[None])[0]
        most = share.topk(min(3, len(share)))
        parts = [
            f"{names[int(i)]} ({float(value):.3g})"
            for value, i in zip(most.values, most.indices, strict=True)
        ]
        detector = self.detector.detector_names(frame[None])[0]
        return f"{detector}: most anomalous {', '.join(parts)}"


class Stream:
    """Watches n environments step by step and raises alarms; made by `Monitor.stream`."""

    def __init__(self, monitor: Monitor, n: int) -> None:
        self.monitor = monitor
        self.statistic = copy.deepcopy(monitor.statistic)
        self.statistic.start(n)
        self.steps = np.zeros(n, np.int64)
        self._checked = self._revision()

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Begin an episode where `mask` `(n,)` is True."""
        self.statistic.reset(mask)
        self.steps[mask] = 0

    def update(self, features: Array | Tensor) -> Reading:
        """Add one step of each environment.

        Features `(n, F)` that aren't finite are infinitely anomalous, and raise an alarm whatever
        the threshold; so does a statistic that isn't a number.

        Raises:
            NotFitted: As `Monitor.check`, if the monitor has changed; so StaleThreshold.
            InvalidInput: Features of another shape.
        """
        if self._revision() != self._checked:
            self.monitor.check()
            self._checked = self._revision()
        detector, threshold = self.monitor.detector, self.monitor.threshold
        assert threshold is not None
        frames = as_array(features)
        if frames.ndim != 2 or len(frames) != len(self.steps):
            raise InvalidInput(
                f"features: expected shape (n, F), a row for each of the {len(self.steps)} "
                f"environments, got {frames.shape}."
            )
        if threshold.period:
            self.statistic.end_block(self.steps % threshold.period == 0)
        multivariate = self.statistic.multivariate
        # A finite sum of squares has only finite terms; otherwise each number is looked at.
        if frames.shape[1] == detector.num_features and math.isfinite(np.vdot(frames, frames)):
            if frames.dtype.char != "d":
                frames = frames.astype(np.float64)
            values = detector.evaluate(frames, residuals=multivariate)
        else:
            rows = np.isfinite(frames).all(1)
            finite = detector.evaluate(detector.check_frames(frames[rows]), residuals=multivariate)
            values = np.full((len(frames), *finite.shape[1:]), np.inf)
            values[rows] = finite
        score = root_mean_square(values) if multivariate else values
        statistic = self.statistic.update(threshold.standardise(values, self.steps)).copy()
        self.steps += 1
        alarm = statistic > threshold.value
        # NaN must raise an alarm, and compares as False; so must an infinite score, whatever the
        # threshold. One product shows whether there is any.
        if not math.isfinite(np.vdot(score, statistic)):
            alarm = ~((statistic <= threshold.value) & np.isfinite(score))
        return Reading(score, statistic, alarm)

    def _revision(self) -> tuple[object, ...]:
        # A fingerprint at each step would take longer than the step.
        detector = self.monitor.detector
        return detector, detector.revision, self.monitor.threshold


def record_episodes(
    env: gym.Env[Any, Any],
    policy: Policy,
    episodes: int,
    features: str | Features = "observation_action",
    *,
    seed: int | None = None,
) -> list[Tensor]:
    """Play whole episodes and record the features of each step, as a guard will see them.

    Fit a detector to some of them and calibrate its threshold by others, never by the same.

    Args:
        env: Environment without a guard; each of its episodes has to end.
        policy: From one observation to an action.
        episodes: Number of episodes; each gives a tensor `(T, F)`.
        features: As of the guard.
        seed: Of the first reset.

    Raises:
        InvalidInput: Less than one episode.
        UnknownName: No features of that name.

    Example:
        >>> env = gym.make("Pendulum-v1", max_episode_steps=20)
        >>> policy = lambda observation: np.zeros(1, np.float32)
        >>> [x.shape for x in record_episodes(env, policy, 2, "transition")]
        [torch.Size([20, 7]), torch.Size([20, 7])]
    """
    check_positive(episodes=episodes)
    compute, recorded = find_features(features), []
    for episode in range(episodes):
        before, _ = env.reset(seed=seed if episode == 0 else None)
        rows, ended = [], False
        while not ended:
            action = policy(before)
            after, _, terminated, truncated, _ = env.step(action)
            step = (np.asarray(x)[None] for x in (before, action, after))
            rows.append(np.array(compute(*step)))
            before, ended = after, terminated or truncated
        recorded.append(torch.from_numpy(np.concatenate(rows)))
    return recorded


def save_monitor(monitor: Monitor, path: str | os.PathLike[str], *, agent: str = "") -> None:
    """Write detector, statistic and threshold to one file of tensors and JSON, atomically.

    Args:
        monitor: One whose detector is fitted, and whose threshold, if any, is its own.
        path: The file, which is replaced.
        agent: `agent_fingerprint` of the agent whose episodes calibrated it: the promise holds for
            no other.

    Raises:
        InvalidInput: A detector or a statistic that isn't registered or can't be saved, or NaN or
            infinity in what the detector has learned.
        NotFitted: The detector isn't fitted.
        StaleThreshold: The threshold belongs to another state of the detector.
    """
    known, statistic = STATISTICS | STREAM_STATISTICS, type(monitor.statistic)
    name = statistic.__name__
    expected = f"one of the statistics {', '.join(known)}"
    require("monitor", known.get(name) is statistic, expected, f"{name}; add it to ood.STATISTICS")
    arrays: dict[str, Array] = {}
    about: dict[str, Any] = {
        "format": FORMAT,
        "detector": _describe(monitor.detector, "detector.", arrays),
        "statistic": [name, monitor.statistic.settings],
        "fingerprint": monitor.fingerprint,
        "agent": agent,
    }
    if monitor.threshold is None:
        monitor.detector.check_state()
    else:
        monitor.check()
        about["threshold"] = asdict(monitor.threshold)
        arrays |= {f"threshold.{name}": about["threshold"].pop(name) for name in _ARRAYS}
    write_described(path, "ood", about, {name: torch.tensor(x) for name, x in arrays.items()})


def load_monitor(path: str | os.PathLike[str], *, agent: str | None = None) -> Monitor:
    """Read a monitor that `save_monitor` wrote; its alarms are the same, and no code is run.

    A checksum covers all of the file, and the threshold has to be the quantile of the calibration
    maxima beside it. That finds damage and careless edits, but isn't a signature: whoever edits a
    guard on purpose can compute a checksum anew, so take it only from those you trust.

    Args:
        path: The file.
        agent: `agent_fingerprint` of the agent that it is to watch; None checks nothing.

    Raises:
        StaleThreshold: It was calibrated on another agent's episodes, or before more training.
        UnreadableFile: Not such a file, damaged, changed since, of another format, or of a
            detector or statistic that isn't registered.
        FileNotFoundError: There is no such file.

    Example:
        >>> load_monitor("pyproject.toml")
        Traceback (most recent call last):
            ...
        rewardmodels.errors.UnreadableFile: pyproject.toml: expected a monitor written by ...
    """
    what = "a monitor written by ood.save_monitor"
    with open_described(path, "ood", what, newest=FORMAT, checked=0) as (about, tensors):
        if about["format"] != FORMAT:
            raise UnreadableFile(
                f"{path}: expected format {FORMAT}, got {about['format']}, which lacks the scores "
                "that its threshold comes from; calibrate it again (rewardmodels guard: --again)."
            )
        arrays = {name: value.numpy() for name, value in tensors.items()}
        name, settings = about["statistic"]
        statistic = (STATISTICS | STREAM_STATISTICS)[name](**settings)
        monitor = Monitor(_rebuild(about["detector"], "detector.", arrays), statistic)
        if "threshold" in about:
            fields = {name: arrays[f"threshold.{name}"] for name in _ARRAYS}
            monitor.threshold = Threshold(**about["threshold"] | fields)
        # Shapes that don't fit together show when they are used.
        zeros = np.zeros((1, monitor.detector.num_features))
        if monitor.threshold is None:
            monitor.detector.score(torch.from_numpy(zeros))
        else:
            monitor.stream(1).update(zeros)
        changed = monitor.fingerprint != about["fingerprint"]
    if changed:
        raise UnreadableFile(f"{path}: expected what was saved, got a detector changed since.")
    if agent is not None and about["agent"] != agent:
        raise StaleThreshold(
            f"{path}: expected a guard calibrated on this agent's episodes, got one of another "
            "agent, or of this one before more training; calibrate it again."
        )
    return monitor


def agent_fingerprint(*files: str | os.PathLike[str]) -> str:
    """SHA-256 of an agent's files, which differs between agents and after more training.

    Args:
        files: All that decides what the agent does, in a fixed order.

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


def _describe(detector: OODDetector, prefix: str, arrays: dict[str, Array]) -> dict[str, Any]:
    """Class and settings of a detector as JSON; its arrays are added to `arrays`."""
    name = type(detector).__name__
    valid = DETECTORS.get(name) is type(detector) and detector.saveable
    expected = f"one that a file can hold ({', '.join(DETECTORS)})"
    got = f"a {name}; add it to ood.DETECTORS, or save the frames that it was fitted to"
    require("detector", valid, expected, got)
    arrays |= {prefix + key: value for key, value in detector.state.items()}
    if not isinstance(detector, Joint):
        return {"class": name, "settings": detector.settings}
    inner = [
        _describe(member, f"{prefix}{i}.", arrays) for i, member in enumerate(detector.detectors)
    ]
    settings = {key: value for key, value in detector.settings.items() if key != "detectors"}
    return {"class": name, "settings": settings, "detectors": inner}


def _rebuild(about: dict[str, Any], prefix: str, arrays: dict[str, Array]) -> OODDetector:
    settings = dict(about["settings"])
    if "detectors" in about:
        settings["detectors"] = [
            _rebuild(inner, f"{prefix}{i}.", arrays) for i, inner in enumerate(about["detectors"])
        ]
    if (name := about["class"]) not in DETECTORS:
        raise UnreadableFile(
            f"detector: expected one of ood.DETECTORS, got a guard's {name}. Import its module, "
            "which registers it; on the command line pass the guard's own --detector."
        )
    detector = DETECTORS[name](**settings)
    own = {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }
    return detector.restore(own)
