"""Posteriors against loops, closed forms, Monte Carlo and numerical integration."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from rewardmodels import GaussianPosterior, InvalidInput, ReturnPosterior, SampledPosterior
from rewardmodels import posterior as posterior_module

PAIRS = torch.tensor([[0, 1], [1, 0], [2, 4], [3, 3], [4, 1]])


def sampled(n: int = 5, s: int = 7) -> SampledPosterior:
    return SampledPosterior(torch.randn(s, n, dtype=torch.double) * 3)


def gaussian(n: int = 5, rank: int = 3) -> GaussianPosterior:
    return GaussianPosterior(torch.randn(n).double(), torch.randn(n, rank).double())


@pytest.fixture(params=[sampled, gaussian])
def belief(request: pytest.FixtureRequest) -> ReturnPosterior:
    return request.param()


def sigmoid(x: float, mistakes: float) -> float:
    return (1 - mistakes) / (1 + math.exp(-x)) + mistakes / 2


@pytest.mark.parametrize("mistakes", [0.0, 0.2])
def test_sampled_is_loops_over_its_rows(mistakes):
    belief = sampled()
    rows = belief.samples.tolist()
    for clip in range(5):
        column = [row[clip] for row in rows]
        assert float(belief.mean[clip]) == pytest.approx(np.mean(column))
        assert float(belief.variance[clip]) == pytest.approx(np.var(column))
    np.testing.assert_allclose(belief.covariance, np.cov(np.array(rows).T, ddof=0))
    found, preference = (
        belief.difference(PAIRS),
        belief.preference(PAIRS, random_answer_rate=mistakes),
    )
    for q, (first, second) in enumerate(PAIRS.tolist()):
        apart = [row[second] - row[first] for row in rows]
        assert float(found.mean[q]) == pytest.approx(np.mean(apart), abs=1e-12)
        assert float(found.variance[q]) == pytest.approx(np.var(apart), abs=1e-12)
        expected = np.mean([sigmoid(d, mistakes) for d in apart])
        assert float(preference[q]) == pytest.approx(expected)


def test_sampled_draws_rows_evenly():
    belief = sampled(s=7)
    draws = belief.rsample(17, torch.Generator().manual_seed(0))
    assert draws.shape == (17, 5)
    which = (draws[:, None] == belief.samples).all(2)
    assert (which.sum(1) == 1).all()
    assert sorted(which.sum(0).tolist()) == [2, 2, 2, 2, 3, 3, 3]
    assert (which[:7].sum(0) == 1).all()


@pytest.mark.parametrize("mistakes", [0.0, 0.1])
@pytest.mark.parametrize("sd", [0.0, 0.5, 5.0, 60.0, 1000.0])
@pytest.mark.parametrize("mean", [0.0, -1.5, 20.0])
def test_gaussian_preference_is_the_integral(mean, sd, mistakes):
    belief = GaussianPosterior(
        torch.tensor([0.0, mean]).double(), torch.tensor([[0.0], [sd]]).double()
    )
    found = float(belief.preference(torch.tensor([[0, 1]]), random_answer_rate=mistakes))

    def at(z: float) -> float:
        return scipy.special.expit(mean + sd * z) * scipy.stats.norm.pdf(z)

    step = [-mean / sd] if sd else []
    expected, _ = scipy.integrate.quad(
        at, -12, 12, points=step, limit=500, epsabs=1e-12, epsrel=1e-12
    )
    assert found == pytest.approx((1 - mistakes) * expected + mistakes / 2, abs=1e-7)


def test_gaussian_preference_keeps_the_tail():
    belief = GaussianPosterior(torch.tensor([0.0, -14.0]), torch.zeros(2, 1))
    found = float(belief.preference(torch.tensor([[0, 1]])).log())
    assert found == pytest.approx(-14, abs=5e-3)


@pytest.mark.parametrize("chunk", [1, 14, 15, 10**6])
def test_chunks_change_nothing(belief, monkeypatch, chunk):
    before = (*belief.difference(PAIRS), belief.preference(PAIRS))
    monkeypatch.setattr(posterior_module, "_CHUNK", chunk)
    after = (*belief.difference(PAIRS), belief.preference(PAIRS))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_pairs_and_no_clips(belief):
    none = torch.zeros(0, 2, dtype=torch.long)
    assert belief.difference(none).variance.shape == belief.preference(none).shape == (0,)
    assert SampledPosterior(torch.zeros(3, 0)).mean.shape == (0,)


def test_refuses_other_shapes(belief):
    with pytest.raises(InvalidInput, match=r"pairs: expected .*shape \(Q, 2\), got .*\(2,\)"):
        belief.difference(torch.tensor([0, 1]))
    with pytest.raises(InvalidInput, match="n: expected at least 1, got 0"):
        belief.rsample(0)
    with pytest.raises(InvalidInput, match=r"samples: .*got \(0, 3\)"):
        SampledPosterior(torch.zeros(0, 3))
    with pytest.raises(InvalidInput, match=r"mean, root: .*got \(3,\) and \(4, 2\)"):
        GaussianPosterior(torch.zeros(3), torch.zeros(4, 2))
