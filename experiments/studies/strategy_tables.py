"""What the study of strategies leaves behind: savings, differences and ranks; CSV and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from experiments.figures import STYLE, save
from experiments.results import GREY
from experiments.run import write_atomically
from experiments.statistics import Values, bootstrap_interval, interquartile_mean
from experiments.studies.summary import Row, as_csv, by, markdown

REFERENCE = "Uniform"
_RESAMPLES = 2000
_COLOURS = ("#0072b2", "#009e73", "#b34b00", "#cc79a7", "#56b4e9", "#b58900", "#222222", "#7f3c8d")


def write_tables(rows: Mapping[str, Sequence[Row]], out: Path) -> str:
    """Writes `tables.md`, a CSV with a line a batch, and the figures; returns the tables.

    Args:
        rows: Cells of "pool" and "people", either may be missing.
        out: The study's directory.
    """
    every = [row for cells in rows.values() for row in cells]
    lines = [
        {**{k: row[k] for k in ("task", "strategy", "seed", "predictor")}, "comparisons": n,
         "accuracy": accuracy, "log loss": loss}
        for row in every
        for n, accuracy, loss in zip(
            row["comparisons"], row["accuracy"], row["log loss"], strict=True
        )
    ]  # fmt: skip
    write_atomically(out / "curves.csv", as_csv(lines))
    text = _table(every)
    write_atomically(out / "tables.md", text + "\n")
    save(curves(every), out / "curves")
    return text


def labels_needed(curve: Values, comparisons: Values, level: float) -> float:
    """Comparisons at which a curve first reaches a level; NaN where it doesn't.

    Linear between batches.

    Example:
        >>> labels_needed(np.array([0.5, 0.7, 0.9]), np.array([20.0, 40.0, 60.0]), 0.8)
        50.0
    """
    reached = np.flatnonzero(curve >= level)
    if not len(reached):
        return float("nan")
    place = int(reached[0])
    if place == 0:
        return float(comparisons[0])
    low, high = curve[place - 1], curve[place]
    share = (level - low) / (high - low)
    return float(comparisons[place - 1] + share * (comparisons[place] - comparisons[place - 1]))


def labels_ratio(
    own: Values, uniform: Values, comparisons: Values, at: float
) -> tuple[float, float, float]:
    """A strategy's comparisons for uniform's accuracy at so many, over so many.

    Curves are interquartile means over seeds. Seeds are resampled together, since a seed has the
    same candidates and tests for both.

    Args:
        own: `(seeds, batches)` accuracy.
        uniform: The same of uniform comparisons.
        comparisons: `(batches,)`.
        at: Comparisons of the uniform strategy to measure at.

    Returns:
        Ratio, and its 95% bootstrap interval. A draw in which the level isn't reached counts as
        the whole budget and one batch.
    """

    def ratio(rows: NDArray[np.integer]) -> float:
        level = np.interp(at, comparisons, interquartile_mean(uniform[rows], axis=0))
        needed = labels_needed(interquartile_mean(own[rows], axis=0), comparisons, level)
        beyond = comparisons[-1] + comparisons[0]
        return float((beyond if np.isnan(needed) else needed) / at)

    rng, seeds = np.random.default_rng(0), len(own)
    drawn = [ratio(rng.integers(seeds, size=seeds)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return ratio(np.arange(seeds)), float(low), float(high)


def ratios(rows: Sequence[Row], strategy: str, at: float) -> dict[str, tuple[float, float, float]]:
    """A strategy's `labels_ratio` on each task."""
    found = {}
    for task, cells in by(rows, "task").items():
        of = by(cells, "strategy")
        x, uniform = _curves(of[REFERENCE])
        found[task] = labels_ratio(_curves(of[strategy])[1], uniform, x, at)
    return found


def curves(rows: Sequence[Row]) -> Figure:
    """Accuracy against comparisons, a panel a task, a line a strategy."""
    with mpl.rc_context(STYLE):
        tasks = by(rows, "task")
        height = -(-len(tasks) // 2)
        figure = Figure(figsize=(8.6, 0.8 + 2.9 * height), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(height, 2, squeeze=False)
        for axes in panels.flat[len(tasks) :]:
            axes.remove()
        for axes, (task, cells) in zip(panels.flat, tasks.items(), strict=False):
            others = 0
            for name, some in by(cells, "strategy").items():
                x, accuracy = _curves(some)
                reference = name == REFERENCE
                axes.plot(
                    x,
                    interquartile_mean(accuracy, axis=0),
                    color=GREY if reference else _COLOURS[others % len(_COLOURS)],
                    linestyle="--" if reference else "-",
                    linewidth=2.2 if reference else 1.3,
                    label=name,
                )
                others += not reference
            axes.set_title(task, fontsize=11)
            axes.set_xlabel("comparisons")
        for axes in panels[:, 0]:
            axes.set_ylabel("held-out answers predicted")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
            patch.set_alpha(0)
        return figure


def _table(rows: Sequence[Row]) -> str:
    tasks = by(rows, "task")
    at = min(160.0, *(0.8 * row["comparisons"][-1] for row in rows))
    ratios: dict[str, list[str]] = {}
    differences: dict[str, list[str]] = {}
    ranks: dict[str, list[float]] = {}
    for cells in tasks.values():
        of = by(cells, "strategy")
        x, uniform = _curves(of[REFERENCE])
        area = {
            name: float(interquartile_mean(_curves(some)[1].mean(1))) for name, some in of.items()
        }
        placed = stats.rankdata([-area[name] for name in of])
        for name, rank in zip(of, placed, strict=True):
            _, own = _curves(of[name])
            ranks.setdefault(name, []).append(float(rank))
            if name == REFERENCE:
                continue
            mean, low, high = labels_ratio(own, uniform, x, at)
            ratios.setdefault(name, []).append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
            gap = [np.interp(at / 2, x, curve) for curve in own - uniform]
            low, high = bootstrap_interval(interquartile_mean, np.array(gap))
            middle = float(interquartile_mean(np.array(gap)))
            differences.setdefault(name, []).append(f"{middle:+.3f} ({low:+.3f} to {high:+.3f})")
    order = sorted(ranks, key=lambda name: float(np.mean(ranks[name])))
    parts = [
        f"**Comparisons for uniform's accuracy at {at:.0f}, over {at:.0f}** (below 1 saves)",
        markdown(["", *tasks], [[name, *ratios[name]] for name in order if name in ratios]),
        f"**Accuracy at {at / 2:.0f} comparisons, less uniform's, seed by seed**",
        markdown(["", *tasks], [[name, *differences[name]] for name in order if name in ratios]),
        "**Rank by mean accuracy over the whole budget**, 1 is best",
        markdown(
            ["", *tasks, "mean"],
            [
                [name, *(f"{rank:g}" for rank in ranks[name]), f"{np.mean(ranks[name]):.1f}"]
                for name in order
            ],
        ),
    ]
    return "\n\n".join(parts)


def _curves(rows: Sequence[Row]) -> tuple[Values, Values]:
    """`(batches,)` comparisons and `(seeds, batches)` accuracies."""
    ordered = sorted(rows, key=lambda row: row["seed"])
    return np.array(ordered[0]["comparisons"], float), np.array([r["accuracy"] for r in ordered])
