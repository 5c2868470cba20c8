"""Guards: environment wrappers that stop an agent once its episode is out of distribution.

At each step of `Guard` its features go to `Stream.update`: the detector's score, standardised by
the scores usual at that step, the statistic of these, and an alarm if it is above the threshold.
`GuardController` responds to the alarm, and halts at an error.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from ood.features import Features, feature_names, find_features
from ood.monitor import Monitor, Policy, Reading, Stream
from rewardmodels import Clips
from rewardmodels.errors import InvalidInput, RewardModelsError, check_positive, require

Array = NDArray[Any]
Acting = Literal["agent", "halted", "waiting", "fallback"]
Response = Literal["halt", "ask", "fallback"]
EventKind = Literal["alarm", "halt", "ask", "fallback", "resume", "failure"]

_AGENT, _HALTED, _WAITING, _FALLBACK = range(4)
_ACTING: tuple[Acting, ...] = get_args(Acting)
_ONE = np.ones(1, bool)


@dataclass(frozen=True)
class Event:
    """Event of a guard, as it is logged.

    - "alarm": passed to a function `on_alarm`, and logged if that lets the agent go on; also a halt
      because an episode's first observation isn't finite.
    - "halt": the agent is halted after an alarm, by the response or by a decision.
    - "ask": the clip that led to an alarm is given to `ask`.
    - "fallback": the fallback policy takes over after an alarm.
    - "resume": the agent goes on, by a decision or because the statistic is low again.
    - "failure": the agent is halted because something raised an error.

    Args:
        kind: One of those above.
        environment: Number of the environment, from 0.
        episode: Number of that environment's episode, from 0.
        step: Steps since the episode's start.
        score: Of the detector; NaN where there is none, as `statistic` and `threshold`.
        reason: Description of the cause.

    Attributes:
        time: Of creation, UTC, ISO 8601.
    """

    kind: EventKind
    environment: int
    episode: int
    step: int
    score: float
    statistic: float
    threshold: float
    reason: str
    time: str = field(
        init=False, default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds")
    )


class EventLog:
    """File to which events are appended, one line of JSON each, so that a crash loses none.

    It and its folder are made at the first event. Infinity and NaN, which JSON lacks, are null.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, event: Event) -> None:
        """Append an event; raises OSError if the file can't be written."""
        fields = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(event).items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, allow_nan=False) + "\n")


@dataclass(frozen=True, kw_only=True)
class AlarmResponse:
    """Response of a guard to an alarm.

    Args:
        on_alarm: "halt" plays `safe_action` until the episode ends. "ask" gives `ask` the clip that
            led to the alarm. "fallback" lets another policy act until the statistic is low again. A
            function gets the `Event`, and returns "halt", or None to let the agent go on.
        safe_action: `(*act,)`; None for zeros, if the action space is a box that contains them.
        ask: Function of a clip `(1, T)`. True lets the agent go on, and the statistic begins anew;
            None if `Guard.decide` will be called later; anything else halts it, "yes" and 1 too.
        while_asking: Until that decision the agent may "wait" (the safe action is played), or
            "continue".
        fallback: Policy that takes over, from one observation to an action.
        resume_below: Share of the threshold below which the statistic counts as low.
        resume_after: Number of such steps in a row after which the agent resumes.
        clip_frames: Largest number of frames of the clip.

    Raises:
        InvalidInput: An unknown response, one without its function, or a number out of range.
    """

    on_alarm: Response | Callable[[Event], Literal["halt"] | None] = "halt"
    safe_action: Any = None
    ask: Callable[[Clips], bool | None] | None = None
    while_asking: Literal["wait", "continue"] = "wait"
    fallback: Policy | None = None
    resume_below: float = 0.5
    resume_after: int = 25
    clip_frames: int = 50

    def __post_init__(self) -> None:
        known = get_args(Response)
        valid = callable(self.on_alarm) or self.on_alarm in known
        expected = f"one of {', '.join(known)} or a function"
        require("on_alarm", valid, expected, repr(self.on_alarm))
        for name in ("ask", "fallback"):
            function = getattr(self, name)
            valid = self.on_alarm != name or callable(function)
            require(name, valid, f"a function, since on_alarm is {name!r}", repr(function))
        valid = self.while_asking in ("wait", "continue")
        require("while_asking", valid, "'wait' or 'continue'", repr(self.while_asking))
        require("resume_below", 0 < self.resume_below <= 1, "a share in (0, 1]", self.resume_below)
        check_positive(resume_after=self.resume_after, clip_frames=self.clip_frames)


