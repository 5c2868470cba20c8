"""How much an answer about each pair of clips would teach, from posterior samples alone.

An acquisition is a pure function `(returns (S, N), pairs (Q, 2)) -> scores (Q,)`. It sees
numbers, never a network: N clips have been through the model once, and every pair is
arithmetic on the result. A new one is a function and a line in `ACQUISITIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from rewardmodels.errors import InvalidInput, UnknownName
from rewardmodels.likelihood import check_mistake_rate, preference_probability

Acquisition = Callable[[Tensor, Tensor], Tensor]

# Differences held at once, which keeps memory flat in Q. A quarter of a megabyte of doubles
# stays in a core's cache and is just below what torch splits over threads: on a machine with
# other work, waiting for the second thread at each block measures ten times slower.
_BLOCK: Final = 2**15 - 1


def all_pairs(n: int) -> Tensor:
    """Every unordered pair among n clips, in lexicographic order.

    Args:
        n: Number of clips.

    Returns:
        `(n (n - 1) / 2, 2)` long, the smaller index first.

    Raises:
        InvalidInput: A negative n.

    Example:
        >>> all_pairs(3).tolist()
        [[0, 1], [0, 2], [1, 2]]
    """
    if n < 0:
        raise InvalidInput(f"n: expected a number of clips, at least 0, got {n}.")
    return torch.triu_indices(n, n, 1).T.contiguous()


def preference_variance(returns: Tensor, pairs: Tensor) -> Tensor:
    r"""How much posterior samples disagree about which clip is better.

    $\operatorname{Var}_s[\sigma(R_b^s - R_a^s)]$, the population variance over samples of the
    probability that the second clip is preferred (Christiano et al. 2017, §2.2.4, where the
    samples are the members of an ensemble).

    Args:
        returns: `(S, N)`, joint posterior samples of N clips' returns, reward units.
        pairs: `(Q, 2)` integers, indices into the N clips.

    Returns:
        `(Q,)`, squared probabilities from 0 to 1/4, in the dtype of `returns`.

    Raises:
        InvalidInput: Wrong shapes, NaN or infinity in returns, or an index out of range.

    Example:
        >>> returns = torch.tensor([[0.0, 50.0, 0.0], [0.0, -50.0, 0.0]])
        >>> preference_variance(returns, all_pairs(3))
        tensor([0.2500, 0.0000, 0.2500])
    """

    def score(difference: Tensor) -> Tensor:
        # Written out: torch's own var over the first axis measures a hundred times slower.
        p = difference.sigmoid()
        return (p - p.mean(0)).square_().mean(0)

    return _blockwise(returns, pairs, score)


def mutual_information(returns: Tensor, pairs: Tensor, *, mistake_rate: float = 0.0) -> Tensor:
    r"""Information that the answer is expected to give about the reward function (BALD).

    $H[\mathbb{E}_s p_s] - \mathbb{E}_s H[p_s]$ with
    $p_s = (1 - \epsilon)\,\sigma(R_b^s - R_a^s) + \epsilon / 2$ and $H$ the entropy of a yes or
    no (Houlsby et al. 2011; for comparisons Bıyık et al. 2019, arXiv 1910.04365). Unlike
    `preference_variance`, it discounts pairs that the teacher would answer by tossing a coin.

    Args:
        returns: `(S, N)`, joint posterior samples of N clips' returns, reward units.
        pairs: `(Q, 2)` integers, indices into the N clips.
        mistake_rate: $\epsilon$, probability that the teacher answers at random, as in
            `rewardmodels.likelihood.preference_probability`.

    Returns:
        `(Q,)`, nats from 0 to log 2, in the dtype of `returns`.

    Raises:
        InvalidInput: Wrong shapes, NaN or infinity in returns, an index out of range, or a
            mistake rate outside [0, 1).

    Example:
        >>> returns = torch.tensor([[0.0, 50.0, 0.0], [0.0, -50.0, 0.0]])
        >>> mutual_information(returns, all_pairs(3))
        tensor([0.6931, 0.0000, 0.6931])
    """
    check_mistake_rate(mistake_rate)

    def score(difference: Tensor) -> Tensor:
        # Both tails from their own sigmoid: 1 - p would round a near-certain answer to certain.
        second = preference_probability(difference, mistake_rate=mistake_rate)
        first = preference_probability(-difference, mistake_rate=mistake_rate)
        total = _entropy(second.mean(0), first.mean(0))
        return (total - _entropy(second, first).mean(0)).clamp_min(0)

    return _blockwise(returns, pairs, score)


ACQUISITIONS: Final[dict[str, Acquisition]] = {
    "preference_variance": preference_variance,
    "mutual_information": mutual_information,
}


def acquisition_named(name: str) -> Acquisition:
    """The acquisition of that name.

    Raises:
        UnknownName: A name that isn't in `ACQUISITIONS`.
    """
    if name not in ACQUISITIONS:
        raise UnknownName("acquisition", name, ACQUISITIONS)
    return ACQUISITIONS[name]


def check_pairs(pairs: Tensor, n: int) -> None:
    """Raises InvalidInput unless pairs is `(Q, 2)` integers from 0 to n - 1."""
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype not in _INTEGERS:
        raise InvalidInput(
            f"pairs: expected integers of shape (Q, 2), got {pairs.dtype} of shape "
            f"{tuple(pairs.shape)}."
        )
    if len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < n:
        raise InvalidInput(
            f"pairs: expected indices from 0 to {n - 1} ({n} clips), got "
            f"{int(pairs.min())} to {int(pairs.max())}."
        )


_INTEGERS: Final = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


@torch.no_grad()
def _blockwise(returns: Tensor, pairs: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies `score: (S, B) differences -> (B,)` to all pairs, in O(S B) memory."""
    if returns.ndim != 2 or not returns.is_floating_point() or len(returns) == 0:
        raise InvalidInput(
            "returns: expected floats of shape (S, N) with at least one sample, got "
            f"{returns.dtype} of shape {tuple(returns.shape)}."
        )
    if not bool(returns.isfinite().all()):
        raise InvalidInput(
            "returns: expected finite numbers, got NaN or infinity; the model that drew them "
            "has diverged."
        )
    check_pairs(pairs, returns.shape[1])
    # Doubles, because information is a small difference of entropies of order one.
    samples = returns.double()
    scores = returns.new_empty(len(pairs))
    block = max(1, _BLOCK // len(samples))
    for start in range(0, len(pairs), block):
        first, second = pairs[start : start + block].long().unbind(1)
        difference = samples.index_select(1, second).sub_(samples.index_select(1, first))
        scores[start : start + block] = score(difference)
    return scores


def _entropy(yes: Tensor, no: Tensor) -> Tensor:
    total: Tensor = torch.special.entr(yes) + torch.special.entr(no)
    return total
