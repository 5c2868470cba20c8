"""Calibration, uncertainty and cost of every predictor: in distribution, shifted, and on people.

**Simulated tasks.** Clips of the four worst of ten stages of an agent's training
(`datasets.pools`) are compared by true return. A predictor is fitted to most of these comparisons,
calibrated on the rest, and tested on clips of the same stages from other episodes ("in
distribution"), and of the three best stages ("shifted"): far better behaviour than any compared.

**People.** Three published sets of comparisons (`datasets.people`), in folds that keep together
what belongs together. The weight decay is chosen inside each training fold, as is the penalty of
the regression to compare with.

**Never taught.** People's comparisons that hold something new, by predictors fitted to those
without it: deliveries through mud, long texts, dear tickets. And an agent whose task is a target
speed, which the best stages exceed: there a reward learned from slow clips extrapolates wrongly.
"Without novelty" is the same model without its part for what was never compared.

**Speed.** Seconds for single frames, clips and samples, on one thread.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits
from torch import Tensor

from active import SyntheticTeacher
from experiments.analysis import plots
from experiments.analysis.page import Report, Section
from experiments.analysis.stats import Interval, Values, interquartile_mean, over_tasks, paired
from experiments.datasets.people import HUMAN_DATA, baseline, splits
from experiments.datasets.pools import Pool
from experiments.registry import find_class
from experiments.studies import PoolSettings, check_least, check_tasks, make_pools, seed_range
from rewardmodels import (
    Calibrated,
    Clips,
    Comparisons,
    DeepEnsemble,
    FitOptions,
    InvalidInput,
    ReturnPosterior,
    RewardModel,
    fit,
)
from rewardmodels import calibration as score
from rewardmodels.epic import pearson_distance
from rewardmodels.saving import PREDICTORS

BASELINE = "logistic regression"
STUDIED: dict[str, Callable[..., RewardModel]] = {
    "single network": partial(DeepEnsemble, members=1),
    **PREDICTORS,
    "DeepEnsemble": partial(DeepEnsemble, members=10),
    "RandomisedPriors": partial(DeepEnsemble, members=10, prior_scale=0.3),
}
"""Registered predictors and variants, by their name in the tables; others have import paths."""

TARGET_SPEEDS = {"HalfCheetah": (8, 1.0)}
"""Place of the speed in an observation, and a target in m/s that later stages exceed, by task."""

COMPARED, SHIFTED = slice(0, 4), slice(-3, None)  # stages of training
CALIBRATION_SHARE = 0.3
COVERAGE, COVERAGE_PAIRS, RESPLITS = 0.95, 100, 200
CLIPS_SCORED = 200  # whose single frames the EPIC distance is over
SAMPLES = 64
FOLDS = 5
WEIGHT_DECAYS = (1.0, 30.0)  # AdamW multiplies them by the learning rate
PEOPLE_BATCH = 256  # of thousands of comparisons, and clips of few frames

# Key number: the test, the version of the posterior, and the column that it is made of.
KEY_NUMBERS = {
    "ece": ("in distribution", "calibrated", "ece"),
    "nll": ("in distribution", "calibrated", "log_loss"),
    "nll_raw": ("in distribution", "as fitted", "log_loss"),
    "nll_shifted": ("shifted", "calibrated", "log_loss"),
    "nll_shifted_raw": ("shifted", "as fitted", "log_loss"),
    "aurc": ("in distribution", "calibrated", "aurc"),
    "aurc_shifted": ("shifted", "calibrated", "aurc"),
    "epic": ("in distribution", "calibrated", "epic"),
    "epic_shifted": ("shifted", "calibrated", "epic"),
    "error_auroc": ("shifted", "calibrated", "error_auroc"),
    "rank_correlation": ("in distribution", "calibrated", "rank_correlation"),
    "difference_rank_correlation": ("in distribution", "as fitted", "difference_rank_correlation"),
    "fit_seconds": ("in distribution", "as fitted", "fit_seconds"),
}

GRID = ("data", "tasks", "predictors", "seeds", "first_seed")
QUICK = {
    "tasks": ("Hopper",), "tests": 1000, "seeds": 1, "pool_steps": 20_480, "pool_episodes": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Settings(PoolSettings):
    """Settings of the study.

    Args:
        data: Folder with `delivery.npz`, `pandalm.npz` and `train_tickets.npz`; None leaves people
            out.
        predictors: Names or import paths; all others are compared with the first.
        comparisons: To fit to and calibrate on, in all.
        length: Frames per clip.
        tests: Pairs that predictors are tested on.
        first_seed: The first of the seeds; coverage is measured with seed 0 alone.

    Raises:
        InvalidInput: A number out of range, no tasks or predictors, or too long clips.
        UnknownName: A task or predictor that doesn't exist.
    """

    data: Path | None = None
    predictors: Sequence[str] = tuple(STUDIED)
    comparisons: int = 300
    length: int = 25
    tests: int = 5000

    def __post_init__(self) -> None:
        check_least(self, comparisons=20, length=1, tests=2 * COVERAGE_PAIRS, seeds=1)
        for name in ("tasks", "predictors"):
            if not getattr(self, name):
                raise InvalidInput(f"{name}: expected at least one, got none.")
        for predictor in self.predictors:
            find_class("model", predictor, STUDIED)
        check_tasks(self.tasks, self.length)


prepare = make_pools


def cells(settings: Settings) -> list[dict[str, Any]]:
    """One cell for each predictor and seed on a task, or fold of people's, and for its speed."""
    predictors = list(dict.fromkeys(settings.predictors))
    grid = [
        {"kind": "simulated", "task": task, "folder": None, "predictor": predictor, "seed": seed}
        for seed in seed_range(settings)
        for task in settings.tasks
        for predictor in predictors
    ]
    grid += [{**each, "kind": "peaked"} for each in grid if each["task"] in TARGET_SPEEDS]
    if settings.data is not None:
        for load in HUMAN_DATA.values():
            data, people = load(settings.data), {"kind": "people", "folder": str(settings.data)}
            grid += [
                {**people, "task": task, "predictor": predictor, "seed": fold}
                for task in (data.name, *(f"{data.name}/{name}" for name in data.held_out))
                for predictor in (BASELINE, *predictors)
                for fold in range(FOLDS)
            ]
    speed = {"kind": "speed", "task": "", "folder": None, "seed": 0}
    return grid + [{**speed, "predictor": predictor} for predictor in predictors]


