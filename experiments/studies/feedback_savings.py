"""What asking saves: the comparisons that a return takes, by schedule and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from experiments.analysis.old_stats import Values, interquartile_mean
from experiments.studies.strategy_savings import labels_needed
from experiments.studies.summary import Row, by, numbers

SHARE = 0.9  # of what the task's own reward gives
_RESAMPLES = 2000


class Needed(NamedTuple):
    """Comparisons with which a level is reached; infinite where the largest budget doesn't."""

    comparisons: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == np.inf:
            return "never reached"
        low, high = (_count(end) for end in (self.low, self.high))
        return f"{_count(self.comparisons)} ({low} to {high})"


def needed(rows: Sequence[Row], label: str, share: float = SHARE) -> Needed:
    """Comparisons that give a share of the return on the task's own reward, and a 95% interval.

    Through interquartile means over seeds at each budget, and the zero reward's at no comparison,
    goes a line from point to point; counted is where it first reaches the level. Seeds are
    resampled within each budget and arm (the stratified bootstrap of Agarwal et al. 2021).

    Args:
        rows: Of `online_cell` on one task, with the arms "task" and "zero".
        label: Of `labelled`, which schedule and teacher.
        share: From 0 to 1; of a negative return, that much of its size is lost.
    """
    own = _resampled(arm(rows, "task"))
    x, y = _lines(rows, label)
    target = own - (1 - share) * np.abs(own)
    found = [_crossing(*line) for line in zip(x, y, target, strict=True)]
    low, high = np.quantile(found[1:], [0.025, 0.975], method="nearest")
    return Needed(found[0], float(low), float(high))


def unsure_ratio(
    rows: Sequence[Row], label: str = "WhenUnsure, oracle", constant: str = "Constant, oracle"
) -> tuple[float, float, float]:
    """Comparisons that asking when unsure takes, over the constant schedule's for its return.

    The constant schedule's are read off its line, as in `needed`; where its largest budget doesn't
    reach that return, the budget counts, so that the ratio is then too high rather than too low.

    Args:
        rows: Of `online_cell` on one task.
        label: Whose largest budget is looked at.
        constant: What it is compared with.

    Returns:
        Ratio, and its 95% interval from resampling seeds.
    """
    asked = max(by_budget(rows, label).items())[1]
    mean = numbers(asked, "comparisons").mean()
    x, y = _lines(rows, constant)
    reached = [_crossing(*line) for line in zip(x, y, _resampled(asked), strict=True)]
    ratios = mean / np.maximum(np.minimum(reached, x[:, -1]), 1.0)
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    return float(ratios[0]), float(low), float(high)


def at_same_budget(
    rows: Sequence[Row], label: str = "WhenUnsure, oracle", constant: str = "Constant, oracle"
) -> tuple[float, float, float, float] | None:
    """What asking when unsure leaves unasked of a budget, and what becomes of the return.

    Args:
        rows: Of `online_cell` on one task.
        label: Whose largest budget is looked at.
        constant: What it is compared with.

    Returns:
        Its comparisons over the constant schedule's of the same budget; its return less the
        other's, and the 95% interval of that from resampling seeds. None if the constant schedule
        wasn't run with that budget.
    """
    budget, own = max(by_budget(rows, label).items())
    if not (other := by_budget(rows, constant).get(budget)):
        return None
    share = numbers(own, "comparisons").mean() / numbers(other, "comparisons").mean()
    gaps = _resampled(own) - _resampled(other)
    low, high = np.quantile(gaps[1:], [0.025, 0.975])
    return float(share), float(gaps[0]), float(low), float(high)


def labelled(row: Row) -> str:
    """Which line of the figure a cell belongs to: schedule and teacher, or the teacher alone."""
    schedule = row.get("schedule", "")
    return f"{schedule}, {row['teacher']}" if schedule else str(row["teacher"])


def labels(rows: Sequence[Row]) -> list[str]:
    """Of all learned cells, in their order, each once."""
    return list(dict.fromkeys(labelled(row) for row in rows if row["reward"] == "learned"))


def arm(rows: Sequence[Row], name: str) -> list[Row]:
    """Cells of a reward that isn't learned."""
    return [row for row in rows if row["reward"] == name != "learned"]


def by_budget(rows: Sequence[Row], label: str) -> dict[int, list[Row]]:
    """Cells of one line of the figure by their budget, the smallest first."""
    own = [row for row in rows if row["reward"] == "learned" and labelled(row) == label]
    return dict(sorted(by(own, "budget").items()))


def _resampled(rows: Sequence[Row]) -> Values:
    """Interquartile mean return over seeds, and then that of each bootstrap draw of the seeds."""
    values = numbers(rows, "return")
    # Another draw for each sample, the same for the same one.
    rng = np.random.default_rng(crc32(values.tobytes()))
    drawn = values[rng.integers(len(values), size=(_RESAMPLES, len(values)))]
    return np.append(interquartile_mean(values), interquartile_mean(drawn))


def _lines(rows: Sequence[Row], label: str) -> tuple[Values, Values]:
    """Answers and returns, from none and the zero reward's to the largest budget's; by draw."""
    budgets = list(by_budget(rows, label).values())
    x = [0.0, *(float(numbers(some, "comparisons").mean()) for some in budgets)]
    y = [_resampled(some) for some in (arm(rows, "zero"), *budgets)]
    return np.tile(x, (_RESAMPLES + 1, 1)), np.stack(y, axis=1)


def _crossing(x: Values, y: Values, level: float) -> float:
    found = labels_needed(y, x, level)
    return np.inf if np.isnan(found) else found


def _count(value: float) -> str:
    return "more than the budget" if value == np.inf else f"{value:.0f}"
