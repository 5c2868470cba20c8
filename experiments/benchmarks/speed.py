"""Benchmark of speed: training, scoring of pairs, choice of queries, single frames, guards."""

from __future__ import annotations

import math
import pickle
import resource
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from active import GreedyInformation, KCenter, QueryStrategy, all_pairs, mutual_information
from experiments.analysis.page import check_json, publish
from experiments.envs.rollout import Policy, play
from experiments.envs.tasks import Task, find_task, make_env
from experiments.registry import make_named
from experiments.training.agents import PPO_ROLLOUT, load_policy, train_agent
from experiments.training.config import LearnConfig
from experiments.training.learn import Learner
from experiments.training.run_directory import RunDirectory
from ood import CUSUM, MEWMA, Guard, Monitor, OODDetector, Statistic
from rewardmodels import Clips, Comparisons, DeepEnsemble, SampledPosterior, fit
from rewardmodels.saving import PREDICTORS
from rewardmodels.wrappers import LearnedReward

Reward = Literal["learned", "task"]

# A HalfCheetah's frame; networks trained for longer take no longer.
_OBSERVATION, _ACTION = 17, 6
_MONITORS: dict[str, tuple[str, Statistic, str]] = {
    "Mahalanobis": ("Mahalanobis", CUSUM(), "observation_action"),
    "KNN": ("KNN", CUSUM(), "observation_action"),
    "DynamicsEnsemble": ("DynamicsEnsemble(steps=50)", MEWMA(), "transition"),
}
_DEFAULT = "DynamicsEnsemble"
_FAMILIAR, _CALIBRATION = 21, 22  # episodes, of more frames than KNN keeps


def benchmark_speed(quick: bool = False, json: Path | None = None) -> dict[str, Any]:
    """Measure what has to be fast, on one thread; medians throughout.

    Args:
        quick: In a minute or two, for trends: a tenth of the frames and steps.
        json: File for the key numbers, which are printed too.

    Returns:
        Flat keys. `throughput_ratio`: steps per second on a learned reward over those on the
        task's own. `pairs_seconds`, `pairs_peak_mib`: value of all pairs of 1,000 clips of 50
        frames under 7 members. `greedy_seconds`, `kcenter_seconds`: 100 queries from all pairs of
        1,000 clips, and from 1,000 pairs. `frame_us.<Predictor>`: one frame's mean and standard
        deviation. `guard_step_us`, `guard_step_share`: a guarded step less a bare one, and that
        over simulation and policy, of the default detector; `….<Detector>` of three.
        `fit_million_seconds`, `score_million_us`, `memory_million_mb` (and by detector): a
        detector fitted to a million frames.

    Raises:
        InvalidInput: A file in a directory that doesn't exist.
    """
    check_json(json)
    torch.set_num_threads(1)
    numbers: dict[str, Any] = {
        **score_pairs(),
        **measure_throughput(rollouts=4 if quick else 24),
        "greedy_seconds": seconds_to_select(GreedyInformation(samples=100), clips=1000),
        "kcenter_seconds": seconds_to_select(KCenter(samples=100), clips=1000, pairs=1000),
        **{f"frame_us.{name}": frame_us(name) for name in PREDICTORS},
        **{
            f"{key}.{name}": ratio
            for name in PREDICTORS
            for key, ratio in novelty_cost(name, repeats=1 if quick else 3).items()
        },
        **guard_steps(steps=300 if quick else 3000),
    }
    for name in _MONITORS:
        short = "(steps=1000)" if quick and name == "DynamicsEnsemble" else ""
        make = partial(make_named, "detector", name + short, observation_size=_OBSERVATION, seed=0)
        for key, value in detector_scale(make, 10**5 if quick else 10**6).items():
            numbers[f"{key}.{name}"] = value
            if name == _DEFAULT:
                numbers[key] = value
    publish(numbers, json)
    return numbers


def measure_throughput(rollouts: int) -> dict[str, float]:
    """Environment steps a second with the learned and the task's own reward, taking turns."""
    seconds: dict[Reward, list[float]] = {"learned": [], "task": []}
    steps = 0
    torch.set_num_threads(1)  # as in a run
    with tempfile.TemporaryDirectory() as folder:
        learners = {}
        for arm in seconds:
            config = LearnConfig("Hopper", reward=arm, out=Path(folder) / arm)
            learners[arm] = Learner(config, RunDirectory(config.out))
            learners[arm].agent.learn(PPO_ROLLOUT)
        learned = learners["learned"]
        learned.seed(0, "train")
        clips = learned.clip_buffer.sample(50, 200, learned.rng)
        pairs = torch.arange(200).view(100, 2)
        better = (clips.returns[pairs[:, 1]] > clips.returns[pairs[:, 0]]).float()
        fit(learned.model, Comparisons(clips, pairs, better), epochs=5)
        learned.env.reward = LearnedReward(learned.model)
        for _ in range(rollouts):
            for arm, learner in learners.items():
                before, started = learner.step, time.perf_counter()
                learner.agent.learn(PPO_ROLLOUT, reset_num_timesteps=False)
                seconds[arm].append(time.perf_counter() - started)
                steps = learner.step - before
    per_second = {arm: steps / statistics.median(times) for arm, times in seconds.items()}
    numbers = {f"steps_per_second.{arm}": speed for arm, speed in per_second.items()}
    return {"throughput_ratio": per_second["learned"] / per_second["task"], **numbers}


