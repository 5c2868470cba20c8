"""House style of every figure: palette, layout, labels beside the lines, PDF and SVG files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from experiments.analysis.stats import Interval, interquartile_mean

# Distinguishable with every kind of colour vision (mostly Okabe & Ito 2008).
INK, FAINT = "#222222", "#d9d9d9"
BLUE, ORANGE, GREY = "#0072b2", "#b34b00", "#767676"
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#b58900", "#7f3c8d", INK, "#56b4e9")

_MARKERS, _DASHES = "osD^vP*X", ("-", "-.", ":")

STYLE: Any = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "axes.unicode_minus": True,
    "svg.hashsalt": "rewardmodels",  # or the same figure gives another file each time
    "pdf.fonttype": 42,  # TrueType, which publishers accept
}


@dataclass(frozen=True)
class Arm:
    """Name and look of runs that optimise one kind of reward, the same in every figure."""

    name: str
    colour: str
    line: str
    marker: str


# Dashes and markers tell the arms apart where colour can't, on paper and in grey.
ARMS = {
    "learned": Arm("learned reward", BLUE, "-", "o"),
    "task": Arm("the task's own reward", ORANGE, "--", "s"),
    "zero": Arm("zero reward", GREY, ":", "^"),
    "constant": Arm("constant reward", GREY, "-.", "v"),
    "random": Arm("random reward", GREY, "--", "x"),
}
OTHER = Arm("unknown reward", INK, "-.", "D")


Look = Mapping[str, Any]
"""Colour, dashes and marker, as keyword arguments of Matplotlib's `plot`."""


def looks(names: Sequence[str], reference: str | None = None) -> dict[str, Look]:
    """Choose the look of each arm.

    Args:
        names: Arms, in the order that fixes their looks.
        reference: Arm that the others are compared with, drawn grey and dashed.
    """
    found: dict[str, Look] = {}
    n = len(COLOURS)
    for place, name in enumerate(name for name in dict.fromkeys(names) if name != reference):
        colour, dashes = COLOURS[place % n], _DASHES[place // n % 3]
        found[name] = {"color": colour, "linestyle": dashes, "marker": _MARKERS[place % n]}
    if reference is not None:
        found[reference] = {"color": GREY, "linestyle": "--", "linewidth": 2.2}
    return found


@contextmanager
def style() -> Iterator[None]:
    """Apply the house style, and restore the caller's Matplotlib settings afterwards."""
    with mpl.rc_context(STYLE):
        yield


def panels(
    n: int, *, columns: int = 1, width: float = 5.2, height: float = 3.3, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure of n panels with a transparent background.

    Args:
        n: Number of panels.
        columns: Panels side by side.
        width: Of the figure, inches; 5.2 is what a phone shows without shrinking the text.
        height: Of one row, inches.
        options: Passed to `Figure.subplots`.
    """
    rows = -(-n // columns)
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat[n:]:
        axes.remove()
    for patch in (figure.patch, *(axes.patch for axes in grid.flat[:n])):
        patch.set_alpha(0)
    return figure, list(grid.flat[:n])


def legend_below(figure: Figure, columns: int = 4) -> None:
    """Put one legend for all panels below the figure, each name once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=columns,
            frameon=False,
        )  # fmt: skip


def by_task(
    results: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame], None],
    *,
    title: str = "{}",
    legend: int = 4,
    **layout: Any,
) -> Figure:
    """Make a figure with a panel for each task, and one legend below all.

    Args:
        results: Rows with the column `task`.
        draw: Draws the rows of one task.
        title: Of a panel, with a place for the task's name.
        legend: Columns of the legend.
        layout: Arguments of `panels`; where there are fewer tasks than columns, as many as tasks.
    """
    tasks = results.groupby("task", sort=False)
    columns = min(layout.pop("columns", 3), len(tasks))
    with style():
        figure, each = panels(len(tasks), columns=columns, **{"width": 8.6, **layout})
        for axes, (task, rows) in zip(each, tasks, strict=True):
            draw(axes, rows)
            axes.set_title(title.format(task), fontsize=11)
        legend_below(figure, legend)
    return figure


