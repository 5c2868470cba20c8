"""Choice of a predictor's regularisation by comparisons that it wasn't fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from torch import Tensor

from experiments.registry import constructor_arguments, find_class
from rewardmodels import Comparisons, FitOptions, RewardModel, fit
from rewardmodels.calibration import log_loss

_SETTINGS: dict[str, dict[str, object]] = {
    "weight decay 1": {"weight_decay": 1.0},
    "weight decay 30": {"weight_decay": 30.0},
}
"""Settings that are tried, by name; AdamW multiplies weight decay by the learning rate."""
_BATCH = 256
_FEW = 1500  # comparisons up to which three splits are averaged

Candidates = Mapping[str, Callable[[], RewardModel]]


def candidates(model: str) -> Candidates:
    """Constructors of a predictor with each of the settings that are tried.

    Args:
        model: A name or import path, with arguments or without; an argument that is given there
            stays as it is. A class that takes none of the settings is one candidate, "as given".

    Raises:
        UnknownName: No such predictor.
    """
    cls: Any = find_class("model", model)
    given = cls.keywords.keys() if isinstance(cls, partial) else set()
    taken = set(constructor_arguments(getattr(cls, "func", cls)))
    found: dict[str, Callable[[], RewardModel]] = {}
    for name, settings in _SETTINGS.items():
        if settings.keys() <= taken and not settings.keys() & given:
            found[name] = partial(cls, **settings)
    return found or {"as given": cls}


def choose(
    made: Candidates,
    comparisons: Comparisons,
    groups: Tensor,
    rows: NDArray[np.int64],
    *,
    seed: int = 0,
) -> str:
    """Name of the candidate with the least log loss on groups among `rows` left out of its fit.

    Args:
        made: Constructors by name.
        comparisons: Q comparisons.
        groups: `(Q,)`, equal where comparisons belong together.
        rows: Those of the comparisons that may be looked at.
        seed: Of initial weights.
    """
    names = list(made)
    folds = min(4, len(np.unique(groups[rows])))
    if len(names) == 1 or folds < 2:
        return names[0]
    splits = list(GroupKFold(folds).split(rows, groups=groups[rows]))
    losses = np.zeros(len(names))
    for fitted, left in splits[: 3 if len(rows) <= _FEW else 1]:
        known, asked = (torch.from_numpy(rows[some]) for some in (fitted, left))
        options = FitOptions(batch_size=_BATCH, groups=groups[known])
        tests = comparisons[asked].compact()
        for place, name in enumerate(names):
            model = fit(made[name](), comparisons[known], seed=seed, options=options)
            p = model.posterior(tests.clips).preference(tests.pairs)
            losses[place] += log_loss(p, tests.preference)
    return names[int(losses.argmin())]
