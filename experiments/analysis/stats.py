"""Statistics over seeds and tasks (Agarwal et al. 2021, arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Values = NDArray[np.floating]

LEAST_SEEDS = 5
"""With fewer, no difference is called better or worse."""


class Interval(NamedTuple):
    """An estimate with its 95% bootstrap interval.

    Example:
        >>> f"{Interval(0.46, 0.42, 0.534):.2f}"
        '0.46 (0.42 to 0.53)'
    """

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        value, low, high = (number(x, spec) for x in self)
        return value if np.isnan(self.low) else f"{value} ({low} to {high})"

    def verdict(self, seeds: int, *, even: float = 0.0, higher_is_better: bool = True) -> Verdict:
        """Compare with no difference: "better", "worse", or "unclear" if the interval holds it.

        Args:
            seeds: Behind the interval; below `LEAST_SEEDS` the verdict is always "unclear".
            even: Value of no difference, 0 for differences and 1 for ratios.
            higher_is_better: Direction of the metric.

        Example:
            >>> Interval(0.7, 0.5, 0.9).verdict(seeds=10, even=1, higher_is_better=False)
            'better'
        """
        if seeds < LEAST_SEEDS or not (self.high < even or self.low > even):
            return "unclear"
        return "better" if (self.low > even) == higher_is_better else "worse"


Verdict = Literal["better", "worse", "unclear"]


def number(x: float, spec: str) -> str:
    """Format a number for a reader; NaN becomes a dash.

    Example:
        >>> number(-0.5, ".2f"), number(float("inf"), ".2f"), number(float("nan"), ".2f")
        ('−0.50', '∞', '–')
    """
    return "–" if np.isnan(x) else f"{x:{spec}}".replace("inf", "∞").replace("-", "−")


def bootstrap(
    statistic: Callable[..., float],
    *samples: ArrayLike,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic, by `scipy.stats.bootstrap`.

    Each sample is resampled along its first axis, and apart from the others: one sample a task
    makes the bootstrap stratified by task; arms that share seeds are stacked along a later axis of
    one sample, and so resampled together. Interval ends are values that were attained, so
    infinite values are allowed.

    Args:
        statistic: Takes the samples, each `(n_i, ...)`, and returns a number.
        samples: Arrays; their lengths may differ.
        level: Share of resamples inside the interval.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        The statistic of the samples with its interval; ends are NaN where a sample has fewer than
        two values.

    Example:
        >>> value, low, high = bootstrap(interquartile_mean, np.arange(5.0))
        >>> low < value < high
        True
    """
    arrays = [np.asarray(sample) for sample in samples]
    value = float(statistic(*arrays))
    if any(len(array) < 2 for array in arrays):
        return Interval(value, float("nan"), float("nan"))

    def of_rows(*rows: NDArray[np.integer]) -> float:
        return statistic(*(array[row] for array, row in zip(arrays, rows, strict=True)))

    with np.errstate(invalid="ignore"):  # SciPy's standard error, where values are infinite
        drawn = stats.bootstrap(
            [np.arange(len(array)) for array in arrays],
            of_rows,
            n_resamples=resamples,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(drawn, ends, method="inverted_cdf")
    return Interval(value, float(low), float(high))


def interquartile_mean(values: ArrayLike, axis: int = 0) -> Any:
    """Mean of the middle half: as robust as the median, with less variance.

    Example:
        >>> float(interquartile_mean([0.0, 1.0, 2.0, 100.0]))
        1.5
    """
    ordered = np.sort(np.asarray(values, float), axis=axis)  # faster than scipy.stats.trim_mean
    cut = ordered.shape[axis] // 4
    middle = np.arange(cut, ordered.shape[axis] - cut)
    return np.take(ordered, middle, axis=axis).mean(axis=axis)


def over_tasks(results: pd.DataFrame, column: str) -> Interval:
    """Interquartile mean of a column over tasks and seeds, its interval stratified by task.

    Seeds (a row each) are resampled within each `task`, so the interval is about these tasks.
    """
    samples = [rows[column].to_numpy(float) for _, rows in results.groupby("task", sort=False)]
    return bootstrap(lambda *drawn: interquartile_mean(np.concatenate(drawn)), *samples)


def paired(results: pd.DataFrame, column: str, by: str, reference: str) -> pd.DataFrame:
    """Difference of each arm from a reference arm, seed by seed.

    Args:
        results: Rows with `task`, `seed` and the columns named below.
        column: Metric to subtract.
        by: Column that names the arm.
        reference: Arm that is subtracted from the others.

    Returns:
        Columns `task`, `seed`, `by` and `difference`, for the seeds that both arms have.

    Example:
        >>> rows = pd.DataFrame({"task": "Hopper", "seed": [0, 0, 1], "arm": ["a", "b", "a"],
        ...                      "accuracy": [0.5, 0.75, 0.5]})
        >>> paired(rows, "accuracy", "arm", "a").to_dict("records")
        [{'task': 'Hopper', 'seed': 0, 'arm': 'b', 'difference': 0.25}]
    """
    keys = ["task", "seed"]
    base = results.loc[results[by] == reference, [*keys, column]]
    both = results[results[by] != reference].merge(base, on=keys, suffixes=("", "_reference"))
    both["difference"] = both[column] - both[f"{column}_reference"]
    return both[[*keys, by, "difference"]]


def curve_matrix(results: pd.DataFrame, y: str, x: str = "comparisons") -> pd.DataFrame:
    """Return y by seed (rows) and x (columns), for the seeds and points that are complete.

    `results` has tidy rows of one arm on one task, with `seed`, x and y.
    """
    table = results.pivot_table(index="seed", columns=x, values=y)
    return table.dropna(axis="columns", thresh=len(table)).dropna()


def first_reached(x: Values, y: Values, level: float) -> float:
    """Return the x at which a curve first reaches a level, linear in between; infinite if never.

    Example:
        >>> first_reached(np.array([20.0, 40.0, 60.0]), np.array([0.5, 0.7, 0.9]), 0.8)
        50.0
    """
    reached = np.flatnonzero(y >= level)
    if not len(reached):
        return float("inf")
    place = int(reached[0])
    if place == 0:
        return float(x[0])
    share = (level - y[place - 1]) / (y[place] - y[place - 1])
    return float(x[place - 1] + share * (x[place] - x[place - 1]))


def labels_ratio(own: pd.DataFrame, reference: pd.DataFrame, at: float) -> Interval:
    """Comparisons for the reference's accuracy at so many, over those that the reference needs.

    Curves are interquartile means over the seeds that both have; these are resampled together,
    since a seed has the same candidates and tests for both. The reference's own count is where it
    first reaches the level: over `at` itself, a noisy curve that is nearly flat would seem to save
    comparisons. Infinite where the level isn't reached, which is never extrapolated.

    Args:
        own: By seed (rows) and comparisons (columns), as `curve_matrix` returns it.
        reference: The same of the arm to compare with.
        at: Comparisons of the reference at which its level is taken.
    """
    seeds = own.index.intersection(reference.index)
    counts = own.columns.intersection(reference.columns)
    comparisons = counts.to_numpy(float)

    def ratio(curves: Values) -> float:
        mine, theirs = interquartile_mean(curves)
        level = np.interp(at, comparisons, theirs)
        return first_reached(comparisons, mine, level) / first_reached(comparisons, theirs, level)

    pair = [table.loc[seeds, counts].to_numpy() for table in (own, reference)]
    return bootstrap(ratio, np.stack(pair, axis=1))
