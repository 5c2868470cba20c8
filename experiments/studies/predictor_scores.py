"""What a belief's answers are worth, and how often its sets hold the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from experiments.grid import Result
from rewardmodels import (
    Calibrated,
    Clips,
    Comparisons,
    GaussianPosterior,
    ReturnPosterior,
    RewardModel,
    SampledPosterior,
)
from rewardmodels import calibration as score

COVERAGE, CALIBRATED_ON = 0.95, 100
_SAMPLES = 64


def scores(belief: ReturnPosterior, comparisons: Comparisons) -> Result:
    r"""What a belief's answers are worth.

    Uncertainty is that of the answer, $\min(p, 1 - p)$, as a detector of wrong answers. In rank
    correlation with the error $|p - y|$ it is epistemic alone: the spread of $p$ over the functions
    that are believed possible (Gleave & Irving 2022, arXiv:2203.07472). Where most answers
    are right both fall together as p leaves one half, so where the true return is known the spread
    of the difference of returns is also set against the error of that difference, the belief
    scaled to the true returns by least squares.
    """
    pairs, said = comparisons.pairs, comparisons.preference
    p = belief.preference(pairs).double().cpu()
    samples = belief.rsample(_SAMPLES, torch.Generator().manual_seed(0)).cpu()
    spread = (samples[:, pairs[:, 1]] - samples[:, pairs[:, 0]]).double().sigmoid().std(0)
    unsure = torch.minimum(p, 1 - p)
    wrong = (p > 0.5) != (said > 0.5)
    risk = score.risk_coverage(unsure, p, said)
    return of_answers(p, said) | {
        "error AUROC": score.error_detection_auroc(unsure, p, said),
        "epistemic error AUROC": score.error_detection_auroc(spread, p, said),
        "rank correlation": score.rank_correlation(spread, (p - said).abs()),
        "total rank correlation": score.rank_correlation(unsure, (p - said).abs()),
        "AURC": risk.aurc,
        "AUGRC": risk.augrc,
        "joint log loss": score.joint_log_loss(samples, pairs, said),
        "confident and wrong": float((wrong & (unsure < 0.1)).double().mean()),
        "reliability": _lists(score.reliability_curve(p, said)),
        "risk by coverage": _thinned(risk.risk),
    }


def of_returns(belief: ReturnPosterior, comparisons: Comparisons) -> Result:
    """Scores that take the true returns."""
    mean, variance = (x.double().cpu() for x in belief.difference(comparisons.pairs))
    returns = comparisons.clips.returns.double()
    first, second = returns[comparisons.pairs].T
    true = second - first
    scale = float((mean * true).sum() / mean.square().sum())
    error = (scale * mean - true).abs()
    return {
        "return rank correlation": score.rank_correlation(belief.mean.cpu(), returns),
        "difference rank correlation": score.rank_correlation(variance, error),
    }


def of_answers(p: Tensor, said: Tensor) -> dict[str, float]:
    """Scores that probabilities alone allow."""
    decided = said != 0.5
    right = ((p > 0.5) == (said > 0.5))[decided]
    return {
        "accuracy": float(right.double().mean()),
        "log loss": score.log_loss(p, said),
        "Brier": score.brier_score(p, said),
        "ECE": score.expected_calibration_error(p, said),
        "ACE": score.expected_calibration_error(p, said, binning="mass"),
        "sharpness": score.sharpness(p),
    }


def _lists(curve: score.Reliability) -> dict[str, list[float]]:
    return {name: [float(x) for x in values] for name, values in curve._asdict().items()}


def _thinned(risk: np.ndarray) -> list[float]:
    """At coverages of 0.05, 0.1, ..., 1."""
    places = np.ceil(np.linspace(0.05, 1, 20) * len(risk)).astype(int) - 1
    return [float(x) for x in risk[places]]


def coverage(model: RewardModel, comparisons: Comparisons, resplits: int = 200) -> float:
    """How often a prediction set of 95% holds the answer, over draws of who is calibrated on.

    Args:
        model: A fitted model.
        comparisons: Answers that it hasn't seen, of which each draw calibrates on 100 and asks
            about the rest.
        resplits: Draws.
    """
    comparisons = comparisons[comparisons.preference != 0.5]
    remembered = _Remembered(model.posterior(comparisons.clips))
    index = torch.arange(float(len(comparisons.clips)))[:, None, None]
    said = replace(comparisons, clips=Clips(index, index))
    draw = torch.Generator().manual_seed(0)
    held = []
    for _ in range(resplits):
        order = torch.randperm(len(said), generator=draw)
        known, rest = said[order[:CALIBRATED_ON]], said[order[CALIBRATED_ON:]]
        calibrated = Calibrated(remembered).calibrate(known, random=True)
        sets = calibrated.posterior(rest.clips).prediction_set(rest.pairs, COVERAGE)
        held.append(sets[torch.arange(len(rest)), (rest.preference > 0.5).long()].double().mean())
    return float(torch.stack(held).mean())


class _Remembered:
    """A belief about clips that was asked for once; clips are now told by their number."""

    def __init__(self, belief: ReturnPosterior) -> None:
        self.belief = belief

    def posterior(self, clips: Clips) -> ReturnPosterior:
        rows, belief = clips.observations[:, 0, 0].long(), self.belief
        if isinstance(belief, SampledPosterior):
            return SampledPosterior(belief.samples[:, rows])
        assert isinstance(belief, GaussianPosterior)
        return GaussianPosterior(belief.mean[rows], belief.root[rows])

    def frame_posterior(self, observations: Tensor, actions: Tensor) -> ReturnPosterior:
        return self.posterior(Clips(observations[:, None], actions[:, None]))
