r"""Conformal thresholds: a promised rate of false alarms, for any detector and any statistic.

Let the calibration episodes and one new one be exchangeable: the same policy in the same
environment, none of them seen when the detector was fitted. Some calibration episodes, picked
before any is looked at, are set apart to estimate each step's mean and standard deviation of the
score. Given these, "standardise by step, run the statistic, take its largest value" is one fixed
function of an episode, so the maxima $M_1, \dots, M_n$ of the others and $M_{n+1}$ of the new one
are exchangeable, however scores depend on each other within an episode. With q the
$\lceil (1 - \alpha)(n + 1) \rceil$-th smallest of the n, $P(M_{n+1} > q) \le \alpha$ (split
conformal prediction: Lei et al. 2018, arXiv:1604.04173, §2.2; of standardised curves:
Diquigiovanni, Fontana & Vantini 2025, Statistica Sinica 35:853).

If the standardising episodes were also among the n, their maxima would be too small and the promise
broken. The probability is over the calibration as well as the new episode: given one calibration
the rate is Beta-distributed about it (`Threshold.false_alarm_quantile`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from torch import Tensor

from ood.detectors import as_array
from ood.sequential import ConformalMartingale, Spike, Statistic
from rewardmodels.errors import InvalidInput, require

Array = NDArray[np.float64]

_SMALLEST_SCALE = 1e-3  # of a step's scores, relative to their overall spread


@dataclass(frozen=True, eq=False)
class Threshold:
    """Value that a new episode's statistic exceeds with probability at most alpha.

    Assumes that calibration episodes and new ones are exchangeable.

    Args:
        value: The threshold.
        alpha: Largest chance of a false alarm in an episode (or block; ever, if the statistic is a
            `ConformalMartingale`); 0 for a threshold that was chosen by hand and promises nothing.
        mean: Usual score at each step, `(T,)`, or `(T, D)` of residuals; later steps use the last.
        scale: Usual standard deviation, of the same shape, above 0.
        maxima: `(n,)`, largest values of the statistic in the calibration episodes, sorted. The
            value is their quantile, or 1/alpha if the statistic is a `ConformalMartingale`.
        fingerprint: Of the monitor that it holds for; empty for any.
        period: Steps after which the statistic begins anew in an unending stream; 0 for episodes.

    Raises:
        InvalidInput: Numbers that aren't finite or out of range, shapes that don't agree, or a
            value that isn't the one that alpha and the maxima give.
    """

    value: float
    alpha: float = 0.0
    mean: Array = field(default_factory=lambda: np.zeros(1))
    scale: Array = field(default_factory=lambda: np.ones(1))
    maxima: Array = field(default_factory=lambda: np.zeros(0))
    fingerprint: str = ""
    period: int = 0

    def __post_init__(self) -> None:
        value, alpha, maxima = self.value, self.alpha, self.maxima
        require("value", math.isfinite(value), "a finite number", value)
        require("alpha", 0 <= alpha < 1, "a probability below 1", alpha)
        valid = isinstance(self.period, int) and self.period >= 0
        require("period", valid, "a whole number of steps, 0 or more", self.period)
        shape = self.mean.shape
        valid = len(shape) in (1, 2) and self.mean.size > 0
        require("mean", valid, "shape (T,) or (T, D) with T of at least 1", shape)
        require(
            "scale", self.scale.shape == shape, f"shape {shape}, that of mean", self.scale.shape
        )
        for name in ("mean", "scale", "maxima"):
            finite = bool(np.isfinite(getattr(self, name)).all())
            require(name, finite, "finite numbers", "NaN or infinity")
        require("scale", bool((self.scale > 0).all()), "numbers above 0", self.scale.min())
        valid = maxima.ndim == 1 and bool((np.diff(maxima) >= 0).all())
        require("maxima", valid, "sorted numbers of shape (n,)", f"others, {maxima.shape}")
        if not alpha:
            require("maxima", not len(maxima), "none for alpha = 0, which promises nothing", "some")
        elif not (self.period and value == 1 / alpha):
            promised = maxima[conformal_rank(len(maxima), alpha) - 1]
            expected = f"{promised}, the quantile of the maxima for alpha = {alpha}"
            require("value", value == promised, expected, value)

    @property
    def episodes(self) -> int:
        """Number of calibration episodes (or blocks) whose maxima it comes from."""
        return len(self.maxima)

    def standardise(self, scores: Array, steps: NDArray[np.int64]) -> Array:
        """Standardise scores `(n,)` or residuals `(n, D)` by those usual at `steps` `(n,)`."""
        last = len(self.mean) - 1
        if len(steps) == 1:  # a view, in a fifth of the time that copies take
            step = steps.item()
            at = min(step % self.period if self.period else step, last)
            mean, scale = self.mean[at : at + 1], self.scale[at : at + 1]
        else:
            rows = np.minimum(steps % self.period if self.period else steps, last)
            mean, scale = self.mean.take(rows, 0), self.scale.take(rows, 0)
        if scores.ndim > mean.ndim:
            mean, scale = mean[:, None], scale[:, None]
        standard: Array = scores - mean
        standard /= scale
        return standard

    def false_alarm_quantile(self, probability: float = 0.95) -> float:
        r"""Bound on this calibration's own rate of false alarms, which holds with `probability`.

        Given the calibration, the rate is at most $\text{Beta}(n + 1 - k, k)$ for the k-th smallest
        of n (Vovk 2012, "Conditional validity of inductive conformal predictors").

        Example:
            >>> threshold = Threshold(89.0, alpha=0.1, maxima=np.arange(99.0))
            >>> round(threshold.false_alarm_quantile(0.95), 3)
            0.153
        """
        rank = conformal_rank(self.episodes, self.alpha)
        return float(scipy.stats.beta(self.episodes + 1 - rank, rank).ppf(probability))


def episodes_needed(alpha: float, standardise: float = 0.0) -> int:
    r"""Smallest number of calibration episodes that can promise alpha.

    $\lceil 1/\alpha \rceil - 1$ besides those set apart for standardising.

    Args:
        alpha: Chance of a false alarm in an episode.
        standardise: Share of episodes set apart, as `calibrate` takes it.

    Raises:
        InvalidInput: An alpha that isn't in (0, 1).

    Example:
        >>> episodes_needed(0.05), episodes_needed(0.05, standardise=0.25)
        (19, 25)
    """
    require("alpha", 0 < alpha < 1, "a probability above 0 and below 1", alpha)
    needed = total = math.ceil(1 / alpha - 1e-9) - 1
    while total - _standardising_episodes(total, standardise) < needed:
        total += 1
    return total


def _standardising_episodes(episodes: int, standardise: float) -> int:
    return max(2, round(standardise * episodes)) if standardise else 0


def conformal_rank(n: int, alpha: float) -> int:
    r"""Rank of the threshold among n sorted maxima, $\lceil (1 - \alpha)(n + 1) \rceil$.

    Raises:
        InvalidInput: Too few for this alpha, or an alpha that isn't in (0, 1).
    """
    needed = episodes_needed(alpha)
    fewer = f"since fewer can't promise alpha = {alpha}"
    expected = f"at least {needed} episodes to take the threshold from, {fewer}"
    require("scores", n >= needed, expected, f"{n}; record more, or allow more alarms")
    # 0.95 times 20 may be a rounding error above 19.
    return max(1, math.ceil((1 - alpha) * (n + 1) - 1e-9))


def calibrate(
    scores: Sequence[Tensor],
    statistic: Statistic,
    alpha: float,
    *,
    standardise: float = 0.25,
    window: int = 25,
) -> Threshold:
    """Find the value that a new episode's statistic exceeds with probability at most alpha.

    Assumes that the new episode and those given are exchangeable (see the module). They may differ
    in length; steps beyond the longest use its last mean and standard deviation.

    Args:
        scores: N whole held-out episodes, `(T_i,)` scores or `(T_i, D)` residuals for a
            multivariate statistic, in an order that doesn't depend on them.
        statistic: To run over new episodes.
        alpha: Largest chance of a false alarm in an episode.
        standardise: Share of episodes, the first, that give each step's usual score; the threshold
            comes from the others. At 0 scores are taken as they are.
        window: Steps, centred, that are pooled for a step's mean and standard deviation.

    Raises:
        InvalidInput: Too few episodes for this alpha (the message says how many are needed), NaN,
            infinity, an empty episode, a number out of range, or a statistic of an unending stream.

    Example:
        >>> from ood.sequential import CUSUM
        >>> scores = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
        >>> threshold = calibrate(list(scores), CUSUM(), alpha=0.1)
        >>> threshold.episodes, round(threshold.value, 1)
        (30, 4.2)
        >>> calibrate(list(scores), CUSUM(), alpha=0.01)
        Traceback (most recent call last):
            ...
        rewardmodels.errors.InvalidInput: scores: expected at least 99 episodes to take ...
    """
    episodes, plain = _standardised(scores, statistic, standardise, window)
    needed, given, n = episodes_needed(alpha), len(scores), len(episodes)
    if n < needed <= given:
        raise InvalidInput(
            f"scores: expected at least {needed} episodes for alpha = {alpha} beside the "
            f"{given - n} that only standardise, got {n} of {given}. Record more, or set fewer "
            "apart."
        )
    rank = conformal_rank(n, alpha)
    maxima = np.sort(episode_maxima(episodes, statistic, plain))
    finite = bool(np.isfinite(maxima).all())
    require("statistic", finite, "one of finite numbers", "NaN or infinity")
    return replace(plain, value=float(maxima[rank - 1]), alpha=alpha, maxima=maxima)


def calibrate_stream(
    scores: Tensor, statistic: Statistic, alpha: float, *, block: int, standardise: float = 0.25
) -> Threshold:
    r"""Find a threshold that a block of an unending stream exceeds with probability at most alpha.

    Assumes that blocks are exchangeable, which those of one stream are as far as it is stationary
    and forgets within a block: let a block be many times as long as scores stay correlated. A
    statistic of episodes begins anew at each block of b steps; the mean time before a false alarm
    is at least $b (1/\alpha - 1)$ steps for independent blocks (Jensen's inequality, since each
    calibration has its own rate). A `ConformalMartingale` or `ShiryaevRoberts` goes on from block
    to block: it gets the blocks given here as its history, and the threshold 1 / alpha.

    Args:
        scores: `(L,)`, or `(L, D)` residuals for a multivariate statistic, held out.
        statistic: To run over new blocks.
        alpha: Largest chance of a false alarm in a block; see the two martingales for theirs.
        block: Steps.
        standardise: Share of blocks, the first, that give the usual score.

    Raises:
        InvalidInput: As `calibrate`, of blocks.

    Example:
        >>> scores = torch.randn(4000, generator=torch.Generator().manual_seed(0))
        >>> calibrate_stream(scores, ConformalMartingale(), alpha=0.001, block=100).value
        1000.0
    """
    require("block", block >= 1, "at least one step", block)
    flat = _checked(0, scores, statistic)
    shape = (-1, block, *flat.shape[1:])
    blocks = list(torch.from_numpy(flat[: len(flat) // block * block]).reshape(shape))
    window = 2 * block  # every step of a block is like every other: all are pooled
    if isinstance(statistic, ConformalMartingale):
        episodes_needed(alpha)  # refuses an alpha that is none
        held_out, plain = _standardised(blocks, statistic, standardise, window)
        require("scores", bool(held_out), f"more blocks of {block} steps", len(blocks))
        maxima = np.sort(episode_maxima(held_out, Spike(), plain))
        statistic.history = maxima.tolist()
        return replace(plain, value=1 / alpha, alpha=alpha, maxima=maxima, period=block)
    found = calibrate(blocks, statistic, alpha, standardise=standardise, window=window)
    return replace(found, period=block)


def _standardised(
    scores: Sequence[Tensor], statistic: Statistic, standardise: float, window: int
) -> tuple[list[Array], Threshold]:
    """Set episodes apart to standardise by; return the others, and a threshold without promise."""
    require("standardise", 0 <= standardise < 1, "a share in [0, 1)", standardise)
    require("window", window >= 1, "at least one step", window)
    episodes = [_checked(i, episode, statistic) for i, episode in enumerate(scores)]
    apart = _standardising_episodes(len(episodes), standardise)
    usual = _usual(episodes[:apart], window) if episodes[:apart] else (np.zeros(1), np.ones(1))
    mean, scale = usual
    return episodes[apart:], Threshold(0.0, mean=mean, scale=scale)


def episode_maxima(
    scores: Sequence[Array], statistic: Statistic, threshold: Threshold
) -> NDArray[np.float64]:
    """Largest value `(N,)` of the statistic in each of N episodes `(T_i,)` or `(T_i, D)`."""
    lengths = np.array([len(episode) for episode in scores])
    steps = np.arange(lengths.max())
    padded = np.zeros((len(scores), len(steps), *scores[0].shape[1:]))
    for i, episode in enumerate(scores):
        padded[i, : lengths[i]] = threshold.standardise(np.asarray(episode), steps[: lengths[i]])
    values = statistic.run(padded)
    return np.where(steps < lengths[:, None], values, -np.inf).max(1)


def _usual(episodes: list[Array], window: int) -> tuple[Array, Array]:
    """Mean and standard deviation `(T,)` or `(T, D)` of the scores in a window about each step."""
    longest = max(len(episode) for episode in episodes)
    centre = np.concatenate(episodes).mean(0)
    count, total, squares = np.zeros((3, longest, *centre.shape))
    for episode in episodes:
        # Centred, so that squares keep the digits in which scores differ.
        centred = episode - centre
        count[: len(episode)] += 1
        total[: len(episode)] += centred
        squares[: len(episode)] += centred**2
    width = 2 * (window // 2) + 1
    n, sums, sums_of_squares = (
        width * uniform_filter1d(column, width, 0, mode="constant")
        for column in (count, total, squares)
    )
    mean = sums / n
    variance = np.maximum(sums_of_squares / n - mean**2, 0) * n / np.maximum(n - 1, 1)
    overall = np.sqrt(squares.sum(0) / count.sum(0))
    overall = np.where(overall > 0, overall, 1.0)
    return centre + mean, np.maximum(np.sqrt(variance), _SMALLEST_SCALE * overall)


def _checked(i: int, episode: Tensor, statistic: Statistic) -> Array:
    values = as_array(episode).astype(np.float64)
    dimensions, shape = (2, "(T, D)") if statistic.multivariate else (1, "(T,)")
    if values.ndim != dimensions or not values.size or not np.isfinite(values).all():
        raise InvalidInput(
            f"scores: expected finite numbers of shape {shape} with T of at least 1 for each "
            f"episode, got {'NaN or infinity in' if values.size else 'nothing in'} episode {i}, of "
            f"shape {values.shape}."
        )
    return values
