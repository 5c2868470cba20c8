"""What the study of guards leaves behind: who finds what, how soon, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.statistics import bootstrap_interval, interquartile_mean
from experiments.studies.summary import Row, by, markdown, numbers

_OVER_ALL = {
    "found": "found",
    "auroc": "AUROC",
    "fpr at 95% tpr": "FPR at 95% TPR",
    "false alarms": "false alarms per episode",
}


def tables(rows: Sequence[Row], alpha: float) -> str:
    """Two tables: detectors by statistics over all shifts, and each shift with each detector.

    Args:
        rows: Of `experiments.studies.guard.study_guard`.
        alpha: The promised chance of a false alarm in an episode.
    """
    pairs = [(d, s) for d in by(rows, "detector") for s in by(rows, "statistic")]
    of = {
        pair: [row for row in rows if (row["detector"], row["statistic"]) == pair] for pair in pairs
    }
    seeds = len(by(rows, "seed"))
    parts = [
        f"**Over all shifts and severities**, {seeds} seeds: interquartile mean of the seeds' "
        f"means and its 95% interval. At most {alpha:g} false alarms an episode are promised.",
        markdown(
            [
                "detector",
                "statistic",
                "found",
                "AUROC",
                "FPR at 95% TPR",
                "false alarms per episode",
            ],
            [
                [
                    *pair,
                    *(
                        _over_seeds(some, name)
                        for name in ("found", "auroc", "fpr at 95% tpr", "false alarms")
                    ),
                ]
                for pair, some in of.items()
            ],
        ),
    ]
    for statistic, some in by(rows, "statistic").items():
        detectors = by(some, "detector")
        lines = []
        for shift, of_shift in by(some, "shift").items():
            for severity, cells in by(of_shift, "severity").items():
                own = by(cells, "detector")
                lines.append([shift, severity, _lost(cells), *(_found(own[d]) for d in detectors)])
        parts += [
            f"**{statistic}**: share of shifted episodes found (median delay in steps), and the "
            "return lost after the onset",
            markdown(["shift", "severity", "return lost", *detectors], lines),
        ]
    return "\n\n".join(parts)


def _over_seeds(rows: Sequence[Row], metric: str) -> str:
    values = np.array([numbers(of, metric).mean() for of in by(rows, "seed").values()])
    low, high = bootstrap_interval(interquartile_mean, values)
    return f"{float(interquartile_mean(values)):.2f} ({low:.2f} to {high:.2f})"


def _found(rows: Sequence[Row]) -> str:
    delays = [row["delay"] for row in rows if row["delay"] is not None]
    share = f"{numbers(rows, 'found').mean():.2f}"
    return f"{share} ({np.median(delays):.0f})" if delays else share


def _lost(rows: Sequence[Row]) -> str:
    usual, other = (numbers(rows, name).mean() for name in ("return", "shifted return"))
    return f"{usual - other:.1f} of {usual:.1f}"
