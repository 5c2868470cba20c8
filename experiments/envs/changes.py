"""What becomes of an environment whose world changes: its MuJoCo model, its sensors, its peace.

`experiments.envs.shifts` says which of these there are by name, how much, and when they begin.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from numpy.typing import NDArray

from rewardmodels.errors import InvalidInput

Array = NDArray[Any]
Alter = Callable[[Any, float, np.random.Generator], None]
"""Changes an `mjModel` in place, by an amount."""

PUSH_PERIOD = 25
"""Steps from the start of one push to the start of the next."""
PUSH_STEPS = 5
"""Steps that a push lasts."""
TRIAL = 2.0
"""Simulated seconds in which a change of the model has to make a difference."""
_ROOT = 1  # body 0 is the world


class Change:
    """What happens to an environment from the onset on; it begins anew in every episode.

    Args:
        env: The environment.
        amount: How much, in the unit of its kind.
        std: `(n,)`, standard deviation of each number of the observation.
    """

    def __init__(self, env: gym.Env[Any, Any], amount: float, std: Array) -> None:
        self.env, self.amount, self.std = env, amount, std

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        """The onset: the last observation `(n,)` before it, and what chance is drawn from."""
        self.observation, self.draw = observation, draw

    def act(self, step: int) -> None:
        """Before each step from the onset on, which is step 0."""

    def see(self, observation: Array) -> Array:
        """What the agent is shown in place of the observation `(n,)`."""
        return observation

    def undo(self) -> None:
        """Before the next episode."""

    def matters(self) -> bool:
        """Whether it makes any difference to this environment."""
        return True


class ModelChange(Change):
    """Another MuJoCo model takes the simulator's state over; undoing it is exact."""

    def __init__(self, env: gym.Env[Any, Any], amount: float, std: Array, *, alter: Alter) -> None:
        super().__init__(env, amount, std)
        simulator: Any = env.unwrapped
        self.simulator, self.alter, self.usual = simulator, alter, simulator.model

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        super().begin(observation, draw)
        self.simulator.model = self._changed(draw)

    def undo(self) -> None:
        self.simulator.model = self.usual

    def _changed(self, draw: np.random.Generator) -> Any:
        model = copy.deepcopy(self.usual)
        self.alter(model, self.amount, draw)
        return model

    def matters(self) -> bool:
        low, high = self.usual.actuator_ctrlrange.T
        ends = []
        for model in (self.usual, self._changed(np.random.default_rng(0))):
            data, draw = mujoco.MjData(model), np.random.default_rng(0)
            for _ in range(math.ceil(TRIAL / model.opt.timestep)):
                data.ctrl[:] = draw.uniform(low, high)
                mujoco.mj_step(model, data)
            ends.append(np.concatenate([data.qpos, data.qvel]))
        # Gravity along an axis on which nothing can move leaves rounding errors behind.
        return not np.allclose(ends[0], ends[1], rtol=1e-9, atol=1e-9)


class Noise(Change):
    """Independent Gaussian noise on every number."""

    def see(self, observation: Array) -> Array:
        return observation + self.amount * self.std * self.draw.standard_normal(len(self.std))


class Bias(Change):
    """The same error throughout an episode, of a sign drawn for each number."""

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        super().begin(observation, draw)
        self.bias = self.amount * self.std * draw.choice([-1.0, 1.0], len(self.std))

    def see(self, observation: Array) -> Array:
        return observation + self.bias


class Freeze(Change):
    """A share of the numbers, drawn in each episode, stay at their last value before the onset."""

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        super().begin(observation, draw)
        n = len(observation)
        self.frozen = np.zeros(n, bool)
        self.frozen[draw.choice(n, math.ceil(self.amount * n), replace=False)] = True

    def see(self, observation: Array) -> Array:
        return np.where(self.frozen, self.observation, observation)


class Delay(Change):
    """Observations come some steps late; until the first does, the last before the onset stays."""

    def begin(self, observation: Array, draw: np.random.Generator) -> None:
        super().begin(observation, draw)
        self.late = deque([observation], maxlen=int(self.amount) + 1)

    def see(self, observation: Array) -> Array:
        self.late.append(observation)
        return self.late[0]


class Push(Change):
    """A force on the root body along the x axis, either way, for 5 of every 25 steps.

    Each push is what gives the whole mass, were it free, the speed `amount`, in m/s. Held by a
    joint it gains less: Reacher's arm hardly feels it. MuJoCo forgets forces at a reset.
    """

    def __init__(self, env: gym.Env[Any, Any], amount: float, std: Array) -> None:
        super().__init__(env, amount, std)
        simulator: Any = env.unwrapped
        mass = float(simulator.model.body_mass.sum())
        self.simulator, self.force = simulator, mass * amount / (PUSH_STEPS * simulator.dt)

    def act(self, step: int) -> None:
        if step % PUSH_PERIOD == 0:
            self._push(self.force * self.draw.choice([-1.0, 1.0]))
        elif step % PUSH_PERIOD == PUSH_STEPS:
            self._push(0.0)

    def _push(self, force: float) -> None:
        self.simulator.data.xfrc_applied[_ROOT, 0] = force


def scale(*fields: str) -> Callable[..., Change]:
    """A change that multiplies fields of the model by the amount."""

    def alter(model: Any, factor: float, draw: np.random.Generator) -> None:
        for field in fields:
            attrgetter(field)(model)[:] *= factor
        # What contacts and joint limits give way depends on masses, and is worked out beforehand.
        mujoco.mj_setConst(model, mujoco.MjData(model))

    return partial(ModelChange, alter=alter)


def fail(model: Any, lost: float, draw: np.random.Generator) -> None:
    """Takes so many actuators away, drawn in each episode; half of one keeps half its force."""
    count = math.ceil(lost)
    if count > model.nu:
        raise InvalidInput(
            f"severity: expected one at which at most {model.nu} of the actuators fail, all that "
            f"there are, got one at which {count} do. Choose a milder one."
        )
    which = draw.choice(model.nu, count, replace=False)
    for parameters in (model.actuator_gainprm, model.actuator_biasprm):
        parameters[which] *= 1 - lost / count
