"""What the study of feedback leaves behind: comparisons needed, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.figures import STYLE
from experiments.results import ARMS, GREY
from experiments.run import write_atomically
from experiments.sentences import number
from experiments.statistics import Values, bootstrap_interval, interquartile_mean
from experiments.studies.report import (
    COLOURS,
    LEAST_SEEDS,
    About,
    Section,
    Table,
    plural,
    verdict,
    write_report,
)
from experiments.studies.strategy_savings import labels_needed
from experiments.studies.summary import Row, as_csv, by, numbers

SHARE = 0.9  # of what the task's own reward gives
_RESAMPLES = 2000
_LINES = tuple(colour for colour in COLOURS if colour != ARMS["task"].colour)


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
    own = _resampled(_arm(rows, "task"))
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
    asked = max(_budgets(rows, label).items())[1]
    mean = numbers(asked, "comparisons").mean()
    x, y = _lines(rows, constant)
    reached = [_crossing(*line) for line in zip(x, y, _resampled(asked), strict=True)]
    ratios = mean / np.maximum(np.minimum(reached, x[:, -1]), 1.0)
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    return float(ratios[0]), float(low), float(high)


def labelled(row: Row) -> str:
    """Which line of the figure a cell belongs to: schedule and teacher, or the teacher alone."""
    schedule = row.get("schedule", "")
    return f"{schedule}, {row['teacher']}" if schedule else str(row["teacher"])


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
    write_atomically(out / mode / "cells.csv", as_csv(lines))


def _returns(rows: Sequence[Row]) -> Section:
    told = []
    for task, cells in by(rows, "task").items():
        seeds = len(by(cells, "seed"))
        if _arm(cells, "task") and _arm(cells, "zero"):
            parts = [
                f"{label}: {found} comparisons"
                if (found := needed(cells, label)).comparisons < np.inf
                else f"{label}: not reached with {max(_budgets(cells, label))}"
                for label in _labels(cells)
            ]
            told.append(
                f"{task}: {SHARE:.0%} of the return on its own reward "
                f"({number(_mean(_arm(cells, 'task')))}) take, with a 95% interval over "
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
        own = _arm(cells, "task")
        parts = [
            f"{ARMS[name].name} {number(_mean(some))}"
            for name in ARMS
            if name not in ("task", "learned") and (some := _arm(cells, name))
        ]
        if own and parts:
            told.append(
                f"{task}, where its own reward gives {number(_mean(own))}: {', '.join(parts)}."
            )
    return Section("What an agent does that has nothing to learn from", told)


def _asked(rows: Sequence[Row]) -> Section:
    told = []
    for task, cells in by(rows, "task").items():
        if {"WhenUnsure, oracle", "Constant, oracle"} <= set(_labels(cells)):
            ratio, low, high = unsure_ratio(cells)
            said = verdict(
                low, high, len(by(cells, "seed")), even=1, below="it saves", above="it costs more"
            )
            told.append(
                f"{task}: asking when unsure takes {ratio:.2f} of the comparisons that a constant "
                f"schedule takes for the same return ({low:.2f} to {high:.2f}): {said}."
            )
    return Section("When they were asked for", told, asked(rows))


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
        for name, some in ((n, _arm(cells, n)) for n in ARMS if n != "learned"):
            if some:
                values = numbers(some, "return")
                axes.axhline(
                    float(interquartile_mean(values)), color=ARMS[name].colour,
                    linestyle=ARMS[name].line, linewidth=1.2, label=ARMS[name].name,
                )  # fmt: skip
                if name == "task":
                    axes.axhspan(*bootstrap_interval(interquartile_mean, values),
                                 color=ARMS[name].colour, alpha=0.1, linewidth=0)  # fmt: skip
        for colour, label in zip(_LINES, _labels(cells), strict=False):
            points = []
            for some in _budgets(cells, label).values():
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
        for colour, label in zip(_LINES, _labels(cells), strict=False):
            some = max(_budgets(cells, label).items())[1]
            rounds = min(len(row["by step"]) for row in some)
            x, y = (
                np.mean([row[name][:rounds] for row in some], 0)
                for name in ("by step", "by answers")
            )
            axes.step(x, y, color=colour, where="post", label=label)
        axes.set_ylim(bottom=0)
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
            if some := _arm(cells, name):
                lines.append([task, ARMS[name].name, "0", _interval(some, "return"), ""])
        for label in _labels(cells):
            for some in _budgets(cells, label).values():
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


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(labelled(row) for row in rows if row["reward"] == "learned"))


def _arm(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["reward"] == name != "learned"]


def _budgets(rows: Sequence[Row], label: str) -> dict[int, list[Row]]:
    own = [row for row in rows if row["reward"] == "learned" and labelled(row) == label]
    return dict(sorted(by(own, "budget").items()))


def _mean(rows: Sequence[Row]) -> float:
    return float(interquartile_mean(numbers(rows, "return")))


def _resampled(rows: Sequence[Row]) -> Values:
    """Interquartile mean return over seeds, and then that of each bootstrap draw of the seeds."""
    values = numbers(rows, "return")
    # Another draw for each sample, the same for the same one.
    rng = np.random.default_rng(crc32(values.tobytes()))
    drawn = values[rng.integers(len(values), size=(_RESAMPLES, len(values)))]
    return np.append(interquartile_mean(values), interquartile_mean(drawn))


def _lines(rows: Sequence[Row], label: str) -> tuple[Values, Values]:
    """Answers and returns, from none and the zero reward's to the largest budget's; by draw."""
    budgets = list(_budgets(rows, label).values())
    x = [0.0, *(float(numbers(some, "comparisons").mean()) for some in budgets)]
    y = [_resampled(some) for some in (_arm(rows, "zero"), *budgets)]
    return np.tile(x, (_RESAMPLES + 1, 1)), np.stack(y, axis=1)


def _crossing(x: Values, y: Values, level: float) -> float:
    found = labels_needed(y, x, level)
    return np.inf if np.isnan(found) else found


def _interval(rows: Sequence[Row], metric: str) -> str:
    values = numbers(rows, metric)
    if len(values) == 1:
        return number(float(values[0]))
    low, high = bootstrap_interval(interquartile_mean, values)
    return f"{number(float(interquartile_mean(values)))} ({number(low)} to {number(high)})"


def _count(value: float) -> str:
    return "more than the budget" if value == np.inf else f"{value:.0f}"


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
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_alpha(0)
    return figure
