"""Monitor: a detector, a statistic and a threshold, run over streams of features."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood.conformal import Threshold, calibrate, calibrate_stream
from ood.detectors import Array, OODDetector, as_array
from ood.sequential import CUSUM, Statistic, root_mean_square
from rewardmodels import InvalidInput
from rewardmodels.errors import NotFitted, RewardModelsError


class StaleThreshold(RewardModelsError, RuntimeError):
    """A threshold was calibrated for another detector, or for this one before a refit."""


class Reading(NamedTuple):
    """What a monitor says of one step of n environments.

    Attributes:
        score: `(n,)`, the detector's, or the root mean square of its signed numbers where the
            statistic takes these; infinite where features aren't finite.
        statistic: `(n,)`.
        alarm: `(n,)` bool.
    """

    score: NDArray[np.float64]
    statistic: NDArray[np.float64]
    alarm: NDArray[np.bool_]


class Monitor:
    """Says of each step whether what has been seen so far is too strange to be chance.

    Args:
        detector: How strange one frame is; fitted.
        statistic: What the scores add up to.
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
        """Takes the threshold from whole episodes that the detector wasn't fitted to.

        Args:
            episodes: N, each `(T_i, F)` features of its steps.
            alpha: Chance of a false alarm in an episode, at most.
            standardise: As `ood.conformal.calibrate`.
            window: As `ood.conformal.calibrate`.

        Raises:
            NotFitted: The detector isn't fitted.
            InvalidInput: As `ood.conformal.calibrate`, or features of another shape.
        """
        scores = [self.scores(episode) for episode in episodes]
        self.threshold = calibrate(
            scores,
            self.statistic,
            alpha,
            standardise=standardise,
            window=window,
            fingerprint=self.fingerprint,
        )
        return self.threshold

    def calibrate_stream(
        self, features: Tensor, alpha: float, *, block: int, standardise: float = 0.25
    ) -> Threshold:
        """Takes the threshold from one long stream that the detector wasn't fitted to.

        The statistic then begins anew after every `block` steps of an episode without end; see
        `ood.conformal.calibrate_stream` for what is promised.

        Args:
            features: `(L, F)`.
            alpha: Chance of a false alarm in a block, at most.
            block: Steps.
            standardise: As `ood.conformal.calibrate_stream`.

        Raises:
            NotFitted: The detector isn't fitted.
            InvalidInput: As `ood.conformal.calibrate_stream`, or features of another shape.
        """
        self.threshold = calibrate_stream(
            self.scores(features),
            self.statistic,
            alpha,
            block=block,
            standardise=standardise,
            fingerprint=self.fingerprint,
        )
        return self.threshold

    def scores(self, features: Tensor) -> Tensor:
        """What the statistic is given of B frames, before it is standardised.

        Args:
            features: `(B, F)`.

        Returns:
            `(B,)` scores, or `(B, D)` signed numbers if the statistic is signed.

        Raises:
            NotFitted: The detector isn't fitted.
            InvalidInput: Features of another shape, or NaN or infinity.
        """
        of = self.detector.signed if self.statistic.signed else self.detector.score
        return of(features)

    @property
    def fingerprint(self) -> str:
        """That of the detector, and what the statistic is: a threshold holds for both.

        Raises:
            NotFitted: The detector isn't fitted.
        """
        of_statistic = f"{type(self.statistic).__name__}{self.statistic.settings}"
        return f"{self.detector.fingerprint} {of_statistic}"

    def check(self) -> None:
        """Raises unless its alarms mean what was promised.

        Raises:
            NotFitted: The detector isn't fitted, or there is no threshold.
            StaleThreshold: The threshold belongs to another state of the detector.
        """
        name = type(self.detector).__name__
        if not self.detector.fitted:
            raise NotFitted(f"{name}: expected a fitted detector; call fit first.")
        if self.threshold is None:
            raise NotFitted("threshold: expected a calibrated one, got none; call calibrate first.")
        wanted = self.threshold.fingerprint
        if wanted and wanted != self.fingerprint:
            raise StaleThreshold(
                f"threshold: expected one calibrated for this {name} and "
                f"{type(self.statistic).__name__}, got one for others, such as those before a "
                "refit; call calibrate again, with episodes held out from that fit."
            )

    def stream(self, n: int) -> Stream:
        """Begins to watch n environments, having checked that it may.

        Raises:
            NotFitted: As `check`.
            StaleThreshold: As `check`.
            InvalidInput: Less than one environment.
        """
        self.check()
        return Stream(self, n)

    def explain(self, features: Array | Tensor, names: Sequence[str] | None = None) -> str:
        """In words, which detector found one frame strangest, and why.

        Args:
            features: `(F,)`.
            names: F names; None for numbers.
        """
        frame = torch.as_tensor(as_array(features))
        called = names or [f"feature[{i}]" for i in range(len(frame))]
        broken = ~frame.isfinite()
        if bool(broken.any()):
            which = ", ".join(called[int(i)] for i in broken.nonzero()[:3].flatten())
            return f"NaN or infinity in {which}"
        share = self.detector.explain(frame[None])[0]
        most = share.topk(min(3, len(share)))
        parts = [
            f"{called[int(i)]} ({float(value):.3g})"
            for value, i in zip(most.values, most.indices, strict=True)
        ]
        return f"{self.detector.blame(frame[None])[0]}: strangest {', '.join(parts)}"


