"""Report of a fitted model: how good, how sure, how much more would help, and which rows to see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from experiments.analysis import plots
from experiments.analysis.page import Report, Section
from experiments.analysis.stats import Interval, bootstrap
from rewardmodels import calibration as score

METHODS = {"probability": "model", "regression": "logistic regression", "single column": ""}
SURE = 0.9
_LISTED = 10  # rows of each list
_SMALL_GROUP, _MOST_GROUPS = 10, 15
_GUESS = float(np.log(2))


def fit_report(rows: pd.DataFrame, curve: pd.DataFrame, chosen: str, *, grouped: bool) -> Report:
    """Make the report.

    Args:
        rows: A row for each comparison, predicted by a model that was fitted to other groups:
            `row` (of the file), `preference`, `group`, `probability`, `mean`, `std`, `novelty`,
            `regression`, `single column` and its name, `column`.
        curve: `part`, `comparisons`, `accuracy` and `log_loss` of models fitted to fewer.
        chosen: The settings that were chosen most often.
        grouped: Whether the file has groups.
    """
    table = _scores(rows)
    more = _extrapolated(curve)
    groups = rows["group"].nunique()
    told = f"{len(rows):,} comparisons in {groups:,} groups" if grouped else f"{len(rows):,} rows"
    model = dict(zip(table.columns, table.iloc[0], strict=True))
    sections = [
        Section(
            "How good is it?",
            f"Of {told}; each predicted by a model that was fitted to other groups. Ties count in "
            "log loss and calibration, not in accuracy. Intervals hold 95% of bootstrap resamples "
            f"of the groups. ECE: expected calibration error. Sure and wrong: above {SURE:.0%} and "
            "wrong. AUGRC: chance that a prediction is wrong and used, if the least certain are "
            f"withheld. Settings chosen: {chosen}.",
            table=table,
        ),
        Section(
            "Can its certainty be trusted?",
            "Left: of predictions that say 70%, 70% should come true. Right: error among the most "
            "certain predictions, which falls to the left if certainty means something.",
            _trust(rows),
        ),
        Section("How much would more comparisons help?", more.pop("text"), _curve(curve, more)),
    ]
    for title, text, order in (
        (
            "The most surprising rows",
            "Where the model was surest and the answer another: look for mistakes of labelling.",
            -_loss(rows["probability"], rows["preference"]),
        ),
        (
            "The most uncertain rows",
            "Where the model knows least about the difference, though all values are within the "
            "range of what it was fitted to: an answer there teaches most.",
            -rows["std"].where(rows["novelty"] < 0.5),
        ),
        (
            "The most novel rows",
            "Where most of the variance comes from values outside the range of what the model was "
            "fitted to.",
            -rows["novelty"].where(rows["novelty"] > 0),
        ),
    ):
        listed = rows.loc[order.dropna().sort_values(kind="stable").index[:_LISTED]]
        if len(listed):
            shown = ["row", "preference", "probability", "mean", "std", "novelty"]
            sections.append(Section(title, text, table=listed[shown]))
    if grouped and len(by_group := _by_group(rows)):
        text = (
            f"Groups of at least {_SMALL_GROUP} comparisons, the worst {_MOST_GROUPS} by log loss."
        )
        sections.append(Section("Groups", text, table=by_group))
    keys = {"accuracy": "accuracy", "log loss": "log_loss", "ECE": "ece", "AUGRC": "augrc"}
    numbers: dict[str, Any] = {key: model[name].value for name, key in keys.items()}
    numbers["sure_and_wrong"] = model["sure and wrong"].value
    for name, line in zip(METHODS, table.to_dict("records"), strict=False):
        if name != "probability":
            key = name.replace(" ", "_")
            numbers |= {f"{key}.{k}": line[n].value for n, k in keys.items() if n != "AUGRC"}
    return Report("How far can this reward model be trusted?", sections, numbers | more)


def _loss(probability: pd.Series, preference: pd.Series) -> pd.Series:
    p = probability.clip(1e-12, 1 - 1e-12)
    return -(preference * np.log(p) + (1 - preference) * np.log(1 - p))


def _scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores of the model, and of what it has to beat."""
    lines = []
    for name, title in METHODS.items():
        title = title or f"the best single column, {rows['column'].mode()[0]}"
        lines.append({"": title, **_intervals(rows, name)})
    guess = rows.assign(guess=0.5)
    lines.append({"": "knowing nothing", **_intervals(guess, "guess")})
    return pd.DataFrame(lines)


def _intervals(rows: pd.DataFrame, name: str) -> dict[str, Interval]:
    p, y = (rows[column].to_numpy(copy=True) for column in (name, "preference"))
    decided = np.where(y == 0.5, np.nan, 1.0)
    right = np.where(p == 0.5, 0.5, (p > 0.5) == (y > 0.5)) * decided
    sure = (np.maximum(p, 1 - p) > SURE) & (right == 0)
    probability, preference = torch.from_numpy(p), torch.from_numpy(y)
    uncertainty = torch.minimum(probability, 1 - probability)
    nan = float("nan")
    return {
        "accuracy": _by_groups(right, rows["group"]),
        "log loss": _by_groups(_loss(rows[name], rows["preference"]).to_numpy(), rows["group"]),
        "ECE": Interval(score.expected_calibration_error(probability, preference), nan, nan),
        "sure and wrong": _by_groups(sure.astype(float), rows["group"]),
        "AUGRC": Interval(
            score.risk_coverage(uncertainty, probability, preference).augrc, nan, nan
        ),
    }


