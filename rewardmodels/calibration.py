"""Calibration scores of predicted preferences, as pure functions.

`probability` is always `(Q,)`, the predicted probability that a pair's second clip is preferred,
and `preference` `(Q,)`, as in `Comparisons`; tensors, NumPy arrays or lists. Which clip is written
first has no meaning, so each score counts every pair both ways round: it is the same for swapped
pairs. All raise InvalidInput for no pairs, shapes that don't agree, or numbers out of range.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from rewardmodels.arrays import ArrayLike, as_pairs, as_tensor
from rewardmodels.errors import check_positive, require, require_rows
from rewardmodels.likelihood import negative_log_likelihood


def log_loss(probability: ArrayLike, preference: ArrayLike) -> float:
    r"""Mean negative log likelihood, in nats per comparison; log 2 for a probability of 1/2.

    $-[\mu \log p + (1 - \mu) \log (1 - p)]$ for a preference $\mu$: a tie counts half each way.
    A probability of exactly 0 or 1 that is wrong costs 100 nats, not infinity.

    Example:
        >>> round(log_loss(torch.tensor([0.9, 0.5]), torch.tensor([1.0, 0.0])), 4)
        0.3993
    """
    return float(F.binary_cross_entropy(*_checked(probability, preference)))


def brier_score(probability: ArrayLike, preference: ArrayLike) -> float:
    r"""Mean squared error of the probability, from 0 to 1; 0.25 for one of 1/2 (Brier 1950).

    $\mu (1 - p)^2 + (1 - \mu) p^2$ for a preference $\mu$: a tie counts half each way, so its
    score is at least 0.25.

    Example:
        >>> round(brier_score(torch.tensor([0.9, 0.5]), torch.tensor([1.0, 0.0])), 4)
        0.13
    """
    p, mu = _checked(probability, preference)
    return float((mu * (1 - p).square() + (1 - mu) * p.square()).mean())


def sharpness(probability: ArrayLike) -> float:
    r"""Mean of $|2p - 1|$, from 0 (all probabilities 1/2) to 1 (all certain).

    Probabilities that are all 1/2 are calibrated; the aim is sharpness subject to calibration
    (Gneiting et al. 2007).

    Example:
        >>> round(sharpness(torch.tensor([0.9, 0.5])), 4)
        0.4
    """
    probability = as_tensor("probability", probability)
    p, _ = _checked(probability, torch.zeros_like(probability))
    return float((2 * p - 1).abs().mean())


class Reliability(NamedTuple):
    """Predicted probabilities and observed frequencies, bin by bin; empty bins are left out.

    Attributes:
        probability: `(B,)`, mean predicted probability.
        frequency: `(B,)`, observed frequency.
        weight: `(B,)`, share of the comparisons, summing to 1.
    """

    probability: NDArray[np.float64]
    frequency: NDArray[np.float64]
    weight: NDArray[np.float64]


def reliability_curve(
    probability: ArrayLike,
    preference: ArrayLike,
    *,
    bins: int = 10,
    binning: Literal["width", "mass"] = "width",
) -> Reliability:
    """Predicted probability against observed frequency, of pairs counted both ways round.

    Equal probabilities always share a bin, so that no score depends on the order of pairs. A tie
    counts half each way.

    Args:
        probability: `(Q,)`.
        preference: `(Q,)`.
        bins: Maximum number of bins.
        binning: "width" for bins `[i/B, (i+1)/B)`, "mass" for as many comparisons in each.

    Example:
        >>> curve = reliability_curve(torch.tensor([0.9, 0.8]), torch.tensor([1.0, 0.0]), bins=2)
        >>> curve.probability.round(2).tolist(), curve.frequency.tolist()
        ([0.15, 0.85], [0.5, 0.5])
    """
    one_way, mu = _checked(probability, preference)
    check_positive(bins=bins)
    require("binning", binning in ("width", "mass"), "'width' or 'mass'", repr(binning))
    p = torch.cat([one_way, 1 - one_way]).numpy()
    outcome = torch.cat([mu, 1 - mu]).numpy()
    place = p
    if binning == "mass":
        # A middle rank is the same for equal values, and mirrored when all pairs are swapped.
        # Rounded, since 1 - p tells values apart that p doesn't.
        place = (scipy.stats.rankdata(p.round(12)) - 0.5) / len(p)
    bin_of = np.minimum((place * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    used = count > 0
    predicted, observed = (np.bincount(bin_of, x, bins)[used] for x in (p, outcome))
    return Reliability(predicted / count[used], observed / count[used], count[used] / len(p))


def expected_calibration_error(
    probability: ArrayLike,
    preference: ArrayLike,
    *,
    bins: int = 10,
    binning: Literal["width", "mass"] = "width",
) -> float:
    r"""Mean distance of predicted probability from observed frequency, over bins.

    $\sum_b w_b |p_b - f_b|$ over the `reliability_curve` (Naeini et al. 2015; Guo et al. 2017,
    eq. 3); with bins of equal mass the adaptive calibration error (Nguyen & O'Connor 2015), less
    noisy where most probabilities are near 0 and 1. It is biased upwards by about
    $1/\sqrt{\text{comparisons per bin}}$, so compare it only between equal numbers of comparisons.

    Arguments are those of `reliability_curve`.

    Example:
        >>> p = torch.tensor([0.8, 0.8, 0.8, 0.8])
        >>> round(expected_calibration_error(p, torch.tensor([1.0, 1.0, 1.0, 0.0])), 4)
        0.05
    """
    curve = reliability_curve(probability, preference, bins=bins, binning=binning)
    return float((curve.weight * np.abs(curve.probability - curve.frequency)).sum())


def joint_log_loss(
    samples: ArrayLike,
    pairs: ArrayLike,
    preference: ArrayLike,
    *,
    group_size: int = 10,
    random_answer_rate: float = 0.0,
) -> float:
    r"""Negative log likelihood of groups of comparisons taken jointly, in nats per comparison.

    $-\log \frac{1}{S} \sum_s \prod_{q \in g} P_s(\mu_q)$ summed over groups g, divided by Q (Osband
    et al. 2022, "The neural testbed", and 2023, "Epistemic neural networks"). Marginal scores
    can't tell epistemic from aleatoric uncertainty; this one rewards a posterior whose functions
    each explain all of a group. Groups whose pairs share few clips are more informative. With
    `group_size=1` it is the `log_loss` of the marginals. Fewer samples make it larger (Jensen), so
    compare only equal S.

    Args:
        samples: `(S, N)` returns, from `ReturnPosterior.rsample`.
        pairs: `(Q, 2)` indices of clips; each run of `group_size` rows is a group, the last may
            be smaller.
        preference: `(Q,)`; a tie counts half each way.
        group_size: Comparisons per group.
        random_answer_rate: Probability that the teacher answers at random.

    Example:
        >>> samples = torch.tensor([[0.0, 9.0, 0.0, 9.0], [9.0, 0.0, 9.0, 0.0]])
        >>> pairs, preference = torch.tensor([[0, 1], [2, 3]]), torch.ones(2)
        >>> round(joint_log_loss(samples, pairs, preference, group_size=1), 3)  # each uncertain
        0.693
        >>> round(joint_log_loss(samples, pairs, preference, group_size=2), 3)  # but together
        0.347
    """
    samples, preference = as_tensor("samples", samples), as_tensor("preference", preference)
    shape = tuple(samples.shape)
    require("samples", len(shape) == 2 and shape[0] > 0, "shape (S, N) with S of at least 1", shape)
    pairs = as_pairs(pairs, shape[1])
    expected = "shapes (Q, 2) and (Q,) with Q of at least 1"
    got = f"{tuple(pairs.shape)} and {tuple(preference.shape)}"
    require("pairs, preference", preference.shape == pairs.shape[:1] != (0,), expected, got)
    check_positive(group_size=group_size)
    samples = samples.detach().double()
    total = 0.0
    groups = zip(pairs.split(group_size), preference.double().split(group_size), strict=True)
    for some, mu in groups:
        difference = samples[:, some[:, 1]] - samples[:, some[:, 0]]
        nll = negative_log_likelihood(difference, mu, random_answer_rate=random_answer_rate).sum(1)
        total -= float(torch.logsumexp(-nll, 0)) - float(np.log(len(samples)))
    return total / len(pairs)


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's rank correlation; equal values share their mean rank.

    Use it for predicted and true returns, or for the variance of a difference and its squared
    error.

    Args:
        one: `(N,)`.
        other: `(N,)`.

    Returns:
        From -1 to 1; NaN where either is constant.

    Example:
        >>> round(rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 3.0, 2.0])), 3)
        0.5
    """
    one, other = as_tensor("one", one), as_tensor("other", other)
    valid = one.ndim == 1 and one.shape == other.shape and len(one) >= 2
    got = f"{tuple(one.shape)} and {tuple(other.shape)}"
    require("one, other", valid, "two shapes (N,) with N of at least 2", got)
    ranks = [scipy.stats.rankdata(x.detach().cpu().numpy()) for x in (one, other)]
    if any(np.ptp(x) == 0 for x in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def error_detection_auroc(
    uncertainty: ArrayLike, probability: ArrayLike, preference: ArrayLike
) -> float:
    """Probability that a wrong prediction is more uncertain than a right one; 0.5 is chance.

    Ties (preferences of exactly 0.5) are left out; a probability of exactly 0.5 is wrong one
    way round and right the other. The variance of a difference tends to grow with the difference
    itself, so alone it may do worse than chance: divide it by the mean, or take $-|p - 1/2|$.

    Args:
        uncertainty: `(Q,)`, higher is less certain, e.g. a difference's spread over its mean.
        probability: `(Q,)`.
        preference: `(Q,)`.

    Returns:
        From 0 to 1; NaN where no prediction is wrong, or none is right.

    Example:
        >>> preference, p = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.9, 0.6, 0.8])
        >>> error_detection_auroc(torch.tensor([1.0, 5.0, 2.0]), p, preference)
        1.0
    """
    uncertainty, wrong = _errors(uncertainty, probability, preference)
    # A half-wrong prediction counts as one that is wrong and one that is right.
    label = torch.cat([(wrong > 0).int(), (wrong == 1).int()])
    if label.min() == label.max():
        return float("nan")
    return float(roc_auc_score(label, uncertainty.repeat(2)))


class RiskCoverage(NamedTuple):
    """Errors among the most certain predictions, at each coverage.

    Attributes:
        coverage: `(Q,)`, share of predictions that are used: 1/Q, 2/Q, ..., 1.
        risk: `(Q,)`, share of those that are wrong (selective risk).
        generalised_risk: `(Q,)`, share of all that are used and wrong: coverage times risk.
        aurc: Mean of the risk over all coverages (Geifman & El-Yaniv 2017); lower is better.
        augrc: Area under the generalised risk (Traub et al. 2024); lower is better, and at
            most 1/2.
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    generalised_risk: NDArray[np.float64]
    aurc: float
    augrc: float


def risk_coverage(
    uncertainty: ArrayLike, probability: ArrayLike, preference: ArrayLike
) -> RiskCoverage:
    r"""Selective risk at each coverage, with the areas under both curves.

    Predictions of equal uncertainty come in random order: the curve is the mean over all orders.
    AURC weighs the most certain predictions most; AUGRC is the probability that a prediction is
    wrong and used when the coverage is drawn at random, $(1 - \text{AUROC})\,a (1 - a) +
    (1 - a)^2 / 2$ for an accuracy a (Traub et al. 2024, "Overcoming common flaws in the evaluation
    of selective classification systems"). Ties are left out; a probability of exactly 0.5 is half
    wrong.

    Args:
        uncertainty: `(Q,)`, higher is less certain.
        probability: `(Q,)`.
        preference: `(Q,)`.

    Example:
        >>> preference, p = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.9, 0.6, 0.8])
        >>> curve = risk_coverage(torch.tensor([1.0, 5.0, 2.0]), p, preference)
        >>> curve.risk.round(3).tolist(), round(curve.augrc, 4)
        ([0.0, 0.0, 0.333], 0.0556)
    """
    uncertainty, errors = _errors(uncertainty, probability, preference)
    wrong = errors.numpy()
    _, group, count = np.unique(uncertainty.numpy(), return_inverse=True, return_counts=True)
    expected = np.repeat(np.bincount(group, wrong) / count, count)  # in order of uncertainty
    used = np.arange(1, len(wrong) + 1)
    generalised = expected.cumsum() / len(wrong)
    risk = expected.cumsum() / used
    augrc = float(np.trapezoid(np.append(0.0, generalised), dx=1 / len(wrong)))
    return RiskCoverage(used / len(wrong), risk, generalised, float(risk.mean()), augrc)


def check_predictions(probability: Tensor, preference: Tensor) -> None:
    """Raise InvalidInput unless both are `(Q,)` numbers from 0 to 1."""
    valid = probability.ndim == 1 and probability.shape == preference.shape
    got = f"{tuple(probability.shape)} and {tuple(preference.shape)}"
    require("probability, preference", valid, "two shapes (Q,)", got)
    for name, value in (("probability", probability), ("preference", preference)):
        require_rows(name, (value >= 0) & (value <= 1), "numbers from 0 to 1", value)


def _checked(probability: ArrayLike, preference: ArrayLike) -> tuple[Tensor, Tensor]:
    probability = as_tensor("probability", probability)
    preference = as_tensor("preference", preference)
    check_predictions(probability, preference)
    require("probability, preference", len(probability) > 0, "at least one pair", "none")
    # In double precision, so that sums over many pairs don't depend on their order.
    return probability.detach().double().cpu(), preference.detach().double().cpu()


def _errors(
    uncertainty: ArrayLike, probability: ArrayLike, preference: ArrayLike
) -> tuple[Tensor, Tensor]:
    """Uncertainty of the pairs without a tie, and error of each prediction: 0, 1, or 1/2."""
    p, mu = _checked(probability, preference)
    uncertainty = as_tensor("uncertainty", uncertainty)
    expected = f"shape (Q,) = ({len(p)},) as probability"
    require("uncertainty", uncertainty.shape == p.shape, expected, tuple(uncertainty.shape))
    decided = mu != 0.5
    require("preference", bool(decided.any()), "a preference that isn't a tie", "none")
    p, mu = p[decided], mu[decided]
    wrong = torch.where(p == 0.5, 0.5, ((p > 0.5) != (mu > 0.5)).double())
    return uncertainty.detach().double().cpu()[decided], wrong