def score_pairs() -> dict[str, float]:
    """Seconds and memory for the value of all pairs of 1,000 clips of 50 frames, 7 members."""
    with get_context("spawn").Pool(1) as pool:  # a process of its own, for a peak of its own
        return pool.apply(_score_pairs)


def _score_pairs() -> dict[str, float]:
    torch.set_num_threads(1)  # as in a run; a second one gains nothing where others are busy
    draw = torch.Generator().manual_seed(0)
    clips = _random_clips(1000, 50, draw)
    some = Comparisons(clips[:4], torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.0, 1.0]))
    model = fit(DeepEnsemble(members=7), some, epochs=1)
    pairs = all_pairs(len(clips))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = _median_seconds(
        lambda: mutual_information(model.posterior(clips).rsample(7), pairs), times=5
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    some_pairs = pairs[torch.randperm(len(pairs), generator=draw)[:200]]
    returns = model.posterior(clips).rsample(7)
    scores = mutual_information(returns, some_pairs).tolist()
    naive = [_naive_score(returns, *pair) for pair in some_pairs.tolist()]
    return {
        "pairs": len(pairs),
        "pairs_seconds": seconds,
        "pairs_peak_mib": peak / 1024,
        "pairs_max_error": float(np.abs(np.subtract(scores, naive)).max()),
    }


def _random_clips(n: int, frames: int, draw: torch.Generator) -> Clips:
    return Clips(*(torch.randn(n, frames, k, generator=draw) for k in (_OBSERVATION, _ACTION)))


def _naive_score(returns: torch.Tensor, first: int, second: int) -> float:
    """Mutual information of one answer and the reward function, nats, member by member."""

    def entropy(p: float) -> float:
        return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)

    said = [1 / (1 + math.exp(float(row[first] - row[second]))) for row in returns.double()]
    return entropy(sum(said) / len(said)) - sum(map(entropy, said)) / len(said)


def seconds_to_select(
    strategy: QueryStrategy, *, clips: int, pairs: int | None = None, n: int = 100
) -> float:
    """Median seconds for the choice of n queries by a posterior of 100 samples.

    Candidates are `pairs` drawn at random, or all pairs of the `clips`.
    """
    draw = torch.Generator().manual_seed(0)
    posterior = SampledPosterior(torch.randn(100, clips, generator=draw))
    candidates = all_pairs(clips)
    if pairs is not None:
        candidates = candidates[torch.randperm(len(candidates), generator=draw)[:pairs]]
    with threadpool_limits(1):
        return _median_seconds(lambda: strategy.select(posterior, candidates, n, generator=draw), 3)


def frame_us(predictor: str, times: int = 3000) -> float:
    """Median microseconds for the mean and standard deviation of one frame's reward."""
    draw = torch.Generator().manual_seed(0)
    clips = _random_clips(200, 25, draw)
    some = Comparisons(clips, torch.arange(200).view(100, 2), torch.arange(100) % 2.0)
    scorer = fit(PREDICTORS[predictor](), some, epochs=1).frame_scorer()
    frame = clips.observations[0, 0].numpy(), clips.actions[0, 0].numpy()
    with threadpool_limits(1):
        return 1e6 * _median_seconds(lambda: scorer(*frame), times)


