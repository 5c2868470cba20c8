import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest

from ood import (
    CUSUM,
    EWMA,
    MEWMA,
    ConformalMartingale,
    Mahalanobis,
    Monitor,
    ShiryaevRoberts,
    Spike,
    calibrate,
)
from ood.sequential import BETS, root_mean_square
from rewardmodels import InvalidInput

ONE = np.array([True])


def spike(scores):
    return list(scores)


def ewma(scores):
    return [sum(0.2 * 0.8 ** (t - i) * scores[i] for i in range(t + 1)) for t in range(len(scores))]


def cusum(scores):
    # The largest sum that ends here, of what exceeds the drift; nothing at all is 0.
    tails = [[sum(z - 0.3 for z in scores[i : t + 1]) for i in range(t + 1)]
             for t in range(len(scores))]  # fmt: skip
    return [max(0.0, *sums) for sums in tails]


def mewma(scores):
    clipped = np.clip(scores, -2, 2)
    means = [sum(0.2 * 0.8 ** (t - i) * clipped[i] for i in range(t + 1))
             for t in range(len(scores))]  # fmt: skip
    return [np.linalg.norm(mean) / np.sqrt(3) for mean in means]


@pytest.mark.parametrize(
    ("statistic", "naive"),
    [(Spike(), spike), (EWMA(0.2), ewma), (CUSUM(0.3), cusum), (MEWMA(0.2, clip=2), mewma)],
    ids=["spike", "ewma", "cusum", "mewma"],
)
class TestStatistics:
    def scores(self, statistic):
        shape = (3, 40, 3) if statistic.multivariate else (3, 40)
        return np.random.default_rng(0).normal(0.3, 1.5, shape)

    def test_is_the_closed_form(self, statistic, naive):
        scores = self.scores(statistic)
        expected = [naive(row) for row in scores]
        np.testing.assert_allclose(statistic.run(scores), expected, atol=1e-12)

    def test_step_by_step_is_the_same_and_environments_are_apart(self, statistic, naive):
        scores = self.scores(statistic)
        statistic.start(3)
        for t in range(20):
            statistic.update(scores[:, t])
        statistic.reset(np.array([False, True, False]))
        values = np.stack([statistic.update(scores[:, t]) for t in range(20, 40)], 1)
        for row, first in ((0, 0), (1, 20), (2, 0)):
            expected = naive(scores[row, first:])[20 - first :]
            np.testing.assert_allclose(values[row], expected, atol=1e-12)

    def test_infinity_stays(self, statistic, naive):
        scores = np.zeros((2, 3) if statistic.multivariate else 2)
        statistic.start(2)
        scores[0] = np.inf
        assert statistic.update(scores)[0] == np.inf
        values = statistic.update(0 * np.nan_to_num(scores))
        assert np.isfinite(values[1])
        assert values[0] == (0 if naive is spike else np.inf)


@pytest.mark.parametrize("n", [1, 5])
def test_root_mean_square_is_numpys(n):
    x = np.random.default_rng(0).standard_normal((n, 4))
    np.testing.assert_allclose(root_mean_square(x), np.sqrt(np.mean(x**2, 1)), rtol=1e-14)
    assert np.isinf(root_mean_square(np.full((n, 4), 1e200))).all()


def started(cls, history=(), seed=0):
    statistic = cls(history, seed)
    statistic.start(1)
    return statistic


def wealth(statistic, score):
    """Wealth after a block with that score."""
    statistic.update([score])
    statistic.end_block(ONE)
    return statistic.read(statistic.value).item()


