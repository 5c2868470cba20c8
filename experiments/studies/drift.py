"""Study of drift: long training of a policy on a reward that was learned once.

Clips of an untrained agent (or one trained a little on the task's own reward) are compared, a
reward model is fitted, and PPO goes on with the learned reward alone. Where that errs upwards,
there the policy goes: the predicted return climbs, the true return rises, peaks and falls (Gao et
al. 2023, arXiv:2210.10760). Arms start from the same agent, comparisons and reward:

- **frozen**: no further comparisons;
- **continued**: more comparisons of what the policy does now, at a constant rate;
- **when unsure**: the same, but only while the posterior about it is wider than a level;
- **pessimistic**: as frozen, on the mean less kappa standard deviations;
- **guarded**: as frozen, but with a guard. A detector is fitted to the frames that were compared;
  an alarm, with a promised false-alarm rate, pauses training before the next update. Half of the
  paused policy's episodes are compared, the others calibrate the guard anew, and training goes on.
  Once the budget of comparisons is spent, an alarm ends training;
- **own**: the task's own reward, the most that training can reach;
- **zero**, **constant**, **random**: trivial rewards without comparisons, which teach nothing.

All arms that ask have the same budget and strategy. The agent is the same for every seed; the seed
decides the clips, the reward's initial weights and the policy's randomness.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from active import BALD, Constant, Schedule, SyntheticTeacher, WhenUnsure, all_pairs
from experiments.analysis import plots
from experiments.analysis.page import Report, Section
from experiments.analysis.stats import bootstrap, interquartile_mean
from experiments.envs.rendering import RenderingUnavailable, render_states
from experiments.envs.rollout import play_agent
from experiments.envs.tasks import Task, find_task
from experiments.envs.vector import make_vec_env
from experiments.registry import find_class
from experiments.studies import check_least, seed_range
from experiments.training.agents import (
    PPO_ENVS,
    PPO_ROLLOUT,
    make_agent,
    restore_agent,
    train_agent,
)
from experiments.training.clip_buffer import ClipBuffer
from experiments.training.rewards import RewardWrapper, baseline_reward
from ood import Mahalanobis, Monitor, PauseOnAlarm
from rewardmodels import Clips, Comparisons, RewardModel, UnknownName
from rewardmodels.clips import cut
from rewardmodels.wrappers import LearnedReward

Arm = Literal[
    "frozen",
    "continued",
    "when unsure",
    "pessimistic",
    "guarded",
    "own",
    "zero",
    "constant",
    "random",
]
ARMS: tuple[Arm, ...] = get_args(Arm)
TRIVIAL = ("zero", "constant", "random")
UNLEARNED = ("own", *TRIVIAL)
FILMED = ("frozen", "guarded")

EPOCHS = 100
CANDIDATES = 120  # clips among which pairs are chosen
PLAYED = 64  # episodes of a policy: half to compare, half to calibrate on
SHARE = 0.25  # of copies, whose alarms pause training: by chance in a fifth of episodes at most
LEARNING_RATE = 1e-3  # three times that of `learn`, so that long training takes fewer steps
SIDE, LINE = 320, 24  # pixels of a picture, and of a line of text above it

GRID = ("arms", "seeds", "first_seed")
QUICK = {
    "arms": ("frozen", "guarded", "zero"), "before": 20_480, "steps": 4096, "horizon": 100,
    "seeds": 1, "batch": 4, "more": 8, "task": "Hopper", "comparisons": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    With the defaults ten of ten Ants were worse after training on the frozen reward than before.
    Hopper, Walker2d and Swimmer learned from as few comparisons.

    Args:
        task: A MuJoCo task that `rewardmodels learn` takes.
        arms: Any of frozen, continued, "when unsure", pessimistic, guarded, own, zero, constant,
            random.
        predictor: A name or an import path.
        comparisons: Comparisons that the reward is first fitted to.
        more: Comparisons in all that the arms that ask may add.
        batch: Comparisons at a time, for the guard.
        length: Frames per clip.
        novelty: As for `fit`: "learned" or "off".
        kappa: Standard deviations that the pessimistic arm subtracts.
        level: Nats of mean information above which the arm "when unsure" asks.
        alpha: Promised false alarms per episode, for each copy of the environment.
        before: Steps that the agent is first trained for on the task's own reward.
        steps: Steps that it is then trained for on the learned one.
        horizon: Steps per episode.
        seeds: Draws of everything but that agent.
        first_seed: The first of them.
        agents: Directory of the trained agent.

    Raises:
        InvalidInput: A number out of range.
        UnknownName: A task, predictor or arm that doesn't exist.
    """

    task: str = "Ant"
    arms: Sequence[str] = ARMS
    predictor: str = "LaplaceHead"
    comparisons: int = 20
    more: int = 100
    batch: int = 20
    length: int = 25
    novelty: Literal["learned", "off"] = "learned"
    kappa: float = 2.0
    level: float = 0.05
    alpha: float = 0.05
    before: int = 0
    steps: int = 200_000
    horizon: int = 250
    seeds: int = 10
    first_seed: int = 0
    agents: Path = Path("runs/agents")

    def __post_init__(self) -> None:
        check_least(
            self, comparisons=2, batch=1, more=self.batch, length=1, horizon=self.length, before=0,
            steps=1, seeds=1, kappa=0,
        )  # fmt: skip
        for arm in self.arms:
            if arm not in ARMS:
                raise UnknownName("arm", arm, ARMS)
        find_class("model", self.predictor)
        find_task(self.task)

    @property
    def agent(self) -> Path:
        """Path of the agent that all arms start from."""
        name = self.task.replace("/", "_")
        return self.agents / f"{name}-{self.before}-steps-of-{self.horizon}.safetensors"


