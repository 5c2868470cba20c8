"""Study of feedback: how much is needed, and when it should be asked for.

**Online.** `learn` from start to end: a policy is trained on the reward learned from so many
comparisons, asked for by a schedule and answered by a teacher, and judged by the task's own reward.
It is compared with policies trained on the task's own reward, and on trivial rewards (zero,
constant, random), on which many a task is done well already (Shin et al. 2023, arXiv 2301.01392).

**Pool.** Seconds in place of minutes: no policy is trained. A strategy asks about a fixed pool of
clips, and the learned reward's accuracy on pairs from other episodes is measured, teacher by
teacher.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from active import Schedule
from experiments.analysis import plots, stats
from experiments.analysis.page import Report, Section
from experiments.analysis.stats import Interval, Values, bootstrap, interquartile_mean
from experiments.envs.tasks import find_task
from experiments.registry import find_class
from experiments.studies import PoolSettings, check_least, make_pools, seed_range, strategies
from experiments.training.config import LearnConfig, RewardName, default_model, task_defaults
from experiments.training.learn import learn
from experiments.training.run_directory import RunDirectory
from rewardmodels import InvalidInput

SHARE = 0.9  # of the return on the task's own reward, for the number of comparisons needed

GRID = ("tasks", "budgets", "schedules", "teachers", "arms", "seeds", "first_seed")
QUICK = {
    "tasks": ("Hopper",), "budgets": (16, 32), "arms": ("task", "zero"), "predictor": "LaplaceHead",
    "steps": 16_384, "seeds": 1, "pool_steps": 20_480, "pool_episodes": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Settings(PoolSettings):
    """Settings of the study.

    Args:
        mode: "online" trains a policy in every cell, which takes minutes; "pool" only fits
            rewards, which takes seconds.
        budgets: Comparisons, the most that a run may ask for; a pool's curve goes to the largest.
        schedules: Constant, Hyperbolic, WhenUnsure, or import paths; with or without arguments, as
            in "WhenUnsure(level=0.2)". The share asked for first is the task's default. Not used
            with "pool".
        teachers: oracle, stochastic, mistaken, myopic (as in B-Pref), or import paths.
        arms: Rewards that aren't learned, for comparison. Not used with "pool".
        strategy: A name or an import path.
        predictor: A name or an import path; None takes the default of `learn` online, and
            `LaplaceHead` with "pool".
        steps: Training steps of each policy.
        seeds: Number of runs of each kind.

    Raises:
        InvalidInput: A number out of range, or an empty list.
        UnknownName: A task, schedule, teacher, strategy or predictor that doesn't exist.
    """

    mode: Literal["online", "pool"] = "online"
    budgets: Sequence[int] = (25, 50, 100, 400)
    schedules: Sequence[str] = ("Constant", "WhenUnsure")
    teachers: Sequence[str] = ("oracle",)
    arms: Sequence[RewardName] = ("task", "zero", "constant", "random")
    strategy: str = "GreedyInformation"
    predictor: str | None = None
    steps: int = 300_000

    def __post_init__(self) -> None:
        for name in ("tasks", "budgets", "schedules", "teachers"):
            if not getattr(self, name):
                raise InvalidInput(f"{name}: expected at least one, got none.")
        check_least(self, steps=1, seeds=1)
        if min(self.budgets) < 8:
            raise InvalidInput(f"budgets: expected at least 8 comparisons, got {self.budgets}.")
        for task in self.tasks:
            find_task(task)
            for schedule in self.schedules:
                _schedule(schedule, task)
        for teacher in self.teachers:
            find_class("teacher", teacher)
        find_class("strategy", self.strategy)
        if self.predictor:
            find_class("model", self.predictor)


def prepare(settings: Settings) -> None:
    """Train the pools' agents, which cells share."""
    if settings.mode == "pool":
        make_pools(settings)


def cells(settings: Settings) -> list[dict[str, Any]]:
    """One cell for each run of `learn`, or for each teacher on each pool."""
    learned = {"reward": "learned", "schedule": "", "teacher": "", "budget": 0}
    grid: list[dict[str, Any]] = []
    for seed in seed_range(settings):
        for task in settings.tasks:
            own = {**learned, "task": task, "seed": seed}
            if settings.mode == "pool":
                most = max(settings.budgets)
                grid += [{**own, "teacher": name, "budget": most} for name in settings.teachers]
                continue
            grid += [{**own, "reward": arm} for arm in settings.arms]
            grid += [
                {**own, "schedule": schedule, "teacher": teacher, "budget": budget}
                for budget in settings.budgets
                for schedule in settings.schedules
                for teacher in settings.teachers
            ]
    return grid


