r"""Statistics over a stream of scores, O(1) a step, for any number of environments at once.

Their inputs are scores in standard deviations from what is usual at that step of an episode (see
`ood.conformal`), so that their parameters mean the same for every detector. A multivariate
statistic reads D residuals a frame (`OODDetector.residuals`), whose signs let a lasting bias add up
while noise cancels.

`Spike`, `EWMA`, `CUSUM` and `MEWMA` begin anew with each episode, or block of a stream, and get
their threshold from a conformal quantile. `ConformalMartingale` and `ShiryaevRoberts` are for
deployments without episodes, and for drift too slow to make one block anomalous: they bet, at the
end of each block, that its largest score ranks high among all blocks so far. Among exchangeable
blocks the p-value

$$p_n = \frac{\#\{i: s_i > s_n\} + \tau_n \#\{i: s_i = s_n\}}{n}, \quad \tau_n \sim U[0, 1]$$

(i up to n) is uniform and independent of those before it (Vovk, Nouretdinov & Gammerman 2003,
"Testing exchangeability on-line", Theorem 1), so that a bet $b_\epsilon(p) = \epsilon
p^{\epsilon - 1}$ has mean 1, and wins where scores are unusually high.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewardmodels.errors import InvalidInput, require

Array = NDArray[np.float64]

# The wealth is the mean over these bets. Small epsilons win where few scores are far out, large
# ones where many are a little higher than usual.
BETS = np.array([0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95])


class Statistic(ABC):
    """Running statistic of each of n environments, shape `(n,)`; higher is more anomalous.

    A subclass writes `next_value`, and `read` where what it remembers isn't the statistic itself.
    Constructor arguments are kept as attributes of the same names.

    Example:
        >>> cusum = CUSUM(drift=0.5)
        >>> cusum.start(2)
        >>> [cusum.update(z).tolist() for z in ([1.0, 0.0], [2.0, -1.0])]
        [[0.5, 0.0], [2.0, 0.0]]
        >>> cusum.reset(np.array([True, False]))
        >>> cusum.update([1.0, 0.5]).tolist()
        [0.5, 0.0]
    """

    multivariate: ClassVar[bool] = False
    """True if it reads `(n, D)` residuals in place of `(n,)` scores."""

    value: Array
    """Memory of each environment."""

    @abstractmethod
    def next_value(self, value: Array, scores: Array) -> Array:
        """Memory after `scores`, given the memory before; 0 at the start, of the same shape."""

    def read(self, value: Array) -> Array:
        """Statistic `(n,)` of a memory."""
        return value

    def start(self, n: int) -> None:
        """Begin with n environments, at least one."""
        require("n", n >= 1, "at least one environment", n)
        self.value = self._initial_value(n)

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Begin an episode where `mask` `(n,)` is True."""
        self.value[mask] = 0.0

    def end_block(self, mask: NDArray[np.bool_]) -> None:
        """End a block of an unending stream where `mask` `(n,)` is True, and begin another."""
        self.reset(mask)

    def restart(self, mask: NDArray[np.bool_]) -> None:
        """Forget all scores where `mask` `(n,)` is True, after a decision to go on."""
        self.reset(mask)

    def update(self, scores: ArrayLike) -> Array:
        """Add one score of each environment, `(n,)`, or residuals `(n, D)`.

        Returns:
            Statistic `(n,)`; infinite once a score was, until it is reset.
        """
        self.value = self.next_value(self.value, np.asarray(scores, np.float64))
        return self.read(self.value)

    def run(self, scores: ArrayLike) -> Array:
        """Statistic `(N, T)` of whole episodes of scores `(N, T)`, or residuals `(N, T, D)`."""
        scores = np.asarray(scores, np.float64)
        values, value = np.empty(scores.shape[:2]), self._initial_value(len(scores))
        for step in range(scores.shape[1]):
            value = self.next_value(value, scores[:, step])
            values[:, step] = self.read(value)
        return values

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def _initial_value(self, n: int) -> Array:
        # One column broadcasts to the D that come.
        return np.zeros((n, 1) if self.multivariate else n)


class Spike(Statistic):
    """Score of the latest frame: for anomalies of a single frame.

    Example:
        >>> Spike().run([[1.0, 3.0, -1.0]]).tolist()
        [[1.0, 3.0, -1.0]]
    """

    def next_value(self, value: Array, scores: Array) -> Array:
        return scores


