"""Predictors of people's preferences beside what one would use otherwise, and what to withhold.

**Data.** PandaLM's answers (sentence embeddings) and train tickets (`datasets.people`), in folds by
group: a seed draws five folds, of which the first is the test. Beside it, a shift: the longest
third of the answers, or dear tickets, which the training then leaves out.

**Ours.** Each predictor with the candidate that `offline.selection` chooses within the training
groups, as in `rewardmodels fit`.

**Others.** Logistic regression and gradient boosting (scikit-learn's, both ways round) on
differences of columns, and the best single column. And stand-ins for the four methods of RewardUQ
(Yang et al. 2026, arXiv:2602.24040) on frozen embeddings, which here are all inputs: an ensemble of
heads, dropout of the features of a head, a Bayesian linear head, and an ensemble of low-rank
adapters of a frozen layer under a shared head. These have no novelty, and predict by the mean
reward alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.analysis import plots
from experiments.analysis.page import Report, Section
from experiments.analysis.stats import Interval, interquartile_mean, over_tasks, paired
from experiments.datasets.people import HUMAN_DATA, HumanData, baseline, splits
from experiments.offline.selection import candidates, choose, fit_candidate
from experiments.registry import find_class
from experiments.studies import check_least, seed_range
from experiments.studies.predictors import preference_scores
from rewardmodels import Clips, Comparisons, InvalidInput, LaplaceHead, UnknownName, fit
from rewardmodels import calibration as score
from rewardmodels.fitting import FitOptions, isolated_randomness

BASELINE, FOLDS = "logistic regression", 5
SHIFTS = {"pandalm": "long", "tickets": "dear"}
WITHHELD = np.arange(20) / 20  # shares of the predictions
SHOWN = (0.1, 0.2, 0.5)
SURE = 0.9
BINS = 20  # RewardUQ's
MEMBERS, WIDTH, RANK, DROPOUT, MASKS = 5, 64, 4, 0.1, 20
STEPS, PATIENCE = 200, 20
PRECISIONS = (1.0, 30.0, 1000.0)

GRID = ("data", "methods", "seeds", "first_seed")
QUICK = {"seeds": 1, "methods": (BASELINE, "best column", "Bayesian linear head")}


@dataclass(frozen=True)
class Predicted:
    """Predictions for Q pairs of N clips.

    Args:
        probability: `(Q,)`, that the second is preferred.
        bounds: Mean and standard deviation of the clips' rewards, `(N,)` each; None without any.
    """

    probability: Tensor
    bounds: tuple[Tensor, Tensor] | None = None


Predict = Callable[[Clips, Tensor], Predicted]
"""Function of clips and pairs `(Q, 2)` of them."""


def items(clips: Clips) -> Tensor:
    """Columns `(N, F)` of clips of one frame."""
    return clips.observations[:, 0]


def regression(data: HumanData, train: np.ndarray, seed: int) -> Predict:
    """`people.baseline`, whose weights are read off its predictions for single columns."""
    step = np.sqrt((data.features[train] ** 2).mean(0))
    step[step == 0] = 1.0
    features = np.concatenate([data.features[train], np.diag(step)])
    n, columns = len(train), len(step)
    known = data.comparisons[torch.from_numpy(train)]
    some = known[torch.zeros(columns, dtype=torch.long)]  # in the place of what is predicted
    groups = np.concatenate([data.groups[train], np.zeros(columns, int)])
    whole = HumanData(data.name, Comparisons.cat([known, some]), groups, features, {})
    p = baseline(whole, np.arange(n), n + np.arange(columns))
    weights = torch.from_numpy(np.log(p / (1 - p)) / step)

    def predict(clips: Clips, pairs: Tensor) -> Predicted:
        rewards = items(clips).double() @ weights
        return Predicted(rewards[pairs].diff(dim=1)[:, 0].sigmoid())

    return predict


def boosting(data: HumanData, train: np.ndarray, seed: int) -> Predict:
    """Gradient boosting on differences, both ways round; as many trees as suit held-out groups."""
    inner, left = _inner(data, train, seed)

    def fitted(rows: np.ndarray, trees: int) -> HistGradientBoostingClassifier:
        x, won = _both_ways(data, rows)
        model = HistGradientBoostingClassifier(max_iter=trees, random_state=seed)
        return model.fit(x, won)

    x, won = _both_ways(data, left)
    losses = [
        score.log_loss(torch.from_numpy(p[:, 1]), torch.from_numpy(won).double())
        for p in fitted(inner, 60).staged_predict_proba(x)
    ]
    model = fitted(train, 1 + int(np.argmin(losses)))

    def predict(clips: Clips, pairs: Tensor) -> Predicted:
        z = items(clips)[pairs].diff(dim=1)[:, 0].double().numpy()
        p, reverse = (model.predict_proba(x)[:, 1] for x in (z, -z))
        return Predicted(torch.from_numpy((p + 1 - reverse) / 2))

    return predict


def best_column(data: HumanData, train: np.ndarray, seed: int) -> Predict:
    """Logistic regression on the column that correlates most with the preferences."""
    x, won = _both_ways(data, train)
    scale = np.sqrt((x**2).mean(0)).clip(1e-12)
    place = int(np.abs((won - 0.5) @ x / scale).argmax())
    column = LogisticRegression(fit_intercept=False).fit(x[:, [place]] / scale[place], won)

    def predict(clips: Clips, pairs: Tensor) -> Predicted:
        z = items(clips)[pairs, place].diff(dim=1).double().numpy() / scale[place]
        return Predicted(torch.from_numpy(column.predict_proba(z)[:, 1]))

    return predict


def ours(name: str) -> Callable[[HumanData, np.ndarray, int], Predict]:
    """A registered predictor, by the candidate that is chosen within the training groups."""

    def method(data: HumanData, train: np.ndarray, seed: int) -> Predict:
        made, groups = candidates(name), torch.from_numpy(data.groups)
        best = choose(made, data.comparisons, groups, train, seed=seed, splits=1)
        known, rows = data.comparisons[torch.from_numpy(train)], groups[train]
        model = fit_candidate(made[best], known.compact(), rows, seed=seed)

        def predict(clips: Clips, pairs: Tensor) -> Predicted:
            posterior = model.posterior(clips)
            bounds = posterior.mean, posterior.variance.sqrt()
            return Predicted(posterior.preference(pairs), bounds)

        return predict

    return method


class Heads(nn.Module):
    """Stand-ins for RewardUQ's heads and adapters on frozen embeddings, with one hidden layer.

    Args:
        kind: "head ensemble", "MC dropout head" or "low-rank ensemble".
        inputs: D.
    """

    def __init__(self, kind: str, inputs: int) -> None:
        super().__init__()
        self.kind, bound = kind, inputs**-0.5
        members = MEMBERS if kind == "head ensemble" else 1
        first = torch.empty(members, WIDTH, inputs).uniform_(-bound, bound)
        self.first = nn.Parameter(first, requires_grad=kind != "low-rank ensemble")
        self.bias = nn.Parameter(torch.zeros(members, WIDTH, 1))
        last = torch.empty(members, 1, WIDTH).uniform_(-(WIDTH**-0.5), WIDTH**-0.5)
        self.last = nn.Parameter(last)
        if kind == "low-rank ensemble":
            down = torch.empty(MEMBERS, RANK, inputs).uniform_(-bound, bound)
            self.down = nn.Parameter(down)
            self.up = nn.Parameter(torch.zeros(MEMBERS, WIDTH, RANK))

    def forward(self, inputs: Tensor, samples: int = 1) -> Tensor:
        """Rewards `(members or samples, N)` of inputs `(N, D)`."""
        x = inputs.T[None]
        if self.kind == "MC dropout head":
            x = F.dropout(x.expand(samples, -1, -1), DROPOUT)
        hidden = self.first @ x + self.bias
        if self.kind == "low-rank ensemble":
            hidden = hidden + self.up @ (self.down @ x)
        rewards: Tensor = (self.last @ hidden.relu())[:, 0]
        return rewards


def heads(kind: str) -> Callable[[HumanData, np.ndarray, int], Predict]:
    """Heads trained by AdamW on all comparisons at once, stopped by held-out groups."""

    def method(data: HumanData, train: np.ndarray, seed: int) -> Predict:
        known, left = (
            data.comparisons[torch.from_numpy(rows)].compact() for rows in _inner(data, train, seed)
        )
        mean, scale = items(known.clips).mean(0), items(known.clips).std(0).clamp_min(1e-6)

        def rewards(clips: Clips, samples: int = 1) -> Tensor:
            found: Tensor = model((items(clips) - mean) / scale, samples)
            return found

        def loss(some: Comparisons, *, one_by_one: bool) -> Tensor:
            difference = rewards(some.clips)[:, some.pairs].diff(dim=2)[..., 0]
            difference = difference if one_by_one else difference.mean(0, keepdim=True)
            preference = some.preference.expand_as(difference)
            return F.binary_cross_entropy_with_logits(difference, preference)

        with isolated_randomness(seed):
            model = Heads(kind, items(known.clips).shape[1])
            optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            best, waited = (float("inf"), model.state_dict()), 0
            for _ in range(STEPS):
                optimiser.zero_grad()
                loss(known, one_by_one=True).backward()
                optimiser.step()
                with torch.no_grad():
                    held_out = float(loss(left, one_by_one=False))
                waited += 1
                if held_out < best[0]:
                    kept = {name: value.clone() for name, value in model.state_dict().items()}
                    best, waited = (held_out, kept), 0
                if waited == PATIENCE:
                    break
        model.load_state_dict(best[1])

        @torch.no_grad()
        def predict(clips: Clips, pairs: Tensor) -> Predicted:
            with isolated_randomness(seed):
                found = rewards(clips, MASKS).double()
            return _by_mean(found.mean(0), found.std(0), pairs)

        return predict

    return method


def bayesian_linear_head(data: HumanData, train: np.ndarray, seed: int) -> Predict:
    """Linear head with a Gaussian posterior, its precision chosen by held-out groups."""
    inner, left = _inner(data, train, seed)

    def fitted(rows: np.ndarray, precision: float) -> Predict:
        known = data.comparisons[torch.from_numpy(rows)].compact()
        model = LaplaceHead(prior_precision=precision, hidden=())
        options = FitOptions(held_out=0.0)
        fit(model, known, epochs=1, seed=seed, novelty="off", options=options)

        def predict(clips: Clips, pairs: Tensor) -> Predicted:
            posterior = model.posterior(clips)
            return _by_mean(posterior.mean, posterior.variance.sqrt(), pairs)

        return predict

    asked = data.comparisons[torch.from_numpy(left)]
    losses = [
        score.log_loss(fitted(inner, x)(asked.clips, asked.pairs).probability, asked.preference)
        for x in PRECISIONS
    ]
    return fitted(train, PRECISIONS[int(np.argmin(losses))])


METHODS: dict[str, Callable[[HumanData, np.ndarray, int], Predict]] = {
    BASELINE: regression,
    "best column": best_column,
    "gradient boosting": boosting,
    **{name: ours(name) for name in ("LaplaceHead", "DeepEnsemble", "MCDropout", "Epinet")},
    "Bayesian linear head": bayesian_linear_head,
    **{kind: heads(kind) for kind in ("head ensemble", "MC dropout head", "low-rank ensemble")},
}
"""Functions of the data, the rows to train on and a seed; predictors have other names too."""


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Args:
        data: Folder with `pandalm.npz` and `train_tickets.npz`; must be given.
        methods: Of `METHODS`, or names of predictors or import paths.
        seeds: Draws of the folds.
        first_seed: The first of them.

    Raises:
        InvalidInput: No methods or seeds.
        UnknownName: A method that doesn't exist.
    """

    data: Path | None = None
    methods: Sequence[str] = tuple(METHODS)
    seeds: int = 10
    first_seed: int = 100

    def __post_init__(self) -> None:
        check_least(self, seeds=1, first_seed=0)
        if not self.methods:
            raise InvalidInput("methods: expected at least one, got none.")
        for name in self.methods:
            if name not in METHODS:
                if " " in name:
                    raise UnknownName("methods", name, list(METHODS))
                find_class("model", name)


