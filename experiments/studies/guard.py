"""Study of guards: which changes of the world are found, how soon, and at what cost.

**Detection.** An agent is trained with PPO on each task's own reward. Some of its episodes teach
each detector what is familiar, others give each statistic the threshold with the promised rate of
false alarms (`ood.conformal`), and others test. Each test episode is played again, from the same
first state, in a world that changes at a known step (`envs.perturbations`). The monitor only
watches, so the cost of the shift is measured on the same episodes. Those with an alarm are played a
third time and halted where it came: what is earned so, less what was earned unguarded, is the harm
prevented.

**Promise.** False alarms per episode of every detector and statistic, over several calibrations.

**Selection.** Confident mispredictions on clips of unseen policies, and how many are given when
the least sure fifth is withheld (`ood.selective`).

**Published.** Frame-wise numbers beside those of Haider et al. (2023, AAMAS, "Out-of-distribution
detection for reinforcement learning agents with probabilistic dynamics models", appendix, Table 7),
for the two disturbances that have a counterpart here. Their policy is TD3 with a return of about
7,350, ours a weaker PPO that explores; their simulator is their own, ours Gymnasium's v5, whose
inertia is scaled with its mass. A gap therefore says little about the detectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import betabinom
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from experiments.analysis import plots
from experiments.analysis.page import Report, Section
from experiments.analysis.stats import over_tasks
from experiments.envs.perturbations import PERTURBATIONS, Severity, perturb
from experiments.envs.rollout import play, play_batch
from experiments.envs.tasks import Task, find_task, make_env
from experiments.registry import find_class, make_named
from experiments.studies import PoolSettings, check_least, compare_by_return, seed_range
from experiments.training.agents import load_policy, train_agent
from ood import MEWMA, STATISTICS, Monitor, OODDetector
from ood.conformal import conformal_rank, episode_maxima
from ood.selective import confidence, select
from rewardmodels import Calibrated, InvalidInput, LaplaceHead, fit
from rewardmodels.fitting import isolated_randomness

Array = NDArray[Any]
Part = Literal["detection", "promise", "selection", "published"]

COSTLY = 0.2  # share of the return after its onset that a harmful shift takes
FOUND = 0.5  # of a shift's episodes, for it to count as found
CALIBRATIONS, STANDARDISE = 10, 0.25  # of the promise; `ood.calibrate`'s own share
COVERAGE = 0.8
PROMISE_EPISODES = {"calibration": 52, "tests": 100, "familiar": 40, "horizon": 200}

PUBLISHED: dict[str, tuple[str, Severity]] = {
    "bm_factor_severe": ("mass", "mild"),  # all mass times 1.5, theirs and ours
    "act_factor_severe": ("strength", "middle"),  # actions times 1.5; forces times 0.5
}
"""Haider et al.'s disturbances of HalfCheetah, each with the nearest shift and its severity."""

GRID = ("tasks", "detectors", "seeds", "first_seed", "parts")
QUICK = {
    "tasks": ("HalfCheetah",), "detectors": ("Mahalanobis", "KNN"), "statistics": ("CUSUM",),
    "severities": ("middle",), "steps": 102_400, "horizon": 200, "onset": 75, "familiar": 30,
    "calibration": 40, "tests": 5, "seeds": 1, "promise_share": 0.1, "pairs": 1000,
    "pool_steps": 20_480, "pool_episodes": 2, "headline": ("Mahalanobis", "CUSUM"),
}  # fmt: skip


