"""Whether a policy learned from comparisons is as good, and as quick, as on the true reward."""

from __future__ import annotations

import math
import resource
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from active import all_pairs, mutual_information
from experiments.analysis.old_stats import bootstrap_interval, interquartile_mean
from experiments.benchmarks.figures import check_settings, publish
from experiments.training.agents import PPO_ROLLOUT
from experiments.training.config import LearnConfig
from experiments.training.learn import Learner, learn
from experiments.training.rewarding import LearnedReward
from experiments.training.run_directory import Run
from rewardmodels import Clips, Comparisons, DeepEnsemble, fit

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
    figures |= score_pairs()
    figures |= measure_throughput(rollouts=4 if quick else 24)
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


def measure_throughput(rollouts: int) -> dict[str, float]:
    """Environment steps a second with the learned and the task's own reward, taking turns."""
    seconds: dict[Reward, list[float]] = {"learned": [], "task": []}
    steps = 0
    torch.set_num_threads(1)  # as in a run
    with tempfile.TemporaryDirectory() as folder:
        learners = {}
        for arm in seconds:
            config = LearnConfig("Hopper", reward=arm, out=Path(folder) / arm)
            learners[arm] = Learner(config, Run(config.out))
            learners[arm].agent.learn(PPO_ROLLOUT)
        learned = learners["learned"]
        learned.seed(0)
        clips = learned.history.cut(50, 200, learned.rng)
        pairs = torch.arange(200).view(100, 2)
        better = (clips.returns[pairs[:, 1]] > clips.returns[pairs[:, 0]]).float()
        fit(learned.model, Comparisons(clips, pairs, better), epochs=5)
        learned.pay(LearnedReward(learned.model))
        for _ in range(rollouts):
            for arm, learner in learners.items():
                before, started = learner.step, time.perf_counter()
                learner.agent.learn(PPO_ROLLOUT, reset_num_timesteps=False)
                seconds[arm].append(time.perf_counter() - started)
                steps = learner.step - before
    per_second = {arm: steps / statistics.median(times) for arm, times in seconds.items()}
    return {
        "throughput_ratio": per_second["learned"] / per_second["task"],
        "steps_per_second.learned": per_second["learned"],
        "steps_per_second.task": per_second["task"],
    }


def score_pairs() -> dict[str, float]:
    """Seconds and memory for the value of all pairs of 1,000 clips of 50 frames, 7 members."""
    with get_context("spawn").Pool(1) as pool:  # a process of its own, for a peak of its own
        return pool.apply(_score_pairs)


def _score_pairs() -> dict[str, float]:
    torch.set_num_threads(1)  # as in a run; a second one gains nothing where others are busy
    draw = torch.Generator().manual_seed(0)
    clips = Clips(
        torch.randn(1000, 50, 17, generator=draw), torch.randn(1000, 50, 6, generator=draw)
    )
    some = Comparisons(clips[:4], torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.0, 1.0]))
    model = fit(DeepEnsemble(members=7), some, epochs=1)
    pairs = all_pairs(len(clips))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        started = time.perf_counter()
        returns = model.posterior(clips).rsample(7)
        scores = mutual_information(returns, pairs)
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    some_pairs = torch.randperm(len(pairs), generator=draw)[:200].tolist()
    error = max(
        abs(float(scores[i]) - _naive_score(returns, *pairs[i].tolist())) for i in some_pairs
    )
    return {
        "pairs": len(pairs),
        "pairs_seconds": seconds,
        "pairs_peak_mib": peak / 1024,
        "pairs_max_error": error,
    }


def _naive_score(returns: torch.Tensor, first: int, second: int) -> float:
    """Mutual information of one answer and the reward function, nats, member by member."""

    def entropy(p: float) -> float:
        return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)

    said = [1 / (1 + math.exp(float(row[first] - row[second]))) for row in returns.double()]
    return entropy(sum(said) / len(said)) - sum(map(entropy, said)) / len(said)
