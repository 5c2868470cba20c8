"""Scores against naive loops, SciPy's entropy, closed forms, and their own symmetries."""

import itertools
import math
import statistics
from functools import partial

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from active import (
    ACQUISITIONS,
    acquisition_named,
    all_pairs,
    d_optimal,
    difference_variance,
    expected_best,
    mutual_information,
    predictive_entropy,
    preference_variance,
)
from rewardmodels.errors import InvalidInput, UnknownName

# Upper bounds, where there are any.
CEILING = {
    "preference_variance": 0.25,
    "predictive_entropy": math.log(2),
    "mutual_information": math.log(2),
}
SCORES = [pytest.param(f, id=name) for name, f in ACQUISITIONS.items()]


def draw(samples: int, clips: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(samples, clips, generator=generator, dtype=torch.float64)


def test_all_pairs_are_the_combinations():
    for n in (0, 1, 2, 7):
        assert list(map(tuple, all_pairs(n).tolist())) == list(itertools.combinations(range(n), 2))
        assert all_pairs(n).shape == (n * (n - 1) // 2, 2)
    with pytest.raises(InvalidInput, match="n: "):
        all_pairs(-1)


def preferences(differences: np.ndarray, rate: float = 0.0) -> np.ndarray:
    return (1 - rate) * scipy.special.expit(differences) + rate / 2


def naive_information(differences: np.ndarray, rate: float) -> float:
    p = preferences(differences, rate)
    table = np.stack([p, 1 - p])
    return scipy.stats.entropy(table.mean(1)) - scipy.stats.entropy(table).mean()


def naive_entropy(differences: np.ndarray) -> float:
    p = statistics.fmean(preferences(differences))
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def naive_d_optimal(differences: np.ndarray) -> float:
    p = statistics.fmean(preferences(differences))
    return p * (1 - p) * statistics.pvariance(differences.tolist())


@pytest.mark.parametrize(
    ("score", "naive"),
    [
        (preference_variance, lambda d: np.var(preferences(d))),
        (difference_variance, lambda d: statistics.pvariance(d.tolist())),
        (predictive_entropy, naive_entropy),
        (mutual_information, partial(naive_information, rate=0.0)),
        (partial(mutual_information, random_answer_rate=0.2), partial(naive_information, rate=0.2)),
        (d_optimal, naive_d_optimal),
    ],
)
def test_scores_of_differences_are_their_formula(score, naive):
    returns, pairs = draw(7, 9), all_pairs(9)
    for value, (a, b) in zip(score(returns, pairs).tolist(), pairs.tolist(), strict=True):
        expected = naive((returns[:, b] - returns[:, a]).numpy())
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_expected_best_is_the_better_return_of_each_sample_above_its_worst():
    returns, pairs = draw(7, 9), all_pairs(9)
    rows = returns.tolist()
    for value, (a, b) in zip(expected_best(returns, pairs).tolist(), pairs.tolist(), strict=True):
        assert value == pytest.approx(statistics.fmean(max(r[a], r[b]) - min(r) for r in rows))


def test_closed_forms_at_the_extremes():
    # Two samples, certain of opposite preferences: a comparison identifies the sample, one bit.
    split = torch.tensor([[0.0, 1e3], [0.0, -1e3]])
    one = torch.tensor([[0, 1]])
    assert preference_variance(split, one).item() == pytest.approx(0.25)
    assert mutual_information(split, one).item() == pytest.approx(math.log(2))
    # With random answers it is the capacity of a binary symmetric channel of half that rate.
    flips = scipy.stats.entropy([0.15, 0.85])
    assert mutual_information(split, one, random_answer_rate=0.3).item() == pytest.approx(
        math.log(2) - flips, rel=1e-6
    )
    # All samples agree: nothing to learn.
    for value in (0.0, 3.0, 1e3):
        same = torch.tensor([[0.0, value]]).repeat(5, 1)
        assert preference_variance(same, one).item() == pytest.approx(0, abs=1e-15)
        assert mutual_information(same, one).item() == pytest.approx(0, abs=1e-15)


def test_small_information_keeps_its_digits():
    # For differences ±d, information is d²/8 + O(d⁴): in single precision it would be noise.
    for dtype, d in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        returns = torch.tensor([[0.0, d], [0.0, -d]], dtype=dtype)
        information = mutual_information(returns, torch.tensor([[0, 1]])).item()
        assert information == pytest.approx(d**2 / 8, rel=1e-4)


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_bounds_and_invariance_to_the_order_of_a_pair_and_to_constants_of_samples(name):
    score = ACQUISITIONS[name]
    returns, pairs = draw(7, 20, scale=30), all_pairs(20)
    scores = score(returns, pairs)
    assert bool((scores >= 0).all())
    assert 0 < float(scores.max()) <= CEILING.get(name, math.inf)
    torch.testing.assert_close(score(returns, pairs.flip(1)), scores, rtol=1e-9, atol=1e-12)
    # Comparisons don't determine a sample's constant, so that no score may depend on it.
    shifted = returns + torch.linspace(-50, 50, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(score(shifted, pairs), scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_a_score_depends_on_its_two_clips_alone(score):
    # Enough pairs for several blocks, so that block edges are crossed too.
    returns, pairs = draw(7, 150), all_pairs(150)
    scores = score(returns, pairs)
    for i in (0, 1, 4680, 4681, 4682, len(pairs) - 1):
        torch.testing.assert_close(score(returns, pairs[i : i + 1])[0], scores[i])
    torch.testing.assert_close(score(returns, pairs.flip(0)).flip(0), scores)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(score(returns[:, order], order.argsort()[pairs]), scores)


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
    ("argument", "value"),
    [
        ("returns", torch.zeros(3)),
        ("returns", torch.zeros(0, 3)),
        ("returns", torch.zeros(2, 3).long()),
        ("returns", torch.full((2, 3), math.nan)),
        ("pairs", torch.tensor([0, 1])),
        ("pairs", torch.tensor([[0.0, 1.0]])),
        ("pairs", torch.tensor([[0, 3]])),
        ("pairs", torch.tensor([[-1, 1]])),
    ],
)
def test_bad_input_is_refused_by_name(score, argument, value):
    good = {"returns": torch.zeros(2, 3), "pairs": torch.tensor([[0, 1]])}
    with pytest.raises(InvalidInput, match=f"^{argument}: "):
        score(**{**good, argument: value})


def test_unknown_names_and_bad_rates_are_refused():
    assert acquisition_named("mutual_information") is mutual_information
    with pytest.raises(UnknownName, match="acquisition"):
        acquisition_named("mutual_informations")
    with pytest.raises(InvalidInput, match="random_answer_rate"):
        mutual_information(torch.zeros(1, 2), torch.tensor([[0, 1]]), random_answer_rate=1.0)
