"""Rules that choose a batch one pair at a time, each for what the ones before leave to ask.

Two clips that every posterior sample values alike are twins: to the belief they are one clip,
and a pair of one is the same question as that pair of the other. A pool in which clips come
twice (overlapping stretches of one episode nearly do) doesn't fool these rules: they come back
to a question only when there is no other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from typing import Final, final

import torch
from torch import Tensor

from active.rules import BatchRule, Candidates

# Two clips are twins if no sample's returns differ by more than this much of the spread of all
# returns, besides what the order of a network's sums may do to one clip's return.
_SAME: Final = 1e-5
_ROUNDING: Final = 8


class OneByOne(BatchRule):
    """A rule that chooses one pair at a time, and values what is left anew after each.

    Pairs of equal value are drawn at random, and no question is put twice, in the words of twin
    clips, before every other has been put once.
    """

    @final
    def choose(
        self, candidates: Candidates, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Chooses n pairs one after another; see the class."""
        order = torch.randperm(len(candidates.pairs), generator=generator)
        order = order.to(candidates.pairs.device)
        shuffled = Candidates(
            candidates.scores[order].double(),
            candidates.pairs[order].long(),
            candidates.returns.double(),
        )
        clips = _without_twins(candidates.returns)[shuffled.pairs].sort(1).values
        question = clips[:, 0] * shuffled.returns.shape[1] + clips[:, 1]
        # A clip against its twin asks nothing at all.
        worn = (clips[:, 0] == clips[:, 1]).double()
        values = self.values(shuffled, clips)
        chosen: list[int] = []
        value = next(values) if n else worn
        for _ in range(n):
            # Least worn first, then the highest value.
            best = int(value.masked_fill(worn > worn.min(), -torch.inf).argmax())
            chosen.append(best)
            worn[question == question[best]] += 1
            worn[best] = torch.inf
            if len(chosen) < n:
                value = values.send(best)
        return order[chosen]

    @abstractmethod
    def values(self, candidates: Candidates, clips: Tensor) -> Generator[Tensor, int, None]:
        """Yields `(Q,)` finite values of all pairs, and is sent the index of the pair it led to.

        Args:
            candidates: The scored pairs, in doubles.
            clips: `(Q, 2)`, the clips of each pair, where twins go by one number.
        """


@final
class EachClipOnce(OneByOne):
    """The highest scores, no clip in two pairs; when all clips are used, from the start again.

    A greedy matching, for scores that one clip drives: else it's in every question of the
    batch. Its total is at least half of the best matching's (Avis 1983).

    Example:
        >>> scores, pairs = torch.tensor([9.0, 8.0, 1.0]), torch.tensor([[0, 1], [0, 2], [2, 3]])
        >>> EachClipOnce().choose(Candidates(scores, pairs, torch.eye(4)), 2)
        tensor([0, 2])
    """

    def values(self, candidates: Candidates, clips: Tensor) -> Generator[Tensor, int, None]:
        """A pair's score, below all of pairs whose clips have been used less often."""
        used = torch.zeros(candidates.returns.shape[1], device=clips.device, dtype=torch.float64)
        # Scores squeezed into [0, 1/2], so that they never outweigh a use.
        tiny = torch.finfo(torch.float64).tiny
        rank = candidates.scores / (2 * candidates.scores.max()).clamp_min(tiny)
        while True:
            best = yield rank - used[clips].amax(1)
            used[clips[best]] += 1


