"""Statistics over a stream of scores: each O(1) a step, over any number of environments at once.

What they are given are scores in standard deviations, as usual at that time in an episode (see
`ood.conformal`), so that their parameters mean the same for every detector. A signed statistic is
given D numbers a frame that have directions (`ood.OODDetector.signed`), of which a lasting bias
adds up where their size would drown it.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewardmodels import InvalidInput

Array = NDArray[np.float64]


class Statistic(ABC):
    """What has been seen so far, as one number for each of n environments: higher is stranger.

    Example:
        >>> cusum = CUSUM(drift=0.5)
        >>> cusum.start(2)
        >>> [cusum.update(z).tolist() for z in ([1.0, 0.0], [2.0, -1.0])]
        [[0.5, 0.0], [2.0, 0.0]]
        >>> cusum.reset(np.array([True, False]))
        >>> cusum.update([1.0, 0.5]).tolist()
        [0.5, 0.0]
    """

    signed: ClassVar[bool] = False
    """Whether it is given `(n, D)` signed numbers in place of `(n,)` scores."""

    value: Array
    """What it remembers of each environment."""

    def start(self, n: int) -> None:
        """Begins anew, for n environments.

        Raises:
            InvalidInput: Less than one.
        """
        if n < 1:
            raise InvalidInput(f"n: expected at least one environment, got {n}.")
        self.value = self._nothing(n)

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Begins anew where `mask` `(n,)` is True."""
        self.value[mask] = 0.0

    def update(self, scores: ArrayLike) -> Array:
        """Takes in one score of each environment.

        Args:
            scores: `(n,)`, or `(n, D)` of a signed statistic.

        Returns:
            `(n,)`, the statistic; infinite once a score was, until it is reset.
        """
        self.value = self._next(self.value, np.asarray(scores, np.float64))
        return self._read(self.value)

    def run(self, scores: ArrayLike) -> Array:
        """The statistic at each step of N whole streams, and leaves no trace.

        Args:
            scores: `(N, T)`, or `(N, T, D)` of a signed statistic.

        Returns:
            `(N, T)`.
        """
        scores = np.asarray(scores, np.float64)
        values, value = np.empty(scores.shape[:2]), self._nothing(len(scores))
        for step in range(scores.shape[1]):
            value = self._next(value, scores[:, step])
            values[:, step] = self._read(value)
        return values

    @property
    def settings(self) -> dict[str, Any]:
        """What it was constructed with."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @abstractmethod
    def _next(self, value: Array, scores: Array) -> Array:
        """What follows `value`, which was 0 at the start, on `scores` of the same shape."""

    def _nothing(self, n: int) -> Array:
        # One column broadcasts to the D that come.
        return np.zeros((n, 1) if self.signed else n)

    def _read(self, value: Array) -> Array:
        """`(n,)`: the statistic of what is remembered."""
        return value


class Spike(Statistic):
    """The score itself, which forgets at once: for what is strange in a single frame.

    Example:
        >>> Spike().run([[1.0, 3.0, -1.0]]).tolist()
        [[1.0, 3.0, -1.0]]
    """

    def _next(self, value: Array, scores: Array) -> Array:
        return scores


class EWMA(Statistic):
    r"""$s_t = (1 - \lambda) s_{t-1} + \lambda z_t$, which remembers about $1/\lambda$ steps.

    The exponentially weighted moving average (Roberts 1959, Technometrics 1:239).

    Args:
        weight: $\lambda$, of the newest score.

    Raises:
        InvalidInput: A weight that isn't in (0, 1].

    Example:
        >>> EWMA(weight=0.5).run([[2.0, 2.0, 0.0]]).tolist()
        [[1.0, 1.5, 0.75]]
    """

    def __init__(self, weight: float = 0.1) -> None:
        if not 0 < weight <= 1:
            raise InvalidInput(f"weight: expected a number in (0, 1], got {weight}.")
        self.weight = weight

    def _next(self, value: Array, scores: Array) -> Array:
        # The form with one product of the difference would make infinity less infinity of two.
        return (1 - self.weight) * value + self.weight * scores


class CUSUM(Statistic):
    r"""$c_t = \max(0, c_{t-1} + z_t - k)$, which adds up what is strange, however little.

    Page 1954 (Biometrika 41:100). It is quickest to see a lasting shift by 2k standard deviations
    (Lorden 1971; Moustakides 1986).

    Args:
        drift: k, what a score must exceed to count, in standard deviations.

    Raises:
        InvalidInput: A drift that isn't a finite number of at least 0.

    Example:
        >>> CUSUM(drift=0.5).run([[1.0, 1.0, -3.0]]).tolist()
        [[0.5, 1.0, 0.0]]
    """

    def __init__(self, drift: float = 0.5) -> None:
        if not 0 <= drift < np.inf:
            raise InvalidInput(f"drift: expected a finite number of at least 0, got {drift}.")
        self.drift = drift

    def _next(self, value: Array, scores: Array) -> Array:
        return np.maximum(0.0, value + scores - self.drift)


class MEWMA(Statistic):
    r"""$\lVert m_t \rVert / \sqrt D$, with signed $m_t = (1 - \lambda) m_{t-1} + \lambda z_t$.

    The multivariate exponentially weighted moving average (Lowry, Woodall, Champ & Rigdon 1992,
    Technometrics 34:46, eq. 2), of D numbers z clipped to $\pm c$. Errors of no constant sign
    cancel, and one that has the same sign at every step stays, though each be small; clipped, the
    rare large errors of a contact don't set the threshold by themselves.

    Args:
        weight: $\lambda$, of the newest numbers.
        clip: c, in standard deviations.

    Raises:
        InvalidInput: A weight that isn't in (0, 1], or a clip that isn't above 0.

    Example:
        >>> MEWMA(weight=0.5).run([[[2.0, 0.0], [-2.0, 0.0], [9.0, 0.0]]]).round(2).tolist()
        [[0.71, 0.35, 0.88]]
    """

    signed = True

    def __init__(self, weight: float = 0.1, clip: float = 3.0) -> None:
        if not 0 < weight <= 1:
            raise InvalidInput(f"weight: expected a number in (0, 1], got {weight}.")
        if not clip > 0:
            raise InvalidInput(f"clip: expected a number above 0, got {clip}.")
        self.weight, self.clip = weight, clip

    def _next(self, value: Array, scores: Array) -> Array:
        clipped = np.maximum(scores, -self.clip)
        np.minimum(clipped, self.clip, out=clipped)
        # Infinity isn't just another large error: it has to stay. A sum of squares tells at once.
        if not math.isfinite(np.vdot(scores, scores)):
            clipped[~np.isfinite(scores)] = np.inf
        clipped *= self.weight
        clipped += (1 - self.weight) * value
        return clipped

    def _read(self, value: Array) -> Array:
        return root_mean_square(value)


def root_mean_square(values: Array) -> Array:
    """`(n,)` of `(n, D)`.

    Example:
        >>> root_mean_square(np.array([[1.0, 7.0], [5.0, 5.0]])).tolist()
        [5.0, 5.0]
    """
    if len(values) == 1:  # as one number, in a third of the time
        return np.array([math.sqrt(np.vdot(values, values) / values.shape[1])])
    with np.errstate(over="ignore"):  # which is infinitely strange
        size: Array = np.sqrt(np.vecdot(values, values) / values.shape[1])
    return size


STATISTICS: dict[str, type[Statistic]] = {cls.__name__: cls for cls in (Spike, EWMA, CUSUM, MEWMA)}
"""Those that a file's name is looked up in."""
