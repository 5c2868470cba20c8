"""Settings that are known to be good, task by task; what each was measured to give is in README."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from active import Constant, Schedule


@dataclass(frozen=True)
class KnownGood:
    """How the first answers are gathered, which is where tasks differ most.

    Attributes:
        schedule: Makes the schedule of comparisons.
        warm_up: Rounds of asking and fitting before the policy is trained at all.
        start_over: Steps after which an agent that acts at random starts over; None for the
            task's horizon.
    """

    schedule: Callable[[], Schedule] = Constant
    warm_up: int = 1
    start_over: int | None = None


# A Walker2d that acts at random has fallen after some 25 of its 1,000 steps. Answers about the rest
# teach that falling forwards is good, and a policy that has learned to crawl doesn't get up again.
_WALKER = KnownGood(lambda: Constant(initial=0.5), warm_up=4, start_over=50)

# Nothing of a backflip is to be seen in a Hopper that has fallen.
_BACKFLIP = KnownGood(start_over=100)

KNOWN_GOOD: dict[str, KnownGood] = {"Walker2d": _WALKER, "backflip": _BACKFLIP}


def known_good(task: str) -> KnownGood:
    """Settings for a task of that name; those that serve most tasks where none are known."""
    return KNOWN_GOOD.get(task, KnownGood())
