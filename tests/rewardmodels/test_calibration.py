"""Scores against scikit-learn, torchmetrics, SciPy, naive loops and closed forms."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import sklearn.calibration
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm

from rewardmodels import InvalidInput
from rewardmodels.calibration import (
    brier_score,
    error_detection_auroc,
    expected_calibration_error,
    joint_log_loss,
    log_loss,
    rank_correlation,
    reliability_curve,
    risk_coverage,
    sharpness,
)

adaptive_calibration_error = partial(expected_calibration_error, binning="mass")


def answers(n: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and hard answers that they describe too surely."""
    draw = np.random.default_rng(seed)
    logit = draw.normal(0, 2, n)
    said = draw.random(n) < 1 / (1 + np.exp(-logit / 2))
    return torch.from_numpy(1 / (1 + np.exp(-logit))), torch.from_numpy(said.astype(float))


def both_ways(p: torch.Tensor, said: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return torch.cat([p, 1 - p]).numpy(), torch.cat([said, 1 - said]).numpy().astype(int)


PAIR_SCORES = [
    log_loss,
    brier_score,
    expected_calibration_error,
    adaptive_calibration_error,
    lambda p, said: error_detection_auroc((p - 0.5).abs().sin(), p, said),
    lambda p, said: risk_coverage((p - 0.5).square().cos(), p, said).augrc,
]


@pytest.mark.parametrize("score", PAIR_SCORES)
def test_order_does_not_matter(score):
    p, said = answers()
    order = torch.randperm(len(p))
    assert score(p[order], said[order]) == pytest.approx(score(p, said), rel=1e-12)


@pytest.mark.parametrize("score", PAIR_SCORES)
def test_swapping_pairs_does_not_matter(score):
    p, said = answers()
    p[:40] = 0.5
    said[:60:3] = 0.5
    some = torch.arange(300) % 3 == 0
    swapped = torch.where(some, 1 - p, p), torch.where(some, 1 - said, said)
    assert score(*swapped) == pytest.approx(score(p, said), rel=1e-12)


def test_log_loss_and_brier_are_scikit_learns():
    p, said = answers()
    assert log_loss(p, said) == pytest.approx(sklearn.metrics.log_loss(said, p))
    assert brier_score(p, said) == pytest.approx(sklearn.metrics.brier_score_loss(said, p))
    symmetric = both_ways(p, said)
    assert log_loss(p, said) == pytest.approx(sklearn.metrics.log_loss(*symmetric[::-1]))


@pytest.mark.parametrize(
    "score", [log_loss, brier_score, expected_calibration_error, adaptive_calibration_error]
)
def test_a_tie_is_half_an_comparison_each_way(score):
    p, said = answers(100)
    tied = torch.cat([said[:50], torch.full((50,), 0.5)])
    # Decided answers twice, so that each half of a tie weighs as much as half an answer.
    doubled = torch.cat([p, p]), torch.cat([said[:50], torch.ones(50), said[:50], torch.zeros(50)])
    assert score(p, tied) == pytest.approx(score(*doubled), rel=1e-9)


def test_coins_and_certainty():
    coin, said = torch.full((7,), 0.5), torch.ones(7)
    assert log_loss(coin, said) == pytest.approx(math.log(2))
    assert (brier_score(coin, said), sharpness(coin)) == (0.25, 0)
    # Both ways round, a coin is right half of the time.
    assert expected_calibration_error(coin, said) == adaptive_calibration_error(coin, said) == 0
    assert (log_loss(said, said), brier_score(said, said), sharpness(said)) == (0, 0, 1)
    assert expected_calibration_error(said, said) == adaptive_calibration_error(said, said) == 0
    assert (log_loss(1 - said, said), brier_score(1 - said, said)) == (100, 1)
    assert expected_calibration_error(1 - said, said) == 1


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_is_torchmetrics(bins):
    p, said = answers()
    both, outcome = both_ways(p, said)
    expected = tm.binary_calibration_error(
        torch.from_numpy(both), torch.from_numpy(outcome), n_bins=bins
    )
    found = expected_calibration_error(p, said, bins=bins)
    assert found == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(("binning", "strategy"), [("width", "uniform"), ("mass", "quantile")])
@pytest.mark.parametrize("bins", [3, 10])
def test_reliability_is_scikit_learns(binning, strategy, bins):
    p, said = answers()
    both, outcome = both_ways(p, said)
    curve = reliability_curve(p, said, bins=bins, binning=binning)
    frequency, probability = sklearn.calibration.calibration_curve(
        outcome, both, n_bins=bins, strategy=strategy
    )
    np.testing.assert_allclose(curve.probability, probability)
    np.testing.assert_allclose(curve.frequency, frequency)
    assert curve.weight.sum() == pytest.approx(1)
    if binning == "mass":
        np.testing.assert_allclose(curve.weight, 1 / bins)


def test_equal_probabilities_share_a_bin():
    p, said = torch.full((100,), 0.8), (torch.arange(100) < 80).float()
    curve = reliability_curve(p, said, binning="mass")
    np.testing.assert_allclose(curve.probability, [0.2, 0.8], atol=1e-7)
    np.testing.assert_allclose(curve.frequency, [0.2, 0.8])
    assert adaptive_calibration_error(p, said) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("mistakes", [0.0, 0.1])
@pytest.mark.parametrize("group_size", [1, 3, 7, 50])
def test_joint_log_loss_is_a_loop(group_size, mistakes):
    samples = torch.randn(9, 6).double()
    pairs = torch.tensor([[i % 6, (i + 1 + i % 4) % 6] for i in range(14)])
    said = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.25, 1.0, 0.0] * 2)
    total = 0.0
    for start in range(0, 14, group_size):
        likelihood = []
        for row in samples.tolist():
            product = 1.0
            for (i, j), mu in zip(
                pairs[start : start + group_size].tolist(),
                said[start : start + group_size].tolist(),
                strict=True,
            ):
                p = (1 - mistakes) / (1 + math.exp(row[i] - row[j])) + mistakes / 2
                product *= p**mu * (1 - p) ** (1 - mu)
            likelihood.append(product)
        total -= math.log(np.mean(likelihood))
    found = joint_log_loss(samples, pairs, said, group_size=group_size, random_answer_rate=mistakes)
    assert found == pytest.approx(total / 14, rel=1e-9)
    swapped = joint_log_loss(
        samples, pairs.flip(1), 1 - said, group_size=group_size, random_answer_rate=mistakes
    )
    assert swapped == pytest.approx(found, rel=1e-12)


