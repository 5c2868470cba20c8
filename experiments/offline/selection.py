"""Choice of a predictor's regularisation by comparisons that it wasn't fitted to.

Weight decay is the same for all inputs. With hundreds of columns and as many comparisons none
suits: the one column that says much is drowned by the noise of the others. So the candidates for
`LaplaceHead` include logistic regressions, one of which singles that column out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from torch import Tensor

from experiments.registry import constructor_arguments, find_class
from rewardmodels import Comparisons, FitOptions, LaplaceHead, RewardModel, fit
from rewardmodels.calibration import log_loss
from rewardmodels.novelty import NoveltySetting

_SETTINGS: dict[str, dict[str, object]] = {
    "weight decay 1": {"weight_decay": 1.0},
    "weight decay 30": {"weight_decay": 30.0},
    "linear, precision 0.1": {"prior_precision": 0.1, "hidden": ()},
    "linear, precision 1": {"prior_precision": 1.0, "hidden": ()},
    "linear, precision 30": {"prior_precision": 30.0, "hidden": ()},
    "linear, precision 1000": {"prior_precision": 1000.0, "hidden": ()},
    "linear, precision 1000, one standout": {
        "prior_precision": 1000.0,
        "hidden": (),
        "standouts": 1,
    },
}
"""Settings that are tried, by name; AdamW multiplies weight decay by the learning rate."""
_BATCH = 256
_LINEAR = "linear"  # how the names of candidates without hidden layers begin
_MOST_NUMBERS = 20_000_000  # compared, up to which these are tried: they hold them several times
_EPOCHS = 60  # at most, in which settings show which is better
_FEW = 1500  # comparisons up to which several splits are averaged

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
    if given & {"network", *itertools.chain(*_SETTINGS.values())}:
        return {"as given": cls}
    found = {
        name: partial(cls, **settings)
        for name, settings in _SETTINGS.items()
        if settings.keys() <= taken
    }
    return found or {"as given": cls}


def fit_candidate(
    make: Callable[[], RewardModel],
    comparisons: Comparisons,
    groups: Tensor,
    *,
    epochs: int = 200,
    seed: int = 0,
    novelty: NoveltySetting = "learned",
) -> RewardModel:
    """Make a model and fit it; groups `(Q,)` are held out together, to stop by."""
    model = make()
    options = FitOptions(batch_size=_BATCH, groups=groups)
    if isinstance(model, LaplaceHead) and not model.hidden and model.make_network is None:
        # It ends at the mode whatever was trained before, so all comparisons can be learned from.
        options, epochs = replace(options, held_out=0.0), 1
    return fit(model, comparisons, seed=seed, novelty=novelty, options=options, epochs=epochs)


def choose(
    made: Candidates,
    comparisons: Comparisons,
    groups: Tensor,
    rows: NDArray[np.int64],
    *,
    seed: int = 0,
    splits: int = 3,
) -> str:
    """Name of the candidate with the least log loss on groups among `rows` left out of its fit.

    Novelty is off meanwhile: groups left out at random are no shift.

    Args:
        made: Constructors by name.
        comparisons: Q comparisons.
        groups: `(Q,)`, equal where comparisons belong together.
        rows: Those of the comparisons that may be looked at.
        seed: Of initial weights.
        splits: To average over, each with a quarter of the groups left out; of many comparisons
            there is one.
    """
    large = comparisons.clips.observations[0].numel() * len(rows) > _MOST_NUMBERS
    names = [name for name in made if not (large and name.startswith(_LINEAR))]
    folds = min(4, len(np.unique(groups[rows])))
    if len(names) == 1 or folds < 2:
        return names[0]
    each = list(GroupKFold(folds).split(rows, groups=groups[rows]))
    losses = np.zeros(len(names))
    for fitted, left in each[: splits if len(rows) <= _FEW else 1]:
        known, asked = (torch.from_numpy(rows[some]) for some in (fitted, left))
        tests = comparisons[asked].compact()
        for place, name in enumerate(names):
            fitted_to = comparisons[known], groups[known]
            options: dict[str, Any] = {"epochs": _EPOCHS, "seed": seed, "novelty": "off"}
            model = fit_candidate(made[name], *fitted_to, **options)
            p = model.posterior(tests.clips).preference(tests.pairs)
            losses[place] += log_loss(p, tests.preference)
    return names[int(losses.argmin())]
