"""What every choice of queries has in common: a belief and pairs in, indices of pairs out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from active.pairs import check_pairs
from rewardmodels.errors import InvalidInput
from rewardmodels.posterior import ReturnPosterior


class QueryStrategy(ABC):
    """A choice of queries; its constructor takes hyper-parameters only."""

    @abstractmethod
    def select(
        self,
        posterior: ReturnPosterior,
        pairs: Tensor,
        n: int,
        *,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Selects n of the pairs.

        Args:
            posterior: Belief about the returns of N clips.
            pairs: `(Q, 2)` integers, the candidates, indices into the N clips.
            n: Number of pairs to select.
            weights: `(N,)`, at least 0, how much each clip matters; a pair's score is multiplied
                by both its clips'. A clip's closeness to what the policy now does makes queries
                near on-policy (Hu et al. 2023, arXiv 2305.17400).
            generator: Source of randomness.

        Returns:
            `(n,)` long, distinct indices into `pairs`, in the order of selection.

        Raises:
            InvalidInput: More pairs asked for than there are, or a shape or a value that
                can't be used.
        """


def check_selection(
    posterior: ReturnPosterior, pairs: Tensor, n: int, weights: Tensor | None
) -> None:
    """Raises InvalidInput unless `QueryStrategy.select` can be asked this."""
    clips = len(posterior.mean)
    check_pairs(pairs, clips)
    if not 0 <= n <= len(pairs):
        raise InvalidInput(
            f"n: expected from 0 to the {len(pairs)} pairs there are to select from, got {n}; "
            "cut more clips or ask for fewer."
        )
    if weights is None:
        return
    if weights.shape != (clips,):
        raise InvalidInput(
            f"weights: expected one per clip, shape ({clips},), got {tuple(weights.shape)}."
        )
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise InvalidInput(
            "weights: expected finite numbers, at least 0, got some that are negative, NaN or "
            "infinite."
        )


def weighted(scores: Tensor, pairs: Tensor, weights: Tensor | None) -> Tensor:
    """`(Q,)` scores, each multiplied by the weights of both its clips."""
    if weights is None:
        return scores
    first, second = pairs.long().unbind(1)
    return scores * weights[first] * weights[second]
