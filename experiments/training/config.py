"""The settings of a run of `rewardmodels learn`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from active import Annotator, GreedyInformation, QueryStrategy, Schedule, SyntheticTeacher
from experiments.envs.tasks import find_task
from experiments.training.settings import known_good
from rewardmodels import DeepEnsemble, InvalidInput, RewardModel

RewardName = Literal["learned", "task", "zero", "constant", "random"]

_MAX_SEED = 2**31 - 10_001  # EnvPool's are 32 bits, and each copy of an environment has its own


def default_model() -> DeepEnsemble:
    """An ensemble of leaky units that hardly decay.

    Smooth ones that do are right more often (`rewardmodels study predictors`), but policies get
    further on these: see docs/settings.md.
    """
    return DeepEnsemble(activation="leaky_relu", weight_decay=0.01)


@dataclass
class LearnConfig:
    """Settings of one run.

    Args:
        task: HalfCheetah, Hopper, Walker2d, Ant, Swimmer, Reacher, Pendulum, InvertedPendulum,
            backflip, or any Gymnasium id with a time limit.
        comparisons: Answers to learn from, in all. None takes what is known to be good for the
            task, here and below.
        steps: Environment steps to train the policy for.
        reward: `learned` from comparisons, or one to compare with: the `task`'s own, or a trivial
            one (`zero`, `constant`, `random`), on which many a task is done well already (Shin et
            al. 2023, arXiv 2301.01392).
        model: The reward predictor.
        strategy: Which pairs of clips are asked about.
        schedule: When they are asked about.
        teacher: Who answers: a function of two clips, or `human` for people on the page that
            `rewardmodels label` serves, or `replay FILE` for answers that were recorded.
        algorithm: Any Stable-Baselines3 algorithm, by name.
        pessimism: Standard deviations that are taken off the learned reward.
        warm_up: Rounds of asking and fitting before the policy is trained at all, about an agent
            that acts at random; they share what the schedule wants first.
        start_over: Steps after which an agent that acts at random starts over.
        rounds: Rounds of asking, fitting and training.
        focus: How much more is asked about clips that may be good: a clip counts by the power of
            its rank among the candidates in optimistic return (mean plus standard deviation).
        clip_length: Frames per clip; an episode's length where that is shorter.
        candidates: Clips from among which a round's pairs are chosen.
        epochs: The most passes over the comparisons at each fit.
        evaluate: Episodes that the final policy is judged by.
        video: Whether to make a video of the final policy.
        threads: Threads of PyTorch; the networks are so small that one is fastest, and several
            runs side by side then don't get in each other's way.
        seed: Of everything that is drawn at random.
        out: The run directory.

    Raises:
        InvalidInput: A number out of range, or an unknown task.
    """

    task: str = "HalfCheetah"
    comparisons: int | None = None
    steps: int | None = None
    reward: RewardName = "learned"
    model: RewardModel = field(default_factory=default_model)
    strategy: QueryStrategy = field(default_factory=GreedyInformation)
    schedule: Schedule | None = None
    teacher: Annotator = field(default_factory=SyntheticTeacher)
    algorithm: str = "PPO"
    pessimism: float = 0.0
    warm_up: int | None = None
    start_over: int | None = None
    rounds: int | None = None
    focus: float = 4.0
    clip_length: int = 25
    candidates: int = 300
    epochs: int = 40
    evaluate: int = 32
    video: bool = True
    threads: int = 1
    seed: int = 0
    out: Path = Path("runs/learn")

    def __post_init__(self) -> None:
        task, good = find_task(self.task), known_good(self.task)
        self.schedule = self.schedule or good.schedule()
        for name in ("comparisons", "steps", "rounds"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(good, name))
        assert self.comparisons is not None
        self.warm_up = self.warm_up if self.warm_up is not None else good.warm_up
        if self.start_over is None:
            self.start_over = good.start_over or task.horizon
        for name, least in (
            ("comparisons", 8), ("steps", 1), ("warm_up", 1), ("start_over", 1), ("rounds", 1),
            ("clip_length", 1), ("candidates", 2),
            ("epochs", 1), ("evaluate", 1), ("threads", 1), ("pessimism", 0), ("focus", 0),
            ("seed", 0),
        ):  # fmt: skip
            if not getattr(self, name) >= least:
                value = getattr(self, name)
                raise InvalidInput(f"{name}: expected a number of at least {least}, got {value}.")
            if getattr(self, name) == math.inf:
                raise InvalidInput(f"{name}: expected a finite number, got inf.")
        if self.seed > _MAX_SEED:
            raise InvalidInput(f"seed: expected at most {_MAX_SEED:,}, got {self.seed}.")
        if self.candidates * (self.candidates - 1) // 2 < self.comparisons:
            raise InvalidInput(
                "candidates: expected enough clips for as many pairs as comparisons "
                f"({self.comparisons}), got {self.candidates}."
            )
