"""Shifts: worlds that change during an episode, at a known step and by a known amount.

A guard is there for the day on which the world is no longer what its agent was trained in. Here
that day comes on demand. Up to the onset an episode is the environment's own, bit for bit; from
then on one named thing differs. Between "mild" and "severe" each shift has three amounts, so that a
study can ask how large a shift has to be before it is seen, and whether it mattered to the return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv
from gymnasium.spaces import Box

from experiments.envs.changes import (
    TRIAL,
    Array,
    Bias,
    Change,
    Delay,
    Freeze,
    ModelChange,
    Noise,
    Push,
    fail,
    scale,
)
from rewardmodels.errors import InvalidInput, UnknownName

Severity = Literal["mild", "middle", "severe"]


@dataclass(frozen=True)
class Kind:
    """One way in which the world can change.

    Args:
        unit: What an amount counts.
        amounts: At "mild", "middle" and "severe".
        change: Called with the environment, an amount and the observation's `std`.
        anywhere: Whether it concerns the observation alone, so that MuJoCo isn't needed.
        needs_std: Whether amounts are in standard deviations of the observation.
    """

    unit: str
    amounts: tuple[float, float, float]
    change: Callable[..., Change]
    anywhere: bool = False
    needs_std: bool = False


_STD = "standard deviations of an observation"

SHIFTS: Mapping[str, Kind] = {
    "mass": Kind("times all mass", (1.5, 2, 3), scale("body_mass", "body_inertia")),
    "damping": Kind("times every joint's damping", (2, 3, 6), scale("dof_damping")),
    "friction": Kind(
        "times every surface's friction", (0.6, 0.3, 0.1), scale("geom_friction", "pair_friction")
    ),
    "gravity": Kind("times gravity", (1.2, 1.5, 2), scale("opt.gravity")),
    "strength": Kind(  # an actuator's force is gain times control plus bias
        "times every actuator's force",
        (0.75, 0.5, 0.25),
        scale("actuator_gainprm", "actuator_biasprm"),
    ),
    "dead_actuator": Kind(  # half an actuator is one that keeps half its force
        "actuators lost", (0.5, 1, 2), partial(ModelChange, alter=fail)
    ),
    "noise": Kind(_STD, (0.1, 0.3, 1), Noise, anywhere=True, needs_std=True),
    "bias": Kind(_STD, (0.25, 0.5, 1), Bias, anywhere=True, needs_std=True),
    "frozen_sensor": Kind("of an observation's numbers", (0.1, 0.25, 0.5), Freeze, anywhere=True),
    "delay": Kind("steps late", (1, 3, 6), Delay, anywhere=True),
    "push": Kind("m/s for the whole mass, at each push", (0.25, 0.5, 1), Push),
}
"""Every shift by its name."""


@dataclass(frozen=True)
class Shift:
    """One named thing that differs, and how much.

    Args:
        name: One of `SHIFTS`.
        severity: "mild", "middle" or "severe".

    Raises:
        UnknownName: No such shift or severity.

    Example:
        >>> print(Shift("gravity", "middle"))
        gravity: 1.5 times gravity
    """

    name: str
    severity: Severity

    def __post_init__(self) -> None:
        if self.name not in SHIFTS:
            raise UnknownName("name", self.name, SHIFTS)
        if self.severity not in get_args(Severity):
            raise UnknownName("severity", self.severity, get_args(Severity))

    @property
    def kind(self) -> Kind:
        """What differs."""
        return SHIFTS[self.name]

    @property
    def amount(self) -> float:
        """By how much, in `kind.unit`."""
        return self.kind.amounts[get_args(Severity).index(self.severity)]

    def __str__(self) -> str:
        return f"{self.name}: {self.amount:g} {self.kind.unit}"


class Shifted(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that changes at a known step of each episode; `shifted` makes it.

    Args:
        env: The environment.
        shift: What the change is.
        change: What does it.
        onset: Steps at the start of every episode that are as usual.
        seed: Of what is drawn for the change.
    """

    def __init__(
        self, env: gym.Env[Any, Any], shift: Shift, change: Change, onset: int, seed: int
    ) -> None:
        super().__init__(env)
        self.shift, self.change, self.onset, self.seed = shift, change, onset, seed
        self.draw = np.random.default_rng(seed)
        self.steps, self.seen = 0, np.zeros(len(change.std))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As `gymnasium.Env.reset`, in the usual world; a seed decides the change's chance too."""
        if seed is not None:
            self.draw = np.random.default_rng([self.seed, seed])
        self.change.undo()
        self.steps = 0
        observation, info = self.env.reset(seed=seed, options=options)
        self.seen = np.array(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As `gymnasium.Env.step`, in the changed world once `onset` steps have been taken."""
        since = self.steps - self.onset
        self.steps += 1
        if since == 0:
            self.change.begin(self.seen, self.draw)
        if since >= 0:
            self.change.act(since)
        observation, reward, terminated, truncated, info = self.env.step(action)
        if since >= 0:
            true = np.array(observation)
            observation = self.change.see(true).astype(true.dtype, copy=False)
        else:
            self.seen = np.array(observation)
        return observation, reward, terminated, truncated, info


def shifted(
    env: gym.Env[Any, Any],
    name: str,
    severity: Severity,
    onset: int,
    seed: int,
    *,
    observation_std: Array | None = None,
) -> gym.Env[Any, Any]:
    """Lets the world change in every episode, once `onset` steps have been taken.

    Up to then all is as in `env`, bit for bit. Rewards and ends are always the environment's own:
    a sensor that lies deceives the agent, not the task. A reset undoes the change.

    Args:
        env: An environment of Gymnasium's MuJoCo tasks; what happens to the observation alone may
            happen to any whose observations are vectors.
        name: One of `SHIFTS`.
        severity: "mild", "middle" or "severe".
        onset: Steps that are as usual; the observation of `reset` always is.
        seed: Of what is drawn for the change: noise, which actuator, which way a push goes.
        observation_std: `(n,)`, the standard deviation of each number of an observation in
            ordinary behaviour, in which noise and bias are measured; the others don't need it.

    Raises:
        UnknownName: No such shift or severity.
        InvalidInput: A task that isn't MuJoCo's, observations that aren't vectors, a shift that
            makes no difference to this task (gravity to a swimmer in the plane), more actuators
            to fail than there are, a standard deviation that is missing or of another shape, an
            environment that is shifted already, or a negative onset or seed.

    Example:
        >>> env = shifted(gym.make("HalfCheetah-v5"), "gravity", "middle", onset=1, seed=0)
        >>> _ = env.reset(seed=0)
        >>> for _ in range(2):
        ...     _ = env.step(np.zeros(6))
        ...     print(round(float(env.unwrapped.model.opt.gravity[2]), 3))
        -9.81
        -14.715
    """
    shift = Shift(name, severity)
    for what, value in (("onset", onset), ("seed", seed)):
        if value < 0:
            raise InvalidInput(f"{what}: expected at least 0, got {value}.")
    if env.has_wrapper_attr("shift"):
        raise InvalidInput(
            "env: expected one that isn't shifted yet, got one with "
            f"{env.get_wrapper_attr('shift')}. Wrap the environment inside it."
        )
    space = env.observation_space
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise InvalidInput(f"env: expected observations that are vectors, got {space}.")
    std = _std(shift, observation_std, space.shape)
    title = env.spec.id if env.spec else type(env.unwrapped).__name__
    if not shift.kind.anywhere and not isinstance(env.unwrapped, MujocoEnv):
        others = ", ".join(name for name, kind in SHIFTS.items() if kind.anywhere)
        raise InvalidInput(
            f"env: expected one of Gymnasium's MuJoCo environments for {name!r}, got {title}. "
            f"Others can have {others}."
        )
    change = shift.kind.change(env, shift.amount, std)
    if not change.matters():
        raise InvalidInput(
            f"name: expected a shift that makes a difference to {title}, got {name!r}: after "
            f"{TRIAL:g} simulated seconds under the same actions its state is the same with it "
            "and without. Choose another."
        )
    return Shifted(env, shift, change, onset, seed)


def _std(shift: Shift, given: Array | None, shape: tuple[int, ...]) -> Array:
    if not shift.kind.needs_std:
        return np.zeros(shape)
    if given is None:
        raise InvalidInput(
            f"observation_std: expected standard deviations of shape {shape}, in which "
            f"{shift.name} is measured, got None. Take them from recorded episodes."
        )
    std = np.asarray(given, np.float64)
    if std.shape != shape or not np.isfinite(std).all() or (std < 0).any() or not std.any():
        raise InvalidInput(
            f"observation_std: expected finite numbers of at least 0 of shape {shape}, not all 0, "
            f"got shape {std.shape} and {std}."
        )
    return std
