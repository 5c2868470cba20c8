"""Query strategies: which pairs of clips to ask about next.

A strategy sees a posterior over returns, never the model behind it, so that every strategy works
with every predictor. `ScoredStrategy` composes any acquisition with any batch rule, and most
others are named settings of it. A new one is a `QueryStrategy` and a line in `STRATEGIES`; a
user's own is named by its import path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from active.acquisition import (
    Acquisition,
    acquisition_named,
    check_pairs,
    d_optimal,
    expected_best,
    mutual_information,
    predictive_entropy,
    preference_variance,
)
from active.batch import (
    BatchRule,
    Candidates,
    EachClipOnce,
    FarthestFirst,
    GreedyLogDet,
    Power,
    TopK,
)
from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import check_random_answer_rate
from rewardmodels.posterior import ReturnPosterior

_SAME: Final = 1e-5  # share of a draw's spread by which it must see two clips differ


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
        """Select n of the pairs.

        Args:
            posterior: Over the returns of N clips.
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
    """Raise InvalidInput unless these are valid arguments of `QueryStrategy.select`."""
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


@final
class Uniform(QueryStrategy):
    """Every pair equally likely; with weights, in proportion to the pair's weight.

    The baseline that an informative strategy has to beat. Draws are without replacement. It
    looks at nothing in the posterior.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> posterior = SampledPosterior(torch.zeros(1, 4))
        >>> pairs = torch.tensor([[0, 1], [0, 2], [2, 3]])
        >>> sorted(Uniform().select(posterior, pairs, 3).tolist())
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
        """Select n pairs at random; see `QueryStrategy.select`."""
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
        >>> posterior = SampledPosterior(torch.tensor([[0.0, 5.0, 0.0], [0.0, -5.0, 1.0]]))
        >>> pairs = torch.tensor([[0, 1], [0, 2]])
        >>> ScoredStrategy("preference_variance").select(posterior, pairs, 1)
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
        """Select n pairs by score and rule; see `QueryStrategy.select`."""
        check_selection(posterior, pairs, n, weights)
        returns = posterior.rsample(self.samples, generator).detach()
        scores = weighted(self.acquisition(returns, pairs), pairs, weights)
        return self.rule.choose(Candidates(scores, pairs, returns), n, generator)


# What follows only names settings of ScoredStrategy, whose select is the one there is.


@final
class Disagreement(ScoredStrategy):
    """Query pairs where posterior samples disagree about which clip is better.

    `ScoredStrategy` with `preference_variance` (Christiano et al. 2017, §2.2.4).

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.
        power: Draw the batch with probability proportional to score to this power
            (`active.batch.Power`); None takes the highest scores, which are often the same
            question many times over.

    Raises:
        InvalidInput: Fewer than 1 sample, or a negative power.
    """

    def __init__(self, samples: int = 32, power: float | None = 1.0) -> None:
        super().__init__(preference_variance, _rule(power), samples)
        self.power = power


@final
class BALD(ScoredStrategy):
    """Query pairs whose answer has most mutual information with the reward function.

    `ScoredStrategy` with `mutual_information` (Houlsby et al. 2011; Bıyık et al. 2019).

    Args:
        samples: Posterior samples that the scores rest on. For an ensemble a multiple of its
            size counts every member equally.
        power: Draw the batch with probability proportional to score to this power
            (`active.batch.Power`); None takes the highest scores, which are often the same
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
    """Query pairs whose predicted answer has the highest entropy.

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
    """Query pairs whose answer shrinks the posterior volume most.

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
    """Query pairs whose better clip has the highest expected return.

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
    """Query a batch that is jointly informative, chosen greedily.

    `ScoredStrategy` with `d_optimal` and `active.batch.GreedyLogDet`.

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
    """Query pairs that cover all pairs in the space of sampled return differences.

    `ScoredStrategy` with all scores equal and `active.batch.FarthestFirst` (core-sets: Sener &
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
        """Select n pairs, one for each set of draws; see `QueryStrategy.select`."""
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
    r"""Compare the favourites of two draws (double Thompson sampling).

    For draws f and g the pair with the highest $f(a) + g(b)$, either way round: f's favourite
    against g's, and against the next best where the two agree, or can't tell their favourites
    apart, or the pair has been chosen (Wu & Liu 2016, arXiv 1604.07101, without the bounds on
    what is drawn from). It looks for the best
    clip, and stops asking about a clip as soon as no draw takes it for the best. For an ensemble
    a draw is a member.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> posterior = SampledPosterior(torch.tensor([[0.0, 5.0, 1.0], [0.0, 1.0, 7.0]]))
        >>> Thompson().select(posterior, torch.tensor([[0, 1], [1, 2], [0, 2]]), 1)
        tensor([1])
    """

    draws_per_question = 2

    def values(self, draws: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Sum of the returns of the two clips, each under one of the draws."""
        ours, theirs = draws
        worth = torch.maximum(ours[first] + theirs[second], ours[second] + theirs[first])
        # A favourite's copy is as good a favourite, and nothing to compare it with.
        apart = (draws[:, second] - draws[:, first]).abs().amax(0)
        return worth * (apart > _SAME * draws.max())


@final
class BestVsWorst(DrawnQueries):
    r"""Compare the best clip of a draw with its worst.

    For a draw f the pair with the largest $|f(b) - f(a)|$. Easy questions, whose answer would
    refute the draw if it were wrong. For an ensemble a draw is a member.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> posterior = SampledPosterior(torch.tensor([[3.0, 5.0, 1.0]]))
        >>> BestVsWorst().select(posterior, torch.tensor([[0, 1], [2, 0], [1, 2]]), 1)
        tensor([2])
    """

    draws_per_question = 1

    def values(self, draws: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Absolute difference of the two returns under the draw, reward units."""
        return (draws[0, second] - draws[0, first]).abs()


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
