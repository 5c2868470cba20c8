"""Batch rules against closed-form frequencies, determinants, exhaustive search, and twins."""

import itertools
from collections import Counter

import pytest
import scipy.stats
import torch

from active import (
    Candidates,
    EachClipOnce,
    FarthestFirst,
    GreedyLogDet,
    Power,
    TopK,
    all_pairs,
    d_optimal,
    mutual_information,
    predictive_entropy,
)

RULES = [EachClipOnce(), GreedyLogDet(), FarthestFirst()]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool(clips: int, samples: int = 6, seed: int = 1, score=d_optimal) -> Candidates:
    returns = 2 * torch.randn(samples, clips, generator=seeded(seed), dtype=torch.float64)
    pairs = all_pairs(clips)
    return Candidates(score(returns, pairs), pairs, returns)


def named(rule: object) -> str:
    return type(rule).__name__


def differences(candidates: Candidates) -> torch.Tensor:
    first, second = candidates.pairs.unbind(1)
    return (candidates.returns[:, second] - candidates.returns[:, first]).T


def information(candidates: Candidates, chosen: tuple[int, ...]) -> float:
    """Compute log det(I + W½ K W½) by a dense determinant."""
    d = differences(candidates)[list(chosen)]
    p = d.sigmoid().mean(1)
    root = torch.diag((p * (1 - p)).sqrt())
    covariance = torch.cov(d, correction=0).reshape(len(d), len(d))
    eye = torch.eye(len(d), dtype=torch.float64)
    return float(torch.logdet(eye + root @ covariance @ root))


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
    rule = Power(power)
    seen = Counter(tuple(rule.choose(candidates, 2, generator).tolist()) for _ in range(draws))
    orders = list(itertools.permutations(range(4), 2))
    weights = [s**power for s in scores.tolist()]
    expected = [draws * sequential(weights, order) for order in orders]
    observed = [seen[order] for order in orders]
    assert scipy.stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


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


