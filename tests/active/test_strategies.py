"""Selections against brute force, and drawing frequencies against their closed forms."""

import itertools
import math

import pytest
import scipy.stats
import torch

from active import BALD, Candidates, Disagreement, Power, ScoredStrategy, TopK, Uniform, all_pairs
from active.acquisition import mutual_information, preference_variance
from rewardmodels.errors import InvalidInput, UnknownName
from rewardmodels.posterior import GaussianPosterior, SampledPosterior

STRATEGIES = [
    *(Uniform(), Disagreement(7, power=None), BALD(7, power=None)),
    *(Disagreement(7), BALD(7, power=4.0)),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def belief(clips: int = 12) -> SampledPosterior:
    return SampledPosterior(2 * torch.randn(7, clips, generator=seeded(5), dtype=torch.float64))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_a_selection_is_distinct_in_range_and_repeats_with_its_seed(strategy):
    posterior, pairs = belief(), all_pairs(12)
    for n in (0, 1, 10, len(pairs)):
        chosen = strategy.select(posterior, pairs, n, generator=seeded())
        assert chosen.shape == (n,)
        assert chosen.dtype == torch.int64
        assert len(set(chosen.tolist())) == n
        assert set(chosen.tolist()) <= set(range(len(pairs)))
        assert torch.equal(chosen, strategy.select(posterior, pairs, n, generator=seeded()))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 67}, r"n: expected from 0 to the 66 pairs .* got 67"),
        ({"n": -1}, r"n: .* got -1"),
        ({"pairs": torch.tensor([[0, 12]])}, r"pairs: .*0 to 11"),
        ({"weights": torch.ones(11)}, r"weights: .*\(12,\), got \(11,\)"),
        ({"weights": torch.full((12,), -1.0)}, r"weights: .*negative"),
        ({"weights": torch.full((12,), math.nan)}, r"weights: .*NaN"),
    ],
)
def test_bad_input_is_refused_by_name(strategy, change, message):
    arguments = {"pairs": all_pairs(12), "n": 1, **change}
    with pytest.raises(InvalidInput, match=message):
        strategy.select(belief(), **arguments)


@pytest.mark.parametrize(
    ("strategy", "score"),
    [(Disagreement(7, power=None), preference_variance), (BALD(7, power=None), mutual_information)],
    ids=["disagreement", "bald"],
)
def test_without_power_it_is_the_highest_scores(strategy, score):
    posterior, pairs = belief(), all_pairs(12)
    scores = score(posterior.samples, pairs).tolist()
    best = sorted(range(len(pairs)), key=scores.__getitem__, reverse=True)[:9]
    assert strategy.select(posterior, pairs, 9).tolist() == best


@pytest.mark.parametrize("strategy", [Disagreement(7, power=None), BALD(7, power=None)])
def test_permuting_clips_permutes_the_selection(strategy):
    posterior, pairs = belief(), all_pairs(12)
    order = torch.randperm(12, generator=seeded(3))
    where = order.argsort()
    permuted = SampledPosterior(posterior.samples[:, order])
    before = strategy.select(posterior, pairs, 9, generator=seeded())
    assert torch.equal(strategy.select(permuted, where[pairs], 9, generator=seeded()), before)


def test_weights_multiply_a_pairs_score_by_both_its_clips():
    posterior, pairs = belief(), all_pairs(12)
    weights = torch.rand(12, generator=seeded(2), dtype=torch.float64)
    scores = preference_variance(posterior.samples, pairs).tolist()
    value = [
        s * float(weights[a]) * float(weights[b])
        for s, (a, b) in zip(scores, pairs.tolist(), strict=True)
    ]
    best = sorted(range(len(pairs)), key=value.__getitem__, reverse=True)[:9]
    assert Disagreement(7, power=None).select(posterior, pairs, 9, weights=weights).tolist() == best


def test_bald_takes_the_teachers_mistakes_into_account():
    # Two samples' beliefs in two answers: 0.1% or 15%, and 35% or 65%. Random answers bury the
    # first, which told more while "yes" was rare and meant something.
    samples = torch.tensor([[0.5, 0.001, 0.35], [0.5, 0.15, 0.65]]).logit()
    posterior, pairs = SampledPosterior(samples), torch.tensor([[0, 1], [0, 2]])
    assert BALD(2, power=None, mistake_rate=0.0).select(posterior, pairs, 1).item() == 0
    assert BALD(2, power=None, mistake_rate=0.3).select(posterior, pairs, 1).item() == 1
    with pytest.raises(InvalidInput, match="mistake_rate"):
        BALD(mistake_rate=1.5)