@dataclass(frozen=True)
class Settings(PoolSettings):
    """Settings of the study.

    Args:
        tasks: MuJoCo tasks that `rewardmodels learn` takes.
        detectors: Names or import paths.
        statistics: Names or import paths.
        shifts: Names; None for all that a task can show.
        severities: Of each shift.
        alpha: Promised false alarms per episode.
        steps: Training steps of each agent.
        horizon: Steps per episode.
        onset: Steps before the world changes.
        familiar: Episodes that detectors are fitted to.
        calibration: Episodes that thresholds are calibrated on.
        tests: Episodes in the usual world, and in each other.
        seeds: Draws of all these episodes.
        parts: What to measure: "detection", "promise", "selection", "published".
        headline: Detector and statistic that the key numbers are about.
        promise_share: Share of the promise's episodes (10 calibrations of 52, 100 tests each).
        pairs: Pairs of clips that the selection is measured on.
        published: CSV with `env`, `mod` and `<DETECTOR>_auroc`, `_ap` and `_fpr95`, for
            "published".
        agents: Directory of the trained agents; `pools`, `pool_steps` and `pool_episodes` are for
            "selection".

    Raises:
        InvalidInput: A number out of range, a shift that a task can't show, or "published" without
            its file.
        UnknownName: A task, detector, statistic or shift that doesn't exist.
    """

    tasks: Sequence[str] = ("HalfCheetah", "Hopper", "Walker2d", "Swimmer")
    detectors: Sequence[str] = ("Mahalanobis", "KNN", "DynamicsEnsemble")
    statistics: Sequence[str] = tuple(STATISTICS)
    shifts: Sequence[str] | None = None
    severities: Sequence[Severity] = get_args(Severity)
    alpha: float = 0.05
    steps: int = 300_000
    horizon: int = 400
    onset: int = 150
    familiar: int = 300
    calibration: int = 132
    tests: int = 40
    seeds: int = 1
    parts: Sequence[Part] = ("detection", "promise", "selection")
    headline: tuple[str, str] = ("DynamicsEnsemble", "MEWMA")
    promise_share: float = 1.0
    pairs: int = 5000
    published: Path | None = None
    agents: Path = Path("runs/agents")

    def __post_init__(self) -> None:
        check_least(
            self, onset=1, horizon=self.onset + 1, steps=0, familiar=1, calibration=2, tests=1,
            seeds=1, pairs=10, promise_share=0.01,
        )  # fmt: skip
        for name in self.detectors:
            make_named("detector", name, observation_size=1, seed=0)
        for name in self.statistics:
            make_named("statistic", name)
        for task in self.tasks:
            find_task(task)
        for name in self.tasks if self.shifts is not None else ():
            _shifts(self.task(name), self.shifts, self.severities)
        if "published" in self.parts and self.published is None:
            raise InvalidInput("published: expected the CSV of published numbers, got none.")
        if not 0 < self.alpha < 1:
            raise InvalidInput(f"alpha: expected a share above 0 and below 1, got {self.alpha}.")
        if "published" in self.parts:
            _published_table(self)

    def task(self, name: str) -> Task:
        """Return a task with the study's horizon."""
        return replace(find_task(name), horizon=self.horizon)

    def agent(self, task: str) -> Path:
        """Return the path of a task's agent."""
        return self.agents / f"{task.replace('/', '_')}-{self.steps}-steps.safetensors"


def prepare(settings: Settings) -> None:
    """Train the agents and the pools, which cells share."""
    for task in settings.tasks:
        if not settings.agent(task).exists():
            train_agent(find_task(task), settings.steps, settings.agent(task))
        if "selection" in settings.parts:
            settings.pool(task, progress=True)


def cells(settings: Settings) -> list[dict[str, Any]]:
    """One cell for each part, task, detector and seed, as far as the part depends on them."""
    grid: list[dict[str, Any]] = []
    for seed in seed_range(settings):
        for task in settings.tasks:
            axes = {"task": task, "seed": seed}
            for part in ("detection", "promise"):
                if part in settings.parts:
                    grid += [{"part": part, **axes, "detector": d} for d in settings.detectors]
            if "selection" in settings.parts:
                grid.append({"part": "selection", **axes, "detector": ""})
        if "published" in settings.parts:
            axes = {"task": "HalfCheetah", "seed": seed}
            grid += [{"part": "published", **axes, "detector": d} for d in settings.detectors]
    return grid


def cell(
    settings: Settings, part: Part, task: str, detector: str, seed: int
) -> list[dict[str, Any]]:
    """Measure one part."""
    torch.set_num_threads(1)
    if part == "selection":
        return [_selection(settings, task, seed)]
    measure = {"detection": _detection, "promise": _promise, "published": _published}[part]
    return measure(settings, task, detector, seed)


