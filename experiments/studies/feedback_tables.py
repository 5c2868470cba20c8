"""What the study of feedback leaves behind: comparisons needed, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from experiments.analysis.old_page import (
    COLOURS,
    LEAST_SEEDS,
    About,
    Section,
    Table,
    plural,
    verdict,
    write_report,
)
from experiments.analysis.old_stats import bootstrap_interval, interquartile_mean
from experiments.analysis.plots import ARMS, GREY, STYLE
from experiments.studies.feedback_savings import (
    SHARE,
    arm,
    at_same_budget,
    by_budget,
    labels,
    needed,
    unsure_ratio,
)
from experiments.studies.summary import Row, as_csv, by, number, numbers
from rewardmodels.saving import write_text_atomically

_LINES = tuple(colour for colour in COLOURS if colour != ARMS["task"].colour)


def write_tables(rows: Sequence[Row], mode: str, out: Path, about: About) -> None:
    """Writes `report.html` and what belongs to it, and a CSV, of one mode's cells.

    Args:
        rows: Of `online_cell` or of `pool_cell`.
        mode: "online" or "pool", which has a directory of its own.
        out: The study's directory.
        about: How the cells were made.
    """
    if mode == "pool":
        lines = [
            {**{k: row[k] for k in ("task", "teacher", "seed")}, "comparisons": n, "accuracy": a}
            for row in rows
            for n, a in zip(row["comparisons"], row["accuracy"], strict=True)
        ]
        sections = [_accuracies(rows)]
    else:
        lines = [{k: v for k, v in row.items() if not k.startswith("by ")} for row in rows]
        sections = [_returns(rows), _trivial(rows), _asked(rows)]
    write_report(out / mode, f"How much feedback is needed ({mode})", sections, about)
    write_text_atomically(out / mode / "cells.csv", as_csv(lines))


def _returns(rows: Sequence[Row]) -> Section:
    told = []
    for task, cells in by(rows, "task").items():
        seeds = len(by(cells, "seed"))
        if arm(cells, "task") and arm(cells, "zero"):
            parts = [
                f"{label}: {found} comparisons"
                if (found := needed(cells, label)).comparisons < np.inf
                else f"{label}: not reached with {max(by_budget(cells, label))}"
                for label in labels(cells)
            ]
            told.append(
                f"{task}: {SHARE:.0%} of the return on its own reward "
                f"({number(_mean(arm(cells, 'task')))}) take, with a 95% interval over "
                f"{plural(seeds, 'seed', 'seeds')}: {'; '.join(parts)}."
                + (" So few seeds are a hint at most." if seeds < LEAST_SEEDS else "")
            )
    table = Table(
        ["task", "reward", "comparisons", "true return", "correlation with the true reward"],
        _online_lines(rows),
    )
    return Section("Return by number of comparisons", told, returns(rows), table)


def _trivial(rows: Sequence[Row]) -> Section:
    told = []
    for task, cells in by(rows, "task").items():
        own = arm(cells, "task")
        parts = [
            f"{ARMS[name].name} {number(_mean(some))}"
            for name in ARMS
            if name not in ("task", "learned") and (some := arm(cells, name))
        ]
        if own and parts:
            told.append(
                f"{task}, where its own reward gives {number(_mean(own))}: {', '.join(parts)}."
            )
    return Section("What an agent does that has nothing to learn from", told)


def _asked(rows: Sequence[Row]) -> Section:
    told = []
    for task, cells in by(rows, "task").items():
        for label in labels(cells):
            constant = f"Constant, {label.rpartition(', ')[2]}"
            if label == constant or constant not in labels(cells):
                continue
            ratio, low, high = unsure_ratio(cells, label, constant)
            said = verdict(
                low, high, len(by(cells, "seed")), even=1, below="it saves", above="it costs more"
            )
            told.append(
                f"{task}: {label} takes {ratio:.2f} of the comparisons that {constant} takes for "
                f"the same return ({low:.2f} to {high:.2f}): {said}."
                + _beside(cells, label, constant)
            )
    return Section("When they were asked for", told, asked(rows))


def _beside(cells: Sequence[Row], label: str, constant: str) -> str:
    found = at_same_budget(cells, label, constant)
    if found is None:
        return ""
    share, gap, low, high = found
    return (
        f" With the same budget, {max(by_budget(cells, label))}, it asks for {share:.0%} of what "
        f"the constant one does, and its return less the constant one's is {number(gap)} "
        f"({number(low)} to {number(high)})."
    )


def _accuracies(rows: Sequence[Row]) -> Section:
    told = []
    for task, cells in by(rows, "task").items():
        teachers = by(cells, "teacher")
        finals = {
            name: np.array([row["accuracy"][-1] for row in some]) for name, some in teachers.items()
        }
        reference, *others = finals
        for name in others:
            low, high = bootstrap_interval(
                lambda a, b: interquartile_mean(a) - interquartile_mean(b),
                finals[name], finals[reference],
            )  # fmt: skip
            gap = float(interquartile_mean(finals[name]) - interquartile_mean(finals[reference]))
            told.append(
                f"{task}: answered by {name} and not {reference}, accuracy at the end is "
                f"{gap:+.3f} ({low:+.3f} to {high:+.3f}): {verdict(low, high, len(finals[name]))}."
            )
    return Section("Accuracy by number of comparisons", told, accuracies(rows), _pool_table(rows))


def returns(rows: Sequence[Row]) -> Figure:
    """Final true return against answers, a panel a task, a line for each schedule and teacher."""
    figure, panels = _panels(rows, "true return of the final policy")
    for axes, cells in panels:
        for name, some in ((n, arm(cells, n)) for n in ARMS if n != "learned"):
            if some:
                values = numbers(some, "return")
                axes.axhline(
                    float(interquartile_mean(values)), color=ARMS[name].colour,
                    linestyle=ARMS[name].line, linewidth=1.2, label=ARMS[name].name,
                )  # fmt: skip
                if name == "task":
                    axes.axhspan(*bootstrap_interval(interquartile_mean, values),
                                 color=ARMS[name].colour, alpha=0.1, linewidth=0)  # fmt: skip
        for colour, label in zip(_LINES, labels(cells), strict=False):
            points = []
            for some in by_budget(cells, label).values():
                values = numbers(some, "return")
                low, high = bootstrap_interval(interquartile_mean, values)
                middle = float(interquartile_mean(values))
                points.append((numbers(some, "comparisons").mean(), middle, low, high))
            x, y, low, high = np.array(points).T
            axes.errorbar(x, y, yerr=[y - low, high - y], color=colour, marker="o", capsize=2,
                          label=label)  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_xlabel("comparisons answered")
    return _finished(figure)


def asked(rows: Sequence[Row]) -> Figure:
    """Answers against steps of training, mean over seeds, at each schedule's largest budget."""
    figure, panels = _panels(rows, "comparisons answered")
    for axes, cells in panels:
        for colour, label in zip(_LINES, labels(cells), strict=False):
            some = max(by_budget(cells, label).items())[1]
            rounds = min(len(row["by step"]) for row in some)
            x, y = (
                np.mean([row[name][:rounds] for row in some], 0)
                for name in ("by step", "by answers")
            )
            axes.step(x, y, color=colour, where="post", label=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("steps of the policy's training")
    return _finished(figure)


def accuracies(rows: Sequence[Row]) -> Figure:
    """Accuracy against comparisons, a panel a task, a line a teacher."""
    figure, panels = _panels(rows, "held-out answers predicted")
    for axes, cells in panels:
        for colour, (teacher, some) in zip(_LINES, by(cells, "teacher").items(), strict=False):
            y = interquartile_mean(np.array([row["accuracy"] for row in some]), axis=0)
            axes.plot(some[0]["comparisons"], y, color=colour, label=teacher)
        axes.set_xlabel("comparisons")
    return _finished(figure)


def _online_lines(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for task, cells in by(rows, "task").items():
        for name in ARMS:
            if some := arm(cells, name):
                lines.append([task, ARMS[name].name, "0", _interval(some, "return"), ""])
        for label in labels(cells):
            for some in by_budget(cells, label).values():
                answers = f"{numbers(some, 'comparisons').mean():.0f}"
                skipped = numbers(some, "skipped").mean()
                answers += f" ({skipped:.0f} skipped)" if skipped else ""
                found = _interval(some, "return"), f"{numbers(some, 'correlation').mean():.2f}"
                lines.append([task, label, answers, *found])
    return lines


def _pool_table(rows: Sequence[Row]) -> Table:
    x = rows[0]["comparisons"]
    places = [int(np.argmin(np.abs(np.array(x) - x[-1] * part))) for part in (0.25, 0.5, 1)]
    lines = [
        [
            task, teacher,
            *(f"{interquartile_mean(np.array([row['accuracy'][i] for row in some])):.3f}"
              for i in places),
        ]
        for task, cells in by(rows, "task").items()
        for teacher, some in by(cells, "teacher").items()
    ]  # fmt: skip
    return Table(["task", "teacher", *(f"accuracy at {x[i]}" for i in places)], lines)


def _mean(rows: Sequence[Row]) -> float:
    return float(interquartile_mean(numbers(rows, "return")))


def _interval(rows: Sequence[Row], metric: str) -> str:
    values = numbers(rows, metric)
    if len(values) == 1:
        return number(float(values[0]))
    low, high = bootstrap_interval(interquartile_mean, values)
    return f"{number(float(interquartile_mean(values)))} ({number(low)} to {number(high)})"


def _panels(rows: Sequence[Row], y: str) -> tuple[Figure, list[tuple[Axes, Sequence[Row]]]]:
    with mpl.rc_context(STYLE):
        tasks = by(rows, "task")
        figure = Figure(figsize=(3.6 * len(tasks) + 0.8, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        (panels,) = figure.subplots(1, len(tasks), squeeze=False)
        panels[0].set_ylabel(y)
        for axes, task in zip(panels, tasks, strict=True):
            axes.set_title(task, fontsize=11, color=GREY)
        return figure, list(zip(panels, tasks.values(), strict=True))


def _finished(figure: Figure) -> Figure:
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_alpha(0)
    return figure
