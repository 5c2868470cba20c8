"""Strategies beside uniform comparisons, seed by seed: what they save, and whether by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments.analysis.old_stats import Values, interquartile_mean
from experiments.studies.strategy_figures import REFERENCE, Interval
from experiments.studies.summary import Row

_RESAMPLES = 2000


class Paired(NamedTuple):
    """One task's accuracies, seed by seed.

    Attributes:
        comparisons: `(batches,)`, those that every cell has.
        accuracy: For each strategy, `(batches,)` for each seed that stands there.
    """

    comparisons: Values
    accuracy: dict[str, dict[int, Values]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Paired:
        """The task's cells; folds of people's answers may differ in how many they have."""
        shared = sorted(set.intersection(*(set(row["comparisons"]) for row in rows)))
        found: dict[str, dict[int, Values]] = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            at = [row["comparisons"].index(n) for n in shared]
            found.setdefault(row["strategy"], {})[row["seed"]] = np.array(row["accuracy"])[at]
        names = list(dict.fromkeys(row["strategy"] for row in rows))
        return cls(np.array(shared, float), {name: found[name] for name in names})

    def beside_uniform(self, name: str) -> tuple[Values, Values]:
        """A strategy's curves and uniform's, each `(seeds, batches)`, of the seeds of both."""
        own, uniform = self.accuracy[name], self.accuracy.get(REFERENCE, {})
        both = [seed for seed in own if seed in uniform]
        none = np.empty((0, len(self.comparisons)))
        if not both:
            return none, none
        return np.stack([own[s] for s in both]), np.stack([uniform[s] for s in both])

    @property
    def compared(self) -> list[str]:
        """Strategies that share a seed with uniform comparisons."""
        return [n for n in self.accuracy if n != REFERENCE and len(self.beside_uniform(n)[0])]


def labels_needed(curve: Values, comparisons: Values, level: float) -> float:
    """Comparisons at which a curve first reaches a level; NaN where it doesn't.

    Linear between batches.

    Example:
        >>> labels_needed(np.array([0.5, 0.7, 0.9]), np.array([20.0, 40.0, 60.0]), 0.8)
        50.0
    """
    reached = np.flatnonzero(curve >= level)
    if not len(reached):
        return float("nan")
    place = int(reached[0])
    if place == 0:
        return float(comparisons[0])
    low, high = curve[place - 1], curve[place]
    share = (level - low) / (high - low)
    return float(comparisons[place - 1] + share * (comparisons[place] - comparisons[place - 1]))


def labels_ratio(own: Values, uniform: Values, comparisons: Values, at: float) -> Interval:
    """A strategy's comparisons for uniform's accuracy at so many, over those uniform needs for it.

    Curves are interquartile means over seeds. Seeds are resampled together, since a seed has the
    same candidates and tests for both. Uniform's own count is where it first reaches the level:
    over `at` itself, a noisy curve that is nearly flat would seem to save when nothing does.

    Args:
        own: `(seeds, batches)` accuracy.
        uniform: The same of uniform comparisons.
        comparisons: `(batches,)`.
        at: Comparisons of the uniform strategy to take the level from.

    Returns:
        Ratio, and its 95% bootstrap interval; infinite where the level isn't reached with the
        comparisons there are, which are never extrapolated.
    """
    seeds = len(own)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([np.arange(seeds)[None], rng.integers(seeds, size=(_RESAMPLES, seeds))])
    ratios = np.array([
        labels_needed(mine, comparisons, level) / labels_needed(theirs, comparisons, level)
        for mine, theirs in zip(_means(own, drawn), _means(uniform, drawn), strict=True)
        for level in [np.interp(at, comparisons, theirs)]
    ])  # fmt: skip
    ratios[np.isnan(ratios)] = np.inf
    # No mean of two draws, one of which may be infinite.
    low, high = np.quantile(ratios[1:], [0.025, 0.975], method="inverted_cdf")
    return float(ratios[0]), float(low), float(high)


def _means(curves: Values, drawn: NDArray[np.integer]) -> Values:
    return interquartile_mean(curves[drawn], axis=1)


def friedman(ranks: Values) -> str:
    """Whether ranks differ by more than chance, in a sentence.

    Friedman's test, as Demšar (2006, section 3.2.2) has it for data sets and classifiers.

    Args:
        ranks: `(tasks, strategies)`.

    Example:
        >>> friedman(np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]))
        'Ranks differ by more than chance over 4 tasks (Friedman test, p = 0.018).'
    """
    tasks, strategies = ranks.shape
    if tasks < 3 or strategies < 3:
        return (
            "Whether ranks differ by more than chance can't be told: that takes three tasks and "
            f"three strategies at least, and here are {tasks} and {strategies}."
        )
    if (ranks == ranks[:, :1]).all():
        return f"All strategies tie on all {tasks} tasks."
    p = float(stats.friedmanchisquare(*ranks.T).pvalue)
    shown = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
    if p < 0.05:
        return f"Ranks differ by more than chance over {tasks} tasks (Friedman test, {shown})."
    return (
        f"That ranks differ by more than chance can't be told from {tasks} tasks (Friedman test, "
        f"{shown})."
    )