def _detection(settings: Settings, name: str, detector: str, seed: int) -> list[dict[str, Any]]:
    """Rows of each statistic, shift and severity."""
    task, first = settings.task(name), settings.familiar + settings.calibration
    policy = load_policy(task, settings.agent(name))
    usual = play(lambda: make_env(task), policy, first + settings.tests, seed)
    features, test = usual.features(), usual[first : first + settings.tests]
    frames = torch.cat(features[: settings.familiar])
    fitted = _fitted(detector, task, frames, seed)
    std = frames[:, -usual.first.shape[1] :].double().numpy().std(0)
    monitors = {s: Monitor(fitted, find_class("statistic", s)()) for s in settings.statistics}
    usual_values = {}
    for statistic, monitor in monitors.items():
        monitor.calibrate(features[settings.familiar : first], settings.alpha)
        usual_values[statistic] = _along(monitor, test.features())
    rows = []
    for shift in _shifts(task, settings.shifts, settings.severities):
        for severity in settings.severities:
            changed = _changed(task, shift, severity, settings.onset, seed, std)
            # The same first states and randomness: what is lost is lost to the shift.
            other = play(changed, policy, settings.tests, seed, first=first)
            for statistic, monitor in monitors.items():
                assert monitor.threshold is not None
                values, threshold = _along(monitor, other.features()), monitor.threshold.value
                alarms, halted = values > threshold, other
                if alarms.any():
                    halts = np.where(alarms.any(1), alarms.argmax(1) + 1.0, np.inf)
                    halted = play(changed, policy, settings.tests, seed, first=first, halts=halts)
                row: dict[str, Any] = {"statistic": statistic, "shift": shift, "severity": severity}
                row |= detection_scores(usual_values[statistic], values, threshold, settings.onset)
                for key, of in (("usual", test), ("shifted", other), ("halted", halted)):
                    row[f"{key}_return"] = float(of.rewards[:, settings.onset :].sum(1).mean())
                rows.append(row)
    return rows


def detection_scores(
    usual: Array, other: Array, threshold: float, onset: int
) -> dict[str, float | None]:
    """Score a statistic on episodes that change at a step.

    Args:
        usual: `(N, T)`, the statistic along episodes of the usual world.
        other: `(M, T)`, along those that change after `onset` steps.
        threshold: Raises an alarm when exceeded.
        onset: In steps.

    Returns:
        found: Share with an alarm after the onset among the episodes without one before it (how
            detection is judged given no earlier alarm, Pollak 1985, Ann. Stat. 13:206).
        found_of_all: The same of all M: an alarm before the onset counts as a miss.
        delay: Median steps from the onset to the alarm, 1 for the first; None without any.
        fpr_at_95_tpr: Share of the N episodes whose largest value after the onset is above one
            that 95% of the M exceed.
        auroc: Of the largest values after the onset, changed against usual.
        false_alarms: Share of the N episodes with any alarm.

    Example:
        >>> usual, other = np.array([[0.0, 1, 0, 0], [0, 0, 3, 0]]), np.array([[0.0, 0, 1, 4]])
        >>> detection_scores(usual, other, threshold=2, onset=2)  # doctest: +NORMALIZE_WHITESPACE
        {'found': 1.0, 'found_of_all': 1.0, 'delay': 2.0, 'auroc': 1.0, 'fpr_at_95_tpr': 0.0,
         'false_alarms': 0.5}
    """
    alarms = other > threshold
    running = ~alarms[:, :onset].any(1)
    found = alarms.any(1) & running
    delays = alarms[found].argmax(1) - onset + 1
    largest = np.concatenate([usual[:, onset:].max(1), other[:, onset:].max(1)])
    auroc, _, fpr = _ranking(np.arange(len(largest)) >= len(usual), largest)
    return {
        "found": float(found.sum() / max(1, running.sum())),
        "found_of_all": float(found.mean()),
        "delay": float(np.median(delays)) if len(delays) else None,
        "auroc": auroc,
        "fpr_at_95_tpr": fpr,
        "false_alarms": float((usual > threshold).any(1).mean()),
    }