def cell(
    settings: Settings, task: str, seed: int, reward: RewardName, schedule: str, teacher: str,
    budget: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of each round of a run of `learn`, or of each batch of a pool."""
    if settings.mode == "pool":
        shared = {field.name: getattr(settings, field.name) for field in fields(PoolSettings)}
        on_pool = strategies.Settings(
            **shared | {"tasks": [task]}, predictor=settings.predictor or "LaplaceHead",
            teacher=teacher, budget=budget, batch=min(20, budget // 2),
        )  # fmt: skip
        return strategies.cell(on_pool, "pool", task, None, settings.strategy, seed)
    options: dict[str, Any] = {}
    if reward == "learned":
        predictor = settings.predictor
        options = {
            "comparisons": budget,
            "schedule": _schedule(schedule, task),
            "teacher": find_class("teacher", teacher)(),
            "strategy": find_class("strategy", settings.strategy)(),
            "model": find_class("model", predictor)() if predictor else default_model(),
        }
    with TemporaryDirectory() as folder:
        config = LearnConfig(
            task, reward=reward, seed=seed, steps=settings.steps, video=False,
            out=Path(folder) / "run", **options,
        )  # fmt: skip
        result = learn(config, progress=False)
        rounds = RunDirectory(config.out).metrics
    outcome = {"return": result["final_return"], "correlation": result["reward_correlation"]}
    outcome |= {name: result[name] for name in ("comparisons", "skipped")}
    columns = {"step": "step", "comparisons": "asked", "mean_information": "information"}
    rounds = rounds.reindex(columns=list(columns)).rename(columns=columns).astype(object)
    return [{**outcome, **row} for row in rounds.where(rounds.notna(), None).to_dict("records")]


def _schedule(name: str, task: str) -> Schedule:
    """Make a schedule; the share that it asks for first is the task's default, if it has one."""
    make: Any = find_class("schedule", name)
    given = getattr(make, "keywords", {})
    if "initial" in inspect.signature(make).parameters and "initial" not in given:
        make = partial(make, initial=task_defaults(task).schedule().initial)
    schedule: Schedule = make()
    return schedule


def report(results: pd.DataFrame) -> Report:
    """Returns against comparisons, comparisons needed and saved; or accuracies on pools."""
    title = "How much feedback is needed?"
    if results["mode"].iloc[0] == "pool":
        return Report(title, _pool_sections(results))
    results = results.assign(
        arm=np.where(
            results["reward"] == "learned", results["schedule"] + ", " + results["teacher"],
            results["reward"],
        )
    )  # fmt: skip
    runs = results.drop_duplicates(["task", "arm", "budget", "seed"])
    needed, savings = _needed(runs), _savings(runs)
    sections = [
        Section(
            "Return against comparisons",
            "True return of the final policy: interquartile means over seeds with 95% intervals.",
            _returns_figure(runs),
            _returns(runs),
            digits=2,
        ),
        Section(
            f"Comparisons for {SHARE:.0%} of the return on the task's own reward",
            "Read off a line through the interquartile means at each budget, from the zero "
            "reward's at no comparison. ∞: not reached with the largest budget.",
            table=needed,
            digits=0,
        ),
        Section(
            "Comparisons saved by asking at other times",
            "Comparisons that a schedule asks for with its largest budget, over those of the "
            "constant schedule for the same return (at most its largest budget, so that the ratio "
            "is rather too high); share of the same budget that is asked for; and return less "
            "that of the constant schedule with the same budget.",
            _asked_figure(results),
            savings,
            digits=2,
        ),
    ]
    return Report(title, sections, _numbers(runs, needed, savings))


def _learned(runs: pd.DataFrame) -> list[tuple[str, dict[int, pd.DataFrame]]]:
    """Runs of each schedule and teacher by budget, the smallest first."""
    learned = runs[runs["reward"] == "learned"]
    return [
        (str(name), {int(budget): some for budget, some in of.groupby("budget")})
        for name, of in learned.groupby("arm", sort=False)
    ]


def _own(runs: pd.DataFrame, reward: str) -> Values:
    returns: Values = runs.loc[runs["reward"] == reward, "return"].to_numpy(float)
    return returns


def _returns(runs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "task": task,
            "reward": arm,
            "budget": int(budget),
            "comparisons": float(of["comparisons"].mean()),
            "skipped": float(of["skipped"].mean()),
            "true return": bootstrap(interquartile_mean, of["return"]),
            "worst seed": float(of["return"].min()),
            "correlation with the true reward": float(of["correlation"].astype(float).mean()),
            "seeds": len(of),
        }
        for (task, arm, budget), of in runs.groupby(["task", "arm", "budget"], sort=False)
    )