def accuracy_by_task(
    results: pd.DataFrame, by: str, look: Mapping[str, Look], **options: Any
) -> Figure:
    """Draw accuracy against comparisons, a panel for each task (`by_task`).

    Args:
        results: Rows with `task`, `comparisons`, `accuracy` and the arm, one for each seed.
        by: Column that names the arm, each of which has a line: interquartile means over seeds.
        look: Of each arm, as `looks` returns them.
        options: Of `by_task`.
    """

    def draw(axes: Axes, on_task: pd.DataFrame) -> None:
        for name, rows in on_task.groupby(by, sort=False):
            line = rows.groupby("comparisons")["accuracy"].apply(interquartile_mean)
            axes.plot(line.index, line.to_numpy(), label=name, **look[str(name)])
        axes.set_xlabel("comparisons")
        axes.set_ylabel("accuracy")

    return by_task(results, draw, **options)


def interval_rows(
    axes: Axes, intervals: Mapping[str, Interval], look: Mapping[str, Look], even: float
) -> None:
    """Draw a horizontal interval for each arm, one below the other, and a line at no difference.

    Args:
        axes: To draw on.
        intervals: Of each arm; infinite ends become arrows.
        look: Of each arm, as `looks` returns them.
        even: Value of no difference: 0 for differences, 1 for ratios.
    """
    ends = np.array([[even, even, even], *intervals.values()])
    ends = ends[np.isfinite(ends)]
    pad = 0.05 * max(np.ptp(ends), 1e-9)
    left, right = ends.min() - pad, ends.max() + pad
    for place, (name, (value, low, high)) in enumerate(intervals.items()):
        colour = look[name]["color"]
        axes.plot(np.clip([low, high], left, right), [place, place], color=colour, marker="")
        for end, edge, marker in ((low, left, "<"), (high, right, ">")):
            if np.isinf(end):
                axes.plot(edge, place, marker, color=colour, clip_on=False)
        if np.isfinite(value):
            axes.plot(value, place, look[name].get("marker", "o"), color=colour)
    axes.axvline(even, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlim(left, right)
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.grid(axis="y", visible=False)


def save(figure: Figure, stem: Path) -> str:
    """Write `stem.svg`, for a page, and `stem.pdf`, for a paper; return the SVG's text."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out now; each format would do so twice more
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
    return stem.with_suffix(".svg").read_text("utf-8")


End = tuple[float, float, str, str]
"""End of a line: x, y, its name and colour."""


def label_lines(figure: Figure, ends: Mapping[Axes, Sequence[End]]) -> Figure:
    """Write names where lines end, nudged apart so that none overlaps.

    Args:
        figure: Of the lines.
        ends: For each panel the end of each line, its name and colour.
    """
    for axes, lines in ends.items():
        axes.set_xlim(0, max(1, *(x for x, *_ in lines)))
        axes.margins(y=0.08)
    figure.draw_without_rendering()  # only now is it known where on the page a value falls
    for axes, each in ends.items():
        lines = _merged(each)
        texts = [textwrap.fill(name, 14) for _, _, name, _ in lines]
        points = 72 / figure.dpi
        at = [points * float(axes.transData.transform((x, y))[1]) for x, y, _, _ in lines]
        placed = spread_labels(at, [7.0 * (1 + text.count("\n")) for text in texts])
        for (x, y, _, colour), text, old, new in zip(lines, texts, at, placed, strict=True):
            axes.annotate(
                text, (x, y), (8, new - old), textcoords="offset points", color=colour,
                va="center", linespacing=1.0, parse_math=False, annotation_clip=False,
            )  # fmt: skip
    return figure


def _merged(ends: Sequence[End]) -> list[End]:
    """One label for all lines of a name, at the mean of their ends."""
    merged = []
    for name in dict.fromkeys(name for _, _, name, _ in ends):
        x, y, _, colours = zip(*(end for end in ends if end[2] == name), strict=True)
        shown = name if len(x) == 1 else f"{name}, {len(x)} runs"
        merged.append((max(x), float(np.mean(y)), shown, colours[0]))
    return merged


def spread_labels(centres: Sequence[float], halves: Sequence[float]) -> list[float]:
    """Move labels along a line, as little as their order allows, until none overlaps the next.

    Args:
        centres: Where each would like to be.
        halves: Half of each one's height, in the same unit.

    Returns:
        Where each goes, by least squares.

    Example:
        >>> spread_labels([0.0, 1.0, 50.0], [5.0, 5.0, 5.0])
        [-4.5, 5.5, 50.0]
    """
    order = np.argsort(centres, kind="stable")
    wanted, half = np.asarray(centres)[order], np.asarray(halves)[order]
    # Less the least distances, the places only have to rise.
    least = np.cumsum(half) + np.cumsum([0.0, *half[:-1]])
    placed = np.empty(len(order))
    placed[order] = isotonic_regression(wanted - least).x + least
    return placed.tolist()
