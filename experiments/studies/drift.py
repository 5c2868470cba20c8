"""Does a policy stay good when it is trained for long on a reward that was learned once?

An agent acts passably. Some of its clips are compared, a reward model learns from the answers, and
the agent goes on to be trained with PPO on the learned reward alone. Where the reward errs upwards,
there the policy goes (Gao et al. 2023, arXiv 2210.10760). Arms start from the same agent, the same
answers and the same reward:

- **frozen**: nothing more is asked;
- **continued**: more comparisons of what the policy does now, at a constant rate;
- **when unsure**: the same, but only while the belief about it is worse than a level;
- **pessimistic**: as frozen, on the mean less kappa standard deviations;
- **guarded**: as frozen, but watched. A detector knows the frames of the agent that the answers are
  about; an alarm, whose false rate is promised, pauses training before the next update. The paused
  policy plays; half its episodes are asked about, the others calibrate the guard anew, and training
  goes on. Once the budget of comparisons is spent, an alarm ends it: the policy is kept as it is;
- **zero**, **constant**, **random**: nothing is asked, and the reward says nothing. What these
  lose is the cost of training alone; what another arm loses besides is its reward's.

All arms that ask have the same budget, and ask with the same strategy. The agent is the same for
every seed, which decides what is compared, the reward's initial weights and what the policy draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from active import BALD, Constant, Schedule, SyntheticTeacher, WhenUnsure, all_pairs
from experiments.analysis.old_page import about_study
from experiments.envs.guard_episodes import train
from experiments.envs.tasks import Task, find_task
from experiments.envs.vector import make_vec_env
from experiments.grid import Result, run_study
from experiments.studies.drift_figures import SAYING_NOTHING, write_tables
from experiments.studies.predictors import maker
from experiments.studies.summary import Row
from experiments.training.agents import PPO_ENVS, PPO_ROLLOUT, make_agent
from experiments.training.clip_buffer import ClipBuffer
from experiments.training.evaluation import play
from experiments.training.pausing import PauseOnAlarm
from experiments.training.rewards import LearnedReward, RewardWrapper, baseline_reward
from ood import Mahalanobis, Monitor
from rewardmodels import (
    Clips,
    Comparisons,
    InvalidInput,
    ReturnPosterior,
    RewardModel,
    UnknownName,
    fit,
)
from rewardmodels.clips import cut

Arm = Literal[
    "frozen", "continued", "when unsure", "pessimistic", "guarded", "zero", "constant", "random"
]
ARMS: tuple[Arm, ...] = get_args(Arm)

_EPOCHS = 100
_CANDIDATES = 120  # clips among which pairs are chosen
_PLAYED = 64  # episodes of a policy: half to ask about, half to calibrate on
# With the settings below 4 of 5 Hoppers lost 30% or more. A HalfCheetah that was trained beforehand
# got better even on a reward from 8 comparisons.
_SHARE = 0.25  # of copies, whose alarms pause training: by chance in a fifth of episodes at most
_LEARNING_RATE = 1e-3  # three times that of `learn`, so that long training takes fewer steps


def study_drift(
    task: str = "Hopper",
    arms: Sequence[Arm] = ARMS,
    predictor: str = "DeepEnsemble",
    comparisons: int = 6,
    more: int = 100,
    batch: int = 20,
    length: int = 25,
    kappa: float = 2.0,
    level: float = 0.05,
    alpha: float = 0.05,
    before: int = 150_000,
    steps: int = 65_536,
    horizon: int = 250,
    seeds: int = 5,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    address: str | None = None,
    out: Path = Path("runs/study-drift"),
) -> list[Row]:
    """Measures what is left of a policy's true return after long training on a learned reward.

    Args:
        task: A MuJoCo task that `rewardmodels learn` takes.
        arms: Any of `ARMS`.
        predictor: A name or an import path.
        comparisons: Answers that the reward is first learned from.
        more: Comparisons in all that the arms that ask may add.
        batch: Comparisons at a time, for the guard.
        length: Frames per clip.
        kappa: Standard deviations that the pessimistic arm takes off.
        level: Nats of mean information above which the arm "when unsure" asks.
        alpha: Promised chance of a false alarm in an episode, for each copy of the environment.
        before: Steps for which the agent is trained on the task's own reward beforehand.
        steps: For which it is then trained on the learned one.
        horizon: Steps per episode.
        seeds: Draws of everything but that agent.
        jobs: Cells side by side.
        backend: loky for this machine, or a cluster; as `experiments.grid` has it.
        address: The cluster's; None starts one here.
        out: Where results and the agent are kept; a second call goes on with those there.

    Returns:
        The cells of `drift_cell`; `out` has the curves as CSV, with `report.html`, its figures
        and a video.

    Raises:
        InvalidInput: A number out of range.
        UnknownName: A task, predictor or arm that there isn't.
    """
    settings = dict(locals())
    for name, value, least in (
        ("comparisons", comparisons, 2), ("batch", batch, 1), ("more", more, batch),
        ("length", length, 1), ("horizon", horizon, length), ("before", before, 0),
        ("steps", steps, 1), ("seeds", seeds, 1), ("jobs", jobs, 1), ("kappa", kappa, 0),
    ):  # fmt: skip
        if not value >= least:
            raise InvalidInput(f"{name}: expected at least {least}, got {value}.")
    for arm in arms:
        if arm not in ARMS:
            raise UnknownName("arm", arm, ARMS)
    maker(predictor)
    agent = out / f"{task.replace('/', '_')}-{before}-steps-of-{horizon}.safetensors"
    if not agent.exists():
        train(replace(find_task(task), horizon=horizon), before, agent)
    cells = [
        {"task": task, "arm": arm, "seed": seed, "predictor": predictor,
         "comparisons": comparisons, "more": more, "batch": batch, "length": length,
         "kappa": kappa, "level": level, "alpha": alpha, "steps": steps, "horizon": horizon,
         "agent": str(agent)}
        for seed in range(seeds) for arm in arms
    ]  # fmt: skip
    found = run_study(drift_cell, cells, out / "cells", jobs=jobs, backend=backend, address=address)
    rows: list[Row] = [{**cell, **result} for cell, result in zip(cells, found, strict=True)]
    about = about_study(study_drift, settings, rows, out)
    print(write_tables(rows, out, about))
    return rows


def drift_cell(
    task: str,
    arm: Arm,
    seed: int,
    predictor: str,
    comparisons: int,
    more: int,
    batch: int,
    length: int,
    kappa: float,
    level: float,
    alpha: float,
    steps: int,
    horizon: int,
    agent: str,
) -> Result:
    """What becomes of one agent: its curves, its alarms, its final policy."""
    torch.set_num_threads(1)
    found = replace(find_task(task), horizon=horizon)
    pessimism = kappa if arm == "pessimistic" else 0.0
    training = _Training(found, seed, maker(predictor)(), length, pessimism, agent)
    with closing(training.env):
        first = training.play()
        if arm in SAYING_NOTHING:
            training.env.reward = baseline_reward(arm, seed)
        else:
            training.ask(first[: _PLAYED // 2], comparisons)
        alarms: list[int] = []
        if arm == "guarded":
            alarms = training.guarded(first, steps, comparisons + more, batch, alpha)
        else:
            schedules: dict[Arm, Schedule] = {
                "continued": Constant(initial=0.0),
                "when unsure": WhenUnsure(level, share=batch / more, initial=0.0),
            }
            training.scheduled(schedules.get(arm), steps, more)
        last = training.play()
    median = last.returns.argsort()[(_PLAYED - 1) // 2]
    assert last.rewards is not None
    return {
        **training.curves,
        "alarms": alarms,
        "asked": training.asked,
        "start": float(first.returns.mean()),
        "final": float(last.returns.mean()),
        "states": [] if last.states is None else last.states[median].tolist(),
        "rewards": last.rewards[median].tolist(),
    }


class _Training:
    """An agent, its environments, and the reward that it is paid."""

    def __init__(
        self, task: Task, seed: int, model: RewardModel, length: int, pessimism: float, agent: str
    ) -> None:
        self.task, self.seed, self.model, self.length = task, seed, model, length
        self.pessimism = pessimism
        self.draw = torch.Generator().manual_seed(seed)
        self.clip_buffer = ClipBuffer(task.horizon, PPO_ENVS)
        self.env = RewardWrapper(make_vec_env(task, PPO_ENVS, seed), self.clip_buffer, None)
        self.normalised = VecNormalize(self.env)
        self.agent = make_agent("PPO", self.normalised, task, seed, learning_rate=_LEARNING_RATE)
        tensors = load_file(agent)
        seen: Any = self.normalised.obs_rms
        seen.mean, seen.var = (tensors.pop(name).numpy() for name in ("mean", "var"))
        seen.count = 100 * PPO_ROLLOUT  # what is familiar isn't forgotten at the first step
        self.agent.policy.load_state_dict(
            {k.removeprefix("policy."): v for k, v in tensors.items()}
        )
        set_random_seed(seed)
        self.answers: list[Comparisons] = []
        self.familiar: list[Tensor] = []
        self.curves: dict[str, list[float]] = {}  # an entry a round
        self.played = 0
        self.round_steps = task.horizon * PPO_ENVS  # in which every copy ends an episode

    @property
    def asked(self) -> int:
        """Comparisons so far."""
        return sum(map(len, self.answers))

    def play(self) -> Clips:
        """Whole episodes of the policy as it is, in environments of their own."""
        self.played += 1
        (own,) = np.random.SeedSequence([self.seed, self.played]).generate_state(1)
        seed = int(own % 2**30)  # EnvPool's are 32 bits
        return play(self.agent, self.normalised, self.task, episodes=_PLAYED, seed=seed)

    def ask(self, episodes: Clips, n: int) -> None:
        """Asks n questions about clips of these episodes, fits the reward, and pays it."""
        clips = cut(episodes, self.length, _CANDIDATES, generator=self.draw)
        pairs = all_pairs(len(clips))
        if self.answers:
            belief = self.model.posterior(clips)
            pairs = pairs[BALD().select(belief, pairs, n, generator=self.draw)]
        else:
            pairs = pairs[torch.randperm(len(pairs), generator=self.draw)[:n]]
        said = SyntheticTeacher().answer(clips, pairs, self.draw)
        self.answers.append(Comparisons(clips, pairs, said).compact())
        old = self.env.reward
        moments = old.moments(clips) if isinstance(old, LearnedReward) else (0.0, 1.0)
        fit(self.model, Comparisons.cat(self.answers), epochs=_EPOCHS, seed=self.seed)
        self.env.reward = LearnedReward(self.model, self.pessimism).rescaled(clips, *moments)

    def scheduled(self, schedule: Schedule | None, steps: int, more: int) -> None:
        """Trains, and asks after each round as many as a schedule wants."""
        first = self.asked
        while self.agent.num_timesteps < steps:
            self.agent.learn(self.round_steps, reset_num_timesteps=False)
            self.note()
            if schedule is None:
                continue
            answered = self.asked - first
            latest = self.latest()

            def belief(clips: Clips = latest) -> ReturnPosterior:
                return self.model.posterior(clips)

            due = schedule.comparisons_by(
                self.agent.num_timesteps,
                total_steps=max(1, steps - self.round_steps),  # the last round asks nothing
                budget=more,
                answered=answered,
                belief=belief,
            )
            if due > answered and self.agent.num_timesteps < steps:
                self.ask(latest, due - answered)

    def guarded(self, first: Clips, steps: int, budget: int, batch: int, alpha: float) -> list[int]:
        """Trains until an alarm, asks about what the policy does now, and goes on.

        An alarm once the budget is spent ends training.

        Returns:
            Steps at which there were alarms.
        """
        pause = PauseOnAlarm(self.monitor(first, alpha), share=_SHARE)
        alarms = []
        while self.agent.num_timesteps < steps:
            self.agent.learn(self.round_steps, callback=pause, reset_num_timesteps=False)
            if not pause.paused:
                self.note()
                continue
            now = self.play()
            self.note(now)
            alarms.append(self.agent.num_timesteps)
            if self.asked + batch > budget:
                break
            self.ask(now[: _PLAYED // 2], batch)
            pause.watch(self.monitor(now, alpha))
            self.agent.set_env(self.normalised)  # which begins its episodes anew
        return alarms

    def monitor(self, episodes: Clips, alpha: float) -> Monitor:
        """Knows all frames asked about so far, and the usual course of half of these episodes."""
        features = torch.cat([episodes.observations, episodes.actions], -1)
        half = _PLAYED // 2
        self.familiar.append(features[:half].flatten(0, 1))
        monitor = Monitor(Mahalanobis().fit(torch.cat(self.familiar)))
        monitor.calibrate(list(features[half:]), alpha)
        return monitor

    def latest(self) -> Clips:
        """Clips of the episodes that have just ended."""
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=self.draw)))
        return self.clip_buffer.sample(self.length, _CANDIDATES, rng)

    def note(self, played: Clips | None = None) -> None:
        """Keeps means over episodes played, or those that ended in training since last time."""
        if played is None:
            true, predicted = np.mean(self.env.episode_returns, 0).tolist()
            clips = self.latest()
        else:
            true, predicted = float(played.returns.mean()), self.paid(played)
            clips = cut(played, self.length, _CANDIDATES, generator=self.draw)
        self.env.episode_returns.clear()
        std = 0.0  # of a reward that isn't learned
        if self.answers:
            belief = self.model.frame_posterior(
                clips.observations.flatten(0, 1), clips.actions.flatten(0, 1)
            )
            std = float(belief.variance.sqrt().mean())
        values = {
            "step": self.agent.num_timesteps,
            "true": true,
            "predicted": predicted,
            "std": std,
            "comparisons": self.asked,
        }
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)

    def paid(self, episodes: Clips) -> float:
        """Mean return of episodes by the learned reward."""
        assert isinstance(self.env.reward, LearnedReward)
        return self.task.horizon * self.env.reward.moments(episodes)[0]
