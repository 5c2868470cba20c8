"""Selections against brute force, and drawing frequencies against their closed forms."""

import itertools
import math

import pytest
import scipy.stats
import torch

from active import (
    ACQUISITIONS,
    BALD,
    EUBO,
    STRATEGIES,
    BestVsWorst,
    Candidates,
    Disagreement,
    DOptimal,
    EachClipOnce,
    Entropy,
    FarthestFirst,
    GreedyInformation,
    GreedyLogDet,
    KCenter,
    Power,
    ScoredStrategy,
    Thompson,
    TopK,
    Uniform,
    all_pairs,
    d_optimal,
    expected_best,
    mutual_information,
    predictive_entropy,
    preference_variance,
)
from rewardmodels.errors import InvalidInput, UnknownName
from rewardmodels.posterior import GaussianPosterior, SampledPosterior

# Every strategy there is, over the seven samples of `belief`, and every rule with every score.
SETTINGS = [
    *(strategy() if draws else strategy(samples=7) for strategy, draws in (
        (strategy, strategy in (Uniform, Thompson, BestVsWorst)) for strategy in STRATEGIES.values()
    )),
    *(strategy(7, power=None) for strategy in (Disagreement, BALD, DOptimal)),
    *(
        ScoredStrategy(name, rule, 7)
        for name in ACQUISITIONS
        for rule in (TopK(), Power(4.0), EachClipOnce(), GreedyLogDet(), FarthestFirst())
    ),
]  # fmt: skip


def named(strategy: object) -> str:
    if type(strategy) is not ScoredStrategy:
        return type(strategy).__name__
    return f"{strategy.acquisition.__name__}-{type(strategy.rule).__name__}"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def belief(clips: int = 12) -> SampledPosterior:
    return SampledPosterior(2 * torch.randn(7, clips, generator=seeded(5), dtype=torch.float64))


@pytest.mark.parametrize("strategy", SETTINGS, ids=named)
def test_a_selection_is_distinct_in_range_and_repeats_with_its_seed(strategy):
    posterior, pairs = belief(), all_pairs(12)
    for n in (0, 1, 10, len(pairs)):
        chosen = strategy.select(posterior, pairs, n, generator=seeded())
        assert chosen.shape == (n,)
        assert chosen.dtype == torch.int64
        assert len(set(chosen.tolist())) == n
        assert set(chosen.tolist()) <= set(range(len(pairs)))
        assert torch.equal(chosen, strategy.select(posterior, pairs, n, generator=seeded()))


@pytest.mark.parametrize("strategy", SETTINGS, ids=named)
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
    [
        (Disagreement(7, power=None), preference_variance),
        (BALD(7, power=None), mutual_information),
        (Entropy(7), predictive_entropy),
        (DOptimal(7, power=None), d_optimal),
        (ScoredStrategy("expected_best", samples=7), expected_best),
    ],
    ids=named,
)
def test_without_power_it_is_the_highest_scores(strategy, score):
    posterior, pairs = belief(), all_pairs(12)
    scores = score(posterior.samples, pairs).tolist()
    best = sorted(range(len(pairs)), key=scores.__getitem__, reverse=True)[:9]
    assert strategy.select(posterior, pairs, 9).tolist() == best


@pytest.mark.parametrize(
    "strategy",
    [
        *(Disagreement(7, power=None), BALD(7, power=None), Entropy(7), DOptimal(7, power=None)),
        *(EUBO(7), GreedyInformation(7), Thompson(), BestVsWorst()),
    ],
    ids=named,
)
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


