"""Strategies that let single posterior draws say which clips to compare.

Where an acquisition averages over draws, these take each question from draws of its own. A
batch is then as varied as the belief is unsure, with no rule to make it so.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final, final

import torch
from torch import Tensor

from active.query_strategy import QueryStrategy, check_selection, weighted
from rewardmodels.posterior import ReturnPosterior

_SAME: Final = 1e-5  # share of a draw's spread by which it must see two clips differ


class DrawnQueries(QueryStrategy):
    """For each question the pair that draws of its own value most, of those not chosen yet.

    Pairs of equal value are drawn at random.
    """

    draws_per_question: int

    @final
    def select(
        self,
        posterior: ReturnPosterior,
        pairs: Tensor,
        n: int,
        *,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Selects n pairs, one for each set of draws; see `QueryStrategy.select`."""
        check_selection(posterior, pairs, n, weights)
        order = torch.randperm(len(pairs), generator=generator).to(pairs.device)
        if n == 0:
            return order[:0]
        draws = posterior.rsample(n * self.draws_per_question, generator).detach()
        # From each draw's own worst clip, so that a weight scales what a clip is worth to it.
        draws = draws - draws.amin(1, keepdim=True)
        first, second = pairs[order].long().unbind(1)
        weight = weighted(draws.new_ones(len(pairs)), pairs[order], weights)
        chosen: list[int] = []
        for some in draws.split(self.draws_per_question):
            values = self.values(some, first, second) * weight
            values[chosen] = -1
            chosen.append(int(values.argmax()))
        return order[chosen]

    @abstractmethod
    def values(self, draws: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """`(Q,)` values, at least 0, of pairs to one question's draws `(draws_per_question, N)`."""


@final
class Thompson(DrawnQueries):
    r"""Compares the favourites of two draws (double Thompson sampling).

    For draws f and g the pair with the highest $f(a) + g(b)$, either way round: f's favourite
    against g's, and against the next best where the two agree, or can't tell their favourites
    apart, or the pair has been chosen (Wu & Liu 2016, arXiv 1604.07101, without the bounds on
    what is drawn from). It looks for the best
    clip, and stops asking about a clip as soon as no draw takes it for the best. For an ensemble
    a draw is a member.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> belief = SampledPosterior(torch.tensor([[0.0, 5.0, 1.0], [0.0, 1.0, 7.0]]))
        >>> Thompson().select(belief, torch.tensor([[0, 1], [1, 2], [0, 2]]), 1)
        tensor([1])
    """

    draws_per_question = 2

    def values(self, draws: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """What the two clips are worth, each to one of the draws."""
        ours, theirs = draws
        worth = torch.maximum(ours[first] + theirs[second], ours[second] + theirs[first])
        # A favourite's copy is as good a favourite, and nothing to compare it with.
        apart = (draws[:, second] - draws[:, first]).abs().amax(0)
        return worth * (apart > _SAME * draws.max())


@final
class BestVsWorst(DrawnQueries):
    r"""Compares the best clip of a draw with its worst.

    For a draw f the pair with the largest $|f(b) - f(a)|$. Easy questions, whose answer would
    refute the draw if it were wrong. For an ensemble a draw is a member.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> belief = SampledPosterior(torch.tensor([[3.0, 5.0, 1.0]]))
        >>> BestVsWorst().select(belief, torch.tensor([[0, 1], [2, 0], [1, 2]]), 1)
        tensor([2])
    """

    draws_per_question = 1

    def values(self, draws: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """How far apart the draw sees the two clips, reward units."""
        return (draws[0, second] - draws[0, first]).abs()
