"""Whether a policy learned from comparisons is as good, and as quick, as on the true reward."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from joblib import Parallel, delayed
from tqdm import tqdm

from experiments.analysis.old_stats import bootstrap_interval, interquartile_mean
from experiments.benchmarks.figures import check_settings, publish
from experiments.training.config import LearnConfig
from experiments.training.learn import learn

TASKS = ("HalfCheetah", "Hopper", "Walker2d")
Reward = Literal["learned", "task", "zero"]
ARMS: tuple[Reward, ...] = ("learned", "task", "zero")

# Of all tasks the one where so few steps on its own reward already give a return far above zero, so
# that a ratio to it has a sense: seed 0 gave 312, and about -50 on no reward.
_QUICK_TASK = "Hopper"
_QUICK_STEPS = 32_768
_QUICK: dict[str, Any] = {"comparisons": 200, "rounds": 4, "evaluate": 8, "video": False}


def benchmark_learn(
    quick: bool = False,
    json: Path | None = None,
    out: Path = Path("runs/benchmark"),
    seeds: int = 5,
    steps: int = 300_000,
    jobs: int = 2,
) -> dict[str, Any]:
    """Measures return, throughput and the scoring of pairs.

    Args:
        quick: In under 50 seconds, for trends: one small task, one seed.
        json: File for the figures; they are printed too.
        out: Where the runs are kept; a second call goes on with those that are there.
        seeds: Runs of each arm on each task.
        steps: Environment steps of each run.
        jobs: Runs side by side.

    Returns:
        Flat keys: `return_ratio.<Task>`, `throughput_ratio`, `pairs_seconds`, `pairs_peak_mib` and
        what they rest on.
    """
    check_settings(json, seeds=seeds, steps=steps, jobs=jobs)
    figures: dict[str, Any] = {}
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            figures |= compare_arms(
                Path(folder), (_QUICK_TASK,), 1, _QUICK_STEPS, 1, ("learned", "task"), **_QUICK
            )
    else:
        figures |= compare_arms(Path(out), TASKS, seeds, steps, jobs, ARMS, video=False)
    return publish(figures, json)


def compare_arms(
    out: Path,
    tasks: tuple[str, ...],
    seeds: int,
    steps: int,
    jobs: int,
    arms: tuple[Reward, ...],
    **settings: Any,
) -> dict[str, Any]:
    """Return on the learned reward over that on the task's own, interquartile means over seeds."""
    cells = [(task, arm, seed) for seed in range(seeds) for task in tasks for arm in arms]
    cells.sort(key=lambda cell: cell[1] == "zero")  # what the ratios need first
    work = (
        delayed(_run)(out / f"{task}-{arm}-{seed}", task, arm, seed, steps, settings)
        for task, arm, seed in cells
    )
    returns: dict[tuple[str, str], dict[int, float]] = {}
    done = Parallel(n_jobs=min(jobs, len(cells)), return_as="generator_unordered")(work)
    for task, arm, seed, value in (bar := tqdm(done, total=len(cells), unit=" runs")):
        returns.setdefault((task, arm), {})[seed] = value
        bar.set_postfix_str(f"{task}, {arm} reward, seed {seed}: {value:.0f}")
    figures: dict[str, Any] = {}
    for task in tasks:
        by_arm = {a: np.array([returns[task, a][seed] for seed in range(seeds)]) for a in arms}
        learned, own = by_arm["learned"], by_arm["task"]
        figures[f"return_ratio.{task}"] = float(_ratio(learned, own))
        figures[f"return_ratio_interval.{task}"] = bootstrap_interval(_ratio, learned, own)
        for arm, values in by_arm.items():
            figures[f"return.{task}.{arm}"] = float(interquartile_mean(values))
            figures[f"return_interval.{task}.{arm}"] = bootstrap_interval(
                interquartile_mean, values
            )
            figures[f"returns.{task}.{arm}"] = values.tolist()
    return figures


def _ratio(learned: np.ndarray, own: np.ndarray) -> np.ndarray:
    return interquartile_mean(learned) / interquartile_mean(own)


def _run(
    out: Path, task: str, arm: Reward, seed: int, steps: int, settings: dict[str, Any]
) -> tuple[str, Reward, int, float]:
    config = LearnConfig(task=task, reward=arm, seed=seed, steps=steps, out=out, **settings)
    resume = (out / "config.yaml").exists()
    return task, arm, seed, float(learn(config, resume=resume, progress=False)["final_return"])