def _promise(settings: Settings, name: str, detector: str, seed: int) -> list[dict[str, Any]]:
    """Rate of false alarms of each statistic.

    The promise holds over calibration and episode together, so a single calibration says little,
    however many episodes test it: there are several, each with episodes of its own. The detector
    may be the same for all.
    """
    share, count = settings.promise_share, PROMISE_EPISODES
    calibration, tests, familiar = (
        max(least, round(share * count[key]))
        for key, least in (("calibration", 26), ("tests", 5), ("familiar", 5))
    )
    calibrations = max(4, round(share * CALIBRATIONS))
    task = replace(find_task(name), horizon=max(50, round(share * count["horizon"])))
    act, each = load_policy(task, settings.agent(name)), calibration + tests
    episodes = play_batch(task, act, familiar + calibrations * each, seed).features()
    fitted = _fitted(detector, task, torch.cat(episodes[:familiar]), seed)
    limit, rows = highest_rate(settings.alpha, calibrations, calibration, tests), []
    for statistic in settings.statistics:
        monitor = Monitor(fitted, find_class("statistic", statistic)())
        alarms = 0
        for start in range(familiar, len(episodes), each):
            own = episodes[start : start + each]
            known = own[:calibration]
            threshold = monitor.calibrate(known, settings.alpha, standardise=STANDARDISE)
            seen = [monitor.scores(episode).numpy() for episode in own[calibration:]]
            maxima = episode_maxima(seen, monitor.statistic, threshold)
            alarms += int((maxima > threshold.value).sum())
        rate = alarms / (calibrations * tests)
        rows.append({"statistic": statistic, "false_alarms": rate, "false_alarm_limit": limit})
    return rows


def highest_rate(alpha: float, calibrations: int, calibration: int, tests: int) -> float:
    r"""Return the rate that a kept promise exceeds in one case of 20.

    Given one calibration of n maxima, alarms among m `tests` are beta-binomial with parameters
    $n + 1 - k$ and k, k the threshold's rank (Vovk 2012); those of several `calibrations` are
    independent. Each takes `calibration` episodes, of which n aren't used to standardise.

    Example:
        >>> highest_rate(0.05, 10, 52, 100)  # a binomial of 1,000 would have 0.062
        0.072
    """
    n = calibration - max(2, round(STANDARDISE * calibration))
    rank = conformal_rank(n, alpha)
    alarms = betabinom(tests, n + 1 - rank, rank).rvs((200_000, calibrations), random_state=0)
    return float(np.quantile(alarms.sum(1), 0.95)) / (calibrations * tests)


def _selection(settings: Settings, task: str, seed: int) -> dict[str, Any]:
    """Count confident mispredictions, and those that are given at 80% coverage.

    LaplaceHead learns from comparisons of the four least skilled policies of a pool, and is asked
    about the three most skilled.
    """
    pool, draw = settings.pool(task), torch.Generator().manual_seed(seed)
    known = compare_by_return(pool.half(0).clips(600, 25, draw, skills=slice(0, 4)))
    unseen = compare_by_return(
        pool.half(1).clips(2 * settings.pairs, 25, draw, skills=slice(-3, None))
    )
    model = fit(LaplaceHead(), known[90:], seed=seed)
    calibrated = Calibrated(model).calibrate(known[:90], random=True)
    probability = calibrated.posterior(unseen.clips).preference(unseen.pairs).double()
    least = float(confidence(probability).quantile(1 - COVERAGE))
    chosen = select(probability, unseen.preference, min_confidence=least)
    return {
        "confident_errors": chosen.confident_errors,
        "confident_errors_given": chosen.confident_errors_kept,
        "given": int(chosen.kept.sum()),
    }


