"""Study of query strategies, where every answer is already known.

**Simulated tasks.** One agent's clips at ten stages of training are cut from its kept episodes
(`datasets.pools`), and all their pairs may be asked about. Each strategy starts from the same
random batch; then it is shown the posterior of a predictor that was fitted to the comparisons so
far, chooses a batch, and gets the answers. A predictor is made anew for each round, so that no
strategy has another's luck. After each batch accuracy is measured on pairs of clips from other
episodes. Candidates, tests and first batches depend on the task and the seed alone.

**People.** The same with published comparisons (`datasets.people`): only pairs that somebody
compared may be asked about, and tests are of groups that were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import friedmanchisquare

from active import STRATEGIES, all_pairs
from experiments.analysis import plots, stats
from experiments.analysis.page import Report, Section
from experiments.datasets.minari import is_minari
from experiments.datasets.people import HUMAN_DATA, splits
from experiments.registry import find_class
from experiments.studies import (
    PoolSettings,
    check_least,
    check_tasks,
    compare_by_return,
    generator_of,
    seed_range,
)
from rewardmodels import Comparisons, InvalidInput, fit
from rewardmodels import calibration as score

REFERENCE, HEADLINE = "Uniform", "GreedyInformation"
EPOCHS = 100
FOLDS = 5
LEVEL = {"pool": 0.8, "people": 1.0}  # share of the budget at which savings are measured
QUARTERS = (0.25, 0.5, 0.75, 1.0)

GRID = ("data", "tasks", "strategies", "seeds", "first_seed")
QUICK = {
    "tasks": ("Hopper",), "strategies": (HEADLINE,), "seeds": 2, "pool_steps": 20_480,
    "pool_episodes": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Settings(PoolSettings):
    """Settings of the study.

    Args:
        data: Folder with people's comparisons, as `rewardmodels study predictors` takes it; None
            leaves people out.
        tasks: Any that `rewardmodels learn` takes, or Minari data sets with rewards, as
            `minari:NAME` or `minari:PATH`; may be none with `data`.
        strategies: Names or import paths; `Uniform` is always among them.
        predictor: A name or an import path.
        teacher: A name or an import path; answers every question.
        budget: Comparisons in all.
        batch: Comparisons between two fits.
        clips: Candidates, all pairs of which may be asked about.
        length: Frames per clip.
        tests: Pairs that accuracy is measured on.
        seeds: Draws of candidates, tests, first batches and initial weights.

    Raises:
        InvalidInput: A number out of range, clips longer than a task's episodes, neither tasks nor
            data, or a folder without the files.
        UnknownName: A task, strategy, predictor or teacher that doesn't exist.
    """

    data: Path | None = None
    tasks: Sequence[str] = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d")
    strategies: Sequence[str] = tuple(STRATEGIES)
    predictor: str = "LaplaceHead"
    teacher: str = "SyntheticTeacher"
    budget: int = 200
    batch: int = 20
    clips: int = 200
    length: int = 25
    tests: int = 1000
    seeds: int = 10

    def __post_init__(self) -> None:
        check_least(self, batch=2, budget=2 * self.batch, clips=4, length=1, tests=10, seeds=1)
        if not self.tasks and self.data is None:
            raise InvalidInput("tasks: expected at least one without people's data, got none.")
        if self.clips * (self.clips - 1) // 2 < self.budget:
            raise InvalidInput(
                f"clips: expected enough for {self.budget} different pairs, got {self.clips}."
            )
        find_class("model", self.predictor)
        find_class("teacher", self.teacher)
        for name in self.strategies:
            find_class("strategy", name)
        check_tasks([task for task in self.tasks if not is_minari(task)], self.length)


def prepare(settings: Settings) -> None:
    """Train each task's agent, and refuse pools whose clips can't be compared."""
    for task in settings.tasks:
        pool = settings.pool(task, progress=True)
        if float(pool.returns.max()) == float(pool.returns.min()):
            raise InvalidInput(
                f"pools: expected episodes of {task} with true rewards, by which the synthetic "
                f"teacher answers, got {len(pool.trajectories)} that all return "
                f"{float(pool.returns[0]):g}. Delete the file, and the pool is made anew."
            )


def cells(settings: Settings) -> list[dict[str, Any]]:
    """One cell for each task or set of people's comparisons, strategy and seed."""
    tasks = [{"kind": "pool", "task": task, "folder": None} for task in settings.tasks]
    if settings.data is not None:
        for load in HUMAN_DATA.values():
            name, folder = load(settings.data).name, str(settings.data)
            tasks.append({"kind": "people", "task": name, "folder": folder})
    names = list(dict.fromkeys([REFERENCE, *settings.strategies]))
    return [
        {**task, "strategy": name, "seed": seed}
        for seed in seed_range(settings)
        for task in tasks
        for name in names
    ]


