"""The backflip: a Hopper that turns over backwards, off the ground, and lands on its foot.

Christiano et al. (2017, arXiv 1706.03741, §3.2) taught it by 900 comparisons of a person's. Here a
synthetic teacher compares clips by `progress`; a policy is judged by `backflips`, the number of
whole turns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

_UPRIGHT, _UPSIDE_DOWN = np.cos(np.deg2rad([60, 150]))
_TOUCHING = 0.01  # metres above the ground; contacts are soft
_MASS = np.array([3.67, 4.06, 2.78, 5.32])  # kg, of torso, thigh, leg and foot


def clearances(poses: Floats) -> tuple[Floats, Floats]:
    """Heights of a Hopper's body and its foot above the ground, from its pose alone.

    Its four limbs are capsules in a plane, end to end, so that one of their ends is lowest; the
    ankle never is.

    Args:
        poses: `(..., 5)` or wider: height of the torso (metres), and the angles of torso, thigh,
            leg and foot (radians), as Hopper-v5's observations begin.

    Returns:
        Metres, `(...)` each, about 0 in contact: of the lowest point of torso, thigh and leg, and
        of the foot's.

    Example:
        >>> standing = np.array([1.25, 0.0, 0.0, 0.0, 0.0])
        >>> [float(lowest.round(3)) for lowest in clearances(standing)]
        [0.55, 0.04]
    """
    height, torso, thigh, leg, foot = (poses[..., i] for i in range(5))
    hip = height - 0.2 * np.cos(torso)
    knee = hip - 0.45 * np.cos(torso - thigh)
    ankle = knee - 0.5 * np.cos(torso - thigh - leg)
    toe_down = np.sin(torso - thigh - leg - foot)
    head = height + 0.2 * np.cos(torso)
    body: Floats = np.minimum(np.minimum(head, hip), knee) - 0.05
    sole: Floats = np.minimum(ankle + 0.13 * toe_down, ankle - 0.26 * toe_down) - 0.06
    return body, sole


def backflips(poses: Floats) -> int:
    """Count full backward turns that were completed off the ground and landed on the foot.

    Between two times on the foot (which alone touches the ground, the torso within 60 degrees of
    upright) the torso must have turned backwards once, with nothing on the ground whenever it was
    within 30 degrees of upside down, and nothing but the foot whenever its head was below its hip:
    rolling over the head or the back is no backflip. Turns without a landing in between count
    together, so a double one counts as two.

    Args:
        poses: `(T, 5)` or wider, as for `clearances`, of one episode in order. The torso's angle
            may be kept within ±pi or not: from one frame to the next it turns by less.

    Example:
        >>> poses = np.tile([1.25, 0.0, 0.0, 0.0, 0.0], (100, 1))
        >>> poses[:, 0] += np.sin(np.linspace(0, np.pi, 100))
        >>> poses[:, 1] = np.linspace(0, -2 * np.pi, 100)
        >>> poses[[0, -1], 0] = 1.2
        >>> backflips(poses), backflips(poses[::-1]), backflips(poses[:70])
        (1, 0, 0)
    """
    angle = np.unwrap(poses[:, 1].astype(np.float64))
    body, foot = clearances(poses)
    on_foot = (foot < _TOUCHING) & (body > _TOUCHING) & (np.cos(angle) > _UPRIGHT)
    on_ground = np.minimum(body, foot) < _TOUCHING
    rolling = (np.cos(angle) < _UPSIDE_DOWN) & on_ground
    rolling |= (np.cos(angle) < 0) & (body < _TOUCHING)
    dived = np.concatenate([[0], np.cumsum(rolling)])
    times = np.flatnonzero(on_foot)
    turns = np.rint((angle[times[:-1]] - angle[times[1:]]) / (2 * np.pi))
    cleanly = dived[times[1:]] == dived[times[:-1]]
    return int(turns[cleanly & (turns > 0)].sum())


def observe(observations: Floats) -> Floats:
    r"""Map Hopper-v5's observations to those of policies and predictors for a backflip.

    The torso's angle is kept within $\pm\pi$, since upright is upright after any number of turns.
    Two touch sensors are added, 1 while the body, or the foot, touches the ground. A pose shows
    that too, but by less than a centimetre: a reward that was learned from 780 comparisons
    without them agreed with `progress` on frames of another policy by a correlation of 0.55, with
    them by 0.91 (policies trained on another form of it; one draw).

    Args:
        observations: `(..., 11)`, Hopper-v5's.

    Returns:
        `(..., 13)`, of the same kind.

    Example:
        >>> fallen = np.zeros(11)
        >>> fallen[0], fallen[1] = 0.05, 1.5 * np.pi
        >>> observe(fallen)[[1, 11, 12]].round(2).tolist()
        [-1.57, 1.0, 1.0]
    """
    touching = np.stack(clearances(observations), -1) < _TOUCHING
    found: Floats = np.concatenate([observations, touching.astype(observations.dtype)], -1)
    found[..., 1] = np.remainder(found[..., 1] + np.pi, 2 * np.pi) - np.pi
    return found


def progress(observations: Floats, actions: Floats) -> Floats:
    r"""Reward of a frame for a backflip: the body turns backwards, on or off its foot.

    $w + z$ in the air, $w + z - 4 (1 - \cos\theta)$ on the foot, and
    $\min(w, 0) + z - 4 (1 - \cos\theta) - 8$ if anything else touches the ground, for the torso's
    height z and angle $\theta$ from upright, and the rate w at which the body as a whole turns
    backwards, the mean over its limbs by mass. (On a reward for the torso's turning in the air
    alone, an agent kicked it back in the air and forth on the ground: 22 radians in 1,000 steps for
    a tenth of a turn. With 4 in place of 8 for lying on the ground a Hopper turned 8 times in 1,000
    steps and landed 0.4.)

    Args:
        observations: `(B, 11)`, Hopper-v5's, or `(B, 13)`, those of `observe`.
        actions: `(B, 3)`, not used.

    Returns:
        `(B,)`; the turning part in radians per second.
    """
    # Each joint turns what hangs on it against what it hangs on.
    joints = np.cumsum(observations[:, 8:11], 1)
    turning = (joints @ _MASS[1:]) / _MASS.sum() - observations[:, 7]
    body, foot = (clearance < _TOUCHING for clearance in clearances(observations))
    leaning = np.where(body | foot, 1 - np.cos(observations[:, 1]), 0)
    rate: Floats = np.where(body, np.minimum(turning, 0) - 8, turning)
    return rate - 4 * leaning + observations[:, 0]