def cell(
    settings: Settings, kind: str, task: str, folder: str | None, predictor: str, seed: int
) -> list[dict[str, Any]]:
    """Scores of one predictor on each test, or its speed."""
    torch.set_num_threads(1)
    if kind == "speed":
        with threadpool_limits(1):  # NumPy's
            return [_speed(predictor)]
    if kind == "people":
        return _on_people(task, Path(str(folder)), predictor, fold=seed)
    pool = settings.pool(task)
    if kind == "peaked":
        place, target = TARGET_SPEEDS[task]
        clips = pool.trajectories
        rewards = -(clips.observations[..., place] - target).abs()
        pool = replace(pool, trajectories=replace(clips, rewards=rewards))
    return _on_pool(settings, pool, predictor, seed)


def _on_pool(settings: Settings, pool: Pool, predictor: str, seed: int) -> list[dict[str, Any]]:
    """Rows of each test, by the posterior as fitted, calibrated, and without novelty."""
    draw = torch.Generator().manual_seed(seed)

    def compared(half: int, n: int, stages: slice) -> Comparisons:
        clips = pool.half(half).clips(2 * n, settings.length, draw, skills=stages)
        pairs = torch.arange(2 * n).view(n, 2)
        return Comparisons(clips, pairs, SyntheticTeacher().answer(clips, pairs, draw))

    known = compared(0, settings.comparisons, COMPARED)
    stages = {"in distribution": COMPARED, "shifted": SHIFTED}
    tests = {name: compared(1, settings.tests, of) for name, of in stages.items()}
    held_out = round(settings.comparisons * CALIBRATION_SHARE)
    model, cost = _fitted(find_class("model", predictor, STUDIED)(), known[held_out:], seed=seed)
    calibrated = Calibrated(model).calibrate(known[:held_out], random=True)
    rows = []
    for test, comparisons in tests.items():
        shared: dict[str, Any] = {"test": test, "epic": reward_distance(model, comparisons.clips)}
        if seed == 0 and test == "in distribution":
            shared["coverage"] = coverage(model, comparisons)
        posteriors = {"calibrated": calibrated.posterior(comparisons.clips)}
        for version, posterior in (posteriors | _posteriors(model, comparisons.clips)).items():
            found = posterior_scores(posterior, comparisons) | return_scores(posterior, comparisons)
            rows.append({"version": version, **shared, **cost, **found})
    return rows


