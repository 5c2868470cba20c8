"""Schedules against the numerically integrated rate and the published one."""

import math

import pytest
import scipy.integrate

from active import Constant, Hyperbolic
from rewardmodels.errors import InvalidInput

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
@pytest.mark.parametrize("kind", [Constant, Hyperbolic])
def test_an_initial_share_outside_0_to_1_is_refused(kind, initial):
    with pytest.raises(InvalidInput, match=f"initial: .* got {initial}"):
        kind(initial=initial)


def test_other_bad_values_are_refused():
    for half_life in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput, match="half_life: "):
            Hyperbolic(half_life=half_life)
    for step, total, budget in ((-1, 10, 5), (0, 0, 5), (0, 10, -5)):
        with pytest.raises(InvalidInput, match="step, total_steps, budget: "):
            Constant().comparisons_by(step, total_steps=total, budget=budget)
