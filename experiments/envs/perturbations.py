"""Perturbations of a MuJoCo environment: dynamics, sensors and external pushes, from an onset on.

Up to the onset an episode is the environment's own, bit for bit; from then on one named thing
differs, at one of three severities. A new one is a `Perturbation` and a line in `PERTURBATIONS`.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal, get_args

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray

from rewardmodels.errors import InvalidInput, UnknownName

Array = NDArray[Any]
Alter = Callable[[Any, float, np.random.Generator], None]
"""Changes an `mjModel` in place, by an amount."""

PUSH_PERIOD, PUSH_STEPS = 25, 5  # steps from one push to the next, and those that it lasts
TRIAL = 2.0  # simulated seconds in which a change of the model has to make a difference
_ROOT = 1  # body 0 is the world


class Perturbation:
    """Base class of perturbations; each starts anew in every episode.

    Args:
        env: The environment.
        amount: In the unit of its kind.
        std: `(n,)`, standard deviation of each number of the observation.
    """

    def __init__(self, env: gym.Env[Any, Any], amount: float, std: Array) -> None:
        self.env, self.amount, self.std = env, amount, std

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        """Start at the onset, after the observation `(n,)`; `draw` is the source of randomness."""
        self.observation, self.draw = observation, draw

    def act(self, step: int) -> None:
        """Act before each step from the onset on, which is step 0."""

    def observe(self, observation: Array) -> Array:
        """Return what the agent observes in place of `(n,)`."""
        return observation

    def undo(self) -> None:
        """Restore the environment before the next episode."""

    def matters(self) -> bool:
        """Return whether it makes any difference to this environment."""
        return True


class ModelPerturbation(Perturbation):
    """Replacement of the MuJoCo model; undoing it is exact."""

    def __init__(self, env: gym.Env[Any, Any], amount: float, std: Array, *, alter: Alter) -> None:
        super().__init__(env, amount, std)
        simulator: Any = env.unwrapped
        self.simulator, self.alter, self.original = simulator, alter, simulator.model

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        super().begin(observation, draw)
        self.simulator.model = self._perturbed(draw)

    def undo(self) -> None:
        self.simulator.model = self.original

    def _perturbed(self, draw: np.random.Generator) -> Any:
        model = copy.deepcopy(self.original)
        self.alter(model, self.amount, draw)
        return model

    def matters(self) -> bool:
        low, high = self.original.actuator_ctrlrange.T
        ends = []
        for model in (self.original, self._perturbed(np.random.default_rng(0))):
            data, draw = mujoco.MjData(model), np.random.default_rng(0)
            for _ in range(math.ceil(TRIAL / model.opt.timestep)):
                data.ctrl[:] = draw.uniform(low, high)
                mujoco.mj_step(model, data)
            ends.append(np.concatenate([data.qpos, data.qvel]))
        # Gravity along an axis on which nothing can move leaves rounding errors behind.
        return not np.allclose(ends[0], ends[1], rtol=1e-9, atol=1e-9)


class Noise(Perturbation):
    """Independent Gaussian noise on every number."""

    def observe(self, observation: Array) -> Array:
        return observation + self.amount * self.std * self.draw.standard_normal(len(self.std))


class Bias(Perturbation):
    """A constant error throughout an episode, of a sign drawn for each number."""

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        super().begin(observation, draw)
        self.bias = self.amount * self.std * draw.choice([-1.0, 1.0], len(self.std))

    def observe(self, observation: Array) -> Array:
        return observation + self.bias


class Freeze(Perturbation):
    """A share of the numbers, drawn in each episode, keep their last value before the onset."""

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        super().begin(observation, draw)
        n = len(observation)
        chosen = draw.choice(n, math.ceil(self.amount * n), replace=False)
        self.frozen = np.isin(np.arange(n), chosen)

    def observe(self, observation: Array) -> Array:
        return np.where(self.frozen, self.observation, observation)


class Delay(Perturbation):
    """Observations delayed by some steps; at first the last one before the onset is repeated."""

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        super().begin(observation, draw)
        self.late = deque([observation], maxlen=int(self.amount) + 1)

    def observe(self, observation: Array) -> Array:
        self.late.append(observation)
        return self.late[0]


class Push(Perturbation):
    """A force on the root body along the x axis, in either direction, for 5 of every 25 steps.

    Each push would give the whole mass, were it free, the speed `amount`, in m/s. A body held by a
    joint, such as Reacher's arm, gains less. MuJoCo clears forces at a reset.
    """

    def __init__(self, env: gym.Env[Any, Any], amount: float, std: Array) -> None:
        super().__init__(env, amount, std)
        simulator: Any = env.unwrapped
        mass = float(simulator.model.body_mass.sum())
        self.simulator, self.force = simulator, mass * amount / (PUSH_STEPS * simulator.dt)

    def act(self, step: int) -> None:
        if (place := step % PUSH_PERIOD) in (0, PUSH_STEPS):
            force = self.force * self.draw.choice([-1.0, 1.0]) if place == 0 else 0.0
            self.simulator.data.xfrc_applied[_ROOT, 0] = force


def scale(*fields: str) -> Callable[..., Perturbation]:
    """Make a perturbation that multiplies fields of the model by the amount."""

    def alter(model: Any, factor: float, draw: np.random.Generator) -> None:
        for field in fields:
            attrgetter(field)(model)[:] *= factor
        # The stiffness of contacts and joint limits depends on masses, and is computed beforehand.
        mujoco.mj_setConst(model, mujoco.MjData(model))

    return partial(ModelPerturbation, alter=alter)


def fail(model: Any, lost: float, draw: np.random.Generator) -> None:
    """Disable so many actuators, drawn in each episode; half of one keeps half its force."""
    count = math.ceil(lost)
    if count > model.nu:
        raise InvalidInput(
            f"severity: expected one at which at most {model.nu} of the actuators fail, all that "
            f"there are, got one at which {count} do. Choose a milder one."
        )
    which = draw.choice(model.nu, count, replace=False)
    for parameters in (model.actuator_gainprm, model.actuator_biasprm):
        parameters[which] *= 1 - lost / count


Severity = Literal["mild", "middle", "severe"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Kind:
    """A kind of perturbation.

    Args:
        unit: Of the amounts.
        amounts: At each of `SEVERITIES`.
        make: Called with the environment, an amount and the observation's `std`.
        anywhere: True if it concerns the observation alone, so that MuJoCo isn't needed.
        needs_std: True if amounts are in standard deviations of the observation.
    """

    unit: str
    amounts: tuple[float, float, float]
    make: Callable[..., Perturbation]
    anywhere: bool = False
    needs_std: bool = False


_STD = "standard deviations of an observation"
PERTURBATIONS: Mapping[str, Kind] = {
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
        "actuators lost", (0.5, 1, 2), partial(ModelPerturbation, alter=fail)
    ),
    "noise": Kind(_STD, (0.1, 0.3, 1), Noise, anywhere=True, needs_std=True),
    "bias": Kind(_STD, (0.25, 0.5, 1), Bias, anywhere=True, needs_std=True),
    "frozen_sensor": Kind("of an observation's numbers", (0.1, 0.25, 0.5), Freeze, anywhere=True),
    "delay": Kind("steps late", (1, 3, 6), Delay, anywhere=True),
    "push": Kind("m/s for the whole mass, at each push", (0.25, 0.5, 1), Push),
}
"""Registry of perturbations by name."""


class PerturbedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Environment that is perturbed from a known step of each episode on; `perturb` makes it.

    Attributes:
        description: The perturbation's name and amount, for messages.
    """

    def __init__(self, perturbation: Perturbation, description: str, onset: int, seed: int) -> None:
        super().__init__(perturbation.env)
        self.perturbation, self.description = perturbation, description
        self.onset, self.seed = onset, seed
        self.draw = np.random.default_rng(seed)
        self.steps, self.last = 0, np.zeros(len(perturbation.std))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset without the perturbation; a seed also decides its randomness."""
        if seed is not None:
            self.draw = np.random.default_rng([self.seed, seed])
        self.perturbation.undo()
        self.steps = 0
        observation, info = self.env.reset(seed=seed, options=options)
        self.last = np.array(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, with the perturbation once `onset` steps have been taken."""
        since = self.steps - self.onset
        self.steps += 1
        if since == 0:
            self.perturbation.begin(self.last, self.draw)
        if since >= 0:
            self.perturbation.act(since)
        observation, reward, terminated, truncated, info = self.env.step(action)
        if since >= 0:
            true = np.array(observation)
            observation = self.perturbation.observe(true).astype(true.dtype, copy=False)
        else:
            self.last = np.array(observation)
        return observation, reward, terminated, truncated, info


