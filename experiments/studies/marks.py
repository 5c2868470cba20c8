"""Study of marks: the comparisons that marks of good and bad parts of clips save.

One agent's clips at ten stages of training are cut from its kept episodes (`datasets.pools`), and
pairs drawn at random are compared by the true return. For several numbers of comparisons a
predictor is fitted to these, or to these and marks: a synthetic person also marks one clip of each
pair, or both, the stretch with the best true reward as good and the worst as bad
(`active.SyntheticMarker`), and leaves a clip alone where no stretch stands out. Accuracy is
measured on pairs of clips from other episodes. Clips, pairs, tests and initial weights depend on
the task and the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from active import SyntheticMarker
from experiments.analysis import plots, stats
from experiments.analysis.page import Report, Section
from experiments.analysis.stats import Interval, curve_matrix, interquartile_mean
from experiments.registry import find_class
from experiments.studies import (
    PoolSettings,
    check_least,
    check_tasks,
    compare_by_return,
    generator_of,
    make_pools,
    seed_range,
)
from rewardmodels import InvalidInput, fit
from rewardmodels import calibration as score

EPOCHS = 100
FRAMES = 200  # clips whose single frames are scored
LEVEL = 0.8  # savings are at the accuracy that this share of the comparisons reaches alone
ARMS = {0: "comparisons alone", 1: "one clip marked", 2: "both clips marked"}

GRID = ("tasks", "marked", "seeds", "first_seed")
QUICK = {"tasks": ("Hopper",), "seeds": 2, "pool_steps": 20_480, "pool_episodes": 4}


@dataclass(frozen=True)
class Settings(PoolSettings):
    """Settings of the study.

    Args:
        marked: How many of each comparison's two clips are marked: 1, 2 or both; no marks are
            always among what is compared.
        predictor: A name or an import path.
        counts: Numbers of comparisons to fit to, rising.
        length: Frames per clip.
        stretch: Frames that a mark covers, fewer than a clip's.
        stands_out: How far a stretch's mean true reward has to be from the rest's to be marked,
            in standard deviations of a frame's true reward.
        flip_rate: Share of marks with the wrong sign; comparisons have none, and the predictor
            doesn't know.
        tests: Pairs that accuracy is measured on.
        seeds: Draws of clips, pairs, tests, wrong marks and initial weights.

    Raises:
        InvalidInput: A number out of range, or clips longer than a task's episodes.
        UnknownName: A task or predictor that doesn't exist.
    """

    marked: Sequence[int] = (2,)
    predictor: str = "LaplaceHead"
    counts: Sequence[int] = (10, 20, 40, 80)
    length: int = 25
    stretch: int = 5
    stands_out: float = 0.5
    flip_rate: float = 0.0
    tests: int = 1000

    def __post_init__(self) -> None:
        check_least(self, length=2, stretch=1, tests=10, seeds=1)
        counts = list(self.counts)
        if counts != sorted(set(counts)) or len(counts) < 2 or counts[0] < 2:
            raise InvalidInput(f"counts: expected at least two, from 2 on, rising, got {counts}.")
        if self.stretch >= self.length:
            raise InvalidInput(
                f"stretch: expected fewer frames than a clip's {self.length}, got {self.stretch}."
            )
        if not self.marked or not set(self.marked) <= {1, 2}:
            raise InvalidInput(f"marked: expected 1, 2 or both, got {list(self.marked)}.")
        SyntheticMarker(self.stretch, self.stands_out, self.flip_rate)
        find_class("model", self.predictor)
        check_tasks(self.tasks, self.length)


prepare = make_pools


def cells(settings: Settings) -> list[dict[str, Any]]:
    """One cell for each task, number of marked clips and seed."""
    return [
        {"task": task, "marks_per_pair": marked, "seed": seed}
        for seed in seed_range(settings)
        for task in settings.tasks
        for marked in (0, *sorted(set(settings.marked)))
    ]


def cell(settings: Settings, task: str, marks_per_pair: int, seed: int) -> list[dict[str, Any]]:
    """Fit to each number of comparisons, with so many clips of each pair marked."""
    torch.set_num_threads(1)
    draw = generator_of(seed, 3)
    pool, most = settings.pool(task), settings.counts[-1]
    clips = pool.half(0).clips(2 * most, settings.length, draw)
    tests = pool.half(1).clips(2 * settings.tests, settings.length, draw)
    comparisons, held_out = compare_by_return(clips), compare_by_return(tests)
    preference = held_out.preference
    assert tests.rewards is not None
    marker = SyntheticMarker(settings.stretch, settings.stands_out, settings.flip_rate)
    marks = marker.mark(clips, draw)
    # The first clip of a pair is as random as the second.
    marks = marks[marks.rows[:, 0] % 2 < marks_per_pair]
    frames, decided, rows = tests[:FRAMES], preference != 0.5, []
    for n in settings.counts:
        model = find_class("model", settings.predictor)()
        known = marks[marks.rows[:, 0] < 2 * n]
        fit(model, comparisons[:n].compact(), marks=known, epochs=EPOCHS, seed=seed)
        predicted = model.posterior(tests).preference(held_out.pairs)
        rewards = model.frame_posterior(
            frames.observations.flatten(0, 1), frames.actions.flatten(0, 1)
        ).mean
        correct = ((predicted > 0.5) == (preference > 0.5))[decided]
        true = tests.rewards[:FRAMES].flatten()
        rows.append(
            {
                "comparisons": n,
                "marks": len(known),
                "accuracy": float(correct.double().mean()),
                "log_loss": score.log_loss(predicted, preference),
                "frame_correlation": float(np.corrcoef(rewards.numpy(), true.numpy())[0, 1]),
            }
        )
    return rows


def report(results: pd.DataFrame) -> Report:
    """Savings on each task, and accuracy against comparisons."""
    results["arm"] = results["marks_per_pair"].map(ARMS)
    savings = _savings(results)
    sections = [
        Section(
            "Comparisons that marks save",
            "Share of the comparisons saved by marks, at the accuracy that comparisons alone reach "
            f"with {LEVEL:.0%} of their number. −∞ where marks don't reach it. “Better” means that "
            "the 95% interval is above zero over at least five seeds.",
            table=savings,
            digits=2,
        ),
        Section(
            "Accuracy with and without marks",
            "Held-out pairs predicted correctly; lines are interquartile means over seeds.",
            plots.accuracy_by_task(
                results, "arm", plots.looks(list(ARMS.values()), reference=ARMS[0]), height=3
            ),
            _curves(results),
        ),
        Section(
            "Difference in accuracy over all tasks",
            "Accuracy with marks less accuracy without, seed by seed.",
            table=_differences(results),
        ),
    ]
    numbers: dict[str, Any] = {}
    if len(both := savings[savings["arm"] == ARMS[2]]):
        numbers["marks_saving"] = float(np.median([saved.value for saved in both["saved"]]))
    for row in savings.to_dict("records"):
        suffix = "" if row["arm"] == ARMS[2] else ".one_clip"
        numbers[f"marks_saving.{row['task']}{suffix}"] = row["saved"].value
        numbers[f"marks_saving_interval.{row['task']}{suffix}"] = row["saved"][1:]
    return Report("What is a mark worth?", sections, numbers)


def _savings(results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for task, on_task in results.groupby("task", sort=False):
        alone = curve_matrix(on_task[on_task["marks_per_pair"] == 0], "accuracy")
        for arm, marked in on_task[on_task["marks_per_pair"] > 0].groupby("arm", sort=False):
            own = curve_matrix(marked, "accuracy")
            seeds = len(own.index.intersection(alone.index))
            if not seeds:
                continue
            ratio, low, high = stats.labels_ratio(own, alone, LEVEL * own.columns.max())
            saved = Interval(1 - ratio, 1 - high, 1 - low)
            given = marked.groupby("comparisons")["marks"].mean()
            per_comparison = float(given.iloc[-1] / given.index[-1])
            rows.append((task, arm, per_comparison, saved, saved.verdict(seeds), seeds))
    columns = ["task", "arm", "marks per comparison", "saved", "verdict", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def _curves(results: pd.DataFrame) -> pd.DataFrame:
    table = results.groupby(["task", "arm", "comparisons"], sort=False)[
        ["marks", "accuracy", "frame_correlation"]
    ].agg(interquartile_mean)
    table = table.reset_index()
    table["comparisons that one mark is worth"] = [
        _worth(results[results["task"] == row.task], row.arm, row.comparisons)
        for row in table.itertuples()
    ]
    return table.rename(columns={"frame_correlation": "frame correlation"})


def _worth(on_task: pd.DataFrame, arm: str, comparisons: int) -> Interval | str:
    """Further comparisons that reach the same accuracy without marks, over the marks given."""
    own, alone = (
        curve_matrix(on_task[on_task["arm"] == name], "accuracy") for name in (arm, ARMS[0])
    )
    seeds, counts = own.index.intersection(alone.index), alone.columns.to_numpy(float)
    if arm == ARMS[0] or not len(seeds):
        return ""
    marks = curve_matrix(on_task[on_task["arm"] == arm], "marks").loc[seeds, comparisons]
    sample = np.column_stack([marks, own.loc[seeds, comparisons], alone.loc[seeds].to_numpy()])

    def worth(drawn: np.ndarray) -> float:
        reached, curve = interquartile_mean(drawn[:, 1]), interquartile_mean(drawn[:, 2:])
        further = stats.first_reached(counts, curve, reached) - comparisons
        return further / max(1, drawn[:, 0].mean())

    return stats.bootstrap(worth, sample)


def _differences(results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for count, at_count in results.groupby("comparisons"):
        gaps = stats.paired(at_count, "accuracy", by="arm", reference=ARMS[0])
        for arm, of_arm in gaps.groupby("arm", sort=False):
            gap = stats.over_tasks(of_arm, "difference")
            seeds = int(of_arm.groupby("task").size().min())
            rows.append((arm, count, gap, gap.verdict(seeds)))
    return pd.DataFrame(rows, columns=["arm", "comparisons", "difference", "verdict"])