def _line(runs: pd.DataFrame, budgets: Mapping[int, pd.DataFrame]) -> tuple[Values, list[Values]]:
    """Mean comparisons of each point of an arm's line, and the returns of its seeds.

    The line begins with the zero reward's return at no comparison.
    """
    x = np.array([0.0, *(some["comparisons"].mean() for some in budgets.values())])
    return x, [_own(runs, "zero"), *(some["return"].to_numpy(float) for some in budgets.values())]


def _needed(runs: pd.DataFrame) -> pd.DataFrame:
    rows, columns = [], ["task", "schedule and teacher", "comparisons"]
    for task, on_task in runs.groupby("task", sort=False):
        if not (len(_own(on_task, "task")) and len(_own(on_task, "zero"))):
            continue
        for arm, budgets in _learned(on_task):
            x, samples = _line(on_task, budgets)

            def crossing(own: Values, *returns: Values, x: Values = x) -> float:
                level = interquartile_mean(own)
                y = np.array([interquartile_mean(each) for each in returns])
                return stats.first_reached(x, y, level - (1 - SHARE) * abs(level))

            rows.append((task, arm, bootstrap(crossing, _own(on_task, "task"), *samples)))
    return pd.DataFrame(rows, columns=columns)


def _savings(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for task, on_task in runs.groupby("task", sort=False):
        arms = dict(_learned(on_task))
        for arm, budgets in arms.items():
            constant = f"Constant, {arm.rpartition(', ')[2]}"
            if arm == constant or constant not in arms or not len(_own(on_task, "zero")):
                continue
            budget = max(budgets)
            asked = budgets[budget]
            x, samples = _line(on_task, arms[constant])

            def ratio(
                own: Values, *returns: Values, x: Values = x, asked: pd.DataFrame = asked
            ) -> float:
                y = np.array([interquartile_mean(each) for each in returns])
                reached = stats.first_reached(x, y, interquartile_mean(own))
                return float(asked["comparisons"].mean() / max(1.0, min(reached, x[-1])))

            saved = bootstrap(ratio, asked["return"], *samples)
            row = {"task": task, "schedule and teacher": arm, "comparisons over constant's": saved}
            seeds = len(asked)
            row["verdict"] = saved.verdict(seeds, even=1, higher_is_better=False)
            if budget in arms[constant]:
                same = arms[constant][budget]
                share = asked["comparisons"].mean() / same["comparisons"].mean()
                gap = bootstrap(
                    lambda a, b: interquartile_mean(a) - interquartile_mean(b),
                    asked["return"], same["return"],
                )  # fmt: skip
                row |= {"asked": float(share), "return gap": gap}
            rows.append(row)
    columns = ["task", "schedule and teacher", "comparisons over constant's", "verdict", "asked",
               "return gap"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _numbers(runs: pd.DataFrame, needed: pd.DataFrame, savings: pd.DataFrame) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for task, on_task in runs.groupby("task", sort=False):
        arms = {str(r): _own(on_task, str(r)) for r in on_task["reward"].unique() if r != "learned"}
        if lines := _learned(on_task):
            budgets = lines[0][1]
            arms["learned"] = budgets[max(budgets)]["return"].to_numpy(float)
        for name, returns in arms.items():
            value, *ends = bootstrap(interquartile_mean, returns)
            numbers |= {f"return.{task}.{name}": value, f"return_interval.{task}.{name}": ends}
            numbers[f"returns.{task}.{name}"] = returns.tolist()
        if {"learned", "task"} <= set(arms):
            value, *ends = bootstrap(
                lambda a, b: interquartile_mean(a) / interquartile_mean(b),
                arms["learned"], arms["task"],
            )  # fmt: skip
            worst = float(arms["learned"].min() / np.median(arms["task"]))
            numbers |= {f"return_ratio.{task}": value, f"return_ratio_interval.{task}": ends}
            numbers[f"worst_ratio.{task}"] = worst
    for row in needed.drop_duplicates("task").to_dict("records"):
        numbers[f"comparisons_90.{row['task']}"] = row["comparisons"].value
        numbers[f"comparisons_90_interval.{row['task']}"] = row["comparisons"][1:]
    unsure = savings["schedule and teacher"].astype(str).str.startswith("WhenUnsure")
    for row in savings[unsure].to_dict("records"):
        task, saved, gap = row["task"], row["comparisons over constant's"], row["return gap"]
        numbers[f"unsure_ratio.{task}"] = saved.value
        numbers[f"unsure_ratio_interval.{task}"] = saved[1:]
        if isinstance(gap, Interval):
            numbers[f"unsure_asked.{task}"] = row["asked"]
            numbers[f"unsure_return_gap.{task}"] = gap.value
            numbers[f"unsure_return_gap_interval.{task}"] = gap[1:]
    return numbers


def _returns_figure(runs: pd.DataFrame) -> Figure:
    """Final true return against comparisons: a panel a task, a line for each way of asking."""
    look = plots.looks([name for name, _ in _learned(runs)])

    def draw(axes: Axes, on_task: pd.DataFrame) -> None:
        for reward in on_task["reward"].unique():
            if reward == "learned":
                continue
            arm = plots.ARMS[reward]
            value, low, high = bootstrap(interquartile_mean, _own(on_task, reward))
            axes.axhline(value, color=arm.colour, linestyle=arm.line, linewidth=1.2, label=arm.name)
            if reward == "task" and np.isfinite([low, high]).all():
                axes.axhspan(low, high, color=arm.colour, alpha=0.1, linewidth=0)
        for name, budgets in _learned(on_task):
            x = [some["comparisons"].mean() for some in budgets.values()]
            found = [bootstrap(interquartile_mean, some["return"]) for some in budgets.values()]
            y, low, high = np.array(found).T
            reach = np.nan_to_num([y - low, high - y])
            axes.errorbar(x, y, yerr=reach, capsize=2, label=name, **look[name])
        axes.set_xlim(left=0)
        axes.set_xlabel("comparisons")

    figure = plots.by_task(runs, draw, width=10.8, height=3.6)
    figure.axes[0].set_ylabel("true return of the final policy")
    return figure


def _asked_figure(results: pd.DataFrame) -> Figure | None:
    """Comparisons against steps of training, mean over seeds, at each arm's largest budget."""
    learned = results[results["reward"] == "learned"]
    if not len(learned):
        return None
    look = plots.looks([name for name, _ in _learned(results)])

    def draw(axes: Axes, on_task: pd.DataFrame) -> None:
        for name, budgets in _learned(on_task):
            asked = budgets[max(budgets)].groupby("step")["asked"].mean()
            axes.step(asked.index, asked, where="post", label=name, color=look[name]["color"])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("training steps of the policy")

    figure = plots.by_task(learned, draw, width=10.8, height=3.2)
    figure.axes[0].set_ylabel("comparisons")
    return figure


def _pool_sections(results: pd.DataFrame) -> list[Section]:
    look = plots.looks(list(results["teacher"].unique()))
    final = results[results["comparisons"] == results["comparisons"].max()]
    rows = [
        (task, teacher, bootstrap(interquartile_mean, of["accuracy"]), len(of))
        for (task, teacher), of in final.groupby(["task", "teacher"], sort=False)
    ]
    reference = str(results["teacher"].iloc[0])
    gaps = stats.paired(final, "accuracy", "teacher", reference).groupby(
        ["task", "teacher"], sort=False
    )
    differences = []
    for (task, teacher), of in gaps:
        gap = bootstrap(interquartile_mean, of["difference"])
        differences.append((task, teacher, gap, gap.verdict(len(of))))
    columns = ["task", "teacher", "difference", "verdict"]
    return [
        Section(
            "Accuracy against comparisons",
            "Held-out pairs predicted correctly; the table is at the largest budget.",
            plots.accuracy_by_task(results, "teacher", look, width=10.8, height=3.2),
            pd.DataFrame(rows, columns=["task", "teacher", "accuracy", "seeds"]),
        ),
        Section(
            f"Accuracy less that with the first teacher ({reference})",
            "At the largest budget, seed by seed.",
            table=pd.DataFrame(differences, columns=columns),
        ),
    ]
