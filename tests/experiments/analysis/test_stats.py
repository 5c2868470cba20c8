"""Interquartile means and bootstrap intervals, against naive ones and SciPy's."""

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.stats import bootstrap_interval, interquartile_mean


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11])
def test_interquartile_mean_drops_a_quarter_from_each_end(n):
    values = np.random.default_rng(n).normal(size=n)
    middle = sorted(values)[n // 4 : n - n // 4]
    assert interquartile_mean(values) == pytest.approx(sum(middle) / len(middle))
    rows = np.stack([values, 2 * values])
    assert interquartile_mean(rows) == pytest.approx(
        [sum(middle) / len(middle) * k for k in (1, 2)]
    )


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_are_scipys(level):
    values = np.random.default_rng(0).gamma(2.0, size=12)
    theirs = stats.bootstrap(
        (values,),
        interquartile_mean,
        confidence_level=level,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    ours = bootstrap_interval(interquartile_mean, values, level=level, resamples=20_000)
    assert ours == pytest.approx(tuple(theirs), abs=0.03)  # quantiles of 20,000 draws


def test_samples_are_resampled_apart():
    def ratio(one, other, axis=-1):
        return interquartile_mean(one, axis) / interquartile_mean(other, axis)

    rng = np.random.default_rng(0)
    one, other = rng.normal(10, 2, size=5), rng.normal(20, 1, size=9)
    theirs = stats.bootstrap(
        (one, other), ratio, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap_interval(ratio, one, other, resamples=20_000)
    assert ours == pytest.approx(tuple(theirs), abs=0.01)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=7)
    assert bootstrap_interval(interquartile_mean, values) == bootstrap_interval(
        interquartile_mean, values
    )
    assert bootstrap_interval(interquartile_mean, values, seed=1) != bootstrap_interval(
        interquartile_mean, values, seed=2
    )
