"""Settings of `rewardmodels learn`, and their defaults, task by task."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from active import (
    Constant,
    GreedyInformation,
    Hyperbolic,
    QueryStrategy,
    Schedule,
    SyntheticTeacher,
    Teacher,
)
from experiments.envs.tasks import TASKS, check_env, find_task
from experiments.envs.vector import MAX_SEED
from rewardmodels import DeepEnsemble, InvalidInput, RewardModel
from rewardmodels.novelty import NoveltySetting, check_novelty

RewardName = Literal["learned", "task", "zero", "constant", "random"]


@dataclass(frozen=True)
class TaskDefaults:
    """Settings whose good values differ from task to task: see docs/results/settings.md.

    Attributes:
        comparisons: As in `LearnConfig`, like the rest.
        steps: Environment steps.
        rounds: Of asking, fitting and training.
        schedule: Makes the schedule of comparisons.
        warm_up: Rounds of asking and fitting before the policy is first trained.
        start_over: Steps after which a random agent is reset; None for the task's horizon.
    """

    comparisons: int = 400
    steps: int = 300_000
    rounds: int = 10
    schedule: Callable[[], Schedule] = Constant
    warm_up: int = 1
    start_over: int | None = None


TASK_DEFAULTS: dict[str, TaskDefaults] = {
    # A Walker2d that acts at random has fallen after some 25 of its 1,000 steps. Comparisons of
    # the rest teach that falling forwards is good, and a policy that has learned to crawl doesn't
    # get up again.
    "Walker2d": TaskDefaults(schedule=lambda: Constant(initial=0.5), warm_up=4, start_over=50),
    # As many comparisons as Christiano et al. (2017, §3.2) took. Nothing of a backflip shows in a
    # Hopper that has fallen, as a random one has after some 50 steps. Landings are still learned
    # after 500,000 steps, but turning has to be learned in the first 100,000.
    "backflip": TaskDefaults(
        comparisons=900,
        steps=1_000_000,
        rounds=25,
        schedule=lambda: Hyperbolic(half_life=200_000),
        start_over=100,
    ),
}


def task_defaults(task: str) -> TaskDefaults:
    """Return the defaults of a task, or those that serve most tasks."""
    return TASK_DEFAULTS.get(task, TaskDefaults())


def default_model() -> DeepEnsemble:
    """Return an ensemble of leaky ReLU networks with little weight decay.

    Smooth activations with more decay predict better (`rewardmodels study predictors`), but
    policies get further on these: see docs/results/settings.md.
    """
    return DeepEnsemble(activation="leaky_relu", weight_decay=0.01)


@dataclass
class LearnConfig:
    """Settings of one run.

    Args:
        task: HalfCheetah, Hopper, Walker2d, Ant, Swimmer, Reacher, Pendulum, InvertedPendulum,
            backflip, or any Gymnasium id, such as CartPole-v1, or my_module:MyEnv-v0 to import the
            module that registers it.
        horizon: Steps in every episode. None takes the task's time limit.
        comparisons: Total number of comparisons to learn from. None takes the task's default,
            here and below.
        steps: Environment steps to train the policy for.
        reward: `learned` from comparisons, or a baseline: the `task`'s own reward, or a trivial
            one (`zero`, `constant`, `random`), which is enough for good returns on many tasks
            (Shin et al. 2023, arXiv 2301.01392).
        model: Reward predictor.
        strategy: Chooses the pairs of clips that are compared.
        schedule: Chooses how many comparisons each round asks for.
        teacher: Compares the clips: a synthetic teacher by name, `human` for people at the page
            that `rewardmodels label` serves, or `replay` with `--teacher.file` for recorded
            comparisons.
        algorithm: Any Stable-Baselines3 algorithm, by name.
        pessimism: Standard deviations subtracted from the learned reward.
        warm_up: Rounds of asking and fitting before the policy is first trained, about an agent
            that acts at random; they share the schedule's initial comparisons.
        start_over: Steps after which an agent that acts at random is reset.
        rounds: Rounds of asking, fitting and training.
        focus: Preference for clips of high return when pairs are chosen: a clip's weight is this
            power of its rank among the candidates in optimistic return (mean plus standard
            deviation).
        clip_length: Frames per clip; the episode's length where that is shorter.
        candidates: Clips from which a round's pairs are chosen.
        epochs: Maximal passes over the comparisons at each fit.
        novelty: Uncertainty outside the range of compared frames, as of `rewardmodels.fit`:
            "learned" (again once there are half as many comparisons again), "off", or an amplitude.
        evaluate: Episodes for the evaluation of the final policy.
        video: Make a video of the final policy.
        threads: Threads of PyTorch. The networks are so small that one is fastest, and lets
            several runs share a machine.
        seed: Of everything that is drawn at random.
        out: The run directory.

    Raises:
        InvalidInput: A number out of range, an unknown task, or an environment that can't be used.
    """

    task: str = "HalfCheetah"
    horizon: int | None = None
    comparisons: int | None = None
    steps: int | None = None
    reward: RewardName = "learned"
    model: RewardModel = field(default_factory=default_model)
    strategy: QueryStrategy = field(default_factory=GreedyInformation)
    schedule: Schedule | None = None
    teacher: Teacher = field(default_factory=SyntheticTeacher)
    algorithm: str = "PPO"
    pessimism: float = 0.0
    warm_up: int | None = None
    start_over: int | None = None
    rounds: int | None = None
    focus: float = 4.0
    clip_length: int = 25
    candidates: int = 300
    epochs: int = 40
    novelty: NoveltySetting = "learned"
    evaluate: int = 32
    video: bool = True
    threads: int = 1
    seed: int = 0
    out: Path = Path("runs/learn")

    def __post_init__(self) -> None:
        task, defaults = find_task(self.task, self.horizon), task_defaults(self.task)
        self.horizon = task.horizon
        if self.task not in TASKS:
            check_env(task)
        self.schedule = self.schedule or defaults.schedule()
        for name in ("comparisons", "steps", "rounds", "warm_up", "start_over"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(defaults, name) or task.horizon)
        least = dict.fromkeys(
            ("steps", "warm_up", "start_over", "rounds", "clip_length", "epochs", "evaluate",
             "threads"), 1
        ) | {"comparisons": 8, "candidates": 2, "pessimism": 0, "focus": 0, "seed": 0}  # fmt: skip
        most = {"pessimism": 1e6, "seed": MAX_SEED, "threads": 1024, "candidates": 10_000}
        for name, bound in least.items():
            value = getattr(self, name)
            if not bound <= value < math.inf:
                raise InvalidInput(
                    f"{name}: expected a finite number of at least {bound}, got {value}."
                )
            if value > (limit := most.get(name, math.inf if name == "focus" else 10**10)):
                raise InvalidInput(f"{name}: expected at most {limit:,}, got {value}.")
        check_novelty(self.novelty)
        assert self.comparisons is not None
        if self.candidates * (self.candidates - 1) // 2 < self.comparisons:
            raise InvalidInput(
                "candidates: expected enough clips for as many pairs as comparisons "
                f"({self.comparisons}), got {self.candidates}."
            )
