"""Selections against brute force, and drawing frequencies against their closed forms."""

import itertools
import math
import resource
import sys

import pytest
import scipy.stats
import torch

from active import (
    ACQUISITIONS,
    BALD,
    BATCH_RULES,
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

SETTINGS = [
    *(strategy() for strategy in STRATEGIES.values()),
    *(strategy(power=None) for strategy in (Disagreement, BALD, DOptimal)),
    *(ScoredStrategy(name, rule()) for name in ACQUISITIONS for rule in BATCH_RULES.values()),
]
STARTS_FROM = {  # score and rule of each named setting
    Disagreement: (preference_variance, TopK),
    BALD: (mutual_information, TopK),
    Entropy: (predictive_entropy, TopK),
    DOptimal: (d_optimal, TopK),
    EUBO: (expected_best, EachClipOnce),
    GreedyInformation: (d_optimal, GreedyLogDet),
    KCenter: (lambda r, p: r.new_ones(len(p)), FarthestFirst),
}


def named(strategy: object) -> str:
    if type(strategy) is not ScoredStrategy:
        return type(strategy).__name__
    return f"{strategy.acquisition.__name__}-{type(strategy.rule).__name__}"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def posterior_of(clips: int = 12) -> SampledPosterior:
    return SampledPosterior(2 * torch.randn(7, clips, generator=seeded(5), dtype=torch.float64))


@pytest.mark.parametrize("strategy", SETTINGS, ids=named)
def test_a_selection_is_distinct_in_range_and_reproducible(strategy):
    posterior, pairs = posterior_of(), all_pairs(12)
    for n in (0, 1, 10, len(pairs)):
        chosen = strategy.select(posterior, pairs, n, generator=seeded())
        assert chosen.shape == (n,)
        assert chosen.dtype == torch.int64
        assert len(set(chosen.tolist())) == n
        assert set(chosen.tolist()) <= set(range(len(pairs)))
        assert torch.equal(chosen, strategy.select(posterior, pairs, n, generator=seeded()))


@pytest.mark.parametrize("strategy", SETTINGS, ids=named)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n", 67),
        ("n", -1),
        ("pairs", torch.tensor([[0, 12]])),
        ("weights", torch.ones(11)),
        ("weights", torch.full((12,), -1.0)),
        ("weights", torch.full((12,), math.nan)),
    ],
)
def test_bad_input_is_refused_by_name(strategy, argument, value):
    arguments = {"pairs": all_pairs(12), "n": 1, argument: value}
    with pytest.raises(InvalidInput, match=f"{argument}: "):
        strategy.select(posterior_of(), **arguments)


def make(kind: type[ScoredStrategy]) -> ScoredStrategy:
    """Make a named setting with all seven samples, and without drawing by scores."""
    return kind(7, power=None) if STARTS_FROM[kind][1] is TopK else kind(7)


@pytest.mark.parametrize("kind", STARTS_FROM)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_named_setting_is_its_rule_on_its_score_times_the_weights_of_both_clips(
    kind, is_weighted
):
    posterior, pairs = posterior_of(), all_pairs(12)
    weights = torch.rand(12, generator=seeded(2), dtype=torch.float64) if is_weighted else None
    score, rule = STARTS_FROM[kind]
    scores = score(posterior.samples, pairs)
    if weights is not None:
        for i, (a, b) in enumerate(pairs.tolist()):
            scores[i] *= float(weights[a]) * float(weights[b])
    expected = rule().choose(Candidates(scores, pairs, posterior.samples), 9, seeded())
    chosen = make(kind).select(posterior, pairs, 9, weights=weights, generator=seeded(1))
    assert chosen.tolist() == expected.tolist()
    if rule is TopK:
        best = sorted(range(len(pairs)), key=scores.tolist().__getitem__, reverse=True)[:9]
        assert chosen.tolist() == best


@pytest.mark.parametrize("strategy", [Thompson(), BestVsWorst()], ids=named)
def test_permuting_clips_permutes_the_selection(strategy):
    posterior, pairs = posterior_of(), all_pairs(12)
    order = torch.randperm(12, generator=seeded(3))
    permuted = SampledPosterior(posterior.samples[:, order])
    before = strategy.select(posterior, pairs, 9, generator=seeded())
    after = strategy.select(permuted, order.argsort()[pairs], 9, generator=seeded())
    assert torch.equal(after, before)


@pytest.mark.parametrize("strategy", SETTINGS, ids=named)
def test_clips_of_weight_zero_are_last_and_equal_weights_change_nothing(strategy):
    posterior, pairs = posterior_of(), all_pairs(12)
    weights = torch.zeros(12)
    weights[5:9] = 0.5
    chosen = pairs[strategy.select(posterior, pairs, 6, weights=weights, generator=seeded())]
    if isinstance(strategy, ScoredStrategy) and isinstance(strategy.rule, EachClipOnce):
        chosen = chosen[:2]  # then its four clips are used up
    assert bool(((chosen >= 5) & (chosen < 9)).all())
    same = strategy.select(posterior, pairs, 9, weights=torch.ones(12), generator=seeded())
    assert torch.equal(same, strategy.select(posterior, pairs, 9, generator=seeded()))


