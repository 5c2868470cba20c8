"""Selective prediction: withhold unsure predictions, and count the errors that remain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewardmodels.calibration import check_predictions
from rewardmodels.errors import require

CONFIDENT = 0.9
"""Confidence above which a prediction counts as confident."""


class Selection(NamedTuple):
    """Errors of the predictions that are kept when others are withheld.

    Attributes:
        kept: `(Q,)` bool, the predictions that are kept.
        coverage: Share of the decided pairs whose prediction is kept.
        risk: Share of those kept that are wrong; NaN if none is.
        confident_errors: Number of confident wrong predictions in all.
        confident_errors_kept: Number of them that are kept.
    """

    kept: Tensor
    coverage: float
    risk: float
    confident_errors: int
    confident_errors_kept: int


def confidence(probability: Tensor) -> Tensor:
    r"""Predicted probability $\max(p, 1 - p)$ `(Q,)` that the predicted preference is right.

    Example:
        >>> confidence(torch.tensor([0.25, 0.5, 1.0])).tolist()
        [0.75, 0.5, 1.0]
    """
    return torch.maximum(probability, 1 - probability)


def confident_errors(probability: Tensor, preference: Tensor) -> Tensor:
    """Mask `(Q,)` of wrong predictions with a confidence above 0.9.

    Args:
        probability: `(Q,)`, predicted, that the second is preferred.
        preference: `(Q,)`, of the teacher; ties are never wrong.

    Raises:
        InvalidInput: Shapes that don't agree, or numbers outside [0, 1].

    Example:
        >>> preference = torch.tensor([0.0, 0.0, 1.0, 0.5])
        >>> confident_errors(torch.tensor([0.95, 0.8, 0.99, 0.99]), preference).tolist()
        [True, False, False, False]
    """
    check_predictions(probability, preference)
    wrong = (probability > 0.5) != (preference > 0.5)
    return (confidence(probability) > CONFIDENT) & wrong & (preference != 0.5)


def select(probability: Tensor, preference: Tensor, *, min_confidence: float = 0.5) -> Selection:
    """Withhold unsure predictions.

    Args:
        probability: `(Q,)`, predicted, that the second is preferred.
        preference: `(Q,)`, of the teacher; ties count in `kept` alone.
        min_confidence: Predictions below are withheld (see `confidence`).

    Raises:
        InvalidInput: Shapes that don't agree, numbers outside [0, 1], or no decided pair.

    Example:
        >>> p, preference = torch.tensor([0.95, 0.6, 0.99]), torch.tensor([0.0, 0.0, 1.0])
        >>> select(p, preference, min_confidence=0.8).confident_errors_kept
        1
    """
    check_predictions(probability, preference)
    require("min_confidence", 0.5 <= min_confidence <= 1, "a number in [0.5, 1]", min_confidence)
    decided = preference != 0.5
    require("preference", bool(decided.any()), "one that isn't a tie", "none")
    kept = confidence(probability) >= min_confidence
    # A probability of one half is wrong one way round and right the other.
    wrong = ((probability > 0.5) != (preference > 0.5)).double()
    wrong = wrong.masked_fill(probability == 0.5, 0.5)
    errors, counted = confident_errors(probability, preference), kept & decided
    return Selection(
        kept,
        float(counted.sum() / decided.sum()),
        float(wrong[counted].mean()),
        int(errors.sum()),
        int((errors & kept).sum()),
    )
