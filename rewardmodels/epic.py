"""EPIC distance between two reward functions, invariant to scale, constant and shaping."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.regression import pearson_corrcoef

from rewardmodels.arrays import ArrayLike, as_tensor
from rewardmodels.errors import require

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]

_AT_ONCE = 1 << 16  # transitions per call of a reward function


def epic_distance(
    one: Reward,
    other: Reward,
    observations: ArrayLike,
    actions: ArrayLike,
    next_observations: ArrayLike,
    *,
    discount: float = 0.99,
    draws: int = 256,
    generator: torch.Generator | None = None,
) -> float:
    r"""EPIC distance of two reward functions (Gleave et al. 2021, §4).

    $\sqrt{(1 - \rho)/2}$ with $\rho$ Pearson's correlation over the given transitions of both
    rewards in canonical form,
    $R(s,a,s') + E[\gamma R(s',A,S') - R(s,A,S') - \gamma R(S,A,S')]$.
    The expectation is over `draws` pairs of an action and a next observation, drawn independently
    of each other from those given and shared by all terms, so that potential shaping cancels
    exactly. It is 0 for rewards that differ by shaping and a positive scale, 1 for a reward and its
    negative, and $1/\sqrt 2$ for uncorrelated ones. The last term is a constant, which doesn't
    change a correlation, and is left out.

    Args:
        one: Maps states, actions and next states `(B, *obs)`, `(B, *act)` and `(B, *obs)` to
            rewards `(B,)`. For a model, `lambda s, a, t: model.frame_posterior(t, a).mean`.
        other: The same, of another reward.
        observations: `(M, *obs)`, state before each action.
        actions: `(M, *act)`.
        next_observations: `(M, *obs)`, state after each action.
        discount: $\gamma$ of the shaping, from 0 to 1.
        draws: Size of the expectation; each reward is evaluated at 2 M `draws` transitions.
        generator: Source of randomness.

    Returns:
        From 0 to 1; NaN if a reward in canonical form is constant.

    Raises:
        InvalidInput: Fewer than two transitions, numbers of them that don't agree, or a discount
            or a number of draws out of range.

    Example:
        >>> s, a, t = torch.randn(3, 50, 1).unbind()
        >>> reward = lambda s, a, t: (s * a)[:, 0]
        >>> round(epic_distance(reward, lambda s, a, t: -reward(s, a, t), s, a, t), 3)
        1.0
    """
    observations = as_tensor("observations", observations)
    actions = as_tensor("actions", actions)
    next_observations = as_tensor("next_observations", next_observations)
    m, k, n = len(observations), len(actions), len(next_observations)
    name, expected = "observations, actions, next_observations", "as many of each, at least 2"
    require(name, m == k == n >= 2, expected, f"{m}, {k} and {n}")
    expected = "a number from 0 to 1 and one of at least 1"
    valid = 0 <= discount <= 1 and draws >= 1
    require("discount, draws", valid, expected, f"{discount} and {draws}")
    drawn_actions = actions[torch.randint(m, (draws,), generator=generator)]
    drawn_next = next_observations[torch.randint(m, (draws,), generator=generator)]

    def mean_from(reward: Reward, states: Tensor) -> Tensor:
        rows = []
        for some in states.split(max(1, _AT_ONCE // draws)):
            n = len(some)
            rewards = reward(
                some.repeat_interleave(draws, 0),
                drawn_actions.repeat(n, *(1,) * (actions.ndim - 1)),
                drawn_next.repeat(n, *(1,) * (next_observations.ndim - 1)),
            )
            rows.append(rewards.view(n, draws).double().mean(1))
        return torch.cat(rows)

    with torch.no_grad():
        one_canonical, other_canonical = (
            reward(observations, actions, next_observations).double()
            + discount * mean_from(reward, next_observations)
            - mean_from(reward, observations)
            for reward in (one, other)
        )
    return pearson_distance(one_canonical, other_canonical)


def pearson_distance(one: ArrayLike, other: ArrayLike) -> float:
    r"""Pearson distance $\sqrt{(1 - \rho)/2}$ of two rewards over the same frames.

    It is the EPIC distance of rewards that depend on the action and the observation after it
    only, as `RewardModel.frame_posterior` does: their canonical form adds a constant.

    Args:
        one: `(M,)` rewards.
        other: `(M,)`, of the same frames.

    Returns:
        From 0 to 1; NaN where a reward is constant.

    Example:
        >>> reward = torch.tensor([0.0, 1.0, 3.0])
        >>> pearson_distance(reward, 2 * reward - 1), pearson_distance(reward, -reward)
        (0.0, 1.0)
    """
    one, other = as_tensor("one", one), as_tensor("other", other)
    if float(one.std()) == 0 or float(other.std()) == 0:
        return float("nan")
    correlation = float(pearson_corrcoef(one.double(), other.double()))
    return float(np.sqrt(max(0.0, 1 - correlation) / 2))
