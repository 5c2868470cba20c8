"""Confident mistakes on behaviour of unseen policies, and how many pass when some are withheld."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.datasets.pools import make_pool
from experiments.studies.predictors import asked, half, maker
from ood.selective import confidence, select
from rewardmodels import Calibrated, fit

COVERAGE = 0.8
_LABELLED, _UNSEEN = slice(0, 4), slice(-3, None)
_CALIBRATION_SHARE = 0.3


def selective_cell(
    task: str,
    seed: int,
    tests: int,
    pools: str,
    predictor: str = "LaplaceHead",
    comparisons: int = 300,
    length: int = 25,
    **made: int,
) -> dict[str, float]:
    """What passes of a predictor's confident mistakes when its least sure fifth is withheld.

    It is taught on the four least skilled policies of a pool, calibrated on some of the answers,
    and asked about the three most skilled.

    Args:
        task: Of the pool.
        seed: Of everything that is drawn.
        tests: Pairs asked about.
        pools: Directory of `make_pool`.
        predictor: By name, or an import path.
        comparisons: Answers to learn from and calibrate on, in all.
        length: Frames per clip.
        made: What else `make_pool` is given.

    Returns:
        `confident_errors`, `confident_errors_given` and `given`, all counts of pairs.
    """
    torch.set_num_threads(1)
    pool = make_pool(task, folder=Path(pools), progress=False, **made)
    known, fresh = (half(pool, which) for which in (0, 1))
    draw = torch.Generator().manual_seed(seed)

    said = asked(known, comparisons, length, draw, _LABELLED)
    unseen = asked(fresh, tests, length, draw, _UNSEEN)
    kept = round(comparisons * _CALIBRATION_SHARE)
    model = maker(predictor)()
    fit(model, said[kept:], seed=seed)
    calibrated = Calibrated(model).calibrate(said[:kept], random=True)
    probability = calibrated.posterior(unseen.clips).preference(unseen.pairs).double()
    least = float(confidence(probability).quantile(1 - COVERAGE))
    chosen = select(probability, unseen.preference, min_confidence=least)
    return {
        "confident_errors": chosen.confident_errors,
        "confident_errors_given": chosen.confident_errors_given,
        "given": int(chosen.given.sum()),
    }