def test_joint_log_loss_stays_finite_for_absurd_returns():
    samples = torch.tensor([[0.0, -1e5]])
    found = joint_log_loss(samples, torch.tensor([[0, 1]] * 20), torch.ones(20))
    assert found == pytest.approx(1e5)


def test_rank_correlation_is_scipys():
    one, other = torch.randn(50), torch.randn(50)
    one[::3] = 0.0
    expected = scipy.stats.spearmanr(one, other).statistic
    assert rank_correlation(one, other) == pytest.approx(expected)
    assert rank_correlation(one, one.exp()) == pytest.approx(1)
    assert math.isnan(rank_correlation(one, torch.ones(50)))


def test_detection_is_a_loop_over_wrong_and_right_answers():
    p, said = answers(80)
    p[:10], said[::7] = 0.5, 0.5
    # Far outside [0, 1], with ties, and closer together than single precision tells apart.
    unsure = (torch.rand(80).double() * 20).floor() * 1e-12 + 1e3
    wrong, right = [], []
    for one, q, mu in zip(unsure.tolist(), p.tolist(), said.tolist(), strict=True):
        for probability, answer in ((q, mu), (1 - q, 1 - mu)):
            if mu != 0.5:
                (wrong if (probability > 0.5) != (answer > 0.5) else right).append(one)
    above = [(a > b) + (a == b) / 2 for a in wrong for b in right]
    assert error_detection_auroc(unsure, p, said) == pytest.approx(np.mean(above))


def test_detection_without_errors_is_nan():
    p = torch.tensor([0.9, 0.2])
    assert math.isnan(error_detection_auroc(p, p, p.round()))
    assert math.isnan(error_detection_auroc(p, p, 1 - p.round()))


def test_risk_coverage_is_a_loop_where_no_uncertainty_is_shared():
    p, said = answers(60)
    unsure = torch.rand(60)
    curve = risk_coverage(unsure, p, said)
    wrong = ((p > 0.5) != (said > 0.5))[unsure.argsort()].tolist()
    for k in range(1, 61):
        assert curve.coverage[k - 1] == pytest.approx(k / 60)
        assert curve.risk[k - 1] == pytest.approx(sum(wrong[:k]) / k)
        assert curve.generalised_risk[k - 1] == pytest.approx(sum(wrong[:k]) / 60)
    assert curve.aurc == pytest.approx(np.mean(curve.risk))


@pytest.mark.parametrize("levels", [1, 4, 10**6])
def test_augrc_is_its_closed_form(levels):
    p, said = answers()
    unsure = (torch.rand(300) * levels).floor()
    wrong = ((p > 0.5) != (said > 0.5)).numpy()
    accuracy = 1 - wrong.mean()
    auroc = sklearn.metrics.roc_auc_score(wrong, unsure)
    expected = (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert risk_coverage(unsure, p, said).augrc == pytest.approx(expected, rel=1e-9)


def test_equal_uncertainties_are_the_mean_over_orders():
    p, said = answers(40)
    unsure = (torch.rand(40).double() * 5).floor()
    found = risk_coverage(unsure, p, said)
    draw = np.random.default_rng(0)
    risks = []
    for _ in range(2000):
        jitter = torch.from_numpy(draw.random(40)) / 2
        risks.append(risk_coverage(unsure + jitter, p, said).risk)
    error = np.std(risks, 0) / math.sqrt(2000)
    assert (np.abs(np.mean(risks, 0) - found.risk) <= 5 * error + 1e-12).all()


ONE, TWO, THREE = torch.zeros(1), torch.zeros(2), torch.zeros(3)
PAIR = torch.zeros(1, 2).long()


@pytest.mark.parametrize(
    ("score", "arguments", "name"),
    [
        (log_loss, (ONE[:0], ONE[:0]), "probability, preference"),
        (log_loss, (THREE, TWO), "probability, preference"),
        (brier_score, (torch.tensor([0.5, 1.5]), TWO), "probability: .*1.5 in row 1"),
        (brier_score, (ONE, torch.tensor([torch.nan])), "preference: .*nan"),
        (partial(reliability_curve, bins=0), (ONE, ONE), "bins"),
        (partial(reliability_curve, binning="x"), (ONE, ONE), "binning"),
        (rank_correlation, (ONE, ONE), "one, other"),
        (risk_coverage, (THREE, TWO, TWO), "uncertainty"),
        (risk_coverage, (TWO, TWO, torch.full((2,), 0.5)), "preference"),
        (joint_log_loss, (TWO, PAIR, ONE), "samples"),
        (joint_log_loss, (TWO[None], PAIR, TWO), "pairs, preference"),
        (partial(joint_log_loss, group_size=0), (TWO[None], PAIR, ONE), "group_size"),
    ],
)
def test_invalid_arguments_are_named(score, arguments, name):
    with pytest.raises(InvalidInput, match=f"^{name}"):
        score(*arguments)
