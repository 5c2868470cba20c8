"""The training loop: schedule, comparisons, rewards, evaluation, and resuming after a kill."""

import json
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from active import Constant, FeedbackStore, QueryStrategy, WhenUnsure
from experiments.benchmarks.page import outcome
from experiments.cli import main
from experiments.training.config import LearnConfig
from experiments.training.learn import Learner, learn, score_reward
from experiments.training.run_directory import RunDirectory
from rewardmodels import Clips, DeepEnsemble, SampledPosterior, load
from rewardmodels.wrappers import relabel

from ..studying import TINY, tiny

pytestmark = pytest.mark.usefixtures("_short_updates")

ROUNDS, COMPARISONS, STEPS = TINY["rounds"], TINY["comparisons"], TINY["steps"]
FLAGS = [
    *(
        f"--{name}={str(value).lower() if name == 'video' else value}"
        for name, value in TINY.items()
    ),
    *("--model.members=2", "--model.hidden=[8]"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("learn") / "run"
    assert main(["learn", *FLAGS, "--out", str(out)]) == 0
    return out


def metrics(out, *columns):
    """Columns of the run's metrics, as lists."""
    table = pd.read_csv(out / "metrics.csv")
    return [table[name].tolist() for name in columns]


def due(round):
    """A quarter at once, the rest in even parts, all by the last round."""
    share = 0.25 + 0.75 * round / (ROUNDS - 1)
    return math.floor(COMPARISONS * share + 0.5)


def test_comparisons_follow_the_schedule(finished):
    with FeedbackStore(finished / "answers.sqlite") as answers:
        by_round = [len(answers.queries(round)) for round in range(ROUNDS)]
        assert answers.counts() == (COMPARISONS, COMPARISONS, 0)
    assert np.cumsum(by_round).tolist() == [due(round) for round in range(ROUNDS)]
    comparisons, steps = metrics(finished, "comparisons", "step")
    assert comparisons == [due(round) for round in range(ROUNDS)]
    # PPO goes on to the end of a rollout of 64 steps in each of 32 copies.
    rollout = 64 * 32
    by_round = [(r + 1) * STEPS / ROUNDS for r in range(ROUNDS)]
    assert steps == [rollout * math.ceil(step / rollout) for step in by_round]


def test_comparisons_are_the_teachers_of_the_clips(finished):
    with FeedbackStore(finished / "answers.sqlite") as answers:
        for query in answers.queries():
            clips, pair = answers.clips_of([query.id])
            first, second = (math.fsum(clips.rewards[i].tolist()) for i in pair[0].tolist())
            assert query.preference == (1.0 if second > first else 0.0 if second < first else 0.5)
            assert query.teacher == "SyntheticTeacher"


def test_clips_are_consecutive_frames_of_the_task(finished):
    with FeedbackStore(finished / "answers.sqlite") as answers:
        clips = answers.comparisons().clips
    assert clips.mask.all()
    assert clips.length == TINY["clip_length"]
    cos, sin, speed = clips.observations[:, :-1].unbind(-1)  # led to by the action before
    push = clips.actions[:, 1:, 0].clamp(-2, 2)
    cost = torch.atan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * push**2  # Gymnasium's formula
    torch.testing.assert_close(clips.rewards[:, 1:], -cost, rtol=1e-3, atol=1e-3)


def test_the_policys_reward_is_the_models(finished):
    learner = Learner(tiny(finished), RunDirectory(finished))
    assert learner.rounds_done == ROUNDS
    learner.seed(ROUNDS, "train")
    model = load(finished / "model.safetensors")
    scale, shift, _ = json.loads((learner.run.checkpoints[-1] / "reward.json").read_text())
    assert scale > 0
    learner.env.reset()
    for _ in range(20):
        action = np.stack([learner.env.action_space.sample() for _ in range(32)])
        observations, rewards, _, _ = learner.env.step(action)
        posterior = model.frame_posterior(torch.from_numpy(observations), torch.from_numpy(action))
        expected = scale * posterior.mean.numpy() + shift
        np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)


def test_the_result_agrees_with_the_files(finished):
    result = json.loads((finished / "result.json").read_text())
    steps, seconds = metrics(finished, "step", "seconds")
    assert result["steps"] == steps[-1]
    assert result["comparisons"] == result["queries"] == COMPARISONS
    assert result["final_return"] == pytest.approx(np.mean(result["final_returns"]))
    assert len(result["final_returns"]) == 2
    assert all(-3260 < value < 0 for value in result["final_returns"])
    assert result["wall_seconds"] == pytest.approx(seconds[-1])
    assert result["steps_per_second"] == pytest.approx(result["steps"] / result["wall_seconds"])
    with np.load(finished / "frames.npz") as frames:
        naive = np.corrcoef(frames["predicted"], frames["true"])[0, 1]
    assert result["reward_correlation"] == pytest.approx(naive, abs=1e-4)
    assert (finished / "report.html").stat().st_size > 1000


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("arm", ["zero", "task"])
def test_baselines_get_zero_or_the_tasks_reward(arm, tmp_path):
    out = tmp_path / "run"
    result = learn(tiny(out, reward=arm, rounds=1, steps=8192), progress=False)
    assert result["comparisons"] == result["queries"] == 0
    own, replaced = np.array(metrics(out, "task_return", "learned_return"))
    assert (own < -300).all()
    np.testing.assert_allclose(replaced, 0 if arm == "zero" else own)
    assert not (out / "model.safetensors").exists()


def command(out):
    return ["learn", *(["--resume"] if RunDirectory(out).exists else FLAGS), "--out", str(out)]


def _start(out):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(main(command(out)))


def compared(out):
    """The comparisons of a run that no process works on, by query."""
    if not (out / "answers.sqlite").exists():
        return {}
    with FeedbackStore(out / "answers.sqlite") as answers:
        return {q.id: q.preference for q in answers.queries() if q.teacher is not None}


def check_identical(out, finished):
    """All but the time taken is the same, to the last bit."""
    assert outcome(out) == outcome(finished)
    one, other = (
        pd.read_csv(run / "metrics.csv").drop(columns="seconds") for run in (out, finished)
    )
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    for file in ("model.safetensors", "frames.npz"):
        if (finished / file).exists():
            assert (out / file).read_bytes() == (finished / file).read_bytes()


def check_kills(finished, out, start, finish, kills, last, seed):
    """Kill a run at random moments, resume it, and compare it with an uninterrupted one."""
    luck, before = random.Random(seed), {}
    for _ in range(kills):
        process = start()
        time.sleep(luck.uniform(0, last))
        os.kill(process.pid, signal.SIGKILL)
        getattr(process, "join", getattr(process, "wait", None))()
        now = compared(out)
        assert before.items() <= now.items(), "no comparison is lost or changed"
        before = now
        assert RunDirectory(out).exists or not list(out.glob("[!.c]*"))
    assert finish() == 0
    assert before.items() <= compared(out).items()
    check_identical(out, finished)
    with sqlite3.connect(out / "answers.sqlite") as db:
        rounds = db.execute("SELECT round, count(*) FROM queries GROUP BY round").fetchall()
        assert rounds == [(r, due(r) - (due(r - 1) if r else 0)) for r in range(ROUNDS)]
        answers, distinct = db.execute(
            "SELECT count(*), count(DISTINCT query) FROM answers"
        ).fetchone()
        assert answers == distinct == COMPARISONS
    db.close()
    assert (out / "report.html").exists()


def test_a_killed_run_resumes_without_loss(finished, tmp_path):
    out = tmp_path / "run"

    def start():
        # A fork has Lightning imported already, which would be most of each life.
        process = multiprocessing.get_context("fork").Process(target=_start, args=(out,))
        process.start()
        return process

    seconds = json.loads((finished / "result.json").read_text())["wall_seconds"]
    check_kills(
        finished, out, start, lambda: main(command(out)), kills=5, last=0.6 * seconds, seed=1
    )


@pytest.mark.slow
def test_a_killed_command_resumes_without_loss(tmp_path):
    out, unkilled = tmp_path / "run", tmp_path / "unkilled"
    program, null = Path(sys.executable).with_name("rewardmodels"), subprocess.DEVNULL

    def start():
        return subprocess.Popen([program, *command(out)], stdout=null, stderr=null)

    started = time.monotonic()
    subprocess.run([program, *command(unkilled)], stdout=null, stderr=null, check=True)
    last = 0.9 * (time.monotonic() - started)
    check_kills(unkilled, out, start, lambda: start().wait(), kills=8, last=last, seed=0)


def die_after(patch, cls, name):
    """Interrupt the process as a method returns."""
    method = getattr(cls, name)

    def interrupted(*given, **named):
        method(*given, **named)
        raise KeyboardInterrupt

    patch.setattr(cls, name, interrupted)


@pytest.mark.usefixtures("_no_report")
def test_a_run_interrupted_at_every_save_point_is_the_same(finished, tmp_path):
    put, answer = (FeedbackStore, "add_queries"), (FeedbackStore, "answer")
    save, resume = (Learner, "save_round"), False

    def config():
        own = {"activation": "leaky_relu", "weight_decay": 0.01}  # the command's, as `finished` has
        return tiny(tmp_path / "run", model=DeepEnsemble(members=2, hidden=(8,), **own))

    for method in (put, answer, save, put, answer, save, save):
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, *method)
            with pytest.raises(KeyboardInterrupt):
                learn(config(), resume=resume, progress=False)
        resume = True
    learn(config(), resume=True, progress=False)
    check_identical(tmp_path / "run", finished)


