"""Which pairs of clips to ask about next.

A strategy sees a belief about returns, never the model behind it, so that every strategy works
with every predictor. `ScoredStrategy` composes any acquisition with any batch rule; `BALD` and
`Disagreement` are its two usual settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import final

import torch
from torch import Tensor

from active.acquisition import Acquisition, acquisition_named, check_pairs, mutual_information
from active.rules import BatchRule, Candidates, Power, TopK
from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import check_mistake_rate
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
            weights: `(N,)`, at least 0, how much each clip matters (how often the agent's
                policy comes there, say); a pair's score is multiplied by both its clips'.
            generator: Source of randomness.

        Returns:
            `(n,)` long, distinct indices into `pairs`, in the order of selection.

        Raises:
            InvalidInput: More pairs asked for than there are, or a shape or a value that
                can't be used.
        """


@final
class Uniform(QueryStrategy):
    """Every pair equally likely; with weights, in proportion to the pair's weight.

    The baseline that an informative strategy has to beat. Draws are without replacement. It
    looks at nothing in the posterior.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> belief = SampledPosterior(torch.zeros(1, 4))
        >>> pairs = torch.tensor([[0, 1], [0, 2], [2, 3]])
        >>> sorted(Uniform().select(belief, pairs, 3).tolist())
        [0, 1, 2]
    """

    def select(
        self,
        posterior: ReturnPosterior,
        pairs: Tensor,
        n: int,
        *,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Selects n pairs at random; see `QueryStrategy.select`."""
        _check(posterior, pairs, n, weights)
        scores = torch.ones(len(pairs), dtype=torch.float64, device=pairs.device)
        candidates = Candidates(_weighted(scores, pairs, weights), pairs, scores.new_empty(0, 0))
        return Power(1.0).choose(candidates, n, generator)


@final
class ScoredStrategy(QueryStrategy):
    """Scores every pair from posterior samples, then lets a rule choose the batch.

    Args:
        acquisition: A name in `active.acquisition.ACQUISITIONS`, or a function like those.
        rule: How the batch is chosen from the scores; the highest scores if left out.
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.

    Raises:
        UnknownName: An acquisition that isn't known.
        InvalidInput: Fewer than 1 sample.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> belief = SampledPosterior(torch.tensor([[0.0, 5.0, 0.0], [0.0, -5.0, 1.0]]))
        >>> pairs = torch.tensor([[0, 1], [0, 2]])
        >>> ScoredStrategy("preference_variance").select(belief, pairs, 1)
        tensor([0])
    """

    def __init__(
        self,
        acquisition: str | Acquisition = "mutual_information",
        rule: BatchRule | None = None,
        samples: int = 32,
    ) -> None:
        if samples < 1:
            raise InvalidInput(f"samples: expected at least 1 posterior sample, got {samples}.")
        if isinstance(acquisition, str):
            acquisition = acquisition_named(acquisition)
        self.acquisition = acquisition
        self.rule = TopK() if rule is None else rule
        self.samples = samples

    def select(
        self,
        posterior: ReturnPosterior,
        pairs: Tensor,
        n: int,
        *,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Selects n pairs by score and rule; see `QueryStrategy.select`."""
        _check(posterior, pairs, n, weights)
        returns = posterior.rsample(self.samples, generator).detach()
        scores = _weighted(self.acquisition(returns, pairs), pairs, weights)
        return self.rule.choose(Candidates(scores, pairs, returns), n, generator)


@final
class Disagreement(QueryStrategy):
    """Asks where posterior samples disagree about which clip is better.

    `ScoredStrategy` with `preference_variance` (Christiano et al. 2017, §2.2.4).

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.
        power: Draw the batch with probability proportional to score to this power
            (`active.rules.Power`); None takes the highest scores, which are often the same
            question many times over.

    Raises:
        InvalidInput: Fewer than 1 sample, or a negative power.
    """

    def __init__(self, samples: int = 32, power: float | None = 1.0) -> None:
        self.samples, self.power = samples, power
        self._scored = ScoredStrategy("preference_variance", _rule(power), samples)

    def select(
        self,
        posterior: ReturnPosterior,
        pairs: Tensor,
        n: int,
        *,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Selects n pairs by disagreement; see `QueryStrategy.select`."""
        return self._scored.select(posterior, pairs, n, weights=weights, generator=generator)


@final
class BALD(QueryStrategy):
    """Asks where an answer is expected to give most information about the reward function.

    `ScoredStrategy` with `mutual_information` (Houlsby et al. 2011; Bıyık et al. 2019).

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.
        power: Draw the batch with probability proportional to score to this power
            (`active.rules.Power`); None takes the highest scores, which are often the same
            question many times over.
        mistake_rate: Probability that the teacher answers at random.

    Raises:
        InvalidInput: Fewer than 1 sample, a negative power, or a mistake rate outside [0, 1).
    """

    def __init__(
        self, samples: int = 32, power: float | None = 1.0, mistake_rate: float = 0.0
    ) -> None:
        check_mistake_rate(mistake_rate)
        self.samples, self.power, self.mistake_rate = samples, power, mistake_rate
        score = partial(mutual_information, mistake_rate=mistake_rate)
        self._scored = ScoredStrategy(score, _rule(power), samples)

    def select(
        self,
        posterior: ReturnPosterior,
        pairs: Tensor,
        n: int,
        *,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Selects n pairs by mutual information; see `QueryStrategy.select`."""
        return self._scored.select(posterior, pairs, n, weights=weights, generator=generator)


def _rule(power: float | None) -> BatchRule:
    return TopK() if power is None else Power(power)


def _check(posterior: ReturnPosterior, pairs: Tensor, n: int, weights: Tensor | None) -> None:
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


def _weighted(scores: Tensor, pairs: Tensor, weights: Tensor | None) -> Tensor:
    return scores if weights is None else scores * weights[pairs.long()].prod(1)
