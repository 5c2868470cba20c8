"""AlarmResponse: what a guard does about an alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from ood.events import Event, EventLog
from rewardmodels import Clips, InvalidInput

Array = NDArray[Any]
Policy = Callable[[Array], Any]
"""From one observation `(*obs,)` to an action."""
Ask = Callable[[Clips], bool | None]
"""From the clip that led up to an alarm to whether to go on; None if the answer comes later."""
Response = Literal["halt", "ask", "fallback"]
OnAlarm = Response | Callable[[Event], Literal["halt"] | None]


@dataclass(frozen=True, kw_only=True)
class AlarmResponse:
    """What a guard does about an alarm.

    Args:
        on_alarm: "halt" plays `safe_action` until the episode ends. "ask" hands `ask` the clip that
            led up to the alarm. "fallback" lets another policy act, until things have been calm
            for a while. A function is told of the event, and may return "halt"; returns it None,
            the agent goes on.
        safe_action: `(*act,)`; None for zeros, where the actions are a box that holds them.
        ask: True: go on, the statistic begins anew. False: halt. None: `answer` will be called.
        while_asking: Until that answer, whether the agent waits (the safe action is played) or
            goes on.
        fallback: The policy that takes over.
        hand_back: Share of the threshold below which things are calm.
        hand_back_steps: How many calm steps in a row it takes until the agent is let back.
        context: Frames of the clip, at most.
        log: Where events go, a file of JSON lines; None for nowhere.

    Raises:
        InvalidInput: An unknown response, one whose function is missing, or a number out of range.
    """

    on_alarm: OnAlarm = "halt"
    safe_action: Any = None
    ask: Ask | None = None
    while_asking: Literal["wait", "go on"] = "wait"
    fallback: Policy | None = None
    hand_back: float = 0.5
    hand_back_steps: int = 25
    context: int = 50
    log: EventLog | None = None

    def __post_init__(self) -> None:
        known = get_args(Response)
        if not callable(self.on_alarm) and self.on_alarm not in known:
            raise InvalidInput(
                f"on_alarm: expected one of {', '.join(known)} or a function, got "
                f"{self.on_alarm!r}."
            )
        for name in ("ask", "fallback"):
            if self.on_alarm == name and not callable(getattr(self, name)):
                raise InvalidInput(
                    f"{name}: expected a function, since on_alarm is {name!r}, got "
                    f"{getattr(self, name)!r}."
                )
        if self.while_asking not in ("wait", "go on"):
            raise InvalidInput(
                f"while_asking: expected 'wait' or 'go on', got {self.while_asking!r}."
            )
        if not 0 < self.hand_back <= 1 or self.hand_back_steps < 1 or self.context < 1:
            raise InvalidInput(
                "hand_back, hand_back_steps, context: expected a share in (0, 1] and at least one "
                f"of each, got {self.hand_back}, {self.hand_back_steps} and {self.context}."
            )