@pytest.mark.usefixtures("_no_report")
def test_seconds_add_up_across_interruptions(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_after(patch, Learner, "save_round")
        patch.setattr(time, "monotonic", lambda: 0.0)
        with pytest.raises(KeyboardInterrupt):
            learn(tiny(out, reward="zero"), progress=False)
    rows = json.loads((out / "checkpoints" / "0000" / "rows.json").read_text())
    rows[0]["seconds"] = 1000.0
    (out / "checkpoints" / "0000" / "rows.json").write_text(json.dumps(rows))
    result = learn(tiny(out, reward="zero"), resume=True, progress=False)
    assert 1000 < result["wall_seconds"] < 1100
    (seconds,) = metrics(out, "seconds")
    assert [value > 1000 for value in seconds] == [False, True, True]


@pytest.mark.slow
def test_an_off_policy_algorithm_learns_resumes_and_relabels(tmp_path):
    config = tiny(tmp_path / "run", algorithm="SAC", steps=3000, comparisons=12)
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, Learner, "save_round")
        with pytest.raises(KeyboardInterrupt):
            learn(config, progress=False)
    result = learn(config, resume=True, progress=False)
    assert result["steps"] == 3000
    assert result["comparisons"] == 12
    unkilled = tiny(tmp_path / "unkilled", algorithm="SAC", steps=3000, comparisons=12)
    learn(unkilled, progress=False)
    check_identical(config.out, unkilled.out)
    learner = Learner(config, RunDirectory(config.out))
    buffer = learner.agent.replay_buffer
    assert buffer.size() == 3000
    learner.seed(ROUNDS, "train")
    relabel(learner.agent, learner.env.reward)
    model = load(config.out / "model.safetensors")
    for row in (0, 1500, 2999):
        seen = model.frame_posterior(
            torch.from_numpy(buffer.next_observations[row]),
            torch.from_numpy(2 * buffer.actions[row]),  # SAC's are scaled to [-1, 1]
        )
        expected = learner.env.reward.scale * float(seen.mean) + learner.env.reward.shift
        assert buffer.rewards[row, 0] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.usefixtures("_no_report")
