"""Query strategies: selection of the pairs of clips to compare next.

A strategy receives a posterior over returns, never the model behind it, so that every strategy
works with every predictor. `ScoredStrategy` composes any acquisition with any batch rule, and most
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
from rewardmodels.errors import require
from rewardmodels.likelihood import check_random_answer_rate
from rewardmodels.posterior import ReturnPosterior

_SAME: Final = 1e-5  # share of a draw's spread, up to which two returns count as equal


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
            weights: `(N,)`, at least 0; a pair's score is multiplied by the weights of both its
                clips. Weights by closeness to the current policy make queries near on-policy (Hu
                et al. 2023, arXiv 2305.17400).
            generator: Source of randomness.

        Returns:
            `(n,)` long, distinct indices into `pairs`, in the order of selection.

        Raises:
            InvalidInput: An n above Q, or an invalid shape or value.
        """


def check_selection(
    posterior: ReturnPosterior, pairs: Tensor, n: int, weights: Tensor | None
) -> None:
    """Raise InvalidInput unless these are valid arguments of `QueryStrategy.select`."""
    clips = len(posterior.mean)
    check_pairs(pairs, clips)
    expected = f"from 0 to the {len(pairs)} pairs there are to select from"
    require("n", 0 <= n <= len(pairs), expected, f"{n}; cut more clips or ask for fewer")
    if weights is None:
        return
    shape = tuple(weights.shape)
    require("weights", shape == (clips,), f"one per clip, shape ({clips},)", shape)
    valid = bool(((weights >= 0) & weights.isfinite()).all())
    got = "some that are negative, NaN or infinite"
    require("weights", valid, "finite numbers, at least 0", got)


def weighted(scores: Tensor, pairs: Tensor, weights: Tensor | None) -> Tensor:
    """`(Q,)` scores, each multiplied by the weights of both its clips."""
    if weights is None:
        return scores
    first, second = pairs.long().unbind(1)
    return scores * weights[first] * weights[second]


@final
class Uniform(QueryStrategy):
    """Draw pairs at random without replacement, in proportion to their weights.

    The baseline that an informative strategy has to beat; it ignores the posterior.

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
        check_selection(posterior, pairs, n, weights)
        scores = torch.ones(len(pairs), dtype=torch.float64, device=pairs.device)
        candidates = Candidates(weighted(scores, pairs, weights), pairs, scores.new_empty(0, 0))
        return Power(1.0).choose(candidates, n, generator)


class ScoredStrategy(QueryStrategy):
    """Score every pair from posterior samples, and choose the batch by a rule.

    Args:
        acquisition: A name in `active.acquisition.ACQUISITIONS`, or a function like those.
        rule: Rule that chooses the batch from the scores; None takes the highest scores.
        samples: Number of posterior samples. For an ensemble a multiple of its size counts every
            member equally.

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
        require("samples", samples >= 1, "at least 1 posterior sample", samples)
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
        check_selection(posterior, pairs, n, weights)
        returns = posterior.rsample(self.samples, generator).detach()
        scores = weighted(self.acquisition(returns, pairs), pairs, weights)
        return self.rule.choose(Candidates(scores, pairs, returns), n, generator)


# Named settings of ScoredStrategy: arguments of the same name mean and raise the same in each.


@final
class Disagreement(ScoredStrategy):
    """Query pairs where posterior samples disagree about the better clip.

    `ScoredStrategy` with `preference_variance` (Christiano et al. 2017, §2.2.4).

    Args:
        samples: Number of posterior samples, as in `ScoredStrategy`.
        power: Draw the batch in proportion to the scores to this power (`active.batch.Power`); None
            takes the highest scores, which are often nearly the same query many times over.

    Raises:
        InvalidInput: Fewer than 1 sample, or a negative power.
    """

    def __init__(self, samples: int = 32, power: float | None = 1.0) -> None:
        super().__init__(preference_variance, _rule(power), samples)
        self.power = power


