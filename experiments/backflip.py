"""The backflip: a Hopper that turns over backwards, off the ground, and lands on its foot.

Nobody has written a reward for it (Christiano et al. 2017, arXiv 1706.03741, §3.2, taught it by 900
comparisons). What stands in for a person here is `progress`, by which a synthetic teacher
compares clips; what a policy is judged by is `backflips`, which looks at nothing but whole turns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

_HEALTHY_HEIGHT = 0.7  # of the torso, metres: below it Hopper-v5 calls the agent fallen
_UPRIGHT = np.cos(np.deg2rad(60))
_TOUCHING = 0.01  # metres above the ground; contacts are soft


def clearance(poses: Floats) -> Floats:
    """How high the lowest point of a Hopper is above the ground, from its pose alone.

    Its four limbs are capsules in a plane, end to end, so that an end of one of them is lowest.

    Args:
        poses: `(..., 5)` or wider: height of the torso (metres), and the angles of torso, thigh,
            leg and foot (radians), as Hopper-v5's observations begin.

    Returns:
        Metres, `(...)`; about 0 in contact.

    Example:
        >>> standing = np.array([1.25, 0.0, 0.0, 0.0, 0.0])
        >>> lifted = standing + np.eye(5)[0]
        >>> float(clearance(standing).round(3)), float(clearance(lifted).round(3))
        (0.04, 1.04)
    """
    height, torso, thigh, leg, foot = (poses[..., i] for i in range(5))
    hip = height - 0.2 * np.cos(torso)
    knee = hip - 0.45 * np.cos(torso - thigh)
    ankle = knee - 0.5 * np.cos(torso - thigh - leg)
    along = np.sin(torso - thigh - leg - foot)  # how far the foot's toe points down
    ends = (
        height + 0.2 * np.cos(torso) - 0.05,
        hip - 0.05,
        knee - 0.05,
        ankle - 0.04,
        ankle + 0.13 * along - 0.06,
        ankle - 0.26 * along - 0.06,
    )
    lowest: Floats = np.min(ends, axis=0)
    return lowest


def backflips(poses: Floats) -> int:
    """Full backward turns that were completed off the ground and landed on the foot.

    Between two times of standing (the torso above 0.7 m and within 60 degrees of upright, the
    lowest point on the ground) the torso must have turned backwards once, and been clear of the
    ground for as long as it was upside down: who rolls over the head hasn't done a backflip. Turns
    between which nobody stood count together, so a double one counts as two.

    Args:
        poses: `(T, 5)` or wider, as for `clearance`, of one episode in order. The torso's angle
            may be kept within ±pi or not: from one frame to the next it turns by less.

    Returns:
        How many.

    Example:
        >>> poses = np.tile([1.25, 0.0, 0.0, 0.0, 0.0], (100, 1))
        >>> poses[:, 0] += np.sin(np.linspace(0, np.pi, 100))
        >>> poses[:, 1] = np.linspace(0, -2 * np.pi, 100)
        >>> poses[[0, -1], 0] = 1.2
        >>> backflips(poses), backflips(poses[::-1]), backflips(poses[:70])
        (1, 0, 0)
    """
    angle = np.unwrap(poses[:, 1].astype(np.float64))
    off_ground = clearance(poses) > _TOUCHING
    stands = (poses[:, 0] > _HEALTHY_HEIGHT) & (np.cos(angle) > _UPRIGHT) & ~off_ground
    dived = np.concatenate([[0], np.cumsum((np.cos(angle) < 0) & ~off_ground)])
    times = np.flatnonzero(stands)
    turns = np.rint((angle[times[:-1]] - angle[times[1:]]) / (2 * np.pi))
    cleanly = dived[times[1:]] == dived[times[:-1]]
    return int(turns[cleanly & (turns > 0)].sum())


def progress(observations: Floats, actions: Floats) -> Floats:
    r"""What a teacher sees of a backflip in one frame: backward turning in the air.

    $-\omega$ off the ground, $\min(-\omega, 0)$ on it, for the torso's angular velocity
    $\omega$. Forward turning counts against it everywhere: paid for the air alone, an agent kept
    kicking its torso back in the air and forth on the ground (2,760 of it in 1,000 steps, for a
    tenth of a turn).

    Args:
        observations: `(B, 11)`, Hopper-v5's.
        actions: `(B, 3)`; they don't matter.

    Returns:
        `(B,)`, radians a second.
    """
    backwards = -observations[:, 7]
    in_the_air = clearance(observations) > _TOUCHING
    return np.where(in_the_air, backwards, np.minimum(backwards, 0))