def _by_groups(values: NDArray[np.float64], groups: pd.Series) -> Interval:
    """Mean of the rows' values, NaN left out, with an interval over groups."""
    known = ~np.isnan(values)
    number = groups.factorize()[0][known]
    sums = np.bincount(number, values[known], groups.nunique())
    counts = np.bincount(number, minlength=groups.nunique())
    both = np.stack([sums, counts], 1)[counts > 0]
    return bootstrap(lambda x: float(x[:, 0].sum() / x[:, 1].sum()), both, resamples=1000)


def _by_group(rows: pd.DataFrame) -> pd.DataFrame:
    loss = _loss(rows["probability"], rows["preference"])
    right = ((rows["probability"] > 0.5) == (rows["preference"] > 0.5)).astype(float)
    right = right.where(rows["preference"] != 0.5)
    of = pd.DataFrame({"group": rows["group"], "rows": 1, "accuracy": right, "log loss": loss})
    found = of.groupby("group", sort=False).agg(
        {"rows": "sum", "accuracy": "mean", "log loss": "mean"}
    )
    found = found[found["rows"] >= _SMALL_GROUP].sort_values("log loss", ascending=False)
    return found[:_MOST_GROUPS].reset_index()


def _trust(rows: pd.DataFrame) -> Figure:
    y = torch.from_numpy(rows["preference"].to_numpy(copy=True))
    look = plots.looks(["model", "logistic regression"])
    with plots.style():
        figure, (reliability, risk) = plots.panels(2, columns=2, width=8.6, height=3.4)
        reliability.plot([0.5, 1], [0.5, 1], color=plots.GREY, linestyle=":", linewidth=1)
        for column, name in list(METHODS.items())[:2]:
            p = torch.from_numpy(rows[column].to_numpy(copy=True))
            curve = score.reliability_curve(p, y)
            upper = curve.probability >= 0.5
            reliability.plot(
                curve.probability[upper], curve.frequency[upper], label=name, **look[name]
            )
            found = score.risk_coverage(torch.minimum(p, 1 - p), p, y)
            line = {"color": look[name]["color"], "linestyle": look[name]["linestyle"]}
            some = found.coverage >= 0.02  # a few predictions say little
            risk.plot(found.coverage[some], found.risk[some], label=name, **line)
        reliability.set_xlabel("predicted probability")
        reliability.set_ylabel("share that came true")
        risk.set_xlabel("share used, the most certain first")
        risk.set_ylabel("share wrong")
        for axis in (reliability.xaxis, reliability.yaxis, risk.xaxis, risk.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        plots.legend_below(figure)
    return figure


def _extrapolated(curve: pd.DataFrame) -> dict[str, Any]:
    """Log loss with twice as many comparisons, by a power law through the curve of each part."""
    means = curve.groupby("part")["comparisons"].max()
    now = float(means.mean())
    fits = np.array([_twice(of) for _, of in curve.groupby("part")])
    gain = fits[np.isfinite(fits)]
    if not len(gain):
        return {"text": "Too few comparisons to say. Log loss of models fitted to fewer."}
    value = bootstrap(lambda x: float(np.mean(x)), gain, resamples=1000)
    text = (
        "Log loss on held-out groups of models fitted to fewer comparisons; thin lines are the "
        f"parts. By a power law through each part's, {2 * now:,.0f} comparisons in place of "
        f"{now:,.0f} would lower it by {value:.3f} (an interval is over the parts, and doesn't "
        "hold what the law itself may have wrong)."
    )
    return {"text": text, "gain_of_twice": value.value}


def _twice(of: pd.DataFrame) -> float:
    """Fall of the log loss from all comparisons of a part to twice as many."""
    n, loss = of["comparisons"].to_numpy(float), of["log_loss"].to_numpy(float)
    if len(n) < 3:
        return float("nan")

    def law(x: NDArray[np.float64], floor: float, scale: float) -> NDArray[np.float64]:
        # The exponent of a parametric model's excess risk: a free one isn't found by four points.
        return floor + scale * (x / n[-1]) ** -1

    floor, scale = curve_fit(law, n, loss, p0=[loss[-1], 0.01], bounds=([0, 0], [np.inf, np.inf]))[
        0
    ]
    return float(law(n[-1:], floor, scale)[0] - law(2 * n[-1:], floor, scale)[0])


def _curve(curve: pd.DataFrame, more: dict[str, Any]) -> Figure:
    with plots.style():
        figure, (axes,) = plots.panels(1)
        for _, of in curve.groupby("part"):
            axes.plot(of["comparisons"], of["log_loss"], color=plots.BLUE, linewidth=0.5, alpha=0.5)
        share = curve.groupby("part").cumcount()
        mean = curve.groupby(share)[["comparisons", "log_loss"]].mean()
        axes.plot(mean["comparisons"], mean["log_loss"], "o-", color=plots.BLUE, linewidth=2.4)
        if "gain_of_twice" in more:
            end = mean.iloc[-1]
            twice = end["comparisons"] * 2, end["log_loss"] - more["gain_of_twice"]
            axes.plot(*zip(tuple(end), twice, strict=True), ":", color=plots.GREY, linewidth=1.6)
        axes.axhline(_GUESS, color=plots.GREY, linestyle=":", linewidth=1)
        start = curve["comparisons"].min()
        axes.text(start, _GUESS, "knowing nothing", color=plots.GREY, va="bottom")
        axes.set_xscale("log", base=2)
        ticks = [float(mean["comparisons"].iloc[0]) * 2**k for k in range(5)]
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.set_xlabel("comparisons that the model was fitted to")
        axes.set_ylabel("log loss on other groups")
    return figure
