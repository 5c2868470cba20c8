"""Which pairs of clips to ask about next.

A strategy sees a belief about returns, never the model behind it, so that every strategy works
with every predictor. `ScoredStrategy` composes any acquisition with any batch rule, and most
others are settings of it that have a name; a table of strategies lists `STRATEGIES`. Whoever
wants another writes a `QueryStrategy`, and gives its import path.
"""

from __future__ import annotations

from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from active.acquisition import (
    Acquisition,
    acquisition_named,
    d_optimal,
    expected_best,
    mutual_information,
    predictive_entropy,
    preference_variance,
)
from active.query_strategy import QueryStrategy, check_selection, weighted
from active.rules import BatchRule, Candidates, Power, TopK
from active.thompson import BestVsWorst, Thompson
from active.variety import EachClipOnce, FarthestFirst, GreedyLogDet
from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import check_random_answer_rate
from rewardmodels.posterior import ReturnPosterior


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
        check_selection(posterior, pairs, n, weights)
        scores = torch.ones(len(pairs), dtype=torch.float64, device=pairs.device)
        candidates = Candidates(weighted(scores, pairs, weights), pairs, scores.new_empty(0, 0))
        return Power(1.0).choose(candidates, n, generator)


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
        """Selects n pairs by score and rule; see `QueryStrategy.select`."""
        check_selection(posterior, pairs, n, weights)
        returns = posterior.rsample(self.samples, generator).detach()
        scores = weighted(self.acquisition(returns, pairs), pairs, weights)
        return self.rule.choose(Candidates(scores, pairs, returns), n, generator)


# What follows only names settings of ScoredStrategy, whose select is the one there is.


@final
class Disagreement(ScoredStrategy):
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
        super().__init__(preference_variance, _rule(power), samples)
        self.power = power


@final
class BALD(ScoredStrategy):
    """Asks where an answer is expected to give most information about the reward function.

    `ScoredStrategy` with `mutual_information` (Houlsby et al. 2011; Bıyık et al. 2019).

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.
        power: Draw the batch with probability proportional to score to this power
            (`active.rules.Power`); None takes the highest scores, which are often the same
            question many times over.
        random_answer_rate: Probability that the teacher answers at random.

    Raises:
        InvalidInput: Fewer than 1 sample, a negative power, or a mistake rate outside [0, 1).
    """

    def __init__(
        self, samples: int = 32, power: float | None = 1.0, random_answer_rate: float = 0.0
    ) -> None:
        check_random_answer_rate(random_answer_rate)
        score = partial(mutual_information, random_answer_rate=random_answer_rate)
        super().__init__(score, _rule(power), samples)
        self.power, self.random_answer_rate = power, random_answer_rate


@final
class Entropy(ScoredStrategy):
    """Asks where the answer is hardest to foretell, for whatever reason.

    `ScoredStrategy` with `predictive_entropy` (Lewis & Gale 1994; one of the strategies of Lee
    et al. 2021, arXiv 2111.03026).

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.
        power: As in `BALD`; scores lie so close together that drawing by them is next to
            uniform, so that the highest are taken unless this says otherwise.

    Raises:
        InvalidInput: Fewer than 1 sample, or a negative power.
    """

    def __init__(self, samples: int = 32, power: float | None = None) -> None:
        super().__init__(predictive_entropy, _rule(power), samples)
        self.power = power


@final
class DOptimal(ScoredStrategy):
    """Asks where an answer shrinks the volume of the belief most.

    `ScoredStrategy` with `d_optimal`. `GreedyInformation` does so for the batch as a whole.

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.
        power: As in `BALD`.

    Raises:
        InvalidInput: Fewer than 1 sample, or a negative power.
    """

    def __init__(self, samples: int = 32, power: float | None = 1.0) -> None:
        super().__init__(d_optimal, _rule(power), samples)
        self.power = power


@final
class EUBO(ScoredStrategy):
    """Asks about pairs whose better clip is expected to be very good.

    `ScoredStrategy` with `expected_best` (Lin et al. 2022, arXiv 2203.11382), each clip once:
    the highest scores all hold the same favourite.

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.

    Raises:
        InvalidInput: Fewer than 1 sample.
    """

    def __init__(self, samples: int = 32) -> None:
        super().__init__(expected_best, EachClipOnce(), samples)


@final
class GreedyInformation(ScoredStrategy):
    """Asks for the batch whose answers together teach most, chosen greedily.

    `ScoredStrategy` with `d_optimal` and `active.variety.GreedyLogDet`.

    Args:
        samples: Posterior samples that the scores rest on, and the rank of what a batch can
            teach. For an ensemble a multiple of its size counts every member equally.

    Raises:
        InvalidInput: Fewer than 1 sample.
    """

    def __init__(self, samples: int = 32) -> None:
        super().__init__(d_optimal, GreedyLogDet(), samples)


@final
class KCenter(ScoredStrategy):
    """Asks pairs that cover all pairs, by what samples say of them, however sure they are.

    `ScoredStrategy` with all scores equal and `active.variety.FarthestFirst` (core-sets: Sener &
    Savarese 2018, arXiv 1708.00489; one of the strategies of Lee et al. 2021, arXiv 2111.03026,
    there over observations).

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.

    Raises:
        InvalidInput: Fewer than 1 sample.
    """

    def __init__(self, samples: int = 32) -> None:
        super().__init__(_equal, FarthestFirst(), samples)


STRATEGIES: Final[dict[str, type[QueryStrategy]]] = {
    strategy.__name__: strategy
    for strategy in (
        Uniform, Disagreement, BALD, Entropy, DOptimal, EUBO,
        Thompson, BestVsWorst, GreedyInformation, KCenter,
    )
}  # fmt: skip


def _rule(power: float | None) -> BatchRule:
    return TopK() if power is None else Power(power)


def _equal(returns: Tensor, pairs: Tensor) -> Tensor:
    return returns.new_ones(len(pairs))