def cell(
    settings: Settings, kind: str, task: str, folder: str | None, strategy: str, seed: int
) -> list[dict[str, Any]]:
    """Accuracy and log loss of one strategy after each batch."""
    torch.set_num_threads(1)
    if kind == "people":
        data = HUMAN_DATA[task](Path(str(folder)))
        train, test = list(splits(data, FOLDS, seed=seed))[seed % FOLDS]
        known, tests = (
            data.comparisons[torch.from_numpy(rows[data.decided[rows]])].compact()
            for rows in (train, test)
        )
    else:
        known, tests = _pool_comparisons(settings, task, seed)
    return _ask(settings, known, tests, strategy, seed)


def _pool_comparisons(settings: Settings, task: str, seed: int) -> tuple[Comparisons, Comparisons]:
    """Comparisons of all pairs of the candidates, and those to test on."""
    pool, draw = settings.pool(task), generator_of(seed)
    candidates = pool.half(0).clips(settings.clips, settings.length, draw)
    tests = pool.half(1).clips(2 * settings.tests, settings.length, draw)
    pairs = all_pairs(settings.clips)
    preference = find_class("teacher", settings.teacher)().answer(candidates, pairs, draw)
    if preference.isnan().any():
        raise InvalidInput(
            f"teacher: expected one who answers every question, got {settings.teacher}, who skips "
            f"{int(preference.isnan().sum())} of {len(preference)}."
        )
    return Comparisons(candidates, pairs, preference), compare_by_return(tests)


def _ask(
    settings: Settings, known: Comparisons, tests: Comparisons, strategy: str, seed: int
) -> list[dict[str, Any]]:
    chooser, draw = find_class("strategy", strategy)(), generator_of(seed, 1)
    asked = torch.randperm(len(known), generator=generator_of(seed, 2))[: settings.batch]
    left = torch.ones(len(known), dtype=torch.bool)
    decided = tests.preference != 0.5
    rows: list[dict[str, Any]] = []
    while True:
        left[asked] = False
        model = find_class("model", settings.predictor)()
        fit(model, known[asked].compact(), epochs=EPOCHS, seed=seed)
        predicted = model.posterior(tests.clips).preference(tests.pairs)
        correct = ((predicted > 0.5) == (tests.preference > 0.5))[decided]
        row = {"comparisons": len(asked), "accuracy": float(correct.double().mean())}
        rows.append({**row, "log_loss": score.log_loss(predicted, tests.preference)})
        n = min(settings.batch, min(settings.budget, len(known)) - len(asked))
        if n <= 0:
            return rows
        candidates = left.nonzero().squeeze(1)
        posterior = model.posterior(known.clips)
        chosen = chooser.select(posterior, known.pairs[candidates], n, generator=draw)
        asked = torch.cat([asked, candidates[chosen]])


def report(results: pd.DataFrame) -> Report:
    """Savings of each strategy, learning curves, differences from uniform queries, and ranks."""
    savings = _savings(results)
    sections = [
        Section(
            "Comparisons needed for uniform queries' accuracy",
            "Over those that uniform queries need for it, at 80% of the budget (people: at all of "
            "it); below 1 saves comparisons. ∞: not reached within the budget.",
            _savings_figure(savings),
            savings,
            digits=2,
        ),
        Section(
            "Learning curves",
            "Held-out pairs predicted correctly; lines are interquartile means over seeds.",
            plots.accuracy_by_task(
                results, "strategy", _looks(results), columns=2, height=3.1, legend=5
            ),
        ),
    ]
    for kind, of in results.groupby("kind", sort=False):
        where = "simulated tasks" if kind == "pool" else "people's comparisons"
        sections.append(
            Section(
                f"Accuracy less that of uniform queries, {where}",
                "After a quarter, half, three quarters and all of the budget, seed by seed.",
                table=_differences(of),
            )
        )
    ranks, p = _ranks(results)
    strategies, tasks = len(ranks), ranks.shape[1] - 2
    sections += [
        Section(
            "Ranks by mean accuracy over the whole budget", "1 is best.", table=ranks, digits=1
        ),
        Section(
            "Friedman's test",
            "Null hypothesis: all strategies rank alike (Demšar 2006, section 3.2.2). It takes "
            "three tasks and three strategies.",
            table=pd.DataFrame({"strategies": [strategies], "tasks": [tasks], "p": [p]}),
        ),
    ]
    numbers: dict[str, Any] = {"friedman_p": p}
    for row in savings.to_dict("records"):
        suffix = row["task"] if row["strategy"] == HEADLINE else f"{row['task']}.{row['strategy']}"
        ratio = row["comparisons needed, over uniform's"]
        numbers[f"labels_ratio.{suffix}"] = ratio.value
        numbers[f"labels_ratio_interval.{suffix}"] = ratio[1:]
    seconds = results.drop_duplicates(["task", "strategy", "seed"])["cell_seconds"]
    numbers["study_minutes"] = seconds.sum() / 60  # of all cells, one after the other
    return Report("Which queries teach most?", sections, numbers)