def cells(settings: Settings) -> list[dict[str, Any]]:
    """One cell for each method, set or shift, and seed."""
    if settings.data is None:
        raise InvalidInput(
            "data: expected the folder of pandalm.npz and train_tickets.npz, got none."
        )
    for name in SHIFTS:
        HUMAN_DATA[name](settings.data)  # or an error before any work
    tasks = [task for name, shift in SHIFTS.items() for task in (name, f"{name}/{shift}")]
    return [
        {"folder": str(settings.data), "task": task, "method": method, "seed": seed}
        for seed in seed_range(settings)
        for method in dict.fromkeys(settings.methods)
        for task in tasks
    ]


def cell(settings: Settings, folder: str, task: str, method: str, seed: int) -> dict[str, Any]:
    """Scores of one method on one fold."""
    torch.set_num_threads(1)
    name, _, shift = task.partition("/")
    data = HUMAN_DATA[name](Path(folder))
    train, test = next(splits(data, FOLDS, seed=seed))
    groups = np.unique(data.groups[test])
    if shift:
        unknown = data.held_out[shift]
        train, test = train[~unknown[train]], test[unknown[test]]
        groups = np.unique(data.groups[test])
    train, test = (rows[data.decided[rows]] for rows in (train, test))
    predict = (METHODS.get(method) or ours(method))(data, train, seed)
    asked = data.comparisons[torch.from_numpy(test)].compact()
    found = scores(predict(asked.clips, asked.pairs), asked)
    if name == "pandalm":
        found["regret"] = [float(x) for x in regrets(data, predict, groups)]
    return found


