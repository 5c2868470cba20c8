"""Deep reinforcement learning from human preferences (Christiano et al. 2017, arXiv 1706.03741).

The agent never sees the task's reward. Three processes alternate (§2.2):

1. the policy interacts with the environment, and is trained by ordinary reinforcement learning
   to maximise the sum of predicted rewards;
2. pairs of clips are chosen from what it did, and a teacher says which of each pair is better;
3. the reward model is fitted to all comparisons collected so far.

The paper runs them asynchronously; here they take turns, in `rounds`, so that a run can be
repeated, and goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from tqdm import tqdm

from active import (
    FeedbackStore,
    Teacher,
    Uniform,
    all_pairs,
    mean_information,
)
from experiments.envs.tasks import find_task
from experiments.envs.vector import make_vec_env
from experiments.people import Human, Replay
from experiments.training.agents import PPO_ENVS, make_agent
from experiments.training.clip_buffer import History
from experiments.training.config import LearnConfig
from experiments.training.evaluation import counted, play, show, write_frames
from experiments.training.report import write_report
from experiments.training.rewarding import LearnedReward, RewardWrapper, relabel, unlearned_reward
from experiments.training.run_directory import Run, versions
from rewardmodels import (
    Clips,
    ReturnPosterior,
    SampledPosterior,
    fit,
    load,
    save,
)
from rewardmodels.fitting import MIN_COMPARISONS
from rewardmodels.saving import write_text_atomically


def learn(config: LearnConfig, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Learns a task from comparisons, and leaves everything about it in a run directory.

    Args:
        config: The settings.
        resume: Go on with the run that stands in `config.out`.
        progress: Show a progress bar on standard error.

    Returns:
        What stands in the run's `result.json`.

    Raises:
        InvalidInput: The directory holds a run already (or none to resume, or another).
    """
    run = Run(config.out)
    run.check(config, resume=resume)
    if run.result is not None:
        if not (config.out / "report.html").exists():
            write_report(config.out)
        return run.result
    torch.set_num_threads(config.threads)
    learner = Learner(config, run)
    run.start(config)  # only now, so that what is refused leaves no directory behind
    with (
        FeedbackStore(config.out / "answers.sqlite") as answers,
        tqdm(
            total=config.steps,
            initial=learner.step,
            unit=" steps",
            unit_scale=True,
            mininterval=1.0,
            disable=not progress,
        ) as bar,
    ):
        for round in range(learner.rounds_done, learner.rounds):
            learner.seed(round)
            if config.reward == "learned":
                learner.ask(round, answers, bar.set_postfix_str)
                learner.fit_reward(answers)
            learner.train_policy(learner.trained_by(round), bar)
            learner.keep(round, answers, bar)
        result = learner.finish(answers)
    write_report(config.out)
    return result


