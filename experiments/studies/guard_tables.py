"""What the study of guards leaves behind: who finds what, how soon, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.analysis.old_page import LEAST_SEEDS, Section, Table, plural
from experiments.analysis.old_stats import bootstrap_interval, interquartile_mean
from experiments.studies.summary import Row, by, numbers

COSTLY = 0.2
"""A shift matters that takes this share of the return after its onset."""

FOUND = 0.5  # of a shift's episodes, for a sentence to call it found
_OVER_ALL = ("found", "auroc", "fpr at 95% tpr", "false alarms")


def sections(rows: Sequence[Row], alpha: float) -> list[Section]:
    """Detectors by statistics over all shifts; then, for each statistic, each shift.

    Args:
        rows: Of `experiments.studies.guard.study_guard`.
        alpha: The promised chance of a false alarm in an episode.
    """
    return [_over_all(rows, alpha)] + [
        _statistic(name, some) for name, some in by(rows, "statistic").items()
    ]


def lead(rows: Sequence[Row]) -> str:
    """In a sentence, what the pair does that finds most of the shifts that matter."""
    costly = [row for of in _shifts(rows).values() if _share_lost(of) >= COSTLY for row in of]
    if not costly:
        return f"No shift takes {COSTLY:.0%} of the return: there was nothing to find."
    pairs = {
        f"{detector} with {statistic}": float(numbers(some, "found").mean())
        for detector, of in by(costly, "detector").items()
        for statistic, some in by(of, "statistic").items()
    }
    best = max(pairs, key=lambda pair: pairs[pair])
    seeds = len(by(rows, "seed"))
    few = f" With {plural(seeds, 'seed', 'seeds')} that is a hint at most."
    return (
        f"{best} finds most of what matters: {pairs[best]:.0%} of the episodes in which a shift "
        f"takes {COSTLY:.0%} of the return or more, and which had no alarm before it."
        f"{few if seeds < LEAST_SEEDS else ''}"
    )


def prevented(rows: Sequence[Row]) -> float | None:
    """Share of the return lost to shifts that halting gave back; below 0 where it took more.

    Args:
        rows: With `return`, `shifted return` and `guarded return`, all after the onset.

    Returns:
        The share, of all rows together; None where the shifts took nothing.

    Example:
        >>> prevented([{"return": 10.0, "shifted return": -10.0, "guarded return": 0.0}])
        0.5
    """
    usual, other, guarded = (
        float(numbers(rows, name).sum()) for name in ("return", "shifted return", "guarded return")
    )
    return (guarded - other) / (usual - other) if usual > other else None


def _over_all(rows: Sequence[Row], alpha: float) -> Section:
    lost = {shift: _share_lost(of) for shift, of in _shifts(rows).items()}
    costly = [row for row in rows if lost[row["shift"], row["severity"]] >= COSTLY]
    matter = sum(share >= COSTLY for share in lost.values())
    lines, rates = [], []
    for detector, of in by(rows, "detector").items():
        for statistic, some in by(of, "statistic").items():
            pair = [r for r in costly if (r["detector"], r["statistic"]) == (detector, statistic)]
            micros = np.median(numbers(some, "step us"))
            lines.append(
                [f"{detector} {statistic}", *(_over_seeds(some, name) for name in _OVER_ALL),
                 _share(prevented(pair)), f"{micros:.0f}"]
            )  # fmt: skip
            rates.append(float(numbers(some, "false alarms").mean()))
    said = [
        f"Interquartile mean of the means of {plural(len(by(rows, 'seed')), 'seed', 'seeds')}, "
        "and its 95% interval.",
        f"At most {alpha:g} false alarms an episode are promised; there were {min(rates):.2g} to "
        f"{max(rates):.2g}.",
        f"The harm prevented is the share that halting gave back of the return lost to the "
        f"{matter} of {len(lost)} shifts that take {COSTLY:.0%} of it or more; it is negative "
        "where the agent, shifted as it was, still earned more than one that stands still.",
        "Times are medians for one environment on the machine that ran this, and differ from run "
        "to run.",
    ]
    header = ["", "found", "AUROC", "FPR at 95% TPR", "false alarms per episode",
              "harm prevented", "µs a step"]  # fmt: skip
    return Section("Over all shifts and severities", said, table=Table(header, lines))


def _statistic(statistic: str, rows: Sequence[Row]) -> Section:
    detectors, lines = list(by(rows, "detector")), []
    for (shift, severity), cells in _shifts(rows).items():
        own = by(cells, "detector")
        lines.append(
            [f"{shift} {severity}", _lost(cells), *(_found(own[d]) for d in detectors),
             *(_share(prevented(own[d]) if _share_lost(cells) >= COSTLY else None)
               for d in detectors)]
        )  # fmt: skip
    said = [
        "Share found of shifted episodes without an alarm before the onset (median delay in "
        "steps), the return lost after it, "
        f"and the share of it that halting gave back where it was {COSTLY:.0%} or more."
    ]
    for detector, of in by(rows, "detector").items():
        said += _sentences(detector, of)
    header = ["", "return lost", *detectors, *(f"prevented, {d}" for d in detectors)]
    return Section(f"With {statistic}", said, table=Table(header, lines))


def _sentences(detector: str, rows: Sequence[Row]) -> list[str]:
    """What it finds, what it misses and what that costs, and what it needn't have found."""
    shifts = {" ".join(name): of for name, of in _shifts(rows).items()}
    lost = {name: _share_lost(of) for name, of in shifts.items()}
    found = {name: float(numbers(of, "found").mean()) for name, of in shifts.items()}
    costly = [name for name in shifts if lost[name] >= COSTLY]
    seen = [name for name in costly if found[name] >= FOUND]
    said = [
        f"Of the shifts that take {COSTLY:.0%} of the return or more, {detector} finds {len(seen)} "
        f"of {len(costly)} in at least half of their episodes."
        if costly
        else f"No shift took {COSTLY:.0%} of the return, so {detector} had nothing to find."
    ]
    if missed := [f"{n} (takes {lost[n]:.0%})" for n in costly if found[n] < FOUND]:
        said.append(f"Not found: {', '.join(missed)}.")
    if alarmed := [
        f"{n} ({found[n]:.0%} of episodes)" for n in shifts
        if lost[n] < COSTLY and found[n] >= FOUND
    ]:  # fmt: skip
        said.append(f"Found though it takes less: {', '.join(alarmed)}.")
    share = prevented([row for name in costly for row in shifts[name]]) if costly else None
    if share is not None:
        said.append(
            f"Halting gave back {share:.0%} of what those shifts took."
            if share >= 0
            else f"Halting took another {-share:.0%} of what those shifts took, since zeros for "
            "actions earn less than the shifted agent."
        )
    return said


def _shifts(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    return {
        (shift, severity): cells
        for shift, of in by(rows, "shift").items()
        for severity, cells in by(of, "severity").items()
    }


def _share_lost(rows: Sequence[Row]) -> float:
    usual, other = (float(numbers(rows, name).mean()) for name in ("return", "shifted return"))
    return (usual - other) / abs(usual) if usual else 0.0


def _over_seeds(rows: Sequence[Row], metric: str) -> str:
    values = np.array([numbers(of, metric).mean() for of in by(rows, "seed").values()])
    low, high = bootstrap_interval(interquartile_mean, values)
    return f"{float(interquartile_mean(values)):.2f} ({low:.2f} to {high:.2f})"


def _found(rows: Sequence[Row]) -> str:
    delays = [row["delay"] for row in rows if row["delay"] is not None]
    share = f"{numbers(rows, 'found').mean():.2f}"
    return f"{share} ({np.median(delays):.0f})" if delays else share


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def _lost(rows: Sequence[Row]) -> str:
    usual, other = (numbers(rows, name).mean() for name in ("return", "shifted return"))
    return f"{usual - other:.1f} of {usual:.1f}"