def scores(predicted: Predicted, asked: Comparisons) -> dict[str, Any]:
    """Scores of predictions; the curve is the accuracy where shares `WITHHELD` are withheld."""
    p, preference = predicted.probability.double().cpu(), asked.preference.double()
    uncertainty = torch.minimum(p, 1 - p)
    risk = score.risk_coverage(uncertainty, p, preference)
    wrong = (p > 0.5) != (preference > 0.5)
    used = np.ceil((1 - WITHHELD) * len(p)).astype(int) - 1
    return preference_scores(p, preference) | {
        "sure_and_wrong": float((wrong & (uncertainty < 1 - SURE)).double().mean()),
        "aurc": risk.aurc,
        "augrc": risk.augrc,
        "ece_20": score.expected_calibration_error(p, preference, bins=BINS),
        "bound_ece": bound_ece(predicted.bounds, asked),
        "selective": (1 - risk.risk[used]).tolist(),
    }


def bound_ece(bounds: tuple[Tensor, Tensor] | None, asked: Comparisons) -> float:
    r"""RewardUQ's calibration error of bounds of preferences; NaN without any.

    A preference's upper bound is $\sigma$ of the second's mean plus its standard deviation, less
    the first's mean minus its own. By bins of upper bounds, how far the observed frequency is above
    them, pairs counted both ways round; the error of the lower bounds is then the same.
    """
    if bounds is None:
        return float("nan")
    mean, std = (x.double().cpu() for x in bounds)
    first, second = asked.pairs.T
    reach = std[first] + std[second]
    difference = mean[second] - mean[first]
    upper = torch.cat([difference + reach, reach - difference]).sigmoid().numpy()
    outcome = torch.cat([asked.preference, 1 - asked.preference]).double().numpy()
    place = np.minimum((upper * BINS).astype(int), BINS - 1)
    excess = np.bincount(place, outcome, BINS) - np.bincount(place, upper, BINS)
    return float(excess.clip(0).sum() / len(upper))