def _posteriors(model: RewardModel, clips: Clips) -> dict[str, ReturnPosterior]:
    """The posterior as fitted, and that of the same model without novelty."""
    fitted, novelty = model.posterior(clips), model.novelty
    assert novelty is not None
    amplitude, novelty.amplitude = novelty.amplitude, torch.zeros_like(novelty.amplitude)
    without = model.posterior(clips)
    novelty.amplitude = amplitude
    return {"as fitted": fitted, "without novelty": without}


def _on_people(task: str, folder: Path, predictor: str, fold: int) -> list[dict[str, Any]]:
    """Rows of one fold; the task "delivery/mud" leaves mud out of the training."""
    name, _, held_out = task.partition("/")
    data = HUMAN_DATA[name](folder)
    train, test = list(splits(data, FOLDS))[fold]
    if held_out:
        unknown = data.held_out[held_out]
        train, test = train[~unknown[train]], test[unknown[test]]
    train, test = (rows[data.decided[rows]] for rows in (train, test))

    def comparisons(rows: np.ndarray) -> Comparisons:
        return data.comparisons[torch.from_numpy(rows)]

    tests = comparisons(test).compact()
    if predictor == BASELINE:
        started = timeit.default_timer()
        probability = torch.from_numpy(baseline(data, train, test))
        seconds = timeit.default_timer() - started
        found = preference_scores(probability, tests.preference)
        return [{"version": "as fitted", "fit_seconds": seconds, **found}]

    def fitted(rows: np.ndarray, weight_decay: float) -> tuple[RewardModel, dict[str, Any]]:
        model = find_class("model", predictor, STUDIED)(weight_decay=weight_decay)
        options = FitOptions(batch_size=PEOPLE_BATCH, groups=torch.from_numpy(data.groups[rows]))
        return _fitted(model, comparisons(rows), options=options)

    inner, left = next(GroupKFold(4).split(train, groups=data.groups[train]))
    losses = []
    for weight_decay in WEIGHT_DECAYS:
        model, _ = fitted(train[inner], weight_decay)
        asked = comparisons(train[left]).compact()
        probability = model.posterior(asked.clips).preference(asked.pairs)
        losses.append(score.log_loss(probability, asked.preference))
    best = WEIGHT_DECAYS[int(np.argmin(losses))]
    model, cost = fitted(train, best)
    return [
        {"version": version, "weight_decay": best, **cost, **posterior_scores(posterior, tests)}
        for version, posterior in _posteriors(model, tests.clips).items()
    ]


def _fitted(
    model: RewardModel, comparisons: Comparisons, **options: Any
) -> tuple[RewardModel, dict[str, Any]]:
    """The model fitted, with the seconds that it took and its number of parameters."""
    started = timeit.default_timer()
    fit(model, comparisons, **options)
    seconds = timeit.default_timer() - started
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, {"fit_seconds": seconds, "parameters": parameters}


def _speed(predictor: str) -> dict[str, Any]:
    """Medians of the seconds for HalfCheetah's frames, clips of 25, and samples of 1,000 clips."""
    draw = torch.Generator().manual_seed(0)
    clips = Clips(*(torch.randn(1000, 25, size, generator=draw) for size in (17, 6)))
    some = Comparisons(clips[:200], torch.arange(200).view(100, 2), torch.arange(100) % 2.0)
    model = fit(find_class("model", predictor, STUDIED)(), some, epochs=1)
    scorer = model.frame_scorer()
    frames = [x.flatten(0, 1)[:4096].numpy() for x in (clips.observations, clips.actions)]
    first = [x[0] for x in frames]
    return {
        "frame_us": 1e6 * _median(lambda: scorer(*first), 3000),
        "batch_frame_us": 1e6 / 4096 * _median(lambda: scorer.batch(*frames), 20),
        "clips_ms": 1e3 * _median(lambda: model.posterior(clips), 10),
        "samples_seconds": _median(lambda: model.posterior(clips).rsample(100_000, draw), 1),
    }


def _median(call: Callable[[], object], times: int) -> float:
    return statistics.median(timeit.repeat(call, number=1, repeat=times))