class Learner:
    """The state of a run, and the three things that take turns.

    Every round draws from generators seeded by `(seed, round)`, so that what it draws doesn't
    depend on whether the process was restarted in between.
    """

    def __init__(self, config: LearnConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.task = find_task(config.task)
        self.model = config.model
        self.rounds_done, self.seconds = 0, 0.0
        assert config.comparisons is not None  # the six that __post_init__ filled in
        assert config.steps is not None
        assert config.rounds is not None
        assert config.schedule is not None
        assert config.warm_up is not None
        assert config.start_over is not None
        self.comparisons, self.steps = config.comparisons, config.steps
        self.policy_rounds = config.rounds
        self.schedule = config.schedule
        # Policies that need no answers need none beforehand.
        self.warm_up = config.warm_up if config.reward == "learned" else 1
        self.rounds = self.warm_up - 1 + self.policy_rounds

        copies = PPO_ENVS if config.algorithm in ("PPO", "A2C") else 1
        self.clip_length = min(config.clip_length, self.task.horizon)
        self.start_over = max(config.start_over, 2 * self.clip_length)
        # Steps of each copy that count as what the policy now does: whole episodes, since copies
        # start together, and a Hopper that fell is a poor sample of one that stood.
        self.latest = max(self.steps // (self.policy_rounds * copies), self.task.horizon)
        self.history = History(self.latest, copies)
        venv = make_vec_env(self.task, copies, config.seed)
        reward = unlearned_reward(config.reward, config.seed)
        self.env = RewardWrapper(venv, self.history, reward)
        if isinstance(self.env.action_space, spaces.Discrete):
            choices = int(self.env.action_space.n)
            self.model.discrete_actions = self.model.discrete_actions or choices
        self.normalised = VecNormalize(self.env)
        self.agent = make_agent(config.algorithm, self.normalised, self.task, config.seed)
        if isinstance(config.teacher, Replay) and config.reward == "learned":
            config.teacher.check(self.env.observation_space.shape, self.env.action_space.shape)
        run.restore(self._read)
        self._started = time.monotonic() - self.seconds

    @property
    def step(self) -> int:
        """Environment steps that the policy has been trained for."""
        return int(self.agent.num_timesteps)

    def seed(self, round: int) -> None:
        """Starts the generators of a round."""
        (number,) = np.random.SeedSequence([self.config.seed, round]).generate_state(1)
        set_random_seed(int(number))  # Stable-Baselines3 draws from the global generators
        self.rng = np.random.default_rng(number)
        self.generator = torch.Generator().manual_seed(int(number))

    def ask(self, round: int, answers: FeedbackStore, tell: Callable[[str], Any] = str) -> None:
        """Chooses queries among the agent's latest clips, and has the teacher answer them.

        Args:
            round: Which round this is.
            answers: Where queries and answers are kept.
            tell: Shown while people are waited for.
        """
        if round == 0:
            self._act_at_random()
        teacher, answered = self.config.teacher, answers.counts().answered
        due = self._due(round, answered)
        if isinstance(teacher, Replay):
            teacher.ask(answers, due, round)
        elif isinstance(teacher, Human):
            first = round < self.warm_up
            teacher.ask(answers, due, lambda n: self._put(n, round, answers), tell, first=first)
        else:
            assert isinstance(teacher, Teacher)
            if due > answered and not answers.queries(round):  # else put before an interruption
                self._put(due - answered, round, answers)
            self._have_answered(teacher, round, answers)

    def _put(self, n: int, round: int, answers: FeedbackStore) -> None:
        clips = self._latest_clips(self.config.candidates)
        pairs = self._choose(clips, min(n, len(clips) * (len(clips) - 1) // 2))
        answers.add_queries(clips, pairs, round=round)

    def _have_answered(self, teacher: Teacher, round: int, answers: FeedbackStore) -> None:
        if unanswered := [query.id for query in answers.queries(round, unanswered=True)]:
            clips, pairs = answers.clips_of(unanswered)
            said = teacher.answer(clips, pairs, self.generator)
            for query, preference in zip(unanswered, said.tolist(), strict=True):
                answers.answer(query, preference, type(teacher).__name__)

    def fit_reward(self, answers: FeedbackStore) -> None:
        """Fits the model to all answers so far, and pays by it from now on."""
        comparisons = answers.comparisons()
        if comparisons is None or len(comparisons) < MIN_COMPARISONS:
            return  # the teacher has skipped nearly everything so far
        latest = self._latest_clips(100)
        old = self.env.reward
        moments = old.moments(latest) if isinstance(old, LearnedReward) else (0.0, 1.0)
        fit(self.model, comparisons, epochs=self.config.epochs, seed=self.config.seed)
        self.pay(LearnedReward(self.model, self.config.pessimism).anchored(latest, *moments))

    def pay(self, reward: LearnedReward) -> None:
        """Pays a reward from now on, and for what a replay buffer remembers."""
        self.env.reward = reward
        if isinstance(self.agent, OffPolicyAlgorithm):
            relabel(self.agent, reward)

    def train_policy(self, until: int, bar: tqdm) -> None:
        """Trains the policy by ordinary reinforcement learning, up to a step."""

        def advance(*_: Any) -> bool:
            bar.update(min(self.step, bar.total) - bar.n)  # rollouts are whole
            return True

        if until > self.step:
            self.agent.learn(until - self.step, callback=advance, reset_num_timesteps=False)

    def keep(self, round: int, answers: FeedbackStore, bar: tqdm) -> None:
        """Logs how it goes, and writes down all that is needed to go on from here."""
        row = self._metrics(answers)
        self.run.log(row)
        self.run.checkpoint(round, self._write)
        now = (
            f"true return {row['task_return']:.0f}" if "task_return" in row else "no episode ended"
        )
        bar.set_postfix_str(
            f"round {round + 1}/{self.rounds}, {row['comparisons']:.0f} comparisons, {now}"
        )

    def finish(self, answers: FeedbackStore) -> dict[str, Any]:
        """Plays the final policy, and writes the result, a video and the model."""
        self.seed(self.rounds)
        config, out = self.config, self.config.out
        last = {name: value for row in self.run.rows for name, value in row.items()}
        clips = play(
            self.agent, self.normalised, self.task, episodes=config.evaluate, seed=config.seed + 1
        )
        put, answered, skipped = answers.counts()
        result = {
            "task": self.task.name,
            "reward": config.reward,
            "algorithm": config.algorithm,
            "seed": config.seed,
            "steps": self.step,
            "comparisons": answered,
            "queries": put,
            "skipped": skipped,
            "final_return": float(clips.returns.mean()),
            "final_returns": clips.returns.tolist(),
            **counted(self.task, clips),
            "held_out_accuracy": last.get("held_out_accuracy"),
            "reward_correlation": None,
            "wall_seconds": last["seconds"],
            "steps_per_second": self.step / last["seconds"],
            "versions": versions(),
        }
        if self.model.fitted:
            save(self.model, out / "model.safetensors")
            result["reward_correlation"] = write_frames(self.model, clips, out / "frames.npz")
        if config.video:
            result["video_note"] = show(self.task, clips, out / "video.mp4")
        self.run.finish(result)
        return result

    def trained_by(self, round: int) -> int:
        """Steps that the policy will have been trained for after a round."""
        return max(0, round - self.warm_up + 2) * self.steps // self.policy_rounds

    def _due(self, round: int, answered: int) -> int:
        """Answers that there should be before a round's training; a timetable's all by the last."""
        a_round = self.steps // self.policy_rounds
        # In warm-up there is no policy yet to be unsure about.
        judged = self.model.fitted and round >= self.warm_up
        due = self.schedule.comparisons_by(
            max(0, round - self.warm_up + 1) * a_round,
            total_steps=max(1, (self.policy_rounds - 1) * a_round),
            budget=self.comparisons,
            answered=answered,
            belief=self._belief if judged else None,
        )
        return due if round >= self.warm_up else -(-due * (round + 1) // self.warm_up)

    def _act_at_random(self) -> None:
        self.env.action_space.seed(self.config.seed)
        for step in range(self.latest):
            if step % self.start_over == 0:
                self.env.reset()
            self.env.step(
                np.stack([self.env.action_space.sample() for _ in range(self.env.num_envs)])
            )
        self.env.episode_returns.clear()

    def _latest_clips(self, n: int) -> Clips:
        return self.history.cut(self.clip_length, n, self.rng)

    def _belief(self) -> ReturnPosterior:
        return self.model.posterior(self._latest_clips(self.config.candidates))

    def _choose(self, clips: Clips, n: int) -> torch.Tensor:
        """`(n, 2)` pairs: the strategy's choice, or a random one while there is no belief."""
        pairs = all_pairs(len(clips))
        if not self.model.fitted:
            nothing = SampledPosterior(torch.zeros(1, len(clips)))
            return pairs[Uniform().select(nothing, pairs, n, generator=self.generator)]
        belief = self.model.posterior(clips)
        # The policy goes where the reward may be high, so that is where it has to be right.
        # Asked of all clips alike, most answers were about two Hoppers lying on the floor.
        rank = (belief.mean + belief.variance.sqrt()).argsort().argsort() + 1.0
        weights = (rank / len(clips)) ** self.config.focus
        chosen = self.config.strategy.select(
            belief, pairs, n, weights=weights, generator=self.generator
        )
        return pairs[chosen]

    def _metrics(self, answers: FeedbackStore) -> dict[str, float]:
        put, answered, skipped = answers.counts()
        row: dict[str, float] = {
            "step": self.step,
            "comparisons": answered,
            "queries": put,
            "skipped": skipped,
            "episodes": len(self.env.episode_returns),
            "seconds": time.monotonic() - self._started,
        }
        if ended := self.env.episode_returns:
            row["task_return"], row["learned_return"] = np.mean(ended, 0).tolist()
            ended.clear()
        if (report := self.model.fit_report) is not None:
            row["held_out_accuracy"] = report.held_out_accuracy
            row["held_out_log_loss"] = report.held_out_log_loss
            row["train_log_loss"] = report.train_log_loss
            latest = self._latest_clips(200)
            belief = self.model.posterior(latest)
            seen = torch.stack([belief.mean, latest.returns])
            row["reward_correlation"] = float(torch.corrcoef(seen)[0, 1])
            row["mean_information"] = mean_information(belief)
        return {name: value for name, value in row.items() if np.isfinite(value)}

    def _write(self, folder: Path) -> None:
        self.agent.save(folder / "agent.zip")
        self.normalised.save(str(folder / "normalise.pkl"))
        self.history.save(folder / "history.npz")
        if isinstance(self.agent, OffPolicyAlgorithm):
            self.agent.save_replay_buffer(folder / "replay.pkl")
        if isinstance(reward := self.env.reward, LearnedReward):
            save(self.model, folder / "model.safetensors")
            write_text_atomically(folder / "reward.json", json.dumps([reward.scale, reward.shift]))

    def _read(self, folder: Path, number: int) -> None:
        self.rounds_done, self.seconds = number + 1, self.run.rows[-1]["seconds"]
        self.history.load(folder / "history.npz")
        self.normalised = VecNormalize.load(str(folder / "normalise.pkl"), self.env)
        self.agent = type(self.agent).load(folder / "agent.zip", self.normalised)
        if isinstance(self.agent, OffPolicyAlgorithm):
            self.agent.load_replay_buffer(folder / "replay.pkl")
        if (folder / "model.safetensors").exists():
            self.model = load(folder / "model.safetensors", type(self.model))
            scale, shift = json.loads((folder / "reward.json").read_text())
            self.env.reward = LearnedReward(self.model, self.config.pessimism, scale, shift)
