"""How many backflips a Hopper does that was taught them by comparisons alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from tqdm import tqdm

from experiments.analysis.old_stats import bootstrap_interval, interquartile_mean
from experiments.benchmarks.figures import check_settings, publish
from experiments.training.config import LearnConfig
from experiments.training.learn import learn

OUT = Path("runs/backflips")


def benchmark_backflips(
    json: Path | None = None,
    out: Path = OUT,
    seeds: int = 5,
    comparisons: int = 900,
    steps: int | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Counts full backward turns, landed, in 1,000 steps of Hoppers taught by a synthetic teacher.

    Christiano et al. (2017, arXiv 1706.03741, section 3.2) taught it by 900 comparisons of a
    person's, and give no count.

    Args:
        json: File for the figures; they are printed too.
        out: Where the runs are kept; a second call goes on with those that are there.
        seeds: Runs, of the seeds 0, 1 and so on.
        comparisons: Answers that each learns from, at most.
        steps: Environment steps of each; None takes what is known to be good.
        jobs: Runs side by side.

    Returns:
        Flat keys: `backflips`, the interquartile mean over seeds of each run's mean over its
        evaluation; `backflips_interval`, its 95% bootstrap interval; `backflips_by_seed`;
        `backflips_comparisons`, the most that a run had; `backflips_wall_seconds`, of all runs.

    Raises:
        InvalidInput: A number below 1, or a file in no directory.
    """
    check_settings(json, seeds=seeds, comparisons=comparisons, steps=steps or 1, jobs=jobs)
    return publish(count_backflips(out, seeds, comparisons, steps, jobs), json)


def count_backflips(
    out: Path, seeds: int, comparisons: int, steps: int | None, jobs: int
) -> dict[str, Any]:
    """The figures of `benchmark_backflips`, of which the arguments are."""
    work = (
        delayed(_run)(Path(out) / f"seed-{seed}", seed, comparisons, steps) for seed in range(seeds)
    )
    done = Parallel(n_jobs=min(jobs, seeds), return_as="generator")(work)
    results = list(tqdm(done, total=seeds, unit=" runs"))
    counts = np.array([result["backflips_per_1000_steps"] for result in results])
    return {
        "backflips": float(interquartile_mean(counts)),
        "backflips_interval": bootstrap_interval(interquartile_mean, counts),
        "backflips_by_seed": counts.tolist(),
        "backflips_comparisons": max(result["comparisons"] for result in results),
        "backflips_wall_seconds": sum(result["wall_seconds"] for result in results),
    }


def _run(out: Path, seed: int, comparisons: int, steps: int | None) -> dict[str, Any]:
    config = LearnConfig("backflip", comparisons=comparisons, steps=steps, seed=seed, out=out)
    return learn(config, resume=(out / "config.yaml").exists(), progress=False)