@final
class GreedyLogDet(OneByOne):
    r"""Pairs that together teach most, each counted for what the ones before leave open.

    Greedily maximises $\log\det(I + D^{1/2} C D^{1/2})$ over the batch, for scores D and the
    correlation C, over posterior samples, of the pairs' return differences. With
    `active.acquisition.d_optimal` for the score that is $\log\det(I + W^{1/2} K W^{1/2})$ with
    K their covariance and $W = p(1 - p)$: (twice) the information in the batch, in nats, under
    Laplace's approximation. With another score it is the log-likelihood of a determinantal
    point process of that quality (Kulesza & Taskar 2012, arXiv 1207.6083).

    The objective is monotone and submodular, so the batch is within $1 - 1/e$ of the best there
    is (Nemhauser, Wolsey & Fisher 1978). Nothing is refitted and no covariance is formed: a pick
    costs $O(S^2 + SN + Q)$, by the matrix inversion lemma in sample space.

    Example:
        >>> returns = torch.tensor([[0.0, 3.0, 3.1, 0.0], [0.0, -3.0, -3.1, 1.0]])
        >>> pairs = torch.tensor([[0, 1], [0, 2], [0, 3]])
        >>> scores = torch.tensor([9.0, 9.6, 0.2])
        >>> GreedyLogDet().choose(Candidates(scores, pairs, returns), 1)
        tensor([1])
    """

    def values(self, candidates: Candidates, clips: Tensor) -> Generator[Tensor, int, None]:
        """The rise of the determinant, less one: each score at first, less of it ever after."""
        centred = candidates.returns - candidates.returns.mean(0)
        first, second = candidates.pairs.unbind(1)
        spread = _norms(centred, candidates.pairs)
        # Features f with D^(1/2) C D^(1/2) = f'f: differences, scaled to the score's root.
        scale = torch.where(spread > 0, candidates.scores.sqrt() / spread, 0)
        gain = candidates.scores * (spread > 0)
        inverse = torch.eye(len(centred), dtype=centred.dtype, device=centred.device)
        while True:
            best = yield gain
            feature = scale[best] * (centred[:, second[best]] - centred[:, first[best]])
            direction = inverse @ feature
            along = direction @ centred
            shared = scale * (along[second] - along[first])
            left = 1 + gain[best]
            gain = (gain - shared.square() / left).clamp_min(0)
            inverse = inverse - direction.outer(direction) / left


@final
class FarthestFirst(OneByOne):
    r"""Pairs far from one another in what samples say of them: k-center (Gonzalez 1985).

    A pair is the point of its S return differences, and $d(x, y) = \min(|x - y|, |x + y|)$, so
    that the order of its clips doesn't matter. Each pick is the pair with the highest score
    times its distance from the nearest one chosen; the first is farthest from a difference of
    nothing. With equal scores the largest distance that is left uncovered is at most twice the
    smallest possible. A pick costs $O(SN + Q)$.

    Example:
        >>> returns = torch.tensor([[0.0, 9.0, 8.0, 2.0], [0.0, 9.0, 8.0, -2.0]])
        >>> pairs = torch.tensor([[0, 1], [2, 0], [0, 3]])
        >>> FarthestFirst().choose(Candidates(torch.ones(3), pairs, returns), 2)
        tensor([0, 2])
    """

    def values(self, candidates: Candidates, clips: Tensor) -> Generator[Tensor, int, None]:
        """Score times distance from the nearest chosen pair, reward units."""
        returns = candidates.returns / len(candidates.returns) ** 0.5
        first, second = candidates.pairs.unbind(1)
        norm = _norms(returns, candidates.pairs)
        distance = norm.clone()
        while True:
            best = yield candidates.scores * distance
            along = (returns[:, second[best]] - returns[:, first[best]]) @ returns
            # |x|² + |y|² - 2 |x·y| is the square of the nearer of y and -y.
            squared = norm.square() + norm[best].square() - 2 * (along[second] - along[first]).abs()
            distance = torch.minimum(distance, squared.clamp_min(0).sqrt())


def _norms(returns: Tensor, pairs: Tensor) -> Tensor:
    """`(Q,)` lengths of the pairs' columns of differences, in O(S N + Q) memory."""
    squared = returns.new_zeros(len(pairs))
    for row in returns:
        squared += (row[pairs[:, 1]] - row[pairs[:, 0]]).square()
    return squared.sqrt()


def _without_twins(returns: Tensor) -> Tensor:
    """`(N,)` numbers of clips, one for all those that every sample values alike."""
    precision = torch.finfo(returns.dtype).eps
    returns = returns.double()
    spread = (returns - returns.mean(1, keepdim=True)).square().mean().sqrt()
    tolerance = _SAME * spread + _ROUNDING * precision * returns.abs().max()
    # Along a line through sample space that no symmetry singles out, twins are neighbours.
    along = torch.arange(1, len(returns) + 1, dtype=torch.float64, device=returns.device).sqrt()
    order = (along @ returns).argsort()
    new = (returns[:, order].diff(dim=1).abs() > tolerance).any(0)
    number = torch.zeros_like(order)
    number[order[1:]] = new.long().cumsum(0)
    return number