def posterior_scores(posterior: ReturnPosterior, comparisons: Comparisons) -> dict[str, Any]:
    r"""Scores of a posterior by comparisons alone.

    Uncertainty is that of the preference, $\min(p, 1 - p)$, as a detector of wrong predictions. In
    rank correlation with the error $|p - y|$ it is epistemic alone: the spread of $p$ over samples
    of the posterior (Gleave & Irving 2022, arXiv:2203.07472). Sure is above 90%; "caught" is the
    share of wrong predictions among the least sure fifth; "expected" is what these would be were
    each prediction wrong with the probability $\min(p, 1 - p)$.
    """
    pairs, preference = comparisons.pairs, comparisons.preference
    p = posterior.preference(pairs).double().cpu()
    samples = posterior.rsample(SAMPLES, torch.Generator().manual_seed(0)).cpu()
    spread = (samples[:, pairs[:, 1]] - samples[:, pairs[:, 0]]).double().sigmoid().std(0)
    uncertainty = torch.minimum(p, 1 - p)
    wrong, sure = (p > 0.5) != (preference > 0.5), uncertainty < 0.1
    least_sure = uncertainty >= uncertainty.quantile(0.8)
    expected = uncertainty.sum()
    risk = score.risk_coverage(uncertainty, p, preference)
    places = np.ceil(np.linspace(0.05, 1, 20) * len(risk.risk)).astype(int) - 1
    reliability = score.reliability_curve(p, preference)._asdict()
    return preference_scores(p, preference) | {
        "error_auroc": score.error_detection_auroc(uncertainty, p, preference),
        "epistemic_error_auroc": score.error_detection_auroc(spread, p, preference),
        "rank_correlation": score.rank_correlation(spread, (p - preference).abs()),
        "total_rank_correlation": score.rank_correlation(uncertainty, (p - preference).abs()),
        "aurc": risk.aurc,
        "augrc": risk.augrc,
        "joint_log_loss": score.joint_log_loss(samples, pairs, preference),
        "sure_and_wrong": float((wrong & sure).double().mean()),
        "sure_and_wrong_expected": float((uncertainty * sure).mean()),
        "caught": float((wrong & least_sure).sum() / wrong.sum()) if wrong.any() else float("nan"),
        "caught_expected": float((uncertainty * least_sure).sum() / expected),
        "confidence": float((1 - uncertainty).mean()),
        "reliability": {name: values.tolist() for name, values in reliability.items()},
        "risk_by_coverage": risk.risk[places].tolist(),  # at 5%, 10%, …, 100%
    }


def preference_scores(p: Tensor, preference: Tensor) -> dict[str, float]:
    """Scores of probabilities `(Q,)` that the second clip is preferred."""
    decided = preference != 0.5
    correct = ((p > 0.5) == (preference > 0.5))[decided]
    return {
        "accuracy": float(correct.double().mean()),
        "log_loss": score.log_loss(p, preference),
        "brier": score.brier_score(p, preference),
        "ece": score.expected_calibration_error(p, preference),
        "ace": score.expected_calibration_error(p, preference, binning="mass"),
        "sharpness": score.sharpness(p),
    }


def return_scores(posterior: ReturnPosterior, comparisons: Comparisons) -> dict[str, float]:
    """Scores of a posterior by true returns.

    Where most predictions are right, $|p - y|$ and the spread of $p$ both fall as $p$ leaves one
    half. So the variance of the difference of returns is also compared with the error of that
    difference, the posterior scaled to the true returns by least squares.
    """
    mean, variance = (x.double().cpu() for x in posterior.difference(comparisons.pairs))
    returns = comparisons.clips.returns.double()
    true = returns[comparisons.pairs].diff(dim=1)[:, 0]
    scale = float((mean * true).sum() / mean.square().sum())
    error = (scale * mean - true).abs()
    return {
        "return_rank_correlation": score.rank_correlation(posterior.mean.cpu(), returns),
        "difference_rank_correlation": score.rank_correlation(variance, error),
    }


def reward_distance(model: RewardModel, clips: Clips) -> float:
    """EPIC distance of the learned from the true reward, over the frames of some clips."""
    some = clips[:CLIPS_SCORED]
    assert some.rewards is not None
    learned = model.frame_posterior(some.observations[some.mask], some.actions[some.mask]).mean
    return pearson_distance(learned, some.rewards[some.mask])