def _published_table(settings: Settings) -> pd.DataFrame:
    """Read the published numbers about HalfCheetah."""
    assert settings.published is not None
    try:
        table = pd.read_csv(settings.published)
        table = table[table["env"] == "MJHalfCheetah-v0"]
        missing = sorted(PUBLISHED.keys() - set(table["mod"]))
    except (ValueError, KeyError) as error:  # not UTF-8, an unclosed quote, no such column
        raise InvalidInput(
            "published: expected a CSV file with columns env and mod, got another or a damaged one "
            f"({' '.join(str(error).split())})."
        ) from error
    if missing:
        raise InvalidInput(
            "published: expected rows with env MJHalfCheetah-v0 and each mod of "
            f"{', '.join(PUBLISHED)}, got none of {', '.join(missing)} in {settings.published}."
        )
    return table


def _published(settings: Settings, name: str, detector: str, seed: int) -> list[dict[str, Any]]:
    """Frame-wise scores beside the published ones, for each disturbance."""
    table = _published_table(settings)
    task = replace(find_task(name), horizon=1000)
    act, first = load_policy(task, settings.agent(name)), 90
    usual = play(lambda: make_env(task), act, first, seed).features()
    fitted = _fitted(detector, task, torch.cat(usual[:50]), seed)
    monitor = Monitor(fitted, MEWMA())
    monitor.calibrate(usual[50:], alpha=0.1)
    onsets, rows = np.random.default_rng(seed).integers(2, task.horizon, settings.tests), []
    for mod, (shift, severity) in PUBLISHED.items():
        found = table[table["mod"] == mod]
        other = [
            play(_changed(task, shift, severity, int(onset), seed, None), act, 1, seed,
                 first=first + place)
            for place, onset in enumerate(onsets)
        ]  # fmt: skip
        features = [episode.features()[0] for episode in other]
        after = np.arange(task.horizon) >= onsets[:, None]
        frames = np.stack([fitted.score(episode).numpy() for episode in features])
        along = _along(monitor, features)
        scores = {
            f"{detector}, single frames": _ranking(after.ravel(), frames.ravel()),
            f"{detector}, MEWMA": _ranking(after.ravel(), along.ravel()),
        } | {
            column.removesuffix("_auroc"): tuple(
                float(found[column.replace("auroc", metric)].iloc[0])
                for metric in ("auroc", "ap", "fpr95")
            )
            for column in found.columns
            if column.endswith("_auroc")
        }
        rows += [
            {"mod": mod, "shift": f"{shift} {severity}", "scorer": scorer, "auroc": auroc,
             "ap": precision, "fpr_at_95_tpr": fpr}
            for scorer, (auroc, precision, fpr) in scores.items()
        ]  # fmt: skip
    return rows


def _ranking(truth: Array, values: Array) -> tuple[float, float, float]:
    """AUROC, average precision, and false positive rate at 95% true positives."""
    fpr, tpr, _ = roc_curve(truth, values)
    return (
        float(roc_auc_score(truth, values)),
        float(average_precision_score(truth, values)),
        float(fpr[np.argmax(tpr >= 0.95)]),
    )


def _along(monitor: Monitor, episodes: Sequence[torch.Tensor]) -> Array:
    """A calibrated monitor's statistic `(N, T)` along the features of whole episodes."""
    assert monitor.threshold is not None
    scores = [monitor.scores(episode).numpy() for episode in episodes]
    steps = np.arange(len(scores[0]))
    return monitor.statistic.run([monitor.threshold.standardise(row, steps) for row in scores])


def _changed(
    task: Task, shift: str, severity: Severity, onset: int, seed: int, std: Array | None
) -> Callable[[], gym.Env[Any, Any]]:
    """Return a function that makes the task's environment with the shift."""
    return lambda: perturb(make_env(task), shift, severity, onset, seed, observation_std=std)


def _shifts(task: Task, names: Sequence[str] | None, severities: Sequence[Severity]) -> list[str]:
    """Return the named shifts, or all that the task can show."""
    env, shown = make_env(task), []
    std = np.ones(env.observation_space.shape or ())
    for name in PERTURBATIONS if names is None else names:
        try:
            for severity in severities:
                perturb(env, name, severity, 0, 0, observation_std=std)
        except InvalidInput:
            if names is not None:
                raise
        else:
            shown.append(name)
    return shown