def test_thompson_compares_the_best_clips_of_two_draws():
    posterior, pairs = posterior_of(), all_pairs(12)
    favourites = posterior.samples.argmax(1).tolist()
    assert len(set(favourites)) > 2
    seen = {
        tuple(sorted(pairs[i].tolist()))
        for seed in range(200)
        for i in Thompson().select(posterior, pairs, 1, generator=seeded(seed))
    }
    # Two of the seven rows at a time, and no other pair.
    expected = set()
    for f, g in itertools.combinations(range(7), 2):
        a, b = favourites[f], favourites[g]
        if a == b:  # the next best of either, by the higher return
            above = posterior.samples - posterior.samples.amin(1, keepdim=True)
            totals = [(float(above[x, a] + above[y, c]), c)
                      for x, y in ((f, g), (g, f)) for c in range(12) if c != a]  # fmt: skip
            b = max(totals)[1]
        expected.add(tuple(sorted((a, b))))
    assert seen == expected


def test_thompson_selects_a_pair_as_often_as_its_clips_are_the_best():
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


def test_best_vs_worst_compares_the_extremes_of_a_draw_and_then_the_rest():
    posterior, pairs = posterior_of(), all_pairs(12)
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
def test_draws_without_differences_select_at_random(strategy):
    flat, pairs = SampledPosterior(torch.zeros(2, 6)), all_pairs(6)
    asked = {int(strategy.select(flat, pairs, 1, generator=seeded(seed))) for seed in range(60)}
    assert len(asked) > 8


def test_strategies_are_registered_by_their_names():
    assert all(strategy.__name__ == name for name, strategy in STRATEGIES.items())


def test_bald_discounts_random_answers_of_the_teacher():
    # Two samples' probabilities for two pairs: 0.1% or 15%, and 35% or 65%. The first is more
    # informative, unless random answers outnumber its rare preference.
    samples = torch.tensor([[0.5, 0.001, 0.35], [0.5, 0.15, 0.65]]).logit()
    posterior, pairs = SampledPosterior(samples), torch.tensor([[0, 1], [0, 2]])
    assert BALD(2, power=None, random_answer_rate=0.0).select(posterior, pairs, 1).item() == 0
    assert BALD(2, power=None, random_answer_rate=0.3).select(posterior, pairs, 1).item() == 1
    with pytest.raises(InvalidInput, match="random_answer_rate"):
        BALD(random_answer_rate=1.5)


def test_a_gaussian_posterior_is_queried_where_it_is_uncertain():
    # Clip 2 moves alone; clips 0 and 1 share all their uncertainty, so their difference is known.
    posterior = GaussianPosterior(torch.zeros(3), torch.tensor([[9.0, 0], [9.0, 0], [9.0, 5.0]]))
    for strategy in (
        *(Disagreement(64, power=None), BALD(64, power=None), DOptimal(64, power=None)),
        *(GreedyInformation(64), KCenter(64), BestVsWorst(), Thompson()),
    ):
        chosen = strategy.select(posterior, all_pairs(3), 2, generator=seeded())
        assert sorted(chosen.tolist()) == [1, 2]


def test_uniform_is_uniform_and_follows_weights():
    pairs, draws = all_pairs(4), 3000
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0])
    for given in (None, weights):
        counts, generator = [0] * len(pairs), seeded(9)
        for _ in range(draws):
            counts[
                int(Uniform().select(posterior_of(4), pairs, 1, weights=given, generator=generator))
            ] += 1
        share = [1.0 if given is None else float(given[a] * given[b]) for a, b in pairs.tolist()]
        for count, part in zip(counts, share, strict=True):
            low, high = scipy.stats.binom.interval(1 - 1e-4, draws, part / sum(share))
            assert low <= count <= high


def test_a_custom_acquisition_composes_with_a_rule():
    def first_return(returns: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return returns.mean(0)[pairs[:, 0]].exp()

    posterior = SampledPosterior(torch.tensor([[0.0, 4.0, 2.0]]))
    strategy = ScoredStrategy(first_return, TopK(), samples=1)
    assert strategy.select(posterior, torch.tensor([[0, 1], [1, 2], [2, 0]]), 1).item() == 1


def test_bad_settings_are_refused_by_name():
    with pytest.raises(UnknownName, match="acquisition"):
        ScoredStrategy("bald")
    for make in (lambda: BALD(samples=0), lambda: Disagreement(samples=-3)):
        with pytest.raises(InvalidInput, match="samples: "):
            make()
    for power in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidInput, match="power: "):
            BALD(power=power)


LARGE = [
    *(ScoredStrategy(name, TopK()) for name in ACQUISITIONS),
    *(ScoredStrategy("d_optimal", rule()) for rule in BATCH_RULES.values()),
]


@pytest.mark.parametrize("strategy", LARGE, ids=named)
def test_half_a_million_pairs_take_little_memory(strategy):
    posterior, pairs = SampledPosterior(torch.randn(7, 1000, generator=seeded())), all_pairs(1000)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(set(strategy.select(posterior, pairs, 5, generator=seeded()).tolist())) == 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < (2**30 if sys.platform == "darwin" else 2**20)  # 1 GiB, in bytes or KiB
