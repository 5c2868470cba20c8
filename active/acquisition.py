r"""Acquisition functions: the value of comparing each pair of clips, from posterior samples.

An `Acquisition` is a pure function of numbers, never of a network: N clips have been through the
model once, and every pair is arithmetic on the result. A new one is a function and a line in
`ACQUISITIONS`.

Volume removal (Sadigh et al. 2017), $\min(\mathbb{E}_s p_s, 1 - \mathbb{E}_s p_s)$, is left out
on purpose: a clip against its own copy maximises it, and comparing these teaches nothing (Bıyık
et al. 2019, arXiv 1910.04365). `predictive_entropy` has the same flaw, and is here as the baseline
that others are measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from rewardmodels.errors import UnknownName, require
from rewardmodels.likelihood import check_random_answer_rate, preference_probability

# Differences held at once, which keeps memory flat in Q. A quarter of a megabyte of doubles
# stays in a core's cache and is just below what torch splits over threads: on a machine with
# other work, waiting for the second thread at each block measures ten times slower.
_BLOCK: Final = 2**15 - 1

_INTEGERS: Final = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})

Acquisition = Callable[[Tensor, Tensor], Tensor]
"""Function `(returns, pairs) -> scores`, the same for all in `ACQUISITIONS`.

Args:
    returns: `(S, N)`, joint posterior samples of N clips' returns, reward units.
    pairs: `(Q, 2)` integers, indices into the N clips.

Returns:
    `(Q,)`, at least 0, in the dtype of `returns` and without gradients. A score doesn't depend on
    which clip of the pair comes first, nor on a constant added to a sample, which comparisons
    can't determine.

Raises:
    InvalidInput: Wrong shapes, NaN or infinity in returns, or an index out of range.
