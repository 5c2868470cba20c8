"""What the numbers of the study of predictors say, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from experiments.analysis.old_page import plural, verdict
from experiments.analysis.old_stats import Values
from experiments.studies.summary import Row, by, numbers, pooled


def against_first(rows: Sequence[Row], test: str) -> list[str]:
    """Log loss of each predictor less that of the first, seed by seed.

    Args:
        rows: Cells of `experiments.studies.predictors.simulated`.
        test: "in distribution" or "shifted".
    """
    of = by(rows, "predictor")
    first, *others = of
    said = [
        _difference(
            name,
            [a - b for a, b in _paired(of[name], of[first], f"{test}/log loss")],
            f"less {first}'s",
            "log loss (lower is better)",
            ("it predicts better", "it predicts worse"),
        )
        for name in others
    ]
    return said or [f"Only {first} was studied, and there is nothing to set beside it."]


def calibrating(rows: Sequence[Row]) -> list[str]:
    """What calibrating does to each predictor's error of calibration, seed by seed."""
    key = "in distribution"
    return [
        _difference(
            name,
            [numbers(cells, f"{key}/ECE") - numbers(cells, f"{key}/raw ECE")
             for cells in by(of, "task").values()],
            "calibrated, less as fitted",
            "expected calibration error in distribution",
            ("calibrating helps", "calibrating harms"),
        )
        for name, of in by(rows, "predictor").items()
    ]  # fmt: skip


def surest_half(rows: Sequence[Row]) -> list[str]:
    """How much of the half of its answers that a predictor is surest of is wrong.

    Args:
        rows: Cells of `experiments.studies.predictors.simulated`.
    """
    said = []
    for name, of in by(rows, "predictor").items():
        wrong = []
        for test in ("in distribution", "shifted"):
            risk = [
                numbers(cells, lambda row, key=f"{test}/risk by coverage": row[key][9])  # type: ignore[misc]
                for cells in by(of, "task").values()
            ]
            mean, low, high = pooled(risk)
            wrong.append(f"{mean:.1%} (95% interval {low:.1%} to {high:.1%})")
        said.append(
            f"Of the half of its answers that {name} is surest of, {wrong[0]} are wrong in "
            f"distribution, and {wrong[1]} about far better behaviour."
        )
    return said


def against_baseline(data: str, rows: Sequence[Row], baseline: str) -> list[str]:
    """Log loss of each predictor less the regression's, fold by fold.

    Folds share what they train on, so their differences vary less than those of new data would:
    the interval is Nadeau & Bengio's (2003, section 5), with Student's t.

    Args:
        data: What the answers are called.
        rows: Cells of `experiments.studies.predictors.human`.
        baseline: The regression's name among the predictors.
    """
    said = []
    for name, gaps in _fold_gaps(rows, baseline).items():
        mean, low, high = fold_interval(gaps)
        sure = verdict(low, high, len(gaps), below="it predicts better", above="it predicts worse")
        said.append(
            f"On {data}, {name}'s log loss less that of {baseline} is {_interval(mean, low, high)} "
            f"({plural(len(gaps), 'fold', 'folds')}): {sure}."
        )
    return said


def in_short(rows: Sequence[Row], baseline: str) -> str:
    """How often a predictor's log loss is better than the regression's, over all sets of answers.

    Args:
        rows: As of `against_baseline`, of several sets.
        baseline: As there.
    """
    answers = [
        verdict(*fold_interval(gaps)[1:], len(gaps), below="better", above="worse")
        for cells in by(rows, "data").values()
        for gaps in _fold_gaps(cells, baseline).values()
    ]
    better, worse = answers.count("better"), answers.count("worse")
    return (
        f"Of {len(answers)} comparisons with {baseline} by log loss, predictors are better for "
        f"sure in {better}, worse for sure in {worse}, and in {len(answers) - better - worse} no "
        "difference can be told. Bars in the figure are standard errors over folds."
    )


def _fold_gaps(rows: Sequence[Row], baseline: str) -> dict[str, Values]:
    """Log loss of each predictor less the regression's, `(K,)`, fold by fold."""
    of = by(rows, "predictor")
    reference = {row["fold"]: row["log loss"] for row in of.pop(baseline)}
    return {
        name: np.array([row["log loss"] - reference[row["fold"]] for row in cells])
        for name, cells in of.items()
    }


def fold_interval(gaps: Values) -> tuple[float, float, float]:
    r"""Mean of the differences on K folds, and its 95% interval.

    $\bar d \pm t_{K-1}\, s \sqrt{1/K + 1/(K-1)}$: a test fold is 1/(K − 1) of what
    was trained on (Nadeau & Bengio 2003, equation 3 with $n_2 / n_1 = 1/(K - 1)$).

    Args:
        gaps: `(K,)`, K at least 2.

    Example:
        >>> fold_interval(np.array([0.25, 0.25, 0.25]))
        (0.25, 0.25, 0.25)
    """
    folds, mean = len(gaps), float(gaps.mean())
    scale = float(gaps.std(ddof=1)) * np.sqrt(1 / folds + 1 / (folds - 1))
    reach = float(stats.t.ppf(0.975, folds - 1) * scale)
    return mean, mean - reach, mean + reach


def _paired(own: Sequence[Row], other: Sequence[Row], metric: str) -> list[tuple[Values, Values]]:
    """One metric of two predictors on each task, seed by seed."""
    tasks = by(own, "task"), by(other, "task")
    return [
        (_by_seed(tasks[0][task], metric), _by_seed(tasks[1][task], metric)) for task in tasks[0]
    ]


def _by_seed(rows: Sequence[Row], metric: str) -> Values:
    return numbers(sorted(rows, key=lambda row: row["seed"]), metric)


def _difference(
    name: str, gaps: Sequence[Values], than: str, metric: str, answers: tuple[str, str]
) -> str:
    mean, low, high = pooled(gaps)
    below, above = answers
    sure = verdict(low, high, len(gaps[0]), below=below, above=above)
    name = name[0].upper() + name[1:]
    return (
        f"{name}'s {metric}, {than}, is {_interval(mean, low, high)} "
        f"({plural(len(gaps), 'task', 'tasks')}, {plural(len(gaps[0]), 'seed', 'seeds')}): {sure}."
    )


def _interval(mean: float, low: float, high: float) -> str:
    shown = f"{mean:+.3f} (95% interval {low:+.3f} to {high:+.3f})"
    return shown.replace("-", "−")