def regrets(data: HumanData, predict: Predict, groups: np.ndarray) -> np.ndarray:
    """Regret `(len(WITHHELD),)` of the best answer by prediction, in share of comparisons won.

    For each group of at least three clips: that which wins most against the others by prediction,
    against that which won most by the people. Withheld first are groups whose best is least sure
    to beat the second.
    """
    sure, lost = [], []
    for group in groups:
        some = data.comparisons[torch.from_numpy(np.flatnonzero(data.groups == group))].compact()
        n = len(some.clips)
        if n < 3:
            continue
        both = torch.cat([some.pairs, some.pairs.flip(1)])
        won = torch.cat([some.preference, 1 - some.preference]).double()
        total = torch.zeros(n).double().index_add(0, both[:, 1], won)
        value = total / torch.bincount(both[:, 1], minlength=n)
        pairs = torch.combinations(torch.arange(n))
        p = predict(some.clips, pairs).probability.double()
        wins = torch.zeros(n, n).double()
        wins[pairs[:, 1], pairs[:, 0]], wins[pairs[:, 0], pairs[:, 1]] = p, 1 - p
        best, second = wins.sum(1).topk(2).indices
        sure.append(float(wins[best, second]))
        lost.append(float(value.max() - value[best]))
    ordered = np.array(lost)[np.argsort(sure)[::-1]]
    used = np.ceil((1 - WITHHELD) * len(ordered)).astype(int)
    return np.array([ordered[:n].mean() for n in used])


def report(results: pd.DataFrame) -> Report:
    """Scores, differences from the regression, RewardUQ's metrics, and what withholding gains."""
    known = results[~results["task"].str.contains("/")]
    unknown = results[results["task"].str.contains("/")]
    seeds = results["seed"].nunique()
    text = (
        f"Interquartile means over {seeds} seeds with 95% intervals, and paired differences from "
        f"the {BASELINE}. Sure and wrong: above {SURE:.0%} and wrong."
    )
    withheld = (
        "Accuracy of the predictions that are left when the least certain are withheld, and, of "
        "PandaLM's instructions, the regret of choosing the best of some answers by prediction, in "
        "share of comparisons won."
    )
    theirs = (
        "Win rate is accuracy; ECE with 20 bins; bound ECE is how far observed frequencies are "
        "outside the bounds of one standard deviation of each reward."
    )
    sections = [
        Section("Known", text, table=_scores(known)),
        Section("Never seen", text, table=_scores(unknown)),
        Section("Withheld", withheld, _figure(results), _withheld(results)),
        Section("RewardUQ's metrics", theirs, table=_theirs(results)),
    ]
    title = "Are preferences predicted better than by what one would use otherwise?"
    return Report(title, sections, _numbers(results))