@pytest.mark.parametrize("seed", range(5))
def test_greedy_log_det_is_the_naive_greedy_choice(seed):
    candidates = pool(7, seed=seed)
    chosen: tuple[int, ...] = ()
    for _ in range(10):  # more than the rank, 5, of six samples
        rest = [i for i in range(len(candidates.pairs)) if i not in chosen]
        chosen += (max(rest, key=lambda i: information(candidates, (*chosen, i))),)
    assert GreedyLogDet().choose(candidates, 10, seeded()).tolist() == list(chosen)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_greedy_log_det_is_a_determinantal_process_for_any_score(scale):
    candidates = pool(7, score=lambda r, p: scale * mutual_information(r, p))
    roots = candidates.scores.sqrt()
    kernel = torch.corrcoef(differences(candidates)) * roots[:, None] * roots
    kernel += torch.eye(len(kernel), dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(5):
        rest = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(
            max(rest, key=lambda i: float(kernel[[*chosen, i]][:, [*chosen, i]].logdet()))
        )
    assert GreedyLogDet().choose(candidates, 5, seeded()).tolist() == chosen


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return min(float((x - y).norm()), float((x + y).norm()))


@pytest.mark.parametrize("seed", range(5))
def test_farthest_first_is_the_farthest_for_either_order_of_clips(seed):
    candidates = pool(8, seed=seed, score=lambda r, p: r.new_ones(len(p)))
    points = differences(candidates)
    turned = torch.rand(len(points), generator=seeded(seed)) < 0.5
    pairs = torch.where(turned[:, None], candidates.pairs.flip(1), candidates.pairs)
    flipped = Candidates(candidates.scores, pairs, candidates.returns)
    for some in (candidates, flipped):
        centres = [torch.zeros(6).double()]
        # Differences of three clips add up, so that many distances tie.
        for pick in FarthestFirst().choose(some, 12, seeded()).tolist():
            far = [min(distance(x, c) for c in centres) for x in points]
            assert far[pick] == pytest.approx(max(far), rel=1e-9)
            centres.append(points[pick])


@pytest.mark.parametrize("seed", range(3))
def test_each_clip_once_takes_the_highest_score_of_the_clips_used_least(seed):
    candidates = pool(8, seed=seed)
    rows, used, expected = candidates.pairs.tolist(), [0] * 8, []
    for _ in range(8):
        rest = [i for i in range(28) if i not in expected]
        expected.append(
            max(rest, key=lambda i: (-max(used[c] for c in rows[i]), candidates.scores[i]))
        )
        for clip in rows[expected[-1]]:
            used[clip] += 1
    assert sorted(clip for i in expected[:4] for clip in rows[i]) == list(range(8))
    assert EachClipOnce().choose(candidates, 8).tolist() == expected


def doubled(clips: int, dtype: torch.dtype, offset: float) -> Candidates:
    """Make a pool with every clip twice, the copies a rounding error apart."""
    returns = pool(clips).returns.to(dtype) + offset
    noise = 1 + torch.finfo(dtype).eps * torch.randn(6, clips, generator=seeded(4)).sign()
    returns = torch.cat([returns, returns * noise.to(dtype)], 1)
    pairs = all_pairs(2 * clips)
    # The score that is highest for a clip against its copy.
    return Candidates(predictive_entropy(returns, pairs), pairs, returns)


def queries(candidates: Candidates, chosen: torch.Tensor, clips: int) -> list[tuple[int, ...]]:
    return [tuple(sorted(c % clips for c in pair)) for pair in candidates.pairs[chosen].tolist()]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_queries_are_not_repeated_with_twin_clips(rule, dtype, offset):
    candidates = doubled(6, dtype, offset)
    everything = rule.choose(candidates, 66, seeded())
    assert sorted(everything.tolist()) == list(range(66))
    # Six clips make 15 queries; a clip against its copy is none.
    asked = queries(candidates, everything[:15], 6)
    assert sorted(asked) == list(map(tuple, all_pairs(6).tolist()))


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_twins_are_found_among_clips_of_the_same_mean(rule):
    # Members that mirror each other: every clip's mean is 0.
    half = torch.randn(3, 5, generator=seeded(2), dtype=torch.float64)
    returns = torch.cat([half, -half]).repeat(1, 2)
    pairs = all_pairs(10)
    candidates = Candidates(torch.ones(45), pairs, returns)
    asked = queries(candidates, rule.choose(candidates, 10, seeded()), 5)
    assert sorted(asked) == list(map(tuple, all_pairs(5).tolist()))


def test_one_uncertain_clip_does_not_fill_a_batch():
    returns = 0.5 * torch.randn(16, 30, generator=seeded(4), dtype=torch.float64)
    returns[:, 0] = torch.linspace(-3, 3, 16)
    pairs = all_pairs(30)
    candidates = Candidates(d_optimal(returns, pairs), pairs, returns)
    with_it = {
        named(rule): int((pairs[rule.choose(candidates, 15, seeded())] == 0).any(1).sum())
        for rule in (TopK(), Power(0.25), EachClipOnce(), GreedyLogDet())
    }
    assert (with_it["TopK"], with_it["EachClipOnce"]) == (15, 1)
    assert max(with_it["GreedyLogDet"], with_it["Power"]) < 12


@pytest.mark.parametrize("rule", [*RULES, Power(1.0)], ids=named)
def test_a_score_of_zero_is_chosen_last(rule):
    candidates = pool(8)
    scores = candidates.scores.clone()
    scores[(candidates.pairs >= 4).any(1)] = 0
    chosen = rule.choose(Candidates(scores, candidates.pairs, candidates.returns), 2, seeded())
    assert bool((candidates.pairs[chosen] < 4).all())


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_permuting_pairs_or_clips_permutes_the_choice(rule):
    # Pairs that share no clip, since distances between others may tie.
    every = pool(24)
    pairs = torch.arange(24).reshape(12, 2)
    candidates = Candidates(d_optimal(every.returns, pairs), pairs, every.returns)
    chosen = rule.choose(candidates, 7, seeded())
    order = torch.randperm(12, generator=seeded(2))
    moved = Candidates(candidates.scores[order], pairs[order], every.returns)
    assert torch.equal(order[rule.choose(moved, 7, seeded())], chosen)
    clips = torch.randperm(24, generator=seeded(3))
    renamed = Candidates(candidates.scores, clips.argsort()[pairs], every.returns[:, clips])
    assert torch.equal(rule.choose(renamed, 7, seeded()), chosen)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_equal_scores_are_chosen_at_random(rule):
    certain = Candidates(torch.zeros(15), all_pairs(6), torch.arange(6.0).repeat(3, 1))
    asked = {tuple(rule.choose(certain, 1, seeded(seed)).tolist()) for seed in range(60)}
    assert len(asked) > 8
    assert sorted(rule.choose(certain, 15, seeded()).tolist()) == list(range(15))
    assert rule.choose(certain, 0).shape == (0,)
    none = Candidates(torch.zeros(0), torch.zeros(0, 2).long(), torch.zeros(3, 6))
    assert rule.choose(none, 0).shape == (0,)
