"""May its uncertainty be believed? Every predictor, in distribution, shifted, and on real people.

**Simulated.** One agent is trained on each MuJoCo task's own reward, and its episodes at ten
stages of training are kept (`experiments.pools`). A synthetic teacher compares clips of the four
worst stages. A predictor is taught most of the answers and calibrated on the rest, and then
asked about clips of the same stages from episodes that weren't labelled ("in distribution"), and of
the three best stages ("shifted"): behaviour far better than any that was labelled. Right is what
the true return says.

**Real people.** Three published sets of comparisons (`experiments.human_data`), in folds that keep
together what belongs together; and deliveries through mud by predictors that never saw any. The
weight decay is chosen inside each training fold, for predictors as for the regression they
are compared with.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from active.teachers import SyntheticTeacher
from experiments.human_data import HUMAN_DATA, HumanData, baseline, splits
from experiments.pools import Pool, make_pool
from rewardmodels import (
    Calibrated,
    Clips,
    Comparisons,
    DeepEnsemble,
    Epinet,
    InvalidInput,
    LaplaceHead,
    MCDropout,
    ReturnPosterior,
    RewardModel,
    fit,
)
from rewardmodels import calibration as score

TASKS = ("HalfCheetah", "Hopper", "Walker2d")
BASELINE = "logistic regression"
SINGLE = "single network"

PREDICTORS: dict[str, Callable[..., RewardModel]] = {
    SINGLE: lambda **options: DeepEnsemble(members=1, **options),
    "DeepEnsemble": lambda **options: DeepEnsemble(members=10, **options),
    "RandomisedPriors": lambda **options: DeepEnsemble(members=10, prior_scale=1.0, **options),
    "MCDropout": MCDropout,
    "LaplaceHead": LaplaceHead,
    "Epinet": Epinet,
}
"""What is compared, by the name in the tables; a function of `RewardModel`'s options."""

_LABELLED, _SHIFTED = slice(0, 4), slice(-3, None)
_CALIBRATION_SHARE = 0.3
_WEIGHT_DECAYS = (0.01, 1.0, 30.0)  # AdamW multiplies them by the learning rate
_SAMPLES = 64
_COVERAGE = 0.9


def simulated(
    task: str,
    predictor: str,
    seed: int,
    comparisons: int,
    length: int,
    tests: int,
    pools: str,
    teacher: dict[str, float],
) -> dict[str, Any]:
    """One predictor's scores on one task, with one draw of clips and one of initial weights.

    Args:
        task: Of `TASKS`, or any other that `make_pool` knows.
        predictor: Of `PREDICTORS`, or a class's import path.
        seed: Of everything that is drawn.
        comparisons: Answers to learn from and calibrate on, in all.
        length: Frames per clip.
        tests: Pairs asked about afterwards.
        pools: Directory of `make_pool`.
        teacher: What `SyntheticTeacher` takes.
    """
    torch.set_num_threads(1)
    pool = make_pool(task, folder=Path(pools), progress=False)
    known, fresh = (_half(pool, which) for which in (0, 1))
    draw = torch.Generator().manual_seed(seed)
    answerer = SyntheticTeacher(**teacher)

    def asked(of: Pool, n: int, skills: slice, by: SyntheticTeacher) -> Comparisons:
        clips = of.clips(2 * n, length, draw, skills=skills)
        pairs = torch.arange(2 * n).view(n, 2)
        return Comparisons(clips, pairs, by.answer(clips, pairs, draw))

    said = asked(known, comparisons, _LABELLED, answerer)
    truth = SyntheticTeacher()
    test = {
        "in distribution": asked(fresh, tests, _LABELLED, truth),
        "shifted": asked(fresh, tests, _SHIFTED, truth),
    }
    kept = round(comparisons * _CALIBRATION_SHARE)
    model, figures = _taught(_maker(predictor), said[kept:], seed=seed)
    calibrated = Calibrated(model).calibrate(said[:kept], random=True)
    for name, some in test.items():
        for kind, asks in (("", calibrated), ("raw ", model)):
            belief = asks.posterior(some.clips)
            figures |= {f"{name}/{kind}{k}": v for k, v in scores(belief, some).items()}
        returns = model.posterior(some.clips).mean.cpu()
        figures[f"{name}/return rank correlation"] = score.rank_correlation(
            returns, some.clips.returns
        )
    return figures


