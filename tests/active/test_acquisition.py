"""Scores against naive loops, SciPy's entropy, closed forms, and their own symmetries."""

import itertools
import math
import resource
import sys
import time

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from active import ACQUISITIONS, all_pairs, mutual_information, preference_variance
from active.acquisition import acquisition_named
from rewardmodels.errors import InvalidInput, UnknownName

SCORES = [pytest.param(f, id=name) for name, f in ACQUISITIONS.items()]


def draw(samples: int, clips: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(samples, clips, generator=generator, dtype=torch.float64)


def test_all_pairs_are_the_combinations():
    for n in (0, 1, 2, 7):
        assert list(map(tuple, all_pairs(n).tolist())) == list(itertools.combinations(range(n), 2))
        assert all_pairs(n).shape == (n * (n - 1) // 2, 2)
    with pytest.raises(InvalidInput, match=r"n: expected .* got -1"):
        all_pairs(-1)


def test_preference_variance_is_numpys_variance():
    returns, pairs = draw(7, 9), all_pairs(9)
    scores = preference_variance(returns, pairs)
    for score, (a, b) in zip(scores.tolist(), pairs.tolist(), strict=True):
        p = scipy.special.expit((returns[:, b] - returns[:, a]).numpy())
        assert score == pytest.approx(np.var(p), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("mistake_rate", [0.0, 0.2])
def test_mutual_information_is_scipys_entropy_difference(mistake_rate):
    returns, pairs = draw(7, 9), all_pairs(9)
    scores = mutual_information(returns, pairs, mistake_rate=mistake_rate)
    for score, (a, b) in zip(scores.tolist(), pairs.tolist(), strict=True):
        p = scipy.special.expit((returns[:, b] - returns[:, a]).numpy())
        p = (1 - mistake_rate) * p + mistake_rate / 2
        table = np.stack([p, 1 - p])
        expected = scipy.stats.entropy(table.mean(1)) - scipy.stats.entropy(table).mean()
        assert score == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_closed_forms_at_the_extremes():
    # Two samples, certain of opposite answers: the answer names the sample, which is one bit.
    split = torch.tensor([[0.0, 1e3], [0.0, -1e3]])
    one = torch.tensor([[0, 1]])
    assert preference_variance(split, one).item() == pytest.approx(0.25)
    assert mutual_information(split, one).item() == pytest.approx(math.log(2))
    # With mistakes it is the capacity of a binary symmetric channel that flips half as often.
    flips = scipy.stats.entropy([0.15, 0.85])
    assert mutual_information(split, one, mistake_rate=0.3).item() == pytest.approx(
        math.log(2) - flips, rel=1e-6
    )
    # All samples agree that it is a coin toss, or that it is certain: nothing to learn.
    for value in (0.0, 3.0, 1e3):
        same = torch.tensor([[0.0, value]]).repeat(5, 1)
        assert preference_variance(same, one).item() == pytest.approx(0, abs=1e-15)
        assert mutual_information(same, one).item() == pytest.approx(0, abs=1e-15)


def test_small_information_keeps_its_digits():
    # For differences ±d, information is d²/8 + O(d⁴): in single precision it would be noise.
    # That holds for single-precision returns too, which is what networks give.
    for dtype, d in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        returns = torch.tensor([[0.0, d], [0.0, -d]], dtype=dtype)
        information = mutual_information(returns, torch.tensor([[0, 1]])).item()
        assert information == pytest.approx(d**2 / 8, rel=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_bounds_order_of_a_pair_and_a_shared_constant(score):
    returns, pairs = draw(7, 20, scale=30), all_pairs(20)
    scores = score(returns, pairs)
    assert bool((scores >= 0).all())
    assert float(scores.max()) <= math.log(2)
    torch.testing.assert_close(score(returns, pairs.flip(1)), scores, rtol=1e-9, atol=1e-12)
    # Each sample's constant is free (comparisons never see it), so no score may move with it.
    shifted = returns + torch.linspace(-50, 50, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(score(shifted, pairs), scores, rtol=1e-9, atol=1e-12)
    # A clip against itself can teach nothing.
    assert score(returns, torch.tensor([[3, 3]])).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("score", SCORES)
def test_permuting_clips_permutes_the_scores(score):
    returns, pairs = draw(5, 12), all_pairs(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    where = order.argsort()  # clip i of before is clip where[i] of after
    torch.testing.assert_close(score(returns[:, order], where[pairs]), score(returns, pairs))


@pytest.mark.parametrize("score", SCORES)
def test_a_score_does_not_depend_on_its_neighbours(score):
    # Enough pairs for several blocks, so that block edges are crossed too.
    returns = draw(7, 150)
    pairs = all_pairs(150)
    scores = score(returns, pairs)
    for i in (0, 1, 4680, 4681, 4682, len(pairs) - 1):
        torch.testing.assert_close(score(returns, pairs[i : i + 1])[0], scores[i])
    torch.testing.assert_close(score(returns, pairs.flip(0)).flip(0), scores)


@pytest.mark.parametrize("score", SCORES)
def test_dtypes_shapes_and_no_pairs(score):
    returns, pairs = draw(3, 4), all_pairs(4)
    assert score(returns.float(), pairs).dtype == torch.float32
    torch.testing.assert_close(
        score(returns.float(), pairs.int()).double(), score(returns, pairs), rtol=1e-4, atol=1e-6
    )
    assert score(returns, pairs[:0]).shape == (0,)
    assert not score(returns.clone().requires_grad_(), pairs).requires_grad


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("returns", "pairs", "message"),
    [
        (torch.zeros(3), torch.tensor([[0, 1]]), r"returns: .*\(S, N\).* shape \(3,\)"),
        (torch.zeros(0, 3), torch.tensor([[0, 1]]), r"returns: .*shape \(0, 3\)"),
        (torch.zeros(2, 3).long(), torch.tensor([[0, 1]]), r"returns: .*int64"),
        (torch.full((2, 3), math.nan), torch.tensor([[0, 1]]), r"returns: .*NaN"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), r"pairs: .*\(Q, 2\).* shape \(2,\)"),
        (torch.zeros(2, 3), torch.tensor([[0.0, 1.0]]), r"pairs: .*float32"),
        (torch.zeros(2, 3), torch.tensor([[0, 3]]), r"pairs: .*0 to 2 .* got 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([[-1, 1]]), r"pairs: .*got -1 to 1"),
    ],
)
def test_bad_input_is_refused_by_name(score, returns, pairs, message):
    with pytest.raises(InvalidInput, match=message):
        score(returns, pairs)


def test_names_and_mistake_rates_that_are_not_known():
    assert acquisition_named("mutual_information") is mutual_information
    with pytest.raises(UnknownName, match="Did you mean 'mutual_information'"):
        acquisition_named("mutual_informations")
    with pytest.raises(InvalidInput, match="mistake_rate"):
        mutual_information(torch.zeros(1, 2), torch.tensor([[0, 1]]), mistake_rate=1.0)


@pytest.mark.parametrize("score", SCORES)
def test_half_a_million_pairs_take_seconds_and_little_memory(score):
    returns, pairs = draw(7, 1000).float(), all_pairs(1000)
    assert len(pairs) == 499_500
    score(returns, pairs[:10])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    score(returns, pairs)
    # Processor time, so that a busy machine doesn't fail it; alone it measures 0.1 s.
    assert time.process_time() - started < 2
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < (2**30 if sys.platform == "darwin" else 2**20)  # 1 GiB, in bytes or KiB