@pytest.mark.parametrize("strategy", SETTINGS, ids=named)
def test_clips_of_no_weight_come_last_and_without_weights_all_count(strategy):
    posterior, pairs = belief(), all_pairs(12)
    weights = torch.zeros(12)
    weights[5:9] = 0.5
    chosen = pairs[strategy.select(posterior, pairs, 6, weights=weights, generator=seeded())]
    if isinstance(strategy, ScoredStrategy) and isinstance(strategy.rule, EachClipOnce):
        chosen = chosen[:2]  # then its four clips are used up
    assert bool(((chosen >= 5) & (chosen < 9)).all())
    same = strategy.select(posterior, pairs, 9, weights=torch.ones(12), generator=seeded())
    assert torch.equal(same, strategy.select(posterior, pairs, 9, generator=seeded()))


@pytest.mark.parametrize(
    ("strategy", "score", "rule"),
    [
        (EUBO(7), expected_best, EachClipOnce()),
        (GreedyInformation(7), d_optimal, GreedyLogDet()),
        (KCenter(7), lambda r, p: r.new_ones(len(p)), FarthestFirst()),
    ],
    ids=["EUBO", "GreedyInformation", "KCenter"],
)
def test_weights_multiply_the_score_that_a_rule_starts_from(strategy, score, rule):
    posterior, pairs = belief(), all_pairs(12)
    weights = torch.rand(12, generator=seeded(2), dtype=torch.float64)
    scores = score(posterior.samples, pairs)
    for i, (a, b) in enumerate(pairs.tolist()):
        scores[i] *= float(weights[a]) * float(weights[b])
    expected = rule.choose(Candidates(scores, pairs, posterior.samples), 9, seeded())
    chosen = strategy.select(posterior, pairs, 9, weights=weights, generator=seeded(1))
    assert chosen.tolist() == expected.tolist()


def test_thompson_compares_favourites_of_two_draws():
    posterior, pairs = belief(), all_pairs(12)
    favourites = posterior.samples.argmax(1).tolist()
    assert len(set(favourites)) > 2
    seen = {
        tuple(sorted(pairs[i].tolist()))
        for seed in range(200)
        for i in Thompson().select(posterior, pairs, 1, generator=seeded(seed))
    }
    # Two of the seven rows at a time: each pair of them meets, and no other pair is asked about.
    expected = set()
    for f, g in itertools.combinations(range(7), 2):
        a, b = favourites[f], favourites[g]
        if a == b:  # the next best of either, whichever thinks more of it
            above = posterior.samples - posterior.samples.amin(1, keepdim=True)
            totals = [(float(above[x, a] + above[y, c]), c)
                      for x, y in ((f, g), (g, f)) for c in range(12) if c != a]  # fmt: skip
            b = max(totals)[1]
        expected.add(tuple(sorted((a, b))))
    assert seen == expected


def test_thompson_meets_each_pair_as_often_as_its_clips_are_the_best():
    # Independent normal draws: the favourites are independent, with these probabilities.
    posterior = GaussianPosterior(torch.tensor([1.0, 0.5, 0.0]), torch.eye(3))
    best = posterior.rsample(200_000, seeded(1)).argmax(1).bincount() / 200_000
    pairs, draws, counts = all_pairs(3), 4000, [0, 0, 0]
    for seed in range(draws):
        (i,) = Thompson().select(posterior, pairs, 1, generator=seeded(seed)).tolist()
        counts[i] += 1
    # Draws that agree are for the next best, so a pair's frequency is bounded by both cases.
    for count, (a, b) in zip(counts, pairs.tolist(), strict=True):
        least = 2 * float(best[a] * best[b])
        most = least + float(best[a]) ** 2 + float(best[b]) ** 2
        noise = 4 * math.sqrt(draws) / 2
        assert draws * least - noise <= count <= draws * most + noise