def perturb(
    env: gym.Env[Any, Any],
    name: str,
    severity: Severity,
    onset: int,
    seed: int,
    *,
    observation_std: Array | None = None,
) -> gym.Env[Any, Any]:
    """Perturb an environment in every episode, once `onset` steps have been taken.

    Rewards and ends are always the environment's own: a faulty sensor misleads the agent, not the
    task. A reset undoes the perturbation.

    Args:
        env: One of Gymnasium's MuJoCo tasks; perturbations of the observation alone apply to any
            whose observations are vectors.
        name: One of `PERTURBATIONS`.
        severity: One of `SEVERITIES`.
        onset: Unperturbed steps; the observation of `reset` always is unperturbed.
        seed: Of the perturbation's randomness: noise, the actuator, the direction of a push.
        observation_std: `(n,)`, the standard deviation of each number of an observation in
            ordinary behaviour, in which noise and bias are measured; the others don't need it.

    Raises:
        UnknownName: No such perturbation or severity.
        InvalidInput: A task that isn't MuJoCo's, observations that aren't vectors, a perturbation
            that makes no difference to this task (gravity to a swimmer in the plane), more
            actuators to fail than there are, a standard deviation that is missing or of another
            shape, an environment that is perturbed already, or a negative onset or seed.

    Example:
        >>> env = perturb(gym.make("HalfCheetah-v5"), "gravity", "middle", onset=1, seed=0)
        >>> _ = env.reset(seed=0)
        >>> for _ in range(2):
        ...     _ = env.step(np.zeros(6))
        ...     print(round(float(env.unwrapped.model.opt.gravity[2]), 3))
        -9.81
        -14.715
    """
    if name not in PERTURBATIONS:
        raise UnknownName("name", name, PERTURBATIONS)
    if severity not in SEVERITIES:
        raise UnknownName("severity", severity, SEVERITIES)
    for what, value in (("onset", onset), ("seed", seed)):
        if value < 0:
            raise InvalidInput(f"{what}: expected at least 0, got {value}.")
    if env.has_wrapper_attr("perturbation"):
        raise InvalidInput(
            "env: expected one that isn't perturbed yet, got one with "
            f"{env.get_wrapper_attr('description')}. Wrap the environment inside it."
        )
    space, kind = env.observation_space, PERTURBATIONS[name]
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise InvalidInput(f"env: expected observations that are vectors, got {space}.")
    std = (
        _check_std(name, observation_std, space.shape) if kind.needs_std else np.zeros(space.shape)
    )
    title = env.spec.id if env.spec else type(env.unwrapped).__name__
    if not kind.anywhere and not isinstance(env.unwrapped, MujocoEnv):
        others = ", ".join(name for name, kind in PERTURBATIONS.items() if kind.anywhere)
        raise InvalidInput(
            f"env: expected one of Gymnasium's MuJoCo environments for {name!r}, got {title}. "
            f"Others can have {others}."
        )
    amount = kind.amounts[SEVERITIES.index(severity)]
    perturbation = kind.make(env, amount, std)
    if not perturbation.matters():
        raise InvalidInput(
            f"name: expected a shift that makes a difference to {title}, got {name!r}: "
            f"after {TRIAL:g} simulated seconds under the same actions its state is the same with "
            "it and without. Choose another."
        )
    return PerturbedEnv(perturbation, f"{name}: {amount:g} {kind.unit}", onset, seed)


def _check_std(name: str, given: Array | None, shape: tuple[int, ...]) -> Array:
    if given is None:
        raise InvalidInput(
            f"observation_std: expected standard deviations of shape {shape}, in which "
            f"{name} is measured, got None. Take them from recorded episodes."
        )
    std = np.asarray(given, np.float64)
    if std.shape != shape or not np.isfinite(std).all() or (std < 0).any() or not std.any():
        raise InvalidInput(
            f"observation_std: expected finite numbers of at least 0 of shape {shape}, not all 0, "
            f"got shape {std.shape} and {std}."
        )
    return std
