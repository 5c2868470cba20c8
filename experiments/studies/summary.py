"""Figures of a study's cells: over seeds and tasks, with intervals; as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.analysis.old_stats import Values, bootstrap_interval, interquartile_mean

Row = Mapping[str, Any]


def pooled(samples: Sequence[Values]) -> tuple[float, float, float]:
    """Interquartile mean over tasks and seeds, and its 95% interval, stratified by task.

    Args:
        samples: For each task, one number a seed.

    Returns:
        Mean, lower and upper end (Agarwal et al. 2021, arXiv 2108.13264). Seeds are resampled
        within each task: the interval speaks of these tasks.

    Example:
        >>> pooled([np.array([0.0, 1.0]), np.array([1.0, 2.0])])[0]
        1.0
    """

    def mean(*drawn: Values) -> Values:
        return interquartile_mean(np.concatenate(drawn, -1))

    return (float(mean(*samples)), *bootstrap_interval(mean, *samples))


def mean_and_error(values: Values) -> tuple[float, float]:
    """Mean over folds, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text[1] = "|" + "---|" * len(header)
    return "\n".join(text)


def as_csv(rows: Sequence[Row]) -> str:
    """Rows of plain values as CSV, with every column that any of them has.

    Example:
        >>> as_csv([{"a": 1}, {"a": 2, "b": 3}]).splitlines()
        ['a,b', '1,', '2,3']
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def by(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    """Rows by the value of one column, in the order in which they come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def numbers(rows: Sequence[Row], metric: str | Callable[[Row], float]) -> Values:
    """One metric of each row."""
    get = metric if callable(metric) else (lambda row: row[metric])
    return np.array([get(row) for row in rows], dtype=float)


def number(value: float) -> str:
    """A number as a sentence says it: three figures or whole, with a true minus sign.

    Example:
        >>> number(1234.5), number(-12.04), number(0.0512), number(float("nan"))
        ('1,234', '−12.0', '0.051', 'not known')
    """
    if not np.isfinite(value):
        return "not known"
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2
    if 0 < size < 1:
        digits = 3
    text = f"{value:,.{digits}f}".replace("-", "−")
    return text.lstrip("−") if float(text.replace("−", "").replace(",", "")) == 0 else text