class EWMA(Statistic):
    r"""Exponentially weighted moving average $s_t = (1 - \lambda) s_{t-1} + \lambda z_t$.

    It remembers about $1/\lambda$ steps (Roberts 1959, Technometrics 1:239).

    Args:
        weight: $\lambda$, of the newest score.

    Raises:
        InvalidInput: A weight that isn't in (0, 1].

    Example:
        >>> EWMA(weight=0.5).run([[2.0, 2.0, 0.0]]).tolist()
        [[1.0, 1.5, 0.75]]
    """

    def __init__(self, weight: float = 0.1) -> None:
        require("weight", 0 < weight <= 1, "a number in (0, 1]", weight)
        self.weight = weight

    def next_value(self, value: Array, scores: Array) -> Array:
        # The form with one product would subtract infinity from infinity.
        return (1 - self.weight) * value + self.weight * scores


class CUSUM(Statistic):
    r"""Cumulative sum $c_t = \max(0, c_{t-1} + z_t - k)$ of deviations, however small.

    Page 1954 (Biometrika 41:100). It is the quickest to find a lasting shift by 2k standard
    deviations (Lorden 1971; Moustakides 1986).

    Args:
        drift: k, which a score must exceed to count, in standard deviations.

    Raises:
        InvalidInput: A drift that isn't a finite number of at least 0.

    Example:
        >>> CUSUM(drift=0.5).run([[1.0, 1.0, -3.0]]).tolist()
        [[0.5, 1.0, 0.0]]
    """

    def __init__(self, drift: float = 0.5) -> None:
        require("drift", 0 <= drift < np.inf, "a finite number of at least 0", drift)
        self.drift = drift

    def next_value(self, value: Array, scores: Array) -> Array:
        return np.maximum(0.0, value + scores - self.drift)


class MEWMA(Statistic):
    r"""Norm $\lVert m_t \rVert / \sqrt D$ of the moving average of D residuals clipped to $\pm c$.

    $m_t = (1 - \lambda) m_{t-1} + \lambda z_t$, the multivariate exponentially weighted moving
    average (Lowry, Woodall, Champ & Rigdon 1992, Technometrics 34:46, eq. 2). Errors of varying
    sign cancel, and small ones that keep their sign add up; by clipping, the rare large errors of a
    contact don't set the threshold alone.

    Args:
        weight: $\lambda$, of the newest residuals.
        clip: c, in standard deviations.

    Raises:
        InvalidInput: A weight that isn't in (0, 1], or a clip that isn't above 0.

    Example:
        >>> MEWMA(weight=0.5).run([[[2.0, 0.0], [-2.0, 0.0], [9.0, 0.0]]]).round(2).tolist()
        [[0.71, 0.35, 0.88]]
    """

    multivariate = True

    def __init__(self, weight: float = 0.1, clip: float = 3.0) -> None:
        require("weight", 0 < weight <= 1, "a number in (0, 1]", weight)
        require("clip", clip > 0, "a number above 0", clip)
        self.weight, self.clip = weight, clip

    def next_value(self, value: Array, scores: Array) -> Array:
        clipped = np.maximum(scores, -self.clip)
        np.minimum(clipped, self.clip, out=clipped)
        # Infinity isn't clipped: it has to stay. The sum of squares shows whether there is any.
        if not math.isfinite(np.vdot(scores, scores)):
            clipped[~np.isfinite(scores)] = np.inf
        clipped *= self.weight
        clipped += (1 - self.weight) * value
        return clipped

    def read(self, value: Array) -> Array:
        return root_mean_square(value)


