"""What the study of predictors leaves behind: its report with tables and figures, and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.analysis.old_page import (
    About,
    Section,
    Table,
    about_cells,
    as_markdown,
    command_line,
    write_report,
)
from experiments.studies.predictor_figures import people, trust
from experiments.studies.predictor_sentences import (
    against_baseline,
    against_first,
    calibrating,
    in_short,
    surest_half,
)
from experiments.studies.summary import (
    Row,
    as_csv,
    by,
    mean_and_error,
    numbers,
    pooled,
)
from rewardmodels.saving import write_text_atomically

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
    """Writes the report with `tables.md` and figures, and `<kind>.csv`; returns the tables.

    Args:
        rows: Cells of "simulated", "speed" and, where there are any, "human".
        out: The study's directory.
    """
    out.mkdir(parents=True, exist_ok=True)
    for kind, cells in rows.items():
        plain = [{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in cells]
        write_text_atomically(out / f"{kind}.csv", as_csv(plain))
    simulated_rows, sections = rows["simulated"], []
    for test in ("in distribution", "shifted"):
        said = against_first(simulated_rows, test)
        sections.append(Section(f"Simulated, {test}", said, table=_simulated(simulated_rows, test)))
    sections.insert(
        0,
        Section(
            "Trust",
            [*calibrating(simulated_rows), *surest_half(simulated_rows)],
            trust(simulated_rows),
        ),
    )
    if "human" in rows:
        human = rows["human"]
        sections.append(
            Section("People", [in_short(human, BASELINE)],
                    people(human, BASELINE))
        )  # fmt: skip
        for name, cells in by(human, "data").items():
            sections.append(Section(f"People: {name}", against_baseline(name, cells, BASELINE),
                                    table=_people(cells)))  # fmt: skip
    sections.append(Section("Cost", [_fastest(rows["speed"])], table=_cost(rows)))
    write_report(out, "May its uncertainty be believed?", sections, _about(rows, out))
    return as_markdown(sections)


def _about(rows: Mapping[str, Sequence[Row]], out: Path) -> About:
    first, cells = rows["simulated"][0], rows["simulated"]
    settings = {
        "data": rows["human"][0].get("folder") if "human" in rows else None,
        "tasks": list(by(cells, "task")),
        "predictors": list(by(cells, "predictor")),
        **{k: first[k] for k in ("comparisons", "length", "tests") if k in first},
        "seeds": len(by(cells, "seed")),
    }
    flags = {**settings, "pools": first.get("pools"), "out": out}
    return about_cells(
        [row for some in rows.values() for row in some],
        out / "cells",
        command=command_line("study predictors", flags),
        seeds=settings["seeds"],
        settings=settings,
    )


def _fastest(rows: Sequence[Row]) -> str:
    quick = min(rows, key=lambda row: row["frame us"])
    return (
        f"Of single frames {quick['predictor']} is the quickest: "
        f"{quick['frame us']:.0f} µs each. Medians, on one thread of one machine; how far they "
        "vary was not measured."
    )


def _simulated(rows: Sequence[Row], test: str) -> Table:
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
    return Table(["", *_SIMULATED], table)


def _people(rows: Sequence[Row]) -> Table:
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
    return Table(["", *_PEOPLE], table)


def _cost(rows: Mapping[str, Sequence[Row]]) -> Table:
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
    return Table([*header, "parameters"], table)
