"""Likelihood of a preference, given the returns of the two clips.

Marks and ratings have the same likelihood, since `rewardmodels.comparisons` turns them into
comparisons.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardmodels.errors import InvalidInput


def preference_probability(difference: Tensor, *, random_answer_rate: float = 0.0) -> Tensor:
    r"""Probability that the second clip is preferred (Bradley-Terry with random answers).

    $P = (1 - \epsilon)\,\sigma(R_2 - R_1) + \epsilon / 2$: with probability $\epsilon$ the
    teacher answers at random (Christiano et al. 2017, §2.2.1 and §2.2.3).

    Args:
        difference: Return of the second clip minus that of the first, any shape, reward units.
        random_answer_rate: $\epsilon$, from 0 to below 1.

    Returns:
        Probabilities of the same shape.

    Raises:
        InvalidInput: A rate out of range.

    Example:
        >>> preference_probability(torch.tensor([0.0, 100.0]), random_answer_rate=0.1)
        tensor([0.5000, 0.9500])
    """
    check_random_answer_rate(random_answer_rate)
    return (1 - random_answer_rate) * torch.sigmoid(difference) + random_answer_rate / 2


def negative_log_likelihood(
    difference: Tensor, preference: Tensor, *, random_answer_rate: float = 0.0
) -> Tensor:
    r"""Cross-entropy of each preference under `preference_probability`, in nats.

    $-[\mu \log P + (1 - \mu) \log (1 - P)]$ for a preference $\mu$; a tie is $\mu = 1/2$
    (Christiano et al. 2017, eq. 1). Computed in log space, so it stays finite and has a
    gradient however large the difference.

    Args:
        difference: Return of the second clip minus that of the first, reward units.
        preference: $\mu$, in [0, 1], of a shape that broadcasts against `difference`.
        random_answer_rate: $\epsilon$, from 0 to below 1.

    Returns:
        One number per comparison, in the broadcast shape.

    Raises:
        InvalidInput: A rate out of range.

    Example:
        >>> negative_log_likelihood(torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.6931])
    """
    check_random_answer_rate(random_answer_rate)
    difference, preference = torch.broadcast_tensors(difference, preference)
    log_second, log_first = F.logsigmoid(difference), F.logsigmoid(-difference)
    if random_answer_rate > 0:
        kept = math.log1p(-random_answer_rate)
        at_random = torch.full_like(difference, math.log(random_answer_rate / 2))
        log_second = torch.logaddexp(kept + log_second, at_random)
        log_first = torch.logaddexp(kept + log_first, at_random)
    return -(preference * log_second + (1 - preference) * log_first)


def check_random_answer_rate(random_answer_rate: float) -> None:
    """Raise InvalidInput unless 0 <= random_answer_rate < 1."""
    if not 0 <= random_answer_rate < 1:
        raise InvalidInput(
            "random_answer_rate: expected a probability from 0 to below 1 of a random answer, got "
            f"{random_answer_rate}."
        )