class ConformalMartingale(Statistic):
    r"""Wealth of bets on block ranks: exceeds 1/alpha, ever, with probability at most alpha.

    Assumes that blocks are exchangeable. $M_n = \frac1J \sum_j \prod_{i \le n} \epsilon_j
    p_i^{\epsilon_j - 1}$ is a mixture of power martingales (Vovk et al. 2003), and Ville's
    inequality has $P(\sup_n M_n \ge 1/\alpha) \le \alpha$ over an unending stream. It loses while
    nothing changes, so a late change takes long to find; `ShiryaevRoberts` finds it sooner.
    `Monitor.calibrate_stream` sets the history and the threshold.

    Args:
        history: Largest scores of normal blocks, in any order, on which no bets are made.
        seed: Of the draws that break ties.

    Raises:
        InvalidInput: NaN or infinity in the history.

    Example:
        >>> martingale, wealth = ConformalMartingale(history=range(20)), []
        >>> martingale.start(1)
        >>> for score in range(30, 35):
        ...     _ = martingale.update([score])
        ...     martingale.end_block(np.array([True]))
        ...     wealth.append(martingale.read(martingale.value).item() > 100)
        >>> wealth
        [False, False, False, False, True]
    """

    _initial_log_wealth = 0.0

    def __init__(self, history: Sequence[float] = (), seed: int = 0) -> None:
        self.history, self.seed = [float(score) for score in history], seed
        finite = all(map(math.isfinite, self.history))
        require("history", finite, "finite numbers", "NaN or infinity")

    def start(self, n: int) -> None:
        super().start(n)
        self._random = np.random.default_rng(self.seed)
        self._blocks = [np.array(self.history) for _ in range(n)]
        self._log_wealth = np.full((n, len(BETS)), self._initial_log_wealth)

    def next_value(self, value: Array, scores: Array) -> Array:
        return np.maximum(value, scores)  # largest score of the block so far

    def read(self, value: Array) -> Array:
        most = self._log_wealth.max(1, keepdims=True)
        shares = np.exp(self._log_wealth - np.where(np.isfinite(most), most, 0.0))
        # Past the range of a number the wealth stands still, far above any threshold.
        return np.exp(np.minimum(most[:, 0], 700.0)) * shares.mean(1)

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Leave out the unfinished block where `mask` `(n,)` is True; the wealth stays."""
        self.value[mask] = -np.inf

    def end_block(self, mask: NDArray[np.bool_]) -> None:
        """Bet on the block that ends where `mask` `(n,)` is True, and begin another."""
        for i in np.flatnonzero(mask & (self.value > -np.inf)):
            log_p = math.log(self.p_value(int(i), self.value[i]))
            log_bets = np.log(BETS) + (BETS - 1) * log_p
            self._log_wealth[i] = self._bet(self._log_wealth[i], log_bets)
        self.reset(mask)

    def restart(self, mask: NDArray[np.bool_]) -> None:
        self.reset(mask)
        self._log_wealth[mask] = self._initial_log_wealth

    def p_value(self, i: int, score: float) -> float:
        """Add a block's score to environment i; return its p-value, uniform if nothing changes."""
        self._blocks[i] = blocks = np.append(self._blocks[i], score)
        above, equal = np.count_nonzero(blocks > score), np.count_nonzero(blocks == score)
        # From (0, 1], so that no bet wins infinitely much.
        return (above + (1 - self._random.random()) * equal) / len(blocks)

    def run(self, scores: ArrayLike) -> Array:
        """Raise InvalidInput, since it bets at the ends of blocks."""
        raise InvalidInput(
            "statistic: expected one that begins anew with each episode, got "
            f"{type(self).__name__}, which goes on from block to block; use calibrate_stream."
        )

    def _bet(self, log_wealth: Array, log_bets: Array) -> Array:
        return log_wealth + log_bets

    def _initial_value(self, n: int) -> Array:
        return np.full(n, -np.inf)


class ShiryaevRoberts(ConformalMartingale):
    r"""Sum of wealths since each block: exceeds 1/alpha after at least 1/alpha blocks on average.

    Assumes that blocks are exchangeable. $R_n = (R_{n-1} + 1)\, b(p_n)$, from 0, for each bet, and
    the mean over bets. As $R_n - n$ is a martingale, the mean number of blocks until $R \ge
    1/\alpha$ is at least $1/\alpha$ while nothing changes (Shiryaev 1963; Roberts 1966; of
    conformal martingales Vovk 2021, "Testing randomness online", arXiv:1906.09256; of e-values
    Shin, Ramdas & Rinaldo 2024, arXiv:2203.03532).
    """

    _initial_log_wealth = -math.inf

    def _bet(self, log_wealth: Array, log_bets: Array) -> Array:
        return np.logaddexp(log_wealth, 0.0) + log_bets


def root_mean_square(values: Array) -> Array:
    """Root mean square `(n,)` of the rows of `(n, D)`."""
    if len(values) == 1:  # a third of the time, as one number
        return np.array([math.sqrt(np.vdot(values, values) / values.shape[1])])
    with np.errstate(over="ignore"):  # then it is infinite
        size: Array = np.sqrt(np.vecdot(values, values) / values.shape[1])
    return size


STATISTICS: dict[str, type[Statistic]] = {cls.__name__: cls for cls in (Spike, EWMA, CUSUM, MEWMA)}
"""Statistics of an episode, by name. Those of an unending stream are in `STREAM_STATISTICS`."""

STREAM_STATISTICS: dict[str, type[Statistic]] = {
    cls.__name__: cls for cls in (ConformalMartingale, ShiryaevRoberts)
}
