"""The likelihood against its formula, written out in double precision."""

import math

import numpy as np
import pytest
import torch

from rewardmodels import InvalidInput, negative_log_likelihood, preference_probability

DIFFERENCES = [-30.0, -3.0, -0.4, 0.0, 1e-3, 2.0, 30.0]


def naive(difference: float, preference: float, mistakes: float) -> float:
    second = (1 - mistakes) / (1 + math.exp(-difference)) + mistakes / 2
    first = (1 - mistakes) / (1 + math.exp(difference)) + mistakes / 2
    return -(preference * math.log(second) + (1 - preference) * math.log(first))


@pytest.mark.parametrize("mistakes", [0.0, 1e-6, 0.1, 0.9])
@pytest.mark.parametrize("preference", [0.0, 0.3, 0.5, 1.0])
def test_is_the_formula(preference, mistakes):
    difference = torch.tensor(DIFFERENCES, dtype=torch.double)
    found = negative_log_likelihood(
        difference, torch.tensor(preference, dtype=torch.double), random_answer_rate=mistakes
    )
    expected = [naive(d, preference, mistakes) for d in DIFFERENCES]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("mistakes", [0.0, 0.1])
def test_is_minus_the_log_of_the_probability(mistakes):
    difference = torch.tensor([-2.0, 0.5, 4.0], dtype=torch.double)
    p = preference_probability(difference, random_answer_rate=mistakes)
    one = negative_log_likelihood(difference, torch.ones(3).double(), random_answer_rate=mistakes)
    nought = negative_log_likelihood(
        difference, torch.zeros(3).double(), random_answer_rate=mistakes
    )
    torch.testing.assert_close(one, -p.log())
    torch.testing.assert_close(nought, -(1 - p).log())


def test_a_tie_is_at_its_best_when_returns_are_equal():
    difference = torch.linspace(-3, 3, 101)
    loss = negative_log_likelihood(difference, torch.tensor(0.5))
    assert difference[loss.argmin()].abs() < 1e-6
    assert float(loss.min()) == pytest.approx(math.log(2))
    torch.testing.assert_close(loss, loss.flip(0))


def test_stays_finite_and_has_a_gradient_far_out():
    difference = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = negative_log_likelihood(difference, torch.tensor([1.0, 0.0]))
    assert loss.tolist() == [1e4, 1e4]
    loss.sum().backward()
    assert difference.grad.tolist() == [-1, 1]


def test_mistakes_bound_what_one_comparison_costs_and_pulls():
    difference = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = negative_log_likelihood(difference, torch.tensor([1.0, 0.0]), random_answer_rate=0.1)
    np.testing.assert_allclose(loss.detach(), -math.log(0.05), rtol=1e-6)
    loss.sum().backward()
    assert difference.grad.tolist() == [0, 0]


@pytest.mark.parametrize("mistakes", [0.0, 0.2])
def test_gradient(mistakes):
    difference = torch.randn(6, dtype=torch.double, requires_grad=True)
    preference = torch.rand(6, dtype=torch.double)
    assert torch.autograd.gradcheck(
        lambda d: negative_log_likelihood(d, preference, random_answer_rate=mistakes), difference
    )


def test_broadcasts():
    loss = negative_log_likelihood(torch.randn(5, 3), torch.rand(3))
    assert loss.shape == (5, 3)


@pytest.mark.parametrize("mistakes", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("function", [preference_probability, negative_log_likelihood])
def test_refuses_a_rate_that_is_no_probability(function, mistakes):
    arguments = [torch.zeros(1)] * (1 if function is preference_probability else 2)
    with pytest.raises(InvalidInput, match=f"random_answer_rate: .*got {mistakes}"):
        function(*arguments, random_answer_rate=mistakes)