def test_best_vs_worst_compares_a_draws_extremes_and_then_what_is_left():
    posterior, pairs = belief(), all_pairs(12)
    extremes = {tuple(sorted((int(row.argmax()), int(row.argmin())))) for row in posterior.samples}
    for seed in range(20):
        chosen = BestVsWorst().select(posterior, pairs, 7, generator=seeded(seed))
        asked = {tuple(pair) for pair in pairs[chosen].tolist()}
        assert asked >= extremes  # each of the seven rows has drawn once
    (row,) = one = torch.randn(1, 6, generator=seeded(2))
    pairs = all_pairs(6)
    gaps = [abs(float(row[b] - row[a])) for a, b in pairs.tolist()]
    expected = sorted(range(15), key=gaps.__getitem__, reverse=True)
    assert BestVsWorst().select(SampledPosterior(one), pairs, 15).tolist() == expected


@pytest.mark.parametrize("strategy", [Thompson(), BestVsWorst()], ids=named)
def test_a_draw_multiplies_its_values_by_the_weights(strategy):
    row = torch.tensor([0.0, 1.0, 2.0, 4.0, 5.0])
    weights = torch.tensor([1.0, 0.5, 1.0, 1.0, 0.1])
    pairs = all_pairs(5)
    value = {
        Thompson: lambda a, b: row[a] + row[b],
        BestVsWorst: lambda a, b: (row[b] - row[a]).abs(),
    }[type(strategy)]
    worth = [float(value(a, b) * weights[a] * weights[b]) for a, b in pairs.tolist()]
    (chosen,) = strategy.select(SampledPosterior(row[None]), pairs, 1, weights=weights).tolist()
    assert chosen == max(range(10), key=worth.__getitem__)


@pytest.mark.parametrize("strategy", [Thompson(), BestVsWorst()], ids=named)
def test_draws_that_see_no_difference_are_asked_at_random(strategy):
    flat, pairs = SampledPosterior(torch.zeros(2, 6)), all_pairs(6)
    asked = {int(strategy.select(flat, pairs, 1, generator=seeded(seed))) for seed in range(60)}
    assert len(asked) > 8


def test_strategies_go_by_their_names():
    assert list(STRATEGIES) == [
        *("Uniform", "Disagreement", "BALD", "Entropy", "DOptimal", "EUBO"),
        *("Thompson", "BestVsWorst", "GreedyInformation", "KCenter"),
    ]
    assert all(strategy.__name__ == name for name, strategy in STRATEGIES.items())


def test_top_k_asks_of_a_clip_and_of_its_copy():
    posterior = belief(4)
    copied = SampledPosterior(torch.cat([posterior.samples, posterior.samples], 1))
    pairs = all_pairs(8)
    chosen = BALD(7, power=None).select(copied, pairs, 4, generator=seeded())
    assert len({tuple(sorted(c % 4 for c in pair)) for pair in pairs[chosen].tolist()}) == 1


def test_bald_takes_the_teachers_mistakes_into_account():
    # Two samples' beliefs in two answers: 0.1% or 15%, and 35% or 65%. Random answers bury the
    # first, which told more while "yes" was rare and meant something.
    samples = torch.tensor([[0.5, 0.001, 0.35], [0.5, 0.15, 0.65]]).logit()
    posterior, pairs = SampledPosterior(samples), torch.tensor([[0, 1], [0, 2]])
    assert BALD(2, power=None, random_answer_rate=0.0).select(posterior, pairs, 1).item() == 0
    assert BALD(2, power=None, random_answer_rate=0.3).select(posterior, pairs, 1).item() == 1
    with pytest.raises(InvalidInput, match="random_answer_rate"):
        BALD(random_answer_rate=1.5)


def test_a_gaussian_belief_is_asked_about_what_it_is_unsure_of():
    # Clip 2 moves alone; clips 0 and 1 share all their uncertainty, so their difference is known.
    posterior = GaussianPosterior(torch.zeros(3), torch.tensor([[9.0, 0], [9.0, 0], [9.0, 5.0]]))
    for strategy in (
        *(Disagreement(64, power=None), BALD(64, power=None), DOptimal(64, power=None)),
        *(GreedyInformation(64), KCenter(64), BestVsWorst(), Thompson()),
    ):
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
