"""Timetables against the integrated rate, and asking when unsure against what it would learn."""

import math

import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from active import Constant, Hyperbolic, WhenUnsure, mean_information
from rewardmodels.errors import InvalidInput
from rewardmodels.posterior import GaussianPosterior, SampledPosterior

SCHEDULES = [Constant(0.25), Constant(0.0), Hyperbolic(0.25), Hyperbolic(0.1, half_life=300.0)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("budget", [0, 1, 7, 700, 5500])
def test_it_starts_at_the_initial_share_ends_at_the_budget_and_never_falls(schedule, budget):
    counts = [
        schedule.comparisons_by(t, total_steps=1000, budget=budget) for t in range(0, 1001, 5)
    ]
    assert abs(counts[0] - schedule.initial * budget) <= 0.5
    assert counts[-1] == budget
    assert counts == sorted(counts)
    assert schedule.comparisons_by(5000, total_steps=1000, budget=budget) == budget


def test_constant_is_a_straight_line():
    for step in range(0, 1000, 37):
        due = Constant(0.2).comparisons_by(step, total_steps=1000, budget=10**9)
        assert due == pytest.approx(1e9 * (0.2 + 0.8 * step / 1000), abs=1)


@pytest.mark.parametrize("half_life", [10.0, 3000.0, 2e6, 1e15])
def test_hyperbolic_is_the_integral_of_the_published_rate(half_life):
    total = 50_000

    def rate(step: float) -> float:
        return half_life / (step + half_life)

    whole = (
        scipy.integrate.quad(rate, 0, total, limit=500, points=[half_life])[0]
        if (half_life < total)
        else scipy.integrate.quad(rate, 0, total)[0]
    )
    for step in (0, 5, 1000, 20_000, 50_000):
        part = scipy.integrate.quad(rate, 0, step, limit=500)[0]
        due = Hyperbolic(0.25, half_life).comparisons_by(step, total_steps=total, budget=10**6)
        assert due == pytest.approx(1e6 * (0.25 + 0.75 * part / whole), abs=1.5)


def test_the_rate_halves_after_the_half_life():
    schedule = Hyperbolic(0.0, half_life=1e6)

    def slope(at: int) -> int:
        by = [schedule.comparisons_by(t, total_steps=10**7, budget=10**12) for t in (at, at + 1000)]
        return by[1] - by[0]

    assert slope(10**6) / slope(0) == pytest.approx(1 / 2, rel=1e-3)
    assert slope(2 * 10**6) / slope(0) == pytest.approx(1 / 3, rel=1e-3)


def test_a_half_life_far_past_the_end_is_constant():
    for step in range(0, 1000, 100):
        args = {"total_steps": 1000, "budget": 10**6}
        flat = Constant().comparisons_by(step, **args)
        assert Hyperbolic(half_life=1e14).comparisons_by(step, **args) == flat


@pytest.mark.parametrize("initial", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("kind", [Constant, Hyperbolic, WhenUnsure])
def test_an_initial_share_outside_0_to_1_is_refused(kind, initial):
    with pytest.raises(InvalidInput, match=f"initial: .* got {initial}"):
        kind(initial=initial)


def test_other_bad_values_are_refused():
    for half_life in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput, match="half_life: "):
            Hyperbolic(half_life=half_life)
    for level in (-0.1, 0.7, math.nan):
        with pytest.raises(InvalidInput, match=f"level: .* got {level}"):
            WhenUnsure(level)
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(InvalidInput, match=f"share: .* got {share}"):
            WhenUnsure(share=share)
    for step, total, budget, answered in (
        (-1, 10, 5, 0),
        (0, 0, 5, 0),
        (0, 10, -5, 0),
        (0, 9, 5, -1),
    ):
        args = {"total_steps": total, "budget": budget, "answered": answered}
        for schedule in (Constant(), WhenUnsure()):
            with pytest.raises(InvalidInput, match="step, total_steps, budget, answered: "):
                schedule.comparisons_by(step, **args)
    with pytest.raises(InvalidInput, match=r"posterior: .* got 1"):
        mean_information(SampledPosterior(torch.zeros(3, 1)))


def test_christianos_rate_is_the_default():
    # A quarter at first, the rest at 2e6 / (T + 2e6), over the 50 million steps of a long run.
    total, c = 50_000_000, 2e6
    for step in (0, 1_000_000, 20_000_000):
        share = math.log((step + c) / c) / math.log((total + c) / c)
        due = Hyperbolic().comparisons_by(step, total_steps=total, budget=10**6)
        assert due == pytest.approx(1e6 * (0.25 + 0.75 * share), abs=1)


def test_a_timetable_looks_neither_at_answers_nor_at_the_belief():
    def never():
        raise AssertionError("a timetable has no use for a belief")

    args = {"total_steps": 100, "budget": 50}
    for schedule in SCHEDULES:
        plain = schedule.comparisons_by(40, **args)
        assert schedule.comparisons_by(40, answered=17, posterior=never, **args) == plain


def information(samples: torch.Tensor) -> float:
    """Of all pairs, the mean of SciPy's entropy of the mean less the mean entropy."""
    scores = []
    for a in range(samples.shape[1]):
        for b in range(a):
            p = scipy.special.expit((samples[:, b] - samples[:, a]).double().numpy())
            table = [p, 1 - p]
            total = scipy.stats.entropy([p.mean(), 1 - p.mean()])
            scores.append(total - scipy.stats.entropy(table).mean())
    return sum(scores) / len(scores)


def test_mean_information_is_that_of_every_pair_and_does_not_change():
    samples = 2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    belief = SampledPosterior(samples)
    assert mean_information(belief) == pytest.approx(information(samples), rel=1e-5)
    gaussian = GaussianPosterior(torch.zeros(4), 2 * torch.eye(4))
    drawn = information(gaussian.rsample(4000, torch.Generator().manual_seed(1)))
    assert mean_information(gaussian) == pytest.approx(drawn, rel=0.15)
    assert mean_information(gaussian) == mean_information(gaussian)


def test_it_asks_while_the_belief_is_worse_than_the_level_and_stops_when_it_is_not():
    samples = 2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    level, args = information(samples), {"total_steps": 100, "budget": 100}

    def due(schedule: WhenUnsure, answered: int) -> int:
        return schedule.comparisons_by(
            7, answered=answered, posterior=lambda: SampledPosterior(samples), **args
        )

    unsure, sure = WhenUnsure(level - 0.001, share=0.15), WhenUnsure(level + 0.001, share=0.15)
    for answered in (25, 40, 70, 85):
        assert due(unsure, answered) == answered + 15
        assert due(sure, answered) == answered
    assert due(unsure, 95) == 100  # within the budget
    assert due(unsure, 100) == 100

    def never():
        raise AssertionError("nobody should look at the belief when nothing can be asked")

    assert unsure.comparisons_by(7, answered=100, posterior=never, **args) == 100
    # What was skipped of the first quarter comes first, whatever is believed.
    assert due(unsure, 20) == due(sure, 20) == 25


def test_without_a_belief_only_the_first_are_due_however_late():
    for step in (0, 50, 100):
        args = {"total_steps": 100, "budget": 30}
        assert WhenUnsure(0.1).comparisons_by(step, **args) == 8
        assert WhenUnsure(0.1).comparisons_by(step, answered=12, **args) == 12
    # A share of the budget that is less than half a question is still a question.
    unsure = SampledPosterior(torch.tensor([[0.0, 9.0], [0.0, -9.0]]))
    asked = WhenUnsure(share=0.01).comparisons_by(
        9, total_steps=10, budget=20, answered=10, posterior=lambda: unsure
    )
    assert asked == 11