def test_warm_up_splits_the_initial_comparisons(tmp_path):
    settings = {"warm_up": 3, "rounds": 2, "steps": 6000, "comparisons": 24}
    out = tmp_path / "run"
    learn(tiny(out, schedule=Constant(initial=0.5), **settings), progress=False)
    # Half of 24 in three parts, then the rest by the last round of training.
    assert metrics(out, "comparisons", "step") == [[4, 8, 12, 24], [0, 0, 4096, 6144]]
    with FeedbackStore(out / "answers.sqlite") as answers:
        assert [len(answers.queries(round)) for round in range(4)] == [4, 4, 4, 12]


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("algorithm", ["PPO", "SAC"])
def test_a_clip_may_be_a_whole_episode(algorithm, tmp_path):
    # Episodes of 50 steps end within rollouts of 64, at another place in each round.
    settings = {"task": "Reacher", "algorithm": algorithm, "clip_length": 50}
    settings |= {"rounds": 2, "comparisons": 8, "steps": 4096 if algorithm == "PPO" else 100}
    config = tiny(tmp_path / "run", **settings)
    assert learn(config, progress=False)["comparisons"] == 8
    with FeedbackStore(config.out / "answers.sqlite") as answers:
        assert answers.comparisons().clips.observations.shape[1] == 50


