"""What one task shows of query strategies: how fast each learns, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.analysis.old_stats import Values, interquartile_mean
from experiments.analysis.plots import COLOURS, GREY, STYLE

REFERENCE = "Uniform"
_LINES = ("-", "-.", ":")

Curves = Mapping[str, Values]
"""For each strategy `(seeds, batches)` accuracy."""

Interval = tuple[float, float, float]
"""A figure, and the ends of its 95% interval."""


Look = dict[str, Any]
"""How Matplotlib draws a line."""


def looks(names: list[str]) -> dict[str, Look]:
    """Colour and line of each strategy, the same in every figure of a study."""
    number = count()
    found: dict[str, Look] = {}
    for name in names:
        if name == REFERENCE:
            found[name] = {"color": GREY, "linestyle": "--", "linewidth": 2.2}
        else:
            round_, place = divmod(next(number), len(COLOURS))
            line = _LINES[round_ % len(_LINES)]
            found[name] = {"color": COLOURS[place], "linestyle": line, "linewidth": 1.4}
    return found


def task_figure(
    comparisons: Values,
    curves: Curves,
    savings: Mapping[str, Interval],
    style: Mapping[str, Look],
) -> Figure:
    """Accuracy against comparisons, above the comparisons needed over uniform's, with intervals.

    Args:
        comparisons: `(batches,)`.
        curves: Of each strategy, uniform comparisons among them.
        savings: Of each other strategy; infinite where uniform's accuracy wasn't reached.
        style: Of each strategy, as `looks` has it.
    """
    with mpl.rc_context(STYLE):
        below = 0.5 + 0.25 * len(savings)  # inches
        figure = Figure(figsize=(5.2, 3.8 + below), layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subplots(2, 1, height_ratios=[3, below])
        _accuracies(top, comparisons, curves, style)
        named: Any = {"fontsize": 9, "frameon": False, "ncols": 3}
        figure.legend(handles=list(top.lines), loc="outside upper center", **named)
        shown = [x for ends in savings.values() for x in ends if np.isfinite(x)]
        edge = 1.05 * max([1.2, *shown])
        for place, (name, (ratio, low, high)) in enumerate(savings.items()):
            colour = style[name]["color"]
            bottom.plot([min(low, edge), min(high, edge)], [place, place], color=colour)
            if np.isinf(high):  # beyond what was asked
                bottom.plot(edge, place, ">", color=colour, clip_on=False)
            if np.isfinite(ratio):
                bottom.plot(ratio, place, "o", color=colour)
        bottom.axvline(1, color=GREY, linestyle="--", linewidth=1)
        bottom.set_xlim(0, edge)
        bottom.set_ylim(len(savings) - 0.5, -0.5)
        bottom.set_yticks(range(len(savings)), list(savings))
        bottom.grid(axis="y", visible=False)
        bottom.set_xlabel("comparisons needed, over uniform's")
        return _clear(figure)


def curves_figure(tasks: Mapping[str, tuple[Values, Curves]], style: Mapping[str, Look]) -> Figure:
    """Accuracy against comparisons, a panel a task, a line a strategy: for a paper.

    Args:
        tasks: Of each the comparisons and the curves, as `task_figure` takes them.
        style: Of each strategy, as `looks` has it.
    """
    with mpl.rc_context(STYLE):
        height = -(-len(tasks) // 2)
        figure = Figure(figsize=(8.6, 0.8 + 2.9 * height), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(height, 2, squeeze=False)
        for axes in panels.flat[len(tasks) :]:
            axes.remove()
        lines: dict[str, Line2D] = {}
        for axes, (task, (comparisons, curves)) in zip(panels.flat, tasks.items(), strict=False):
            _accuracies(axes, comparisons, curves, style)
            lines |= {str(line.get_label()): line for line in axes.lines}
            axes.set_title(task, fontsize=11)
        figure.legend(
            handles=list(lines.values()), loc="outside lower center", ncols=5, frameon=False
        )
        return _clear(figure)


def _accuracies(axes: Axes, comparisons: Values, curves: Curves, style: Mapping[str, Look]) -> None:
    for name, accuracy in curves.items():
        axes.plot(comparisons, interquartile_mean(accuracy, axis=0), label=name, **style[name])
    axes.set_xlabel("comparisons")
    axes.set_ylabel("held-out answers predicted")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _clear(figure: Figure) -> Figure:
    """The page's own colour is seen through it."""
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_alpha(0)
    return figure