class Guard(gym.Wrapper[Any, Any, Any, Any]):
    """Wrapper that halts, asks or hands over, falsely in at most a promised share of episodes.

    Assumes that the monitor was calibrated on whole episodes of this policy in this environment,
    recorded with `ood.record_episodes` and the same features.

    Each step's `info["guard"]` holds `score`, `statistic`, `threshold`, `alarm` (of this step),
    `acting` (who acts next: "agent", "halted", "waiting" or "fallback") and `reason`, which names
    the detector and the most anomalous numbers, or the error; it is empty from the step after which
    the agent acts again. Without an alarm, observations, rewards and ends are the environment's.

    It fails safe. NaN, infinity or another shape in an observation, a detector that isn't fitted, a
    threshold that isn't calibrated or belongs to another fit, a function of the caller's that
    raises, a log that can't be written: each halts the agent until the episode ends.

    Args:
        env: Environment whose observations and actions are arrays.
        monitor: Raises the alarms.
        features: Input of the detector: "observation", "observation_action", "transition", or a
            function such as `ood.features.hidden_layer(model)`.
        response: To an alarm; None halts.
        log: Function of each `Event`, such as an `EventLog`; None for no log.

    Raises:
        InvalidInput: Observations or actions that aren't arrays, or no safe action.

    Example:
        >>> import torch
        >>> from ood import Mahalanobis, record_episodes
        >>> env = gym.make("Pendulum-v1", max_episode_steps=20)
        >>> policy = lambda observation: np.zeros(1, np.float32)
        >>> episodes = record_episodes(env, policy, 30, seed=0)
        >>> monitor = Monitor(Mahalanobis().fit(torch.cat(episodes[:10])))
        >>> threshold = monitor.calibrate(episodes[10:], alpha=0.1)
        >>> guard = Guard(env, monitor)
        >>> observation, info = guard.reset(seed=1)
        >>> *_, info = guard.step(policy(observation))
        >>> info["guard"]["alarm"], info["guard"]["acting"]
        (False, 'agent')
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        monitor: Monitor,
        features: str | Features = "observation_action",
        response: AlarmResponse | None = None,
        log: Callable[[Event], None] | None = None,
    ) -> None:
        super().__init__(env)
        env_spaces = env.observation_space, env.action_space
        self.controller = GuardController(1, env_spaces, monitor, features, response, log)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As `gymnasium.Env.reset`; a guard that can't work is halted from here on."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.controller.start_episodes(np.asarray(observation)[None], _ONE)
        return observation, {**info, "guard": self._info()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As `gymnasium.Env.step`, with the guard's action where the agent may not act."""
        proposed = np.asarray(action)[None]
        chosen = self.controller.choose_actions(proposed)
        observation, reward, terminated, truncated, info = self.env.step(
            action if chosen is proposed else chosen[0]
        )
        self.controller.process_step(chosen, np.asarray(observation)[None], _ONE)
        return observation, reward, terminated, truncated, {**info, "guard": self._info()}

    def decide(self, go_on: bool) -> None:
        """Decide whether the agent goes on after an alarm that `ask` left open.

        Args:
            go_on: True lets it; anything else halts it.

        Raises:
            InvalidInput: No alarm is open.
        """
        self.controller.decide(go_on)

    def _info(self) -> dict[str, Any]:
        controller = self.controller
        reading, threshold = controller.reading, controller.monitor.threshold
        return {
            "score": reading.score.item(),
            "statistic": reading.statistic.item(),
            "threshold": threshold.value if threshold else math.nan,
            "alarm": reading.alarm.item(),
            "acting": _ACTING[controller.acting.item()],
            "reason": controller.reasons[0],
        }