def coverage(model: Any, comparisons: Comparisons) -> float:
    """Share of held-out preferences inside prediction sets of 95%.

    Mean over draws of the pairs to calibrate on, 100 each time; the rest are tested on.
    """
    comparisons = comparisons[comparisons.preference != 0.5]
    whole = model.posterior(comparisons.clips)

    def of_numbers(clips: Clips) -> ReturnPosterior:
        return whole.select(clips.observations[:, 0, 0].long())

    # The posterior is computed once: each clip is replaced by one frame, which holds its number.
    computed: Any = SimpleNamespace(posterior=of_numbers)
    numbers = torch.arange(float(len(comparisons.clips)))[:, None, None]
    numbered = replace(comparisons, clips=Clips(numbers, numbers))
    draw, shares = torch.Generator().manual_seed(0), []
    for _ in range(RESPLITS):
        order = torch.randperm(len(numbered), generator=draw)
        known, rest = numbered[order[:COVERAGE_PAIRS]], numbered[order[COVERAGE_PAIRS:]]
        posterior = Calibrated(computed).calibrate(known, random=True).posterior(rest.clips)
        sets = posterior.prediction_set(rest.pairs, COVERAGE)
        inside = sets[torch.arange(len(rest)), (rest.preference > 0.5).long()]
        shares.append(float(inside.double().mean()))
    return statistics.mean(shares)


def report(results: pd.DataFrame) -> Report:
    """Scores and differences on simulated tasks and on people's comparisons, and costs."""
    kinds = {str(kind): rows for kind, rows in results.groupby("kind", sort=False)}
    names = [name for name in results["predictor"].unique() if name != BASELINE]
    look = plots.looks(names, reference=names[0])
    sections: list[Section] = []
    if "simulated" in kinds:
        text = (
            "Top: observed against predicted preferences, of the half above 50%. Bottom: wrong "
            "predictions among the most certain. In the table, those among the more certain half, "
            "and the expected calibration error (ECE) in distribution, less that as fitted; and, "
            "in distribution, predictions above 90% that are wrong, and the share of wrong ones "
            "among the least sure fifth, each over what perfect calibration would give."
        )
        rows = kinds["simulated"]
        sections.append(Section("Trust", text, _trust_figure(rows, look), _trust(rows)))
        text = (
            "Calibrated, where nothing else is said; interquartile means over tasks and seeds, 95% "
            "intervals stratified by task. AURC: area under the risk–coverage curve. EPIC: "
            "distance of the learned from the true reward, 0 for equivalent ones and 0.707 for "
            "uncorrelated ones. Rank correlations are between epistemic uncertainty and error."
        )
        for test, of in rows.groupby("test", sort=False):
            sections.append(Section(str(test).capitalize(), text, table=_scores(of, names[0])))
    if "people" in kinds:
        text = (
            "Means over five folds. These share training data, so intervals are Nadeau & Bengio's "
            f"(2003, section 5). Differences are from the {BASELINE} on the same fold."
        )
        rows = kinds["people"][kinds["people"]["version"] == "as fitted"]
        sections.append(Section("People", text, _people_figure(rows, look), _people(rows)))
    unknown = _never_taught(kinds)
    if len(unknown):
        text = (
            "Comparisons unlike any that predictors were fitted to, with novelty and without. Sure "
            "and wrong: share of the predictions that are above 90% and wrong. Means over folds, "
            "or interquartile means over tasks and seeds. In the figure, a predictor that knows "
            "what it doesn't know is no surer than it is right."
        )
        figure = _never_taught_figure(unknown, look)
        sections.append(Section("Never taught", text, figure, unknown))
    text = (
        "Medians on one thread, of frames and clips of HalfCheetah's shape, clips of 25 frames. "
        "Cells that are computed at the same time (`--jobs`) slow each other down."
    )
    sections.append(Section("Cost", text, table=_cost(kinds), digits=1))
    return Report("Can its uncertainty be trusted?", sections, _numbers(kinds))


def _mean(values: pd.Series) -> float:
    """Interquartile mean; NaN if the score is undefined for one of the seeds."""
    return float("nan") if values.isna().any() else float(interquartile_mean(values))