@pytest.mark.usefixtures("_no_report")
def test_one_round_asks_for_the_whole_budget(tmp_path):
    settings = {"rounds": 1, "steps": 2048, "comparisons": 12, "schedule": Constant(initial=0.5)}
    result = learn(tiny(tmp_path / "run", **settings), progress=False)
    assert result["comparisons"] == 12


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize(("novelty", "active"), [("off", False), (0.5, True)])
def test_novelty_is_that_of_the_settings(novelty, active, tmp_path):
    learn(tiny(tmp_path / "run", rounds=1, steps=2048, novelty=novelty), progress=False)
    model = load(tmp_path / "run" / "model.safetensors")
    assert model.novelty.active == active


def test_a_schedule_may_depend_on_the_posterior_of_the_latest_clips(finished):
    learner = Learner(tiny(finished), RunDirectory(finished))
    learner.seed(0, "ask")
    first, tenth = COMPARISONS // 4, math.floor(COMPARISONS / 10 + 0.5)
    for level, more in ((0.0, tenth), (math.log(2), 0)):
        learner.schedule = WhenUnsure(level)
        assert learner._due(1, first) == first + more
        # In warm-up there is no policy to be unsure about.
        assert learner._due(0, 0) == first


def test_a_random_agent_is_reset_after_start_over_steps(tmp_path):
    config = tiny(tmp_path / "run", start_over=100)
    learner = Learner(config, RunDirectory(config.out))
    learner.seed(0, "ask")
    learner._act_at_random()
    first = learner.clip_buffer.sample(40, 10_000, learner.rng)
    # 40 frames inside stretches of 100, in each of 32 copies of `latest` steps.
    stretches, rest = divmod(learner.latest, 100)
    assert len(first) == 32 * (stretches * 61 + max(0, rest - 39))


class Remembers(QueryStrategy):
    """Keeps the weights that it is given."""

    def select(self, posterior, pairs, n, *, weights=None, generator=None):
        self.hope = posterior.mean + posterior.variance.sqrt()
        self.weights = weights
        return torch.arange(n)


@pytest.mark.parametrize("focus", [0.0, 4.0])
def test_clips_are_weighted_by_rank_in_optimistic_return(finished, focus):
    strategy = Remembers()
    learner = Learner(tiny(finished), RunDirectory(finished))
    learner.config.strategy, learner.config.focus = strategy, focus
    learner.seed(0, "ask")
    learner._choose(learner._latest_clips(20), 5)
    order = np.argsort(strategy.hope.numpy())
    np.testing.assert_allclose(strategy.weights[order], (np.arange(1, 21) / 20) ** focus, rtol=1e-6)


