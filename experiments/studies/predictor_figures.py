"""The two figures of the study of predictors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.analysis.plots import GREY, STYLE
from experiments.studies.summary import Row, by, mean_and_error, numbers

# Okabe & Ito's, apart for every kind of colour vision; and markers, apart without colour.
_COLOURS = ("#767676", "#0072b2", "#56b4e9", "#009e73", "#b34b00", "#cc79a7", "#b58900", "#222222")
_MARKERS = "osD^vP*X"
_KNOWN = (
    "single network",
    "DeepEnsemble",
    "RandomisedPriors",
    "MCDropout",
    "LaplaceHead",
    "Epinet",
    "GPHead",
)  # so that one looks the same in every figure


def trust(rows: Sequence[Row]) -> Figure:
    """What was said against what came true, and what goes wrong when only the surest is used.

    Args:
        rows: Cells of `simulated`.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2)
        for (title, key), axes in zip(
            (
                ("in distribution, as fitted", "in distribution/raw reliability"),
                ("in distribution, calibrated", "in distribution/reliability"),
            ),
            panels[0],
            strict=True,
        ):
            axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", linewidth=1)
            for name, some in by(rows, "predictor").items():
                said, came = _reliability([row[key] for row in some])
                axes.plot(said, came, label=name, **_look(name))
            axes.set_xlabel("probability that was said")
            axes.set_title(title, fontsize=11)
        panels[0, 0].set_ylabel("how often it came true")
        for (title, key), axes in zip(
            (
                ("in distribution", "in distribution/risk by coverage"),
                ("far better behaviour", "shifted/risk by coverage"),
            ),
            panels[1],
            strict=True,
        ):
            for name, some in by(rows, "predictor").items():
                risk = np.mean([row[key] for row in some], 0)
                share = np.arange(1, len(risk) + 1) / len(risk)
                axes.plot(share, risk, color=_look(name)["color"], label=name)
            axes.set_xlabel("answers used, the surest first")
            axes.set_title(title, fontsize=11)
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        panels[1, 0].set_ylabel("of those, wrong")
        top = max(axes.get_ylim()[1] for axes in panels[1])
        for axes in panels[1]:
            axes.set_ylim(0, top)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        for patch in (figure.patch, *(axes.patch for axes in panels.flat)):
            patch.set_alpha(0)
        return figure


def people(rows: Sequence[Row], baseline: str) -> Figure:
    """Accuracy and log loss on people's answers, less those of the regression on the same fold.

    Args:
        rows: Cells of `human`, with the regression's among them.
        baseline: Its name.
    """
    with mpl.rc_context(STYLE):
        sets = by(rows, "data")
        figure = Figure(figsize=(8.6, 1.2 + 1.1 * len(sets)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, metric, title in zip(
            panels,
            ("accuracy", "log loss"),
            ("accuracy: to the right is better", "log loss: to the left is better"),
            strict=True,
        ):
            axes.axvline(0, color=GREY, linestyle=":", linewidth=1)
            for place, some in enumerate(sets.values()):
                of = by(some, "predictor")
                reference = _by_fold(of.pop(baseline), metric)
                for i, (name, cells) in enumerate(of.items()):
                    gap = _by_fold(cells, metric) - reference
                    mean, error = mean_and_error(gap)
                    at = place + (i - (len(of) - 1) / 2) * 0.11
                    axes.errorbar(mean, at, xerr=error, label=name, **_look(name))
            axes.set_title(f"{title}\nthan {baseline}", fontsize=11)
        panels[0].set_yticks(range(len(sets)), list(sets))
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(
            unique.values(), unique.keys(), loc="outside lower center", ncols=4, frameon=False
        )
        for patch in (figure.patch, *(axes.patch for axes in panels)):
            patch.set_alpha(0)
        return figure


def _look(name: str) -> dict[str, str]:
    place = _KNOWN.index(name) if name in _KNOWN else len(_KNOWN)
    return {"color": _COLOURS[place], "marker": _MARKERS[place]}


def _reliability(curves: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Several curves' upper halves, joined bin by bin by the weight of each."""
    edges = np.linspace(0.5, 1, 6)
    columns = [np.concatenate([curve[name] for curve in curves]) for name in curves[0]]
    said, came, weight = columns
    which = np.digitize(said, edges[1:-1])
    upper = said >= 0.5
    joined = []
    for place in range(5):
        here = upper & (which == place)
        if weight[here].sum() > 0:
            joined.append([np.average(x[here], weights=weight[here]) for x in (said, came)])
    return np.array(joined).reshape(-1, 2)[:, 0], np.array(joined).reshape(-1, 2)[:, 1]


def _by_fold(rows: Sequence[Row], metric: str) -> np.ndarray:
    return numbers(sorted(rows, key=lambda row: row["fold"]), metric)