def _looks(rows: pd.DataFrame) -> dict[str, plots.Look]:
    return plots.looks(list(rows["strategy"].unique()), reference=REFERENCE)


def _savings(results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (kind, task), on_task in results.groupby(["kind", "task"], sort=False):
        curves = {
            str(name): stats.curve_matrix(of, "accuracy")
            for name, of in on_task.groupby("strategy", sort=False)
        }
        reference = curves.pop(REFERENCE, pd.DataFrame())
        for name, own in curves.items():
            seeds = len(own.index.intersection(reference.index))
            if not seeds:
                continue
            ratio = stats.labels_ratio(own, reference, LEVEL[str(kind)] * reference.columns.max())
            verdict = ratio.verdict(seeds, even=1, higher_is_better=False)
            rows.append((task, name, ratio, verdict, seeds))
    columns = ["task", "strategy", "comparisons needed, over uniform's", "verdict", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def _differences(results: pd.DataFrame) -> pd.DataFrame:
    """Rows of each task, and of all tasks together; a column for each share of the budget."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for share in QUARTERS:
        gaps = stats.paired(
            _at_share(results, share), "accuracy", by="strategy", reference=REFERENCE
        )
        for name, of in gaps.groupby("strategy", sort=False):
            groups = [(str(task), some) for task, some in of.groupby("task", sort=False)]
            for task, some in [*groups, *([("all", of)] if len(groups) > 1 else [])]:
                gap = stats.over_tasks(some, "difference")
                line = rows.setdefault((task, str(name)), {"task": task, "strategy": name})
                line[f"at {share:.0%}"] = gap
                if share == 1:
                    line["verdict"] = gap.verdict(int(some.groupby("task").size().min()))
    return pd.DataFrame(sorted(rows.values(), key=lambda row: row["task"] == "all"))


def _at_share(results: pd.DataFrame, share: float) -> pd.DataFrame:
    """Accuracy of each cell at a share of the budget, linear between batches."""
    keys = ["task", "strategy", "seed"]
    rows = [
        (*key, np.interp(share * of["comparisons"].max(), of["comparisons"], of["accuracy"]))
        for key, of in results.groupby(keys, sort=False)
    ]
    return pd.DataFrame(rows, columns=[*keys, "accuracy"])


def _ranks(results: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Mean rank of each strategy by its mean accuracy, and the p value of Friedman's test."""
    areas = results.groupby(["strategy", "task", "seed"], sort=False)["accuracy"].mean()
    by_task = areas.groupby(["strategy", "task"], sort=False).agg(stats.interquartile_mean)
    ranks = by_task.unstack("task").dropna(axis="columns").rank(ascending=False)
    p = float("nan")
    if len(ranks) >= 3 and ranks.shape[1] >= 3:
        p = float(friedmanchisquare(*ranks.to_numpy()).pvalue)
    ranks["mean"] = ranks.mean(axis="columns")
    return ranks.sort_values("mean", kind="stable").reset_index(), p


def _savings_figure(savings: pd.DataFrame) -> Figure | None:
    look, column = _looks(savings), "comparisons needed, over uniform's"

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        plots.interval_rows(axes, rows.set_index("strategy")[column].to_dict(), look, even=1)

    height = 0.9 + 0.22 * savings["strategy"].nunique()
    if not len(savings):
        return None
    return plots.by_task(savings, draw, title=f"{{}}: {column}", columns=2, height=height)
