"""Keeper: who acts in each of n environments, and what changes that; the heart of both guards."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from ood import features as seeing
from ood.events import Event, Kind
from ood.monitor import Monitor, Reading, Stream
from ood.rules import AlarmResponse
from rewardmodels import Clips, InvalidInput
from rewardmodels.errors import RewardModelsError

Array = NDArray[Any]
Acting = Literal["agent", "halted", "waiting", "fallback"]

_AGENT, _HALTED, _WAITING, _FALLBACK = range(4)
_ACTING: tuple[Acting, ...] = get_args(Acting)


class Keeper:
    """Watches n environments and decides who acts in each.

    Whatever breaks, in the detector, in a function of the caller's or in the log, halts the
    environments that it was needed for, and the reason says so: nothing passes unseen.

    Args:
        n: How many environments.
        monitor: What raises alarms.
        features: What it sees of a step: a name of `ood.features.FEATURES`, or a function.
        action_space: Of one environment.
        observation_space: Of one environment.
        rules: What follows an alarm.

    Raises:
        InvalidInput: Observations or actions that aren't arrays, or no safe action.
    """

    def __init__(
        self,
        n: int,
        monitor: Monitor,
        features: str | seeing.Features,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        rules: AlarmResponse,
    ) -> None:
        for name, space in (("observation", observation_space), ("action", action_space)):
            if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete)):
                raise InvalidInput(f"env: expected {name}s that are arrays, got {space}.")
        self.n, self.monitor, self.rules = n, monitor, rules
        self.see = seeing.find_features(features)
        sizes = [math.prod(space.shape or ()) for space in (observation_space, action_space)]
        self.names = seeing.feature_names(features, *sizes)
        self.action_space = action_space
        self.safe_action = _safe_action(rules.safe_action, action_space)
        self.acting = np.full(n, _AGENT)
        self.asked = np.zeros(n, bool)
        self.episode = np.full(n, -1)
        self.calm_steps = np.zeros(n, int)
        self.reasons = [""] * n
        self.before = np.zeros((n, *(observation_space.shape or ())), observation_space.dtype)
        self.stream: Stream | None = None
        self.reading = _nothing(n)
        self.recent: list[deque[tuple[Array, Array]]] = [deque(maxlen=rules.context)] * n

    def begin(self, observations: Array, mask: NDArray[np.bool_]) -> None:
        """Starts an episode where `mask` `(n,)` is True, at `observations` `(n, *obs)`."""
        whole = bool(mask.all())
        if whole:
            self.before = np.array(observations)
        self.before[mask] = observations[mask]
        for column in self.reading[:2]:
            column[mask] = np.nan
        self.reading.alarm[mask] = False
        self.acting[mask], self.asked[mask], self.calm_steps[mask] = _AGENT, False, 0
        self.episode[mask] += 1
        started = [int(i) for i in np.flatnonzero(mask)]
        for i in started:
            self.reasons[i] = ""
            self.recent[i] = deque(maxlen=self.rules.context)
        try:
            self.monitor.check()
            if whole or self.stream is None:
                self.stream = self.monitor.stream(self.n)
            else:
                self.stream.reset(mask)
        except Exception as error:
            # Whatever it is, nobody is watching.
            for i in started:
                self._fail(i, "the monitor can't start", error)
            return
        for i in started:
            if not np.isfinite(self.before[i]).all():
                self._halt(i, "NaN or infinity in the first observation", "alarm")

    def actions(self, proposed: Array) -> Array:
        """What is really done, `(n, *act)`: what the agent proposes, where it acts."""
        if not np.count_nonzero(self.acting):  # the agent's number is 0
            return proposed
        taken = np.array(proposed)
        for i in np.flatnonzero(self.acting == _FALLBACK):
            try:
                assert self.rules.fallback is not None
                action = np.asarray(self.rules.fallback(self.before[i].copy()), taken.dtype)
                if not self.action_space.contains(action if action.ndim else action[()]):
                    raise InvalidInput(
                        f"fallback: expected an action in {self.action_space}, got {action}."
                    )
                taken[i] = action
            except Exception as error:
                self._fail(int(i), "the fallback policy failed", error)
        taken[(self.acting == _HALTED) | (self.acting == _WAITING)] = self.safe_action
        return taken

    def observe(self, actions: Array, after: Array, live: NDArray[np.bool_]) -> None:
        """Takes in what the actions led to; `live` `(n,)` is False where an episode had ended.

        Args:
            actions: `(n, *act)`, as really done.
            after: `(n, *obs)`.
            live: Where the step belongs to an episode.
        """
        if any(self.reasons):
            for i in np.flatnonzero((self.acting == _AGENT) & ~self.asked):
                self.reasons[i] = ""
        try:
            assert self.stream is not None, "it never started"
            reading = self.stream.update(self.see(self.before, actions, after))
        except Exception as error:
            # A step that nobody looked at mustn't be followed by another.
            self.reading = _nothing(self.n)._replace(alarm=live.copy())
            for i in np.flatnonzero(live & (self.acting != _HALTED)):
                self._fail(int(i), "the monitor failed", error)
            self.before = np.array(after)
            return
        alarm = reading.alarm
        # Our own features hold all of the observation, and the stream has looked at them.
        if self.names is None and not np.isfinite(after).all():
            alarm = alarm | ~np.isfinite(after).reshape(self.n, -1).all(1)
        self.reading = reading
        if self.rules.on_alarm == "ask":
            for i in np.flatnonzero(live):
                self.recent[i].append((after[i].copy(), np.array(actions[i])))
        if np.count_nonzero(alarm):  # a tenth of the time that `any` takes
            alarm = alarm & live
            self.reading = reading._replace(alarm=alarm)
            for i in np.flatnonzero(alarm & (self.acting == _AGENT) & ~self.asked):
                self._respond(int(i), actions[i], after[i])
        if self.rules.on_alarm == "fallback":
            self._hand_back(live)
        self.before = np.array(after)

    def answer(self, go_on: bool, environment: int = 0) -> None:
        """Answers what `ask` left open.

        Raises:
            InvalidInput: Nothing was asked.
        """
        if not self.asked[environment]:
            raise InvalidInput(
                f"environment: expected one that waits for an answer, got {environment}."
            )
        self.asked[environment] = False
        if not go_on:
            self._halt(environment, f"{self.reasons[environment]}; the answer was to halt", "halt")
            return
        self.acting[environment] = _AGENT
        self._begin_anew(environment)
        self._log(environment, "answer", "the answer was to go on")

    @property
    def who(self) -> list[Acting]:
        """Who acts next in each environment."""
        return [_ACTING[i] for i in self.acting]

    def acts(self, i: int) -> Acting:
        """Who acts next in environment i."""
        return _ACTING[self.acting.item(i)]

    def _respond(self, i: int, action: Array, after: Array) -> None:
        try:
            step = self.see(self.before[i][None], np.asarray(action)[None], after[None])
            self.reasons[i] = self.monitor.explain(step[0], self.names)
        except Exception as error:
            self.reasons[i] = f"strange, and the detector can't say why: {error}"
        reason, rules = self.reasons[i], self.rules
        if rules.on_alarm == "halt":
            self._halt(i, reason, "halt")
        elif rules.on_alarm == "fallback":
            self.acting[i], self.calm_steps[i] = _FALLBACK, 0
            self._log(i, "fallback", reason)
        elif rules.on_alarm == "ask":
            self._ask(i, reason)
        else:
            assert callable(rules.on_alarm)
            try:
                said = rules.on_alarm(self._event(i, "alarm", reason))
                if said not in (None, "halt"):
                    raise InvalidInput(f"on_alarm: expected None or 'halt', got {said!r}.")
            except Exception as error:
                self._fail(i, f"{reason}; on_alarm failed", error)
                return
            if said == "halt":
                self._halt(i, reason, "halt")
            else:
                self._log(i, "alarm", reason)

    def _ask(self, i: int, reason: str) -> None:
        assert self.rules.ask is not None
        self._log(i, "ask", reason)
        try:
            seen, done = zip(*self.recent[i], strict=True)
            clip = Clips(*(torch.from_numpy(np.stack(x))[None] for x in (seen, done)))
            said = self.rules.ask(clip)
        except Exception as error:
            self._fail(i, f"{reason}; asking failed", error)
            return
        if self.acting[i] == _HALTED:
            return  # the log failed
        self.asked[i] = True
        if said is not None:
            self.answer(bool(said), i)
        elif self.rules.while_asking == "wait":
            self.acting[i] = _WAITING

    def _hand_back(self, live: NDArray[np.bool_]) -> None:
        assert self.monitor.threshold is not None
        calm = self.reading.statistic < self.rules.hand_back * self.monitor.threshold.value
        self.calm_steps = np.where(calm & live, self.calm_steps + 1, 0)
        ready = (self.acting == _FALLBACK) & (self.calm_steps >= self.rules.hand_back_steps)
        for i in map(int, np.flatnonzero(ready)):
            self.acting[i] = _AGENT
            self._log(i, "hand back", f"calm for {self.calm_steps[i]} steps")

    def _begin_anew(self, i: int) -> None:
        mask = np.zeros(self.n, bool)
        mask[i] = True
        if self.stream is not None:
            self.stream.forget(mask)

    def _halt(self, i: int, reason: str, kind: Kind) -> None:
        self.acting[i], self.asked[i], self.reasons[i] = _HALTED, False, reason
        if kind != "halt":
            self.reading.alarm[i] = True
        self._log(i, kind, reason)

    def _fail(self, i: int, what: str, error: Exception) -> None:
        name = "" if isinstance(error, RewardModelsError) else f"{type(error).__name__}: "
        self._halt(i, f"{what}: {name}{error}", "failure")

    def _event(self, i: int, kind: Kind, reason: str) -> Event:
        threshold = self.monitor.threshold
        steps = self.stream.steps if self.stream is not None else self.calm_steps
        return Event(
            kind,
            int(i),
            int(self.episode[i]),
            int(steps[i]),
            float(self.reading.score[i]),
            float(self.reading.statistic[i]),
            threshold.value if threshold else math.nan,
            reason,
        )

    def _log(self, i: int, kind: Kind, reason: str) -> None:
        if self.rules.log is None:
            return
        try:
            self.rules.log(self._event(i, kind, reason))
        except Exception as error:
            self.acting[i] = _HALTED
            self.reasons[i] = f"{reason}; the event can't be logged: {error}"


def _safe_action(safe_action: Any, space: spaces.Space[Any]) -> Array:
    given = safe_action is not None
    if not given and isinstance(space, spaces.Box):
        safe_action = np.zeros(space.shape, space.dtype)
    if safe_action is None:
        raise InvalidInput(f"safe_action: expected an action in {space}, got None.")
    action = np.asarray(safe_action, space.dtype)
    if not space.contains(action if action.ndim else action[()]):
        hint = "" if given else "; zeros are the default, so name another"
        raise InvalidInput(f"safe_action: expected an action in {space}, got {action}{hint}.")
    return action


def _nothing(n: int) -> Reading:
    return Reading(np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, bool))