def _scores(rows: pd.DataFrame, first: str) -> pd.DataFrame:
    """Scores of each predictor on one test, and its log loss less that of the first."""
    calibrated = rows[rows["version"] == "calibrated"]
    gaps = paired(calibrated, "log_loss", by="predictor", reference=first)
    table = []
    for name, of in calibrated.groupby("predictor", sort=False):
        raw = rows[(rows["predictor"] == name) & (rows["version"] == "as fitted")]
        line = {
            "predictor": name,
            "accuracy": _mean(of["accuracy"]),
            "log loss": over_tasks(of, "log_loss"),
            "log loss as fitted": over_tasks(raw, "log_loss"),
            "ECE": over_tasks(of, "ece"),
            "ECE as fitted": over_tasks(raw, "ece"),
            "AURC": over_tasks(of, "aurc"),
            "EPIC": over_tasks(of, "epic"),
            "error AUROC": _mean(of["error_auroc"]),
            "rank correlation": _mean(of["rank_correlation"]),
            "rank correlation, differences": _mean(raw["difference_rank_correlation"]),
        }
        own = gaps[gaps["predictor"] == name]
        table.append(line | _compared(own, f"log loss less {first}'s"))
    return pd.DataFrame(table)


def _compared(gaps: pd.DataFrame, title: str) -> dict[str, Any]:
    """A difference of losses with its verdict; none if no seed has both."""
    if not len(gaps):
        return {}
    gap = over_tasks(gaps, "difference")
    seeds = int(gaps.groupby("task").size().min())
    return {title: gap, "verdict": gap.verdict(seeds, higher_is_better=False)}


def _trust(rows: pd.DataFrame) -> pd.DataFrame:
    half = rows.assign(wrong=[risk[9] for risk in rows["risk_by_coverage"]])
    table = []
    for name, of in half.groupby("predictor", sort=False):
        line: dict[str, Any] = {"predictor": name}
        certain = of[(of["version"] == "calibrated") & (of["test"] == "in distribution")]
        for column in ("sure_and_wrong", "caught"):
            ratio = certain[column] / certain[f"{column}_expected"]
            line[f"{column.replace('_', ' ')} over expected"] = _mean(ratio)
        for test, some in of[of["version"] == "calibrated"].groupby("test", sort=False):
            line[f"wrong, {test}"] = over_tasks(some, "wrong")
        known = of[(of["test"] == "in distribution") & (of["version"] != "without novelty")]
        gaps = paired(known, "ece", by="version", reference="as fitted")
        table.append(line | _compared(gaps, "ECE less as fitted"))
    return pd.DataFrame(table)


def _trust_figure(rows: pd.DataFrame, look: Mapping[str, plots.Look]) -> Figure:
    def of(test: str, version: str) -> Any:
        chosen = rows[(rows["test"] == test) & (rows["version"] == version)]
        return chosen.groupby("predictor", sort=False)

    with plots.style():
        figure, panels = plots.panels(4, columns=2, width=8.6, height=3.3)
        for axes, version in zip(panels[:2], ("as fitted", "calibrated"), strict=True):
            axes.plot([0.5, 1], [0.5, 1], color=plots.GREY, linestyle=":", linewidth=1)
            for name, some in of("in distribution", version):
                axes.plot(*_joined_reliability(some["reliability"]), label=name, **look[name])
            axes.set_xlabel("predicted probability")
            axes.set_title(f"in distribution, {version}", fontsize=11)
        panels[0].set_ylabel("observed frequency")
        for axes, test in zip(panels[2:], ("in distribution", "shifted"), strict=True):
            for name, some in of(test, "calibrated"):
                risk = np.mean(some["risk_by_coverage"].to_list(), axis=0)
                line = {**look[name], "marker": ""}
                axes.plot(np.arange(1, len(risk) + 1) / len(risk), risk, label=name, **line)
            axes.set_xlabel("predictions used, the most certain first")
            axes.set_title(test, fontsize=11)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(PercentFormatter(1))
        panels[2].set_ylabel("wrong among them")
        top = max(axes.get_ylim()[1] for axes in panels[2:])
        for axes in panels[2:]:
            axes.set_ylim(0, top)
        plots.legend_below(figure)
    return figure


def _joined_reliability(curves: Sequence[Mapping[str, Any]]) -> Values:
    """Predicted probability and observed frequency `(2, B)` of several curves, from 0.5 up."""
    curve = pd.concat([pd.DataFrame(each) for each in curves])
    curve = curve[curve["probability"] >= 0.5]
    bins = np.digitize(curve["probability"], np.linspace(0.5, 1, 6)[1:-1])
    weighted = curve[["probability", "frequency"]].mul(curve["weight"], axis="index")
    sums = weighted.groupby(bins).sum().div(curve["weight"].groupby(bins).sum(), axis="index")
    joined: Values = sums.dropna().to_numpy().T
    return joined