def _groups(rows: pd.DataFrame) -> Any:
    by_task = rows.sort_values("task", kind="stable")
    return by_task.groupby(["task", "method"], sort=False)


def _scores(rows: pd.DataFrame) -> pd.DataFrame:
    gaps, table = paired(rows, "log_loss", by="method", reference=BASELINE), []
    for (task, method), of in _groups(rows):
        gap = gaps[(gaps["task"] == task) & (gaps["method"] == method)]
        found: Interval | None = over_tasks(gap, "difference") if len(gap) else None
        table.append(
            {
                "data": task,
                "method": method,
                "accuracy": over_tasks(of, "accuracy"),
                "log loss": over_tasks(of, "log_loss"),
                "less the regression's": "" if found is None else found,
                "verdict": "" if found is None else found.verdict(len(gap), higher_is_better=False),
                "ECE": _mean(of["ece"]),
                "sure and wrong": _mean(of["sure_and_wrong"]),
                "AURC": _mean(of["aurc"]),
                "AUGRC": _mean(of["augrc"]),
            }
        )
    return pd.DataFrame(table)


def _withheld(results: pd.DataFrame) -> pd.DataFrame:
    table = []
    for (task, method), of in _groups(results):
        line: dict[str, Any] = {"data": task, "method": method}
        curves = {"accuracy": of["selective"]}
        if "regret" in of:
            curves["regret"] = of["regret"].dropna()
        for name, curve in curves.items():
            for share in (0.0, *SHOWN):
                at = round(share * len(WITHHELD))
                line[f"{name}, {share:.0%} withheld"] = (
                    _mean(pd.Series([x[at] for x in curve])) if len(curve) else float("nan")
                )
        table.append(line)
    return pd.DataFrame(table)


def _theirs(results: pd.DataFrame) -> pd.DataFrame:
    columns = {"accuracy": "win rate", "ece_20": "ECE", "bound_ece": "bound ECE"}
    return pd.DataFrame(
        {"data": task, "method": method, **{to: _mean(of[x]) for x, to in columns.items()}}
        for (task, method), of in _groups(results)
    )


def _figure(results: pd.DataFrame) -> Figure:
    look = plots.looks(list(results["method"].unique()), reference=BASELINE)

    def draw(axes: Any, rows: pd.DataFrame) -> None:
        for method, of in rows.groupby("method", sort=False):
            curve = interquartile_mean(np.array(of["selective"].to_list()))
            axes.plot(WITHHELD, curve, label=method, **{**look[str(method)], "marker": ""})
        axes.set_xlim(0, 0.8)
        axes.set_xlabel("share withheld, the least certain first")
        axes.set_ylabel("accuracy of the rest")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))

    return plots.by_task(results, draw, columns=2, legend=3)


def _numbers(results: pd.DataFrame) -> dict[str, float]:
    names = ("accuracy", "log_loss", "ece", "sure_and_wrong", "aurc", "augrc", "bound_ece")
    return {
        f"{name}.{task}.{method}": value
        for (task, method), of in _groups(results)
        for name in names
        if not np.isnan(value := _mean(of[name]))
    }


def _mean(values: pd.Series) -> float:
    return float(interquartile_mean(values))


def _by_mean(mean: Tensor, std: Tensor, pairs: Tensor) -> Predicted:
    """Preferences by the mean reward alone, as RewardUQ's are."""
    return Predicted((mean[pairs[:, 1]] - mean[pairs[:, 0]]).sigmoid(), (mean, std))


def _both_ways(data: HumanData, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, won = data.features[rows], data.comparisons.preference.numpy()[rows] > 0.5
    return np.concatenate([x, -x]), np.concatenate([won, ~won])


def _inner(data: HumanData, train: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit to and to choose by, of other groups."""
    split = GroupShuffleSplit(1, test_size=0.25, random_state=seed)
    inner, left = next(split.split(train, groups=data.groups[train]))
    return train[inner], train[left]