def prepare(settings: Settings) -> None:
    """Train the agent that all arms start from."""
    if not settings.agent.exists():
        task = replace(find_task(settings.task), horizon=settings.horizon)
        train_agent(task, settings.before, settings.agent)


def cells(settings: Settings) -> list[dict[str, Any]]:
    """One cell for each arm and seed."""
    return [{"arm": arm, "seed": seed} for seed in seed_range(settings) for arm in settings.arms]


def cell(settings: Settings, arm: Arm, seed: int) -> list[dict[str, Any]]:
    """Rows of each round of training; the first also holds the outcome and an episode's states."""
    torch.set_num_threads(1)
    training = _Training(settings, seed, settings.kappa if arm == "pessimistic" else 0.0)
    with closing(training.env):
        first = training.play()
        if arm in TRIVIAL:
            training.env.reward = baseline_reward(arm, seed)
        elif arm == "own":
            training.env.reward = None
        else:
            training.ask(first[: PLAYED // 2], settings.comparisons)
        alarms: list[int] = []
        if arm == "guarded":
            alarms = training.guarded(first, settings)
        else:
            share = settings.batch / settings.more
            schedules: dict[Arm, Schedule] = {
                "continued": Constant(initial=0.0),
                "when unsure": WhenUnsure(settings.level, share=share, initial=0.0),
            }
            training.scheduled(schedules.get(arm), settings.steps, settings.more)
        last = training.play()
    median = last.returns.argsort()[(PLAYED - 1) // 2]
    assert last.rewards is not None
    start, final = float(first.returns.mean()), float(last.returns.mean())
    outcome = {"alarms": alarms, "asked": training.asked, "start": start, "final": final}
    rows: list[dict[str, Any]] = [{**outcome, **row} for row in training.rounds]
    rows[0]["states"] = [] if last.states is None else last.states[median].tolist()
    rows[0]["rewards"] = last.rewards[median].tolist()
    return rows


class _Training:
    """An agent, its environments, and the reward that it is trained on."""

    def __init__(self, settings: Settings, seed: int, pessimism: float) -> None:
        task: Task = replace(find_task(settings.task), horizon=settings.horizon)
        model: RewardModel = find_class("model", settings.predictor)()
        self.task, self.seed, self.model, self.length = task, seed, model, settings.length
        self.pessimism, self.novelty = pessimism, settings.novelty
        self.draw = torch.Generator().manual_seed(seed)
        self.clip_buffer = ClipBuffer(task.horizon, PPO_ENVS)
        self.env = RewardWrapper(make_vec_env(task, PPO_ENVS, seed), self.clip_buffer, None)
        self.normalised = VecNormalize(self.env)
        self.agent = make_agent("PPO", self.normalised, task, seed, learning_rate=LEARNING_RATE)
        restore_agent(self.agent, self.normalised, settings.agent)
        moments: Any = self.normalised.obs_rms
        moments.count = 100 * PPO_ROLLOUT  # so that the first steps hardly change them
        set_random_seed(seed)
        self.comparisons: list[Comparisons] = []
        self.familiar: list[Tensor] = []
        self.rounds: list[dict[str, float]] = []
        self.played = 0
        self.round_steps = task.horizon * PPO_ENVS  # in which every copy ends an episode

    @property
    def asked(self) -> int:
        """Number of comparisons so far."""
        return sum(map(len, self.comparisons))

    def play(self) -> Clips:
        """Play whole episodes of the current policy, in environments of their own."""
        self.played += 1
        (own,) = np.random.SeedSequence([self.seed, self.played]).generate_state(1)
        seed = int(own % 2**30)  # EnvPool's are 32 bits
        return play_agent(self.agent, self.normalised, self.task, episodes=PLAYED, seed=seed)

    def ask(self, episodes: Clips, n: int) -> None:
        """Compare n pairs of clips of these episodes, and refit the reward."""
        clips = cut(episodes, self.length, CANDIDATES, generator=self.draw)
        pairs = all_pairs(len(clips))
        if self.comparisons:
            posterior = self.model.posterior(clips)
            pairs = pairs[BALD().select(posterior, pairs, n, generator=self.draw)]
        else:
            pairs = pairs[torch.randperm(len(pairs), generator=self.draw)[:n]]
        preference = SyntheticTeacher().answer(clips, pairs, self.draw)
        self.comparisons.append(Comparisons(clips, pairs, preference).compact())
        self.env.refit(
            self.model, Comparisons.cat(self.comparisons), clips, pessimism=self.pessimism,
            epochs=EPOCHS, seed=self.seed, novelty=self.novelty,
        )  # fmt: skip

    def scheduled(self, schedule: Schedule | None, steps: int, more: int) -> None:
        """Train, and after each round ask for the comparisons that a schedule wants."""
        first = self.asked
        while self.agent.num_timesteps < steps:
            self.agent.learn(self.round_steps, reset_num_timesteps=False)
            self.record()
            if schedule is None:
                continue
            received = self.asked - first
            latest = self.latest()
            due = schedule.comparisons_by(
                self.agent.num_timesteps,
                total_steps=max(1, steps - self.round_steps),  # the last round asks nothing
                budget=more,
                answered=received,
                posterior=partial(self.model.posterior, latest),
            )
            if due > received and self.agent.num_timesteps < steps:
                self.ask(latest, due - received)

    def guarded(self, first: Clips, settings: Settings) -> list[int]:
        """Train, and ask about the current policy at each alarm; return the alarms' steps."""
        pause = PauseOnAlarm(self.monitor(first, settings.alpha), share=SHARE)
        budget = settings.comparisons + settings.more
        alarms: list[int] = []
        while self.agent.num_timesteps < settings.steps:
            self.agent.learn(self.round_steps, callback=pause, reset_num_timesteps=False)
            if not pause.paused:
                self.record()
                continue
            now = self.play()
            self.record(now)
            alarms.append(self.agent.num_timesteps)
            if self.asked + settings.batch > budget:
                break
            self.ask(now[: PLAYED // 2], settings.batch)
            pause.watch(self.monitor(now, settings.alpha))
            self.agent.set_env(self.normalised)  # which begins its episodes anew
        return alarms

    def monitor(self, episodes: Clips, alpha: float) -> Monitor:
        """Fit a monitor to the frames asked about, and calibrate it on half of these episodes."""
        features = torch.cat([episodes.observations, episodes.actions], -1)
        half = PLAYED // 2
        self.familiar.append(features[:half].flatten(0, 1))
        monitor = Monitor(Mahalanobis().fit(torch.cat(self.familiar)))
        monitor.calibrate(list(features[half:]), alpha)
        return monitor

    def latest(self) -> Clips:
        """Cut clips of the episodes that have just ended."""
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=self.draw)))
        return self.clip_buffer.sample(self.length, CANDIDATES, rng)

    def record(self, played: Clips | None = None) -> None:
        """Add a round: means over episodes played, or those that ended since the last round."""
        if played is None:
            true, predicted = np.mean(self.env.episode_returns, 0).tolist()
            clips = self.latest()
        else:
            assert isinstance(self.env.reward, LearnedReward)
            true = float(played.returns.mean())
            predicted = self.task.horizon * self.env.reward.moments(played)[0]
            clips = cut(played, self.length, CANDIDATES, generator=self.draw)
        self.env.episode_returns.clear()
        std = 0.0  # of a reward that isn't learned
        if self.comparisons:
            posterior = self.model.frame_posterior(
                clips.observations.flatten(0, 1), clips.actions.flatten(0, 1)
            )
            std = float(posterior.variance.sqrt().mean())
        row = {"step": self.agent.num_timesteps, "true": true, "predicted": predicted}
        self.rounds.append({**row, "std": std, "comparisons": self.asked})


def report(results: pd.DataFrame) -> Report:
    """Returns during training, what each arm keeps, and a video of two final policies."""
    outcomes = _outcomes(results)
    kept = outcomes.groupby("arm", sort=False)["kept"].agg(interquartile_mean).astype(float)
    numbers = {f"drift_kept.{arm}": value for arm, value in kept.items()}
    for column in ("peak_kept", "reached"):
        for arm, values in outcomes.groupby("arm", sort=False)[column]:
            if values.notna().any():
                numbers[f"drift_{column}.{arm}"] = float(interquartile_mean(values.dropna()))
    if "guarded" in kept:
        numbers["drift_kept"] = kept["guarded"]
    if "frozen" in kept:
        numbers["drift_lost"] = 1 - kept["frozen"]
    sections = [
        Section(
            "Return during training on the learned reward",
            "Above, the return that the reward predicts; below, the true return. Thick lines are "
            "interquartile means over seeds, thin ones the seeds; dots are alarms, the dotted line "
            "is the return before. Predicted returns are those of each arm's own reward at the "
            "time, whose scale is one standard deviation of a frame.",
            _curves(results),
        ),
        Section(
            "After training on the learned reward",
            "True return of the final policy, also as a share of the best that it had at any time, "
            "and of the frozen arm's best; as shares of the gain since the start, which may be far "
            "below zero; shares of the seeds that lost 30% or more of their "
            "best, and whose predicted return rose. What an arm loses beyond the trivial rewards "
            "(zero, constant, random) is its reward's doing.",
            table=_table(outcomes),
            digits=2,
        ),
    ]
    videos, note = _videos(results)
    if note:
        sections.append(Section("Final policies", note))
    return Report("Does a policy stay good on a reward that was learned once?", sections, numbers,
                  videos)  # fmt: skip


def _outcomes(results: pd.DataFrame) -> pd.DataFrame:
    """One row for each arm and seed, with shares of the final true return.

    `kept` is the final over the best true return; NaN where the best isn't above zero. Of what was
    gained since the start, which may be far below zero, `peak_kept` is the share of the arm's best,
    and `reached` that of the best on the task's own reward.
    """
    rounds = results.groupby(["arm", "seed"], sort=False)
    found = rounds.first(skipna=False).assign(
        most=rounds["true"].max(), rose=rounds["predicted"].last() > rounds["predicted"].first()
    )
    found["best"] = found[["start", "most", "final"]].max(axis="columns")
    found["kept"] = (found["final"] / found["best"]).where(found["best"] > 0)
    found = found.reset_index()
    gain, own = found["final"] - found["start"], found[found["arm"] == "own"].set_index("seed")
    found["peak_kept"] = gain / (found["best"] - found["start"]).replace(0, np.nan)
    found["reached"] = gain / found["seed"].map(own["best"] - own["start"])
    return found


def _table(outcomes: pd.DataFrame) -> pd.DataFrame:
    best = outcomes[outcomes["arm"] == "frozen"].set_index("seed")["best"]
    rows = []
    for arm, of in outcomes.groupby("arm", sort=False):
        against = of.set_index("seed")["final"].div(best)
        rows.append(
            {
                "arm": arm,
                "true return": bootstrap(interquartile_mean, of["final"]),
                "of its best": bootstrap(interquartile_mean, of["kept"]),
                "of the frozen arm's best": _share(against),
                "of its best gain": _share(of["peak_kept"]),
                "of the own reward's best gain": _share(of["reached"]),
                "lost 30%": float((of["kept"] <= 0.7).mean()),
                "predicted rose": float(of["rose"].mean()) if arm not in UNLEARNED else "",
                "comparisons": float(interquartile_mean(of["asked"])),
                "alarms": float(interquartile_mean(of["alarms"].map(len))),
            }
        )
    return pd.DataFrame(rows)


def _share(values: pd.Series) -> Any:
    known = values.dropna()
    return bootstrap(interquartile_mean, known) if len(known) else ""


def _curves(results: pd.DataFrame) -> Figure:
    look = plots.looks(ARMS)
    ends: dict[Any, list[plots.End]] = {}
    with plots.style():
        figure, (above, below) = plots.panels(2, width=6.4, height=3.1, sharex=True)
        for arm, of in results.groupby("arm", sort=False):
            colour, line = look[str(arm)]["color"], "-"
            if arm in UNLEARNED:
                known = plots.ARMS["task" if arm == "own" else str(arm)]
                colour, line = known.colour, known.line
            panels = (below, "true"), (above, "predicted")
            for axes, column in panels[: 1 if arm in UNLEARNED else 2]:
                steps, values = on_one_grid(of, column)
                middle = interquartile_mean(values)
                axes.plot(steps, values.T, color=colour, linewidth=0.5, alpha=0.35)
                axes.plot(steps, middle, line, color=colour, linewidth=2.4)
                end = (float(steps[-1]), float(middle[-1]), str(arm), colour)
                ends.setdefault(axes, []).append(end)
            for _, run in of.groupby("seed"):
                at = np.array(run["alarms"].iloc[0], float)
                below.plot(
                    at, np.interp(at, run["step"], run["true"]), "o", color=colour,
                    markersize=3.5, markeredgecolor="white", markeredgewidth=0.4,
                )  # fmt: skip
        below.axhline(results["start"].mean(), color=plots.GREY, linestyle=":", linewidth=1.2)
        above.set_ylabel("predicted return\n(the learned reward's units)")
        below.set_ylabel("true return\n(the task's reward units)")
        below.set_xlabel("environment steps on the learned reward")
        below.xaxis.set_major_formatter(EngFormatter(sep=""))
        return plots.label_lines(figure, ends)


def on_one_grid(results: pd.DataFrame, column: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return `(M,)` steps and `(seeds, M)` values at them, linear in between.

    Runs that ended early keep their last value; true returns begin with the one before training
    and end with the final policy's.

    Example:
        >>> rows = pd.DataFrame({"seed": [0, 0, 1, 1], "step": [1, 3, 1, 2],
        ...                      "predicted": [5.0, 7.0, 1.0, 2.0]})
        >>> steps, values = on_one_grid(rows, "predicted")
        >>> steps.tolist(), values.tolist()
        ([1.0, 2.0, 3.0], [[5.0, 6.0, 7.0], [1.0, 2.0, 2.0]])
    """
    lines = []
    for _, run in results.groupby("seed", sort=False):
        x, y = run["step"].to_numpy(float), run[column].to_numpy(float)
        if column == "true":
            x = np.concatenate([[0], x, [x[-1] + 1]])
            y = np.concatenate([run["start"][:1], y, run["final"][:1]])
        lines.append((x, y))
    steps = np.unique(np.concatenate([x for x, _ in lines]))
    return steps, np.stack([np.interp(steps, x, y) for x, y in lines])


def _videos(results: pd.DataFrame) -> tuple[dict[str, NDArray[np.uint8]], str]:
    """Pictures of two final policies side by side, and what they show or why there are none."""
    films = []
    for arm in FILMED:
        of = results[(results["arm"] == arm) & results["states"].notna()].sort_values("final")
        if len(of):
            try:
                films.append(_captioned(arm, of.iloc[(len(of) - 1) // 2]))
            except RenderingUnavailable as error:
                return {}, f"No video: {error}"
    if not films:
        return {}, ""
    note = (
        "Whole episodes: of each arm the seed of median return, and of that policy's episodes the "
        "one of median true return."
    )
    return {"-".join(FILMED[: len(films)]): np.concatenate(films, axis=2)}, note


def _captioned(arm: str, row: pd.Series) -> NDArray[np.uint8]:
    """Pictures of an episode, with the arm, the step and the true return so far above them."""
    if not row["states"]:
        raise RenderingUnavailable(f"{row['task']} doesn't show the simulator's state.")
    colour = plots.looks([*ARMS[:5]])[arm]["color"]
    states = np.array(row["states"], np.float32)
    pictures = render_states(find_task(row["task"]), states, SIDE, SIDE)
    font, frames = ImageFont.load_default(LINE * 2 // 3), []
    for step, (picture, so_far) in enumerate(
        zip(pictures, np.cumsum(row["rewards"]), strict=True), start=1
    ):
        frame = Image.new("RGB", (SIDE, SIDE + 2 * LINE), "white")
        frame.paste(Image.fromarray(picture), (0, 2 * LINE))
        draw = ImageDraw.Draw(frame)
        draw.text((8, 3), arm, colour, font, stroke_width=0.3)
        draw.text((8, LINE), f"step {step}", "black", font)
        draw.text((SIDE // 3, LINE), f"true return {so_far:.0f}", "black", font)
        frames.append(np.asarray(frame))
    return np.stack(frames)