@final
class BALD(ScoredStrategy):
    """Query pairs whose preference has most mutual information with the reward function.

    `ScoredStrategy` with `mutual_information` (Houlsby et al. 2011; Bıyık et al. 2019).

    Args:
        samples: Number of posterior samples, as in `ScoredStrategy`.
        power: As in `Disagreement`.
        random_answer_rate: Probability that the teacher answers at random.

    Raises:
        InvalidInput: As `Disagreement`, or a rate outside [0, 1).
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
    """Query pairs whose predicted preference has the highest entropy.

    `ScoredStrategy` with `predictive_entropy` (Lewis & Gale 1994; one of the strategies of Lee
    et al. 2021, arXiv 2111.03026).

    Args:
        samples: Number of posterior samples, as in `ScoredStrategy`.
        power: As in `Disagreement`; None by default, since these scores lie so close together that
            drawing in proportion to them is nearly uniform.
    """

    def __init__(self, samples: int = 32, power: float | None = None) -> None:
        super().__init__(predictive_entropy, _rule(power), samples)
        self.power = power


@final
class DOptimal(ScoredStrategy):
    """Query pairs whose comparison shrinks the posterior volume most.

    `ScoredStrategy` with `d_optimal`. `GreedyInformation` does so for the batch as a whole.

    Args:
        samples: Number of posterior samples, as in `ScoredStrategy`.
        power: As in `Disagreement`.
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
        samples: Number of posterior samples, as in `ScoredStrategy`.
    """

    def __init__(self, samples: int = 32) -> None:
        super().__init__(expected_best, EachClipOnce(), samples)


@final
class GreedyInformation(ScoredStrategy):
    """Query a batch that is jointly informative, chosen greedily.

    `ScoredStrategy` with `d_optimal` and `active.batch.GreedyLogDet`.

    Args:
        samples: Number of posterior samples, as in `ScoredStrategy`; a batch is informative in at
            most so many directions.
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
        samples: Number of posterior samples, as in `ScoredStrategy`.
    """

    def __init__(self, samples: int = 32) -> None:
        super().__init__(lambda r, p: r.new_ones(len(p)), FarthestFirst(), samples)


class DrawnQueries(QueryStrategy):
    """For each query the pair of highest value under posterior draws made for that query.

    Each pair is selected once; pairs of equal value are ordered at random.
    """

    draws_per_query: int

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
        check_selection(posterior, pairs, n, weights)
        order = torch.randperm(len(pairs), generator=generator).to(pairs.device)
        if n == 0:
            return order[:0]
        draws = posterior.rsample(n * self.draws_per_query, generator).detach()
        # Relative to the draw's worst clip, so that weights multiply values that are at least 0.
        draws = draws - draws.amin(1, keepdim=True)
        first, second = pairs[order].long().unbind(1)
        weight = weighted(draws.new_ones(len(pairs)), pairs[order], weights)
        chosen: list[int] = []
        for some in draws.split(self.draws_per_query):
            values = self.values(some, first, second) * weight
            values[chosen] = -1
            chosen.append(int(values.argmax()))
        return order[chosen]

    @abstractmethod
    def values(self, draws: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Values `(Q,)`, at least 0, of all pairs under `(draws_per_query, N)` draws."""


@final
class Thompson(DrawnQueries):
    r"""Compare the best clips of two draws (double Thompson sampling).

    For draws f and g the pair with the highest $f(a) + g(b)$, in either order: f's best clip
    against g's, or against the next best where these are the same clip, have equal returns, or are
    selected already (Wu & Liu 2016, arXiv 1604.07101, without the confidence bounds). It looks for
    the best clip, and stops querying a clip that is best in no draw. For an ensemble a draw is a
    member.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> posterior = SampledPosterior(torch.tensor([[0.0, 5.0, 1.0], [0.0, 1.0, 7.0]]))
        >>> Thompson().select(posterior, torch.tensor([[0, 1], [1, 2], [0, 2]]), 1)
        tensor([1])
    """

    draws_per_query = 2

    def values(self, draws: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ours, theirs = draws
        worth = torch.maximum(ours[first] + theirs[second], ours[second] + theirs[first])
        # The best clip's copy scores as high, but comparing the two teaches nothing.
        apart = (draws[:, second] - draws[:, first]).abs().amax(0)
        return worth * (apart > _SAME * draws.max())


@final
class BestVsWorst(DrawnQueries):
    r"""Compare the best clip of a draw with its worst.

    For a draw f the pair with the largest $|f(b) - f(a)|$: easy queries that refute a wrong draw.
    For an ensemble a draw is a member.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> posterior = SampledPosterior(torch.tensor([[3.0, 5.0, 1.0]]))
        >>> BestVsWorst().select(posterior, torch.tensor([[0, 1], [2, 0], [1, 2]]), 1)
        tensor([2])
    """

    draws_per_query = 1

    def values(self, draws: Tensor, first: Tensor, second: Tensor) -> Tensor:
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
