"""How many answers there should be by which step of the agent.

A schedule counts answers received, not questions put: people skip, and a budget spent on
skipped questions teaches nothing. The caller asks `comparisons_by(step) - received` more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

from rewardmodels.errors import InvalidInput


class Schedule(ABC):
    r"""A budget of comparisons spread over the agent's steps.

    $n(t) = b\,[a + (1 - a)\,f(t)]$, rounded, for a budget b, an initial share a that is asked
    for before the first step, and the share f of the rest that is due by step t, which each
    schedule defines and which rises from 0 to 1.

    Args:
        initial: a, from 0 to 1, share of the budget due at step 0 (Christiano et al. 2017,
            Appendix A, use a quarter).

    Raises:
        InvalidInput: An initial share outside [0, 1].
    """

    def __init__(self, initial: float = 0.25) -> None:
        if not 0 <= initial <= 1:
            raise InvalidInput(f"initial: expected a share from 0 to 1, got {initial}.")
        self.initial = initial

    @final
    def comparisons_by(self, step: int, *, total_steps: int, budget: int) -> int:
        """How many answers should have come by a step.

        Args:
            step: Steps that the agent has taken; past `total_steps` the whole budget is due.
            total_steps: Steps in the whole of the agent's training, at least 1.
            budget: Comparisons in the whole of the agent's training.

        Returns:
            A count that never falls as step rises: the initial share at 0, the whole budget at
            `total_steps`.

        Raises:
            InvalidInput: A negative step or budget, or fewer than 1 step in total.
        """
        if step < 0 or total_steps < 1 or budget < 0:
            raise InvalidInput(
                "step, total_steps, budget: expected at least 0, 1 and 0, got "
                f"{step}, {total_steps} and {budget}."
            )
        if step >= total_steps:
            return budget
        share = self.initial + (1 - self.initial) * self.share_by(step, total_steps)
        return min(budget, math.floor(budget * share + 0.5))

    @abstractmethod
    def share_by(self, step: int, total_steps: int) -> float:
        """f(t): share of what follows the initial comparisons that is due by a step, 0 to 1."""


@final
class Constant(Schedule):
    r"""The same rate all the time: $f(t) = t / T$.

    Args:
        initial: Share of the budget due at step 0.

    Raises:
        InvalidInput: An initial share outside [0, 1].

    Example:
        >>> Constant(initial=0.25).comparisons_by(500, total_steps=1000, budget=1000)
        625
    """

    def share_by(self, step: int, total_steps: int) -> float:
        """Elapsed share of the steps."""
        return step / total_steps


@final
class Hyperbolic(Schedule):
    r"""Many at first, ever fewer later: a rate proportional to $c / (t + c)$.

    Its integral, normalised to reach 1 at the end, is
    $f(t) = \log(1 + t / c) / \log(1 + T / c)$. Christiano et al. 2017, Appendix A, use
    $c = 2 \cdot 10^6$ frames. The rate doesn't depend on how long the training is, the share
    does.

    Args:
        initial: Share of the budget due at step 0.
        half_life: c, agent steps after which the rate is half of what it was at step 0 (and a
            third after 2 c, being a hyperbola and no exponential).

    Raises:
        InvalidInput: An initial share outside [0, 1], or a half-life that isn't positive.

    Example:
        >>> schedule = Hyperbolic(initial=0.0, half_life=1000)
        >>> [schedule.comparisons_by(t, total_steps=3000, budget=100) for t in (0, 1000, 3000)]
        [0, 50, 100]
    """

    def __init__(self, initial: float = 0.25, half_life: float = 2e6) -> None:
        super().__init__(initial)
        if not 0 < half_life < math.inf:
            raise InvalidInput(
                f"half_life: expected a positive, finite number of agent steps, got {half_life}."
            )
        self.half_life = half_life

    def share_by(self, step: int, total_steps: int) -> float:
        """Share of the integrated rate; log1p keeps it exact for a half-life far past the end."""
        return math.log1p(step / self.half_life) / math.log1p(total_steps / self.half_life)
