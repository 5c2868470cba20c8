"""Deep reinforcement learning from human preferences (Christiano et al. 2017, arXiv 1706.03741).

The agent never sees the task's reward. Three processes alternate (§2.2):

1. the policy interacts with the environment, and is trained by ordinary reinforcement learning
   to maximise the sum of predicted rewards;
2. pairs of clips are chosen from what it did, and a teacher says which of each pair is better;
3. the reward model is fitted to all comparisons collected so far, and to the marks and ratings
   that people give beside them.

The paper runs them asynchronously; here they take turns, in `rounds`, so that a run can be
repeated, and goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from io import BytesIO
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
    HumanTeacher,
    Request,
    Schedule,
    Uniform,
    all_pairs,
    mean_information,
)
from experiments.envs.rendering import (
    RenderingUnavailable,
    check_renderable,
    render_states,
    write_video,
)
from experiments.envs.rollout import play_agent
from experiments.envs.tasks import TASKS, Task, find_task
from experiments.envs.vector import make_vec_env
from experiments.training.agents import (
    AGENT_FILE,
    PPO_ENVS,
    load_replay,
    make_agent,
    progress_bar,
    resume_training,
    save_replay,
    train_until,
    training_state,
)
from experiments.training.clip_buffer import ClipBuffer
from experiments.training.config import LearnConfig
from experiments.training.report import write_report
from experiments.training.rewards import RewardWrapper, baseline_reward
from experiments.training.run_directory import RunDirectory, read_reward, versions
from rewardmodels import (
    Clips,
    InvalidInput,
    ReturnPosterior,
    RewardModel,
    SampledPosterior,
    load,
    save,
)
from rewardmodels.calibration import expected_calibration_error, risk_coverage
from rewardmodels.clips import cut
from rewardmodels.epic import pearson_distance
from rewardmodels.fitting import MIN_COMPARISONS
from rewardmodels.saving import write_text_atomically
from rewardmodels.wrappers import LearnedReward, relabel


def learn(config: LearnConfig, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Learn a task from comparisons, and write everything about it into a run directory.

    Args:
        config: The settings.
        resume: Go on with the run in `config.out`.
        progress: Show a progress bar on standard error.

    Returns:
        Content of the run's `result.json`.

    Raises:
        InvalidInput: The directory holds a run already (or none to resume, or another), another
            process works on it, or its answers aren't those that its checkpoint was made with.
        UnreadableFile: A file of the run is damaged, or of an earlier version.
        RenderingUnavailable: People are to compare clips of a user's task that can't be drawn.
    """
    run = RunDirectory(config.out)
    run.check_writable(config, resume=resume)
    if run.result is not None:
        if not (config.out / "report.html").exists():
            write_report(config.out)
        return run.result
    with run.locked():
        run.check_writable(config, resume=resume)  # another process may just have started one
        return _learn(config, run, progress)


def _learn(config: LearnConfig, run: RunDirectory, progress: bool) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    learner = Learner(config, run)
    learner.check_answers(config.out / "answers.sqlite")
    run.start(config)  # only now, so that settings that raise leave no directory behind
    with (
        FeedbackStore(config.out / "answers.sqlite") as store,
        progress_bar(learner.steps, learner.step, show=progress) as bar,
    ):
        for round in range(learner.rounds_done, learner.rounds):
            if config.reward == "learned":
                learner.seed(round, "ask")
                learner.ask(round, store, bar.set_postfix_str)
                learner.seed(round, "fit")
                learner.fit_reward(store)
            learner.seed(round, "train")
            train_until(learner.agent, learner.steps_after(round), bar)
            learner.save_round(round, store, bar)
        result = learner.finish(store)
    write_report(config.out)
    return result


