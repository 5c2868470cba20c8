"""Score new comparisons, or single items, by a fitted model; choose the best of several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from experiments.offline.fit import predict, predict_items
from experiments.offline.run import FittedRun
from rewardmodels import InvalidInput
from rewardmodels.saving import write_text_atomically
from rewardmodels.tables import PreferenceTable

NOVEL = 0.5
"""Share of the variance from values never compared, above which a row is called novel."""
UNSURE = 0.6
"""Probability of the likelier side, below which a row is called unsure."""


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of scoring.

    Args:
        run: Directory of `rewardmodels fit`.
        file: Comparisons, with or without preferences, or single items, with the columns of the
            file that the model was fitted to; of items, the features' names without a prefix.
        out: CSV for the scores; None for `scores.csv` in the run's directory.
        best_of: Of the items of each group call the best by its "mean", or by its "lower" bound,
            mean - kappa · standard deviation; None to call none.
        kappa: Standard deviations of that bound.
        trust: Import the model's class, though it isn't one of rewardmodels.

    Raises:
        InvalidInput: A kappa below zero.
    """

    run: Path
    file: Path
    out: Path | None = None
    best_of: Literal["mean", "lower"] | None = None
    kappa: float = 1.0
    trust: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.kappa < np.inf:
            raise InvalidInput(f"kappa: expected a number of at least 0, got {self.kappa}.")


def score_file(config: ScoreConfig) -> pd.DataFrame:
    """Score a file, and write the scores beside its row numbers.

    Returns:
        Of comparisons `probability` that the second is preferred, and `mean` and `std` of the
        difference; of items `mean` and `std` of the reward, in the units of log-odds. Of both
        `novelty`, the share of the variance that comes from values outside the range of what the
        model was fitted to, and `flag`: "novel" above a half, else "unsure" where no side has a
        probability of 0.6, else nothing. With `best_of`, `best`.

    Raises:
        InvalidInput: A directory without a fit, other features, or `best_of` of comparisons.
        UnreadableFile: A damaged model or file.
    """
    torch.set_num_threads(1)
    run = FittedRun(config.run)
    model = run.model(trust=config.trust)
    _, table = run.read(config.file)
    if isinstance(table, PreferenceTable):
        if config.best_of:
            raise InvalidInput("best_of: expected a file of single items, got comparisons.")
        scores = predict(model, table.comparisons)
        sure = (scores["probability"] - 0.5).abs() >= UNSURE - 0.5
    else:
        scores = predict_items(model, table.clips)
        sure = pd.Series(True, scores.index)
    scores["flag"] = np.select([scores["novelty"] > NOVEL, ~sure], ["novel", "unsure"], "")
    if config.best_of:
        groups = np.zeros(len(scores)) if table.groups is None else table.groups.numpy()
        kappa = config.kappa if config.best_of == "lower" else 0.0
        bound = scores["mean"] - kappa * scores["std"]
        scores["group"] = groups
        scores["best"] = scores.index.isin(bound.groupby(groups).idxmax())
    rows = table.rows.numpy() if isinstance(table, PreferenceTable) else np.arange(len(table))
    scores.insert(0, "row", rows)
    out = config.out or config.run / "scores.csv"
    write_text_atomically(out, scores.to_csv(index=False))
    flags = ", ".join(f"{n:,} {flag}" for flag, n in scores["flag"].value_counts().items() if flag)
    print(f"{len(scores):,} rows scored{f', {flags}' if flags else ''}: {out}")
    return scores
