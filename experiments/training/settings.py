"""Settings that are known to be good, task by task; what each was measured to give is in README."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from active import Constant, Hyperbolic, Schedule


@dataclass(frozen=True)
class KnownGood:
    """Budgets, and how the first answers are gathered, which is where tasks differ most.

    Attributes:
        comparisons: Answers to learn from, in all.
        steps: Environment steps to train the policy for.
        rounds: Rounds of asking, fitting and training.
        schedule: Makes the schedule of comparisons.
        warm_up: Rounds of asking and fitting before the policy is trained at all.
        start_over: Steps after which an agent that acts at random starts over; None for the
            task's horizon.
    """

    comparisons: int = 400
    steps: int = 300_000
    rounds: int = 10
    schedule: Callable[[], Schedule] = Constant
    warm_up: int = 1
    start_over: int | None = None


# A Walker2d that acts at random has fallen after some 25 of its 1,000 steps. Answers about the rest
# teach that falling forwards is good, and a policy that has learned to crawl doesn't get up again.
_WALKER = KnownGood(schedule=lambda: Constant(initial=0.5), warm_up=4, start_over=50)

# As many comparisons as Christiano et al. (2017, §3.2) took. Nothing of a backflip is to be seen in
# a Hopper that has fallen, as one that acts at random has after some 50 steps. Landings are still
# learned after 500,000 steps, but what turning is has to be learned in the first 100,000.
_BACKFLIP = KnownGood(
    comparisons=900,
    steps=1_000_000,
    rounds=25,
    schedule=lambda: Hyperbolic(half_life=200_000),
    start_over=100,
)

KNOWN_GOOD: dict[str, KnownGood] = {"Walker2d": _WALKER, "backflip": _BACKFLIP}


def known_good(task: str) -> KnownGood:
    """Settings for a task of that name; those that serve most tasks where none are known."""
    return KNOWN_GOOD.get(task, KnownGood())
