"""Schedules: how many comparisons are due at a step of the agent's training.

A schedule counts comparisons received, not queries put, since people skip; the caller requests
`comparisons_by(...) - answered` more. `Timetable`s depend on the agent's steps, `WhenUnsure` on
the posterior about its policy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, final

import torch

from active.acquisition import all_pairs, mutual_information
from rewardmodels.errors import require
from rewardmodels.posterior import ReturnPosterior

# A multiple of the sizes that ensembles have, so that each member counts alike.
_SAMPLES: Final = 60


class Schedule(ABC):
    """A budget of comparisons spread over the agent's training.

    Args:
        initial: From 0 to 1, share of the budget due before the first step (Christiano et al.
            2017, Appendix A, use a quarter).

    Raises:
        InvalidInput: An initial share outside [0, 1].
    """

    def __init__(self, initial: float = 0.25) -> None:
        require("initial", 0 <= initial <= 1, "a share from 0 to 1", initial)
        self.initial = initial

    @abstractmethod
    def comparisons_by(
        self,
        step: int,
        *,
        total_steps: int,
        budget: int,
        answered: int = 0,
        posterior: Callable[[], ReturnPosterior] | None = None,
    ) -> int:
        """Return the number of comparisons due by a step.

        Args:
            step: Steps that the agent has taken.
            total_steps: Steps in the whole of the agent's training, at least 1.
            budget: Comparisons in the whole of the agent's training.
            answered: Comparisons received so far.
            posterior: Makes the posterior over returns of the policy's latest clips; only called
                by a schedule that uses it. None before there is one.

        Returns:
            A count from 0 to the budget; none are due if it is at most `answered`.

        Raises:
            InvalidInput: A negative step, budget or number of answers, or fewer than 1 step in
                total.
        """


class Timetable(Schedule):
    r"""A schedule by the agent's steps alone.

    $n(t) = b\,[a + (1 - a)\,f(t)]$, rounded, for a budget b, an initial share a, and the share f
    of the rest that is due by step t, which each timetable defines and which rises from 0 to 1.
    The whole budget is due at the last step and past it.
    """

    @final
    def comparisons_by(
        self,
        step: int,
        *,
        total_steps: int,
        budget: int,
        answered: int = 0,
        posterior: Callable[[], ReturnPosterior] | None = None,
    ) -> int:
        _check(step, total_steps, budget, answered)
        if step >= total_steps:
            return budget
        return _part(budget, self.initial + (1 - self.initial) * self.share_by(step, total_steps))

    @abstractmethod
    def share_by(self, step: int, total_steps: int) -> float:
        """f(t), from 0 to 1: share due by a step of the comparisons after the initial ones."""


@final
class Constant(Timetable):
    r"""A constant rate: $f(t) = t / T$.

    Args:
        initial: As in `Schedule`.

    Example:
        >>> Constant(initial=0.25).comparisons_by(500, total_steps=1000, budget=1000)
        625
    """

    def share_by(self, step: int, total_steps: int) -> float:
        return step / total_steps


@final
class Hyperbolic(Timetable):
    r"""A decreasing rate, proportional to $c / (t + c)$.

    Its integral, normalised to reach 1 at the end, is
    $f(t) = \log(1 + t / c) / \log(1 + T / c)$. The default is that of Christiano et al. 2017,
    Appendix A.

    Args:
        initial: As in `Schedule`.
        half_life: c, agent steps after which the rate is half of that at step 0 (and a third after
            2 c: a hyperbola, not an exponential).

    Raises:
        InvalidInput: A half-life that isn't positive, or as in `Schedule`.

    Example:
        >>> schedule = Hyperbolic(initial=0.0, half_life=1000)
        >>> [schedule.comparisons_by(t, total_steps=3000, budget=100) for t in (0, 1000, 3000)]
        [0, 50, 100]
    """

    def __init__(self, initial: float = 0.25, half_life: float = 2e6) -> None:
        super().__init__(initial)
        expected = "a positive, finite number of agent steps"
        require("half_life", 0 < half_life < math.inf, expected, half_life)
        self.half_life = half_life

    def share_by(self, step: int, total_steps: int) -> float:
        # log1p keeps it exact for a half-life far past the end.
        return math.log1p(step / self.half_life) / math.log1p(total_steps / self.half_life)


@final
class WhenUnsure(Schedule):
    """Request comparisons while the posterior about the policy's latest clips is too wide.

    Whenever `mean_information` of these clips is above the level, a share of the budget more is
    due; else nothing is, however much of the budget is left. A policy that stays where comparisons
    were made costs none, and new behaviour is queried at once.

    Args:
        level: Nats from 0 to log 2, mean information of a comparison above which more are due. At
            0 they are due as long as the posterior samples differ at all.
        share: Share of the budget, above 0, that is due each time.
        initial: As in `Schedule`; until it is received the posterior isn't used.

    Raises:
        InvalidInput: A level or a share out of range.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> unsure = SampledPosterior(torch.tensor([[0.0, 9.0], [0.0, -9.0]]))
        >>> sure = SampledPosterior(torch.tensor([[0.0, 9.0], [0.0, 9.0]]))
        >>> schedule, so_far = WhenUnsure(level=0.1), dict(total_steps=99, budget=80, answered=20)
        >>> schedule.comparisons_by(50, posterior=lambda: unsure, **so_far)
        28
        >>> schedule.comparisons_by(50, posterior=lambda: sure, **so_far)
        20
    """

    def __init__(self, level: float = 0.2, share: float = 0.1, initial: float = 0.25) -> None:
        super().__init__(initial)
        require("level", 0 <= level <= math.log(2), "nats from 0 to log 2 = 0.693", level)
        require("share", 0 < share <= 1, "a share above 0, up to 1", share)
        self.level, self.share = level, share

    def comparisons_by(
        self,
        step: int,
        *,
        total_steps: int,
        budget: int,
        answered: int = 0,
        posterior: Callable[[], ReturnPosterior] | None = None,
    ) -> int:
        _check(step, total_steps, budget, answered)
        first = _part(budget, self.initial)
        if posterior is None or answered < first or answered >= budget:
            return min(budget, max(first, answered))
        if mean_information(posterior()) <= self.level:
            return answered
        return min(budget, answered + max(1, _part(budget, self.share)))


SCHEDULES: Final[dict[str, Callable[..., Schedule]]] = {
    cls.__name__: cls for cls in (Constant, Hyperbolic, WhenUnsure)
}


def mean_information(posterior: ReturnPosterior) -> float:
    """Mutual information of a comparison and the reward function, averaged over all pairs.

    The mean of `active.acquisition.mutual_information` from 60 samples, drawn with a fixed seed so
    that a posterior has one value.

    Args:
        posterior: Over the returns of N clips, at least 2.

    Returns:
        Nats from 0 to log 2.

    Raises:
        InvalidInput: Fewer than 2 clips.

    Example:
        >>> from rewardmodels.posterior import SampledPosterior
        >>> posterior = SampledPosterior(torch.tensor([[0.0, 50.0, 0.0], [0.0, -50.0, 0.0]]))
        >>> round(mean_information(posterior), 3)  # two pairs of three tell everything, log 2
        0.462
    """
    samples = posterior.rsample(_SAMPLES, torch.Generator().manual_seed(0)).detach()
    clips = samples.shape[1]
    require("posterior", clips >= 2, "at least 2 clips", clips)
    pairs = all_pairs(clips).to(samples.device)
    return float(mutual_information(samples, pairs).double().mean())


def _part(budget: int, share: float) -> int:
    return min(budget, math.floor(budget * share + 0.5))


def _check(step: int, total_steps: int, budget: int, answered: int) -> None:
    require("total_steps", total_steps >= 1, "at least 1", total_steps)
    for name, value in (("step", step), ("budget", budget), ("answered", answered)):
        require(name, value >= 0, "at least 0", value)
