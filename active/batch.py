"""Rules that choose a batch of pairs from the scores of all pairs.

The model is fitted only after a whole batch has been compared, and the highest scores are often
nearly the same query many times over; a rule trades score for variety. `TopK` and `Power` use the
scores alone. The others choose one pair at a time, given those before, and treat two clips that
have the same return in every posterior sample as one clip. A new rule is a class with `choose`,
and a line in `BATCH_RULES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from rewardmodels.errors import require

# Two clips are twins if no sample's returns differ by more than this share of the spread of all
# returns, plus so many roundings of a return (networks sum in varying order).
_SAME: Final = 1e-5
_ROUNDING: Final = 8


@dataclass(frozen=True, eq=False)
class Candidates:
    """Scored pairs, and the samples that they were scored from.

    Args:
        scores: `(Q,)`, at least 0; the unit is the acquisition's.
        pairs: `(Q, 2)` long, indices into the N clips.
        returns: `(S, N)`, joint posterior samples, reward units.
    """

    scores: Tensor
    pairs: Tensor
    returns: Tensor


class BatchRule(ABC):
    """A rule that turns scored pairs into a batch; its constructor takes hyper-parameters only."""

    @abstractmethod
    def choose(
        self, candidates: Candidates, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Choose `(n,)` distinct indices into `candidates.pairs`, n at most Q."""


@final
class TopK(BatchRule):
    """The n pairs with the highest scores, best first.

    Equal scores are ordered at random: otherwise a model that is certain of everything would
    always query its first clip.

    Example:
        >>> scores, pairs = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([[0, 1], [0, 2], [1, 2]])
        >>> TopK().choose(Candidates(scores, pairs, torch.zeros(1, 3)), 2)
        tensor([1, 2])
    """

    def choose(
        self, candidates: Candidates, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return _highest(candidates.scores, n, generator)


@final
class Power(BatchRule):
    r"""Pairs drawn without replacement, in proportion to a power of their scores.

    The n largest of $\beta \log s_i + G_i$ with standard Gumbel noise $G_i$, which is sampling
    without replacement from $p_i \propto s_i^\beta$ (Kirsch et al. 2023, "Stochastic Batch
    Acquisition", arXiv 2106.12059, §3, "power acquisition"). Pairs with a score of zero come
    last, in random order.

    Args:
        power: $\beta$, at least 0: 0 is uniform, the paper uses 1, and large values approach
            `TopK`.

    Raises:
        InvalidInput: A power that is negative, NaN or infinite.

    Example:
        >>> scores, pairs = torch.tensor([0.0, 0.3, 0.2]), torch.tensor([[0, 1], [0, 2], [1, 2]])
        >>> sorted(Power(1.0).choose(Candidates(scores, pairs, torch.zeros(1, 3)), 2).tolist())
        [1, 2]
    """

    def __init__(self, power: float = 1.0) -> None:
        require("power", 0 <= power < math.inf, "a finite number, at least 0", power)
        self.power = power

    def choose(
        self, candidates: Candidates, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        # Doubles: an exponential of 0 in single precision (once in 10^8 draws) is infinite noise.
        scores = candidates.scores.double()
        # The clamp makes log 0 about -708, below any score that is drawn, and not -inf, which
        # would tie all zeros and turn a power of 0 into NaN.
        log_scores = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        exponential = torch.empty(len(scores), dtype=scores.dtype).exponential_(generator=generator)
        gumbel = -exponential.log().to(scores.device)
        return _highest(self.power * log_scores + gumbel, n, generator)


class OneByOne(BatchRule):
    """A rule that chooses one pair at a time, and updates the values of the rest after each.

    Pairs of equal value are chosen at random. A query is repeated, with twin clips, only after
    every other has been chosen once.
    """

    @final
    def choose(
        self, candidates: Candidates, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        order = torch.randperm(len(candidates.pairs), generator=generator)
        order = order.to(candidates.pairs.device)
        shuffled = Candidates(
            candidates.scores[order].double(),
            candidates.pairs[order].long(),
            candidates.returns.double(),
        )
        clips = _without_twins(candidates.returns)[shuffled.pairs].sort(1).values
        query = clips[:, 0] * shuffled.returns.shape[1] + clips[:, 1]
        # A comparison of a clip with its twin teaches nothing.
        repeats = (clips[:, 0] == clips[:, 1]).double()
        values = self.values(shuffled, clips)
        chosen: list[int] = []
        value = next(values) if n else repeats
        for _ in range(n):
            # Least repeated first, then the highest value.
            best = int(value.masked_fill(repeats > repeats.min(), -torch.inf).argmax())
            chosen.append(best)
            repeats[query == query[best]] += 1
            repeats[best] = torch.inf
            if len(chosen) < n:
                value = values.send(best)
        return order[chosen]

    @abstractmethod
    def values(self, candidates: Candidates, clips: Tensor) -> Generator[Tensor, int, None]:
        """Yield `(Q,)` finite values of all pairs; receive the index of the chosen pair.

        Args:
            candidates: The scored pairs, in doubles.
            clips: `(Q, 2)`, the clips of each pair, where twins share one number.
        """


@final
class EachClipOnce(OneByOne):
    """The highest scores with no clip in two pairs; when all clips are used, it starts again.

    A greedy matching, whose total is at least half of the best matching's (Avis 1983). It keeps
    one clip with high scores from being in every pair of the batch.

    Example:
        >>> scores, pairs = torch.tensor([9.0, 8.0, 1.0]), torch.tensor([[0, 1], [0, 2], [2, 3]])
        >>> EachClipOnce().choose(Candidates(scores, pairs, torch.eye(4)), 2)
        tensor([0, 2])
    """

    def values(self, candidates: Candidates, clips: Tensor) -> Generator[Tensor, int, None]:
        """Yield scores, ranked below pairs whose clips have been used less often."""
        used = torch.zeros(candidates.returns.shape[1], device=clips.device, dtype=torch.float64)
        # Scores squeezed into [0, 1/2], so that they never outweigh a use.
        tiny = torch.finfo(torch.float64).tiny
        rank = candidates.scores / (2 * candidates.scores.max()).clamp_min(tiny)
        while True:
            best = yield rank - used[clips].amax(1)
            used[clips[best]] += 1


@final
class GreedyLogDet(OneByOne):
    r"""Pairs that are jointly informative: greedy maximisation of a log determinant.

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
        """Yield the rise of the determinant, less one."""
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
    r"""Pairs with return differences far from one another: k-center (Gonzalez 1985).

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


def _highest(keys: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    shuffled = torch.randperm(len(keys), generator=generator).to(keys.device)
    order = keys[shuffled].argsort(descending=True, stable=True)
    return shuffled[order[:n]]


BATCH_RULES: Final[dict[str, type[BatchRule]]] = {
    rule.__name__: rule for rule in (TopK, Power, EachClipOnce, GreedyLogDet, FarthestFirst)
}
