"""How a batch of pairs is chosen once every pair has a score.

One batch is answered before the model learns from any of it, so the pairs with the highest
scores are often the same question twenty times over. A rule trades score for variety. A new
one is a class with `choose`. `TopK` and `Power` look at scores alone; those in `active.variety`
look at what the pairs have in common.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rewardmodels.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a rule may look at: the scored pairs and the samples that they were scored from.

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
        """Chooses `(n,)` distinct indices into `candidates.pairs`, n at most Q."""


@final
class TopK(BatchRule):
    """The n pairs with the highest scores, best first.

    Equal scores are drawn at random: a model that is sure of everything would else ask about
    its first clip for ever. Nothing keeps a batch from holding one question many times over: of
    a clip and its copy, each against the same third clip, it takes both.

    Example:
        >>> scores, pairs = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([[0, 1], [0, 2], [1, 2]])
        >>> TopK().choose(Candidates(scores, pairs, torch.zeros(1, 3)), 2)
        tensor([1, 2])
    """

    def choose(
        self, candidates: Candidates, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Chooses the n highest scores; see the class."""
        return _highest(candidates.scores, n, generator)


@final
class Power(BatchRule):
    r"""Pairs drawn one after another with probability proportional to score to a power.

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
        if not 0 <= power < math.inf:
            raise InvalidInput(f"power: expected a finite number, at least 0, got {power}.")
        self.power = power

    def choose(
        self, candidates: Candidates, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws n pairs without replacement; see the class."""
        # Doubles: an exponential of 0 in single precision (once in 10^8 draws) is infinite noise.
        scores = candidates.scores.double()
        # The clamp makes log 0 about -708, below any score that is drawn, and not -inf, which
        # would tie all zeros and turn a power of 0 into NaN.
        log_scores = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        exponential = torch.empty(len(scores), dtype=scores.dtype).exponential_(generator=generator)
        gumbel = -exponential.log().to(scores.device)
        return _highest(self.power * log_scores + gumbel, n, generator)


def _highest(keys: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    shuffled = torch.randperm(len(keys), generator=generator).to(keys.device)
    order = keys[shuffled].argsort(descending=True, stable=True)
    return shuffled[order[:n]]