"""


def preference_variance(returns: Tensor, pairs: Tensor) -> Tensor:
    r"""Variance over posterior samples of the probability that the second clip is preferred.

    $\operatorname{Var}_s[\sigma(R_b^s - R_a^s)]$, the population variance (Christiano et al. 2017,
    §2.2.4, where the samples are the members of an ensemble).

    Returns:
        `(Q,)`, squared probabilities from 0 to 1/4.

    Example:
        >>> returns = torch.tensor([[0.0, 50.0, 0.0], [0.0, -50.0, 0.0]])
        >>> preference_variance(returns, torch.tensor([[0, 1], [0, 2]]))
        tensor([0.2500, 0.0000])
    """
    return over_differences(returns, pairs, lambda difference: _variance(difference.sigmoid()))


def difference_variance(returns: Tensor, pairs: Tensor) -> Tensor:
    r"""Posterior variance of the difference between two returns.

    $\operatorname{Var}_s[R_b^s - R_a^s]$, the population variance. Unlike
    `preference_variance`, it keeps growing where every sample is certain of the preference.

    Returns:
        `(Q,)`, at least 0, reward units².

    Example:
        >>> difference_variance(torch.tensor([[0.0, 1.0], [0.0, 5.0]]), torch.tensor([[0, 1]]))
        tensor([4.])
    """
    return over_differences(returns, pairs, _variance)


def predictive_entropy(returns: Tensor, pairs: Tensor) -> Tensor:
    r"""Entropy of the predicted preference, epistemic and aleatoric together.

    $H[\mathbb{E}_s p_s]$ with $p_s = \sigma(R_b^s - R_a^s)$ and $H$ the binary entropy: uncertainty
    sampling (Lewis & Gale 1994). A clip against its copy, about which there is nothing to learn,
    scores highest; `mutual_information` avoids that. Random answers of the teacher raise the
    scores without changing their order.

    Returns:
        `(Q,)`, nats from 0 to log 2.

    Example:
        >>> predictive_entropy(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[0, 1], [0, 2]]))
        tensor([0.6931, 0.0012])
    """
    return over_differences(returns, pairs, lambda d: _entropy(*_preference(d)))


def mutual_information(
    returns: Tensor, pairs: Tensor, *, random_answer_rate: float = 0.0
) -> Tensor:
    r"""Mutual information between the preference and the reward function (BALD).

    $H[\mathbb{E}_s p_s] - \mathbb{E}_s H[p_s]$ with
    $p_s = (1 - \epsilon)\,\sigma(R_b^s - R_a^s) + \epsilon / 2$ and $H$ the binary entropy
    (Houlsby et al. 2011; for comparisons Bıyık et al. 2019, arXiv 1910.04365). Unlike
    `preference_variance`, it discounts pairs that the teacher would decide at random.

    Args:
        returns: As in `Acquisition`.
        pairs: As in `Acquisition`.
        random_answer_rate: $\epsilon$, probability that the teacher answers at random, as in
            `rewardmodels.likelihood.preference_probability`.

    Returns:
        `(Q,)`, nats from 0 to log 2.

    Raises:
        InvalidInput: As in `Acquisition`, or a rate outside [0, 1).

    Example:
        >>> returns = torch.tensor([[0.0, 50.0, 0.0], [0.0, -50.0, 0.0]])
        >>> mutual_information(returns, torch.tensor([[0, 1], [0, 2]]))
        tensor([0.6931, 0.0000])
    """
    check_random_answer_rate(random_answer_rate)

    def score(difference: Tensor) -> Tensor:
        second = preference_probability(difference, random_answer_rate=random_answer_rate)
        first = preference_probability(-difference, random_answer_rate=random_answer_rate)
        total = _entropy(second.mean(0), first.mean(0))
        return (total - _entropy(second, first).mean(0)).clamp_min(0)

    return over_differences(returns, pairs, score)


def expected_best(returns: Tensor, pairs: Tensor) -> Tensor:
    r"""Expected utility of the best option (EUBO): the expected return of the better clip.

    $\mathbb{E}_s[\max(R_a^s, R_b^s) - \min_c R_c^s]$ (Lin et al. 2022, arXiv 2203.11382, less
    each sample's worst return). Subtracting the same from every pair keeps EUBO's order, makes
    scores that weights can multiply, and removes the constant that comparisons leave free. It
    looks for good clips, where `mutual_information` looks for the reward function.

    Returns:
        `(Q,)`, at least 0, reward units.

    Example:
        >>> returns = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 5.0]])
        >>> expected_best(returns, torch.tensor([[0, 1], [0, 2], [1, 2]]))
        tensor([2.0000, 3.0000, 3.5000])
    """
    # max(a, b) = a + relu(b - a): a number for each clip, and a function of the difference.
    gain = over_differences(returns, pairs, lambda difference: difference.relu().mean(0))
    if not len(pairs):
        return gain
    first = (returns.detach().double() - returns.detach().double().amin(1, keepdim=True)).mean(0)
    return gain + first[pairs[:, 0].long()].to(gain.dtype)


def d_optimal(returns: Tensor, pairs: Tensor) -> Tensor:
    r"""Gain of D-optimal design: decrease of the posterior volume by a comparison.

    $p (1 - p) \operatorname{Var}_s[R_b^s - R_a^s]$ with $p = \mathbb{E}_s \sigma(R_b^s - R_a^s)$.
    By the matrix determinant lemma, one plus this is the factor by which the comparison's Fisher
    information raises the determinant of the posterior precision (Chaloner & Verdinelli 1995,
    "Bayesian Experimental Design"; for comparisons Das et al. 2024, arXiv 2402.10500).
    `active.batch.GreedyLogDet` extends it to a batch.

    Returns:
        `(Q,)`, at least 0, reward units².

    Example:
        >>> d_optimal(torch.tensor([[0.0, 2.0], [0.0, -2.0]]), torch.tensor([[0, 1]]))
        tensor([1.])
    """

    def score(difference: Tensor) -> Tensor:
        second, first = _preference(difference)
        return second * first * _variance(difference)

    return over_differences(returns, pairs, score)


ACQUISITIONS: Final[dict[str, Acquisition]] = {
    "preference_variance": preference_variance,
    "difference_variance": difference_variance,
    "predictive_entropy": predictive_entropy,
    "mutual_information": mutual_information,
    "expected_best": expected_best,
    "d_optimal": d_optimal,
}


def acquisition_named(name: str) -> Acquisition:
    """Return the acquisition of that name.

    Raises:
        UnknownName: A name that isn't in `ACQUISITIONS`.
    """
    if name not in ACQUISITIONS:
        raise UnknownName("acquisition", name, ACQUISITIONS)
    return ACQUISITIONS[name]


def all_pairs(n: int) -> Tensor:
    """List every unordered pair among n clips, in lexicographic order.

    Returns:
        `(n (n - 1) / 2, 2)` long, the smaller index first.

    Raises:
        InvalidInput: A negative n.

    Example:
        >>> all_pairs(3).tolist()
        [[0, 1], [0, 2], [1, 2]]
    """
    require("n", n >= 0, "a number of clips, at least 0", n)
    return torch.triu_indices(n, n, 1).T.contiguous()


def check_pairs(pairs: Tensor, n: int) -> None:
    """Raise InvalidInput unless pairs is `(Q, 2)` integers from 0 to n - 1."""
    valid = pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype in _INTEGERS
    got = f"{pairs.dtype} of shape {tuple(pairs.shape)}"
    require("pairs", valid, "integers of shape (Q, 2)", got)
    if len(pairs):
        least, most = int(pairs.min()), int(pairs.max())
        expected = f"indices from 0 to {n - 1} ({n} clips)"
        require("pairs", 0 <= least <= most < n, expected, f"{least} to {most}")


@torch.no_grad()
def over_differences(
    returns: Tensor, pairs: Tensor, summarise: Callable[[Tensor], Tensor]
) -> Tensor:
    """Reduce the return difference of every pair over samples, in blocks of bounded memory.

    Shapes and errors are those of `Acquisition`.

    Args:
        returns: `(S, N)`, joint posterior samples, reward units.
        pairs: `(Q, 2)` integers, indices into the N clips.
        summarise: Maps `(S, B)` doubles, second minus first, to `(B,)`.

    Example:
        >>> returns = torch.tensor([[0.0, 1.0, 4.0], [0.0, 3.0, 4.0]])
        >>> over_differences(returns, all_pairs(3), lambda difference: difference.mean(0))
        tensor([2., 4., 2.])
    """
    valid = returns.ndim == 2 and returns.is_floating_point() and len(returns) > 0
    got = f"{returns.dtype} of shape {tuple(returns.shape)}"
    require("returns", valid, "floats of shape (S, N) with at least one sample", got)
    got = "NaN or infinity; the model that drew them has diverged"
    require("returns", bool(returns.isfinite().all()), "finite numbers", got)
    check_pairs(pairs, returns.shape[1])
    # Doubles, because information is a small difference of entropies of order one.
    samples = returns.double()
    results = returns.new_empty(len(pairs))
    block = max(1, _BLOCK // len(samples))
    for start in range(0, len(pairs), block):
        first, second = pairs[start : start + block].long().unbind(1)
        difference = samples.index_select(1, second).sub_(samples.index_select(1, first))
        results[start : start + block] = summarise(difference)
    return results


def _variance(samples: Tensor) -> Tensor:
    # Written out: torch's own var over the first axis measures a hundred times slower.
    return (samples - samples.mean(0)).square_().mean(0)


def _preference(difference: Tensor) -> tuple[Tensor, Tensor]:
    # Both tails from their own sigmoid: 1 - p would round a near-certain answer to certain.
    return difference.sigmoid().mean(0), difference.neg().sigmoid().mean(0)


def _entropy(yes: Tensor, no: Tensor) -> Tensor:
    return torch.special.entr(yes) + torch.special.entr(no)