def human(data: str, predictor: str, fold: int, folder: str, seed: int = 0) -> dict[str, Any]:
    """One predictor's scores on the answers of people, in one fold.

    Args:
        data: Of `HUMAN_DATA`; "delivery/mud" leaves mud out of the training.
        predictor: Of `PREDICTORS`, a class's import path, or `BASELINE`.
        fold: Which of five is tested on.
        folder: Where the files are.
        seed: Of initial weights and of the folds.
    """
    torch.set_num_threads(1)
    name, _, left_out = data.partition("/")
    known = _people(name, folder)
    train, test = list(splits(known, seed=seed))[fold]
    if left_out:
        unknown = known.held_out[left_out]
        train, test = train[~unknown[train]], test[unknown[test]]
    decided = test[known.decided[test]]
    said = known.comparisons[torch.from_numpy(decided)].compact()
    if predictor == BASELINE:
        started = time.perf_counter()
        p = torch.from_numpy(baseline(known, train, decided))
        figures: dict[str, Any] = {"fit seconds": time.perf_counter() - started}
        return figures | _of_answers(p, said.preference)
    make = _maker(predictor)
    train = train[known.decided[train]]
    inner = next(iter(splits(replace_rows(known, train), folds=4, seed=seed)))
    losses = []
    for weight_decay in _WEIGHT_DECAYS:
        taught, asked = train[inner[0]], train[inner[1]]
        model, _ = _taught(make, *_rows(known, taught), seed=seed, weight_decay=weight_decay)
        some = known.comparisons[torch.from_numpy(asked)].compact()
        p = model.posterior(some.clips).preference(some.pairs)
        losses.append(score.log_loss(p, some.preference))
    best = _WEIGHT_DECAYS[int(np.argmin(losses))]
    model, figures = _taught(make, *_rows(known, train), seed=seed, weight_decay=best)
    return figures | {"weight decay": best} | scores(model.posterior(said.clips), said)


def scores(belief: ReturnPosterior, comparisons: Comparisons) -> dict[str, float]:
    """What a belief's answers are worth.

    Its uncertainty is that of the answer, $\\min(p, 1 - p)$, as a detector of wrong answers; and
    the spread of $p$ over what is believed possible, epistemic alone, in rank correlation with
    the error $|p - y|$ (as Gleave & Irving 2022, arXiv:2203.07472, have it).
    """
    pairs, said = comparisons.pairs, comparisons.preference
    p = belief.preference(pairs).double().cpu()
    samples = belief.rsample(_SAMPLES, torch.Generator().manual_seed(0)).cpu()
    spread = (samples[:, pairs[:, 1]] - samples[:, pairs[:, 0]]).double().sigmoid().std(0)
    unsure = torch.minimum(p, 1 - p)
    risk = score.risk_coverage(unsure, p, said)
    return _of_answers(p, said) | {
        "error AUROC": score.error_detection_auroc(unsure, p, said),
        "epistemic error AUROC": score.error_detection_auroc(spread, p, said),
        "rank correlation": score.rank_correlation(spread, (p - said).abs()),
        "total rank correlation": score.rank_correlation(unsure, (p - said).abs()),
        "AURC": risk.aurc,
        "AUGRC": risk.augrc,
        "joint log loss": score.joint_log_loss(samples, pairs, said),
        "confident and wrong": float(((unsure < 0.1) & ((p > 0.5) != (said > 0.5))).double().mean()),
    }


def _of_answers(p: Tensor, said: Tensor) -> dict[str, float]:
    decided = said != 0.5
    right = ((p > 0.5) == (said > 0.5))[decided]
    return {
        "accuracy": float(right.double().mean()),
        "log loss": score.log_loss(p, said),
        "Brier": score.brier_score(p, said),
        "ECE": score.expected_calibration_error(p, said),
        "ACE": score.adaptive_calibration_error(p, said),
        "sharpness": score.sharpness(p),
    }


def _taught(
    make: Callable[..., RewardModel],
    comparisons: Comparisons,
    groups: Tensor | None = None,
    *,
    seed: int,
    **options: Any,
) -> tuple[RewardModel, dict[str, Any]]:
    model = make(**options)
    started = time.perf_counter()
    fit(model, comparisons, groups=groups, seed=seed)
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, {"fit seconds": seconds, "parameters": parameters}
