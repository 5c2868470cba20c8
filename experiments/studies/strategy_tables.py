"""What the study of strategies leaves behind: savings, differences and ranks, and how sure.

A cell that isn't there yet leaves its seed out for that strategy only, so that a study that is
half done has its tables too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from experiments.analysis.old_page import (
    LEAST_SEEDS,
    About,
    Section,
    Table,
    as_markdown,
    plural,
    verdict,
    write_report,
)
from experiments.analysis.old_stats import Values, bootstrap_interval, interquartile_mean
from experiments.analysis.plots import save
from experiments.studies.strategy_figures import Interval, curves_figure, looks, task_figure
from experiments.studies.strategy_savings import Paired, friedman, labels_ratio
from experiments.studies.summary import Row, as_csv, by, pooled
from rewardmodels.saving import write_text_atomically

_QUARTERS = (0.25, 0.5, 0.75, 1.0)


Told = tuple[str, float, float, float, int]
"""A strategy on one task: ratio, its interval, seeds."""


def write_tables(
    rows: Mapping[str, Sequence[Row]], out: Path, about: About, *, note: str = ""
) -> str:
    """Writes the report with `tables.md` and figures, and `curves.csv`; returns the tables.

    Args:
        rows: Cells of "pool" and "people", either may be missing, and so may some cells.
        out: The study's directory.
        about: How they were made.
        note: What a reader has to know first.
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
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "curves.csv", as_csv(lines))
    style = looks(list(by(every, "strategy")))
    tasks: dict[str, Paired] = {}
    sections: list[Section] = []
    told: list[Told] = []
    for kind, cells in rows.items():
        paired = {task: Paired.of(of) for task, of in by(cells, "task").items()}
        tasks |= paired
        for task, one in paired.items():
            savings = {
                name: labels_ratio(*one.beside_uniform(name), one.comparisons, _at(one, kind))
                for name in one.compared
            }
            told += [
                (name, *ends, len(one.beside_uniform(name)[0])) for name, ends in savings.items()
            ]
            sections.append(_savings(task, one, savings, _at(one, kind), style))
        sections += [_differences(task, one) for task, one in paired.items() if one.compared]
        if len(paired) > 1 and (section := _in_all(kind, paired)):
            sections.append(section)
    sections.append(_ranks(tasks))
    save(
        curves_figure(
            {
                task: (
                    one.comparisons,
                    {n: np.stack([*of.values()]) for n, of in one.accuracy.items()},
                )
                for task, one in tasks.items()
            },
            style,
        ),
        out / "figures" / "curves",
    )
    write_report(
        out,
        "What questions save",
        sections,
        about,
        lead=f"{note} {_lead(told, len(tasks))}".strip(),
    )
    return as_markdown(sections)


def ratios(rows: Sequence[Row], strategy: str, at: float) -> dict[str, Interval]:
    """A strategy's `labels_ratio` on each task, for a benchmark's file, which takes no infinity.

    What isn't reached counts as the whole budget and one batch.
    """
    found: dict[str, Interval] = {}
    for task, cells in by(rows, "task").items():
        one = Paired.of(cells)
        most = float(one.comparisons[-1] + one.comparisons[0]) / at
        ratio, low, high = labels_ratio(*one.beside_uniform(strategy), one.comparisons, at)
        found[task] = min(ratio, most), min(low, most), min(high, most)
    return found


def _at(one: Paired, kind: str) -> float:
    """Where savings are measured: with people, who answer no more, at the end."""
    return float(one.comparisons[-1]) * (1.0 if kind == "people" else 0.8)


def _savings(
    task: str, one: Paired, savings: Mapping[str, Interval], at: float, style: Mapping[str, dict]
) -> Section:
    curves = {name: np.stack([*of.values()]) for name, of in one.accuracy.items()}
    title = f"{task}: what questions save"
    if not savings:
        said = [f"On {task} no strategy shares a seed with uniform comparisons yet."]
        return Section(title, said, table=Table(["", "ratio"], []))
    budget, said, lines = one.comparisons[-1], [], []
    for name, (ratio, low, high) in savings.items():
        seeds = len(one.beside_uniform(name)[0])
        counted = plural(seeds, "seed", "seeds")
        ends = f"{low:.2f} to {high:.2f}" if np.isfinite(high) else (
            f"{low:.2f} to beyond the budget" if np.isfinite(low) else "wholly beyond the budget"
        )  # fmt: skip
        sure = verdict(low, high, seeds, even=1, below="it saves", above="it needs more, it loses")
        if np.isfinite(ratio):
            begun = f"On {task}, {name} needs {ratio:.2f} of uniform's comparisons"
        else:
            begun = (
                f"On {task}, {name} doesn't reach with {budget:.0f} comparisons what uniform ones "
                f"reach with {at:.0f}"
            )
        said.append(f"{begun} (95% interval {ends}, {counted}): {sure}.")
        shown = f"{ratio:.2f}" if np.isfinite(ratio) else "not reached"
        lines.append([name, f"{shown} ({ends})", str(seeds)])
    header = f"comparisons for uniform's accuracy at {at:.0f}, over uniform's"
    figure = task_figure(one.comparisons, curves, savings, style)
    return Section(title, said, figure, Table(["", header, "seeds"], lines))