def novelty_cost(predictor: str, repeats: int = 3) -> dict[str, float]:
    """Processor time with novelty over that without, taking turns, of medians.

    Returns:
        `novelty_fit`: a fit to 300 comparisons of clips of 25 frames. `novelty_clips`: the
        posterior of 1,000 clips like them; `novelty_far_clips`: of some whose every frame is novel.
    """
    draw = torch.Generator().manual_seed(0)
    clips = _random_clips(600, 25, draw)
    returns = clips.observations[..., 0].sum(1)
    pairs = torch.arange(600).view(300, 2)
    better = (returns[pairs[:, 1]] > returns[pairs[:, 0]]).float()
    ordinary = _random_clips(1000, 25, draw)
    far = replace(ordinary, observations=ordinary.observations * 10)
    known = Comparisons(clips, pairs, better)
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for novelty in ("learned", "off"):
            model = PREDICTORS[predictor]()
            calls: dict[str, Callable[[], object]] = {
                "fit": partial(fit, model, known, novelty=novelty),
                "clips": partial(model.posterior, ordinary),
                "far_clips": partial(model.posterior, far),
            }
            for name, call in calls.items():
                started = time.process_time()
                call()
                seconds.setdefault(f"{name} {novelty}", []).append(time.process_time() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {f"novelty_{name}": median[f"{name} learned"] / median[f"{name} off"] for name in calls}


def guard_steps(
    task: str = "HalfCheetah", *, steps: int = 3000, repeats: int = 3
) -> dict[str, float]:
    """Compare guarded with bare steps, by detector.

    A bare and a guarded environment take the same actions in turn, so that other load on the
    machine affects both. Figures are medians of repeats, each of so many steps of both.
    """
    short = replace(find_task(task), horizon=400)
    numbers: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        train_agent(short, 0, Path(folder) / "agent")  # an untrained policy takes as long
        act = load_policy(short, Path(folder) / "agent")
    for name, (_, _, features) in _MONITORS.items():
        monitor = _monitor(short, act, name)
        rounds = [_step_round(short, act, monitor, features, steps) for _ in range(repeats)]
        step_us, share = (statistics.median(each) for each in zip(*rounds, strict=True))
        numbers |= {f"guard_step_us.{name}": step_us, f"guard_step_share.{name}": share}
        if name == _DEFAULT:
            numbers |= {"guard_step_us": step_us, "guard_step_share": share}
    return numbers


def _monitor(task: Task, act: Policy, name: str) -> Monitor:
    detector_name, statistic, features = _MONITORS[name]
    played = play(lambda: make_env(task), act, _FAMILIAR + _CALIBRATION, seed=0)
    episodes = played.features(features)
    size = make_env(task).observation_space.shape[0]  # type: ignore[index]
    detector = make_named("detector", detector_name, observation_size=size, seed=0)
    monitor = Monitor(detector.fit(torch.cat(episodes[:_FAMILIAR])), statistic)
    threshold = monitor.calibrate(episodes[_FAMILIAR:], alpha=0.1)
    # So high that it never halts, and without a promise.
    monitor.threshold = replace(threshold, value=1e300, alpha=0.0, maxima=np.zeros(0))
    return monitor


def _step_round(
    task: Task, act: Policy, monitor: Monitor, features: str, steps: int
) -> tuple[float, float]:
    """Microseconds that the guard adds to a step, and that over simulation and policy."""
    bare, guarded = make_env(task), Guard(make_env(task), monitor, features)
    noise = np.random.default_rng(0).standard_normal((steps, 1, *bare.action_space.shape))  # type: ignore[misc]
    seen, _ = bare.reset(seed=0)
    guarded.reset(seed=0)
    taken: dict[str, list[float]] = {"policy": [], "bare": [], "guarded": []}
    for number in range(steps):
        started = time.perf_counter()
        action = act(seen[None], noise[number])[0]
        taken["policy"].append(time.perf_counter() - started)
        # Who is first finds caches that the other didn't warm.
        order = [("bare", bare), ("guarded", guarded)][:: 1 if number % 2 else -1]
        for name, env in order:
            started = time.perf_counter()
            after, _, _, ended, _ = env.step(action)
            taken[name].append(time.perf_counter() - started)
            if name == "bare":
                seen = after
        if ended:
            seen, _ = bare.reset()
            guarded.reset()
    middle = {name: 1e6 * statistics.median(each) for name, each in taken.items()}
    more = middle["guarded"] - middle["bare"]
    return more, more / (middle["bare"] + middle["policy"])


def detector_scale(make: Callable[[], OODDetector], frames: int) -> dict[str, float]:
    """Measure a detector fitted to frames of a HalfCheetah's size, of correlated normal numbers.

    Returns:
        Processor seconds of the fit, microseconds of one score, megabytes of the pickled detector.
    """
    draw, numbers = np.random.default_rng(0), 2 * _OBSERVATION + _ACTION
    mix = draw.standard_normal((8, numbers)).astype(np.float32)
    x = draw.standard_normal((frames, 8), dtype=np.float32) @ mix
    x += 0.1 * draw.standard_normal(x.shape, dtype=np.float32)
    features = torch.from_numpy(x)
    detector = make()
    with threadpool_limits(1):
        # Of the processor: what else a shared machine does isn't the detector's.
        started = time.process_time()
        detector.fit(features)
        seconds = time.process_time() - started
        rows = iter(x[:2000])
        score = _median_seconds(
            lambda: detector.evaluate(detector.check_frames(next(rows)[None])), times=2000
        )
    return {
        "fit_million_seconds": seconds,
        "score_million_us": 1e6 * score,
        "memory_million_mb": len(pickle.dumps(detector)) / 2**20,
    }


def _median_seconds(call: Callable[[], object], times: int) -> float:
    return statistics.median(timeit.repeat(call, number=1, repeat=times))