class VectorGuard(VectorWrapper[Any, Any, Any, Any, Any]):
    """`Guard` of n environments that step together; `info["guard"]` holds n of everything.

    Each environment is watched, halted and asked about alone, with the promise of `Guard`. The step
    of next-step autoreset that only resets belongs to no episode, and raises no alarm; with
    same-step autoreset an episode's last observation is taken from `info["final_obs"]`.

    Arguments are those of `Guard`; functions are called for one environment at a time.

    Raises:
        InvalidInput: As `Guard`, or environments without an autoreset mode.

    Example:
        >>> from ood import Mahalanobis
        >>> envs = gym.make_vec("Pendulum-v1", 3, vectorization_mode="sync")
        >>> guard = VectorGuard(envs, Monitor(Mahalanobis()))  # not fitted
        >>> _, info = guard.reset(seed=0)
        >>> info["guard"]["acting"]
        ['halted', 'halted', 'halted']
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        monitor: Monitor,
        features: str | Features = "observation_action",
        response: AlarmResponse | None = None,
        log: Callable[[Event], None] | None = None,
    ) -> None:
        super().__init__(env)
        self.autoreset = env.metadata.get("autoreset_mode")
        valid = isinstance(self.autoreset, AutoresetMode)
        expected = "metadata['autoreset_mode'] to be a gymnasium.vector.AutoresetMode"
        require("env", valid, expected, repr(self.autoreset))
        env_spaces = env.single_observation_space, env.single_action_space
        self.controller = GuardController(
            env.num_envs, env_spaces, monitor, features, response, log
        )
        self.ended = np.zeros(env.num_envs, bool)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As `gymnasium.vector.VectorEnv.reset`, `reset_mask` among the options included."""
        observations, info = self.env.reset(seed=seed, options=options)
        mask = (options or {}).get("reset_mask")
        mask = np.ones(self.num_envs, bool) if mask is None else np.asarray(mask, bool)
        self.controller.start_episodes(np.asarray(observations), mask)
        self.ended = self.ended & ~mask
        return observations, {**info, "guard": self._info()}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As `gymnasium.vector.VectorEnv.step`, with the guard's actions where it acts."""
        controller, proposed = self.controller, np.asarray(actions)
        chosen = controller.choose_actions(proposed)
        observations, rewards, terminated, truncated, info = self.env.step(
            actions if chosen is proposed else chosen
        )
        after, ended = np.asarray(observations), np.asarray(terminated) | np.asarray(truncated)
        if self.autoreset == AutoresetMode.SAME_STEP and ended.any():
            last = after.copy()
            for i in np.flatnonzero(ended):
                last[i] = info["final_obs"][i]
            controller.process_step(chosen, last, np.ones(self.num_envs, bool))
            guard = self._info()
            controller.start_episodes(after, ended)
            # Scores are those of the episode that ended; `acting` is of the one that begins.
            guard["acting"] = self._info()["acting"]
            for i in np.flatnonzero(ended & (controller.acting != _AGENT)):
                guard["alarm"][i], guard["reason"][i] = True, controller.reasons[i]
            return observations, rewards, terminated, truncated, {**info, "guard": guard}
        controller.process_step(chosen, after, ~self.ended)
        if self.autoreset == AutoresetMode.NEXT_STEP and self.ended.any():
            controller.start_episodes(after, self.ended)
        self.ended = ended
        return observations, rewards, terminated, truncated, {**info, "guard": self._info()}

    def decide(self, go_on: bool, environment: int) -> None:
        """Decide as `Guard.decide`, for one environment."""
        self.controller.decide(go_on, environment)

    def _info(self) -> dict[str, Any]:
        controller = self.controller
        reading, threshold = controller.reading, controller.monitor.threshold
        return {
            "score": reading.score.copy(),
            "statistic": reading.statistic.copy(),
            "threshold": threshold.value if threshold else math.nan,
            "alarm": reading.alarm.copy(),
            "acting": [_ACTING[i] for i in controller.acting],
            "reason": list(controller.reasons),
        }


