"""Timetables against the integrated rate, and `WhenUnsure` against the mean information."""

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
def test_a_timetable_rises_from_the_initial_share_to_the_budget(schedule, budget):
    counts = [
        schedule.comparisons_by(t, total_steps=1000, budget=budget) for t in range(0, 1001, 5)
    ]
    assert abs(counts[0] - schedule.initial * budget) <= 0.5
    assert counts[-1] == budget
    assert counts == sorted(counts)
    assert schedule.comparisons_by(5000, total_steps=1000, budget=budget) == budget


@pytest.mark.parametrize("schedule", [Constant(0.2), Hyperbolic(0.2, half_life=1e14)])
def test_constant_and_hyperbolic_of_a_long_half_life_are_straight_lines(schedule):
    for step in range(0, 1000, 37):
        due = schedule.comparisons_by(step, total_steps=1000, budget=10**9)
        assert due == pytest.approx(1e9 * (0.2 + 0.8 * step / 1000), abs=1)


@pytest.mark.parametrize("half_life", [10.0, 3000.0, 2e6, 1e15])
def test_hyperbolic_is_the_integral_of_the_published_rate(half_life):
    assert Hyperbolic().half_life == 2e6  # as published
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


BAD = {
    (Constant, Hyperbolic, WhenUnsure): {"initial": (-0.1, 1.1, math.nan)},
    (Hyperbolic,): {"half_life": (0.0, -1.0, math.inf, math.nan)},
    (WhenUnsure,): {"level": (-0.1, 0.7, math.nan), "share": (0.0, 1.1, math.nan)},
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, name, value)
        for kinds, settings in BAD.items()
        for kind in kinds
        for name, values in settings.items()
        for value in values
    ],
)
def test_bad_settings_are_refused_by_name(kind, name, value):
    with pytest.raises(InvalidInput, match=f"{name}: "):
        kind(**{name: value})


@pytest.mark.parametrize("schedule", [Constant(), WhenUnsure()])
@pytest.mark.parametrize(
    ("name", "value"), [("step", -1), ("total_steps", 0), ("budget", -5), ("answered", -1)]
)
def test_bad_input_is_refused_by_name(schedule, name, value):
    with pytest.raises(InvalidInput, match=name):
        schedule.comparisons_by(**{"step": 0, "total_steps": 9, "budget": 5, name: value})


def test_a_timetable_ignores_comparisons_and_the_posterior():
    def never():
        raise AssertionError("a timetable ignores the posterior")

    args = {"total_steps": 100, "budget": 50}
    for schedule in SCHEDULES:
        plain = schedule.comparisons_by(40, **args)
        assert schedule.comparisons_by(40, answered=17, posterior=never, **args) == plain


def information(samples: torch.Tensor) -> float:
    """Mean over all pairs of SciPy's entropy of the mean less the mean entropy."""
    scores = []
    for a in range(samples.shape[1]):
        for b in range(a):
            p = scipy.special.expit((samples[:, b] - samples[:, a]).double().numpy())
            table = [p, 1 - p]
            total = scipy.stats.entropy([p.mean(), 1 - p.mean()])
            scores.append(total - scipy.stats.entropy(table).mean())
    return sum(scores) / len(scores)


def test_mean_information_is_the_mean_over_all_pairs_and_has_one_value():
    samples = 2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    posterior = SampledPosterior(samples)
    assert mean_information(posterior) == pytest.approx(information(samples), rel=1e-5)
    gaussian = GaussianPosterior(torch.zeros(4), 2 * torch.eye(4))
    drawn = information(gaussian.rsample(4000, torch.Generator().manual_seed(1)))
    assert mean_information(gaussian) == pytest.approx(drawn, rel=0.15)
    assert mean_information(gaussian) == mean_information(gaussian)
    with pytest.raises(InvalidInput, match="posterior"):
        mean_information(SampledPosterior(torch.zeros(3, 1)))


def test_more_are_due_while_the_information_is_above_the_level():
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
        raise AssertionError("the posterior is not needed when nothing can be due")

    assert unsure.comparisons_by(7, answered=100, posterior=never, **args) == 100
    # The rest of the first quarter is due in any case.
    assert due(unsure, 20) == due(sure, 20) == 25


def test_without_a_posterior_only_the_initial_share_is_due():
    for step in (0, 50, 100):
        args = {"total_steps": 100, "budget": 30}
        assert WhenUnsure(0.1).comparisons_by(step, **args) == 8
        assert WhenUnsure(0.1).comparisons_by(step, answered=12, **args) == 12
    # A share below half a comparison is still one comparison.
    unsure = SampledPosterior(torch.tensor([[0.0, 9.0], [0.0, -9.0]]))
    asked = WhenUnsure(share=0.01).comparisons_by(
        9, total_steps=10, budget=20, answered=10, posterior=lambda: unsure
    )
    assert asked == 11
