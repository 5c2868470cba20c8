"""What the study of predictors leaves behind: tables as Markdown, all cells as CSV, two figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.figures import save
from experiments.run import write_atomically
from experiments.studies.predictor_figures import people, trust
from experiments.studies.summary import (
    Row,
    as_csv,
    by,
    markdown,
    mean_and_error,
    numbers,
    pooled,
)

BASELINE = "logistic regression"

_WITH_INTERVAL = ("log loss", "ECE")
_SIMULATED = (
    "accuracy",
    *(f"{metric} [as fitted]" for metric in _WITH_INTERVAL),
    "error AUROC",
    "AURC",
    "rank correlation",
    "of differences",
)
_PEOPLE = ("accuracy", "log loss", "ECE", "error AUROC", "AURC")


def write_tables(rows: Mapping[str, Sequence[Row]], out: Path) -> str:
    """Writes `tables.md`, `<kind>.csv` and the figures; returns the tables.

    Args:
        rows: Cells of "simulated", "speed" and, where there are any, "human".
        out: The study's directory.
    """
    for kind, cells in rows.items():
        plain = [{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in cells]
        write_atomically(out / f"{kind}.csv", as_csv(plain))
    parts = []
    for test in ("in distribution", "shifted"):
        parts.append(f"**Simulated, {test}**\n\n{_simulated(rows['simulated'], test)}")
    save(trust(rows["simulated"]), out / "trust")
    if "human" in rows:
        for name, cells in by(rows["human"], "data").items():
            parts.append(f"**{name}**\n\n{_people(cells)}")
        save(people(rows["human"], BASELINE), out / "people")
    parts.append(f"**Cost**\n\n{_cost(rows)}")
    text = "\n\n".join(parts)
    write_atomically(out / "tables.md", text + "\n")
    return text


def _simulated(rows: Sequence[Row], test: str) -> str:
    table = []
    for name, cells in by(rows, "predictor").items():
        tasks = list(by(cells, "task").values())

        def shown(metric: str, tasks: list[list[Row]] = tasks) -> str:
            values = [numbers(some, f"{test}/{metric}") for some in tasks]
            if np.isnan(values).any():
                return "–"
            mean, low, high = pooled(values)
            text = f"{mean:.3f}"
            return f"{text} ({low:.3f} to {high:.3f})" if metric in _WITH_INTERVAL else text

        table.append(
            [
                name,
                shown("accuracy"),
                *(f"{shown(metric)} [{shown(f'raw {metric}')}]" for metric in _WITH_INTERVAL),
                *(shown(metric) for metric in ("error AUROC", "AURC", "rank correlation")),
                shown("raw difference rank correlation"),
            ]
        )
    return markdown(["", *_SIMULATED], table)


def _people(rows: Sequence[Row]) -> str:
    table = []
    for name, cells in by(rows, "predictor").items():
        shown = []
        for metric in _PEOPLE:
            if metric in cells[0]:
                mean, error = mean_and_error(numbers(cells, metric))
                shown.append(f"{mean:.3f} ± {error:.3f}")
            else:
                shown.append("–")
        table.append([name, *shown])
    return markdown(["", *_PEOPLE], table)


def _cost(rows: Mapping[str, Sequence[Row]]) -> str:
    speed = {row["predictor"]: row for row in rows["speed"]}
    table = []
    for name, cells in by(rows["simulated"], "predictor").items():
        fast = speed[name]
        table.append(
            [
                name,
                f"{np.median(numbers(cells, 'fit seconds')):.1f}",
                f"{fast['frame us']:.0f}",
                f"{fast['frame us at 4096']:.2f}",
                f"{fast['1,000 clips ms']:.0f}",
                f"{np.median(numbers(cells, 'parameters')):,.0f}",
            ]
        )
    header = ["", "fit, s", "frame at batch 1, µs", "at batch 4,096, µs", "1,000 clips, ms"]
    return markdown([*header, "parameters"], table)