class GuardController:
    """Control of who acts in each of n environments; both guards call it at every step.

    Any error of the monitor, of a function of the caller's or of the log halts the environments
    that it concerns, with the error as the reason.

    Args:
        n: Number of environments.
        env_spaces: Observation and action space of one environment; the rest as of `Guard`.

    Attributes:
        acting: `(n,)`, index of who acts next among the names of `Acting`.
        reading: Of the latest step.
        reasons: Of the latest alarms.
    """

    def __init__(
        self,
        n: int,
        env_spaces: tuple[spaces.Space[Any], spaces.Space[Any]],
        monitor: Monitor,
        features: str | Features,
        response: AlarmResponse | None,
        log: Callable[[Event], None] | None,
    ) -> None:
        for name, space in zip(("observation", "action"), env_spaces, strict=True):
            arrays = isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete))
            require("env", arrays, f"{name}s that are arrays", space)
        observation_space, self.action_space = env_spaces
        self.n, self.monitor, self.log = n, monitor, log
        self.response = response or AlarmResponse()
        self.features = find_features(features)
        sizes = [math.prod(space.shape or ()) for space in env_spaces]
        self.names = feature_names(features, *sizes)
        self.safe_action = _safe_action(self.response.safe_action, self.action_space)
        self.acting = np.full(n, _AGENT)
        self.undecided = np.zeros(n, bool)
        self.episode = np.full(n, -1)
        self.low_steps = np.zeros(n, int)
        self.reasons = [""] * n
        self.before = np.zeros((n, *(observation_space.shape or ())), observation_space.dtype)
        self.stream: Stream | None = None
        self.reading = _no_reading(n)
        self.recent: list[deque[tuple[Array, Array]]] = [deque()] * n

    def start_episodes(self, observations: Array, mask: NDArray[np.bool_]) -> None:
        """Start an episode where `mask` `(n,)` is True, at `observations` `(n, *obs)`."""
        everywhere = bool(mask.all())
        if everywhere:
            self.before = np.array(observations)
        self.before[mask] = observations[mask]
        for column in self.reading[:2]:
            column[mask] = np.nan
        self.reading.alarm[mask] = False
        self.acting[mask], self.undecided[mask], self.low_steps[mask] = _AGENT, False, 0
        self.episode[mask] += 1
        started = [int(i) for i in np.flatnonzero(mask)]
        for i in started:
            self.reasons[i] = ""
            self.recent[i] = deque(maxlen=self.response.clip_frames)
        try:
            self.monitor.check()
            if everywhere or self.stream is None:
                self.stream = self.monitor.stream(self.n)
            else:
                self.stream.reset(mask)
        except Exception as error:
            for i in started:
                self._fail(i, "the monitor can't start", error)
            return
        for i in started:
            if not np.isfinite(self.before[i]).all():
                self._halt(i, "NaN or infinity in the first observation", "alarm")

    def choose_actions(self, proposed: Array) -> Array:
        """Actions `(n, *act)` to take: those that the agent proposes, where it acts."""
        if not np.count_nonzero(self.acting):  # the agent's index is 0
            return proposed
        chosen = np.array(proposed)
        for i in np.flatnonzero(self.acting == _FALLBACK):
            try:
                assert self.response.fallback is not None
                action = np.asarray(self.response.fallback(self.before[i].copy()))
                # Text isn't read as a number, nor 1.7 as the choice 1.
                action = action.astype(chosen.dtype, casting="same_kind")
                if not self.action_space.contains(action if action.ndim else action[()]):
                    raise InvalidInput(
                        f"fallback: expected an action in {self.action_space}, got {action}."
                    )
                chosen[i] = action
            except Exception as error:
                self._fail(int(i), "the fallback policy failed", error)
        chosen[(self.acting == _HALTED) | (self.acting == _WAITING)] = self.safe_action
        return chosen

    def process_step(self, actions: Array, after: Array, active: NDArray[np.bool_]) -> None:
        """Watch one step, and respond to its alarms.

        Args:
            actions: `(n, *act)`, as taken.
            after: `(n, *obs)`, observations after them.
            active: `(n,)` bool, False where the step belongs to no episode.
        """
        if any(self.reasons):
            for i in np.flatnonzero((self.acting == _AGENT) & ~self.undecided):
                self.reasons[i] = ""
        try:
            assert self.stream is not None, "it never started"
            features = self.features(self.before, actions, after)
            self.reading = self.stream.update(features)
        except Exception as error:
            # An unwatched step mustn't be followed by another.
            self.reading = _no_reading(self.n)._replace(alarm=active.copy())
            for i in np.flatnonzero(active & (self.acting != _HALTED)):
                self._fail(int(i), "the monitor failed", error)
            self.before = np.array(after)
            return
        alarm = self.reading.alarm
        # Features of our own hold all of the observation, and the stream has checked them.
        if self.names is None and not np.isfinite(after).all():
            alarm = alarm | ~np.isfinite(after).reshape(self.n, -1).all(1)
        if self.response.on_alarm == "ask":
            for i in np.flatnonzero(active):
                self.recent[i].append((after[i].copy(), np.array(actions[i])))
        if np.count_nonzero(alarm):  # a tenth of the time that `any` takes
            self.reading = self.reading._replace(alarm=alarm & active)
            for i in np.flatnonzero(alarm & active & (self.acting == _AGENT) & ~self.undecided):
                self._respond(int(i), actions[i], after[i])
        if self.response.on_alarm == "fallback":
            self._end_fallback(active)
        self.before = np.array(after)

    def decide(self, go_on: bool, environment: int = 0) -> None:
        """Decide as `Guard.decide`, for one environment."""
        waiting = bool(self.undecided[environment])
        require("environment", waiting, "one that waits for a decision", environment)
        self.undecided[environment] = False
        valid = isinstance(go_on, bool | np.bool_)
        if not valid or not go_on:
            kind = type(go_on).__name__
            decision = "to halt" if valid else f"of type {kind}, neither True nor False"
            reason = f"{self.reasons[environment]}; the decision was {decision}"
            self._halt(environment, reason, "halt")
            return
        self.acting[environment] = _AGENT
        if self.stream is not None:
            self.stream.statistic.restart(np.arange(self.n) == environment)
        self._log(environment, "resume", "the decision was to go on")

    def _respond(self, i: int, action: Array, after: Array) -> None:
        """Respond to an alarm in environment i."""
        try:
            step = self.features(self.before[i][None], np.asarray(action)[None], after[None])
            reason = self.monitor.explain(step[0], self.names)
        except Exception as error:
            reason = f"anomalous, but the detector can't explain it: {error}"
        self.reasons[i] = reason
        on_alarm = self.response.on_alarm
        if on_alarm == "halt":
            self._halt(i, reason, "halt")
        elif on_alarm == "fallback":
            self.acting[i], self.low_steps[i] = _FALLBACK, 0
            self._log(i, "fallback", reason)
        elif on_alarm == "ask":
            self._ask(i, reason)
        else:
            assert callable(on_alarm)
            try:
                result = on_alarm(self._event(i, "alarm", reason))
                if result not in (None, "halt"):
                    raise InvalidInput(f"on_alarm: expected None or 'halt', got {result!r}.")
            except Exception as error:
                self._fail(i, f"{reason}; on_alarm failed", error)
                return
            if result == "halt":
                self._halt(i, reason, "halt")
            else:
                self._log(i, "alarm", reason)

    def _ask(self, i: int, reason: str) -> None:
        """Give `ask` the clip that led to an alarm, and follow its decision."""
        assert self.response.ask is not None
        self._log(i, "ask", reason)
        try:
            observations, actions = zip(*self.recent[i], strict=True)
            clip = Clips(*(torch.from_numpy(np.stack(x))[None] for x in (observations, actions)))
            go_on = self.response.ask(clip)
        except Exception as error:
            self._fail(i, f"{reason}; asking failed", error)
            return
        if self.acting[i] == _HALTED:
            return  # the log failed
        self.undecided[i] = True
        if go_on is not None:
            self.decide(go_on, i)
        elif self.response.while_asking == "wait":
            self.acting[i] = _WAITING

    def _end_fallback(self, active: NDArray[np.bool_]) -> None:
        """Let agents resume whose statistic has been low for long enough."""
        assert self.monitor.threshold is not None
        limit = self.response.resume_below * self.monitor.threshold.value
        low = (self.reading.statistic < limit) & active
        self.low_steps = np.where(low, self.low_steps + 1, 0)
        ready = (self.acting == _FALLBACK) & (self.low_steps >= self.response.resume_after)
        for i in map(int, np.flatnonzero(ready)):
            self.acting[i] = _AGENT
            self._log(i, "resume", f"low statistic for {self.low_steps[i]} steps")

    def _halt(self, i: int, reason: str, kind: EventKind) -> None:
        self.acting[i], self.undecided[i], self.reasons[i] = _HALTED, False, reason
        if kind != "halt":
            self.reading.alarm[i] = True
        self._log(i, kind, reason)

    def _fail(self, i: int, what: str, error: Exception) -> None:
        name = "" if isinstance(error, RewardModelsError) else f"{type(error).__name__}: "
        self._halt(i, f"{what}: {name}{error}", "failure")

    def _event(self, i: int, kind: EventKind, reason: str) -> Event:
        step = 0 if self.stream is None else int(self.stream.steps[i])
        score, statistic = (float(column[i]) for column in self.reading[:2])
        limit = self.monitor.threshold.value if self.monitor.threshold else math.nan
        return Event(kind, i, int(self.episode[i]), step, score, statistic, limit, reason)

    def _log(self, i: int, kind: EventKind, reason: str) -> None:
        if self.log is None:
            return
        try:
            self.log(self._event(i, kind, reason))
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


def _no_reading(n: int) -> Reading:
    return Reading(np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, bool))