def fold_interval(values: Values) -> Interval:
    r"""Mean over K folds with its 95% interval.

    $\bar d \pm t_{K-1}\, s \sqrt{1/K + 1/(K-1)}$: a test fold is 1/(K − 1) of the training data
    (Nadeau & Bengio 2003, equation 3 with $n_2 / n_1 = 1/(K - 1)$). A bootstrap of folds would take
    them for independent.

    Example:
        >>> fold_interval(np.array([0.25, 0.25, 0.25]))
        Interval(value=0.25, low=0.25, high=0.25)
    """
    folds, mean = len(values), float(values.mean())
    if folds < 2:
        return Interval(mean, float("nan"), float("nan"))
    scale = float(values.std(ddof=1)) * np.sqrt(1 / folds + 1 / (folds - 1))
    reach = float(stats.t.ppf(0.975, folds - 1) * scale)
    return Interval(mean, mean - reach, mean + reach)


def _fold_gaps(rows: pd.DataFrame, column: str) -> dict[tuple[str, str], Interval]:
    """Difference of each predictor from the regression, by set of comparisons and predictor."""
    gaps = paired(rows, column, by="predictor", reference=BASELINE)
    groups = gaps.groupby(["task", "predictor"], sort=False)["difference"]
    return {(str(task), str(name)): fold_interval(of.to_numpy()) for (task, name), of in groups}


def _people(rows: pd.DataFrame) -> pd.DataFrame:
    gaps, table = _fold_gaps(rows, "log_loss"), []
    for (task, name), of in rows.groupby(["task", "predictor"], sort=False):
        gap = gaps.get((task, name))
        table.append(
            {
                "data": task,
                "predictor": name,
                "accuracy": fold_interval(of["accuracy"].to_numpy()),
                "log loss": fold_interval(of["log_loss"].to_numpy()),
                "ECE": of["ece"].mean(),
                "AURC": of["aurc"].mean(),
                "error AUROC": of["error_auroc"].mean(),
                "log loss less the regression's": "" if gap is None else gap,
                "verdict": "" if gap is None else gap.verdict(len(of), higher_is_better=False),
            }
        )
    return pd.DataFrame(table)


_SHIFT_COLUMNS = {
    "accuracy": "accuracy",
    "confidence": "confidence",
    "log_loss": "log loss",
    "ece": "ECE",
    "sure_and_wrong": "sure and wrong",
    "aurc": "AURC",
    "augrc": "AUGRC",
}