def _fitted(name: str, task: Task, frames: torch.Tensor, seed: int) -> OODDetector:
    """Fit a detector of a task's transitions."""
    size = make_env(task).observation_space.shape[0]  # type: ignore[index]
    with isolated_randomness(seed):
        detector: OODDetector = make_named("detector", name, observation_size=size, seed=seed)
        return detector.fit(frames)


def report(results: pd.DataFrame) -> Report:
    """Detection over all shifts and for each, the promise, and the selection."""
    parts = {str(part): rows for part, rows in results.groupby("part", sort=False)}
    sections: list[Section] = []
    numbers: dict[str, Any] = {}
    adders = {
        "detection": _detection_sections, "promise": _promise_section,
        "selection": _selection_section, "published": _published_section,
    }  # fmt: skip
    for part, add in adders.items():
        if part in parts:
            found, added = add(parts[part].dropna(axis="columns", how="all"))
            sections += found
            numbers |= added
    return Report("When does a guard notice that the world has changed?", sections, numbers)


Found = tuple[list[Section], dict[str, Any]]


def _detection_sections(rows: pd.DataFrame) -> Found:
    keys = ["task", "shift", "severity"]
    mean = rows.groupby(keys)[["usual_return", "shifted_return"]].transform("mean")
    lost = (mean["usual_return"] - mean["shifted_return"]) / mean["usual_return"].abs()
    rows = rows.assign(lost=lost, harmful=lost >= COSTLY)
    pairs, table = ["detector", "statistic"], []
    for (detector, statistic), of in rows.groupby(pairs, sort=False):
        seeds = of.groupby(["task", "seed"])
        line: dict[str, Any] = {"detector": detector, "statistic": statistic}
        for name in ("found", "auroc", "fpr_at_95_tpr", "false_alarms"):
            line[name.replace("_", " ")] = over_tasks(seeds[name].mean().reset_index(), name)
        line["harm prevented"] = harm_prevented(of[of["harmful"]])
        table.append(line)
    sections = [
        Section(
            "Over all shifts and severities",
            f"A shift is harmful if it takes {COSTLY:.0%} of the return or more. Harm prevented is "
            "the share of the return lost to harmful shifts that halting gave back; it is negative "
            "where the shifted agent still earned more than one that stands still.",
            table=pd.DataFrame(table),
            digits=2,
        ),
        Section(
            "Episodes in which each shift is found",
            "Share of the episodes without an alarm before the onset, middle severity where there "
            "is one, with the headline statistic; filled: harmful shifts.",
            _detection_figure(rows),
        ),
    ]
    for statistic, of in rows.groupby("statistic", sort=False):
        each = of.groupby([*keys, "detector"], sort=False)
        lines = each[["lost", "found", "delay"]].mean()
        lines["harm prevented"] = [harm_prevented(group) for _, group in each]
        wide = lines.reset_index().pivot_table(
            index=[*keys, "lost"], columns="detector",
            values=["found", "delay", "harm prevented"], sort=False,
        )  # fmt: skip
        wide.columns = [f"{metric}, {detector}" for metric, detector in wide.columns]
        text = "Share of the return lost, share of episodes found, median delay in steps."
        sections.append(Section(f"With {statistic}", text, table=wide.reset_index(), digits=2))
    return sections, _detection_numbers(rows)


def harm_prevented(rows: pd.DataFrame) -> float:
    """Share of the return lost to shifts that halting gave back; NaN where nothing was lost.

    Example:
        >>> harm_prevented(pd.DataFrame({"usual_return": [10.0], "shifted_return": [-10.0],
        ...                              "halted_return": [0.0]}))
        0.5
    """
    names = ["usual_return", "shifted_return", "halted_return"]
    usual, shifted, halted = rows[names].astype(float).sum()
    return float((halted - shifted) / (usual - shifted)) if usual > shifted else float("nan")


def _headline(rows: pd.DataFrame, *, every_detector: bool = False) -> pd.DataFrame:
    """Rows of the headline detector and statistic, of middle severity where it was studied."""
    detector, statistic = rows["headline"].iloc[0]
    own = rows[rows["statistic"] == statistic]
    if not every_detector:
        own = own[own["detector"] == detector]
    return own[own["severity"] == "middle"] if (own["severity"] == "middle").any() else own