class Stream:
    """A monitor's memory of n environments, made by `Monitor.stream`.

    Args:
        monitor: That may watch: see `Monitor.check`.
        n: How many environments.

    Raises:
        InvalidInput: Less than one environment.
    """

    def __init__(self, monitor: Monitor, n: int) -> None:
        self.monitor = monitor
        self.statistic = copy.deepcopy(monitor.statistic)
        self.statistic.start(n)
        self.steps = np.zeros(n, np.int64)
        self._checked = self._now()

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Begins an episode anew where `mask` `(n,)` is True."""
        self.statistic.reset(mask)
        self.steps[mask] = 0

    def forget(self, mask: NDArray[np.bool_]) -> None:
        """Begins the statistic anew where `mask` `(n,)` is True, in the middle of an episode."""
        self.statistic.reset(mask)

    def update(self, features: Array | Tensor) -> Reading:
        """Takes in one step of each environment.

        Features that aren't finite are infinitely strange, and raise an alarm whatever the
        threshold; so does a statistic that isn't a number.

        Args:
            features: `(n, F)`.

        Raises:
            NotFitted: As `Monitor.check`, where the monitor has changed meanwhile.
            StaleThreshold: Likewise.
            InvalidInput: Features of another shape.
        """
        if self._now() != self._checked:
            self.monitor.check()
            self._checked = self._now()
        detector, threshold = self.monitor.detector, self.monitor.threshold
        assert threshold is not None
        frames = as_array(features)
        if frames.ndim != 2 or len(frames) != len(self.steps):
            raise InvalidInput(
                f"features: expected shape (n, F), a row for each of the {len(self.steps)} "
                f"environments, got {frames.shape}."
            )
        if threshold.period:
            self.statistic.reset(self.steps % threshold.period == 0)
        signed = self.statistic.signed
        # The sum of squares is finite where all are, unless it overflows; then each is looked at.
        if frames.shape[1] == detector.width and math.isfinite(np.vdot(frames, frames)):
            if frames.dtype.char != "d":
                frames = frames.astype(np.float64)
            seen = detector.signed_checked(frames) if signed else detector.score_checked(frames)
        else:
            rows = np.isfinite(frames).all(1)
            known = (detector.signed_array if signed else detector.score_array)(frames[rows])
            seen = np.full((len(frames), *known.shape[1:]), np.inf)
            seen[rows] = known
        score = root_mean_square(seen) if signed else seen
        statistic = self.statistic.update(threshold.standardise(seen, self.steps)).copy()
        self.steps += 1
        alarm = statistic > threshold.value
        # NaN must raise an alarm, and compares as False; so must infinity, whatever the threshold.
        # One product tells whether there is any.
        if not math.isfinite(np.vdot(score, statistic)):
            alarm = ~((statistic <= threshold.value) & np.isfinite(score))
        return Reading(score, statistic, alarm)

    def _now(self) -> tuple[object, ...]:
        # A hash of the detector at each step would take longer than the step.
        detector = self.monitor.detector
        return detector, detector.revision, self.monitor.threshold


def scores_along(monitor: Monitor, episode: Tensor) -> Reading:
    """What a monitor says of a whole episode, step by step: `(T,)` each.

    Args:
        monitor: Calibrated.
        episode: `(T, F)` features.

    Raises:
        NotFitted: As `Monitor.check`.
        StaleThreshold: As `Monitor.check`.
    """
    stream = monitor.stream(1)
    readings = [stream.update(frame[None]) for frame in episode]
    return Reading(*(np.concatenate(column) for column in zip(*readings, strict=True)))