def test_p_values_are_uniform_whatever_the_distribution():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 3000).astype(float)  # with many ties
    statistic = started(ConformalMartingale, scores[:10], seed=1)
    p = [statistic.p_value(0, score) for score in scores[10:]]
    assert kstest(p, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < 0.06


def test_p_value_is_the_rank():
    p = np.array([started(ConformalMartingale, [1.0, 2.0, 2.0, 3.0], seed=i).p_value(0, 2.0)
                  for i in range(500)])  # fmt: skip
    assert p.min() > 1 / 5
    assert p.max() <= 4 / 5
    assert p.mean() == pytest.approx(0.5, abs=0.03)


def test_wealth_is_the_mean_of_products():
    scores, rng = np.random.default_rng(0).standard_normal(30), np.random.default_rng(7)
    martingale, roberts = started(ConformalMartingale, seed=7), started(ShiryaevRoberts, seed=7)
    p = []
    for n in range(1, 31):
        seen = scores[:n]
        tau = 1 - rng.random()
        p.append(((seen > seen[-1]).sum() + tau * (seen == seen[-1]).sum()) / n)
        products = [np.prod([[e * x ** (e - 1) for e in BETS] for x in p[i:]], 0)
                    for i in range(n)]  # fmt: skip
        assert wealth(martingale, seen[-1]) == pytest.approx(products[0].mean())
        # Shiryaev–Roberts begins a martingale before each score, and adds them up.
        assert wealth(roberts, seen[-1]) == pytest.approx(np.sum(products, 0).mean())


@pytest.mark.slow
def test_a_martingales_false_alarms_ever():
    rng, rounds, count = np.random.default_rng(0), 600, 0
    for seed in range(rounds):
        martingale = started(ConformalMartingale, rng.exponential(size=10), seed)
        count += any(wealth(martingale, x) >= 10 for x in rng.exponential(size=150))
    assert binomtest(count, rounds, 0.1, alternative="greater").pvalue > 1e-3
    assert count > 0


def test_mean_run_length_of_shiryaev_roberts():
    rng, lengths = np.random.default_rng(0), []
    for seed in range(200):
        statistic, length = started(ShiryaevRoberts, rng.standard_normal(20), seed), 1
        while wealth(statistic, rng.standard_normal()) < 20 and length < 400:
            length += 1
        lengths.append(length)
    lengths = np.array(lengths)
    assert lengths.mean() + 3 * lengths.std() / math.sqrt(200) > 20


def test_wealth_beyond_numbers_stays_finite_and_large():
    martingale = started(ConformalMartingale, range(10))
    assert 1e100 < [wealth(martingale, score) for score in range(1000, 3000)][-1] < math.inf


def watched(statistic, *, seed, shift=0.0, blocks=60, alpha=0.1):
    """Step of the first alarm of a monitor over correlated frames, calibrated by a stream."""
    draw = torch.Generator().manual_seed(seed)
    frames = torch.randn(20 * (60 + blocks), 2, generator=draw)
    frames[1:] += 0.5 * frames[:-1]
    monitor = Monitor(Mahalanobis().fit(frames[:200]), statistic)
    monitor.calibrate_stream(frames[200:1200], alpha, block=20)
    new = frames[1200:]
    new[new.shape[0] // 2 :] += shift
    stream = monitor.stream(1)
    return next((t for t, row in enumerate(new) if stream.update(row[None]).alarm[0]), None)


@pytest.mark.slow
def test_a_monitor_with_a_martingale_seldom_alarms_in_an_unending_stream():
    rounds = 100
    count = sum(watched(ConformalMartingale(), seed=i) is not None for i in range(rounds))
    assert binomtest(count, rounds, 0.1, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("cls", [ConformalMartingale, ShiryaevRoberts])
def test_a_monitor_with_a_martingale_finds_a_drift_at_the_end_of_a_block(cls):
    step = watched(cls(), seed=0, shift=3.0, alpha=0.01)
    assert 600 < step < 1000
    assert step % 20 == 0


def test_reset_and_restart_of_a_martingale():
    martingale = started(ConformalMartingale, range(10))
    before = wealth(martingale, 99.0)
    martingale.update([100.0])
    martingale.reset(ONE)  # an unfinished block is no bet
    martingale.end_block(ONE)
    assert martingale.read(martingale.value).item() == before > 1
    martingale.restart(ONE)
    assert martingale.read(martingale.value).item() == 1


def test_refuses():
    for call in (
        lambda: EWMA(0.0),
        lambda: EWMA(1.5),
        lambda: CUSUM(-1),
        lambda: CUSUM(np.inf),
        lambda: MEWMA(0.0),
        lambda: MEWMA(clip=0),
        lambda: MEWMA(clip=float("nan")),
        lambda: Spike().start(0),
        lambda: ConformalMartingale([float("nan")]),
        lambda: calibrate(list(torch.randn(40, 5)), ShiryaevRoberts(), 0.1),
    ):
        with pytest.raises(InvalidInput):
            call()
