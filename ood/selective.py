"""Selective prediction: which answers are given, and what goes wrong among those that are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewardmodels import InvalidInput
from rewardmodels.calibration import risk_coverage

CONFIDENT = 0.9
"""A preference is confident if it is above this, for either of the two."""


class Selection(NamedTuple):
    """What becomes of the answers when some are withheld.

    Attributes:
        given: `(Q,)` bool, which answers are given.
        coverage: Share of the decided pairs whose answer is given.
        risk: Share of those given that are wrong; NaN if none is.
        confident_errors: How many confident mispredictions there are in all.
        confident_errors_given: How many of them pass.
    """

    given: Tensor
    coverage: float
    risk: float
    confident_errors: int
    confident_errors_given: int


def confidence(probability: Tensor) -> Tensor:
    r"""$\max(p, 1 - p)$, `(Q,)`: how probable it is that the answer given is right.

    Example:
        >>> confidence(torch.tensor([0.25, 0.5, 1.0])).tolist()
        [0.75, 0.5, 1.0]
    """
    return torch.maximum(probability, 1 - probability)


def confident_errors(probability: Tensor, preference: Tensor) -> Tensor:
    """`(Q,)` bool: predictions with a preference above 0.9 that were wrong.

    Args:
        probability: `(Q,)`, that the second is preferred.
        preference: `(Q,)`, what was answered; ties are never wrong.

    Raises:
        InvalidInput: Shapes that don't agree, or numbers outside [0, 1].

    Example:
        >>> said = torch.tensor([0.0, 0.0, 1.0, 0.5])
        >>> confident_errors(torch.tensor([0.95, 0.8, 0.99, 0.99]), said).tolist()
        [True, False, False, False]
    """
    _check(probability, preference)
    wrong = (probability > 0.5) != (preference > 0.5)
    return (confidence(probability) > CONFIDENT) & wrong & (preference != 0.5)


def select(
    probability: Tensor,
    preference: Tensor,
    *,
    min_confidence: float = 0.5,
    familiar: Tensor | None = None,
) -> Selection:
    """Withholds what is too unsure, or of clips that a guard finds strange.

    Args:
        probability: `(Q,)`, that the second is preferred.
        preference: `(Q,)`, what was answered; ties count in `given` alone.
        min_confidence: Answers below are withheld (see `confidence`).
        familiar: `(Q,)` bool, False where a guard raised an alarm at either clip; None without a
            guard.

    Raises:
        InvalidInput: Shapes that don't agree, numbers outside [0, 1], or no decided pair.

    Example:
        >>> p, said = torch.tensor([0.95, 0.6, 0.99]), torch.tensor([0.0, 0.0, 1.0])
        >>> select(p, said, min_confidence=0.8).confident_errors_given
        1
        >>> guarded = select(p, said, familiar=torch.tensor([False, True, True]))
        >>> guarded.confident_errors_given, round(guarded.risk, 2)
        (0, 0.5)
    """
    _check(probability, preference)
    if not 0.5 <= min_confidence <= 1:
        raise InvalidInput(f"min_confidence: expected a number in [0.5, 1], got {min_confidence}.")
    if familiar is not None and (
        familiar.shape != probability.shape or familiar.dtype != torch.bool
    ):
        raise InvalidInput(
            f"familiar: expected bool of shape {tuple(probability.shape)}, as probability, got "
            f"{familiar.dtype} of {tuple(familiar.shape)}."
        )
    decided = preference != 0.5
    if not bool(decided.any()):
        raise InvalidInput("preference: expected an answer that isn't a tie, got none.")
    given = confidence(probability) >= min_confidence
    if familiar is not None:
        given = given & familiar
    # A probability of one half is wrong one way round and right the other.
    wrong = ((probability > 0.5) != (preference > 0.5)).double()
    wrong = wrong.masked_fill(probability == 0.5, 0.5)
    bad, counted = confident_errors(probability, preference), given & decided
    return Selection(
        given,
        float(counted.sum() / decided.sum()),
        float(wrong[counted].mean()),
        int(bad.sum()),
        int((bad & given).sum()),
    )


def confidence_for(risk: float, probability: Tensor, preference: Tensor) -> float:
    """The least confidence at which, on these held-out answers, no more than `risk` are wrong.

    Read off the risk–coverage curve (Geifman & El-Yaniv 2017, arXiv:1705.08500), of which
    `rewardmodels.calibration.risk_coverage` gives the whole. It is an estimate, no promise: with
    few answers take a risk well below what may be borne.

    Args:
        risk: Share of the answers given that may be wrong, in [0, 1].
        probability: `(Q,)`, that the second is preferred.
        preference: `(Q,)`, what was answered.

    Returns:
        For `select(min_confidence=...)`; 1 where even the surest answers are wrong more often.

    Raises:
        InvalidInput: No decided pairs, shapes that don't agree, or numbers out of range.

    Example:
        >>> p, said = torch.tensor([0.95, 0.8, 0.75, 0.6]), torch.tensor([1.0, 1.0, 0.0, 1.0])
        >>> round(confidence_for(0.1, p, said), 2), round(confidence_for(0.3, p, said), 2)
        (0.8, 0.6)
    """
    if not 0 <= risk <= 1:
        raise InvalidInput(f"risk: expected a share in [0, 1], got {risk}.")
    sure = confidence(probability)
    curve = risk_coverage(-sure, probability, preference)
    ordered = sure[preference != 0.5].double().sort(descending=True).values
    # Equal confidences are given or withheld together.
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])
    enough = torch.from_numpy(curve.risk <= risk) & last
    return float(ordered[enough].min()) if bool(enough.any()) else 1.0


def _check(probability: Tensor, preference: Tensor) -> None:
    if probability.ndim != 1 or probability.shape != preference.shape:
        raise InvalidInput(
            "probability, preference: expected two shapes (Q,), got "
            f"{tuple(probability.shape)} and {tuple(preference.shape)}."
        )
    for name, value in (("probability", probability), ("preference", preference)):
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise InvalidInput(f"{name}: expected numbers from 0 to 1, got others.")