def test_a_gaussian_belief_is_asked_about_what_it_is_unsure_of():
    # Clip 2 moves alone; clips 0 and 1 share all their uncertainty, so their difference is known.
    posterior = GaussianPosterior(torch.zeros(3), torch.tensor([[9.0, 0], [9.0, 0], [9.0, 5.0]]))
    for strategy in (Disagreement(64, power=None), BALD(64, power=None)):
        chosen = strategy.select(posterior, all_pairs(3), 2, generator=seeded())
        assert sorted(chosen.tolist()) == [1, 2]


def sequential(weights: list[float], chosen: tuple[int, ...]) -> float:
    """Probability of drawing these, in this order, without replacement."""
    left, probability = sum(weights), 1.0
    for i in chosen:
        probability *= weights[i] / left
        left -= weights[i]
    return probability


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_power_draws_in_proportion_without_replacement(power):
    scores = torch.tensor([0.5, 0.1, 0.3, 0.2])
    candidates = Candidates(scores, all_pairs(4)[:4], torch.zeros(1, 4))
    generator, draws = seeded(8), 4000
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        chosen = tuple(Power(power).choose(candidates, 2, generator).tolist())
        seen[chosen] = seen.get(chosen, 0) + 1
    orders = list(itertools.permutations(range(4), 2))
    weights = [s**power for s in scores.tolist()]
    expected = [draws * sequential(weights, order) for order in orders]
    observed = [seen.get(order, 0) for order in orders]
    assert scipy.stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


def test_uniform_is_uniform_and_follows_weights():
    pairs, draws = all_pairs(4), 3000
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0])
    for given in (None, weights):
        counts, generator = [0] * len(pairs), seeded(9)
        for _ in range(draws):
            counts[
                int(Uniform().select(belief(4), pairs, 1, weights=given, generator=generator))
            ] += 1
        share = [1.0 if given is None else float(given[a] * given[b]) for a, b in pairs.tolist()]
        for count, part in zip(counts, share, strict=True):
            low, high = scipy.stats.binom.interval(1 - 1e-4, draws, part / sum(share))
            assert low <= count <= high


def test_scores_of_zero_come_last_and_in_random_order():
    scores = torch.tensor([0.0, 1e-30, 0.0, 0.0, 2.0])
    candidates = Candidates(scores, all_pairs(4)[:5], torch.zeros(1, 4))
    for rule in (TopK(), Power(1.0)):
        orders = {tuple(rule.choose(candidates, 5, seeded(s)).tolist()) for s in range(40)}
        assert {order[:2] for order in orders} == {(4, 1)}
        assert len({order[2:] for order in orders}) == 6  # of 3! orders


def test_a_high_power_is_top_k():
    scores = torch.tensor([0.2, 0.9, 0.5, 0.7])
    candidates = Candidates(scores, all_pairs(4)[:4], torch.zeros(1, 4))
    assert Power(1e4).choose(candidates, 3, seeded()).tolist() == [1, 3, 2]


def test_power_spreads_a_batch_over_clips():
    # One clip that nobody knows anything of: the highest scores are all about it.
    samples = 0.1 * torch.randn(16, 30, generator=seeded(4))
    samples[:, 0] = torch.linspace(-9, 9, 16)
    posterior, pairs = SampledPosterior(samples), all_pairs(30)

    def about_clip_0(strategy: BALD) -> int:
        chosen = pairs[strategy.select(posterior, pairs, 20, generator=seeded())]
        return int((chosen == 0).any(1).sum())

    assert about_clip_0(BALD(16, power=None)) == 20
    assert about_clip_0(BALD(16, power=0.25)) < 20


def test_a_function_of_ones_own_composes_with_any_rule():
    def first_return(returns: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return returns.mean(0)[pairs[:, 0]].exp()

    posterior = SampledPosterior(torch.tensor([[0.0, 4.0, 2.0]]))
    strategy = ScoredStrategy(first_return, TopK(), samples=1)
    assert strategy.select(posterior, torch.tensor([[0, 1], [1, 2], [2, 0]]), 1).item() == 1


def test_constructors_refuse_what_cannot_be():
    with pytest.raises(UnknownName, match="acquisition"):
        ScoredStrategy("bald")
    for make in (lambda: BALD(samples=0), lambda: Disagreement(samples=-3)):
        with pytest.raises(InvalidInput, match="samples: expected at least 1"):
            make()
    for power in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidInput, match="power: "):
            BALD(power=power)
