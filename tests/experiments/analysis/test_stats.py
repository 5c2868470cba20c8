"""Interquartile means, bootstrap intervals and savings, against naive ones and SciPy's."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.analysis.stats import (
    Interval,
    bootstrap,
    first_reached,
    interquartile_mean,
    labels_ratio,
    over_tasks,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11])
def test_interquartile_mean_drops_a_quarter_from_each_end(n):
    values = np.random.default_rng(n).normal(size=(n, 3))
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=0))


def test_samples_are_resampled_apart():
    def ratio(one, other, axis=-1):
        return np.mean(one, axis) / np.mean(other, axis)

    rng = np.random.default_rng(0)
    one, other = rng.normal(10, 2, size=5), rng.normal(20, 1, size=9)
    theirs = stats.bootstrap(
        (one, other), ratio, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap(ratio, one, other, resamples=20_000)
    assert ours[1:] == pytest.approx(tuple(theirs), abs=0.01)


def test_rows_of_a_sample_stay_together():
    values = np.random.default_rng(0).normal(size=9)
    same = bootstrap(lambda rows: float((rows[:, 0] - rows[:, 1]).max()), np.stack([values] * 2, 1))
    assert same == (0.0, 0.0, 0.0)


def test_infinite_values_and_single_values():
    value, low, high = bootstrap(np.max, np.array([1.0, 2.0, np.inf]))
    assert (value, high) == (np.inf, np.inf)
    assert np.isfinite(low)
    value, low, high = bootstrap(np.mean, [3.0])
    assert value == 3.0
    assert np.isnan([low, high]).all()


def test_the_interval_over_tasks_resamples_seeds_within_tasks():
    rows = pd.DataFrame({"task": ["A"] * 5 + ["B"] * 5, "x": [0.0] * 5 + [1.0] * 5})
    assert over_tasks(rows, "x") == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("interval", "seeds", "verdict"),
    [((1, 0.5, 2), 5, "better"), ((-1, -2, -0.5), 5, "worse"), ((1, -0.5, 2), 9, "unclear"),
     ((1, 0.5, 2), 4, "unclear"), ((1, np.nan, np.nan), 9, "unclear"), ((0, 0, 0), 9, "unclear")],
)  # fmt: skip
def test_verdicts(interval, seeds, verdict):
    assert Interval(*interval).verdict(seeds) == verdict


def test_labels_ratio_of_a_curve_that_rises_twice_as_fast():
    counts = np.arange(20, 201, 20)

    def curves(rate):
        luck = np.random.default_rng(0).normal(0, 1e-3, size=(6, 1))
        return pd.DataFrame(0.5 + rate * counts + luck, columns=counts)

    assert labels_ratio(curves(0.002), curves(0.001), 160) == pytest.approx((0.5, 0.5, 0.5))
    assert labels_ratio(curves(0.0001), curves(0.001), 160).value == np.inf
    assert first_reached(counts, 0.5 + 0.001 * counts, 0.5) == 20
