r"""Slow drift over whole episodes: betting against the hypothesis that nothing has changed.

Each episode has one score, such as the largest value of its statistic. Among exchangeable episodes
the rank of the newest is uniform, and independent of the ranks before it, so that its p-value

$$p_n = \frac{\#\{i: s_i > s_n\} + \tau_n \#\{i: s_i = s_n\}}{n}, \quad \tau_n \sim U[0, 1]$$

(i up to n) is exactly uniform (Vovk, Nouretdinov & Gammerman 2003, "Testing exchangeability
on-line", Theorem 1). A bet $b_\epsilon(p) = \epsilon p^{\epsilon - 1}$, whose mean is 1, wins where
p is small, that is where scores are unusually high. No calibrated threshold is involved, and no
number of episodes has to be fixed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rewardmodels import InvalidInput

Array = NDArray[np.float64]

# Each is a martingale, and so is their mean. Small epsilons win where few scores are far out, large
# ones where many are a little so.
_BETS = np.array([0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95])


class RankBet(ABC):
    """Wealth of bets on the rank of each new episode's score; an alarm once it reaches 1/alpha.

    Args:
        alpha: In (0, 1).
        history: Scores of episodes that are known to be familiar, in any order. Nothing is bet on
            them; without them the first ranks say little.
        seed: Of the draws that break ties.

    Attributes:
        wealth: After the latest score.

    Raises:
        InvalidInput: An alpha that isn't in (0, 1), or NaN in the history.
    """

    def __init__(self, alpha: float = 0.01, history: Iterable[float] = (), seed: int = 0) -> None:
        if not 0 < alpha < 1:
            raise InvalidInput(f"alpha: expected a probability above 0 and below 1, got {alpha}.")
        self.alpha = alpha
        self._sorted = sorted(_number("history", score) for score in history)
        self._random = np.random.default_rng(seed)
        self._log_wealth = np.full(len(_BETS), self._start)

    _start: float
    """Log wealth before the first bet."""

    def p_value(self, score: float) -> float:
        """Adds an episode's score, and says how far up it is: uniform if nothing has changed.

        Takes O(log n) comparisons for the n-th.

        Raises:
            InvalidInput: NaN.
        """
        score = _number("score", score)
        insort(self._sorted, score)
        n, last = len(self._sorted), bisect_right(self._sorted, score)
        above, equal = n - last, last - bisect_left(self._sorted, score)
        # From (0, 1], so that no bet wins infinitely much.
        return (above + (1 - self._random.random()) * equal) / n

    def update(self, score: float) -> float:
        """Takes in an episode's score.

        Returns:
            The wealth.

        Raises:
            InvalidInput: NaN.
        """
        self._log_wealth = self._next(self._log_wealth, self.p_value(score))
        return self.wealth

    @property
    def wealth(self) -> float:
        """Mean over the bets."""
        most = float(self._log_wealth.max())
        if most == -math.inf:
            return 0.0
        # Past the range of a number it stands still: an alarm by far.
        mean = float(np.exp(self._log_wealth - most).mean())
        return math.exp(min(most, 700.0)) * mean

    @property
    def alarm(self) -> bool:
        r"""Whether the wealth is at least $1 / \alpha$."""
        return self.wealth >= 1 / self.alpha

    @abstractmethod
    def _next(self, log_wealth: Array, p: float) -> Array:
        """Log wealth `(bets,)` after one more p-value."""


class ConformalMartingale(RankBet):
    r"""Product of all bets: false with probability at most alpha, ever.

    $M_n = \frac1J \sum_j \prod_{i \le n} \epsilon_j p_i^{\epsilon_j - 1}$, a mixture of power
    martingales (Vovk et al. 2003). By Ville's inequality $P(\sup_n M_n \ge 1/\alpha) \le
    \alpha$ over an unending sequence. While nothing changes it loses, so a change that comes late
    takes long to see; `ShiryaevRoberts` doesn't tire.

    Example:
        >>> martingale = ConformalMartingale(alpha=0.01, history=range(20))
        >>> [martingale.update(30.0 + drift) > 100 for drift in range(5)]
        [False, False, False, False, True]
    """

    _start = 0.0

    def _next(self, log_wealth: Array, p: float) -> Array:
        return log_wealth + _log_bets(p)


class ShiryaevRoberts(RankBet):
    r"""Sum of the products since each episode: on average $1/\alpha$ episodes to a false alarm.

    $R_n = (R_{n-1} + 1)\, b(p_n)$, from 0, for each bet, and the mean over bets. As $R_n - n$ is a
    martingale, the mean number of episodes until $R \ge 1/\alpha$ is at least $1/\alpha$ while
    nothing changes (Shiryaev 1963; Roberts 1966; of conformal martingales Vovk 2021,
    "Testing randomness online", arXiv:1906.09256; of e-values Shin, Ramdas & Rinaldo 2024,
    arXiv:2203.03532). Sees a change whenever it comes.

    Example:
        >>> detector = ShiryaevRoberts(alpha=0.01, history=range(20))
        >>> [detector.update(30.0 + drift) > 100 for drift in range(5)]
        [False, False, False, False, True]
    """

    _start = -math.inf

    def _next(self, log_wealth: Array, p: float) -> Array:
        grown: Array = np.logaddexp(log_wealth, 0.0) + _log_bets(p)
        return grown


def _log_bets(p: float) -> Array:
    return np.log(_BETS) + (_BETS - 1) * math.log(p)


def _number(name: str, value: float) -> float:
    if math.isnan(value):
        raise InvalidInput(f"{name}: expected a number, or infinity, got NaN.")
    return float(value)
