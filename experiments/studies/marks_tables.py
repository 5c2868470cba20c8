"""What the study of marks leaves behind: comparisons saved, and what one mark was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np

from experiments.analysis.page import (
    About,
    Section,
    Table,
    as_markdown,
    plural,
    verdict,
    write_report,
)
from experiments.analysis.stats import Values, interquartile_mean
from experiments.studies.strategy_figures import Interval, curves_figure, looks
from experiments.studies.strategy_savings import labels_needed, labels_ratio
from experiments.studies.summary import Row, as_csv, by, pooled
from rewardmodels.saving import write_text_atomically

_RESAMPLES = 2000
_NAMES = {0: "comparisons alone", 1: "one clip marked", 2: "both clips marked"}
_LEVEL = 0.8  # of the comparisons there were; whose accuracy has to be reached
_NEVER = 1 - 2 / _LEVEL  # as if it had been reached with twice the comparisons there were
TARGET = 0.25
"""Share of the comparisons that marks were to save."""


def write_tables(rows: Sequence[Row], out: Path, about: About, *, note: str = "") -> str:
    """Writes the report with `tables.md` and figures, and `curves.csv`; returns the tables.

    Args:
        rows: Cells of `marks_cell`; some may be missing.
        out: The study's directory.
        about: How they were made.
        note: What a reader has to know first.
    """
    figures = ("marks", "accuracy", "log loss", "frame correlation")
    lines = [
        {**{k: row[k] for k in ("task", "marked", "seed", "predictor")}, "comparisons": n,
         **{name: row[name][at] for name in figures}}
        for row in rows for at, n in enumerate(row["counts"])
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "curves.csv", as_csv(lines))
    tasks = {task: cells for task, cells in by(rows, "task").items() if _compared(cells)}
    sections = [_task(task, cells) for task, cells in tasks.items()]
    told = [_together(tasks, marked) for marked in (1, 2)]
    sections += [section for section in told if section]
    lead = [note, *(section.sentences[0] for section in told if section)]
    if not tasks:
        lead.append("No seed has cells both with marks and without yet.")
    write_report(out, "What a mark is worth", sections, about, lead=" ".join(lead).strip())
    return as_markdown(sections)


def marks_saving(rows: Sequence[Row], marked: int = 2) -> dict[str, Interval]:
    """The share of comparisons that marks save on each task, and its 95% bootstrap interval.

    One less `labels_ratio`: comparisons beside which marks were given until accuracy was what
    comparisons alone reach with four fifths of their number, over the comparisons these need.
    Below 0 where marks cost accuracy; where it isn't reached at all, as if it had been with twice
    the comparisons there were.

    Args:
        rows: Cells of `marks_cell`.
        marked: How many of each comparison's clips were marked.
    """
    found = {}
    for task, cells in by(rows, "task").items():
        if marked in _compared(cells):
            counts, at, own, alone = _beside(cells, marked)
            ratio, low, high = (max(1 - r, _NEVER) for r in labels_ratio(own, alone, counts, at))
            found[task] = ratio, high, low
    return found


def worth(own: Values, alone: Values, counts: Values, marks: Values, place: int) -> Interval:
    """Comparisons that one mark was worth: how many more reach the same without, over the marks.

    Args:
        own: `(seeds, counts)` accuracy with marks.
        alone: The same without.
        counts: `(counts,)` comparisons.
        marks: `(seeds, counts)` marks that were given with them.
        place: Which count.

    Returns:
        Comparisons a mark, and its 95% bootstrap interval over seeds; infinite where comparisons
        alone don't reach the accuracy with the comparisons there were, which are never
        extrapolated.

    Example:
        >>> alone, own = np.array([[0.5, 0.6, 0.7]]), np.array([[0.6, 0.7, 0.8]])
        >>> counts, marks = np.array([10.0, 20.0, 40.0]), np.array([[20, 40, 80]])
        >>> worth(own, alone, counts, marks, place=1)
        (0.5, 0.5, 0.5)
    """
    seeds = len(own)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([np.arange(seeds)[None], rng.integers(seeds, size=(_RESAMPLES, seeds))])
    reached = interquartile_mean(own[drawn, place], axis=1)
    curves = interquartile_mean(alone[drawn], axis=1)
    given = np.maximum(marks[drawn, place].mean(1), 1)
    needed = [labels_needed(*of) for of in zip(curves, repeat(counts), reached, strict=False)]
    values = (np.array(needed) - counts[place]) / given
    found = np.nan_to_num(values, nan=np.inf)
    low, high = np.quantile(found[1:], [0.025, 0.975], method="inverted_cdf")
    return float(found[0]), float(low), float(high)


def _compared(cells: Sequence[Row]) -> list[int]:
    """Numbers of marked clips that share a seed with none."""
    seeds = {marked: {row["seed"] for row in of} for marked, of in by(cells, "marked").items()}
    return sorted(m for m in seeds if m and seeds[m] & seeds.get(0, set()))


def _of(cells: Sequence[Row], marked: int, name: str) -> Values:
    """`(seeds, counts)` of one figure, of the seeds that also stand there without marks."""
    own, alone = (
        {row["seed"]: row for row in cells if row["marked"] == which} for which in (marked, 0)
    )
    others = alone if marked else own
    shared = sorted(set(own) & set(others))
    return np.array([own[seed][name] for seed in shared], float)


def _beside(cells: Sequence[Row], marked: int) -> tuple[Values, float, Values, Values]:
    """Counts, where savings are measured, and accuracies with marks and without."""
    counts = np.array(cells[0]["counts"], float)
    with_ = {row["seed"] for row in cells if row["marked"] == marked}
    both = [row for row in cells if row["marked"] == marked or row["seed"] in with_]
    own, alone = (_of(both, which, "accuracy") for which in (marked, 0))
    return counts, _LEVEL * counts[-1], own, alone


def _share(ends: Interval) -> str:
    """A saving in percent, its interval behind it."""
    value, low, high = ("never" if x <= _NEVER else f"{x:.0%}" for x in ends)
    return f"{value} ({low} to {high})".replace("-", "−")


def _shown(value: float, low: float, high: float, form: str = ".2f") -> str:
    ends = [f"{x:{form}}" if np.isfinite(x) else "beyond" for x in (value, low, high)]
    return f"{ends[0]} ({ends[1]} to {ends[2]})".replace("-", "−")


def _task(task: str, cells: Sequence[Row]) -> Section:
    said, lines = [], []
    counts = np.array(cells[0]["counts"], float)
    saved = {marked: marks_saving(cells, marked)[task] for marked in _compared(cells)}
    for marked, ends in saved.items():
        _, at, own, _ = _beside(cells, marked)
        marks = _of(cells, marked, "marks")
        seeds = plural(len(own), "seed", "seeds")
        sure = verdict(*ends[1:], len(own), below="marks cost comparisons", above="they save")
        beyond = " and a quarter for sure" if ends[1] >= TARGET and sure == "they save" else ""
        said.append(
            f"On {task}, with {_NAMES[marked]} ({marks[:, -1].mean() / counts[-1]:.1f} marks a "
            f"comparison), marks save {_share(ends)} of the comparisons that the accuracy "
            f"of {at:.0f} alone takes (95% interval, {seeds}): {sure}{beyond}."
        )
    for marked in (0, *saved):
        accuracy, frames = (_of(cells, marked, n) for n in ("accuracy", "frame correlation"))
        for place, count in enumerate(counts):
            one = "" if not marked else _shown(
                *worth(*_beside(cells, marked)[2:], counts, _of(cells, marked, "marks"), place)
            )  # fmt: skip
            given = _of(cells, marked, "marks")[:, place].mean()
            lines.append([
                _NAMES[marked], f"{count:.0f}", f"{given:.0f}",
                f"{interquartile_mean(accuracy[:, place]):.3f}",
                f"{interquartile_mean(frames[:, place]):.2f}", one,
            ])  # fmt: skip
    header = ["", "comparisons", "marks", "accuracy", "frames", "a mark in comparisons"]
    names = {marked: _NAMES[marked] for marked in (0, *saved)}
    curves = {name: _of(cells, marked, "accuracy") for marked, name in names.items()}
    figure = curves_figure({task: (counts, curves)}, looks(list(curves)))
    return Section(f"{task}: what marks save", said, figure, Table(header, lines))


def _together(tasks: Mapping[str, Sequence[Row]], marked: int) -> Section | None:
    """Accuracy with marks less that without, over tasks."""
    own = {task: cells for task, cells in tasks.items() if marked in _compared(cells)}
    if not own:
        return None
    counts = next(iter(own.values()))[0]["counts"]
    pairs = [_beside(cells, marked)[2:] for cells in own.values()]
    gaps = [with_ - alone for with_, alone in pairs]
    seeds = min(len(gap) for gap in gaps)
    cells = [
        _shown(*pooled([gap[:, place] for gap in gaps]), "+.3f") for place in range(len(counts))
    ]
    savings = {task: marks_saving(of, marked)[task] for task, of in own.items()}
    enough = sum(low >= TARGET for _, low, _ in savings.values())
    each = ", ".join(f"{_share(ends)} on {task}" for task, ends in savings.items())
    said = (
        f"With {_NAMES[marked]} marks save {each} of the comparisons; a quarter "
        f"or more for sure on {enough} of {plural(len(own), 'task', 'tasks')} "
        f"({plural(seeds, 'seed', 'seeds')} at least)."
    )
    table = Table(["", *(f"at {n}" for n in counts)], [["accuracy less that alone", *cells]])
    return Section(f"All tasks, {_NAMES[marked]}", [said], table=table)
