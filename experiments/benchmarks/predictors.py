"""The study of predictors in flat figures, and what its users wait for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.figures import check_settings, publish
from experiments.datasets.pools import make_pool
from experiments.grid import run_study
from experiments.studies.predictor_scores import COVERAGE
from experiments.studies.predictors import PREDICTORS, TASKS, simulated, speed
from experiments.studies.summary import Row, by, numbers, pooled
from rewardmodels import Clips, Comparisons, LaplaceHead, fit

_QUICK_POOL = {"steps": 20_480, "episodes": 4}

# Key: the cell's figure that it is made of.
_FIGURES = {
    "ece": "in distribution/ECE",
    "nll": "in distribution/log loss",
    "nll_raw": "in distribution/raw log loss",
    "nll_shifted": "shifted/log loss",
    "nll_shifted_raw": "shifted/raw log loss",
    "error_auroc": "shifted/error AUROC",
    "rank_correlation": "in distribution/rank correlation",
    "difference_rank_correlation": "in distribution/raw difference rank correlation",
    "coverage": "coverage",
    "fit_seconds": "fit seconds",
}


def benchmark_predictors(
    quick: bool = False,
    json: Path | None = None,
    seeds: int = 5,
    jobs: int = 1,
    pools: Path = Path("runs/pools"),
    out: Path = Path("runs/study-predictors"),
) -> dict[str, Any]:
    """Measures calibration, uncertainty and cost of every predictor on simulated tasks.

    Args:
        quick: In about two minutes, for trends: one task and its own small pool, one seed.
        json: File for the figures; they are printed too.
        seeds: Draws of clips and of initial weights, on each task.
        jobs: Processes side by side; times are for comparison only with one.
        pools: Where the agents' episodes are kept.
        out: Where cells are kept, the same as of `rewardmodels study predictors`; a second call
            goes on with those that are there.

    Returns:
        Flat keys: `ece.<Predictor>`, `nll.<Predictor>`, and so on: in distribution and
        calibrated, where nothing else is said; `error_auroc` under the shift. Interquartile means
        over tasks and seeds.
    """
    check_settings(json, seeds=seeds, jobs=jobs)
    with tempfile.TemporaryDirectory() as folder:
        if quick:
            pools = out = Path(folder)
        tasks = TASKS[1:2] if quick else TASKS
        pool: dict[str, Any] = _QUICK_POOL if quick else {}
        for task in tasks:
            make_pool(task, folder=pools, **pool)
        cell = {"comparisons": 300, "length": 25, "tests": 1000 if quick else 5000}
        cells = [
            {"task": task, "predictor": name, "seed": seed, **cell, "pools": str(pools), **pool}
            for seed in range(1 if quick else seeds)
            for task in tasks
            for name in PREDICTORS
        ]
        results = run_study(simulated, cells, out / "cells", jobs=jobs)
        rows = [{**cell, **result} for cell, result in zip(cells, results, strict=True)]
    figures = _figures(rows)
    for name in PREDICTORS:
        taken = speed(name)
        figures[f"frame_us.{_key(name)}"] = taken["frame us"]
        figures[f"batch_frame_us.{_key(name)}"] = taken["frame us at 4096"]
    figures["bayesian_rex_seconds"] = many_samples()
    return publish(figures, json)


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, cells in by(rows, "predictor").items():
        for key, metric in _FIGURES.items():
            known = [row for row in cells if metric in row]
            values = [numbers(some, metric) for some in by(known, "task").values()]
            if values and not np.isnan(np.concatenate(values)).any():
                figures[f"{key}.{_key(name)}"] = pooled(values)[0]
        figures[f"coverage_gap.{_key(name)}"] = figures[f"coverage.{_key(name)}"] - COVERAGE
    return figures


def _key(predictor: str) -> str:
    return "".join(word[0].upper() + word[1:] for word in predictor.split())


def many_samples() -> float:
    """Seconds for 100,000 samples of the returns of 1,000 clips of 25 frames, `LaplaceHead`.

    Bayesian REX (Brown et al. 2020, arXiv:2002.09089) draws as many by MCMC in five minutes.
    """
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    clips = Clips(
        torch.randn(1000, 25, 17, generator=draw), torch.randn(1000, 25, 6, generator=draw)
    )
    some = Comparisons(clips[:200], torch.arange(200).view(100, 2), torch.arange(100) % 2.0)
    model = fit(LaplaceHead(), some, epochs=1)
    started = time.perf_counter()
    samples = model.posterior(clips).rsample(100_000, draw)
    seconds = time.perf_counter() - started
    assert samples.shape == (100_000, 1000)
    return seconds