def test_defaults_differ_between_tasks():
    walker, cheetah = LearnConfig(task="Walker2d"), LearnConfig(task="HalfCheetah")
    assert (walker.warm_up, walker.start_over, walker.schedule.initial) == (4, 50, 0.5)
    assert (cheetah.warm_up, cheetah.start_over, cheetah.schedule.initial) == (1, 1000, 0.25)
    assert LearnConfig(task="Walker2d", warm_up=1).warm_up == 1
    flips = LearnConfig(task="backflip", rounds=5)
    assert (flips.comparisons, flips.steps, flips.rounds) == (900, 1_000_000, 5)
    assert (walker.comparisons, walker.steps, walker.rounds) == (400, 300_000, 10)


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("algorithm", ["PPO", "DQN"])
def test_discrete_actions_stay_discrete(algorithm, tmp_path):
    steps = {"PPO": 2048, "DQN": 300}[algorithm]
    config = tiny(tmp_path, task="MountainCar-v0", algorithm=algorithm, steps=steps, rounds=1)
    learn(config, progress=False)
    model = load(tmp_path / "model.safetensors")
    assert model.spec.discrete_actions == 3
    with FeedbackStore(tmp_path / "answers.sqlite") as answers:
        actions = answers.comparisons().clips.actions
    assert not actions.is_floating_point()
    assert set(actions.unique().tolist()) == {0, 1, 2}


class FirstNumber:
    """A model whose reward is the first number of an observation, times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def frame_posterior(self, observations, actions):
        return self.around(observations[:, 0])

    def posterior(self, clips):
        return self.around(clips.observations[:, :, 0].sum(1))

    def around(self, reward):
        return SampledPosterior(self.factor * torch.stack([reward, reward + 2]))


def episodes(reward, noise):
    draw = torch.Generator().manual_seed(0)
    observations = torch.randn(4, 50, 3, generator=draw)
    rewards = reward * observations[:, :, 0] + noise * torch.randn(4, 50, generator=draw)
    return Clips(observations, torch.zeros(4, 50, 1), rewards=rewards)


def test_scores_and_frames_of_the_reward_agree_with_a_naive_loop(tmp_path):
    clips = episodes(reward=1, noise=2)
    scores = score_reward(FirstNumber(1), clips, tmp_path / "frames.npz", 10, frames=100)
    with np.load(tmp_path / "frames.npz") as file:
        predicted, std, true = file["predicted"], file["std"], file["true"]
    rows = [round(k) for k in np.floor(np.linspace(0, 199, 100))]
    naive = [float(clips.observations[r // 50, r % 50, 0]) + 1 for r in rows]
    np.testing.assert_allclose(predicted, naive, rtol=1e-5)
    np.testing.assert_array_equal(true, [float(clips.rewards[r // 50, r % 50]) for r in rows])
    spread = SampledPosterior(torch.tensor([[0.0], [2.0]])).variance.sqrt()
    np.testing.assert_allclose(std, float(spread), rtol=1e-5)
    correlation = np.corrcoef(predicted, true)[0, 1]
    assert scores["reward_correlation"] == pytest.approx(correlation, abs=1e-5)
    assert scores["epic_distance"] == pytest.approx(np.sqrt((1 - correlation) / 2), abs=1e-5)
    assert 0 < scores["calibration_error"] < 1
    assert 0 < scores["aurc"] < 1


def test_scores_of_a_perfect_and_of_a_constant_reward(tmp_path):
    clips, file = episodes(reward=3, noise=0), tmp_path / "frames.npz"
    assert score_reward(FirstNumber(100), clips, file, 10) == pytest.approx(
        {"reward_correlation": 1, "epic_distance": 0, "calibration_error": 0, "aurc": 0}, abs=0.02
    )
    constant = score_reward(FirstNumber(0), clips, file, 10)
    assert constant["epic_distance"] is constant["reward_correlation"] is None
    assert constant["aurc"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("algorithm", ["PPO", "SAC"])
@pytest.mark.parametrize("clip_length", [8, 9, 12, 16])
def test_however_episodes_are_cut_there_are_pairs_for_all_comparisons(
    algorithm, clip_length, tmp_path
):
    short = {"horizon": 16, "steps": 8, "rounds": 1, "comparisons": 10, "candidates": 10}
    config = tiny(tmp_path / "run", algorithm=algorithm, clip_length=clip_length, **short)
    learner = Learner(config, RunDirectory(config.out))
    learner.seed(0, "ask")
    learner._act_at_random()
    learner.env.reset()  # as training does
    for _ in range(40):
        found = len(learner._latest_clips(10))
        assert found * (found - 1) // 2 >= 10
        actions = [learner.env.action_space.sample() for _ in range(learner.env.num_envs)]
        learner.env.step(np.stack(actions))
