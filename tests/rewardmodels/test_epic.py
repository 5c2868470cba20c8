"""EPIC on reward functions whose distance is known, and against a naive loop."""

import math

import pytest
import torch

from rewardmodels import InvalidInput
from rewardmodels import epic as epic_module
from rewardmodels.epic import epic_distance


def transitions(n: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    state, change = torch.randn(2, n, 3, generator=draw)
    action = torch.randn(n, 2, generator=draw)
    return state, action, 0.9 * state + 0.3 * change


def reward(s, a, t):
    return s[:, 0] * a[:, 0] + torch.sin(t[:, 1]) + a[:, 1]


def shaped(s, a, t, discount=0.9):
    def potential(x):
        return 5 * torch.cos(x[:, 0]) + x[:, 2].square()

    return 3 * reward(s, a, t) + discount * potential(t) - potential(s) + 7


def negated(s, a, t):
    return -shaped(s, a, t)


def independent(s, a, t):
    return s[:, 1] * a[:, 1] * torch.sign(s[:, 2])


@pytest.mark.parametrize(
    ("other", "expected", "allowed"),
    [
        (reward, 0, 1e-6),
        (shaped, 0, 1e-4),
        (negated, 1, 1e-6),
        # A correlation of 400 pairs is within 4 / sqrt(400) of 0.
        (independent, 1 / math.sqrt(2), 0.08),
    ],
)
def test_known_distances(other, expected, allowed):
    draw = torch.Generator().manual_seed(1)
    data = [part.double() for part in transitions()]
    found = epic_distance(reward, other, *data, discount=0.9, generator=draw)
    assert found == pytest.approx(expected, abs=allowed)


def test_shaping_of_another_discount_counts():
    assert epic_distance(reward, shaped, *transitions(), discount=0.5) > 0.1


@pytest.mark.parametrize("at_once", [1, 7, 1 << 16])
def test_is_a_loop_over_transitions_and_draws(monkeypatch, at_once):
    monkeypatch.setattr(epic_module, "_AT_ONCE", at_once)
    s, a, t = (part.double() for part in transitions(15))
    found = epic_distance(
        reward, independent, s, a, t, discount=0.8, draws=6,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(2)
    drawn = a[torch.randint(15, (6,), generator=draw)], t[torch.randint(15, (6,), generator=draw)]

    def one(function, state, action, after):
        return float(function(state[None], action[None], after[None]))

    columns = []
    for function in (reward, independent):
        column = []
        for i in range(15):
            value = one(function, s[i], a[i], t[i])
            for action, after in zip(*drawn, strict=True):
                value += 0.8 * one(function, t[i], action, after) / 6
                value -= one(function, s[i], action, after) / 6
            column.append(value)
        columns.append(torch.tensor(column, dtype=torch.double))
    rho = float(torch.corrcoef(torch.stack(columns))[0, 1])
    assert found == pytest.approx(math.sqrt((1 - rho) / 2), abs=1e-9)


def test_the_same_generator_gives_the_same_distance():
    found = [
        epic_distance(
            reward, independent, *transitions(), generator=torch.Generator().manual_seed(seed)
        )
        for seed in (3, 3, 4)
    ]
    assert found[0] == found[1] != found[2]


def test_a_constant_has_no_distance():
    assert math.isnan(epic_distance(reward, lambda s, a, t: torch.ones(len(s)), *transitions()))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ((5, 4, 5), {}, "got 5, 4 and 5"),
        ((1, 1, 1), {}, "at least 2, got 1"),
        ((5, 5, 5), {"discount": 1.5}, "got 1.5 and 256"),
        ((5, 5, 5), {"draws": 0}, "got 0.99 and 0"),
    ],
)
def test_refuses(rows, settings, message):
    parts = [part[:n] for part, n in zip(transitions(5), rows, strict=True)]
    with pytest.raises(InvalidInput, match=message):
        epic_distance(reward, reward, *parts, **settings)
