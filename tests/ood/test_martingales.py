import math

import numpy as np
import pytest
from scipy.stats import binomtest, kstest

from ood import ConformalMartingale, ShiryaevRoberts
from ood.martingales import _BETS
from rewardmodels import InvalidInput


def test_p_values_are_uniform_whatever_the_distribution():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 3000).astype(float)  # ties galore
    bets = ConformalMartingale(history=scores[:10], seed=1)
    p = [bets.p_value(score) for score in scores[10:]]
    assert kstest(p, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < 0.06


def test_p_value_is_the_rank():
    bets = ConformalMartingale(history=[1.0, 2.0, 2.0, 3.0])
    p = np.array([ConformalMartingale(history=[1.0, 2.0, 2.0, 3.0], seed=i).p_value(2.0)
                  for i in range(500)])  # fmt: skip
    assert p.min() > 1 / 5
    assert p.max() <= 4 / 5
    assert p.mean() == pytest.approx(0.5, abs=0.03)
    assert 0 < bets.p_value(9.0) <= 1 / 5


def test_wealth_is_the_mean_of_products():
    scores, rng = np.random.default_rng(0).standard_normal(30), np.random.default_rng(7)
    martingale, roberts = ConformalMartingale(seed=7), ShiryaevRoberts(seed=7)
    products, p = [], []
    for n in range(1, 31):
        seen = scores[:n]
        tau = 1 - rng.random()
        p.append(((seen > seen[-1]).sum() + tau * (seen == seen[-1]).sum()) / n)
        products = [np.prod([[e * x ** (e - 1) for e in _BETS] for x in p[i:]], 0)
                    for i in range(n)]  # fmt: skip
        assert martingale.update(seen[-1]) == pytest.approx(products[0].mean())
        # Shiryaev–Roberts begins a martingale before each score, and adds them up.
        assert roberts.update(seen[-1]) == pytest.approx(np.sum(products, 0).mean())


def test_false_alarms_of_the_martingale_ever():
    rng, rounds = np.random.default_rng(0), 600
    count = 0
    for seed in range(rounds):
        martingale = ConformalMartingale(alpha=0.1, history=rng.exponential(size=10), seed=seed)
        count += any(martingale.update(x) >= 10 for x in rng.exponential(size=150))
    assert binomtest(count, rounds, 0.1, alternative="greater").pvalue > 1e-3
    assert count > 0


def test_mean_run_length_of_shiryaev_roberts():
    rng, lengths = np.random.default_rng(0), []
    for seed in range(200):
        detector = ShiryaevRoberts(alpha=0.05, history=rng.standard_normal(20), seed=seed)
        length = 1
        while detector.update(rng.standard_normal()) < 20 and length < 400:
            length += 1
        lengths.append(length)
    lengths = np.array(lengths)
    assert lengths.mean() + 3 * lengths.std() / math.sqrt(200) > 20


def test_slow_drift_is_seen_and_late_change_sooner_by_shiryaev_roberts():
    rng = np.random.default_rng(0)
    calm, shifted = rng.standard_normal(150), rng.standard_normal(150) + 1.5
    delays = {}
    for make in (ConformalMartingale, ShiryaevRoberts):
        detector = make(alpha=0.001, history=rng.standard_normal(50))
        for score in calm:
            detector.update(score)
            assert not detector.alarm
        delays[make] = next(i for i, x in enumerate(shifted) if detector.update(x) >= 1000)
        assert detector.alarm
    assert delays[ShiryaevRoberts] < delays[ConformalMartingale] <= 60
    drifting = ConformalMartingale(alpha=0.01)
    assert any(drifting.update(0.03 * t + rng.standard_normal()) >= 100 for t in range(150))


def test_wealth_beyond_numbers_is_an_alarm():
    martingale = ConformalMartingale(history=range(10))
    for score in range(1000, 3000):
        martingale.update(score)
    assert martingale.alarm


def test_refuses():
    for make in (ConformalMartingale, ShiryaevRoberts):
        with pytest.raises(InvalidInput, match="alpha"):
            make(alpha=0)
        with pytest.raises(InvalidInput, match="history"):
            make(history=[float("nan")])
        with pytest.raises(InvalidInput, match="score"):
            make().update(float("nan"))
