"""What is measured of a monitor that watches shifted episodes: what it finds, when, how fast."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from experiments.envs.guard_episodes import Episodes
from ood import Monitor

Array = NDArray[Any]


def figures(usual: Array, other: Array, threshold: float, onset: int) -> dict[str, float | None]:
    """What a statistic finds of a shift.

    Args:
        usual: `(N, T)`, the statistic along episodes of the usual world.
        other: `(M, T)`, along those that change after `onset` steps.
        threshold: What it has to exceed.
        onset: In steps.

    Returns:
        found: Share of the episodes that had no alarm by the onset which have one after it (as
            detection is judged given that nothing was raised before the change, Pollak 1985, Ann.
            Stat. 13:206); 0 if all had one.
        found of all: The same of all M: one that halted by mistake before the onset counts as
            missed.
        delay: Median steps of these from the onset to the alarm, 1 for the first; None if none.
        fpr at 95% tpr: Share of the N episodes whose largest value after the onset is above one
            that 95% of the M exceed.
        auroc: Chance that the largest value after the onset is larger with the shift than without.
        false alarms: Share of the N episodes with any alarm.

    Example:
        >>> usual, other = np.array([[0.0, 1, 0, 0], [0, 0, 3, 0]]), np.array([[0.0, 0, 1, 4]])
        >>> figures(usual, other, threshold=2, onset=2)  # doctest: +NORMALIZE_WHITESPACE
        {'found': 1.0, 'found of all': 1.0, 'delay': 2.0, 'auroc': 1.0, 'fpr at 95% tpr': 0.0,
         'false alarms': 0.5}
    """
    alarms = other > threshold
    running = ~alarms[:, :onset].any(1)
    found = alarms.any(1) & running
    delays = alarms[found].argmax(1) - onset + 1
    largest = np.concatenate([usual[:, onset:].max(1), other[:, onset:].max(1)])
    is_other = np.arange(len(largest)) >= len(usual)
    fpr, tpr, _ = roc_curve(is_other, largest)
    return {
        "found": float(found.sum() / max(1, running.sum())),
        "found of all": float(found.mean()),
        "delay": float(np.median(delays)) if len(delays) else None,
        "auroc": float(roc_auc_score(is_other, largest)),
        "fpr at 95% tpr": float(fpr[np.argmax(tpr >= 0.95)]),
        "false alarms": float((usual > threshold).any(1).mean()),
    }


def halting_steps(values: Array, threshold: float) -> Array:
    """The steps `(N,)` from which on a guard halts, infinity where it doesn't.

    Args:
        values: `(N, T)`, the statistic along N episodes.
        threshold: What it has to exceed.

    Example:
        >>> halting_steps(np.array([[0.0, 3.0, 0.0], [0.0, 1.0, 1.0]]), threshold=2)
        array([ 2., inf])
    """
    alarms = values > threshold
    return np.where(alarms.any(1), alarms.argmax(1) + 1.0, np.inf)


def step_micros(monitor: Monitor, episode: Tensor) -> float:
    """Microseconds that a calibrated monitor takes for a step of one environment, the median."""
    stream, taken = monitor.stream(1), []
    for frame in episode.numpy():
        started = time.perf_counter()
        stream.update(frame[None])
        taken.append(time.perf_counter() - started)
    return 1e6 * statistics.median(taken)


def along(monitor: Monitor, episodes: Episodes) -> Array:
    """A calibrated monitor's statistic `(N, T)` along whole episodes."""
    assert monitor.threshold is not None
    seen = [monitor.scores(episode).numpy() for episode in episodes.features]
    steps = np.arange(len(seen[0]))
    return monitor.statistic.run([monitor.threshold.standardise(row, steps) for row in seen])