class Learner:
    """State of a run, and the three steps of each round.

    Every purpose of every round has generators of its own, seeded by `(seed, round, purpose)`, so
    that its draws don't depend on what was done before a restart.

    With `warm_up=3`, `rounds=10`, 400 comparisons and `Constant(initial=0.25)` there are 12 rounds,
    3 - 1 + 10. Each asks and fits:

    - rounds 0 and 1 ask about an agent that acts at random, 67 comparisons in all; no training;
    - round 2 asks up to 100, a quarter, of the same agent; then the policy is first trained, for a
      tenth of the steps;
    - rounds 3 to 11 ask about the policy, up to 133 … 400, and train it for a tenth each.
    """

    def __init__(self, config: LearnConfig, run: RunDirectory) -> None:
        self.config, self.run = config, run
        self.task = find_task(config.task, config.horizon)
        self.model = config.model
        self.rounds_done, self.seconds = 0, 0.0
        self.answers = (0, "")  # at the checkpoint: their number and digest
        settings: Any = config  # LearnConfig.__post_init__ has filled in what was None
        self.comparisons: int = settings.comparisons
        self.steps: int = settings.steps
        self.policy_rounds: int = settings.rounds
        self.schedule: Schedule = settings.schedule
        # The baselines need no comparisons, and so no warm-up.
        self.warm_up: int = settings.warm_up if config.reward == "learned" else 1
        self.rounds = self.warm_up - 1 + self.policy_rounds

        copies = PPO_ENVS if config.algorithm in ("PPO", "A2C") else 1
        self.clip_length = min(config.clip_length, self.task.horizon)
        self.start_over = min(max(settings.start_over, 2 * self.clip_length), self.task.horizon)
        # Steps of each copy that show the current policy: whole episodes, since copies start
        # together, and a Hopper that fell is a poor sample of one that stood.
        self.latest = max(self.steps // (self.policy_rounds * copies), self._enough_steps(copies))
        self.clip_buffer = ClipBuffer(self.latest, copies)
        venv = make_vec_env(self.task, copies, config.seed)
        reward = baseline_reward(config.reward, config.seed)
        self.env = RewardWrapper(venv, self.clip_buffer, reward)
        if isinstance(self.env.action_space, spaces.Discrete):
            choices = int(self.env.action_space.n)
            self.model.discrete_actions = self.model.discrete_actions or choices
        self.normalised = VecNormalize(self.env)
        self.agent = make_agent(config.algorithm, self.normalised, self.task, config.seed)
        if config.reward == "learned":
            config.teacher.check(self.env.observation_space.shape, self.env.action_space.shape)
            if isinstance(config.teacher, HumanTeacher) and config.task not in TASKS:
                check_renderable(self.task)  # `label` would refuse it once the run waits
        run.restore(self._read)
        self._started = time.monotonic() - self.seconds

    @property
    def step(self) -> int:
        """Environment steps that the policy has been trained for."""
        return int(self.agent.num_timesteps)

    def seed(self, round: int, purpose: str, number: int = 0) -> None:
        """Seed all generators for a purpose within a round, or for a number of the same purpose."""
        entropy = [self.config.seed, round, number, *purpose.encode()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        set_random_seed(seed)  # Stable-Baselines3 draws from the global generators
        self.agent.action_space.seed(seed)
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        if self.config.reward != "learned":
            self.env.reward = baseline_reward(self.config.reward, seed)

    def check_answers(self, file: Path) -> None:
        """Raise InvalidInput unless a store begins with the answers that the checkpoint knows."""
        number, digest = self.answers
        if not number:
            return
        found = 0
        if file.exists():
            with FeedbackStore(file) as store:
                found, same = store.digest(number)
            if same == digest:
                return
        raise InvalidInput(
            f"{file}: expected the {number} answers that {self.run.checkpoints[-1]} was made with, "
            f"got {'others' if found == number else f'{found} of them'}. Put the run's own file "
            "back, or start a new run in another --out."
        )

    def ask(self, round: int, store: FeedbackStore, report: Callable[[str], Any] = str) -> None:
        """Let the teacher compare clips of the agent, as many as are due in a round.

        `report` shows a line while people are waited for; the default shows nothing.
        """
        if round == 0:
            self._act_at_random()
        self.config.teacher.collect(
            Request(
                store,
                round,
                due=self._due(round, store.counts().answered),
                propose=lambda n: self._propose(n, round, store),
                first=round < self.warm_up,
                generator=self.generator,
                report=report,
            )
        )

    def _propose(self, n: int, round: int, store: FeedbackStore) -> None:
        """Put n queries about the agent's latest clips, chosen by the strategy."""
        self.seed(round, "propose", store.counts().put)
        clips = self._latest_clips(self.config.candidates)
        pairs = self._choose(clips, min(n, len(clips) * (len(clips) - 1) // 2))
        store.add_queries(clips, pairs, round=round)
        self.seed(round, "ask")  # for teachers that draw from the global generators

    def fit_reward(self, store: FeedbackStore) -> None:
        """Fit the model to all feedback so far, and replace the reward by the new one."""
        feedback = store.feedback()
        if feedback.comparisons is None or len(feedback.comparisons) < MIN_COMPARISONS:
            return  # the teacher has skipped nearly everything so far
        self.env.refit(
            self.model, clips=self._latest_clips(100), pessimism=self.config.pessimism,
            **feedback._asdict(), epochs=self.config.epochs, seed=self.config.seed,
            novelty=self.config.novelty,
        )  # fmt: skip
        if isinstance(self.agent, OffPolicyAlgorithm):
            assert self.env.reward is not None
            relabel(self.agent, self.env.reward)

    def save_round(self, round: int, store: FeedbackStore, bar: tqdm) -> None:
        """Log the round's metrics, and write a checkpoint from which the next round starts."""
        self.seed(round, "measure")
        row = self._metrics(store)
        self.run.log(row)
        self.answers = store.digest()
        self.run.checkpoint(round, self._write)
        known = "task_return" in row
        returned = f"true return {row['task_return']:.0f}" if known else "no episode ended"
        place = f"round {round + 1}/{self.rounds}"
        bar.set_postfix_str(f"{place}, {row['comparisons']:.0f} comparisons, {returned}")

    def finish(self, store: FeedbackStore) -> dict[str, Any]:
        """Evaluate the final policy, and write the result, a video and the model."""
        self.seed(self.rounds, "evaluate")
        config, out = self.config, self.config.out
        last = {name: value for row in self.run.rows for name, value in row.items()}
        clips = play_agent(
            self.agent, self.normalised, self.task, episodes=config.evaluate, seed=config.seed + 1
        )
        put, answered, skipped = store.counts()
        result = {
            **{name: getattr(config, name) for name in ("task", "reward", "algorithm", "seed")},
            "steps": self.step,
            "comparisons": answered,
            "queries": put,
            "skipped": skipped,
            "final_return": float(clips.returns.mean()),
            "final_returns": clips.returns.tolist(),
            **count_events(self.task, clips),
            **{name: last.get(name) for name in ("held_out_accuracy", "held_out_log_loss")},
            **dict.fromkeys(REWARD_SCORES),
            "wall_seconds": last["seconds"],
            "steps_per_second": self.step / last["seconds"],
            "versions": versions(),
        }
        if self.model.fitted:
            result["model_checksum"] = save(self.model, out / "model.safetensors")
            result |= score_reward(self.model, clips, out / "frames.npz", self.clip_length)
        if config.video:
            result["video_note"] = make_video(self.task, clips, out / "video.mp4")
        self.run.write_result(result)
        return result

    def steps_after(self, round: int) -> int:
        """Environment steps that the policy is trained for by the end of a round."""
        return max(0, round - self.warm_up + 2) * self.steps // self.policy_rounds

    def _due(self, round: int, answered: int) -> int:
        """Total number of comparisons wanted before a round's training."""
        a_round, trained = self.steps // self.policy_rounds, max(0, round - self.warm_up + 1)
        total_steps = max(1, (self.policy_rounds - 1) * a_round)
        # In warm-up there is no policy yet to be uncertain about.
        fitted = self.model.fitted and round >= self.warm_up
        due = self.schedule.comparisons_by(
            total_steps if trained == self.policy_rounds - 1 else trained * a_round,
            total_steps=total_steps,
            budget=self.comparisons,
            answered=answered,
            posterior=self._posterior if fitted else None,
        )
        return due if round >= self.warm_up else -(-due * (round + 1) // self.warm_up)

    def _act_at_random(self) -> None:
        self.env.action_space.seed(self.config.seed)
        for step in range(self.latest):
            if step % self.start_over == 0:
                self.env.reset()
            actions = [self.env.action_space.sample() for _ in range(self.env.num_envs)]
            self.env.step(np.stack(actions))
        self.env.episode_returns.clear()

    def _enough_steps(self, copies: int) -> int:
        """Steps of each copy that have clips for as many pairs as comparisons, however cut."""
        horizon, clips = self.task.horizon, -(-(math.isqrt(2 * self.comparisons) + 2) // copies)
        if horizon - 2 * self.clip_length + 2 >= clips:  # both parts of an episode cut in two
            return horizon
        return horizon * (1 - -clips // (horizon - self.clip_length + 1))  # and whole ones

    def _latest_clips(self, n: int) -> Clips:
        return self.clip_buffer.sample(self.clip_length, n, self.rng)

    def _posterior(self) -> ReturnPosterior:
        return self.model.posterior(self._latest_clips(self.config.candidates))

    def _choose(self, clips: Clips, n: int) -> torch.Tensor:
        """Choose `(n, 2)` pairs by the strategy, or uniformly before the first fit."""
        pairs = all_pairs(len(clips))
        if not self.model.fitted:
            unknown = SampledPosterior(torch.zeros(1, len(clips)))
            return pairs[Uniform().select(unknown, pairs, n, generator=self.generator)]
        posterior = self.model.posterior(clips)
        # The policy goes where the reward may be high, so that is where it has to be right.
        # With equal weights, most comparisons were of two Hoppers lying on the floor.
        rank = (posterior.mean + posterior.variance.sqrt()).argsort().argsort() + 1.0
        weights = (rank / len(clips)) ** self.config.focus
        chosen = self.config.strategy.select(
            posterior, pairs, n, weights=weights, generator=self.generator
        )
        return pairs[chosen]

    def _metrics(self, store: FeedbackStore) -> dict[str, float]:
        put, answered, skipped = store.counts()
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
            for name in ("held_out_accuracy", "held_out_log_loss", "train_log_loss"):
                row[name] = getattr(report, name)
            latest = self._latest_clips(200)
            posterior = self.model.posterior(latest)
            both = torch.stack([posterior.mean, latest.returns])
            row["reward_correlation"] = float(torch.corrcoef(both)[0, 1])
            row["mean_information"] = mean_information(posterior)
        return {name: value for name, value in row.items() if np.isfinite(value)}

    def _write(self, folder: Path) -> None:
        agent = training_state(self.agent, self.normalised)
        agent_file = BytesIO()  # so that a full disk is an OSError
        torch.save({**agent, "env": self.env.progress()}, agent_file)
        (folder / AGENT_FILE).write_bytes(agent_file.getbuffer())
        (folder / "answers.json").write_text(json.dumps(self.answers))
        self.clip_buffer.save(folder / "clip_buffer.npz")
        if isinstance(self.agent, OffPolicyAlgorithm):
            save_replay(self.agent, folder / "replay.npz")
        if isinstance(reward := self.env.reward, LearnedReward):
            checksum = save(self.model, folder / "model.safetensors")
            kept = json.dumps([reward.scale, reward.shift, checksum])
            write_text_atomically(folder / "reward.json", kept)

    def _read(self, folder: Path, number: int) -> None:
        self.rounds_done, self.seconds = number + 1, self.run.rows[-1]["seconds"]
        self.answers = json.loads((folder / "answers.json").read_text())
        self.clip_buffer = self.env.clip_buffer = ClipBuffer.load(folder / "clip_buffer.npz")
        state = torch.load(folder / AGENT_FILE, weights_only=True)
        resume_training(self.agent, self.normalised, state)
        self.env.resume(state["env"])
        if isinstance(self.agent, OffPolicyAlgorithm):
            load_replay(self.agent, folder / "replay.npz")
        if (folder / "reward.json").exists():
            file, own = folder / "model.safetensors", self.model.make_network
            scale, shift, checksum = read_reward(folder)
            self.model = load(file, type(self.model), network=own, checksum=checksum)
            self.env.reward = LearnedReward(self.model, self.config.pessimism, scale, shift)


REWARD_SCORES = ("reward_correlation", "epic_distance", "calibration_error", "aurc")
_VIDEO_FRAMES, _FRAMES_PER_SECOND = 200, 25


def score_reward(
    model: RewardModel, clips: Clips, file: Path, clip_length: int, *, frames: int = 4096
) -> dict[str, float | None]:
    r"""Compare the learned with the true reward on what the final policy does.

    Args:
        model: Fitted.
        clips: Whole episodes with the task's reward.
        file: Gets `predicted`, `std` and `true` reward of frames spread over the episodes.
        clip_length: Frames per clip, for the preferences.
        frames: To spread.

    Returns:
        `REWARD_SCORES`: over frames the Pearson correlation and the EPIC distance (of rewards that
        depend on the frame alone); over all pairs of 200 random clips the expected calibration
        error of the predicted preference, and the area under its risk-coverage curve, for the
        preference of the higher true return. None where a score is undefined.
    """
    assert clips.rewards is not None
    rows = torch.linspace(0, clips.mask.numel() - 1, frames).long()
    observations, actions = (x.flatten(0, 1)[rows] for x in (clips.observations, clips.actions))
    posterior, true = model.frame_posterior(observations, actions), clips.rewards.flatten()[rows]
    np.savez(file, predicted=posterior.mean, std=posterior.variance.sqrt(), true=true)
    distance = pearson_distance(posterior.mean, true)

    some = cut(clips, clip_length, 200, generator=torch.Generator().manual_seed(0))
    pairs = all_pairs(len(some))
    predicted = model.posterior(some).preference(pairs)
    preference = 0.5 + 0.5 * (some.returns[pairs[:, 1]] - some.returns[pairs[:, 0]]).sign()
    decided = bool((preference != 0.5).any())
    uncertainty = -(predicted - 0.5).abs()
    scores = {
        "reward_correlation": 1 - 2 * distance**2,
        "epic_distance": distance,
        "calibration_error": expected_calibration_error(predicted, preference),
        "aurc": risk_coverage(uncertainty, predicted, preference).aurc if decided else math.nan,
    }
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def count_events(task: Task, clips: Clips) -> dict[str, Any]:
    """Count a task's events, such as backflips: in each episode, and per 1,000 steps on average.

    Example:
        >>> clips = Clips(torch.zeros(2, 500, 11), torch.zeros(2, 500, 3))
        >>> count_events(find_task("backflip"), clips)
        {'backflips': [0, 0], 'backflips_per_1000_steps': 0.0}
    """
    found: dict[str, Any] = {}
    for name, count in task.counts.items():
        found[name] = [count(episode) for episode in clips.observations.numpy()]
        found[f"{name}_per_1000_steps"] = 1000 * sum(found[name]) / clips.mask.numel()
    return found


def make_video(task: Task, clips: Clips, file: Path) -> str | None:
    """Write a video of the first clip, or return the reason why there is none."""
    if clips.states is None:
        return f"{task.name} doesn't show the simulator's state, from which a video is drawn."
    try:
        pictures = render_states(task, clips.states[0, :_VIDEO_FRAMES].numpy())
    except RenderingUnavailable as error:
        return str(error)
    write_video(pictures, file, _FRAMES_PER_SECOND)
    return None