def _gaps(one: Paired, name: str, share: float) -> Values:
    """Accuracy less uniform's, for each seed, at a share of the budget."""
    own, uniform = one.beside_uniform(name)
    at = share * one.comparisons[-1]
    return np.array([np.interp(at, one.comparisons, curve) for curve in own - uniform])


def _shown(mean: float, low: float, high: float) -> str:
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")


def _differences(task: str, one: Paired) -> Section:
    budgets = [f"{share * one.comparisons[-1]:.0f}" for share in _QUARTERS]
    lines: list[list[str]] = []
    won: list[tuple[str, str]] = []
    lost: list[tuple[str, str]] = []
    for name in one.compared:
        cells = []
        for share, budget in zip(_QUARTERS, budgets, strict=True):
            gaps = _gaps(one, name, share)
            low, high = bootstrap_interval(interquartile_mean, gaps)
            cells.append(_shown(float(interquartile_mean(gaps)), low, high))
            answer = verdict(low, high, len(gaps), below="less", above="more")
            (won if answer == "more" else lost if answer == "less" else []).append((name, budget))
        lines.append([name, *cells])
    seeds = min(len(_gaps(one, name, 1)) for name in one.compared)
    counted = plural(seeds, "seed", "seeds")
    begun = f"Accuracy less that of as many uniform comparisons, seed by seed ({counted}): "
    said = (
        f"{_listed(won, 'more accurate')}; {_listed(lost, 'less accurate')}. "
        "Of all others no difference can be told."
        if seeds >= LEAST_SEEDS
        else "too few for a claim."
    )
    return Section(
        f"{task}: accuracy less uniform's",
        [begun + said],
        table=Table(["", *(f"at {budget}" for budget in budgets)], lines),
    )


def _listed(pairs: Sequence[tuple[str, str]], what: str) -> str:
    if not pairs:
        return f"none is {what} for sure"
    of: dict[str, list[str]] = {}
    for name, budget in pairs:
        of.setdefault(name, []).append(budget)
    return f"{what} for sure " + ", ".join(f"{n} at {', '.join(b)}" for n, b in of.items())


def _in_all(kind: str, tasks: Mapping[str, Paired]) -> Section | None:
    shared = [n for n in next(iter(tasks.values())).compared
              if all(n in one.compared for one in tasks.values())]  # fmt: skip
    if not shared:
        return None
    lines = [
        [name, *(
            _shown(*pooled([_gaps(one, name, share) for one in tasks.values()]))
            for share in _QUARTERS
        )]
        for name in shared
    ]  # fmt: skip
    said, seeds = [], min(len(_gaps(one, n, 1)) for one in tasks.values() for n in shared)
    for name in shared:
        mean, low, high = pooled([_gaps(one, name, 0.5) for one in tasks.values()])
        sure = verdict(low, high, seeds, below="it is less accurate", above="it is more accurate")
        said.append(
            f"At half of the budget {name}'s accuracy less uniform's is {_shown(mean, low, high)} "
            f"over {plural(len(tasks), 'task', 'tasks')}: {sure}."
        )
    what = "Simulated tasks" if kind == "pool" else "People's answers"
    header = ["", *(f"at {share:.0%} of the budget" for share in _QUARTERS)]
    return Section(f"{what} together: accuracy less uniform's", said, table=Table(header, lines))


def _ranks(tasks: Mapping[str, Paired]) -> Section:
    names = list(dict.fromkeys(name for one in tasks.values() for name in one.accuracy))
    places: dict[str, Values] = {}
    for task, one in tasks.items():
        seeds = set.intersection(*(set(of) for of in one.accuracy.values()))
        if set(one.accuracy) == set(names) and seeds:
            area = [
                interquartile_mean(np.array([of[s].mean() for s in sorted(seeds)]))
                for of in (one.accuracy[name] for name in names)
            ]
            places[task] = stats.rankdata(-np.array(area))
    table = np.array(list(places.values())).reshape(-1, len(names))
    means = table.mean(0) if len(table) else np.full(len(names), np.nan)
    lines = [
        [names[i], *(f"{rank:g}" for rank in table[:, i]), f"{means[i]:.1f}"]
        for i in np.argsort(means, kind="stable")
    ] if len(table) else []  # fmt: skip
    return Section(
        "Rank by mean accuracy over the whole budget",
        [f"1 is best. {friedman(table)}"],
        table=Table(["", *places, "mean"], lines),
    )


def _lead(told: Sequence[Told], tasks: int) -> str:
    """How often each strategy saved, lost, or neither."""
    if not told:
        return "No strategy shares a seed with uniform comparisons yet."
    said = []
    for name in dict.fromkeys(line[0] for line in told):
        answers = [
            verdict(low, high, seeds, even=1, below="saves", above="loses")
            for other, _, low, high, seeds in told
            if other == name
        ]
        saves, loses = answers.count("saves"), answers.count("loses")
        rest = len(answers) - saves - loses
        said.append(f"{name} saves on {saves}, loses on {loses}, can't be told on {rest}")
    return f"Beside uniform comparisons, of {plural(tasks, 'task', 'tasks')}: {'; '.join(said)}."