def _detection_numbers(rows: pd.DataFrame) -> dict[str, Any]:
    own = _headline(rows)
    numbers: dict[str, Any] = {}
    columns = ["lost", "found", "found_of_all", "delay", "auroc"]
    for suffix, of in (("", own), *((f".{task}", of) for task, of in own.groupby("task"))):
        harmful = of[of["harmful"]]
        numbers |= {
            f"found{suffix}": harmful["found"].mean(),
            f"found_of_all{suffix}": harmful["found_of_all"].mean(),
            f"shifts_found{suffix}": (harmful["found"] >= FOUND).mean(),
            f"median_delay_steps{suffix}": harmful["delay"].median(),
            f"auroc{suffix}": harmful["auroc"].mean(),
            f"found_harmless{suffix}": of.loc[~of["harmful"], "found"].mean(),
        }
        if suffix:
            numbers[f"shifts{suffix}"] = of.groupby("shift")[columns].mean().to_dict("index")
    return numbers


def _detection_figure(rows: pd.DataFrame) -> Figure:
    own = _headline(rows, every_detector=True)
    look = plots.looks(list(own["detector"].unique()))
    names = list(own["shift"].unique())

    def draw(axes: Axes, on_task: pd.DataFrame) -> None:
        for detector, of in on_task.groupby("detector", sort=False):
            offset = 0.12 * (list(look).index(str(detector)) - (len(look) - 1) / 2)
            for harmful, some in of.groupby("harmful"):
                mean = some.groupby("shift")["found"].mean()
                axes.plot(
                    mean.to_numpy(), [names.index(shift) + offset for shift in mean.index],
                    look[str(detector)]["marker"], color=look[str(detector)]["color"],
                    fillstyle="full" if harmful else "none",
                    label=detector if harmful else None,
                )  # fmt: skip
        axes.set_xlim(-0.05, 1.05)
        axes.set_xlabel("found")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)

    return plots.by_task(own, draw, columns=4, height=0.6 + 0.28 * len(names), sharey=True)


def _promise_section(rows: pd.DataFrame) -> Found:
    alpha, limit = rows["alpha"].iloc[0], rows["false_alarm_limit"].iloc[0]
    rates = rows.groupby(["task", "detector", "statistic"], sort=False)["false_alarms"].mean()
    wide = rates.unstack("statistic").reset_index()
    section = Section(
        "False alarms per episode against the promise",
        f"Promised: at most {alpha:g}. A rate that keeps the promise is above {limit:.3f} in one "
        "case of 20, since calibrations differ too.",
        table=wide,
    )
    numbers = {
        f"false_alarm.{task}.{str(detector).rpartition('.')[2]}.{statistic}": rate
        for (task, detector, statistic), rate in rates.items()
    }
    return [section], numbers | {"alpha": alpha, "false_alarm_limit": limit}


def _selection_section(rows: pd.DataFrame) -> Found:
    counts = ["confident_errors", "confident_errors_given", "given"]
    table = rows.groupby("task", sort=False)[counts].sum().astype(int).reset_index()
    wrong, passed, given = (int(table[name].sum()) for name in counts)
    section = Section(
        f"Confident mispredictions at {COVERAGE:.0%} coverage",
        "Pairs of clips of unseen policies: predictions with a probability over 0.9 that are "
        "wrong, those of them that are given when the least sure fifth is withheld, and all given.",
        table=table.rename(columns={name: name.replace("_", " ") for name in counts}),
    )
    numbers = {
        "confident_mispredictions_passed": passed / wrong if wrong else None,
        "confident_mispredictions_of_given": passed / given,
        "confident_mispredictions": wrong,
    }
    return [section], numbers


def _published_section(rows: pd.DataFrame) -> Found:
    columns = ["mod", "shift", "scorer"]
    table = rows.groupby(columns, sort=False)[["auroc", "ap", "fpr_at_95_tpr"]].mean()
    text = "Of single frames, after against before the onset. Their policies and simulator differ."
    return [Section("Beside published numbers", text, table=table.reset_index(), digits=2)], {}