def _never_taught(kinds: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Scores on each shift by each predictor, with novelty ("as fitted") and without."""
    parts = []
    for kind, rows in kinds.items():
        if kind == "people":
            shifts = rows[rows["task"].str.contains("/") & (rows["predictor"] != BASELINE)]
            parts.append(shifts.assign(shift=shifts["task"]))
        elif kind in ("simulated", "peaked"):
            shifts = rows[(rows["test"] == "shifted") & (rows["version"] != "calibrated")]
            name = {"simulated": "better behaviour", "peaked": "beyond a target speed"}[kind]
            parts.append(shifts.assign(shift=name))
    if not parts:
        return pd.DataFrame()
    rows, table = pd.concat(parts), []
    for (shift, name), of in rows.groupby(["shift", "predictor"], sort=False):
        line = {"shift": shift, "predictor": name}
        for version, some in of.groupby("version", sort=False):
            suffix = "" if version == "as fitted" else ", without novelty"
            mean = pd.Series.mean if "/" in str(shift) else _mean
            line |= {f"{title}{suffix}": mean(some[c]) for c, title in _SHIFT_COLUMNS.items()}
        table.append(line)
    unchanged = "accuracy, without novelty"  # novelty adds variance alone
    return pd.DataFrame(table).drop(columns=unchanged, errors="ignore")


def _never_taught_figure(table: pd.DataFrame, look: Mapping[str, plots.Look]) -> Figure:
    """Mean confidence with novelty and without, and the accuracy, for each shift."""
    shifts = list(table["shift"].unique())
    with plots.style():
        height = 1.4 + 0.6 * len(shifts)
        figure, (axes,) = plots.panels(1, columns=1, width=7.2, height=height)
        axes.axvline(0.5, color=plots.GREY, linestyle=":", linewidth=1)
        for row in table.to_dict("records"):
            name = row["predictor"]
            offset = 0.7 * ((list(look).index(name) + 0.5) / len(look) - 0.5)
            place = shifts.index(row["shift"]) + offset
            before, after = row["confidence, without novelty"], row["confidence"]
            color = look[name]["color"]
            axes.plot([before, after], [place, place], color=color, linewidth=1)
            axes.plot(before, place, "o", color=color, fillstyle="none")
            axes.plot(after, place, "o", color=color, label=name)
            axes.plot(row["accuracy"], place, "|", color="black", markersize=9)
        axes.set_yticks(range(len(shifts)), shifts)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("mean confidence: hollow without novelty, filled with it\nbars: accuracy")
        plots.legend_below(figure)
    return figure


def _people_figure(rows: pd.DataFrame, look: Mapping[str, plots.Look]) -> Figure:
    """Accuracy and log loss less the regression's; a row for each set of comparisons."""
    tasks = list(rows["task"].unique())
    with plots.style():
        height = 1.2 + 1.1 * len(tasks)
        figure, panels = plots.panels(2, columns=2, width=8.6, height=height, sharey=True)
        better = {"accuracy": "right", "log_loss": "left"}
        for axes, (column, side) in zip(panels, better.items(), strict=True):
            axes.axvline(0, color=plots.GREY, linestyle=":", linewidth=1)
            for (task, name), (value, low, high) in _fold_gaps(rows, column).items():
                place = tasks.index(task) + 0.11 * (list(look).index(name) - (len(look) - 1) / 2)
                reach = np.nan_to_num([[value - low], [high - value]])
                bar = {"marker": "o", **look[name], "linestyle": ""}
                axes.errorbar(value, place, xerr=reach, label=name, **bar)
            title = f"{column.replace('_', ' ')}: to the {side} is better\nthan {BASELINE}"
            axes.set_title(title, fontsize=11)
            axes.locator_params(axis="x", nbins=5)
        panels[0].set_yticks(range(len(tasks)), tasks)
        panels[0].invert_yaxis()
        plots.legend_below(figure)
    return figure


def _cost(kinds: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    columns = {
        "fit_seconds": "fit, s",
        "frame_us": "frame at batch 1, µs",
        "batch_frame_us": "at batch 4,096, µs",
        "clips_ms": "1,000 clips, ms",
        "samples_seconds": "100,000 samples of 1,000 clips, s",
        "parameters": "parameters",
    }
    rows = pd.concat([kinds[kind] for kind in ("simulated", "speed") if kind in kinds])
    medians = rows.reindex(columns=["predictor", *columns]).groupby("predictor", sort=False)
    table = medians.median().rename(columns=columns).reset_index()
    return table.assign(parameters=table["parameters"].astype("Int64"))


def _numbers(kinds: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for row in _never_taught(kinds).to_dict("records"):
        shift = {"better behaviour": "simulated", "beyond a target speed": "peaked"}.get(
            row["shift"], row["shift"].replace("/", ".")
        )
        for name, column in (("shift_nll", "log loss"), ("sure_and_wrong", "sure and wrong")):
            key = f"{shift}.{_key(row['predictor'])}"
            numbers[f"{name}.{key}"] = row[column]
            numbers[f"{name}_without_novelty.{key}"] = row[f"{column}, without novelty"]
    if "simulated" in kinds:
        for name, of in kinds["simulated"].groupby("predictor", sort=False):
            for key, (test, version, column) in KEY_NUMBERS.items():
                chosen = of[(of["test"] == test) & (of["version"] == version)]
                if not np.isnan(mean := _mean(chosen[column])):
                    numbers[f"{key}.{_key(name)}"] = mean
            held = of.reindex(columns=["coverage"])["coverage"].dropna()  # of one seed
            if len(held):
                numbers[f"coverage.{_key(name)}"] = float(interquartile_mean(held))
                numbers[f"coverage_gap.{_key(name)}"] = numbers[f"coverage.{_key(name)}"] - COVERAGE
    if "speed" in kinds:
        for row in kinds["speed"].to_dict("records"):
            numbers[f"batch_frame_us.{_key(row['predictor'])}"] = row["batch_frame_us"]
            if row["predictor"] == "LaplaceHead":
                # Bayesian REX (Brown et al. 2020, arXiv:2002.09089) takes five minutes of MCMC.
                numbers["bayesian_rex_seconds"] = row["samples_seconds"]
    return numbers


def _key(predictor: Any) -> str:
    return "".join(word[0].upper() + word[1:] for word in str(predictor).split())
