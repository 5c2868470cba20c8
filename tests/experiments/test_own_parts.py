"""Environments and classes of the user's own, named by import path, in every command."""

import shutil
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

import ood
from experiments.cli import main
from experiments.envs.rendering import RenderingUnavailable, check_renderable
from experiments.envs.tasks import Task, find_task, make_env
from experiments.labelling.videos import best_clip
from experiments.training.run_directory import RunDirectory
from ood.sequential import STATISTICS
from rewardmodels.errors import InvalidInput

pytestmark = pytest.mark.usefixtures("_short_updates")

PARTS = """
import gymnasium
import numpy as np
import torch

from active import Constant, QueryStrategy, SyntheticTeacher
from ood import EWMA, OODDetector
from rewardmodels import DeepEnsemble
from rewardmodels.networks import MLP


class Point(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    ends_after = breaks = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.x = 0, self.np_random.uniform(-1, 1, 2)
        return self.x, {}

    def step(self, action):
        if self.steps == self.breaks:
            raise RuntimeError("no step after the end")
        self.steps, self.x = self.steps + 1, self.x + 0.1 * action
        over = self.steps == self.ends_after
        return self.x, -abs(self.x[0]), self.steps == 2, over, {}


class Tired(Point):
    ends_after = 5


class Brittle(Point):
    breaks = 3


class OldStyle(Point):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class Drawn(Point):
    metadata = {"render_modes": ["rgb_array"]}
    bar = True

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    state = property(lambda self: self.x, lambda self, x: setattr(self, "x", x))

    def render(self):
        picture = np.zeros((20, 20, 3), np.uint8)
        picture[:, : int(10 + 5 * self.x[0]) if self.bar else self.steps + 5] = 255
        return picture


class Clock(Drawn):
    bar = False


for cls in (Point, Tired, Brittle, OldStyle, Drawn, Clock):
    gymnasium.register(f"{cls.__name__}-v7", cls, max_episode_steps=40)
gymnasium.register("Endless-v7", Point)


class Model(DeepEnsemble):
    pass


def network(spec):
    return MLP(spec)


class Strategy(QueryStrategy):
    def select(self, posterior, pairs, n, *, weights=None, generator=None):
        return torch.arange(n)


class Schedule(Constant):
    pass


class Teacher(SyntheticTeacher):
    pass


class Detector(OODDetector):
    learned = ("spread",)

    def fit_frames(self, frames):
        self.spread = frames.std(0) + 1e-6

    def score_frames(self, frames):
        return np.abs((frames - self.mean) / self.spread).max(1)


class Statistic(EWMA):
    pass


class Fixed(Detector):
    def __init__(self, size):
        self.size = size


class Forgetful(Detector):
    def __init__(self, size=3):
        pass


class KNN(Detector):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a module of the user's."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_parts.py").write_text(PARTS)
    (folder / "broken_parts.py").write_text("def f(:\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(ood.monitor, "DETECTORS", ood.DETECTORS)
        patch.setitem(ood.DETECTORS, "Detector", None)
        patch.setitem(STATISTICS, "Statistic", None)
        del ood.DETECTORS["Detector"], STATISTICS["Statistic"]
        yield folder
    sys.modules.pop("own_parts", None)


@pytest.fixture(scope="module")
def run(folder):
    """A run in which everything that can be is the user's own."""
    words = ["learn", "--task", "own_parts:Endless-v7", "--horizon", "30", "--out", "run"]
    for part in ("model", "strategy", "schedule", "teacher"):
        words += [f"--{part}", f"own_parts.{part.title()}"]
    words += ["--steps=2048", "--rounds=2", "--comparisons=8", "--epochs=2", "--evaluate=2"]
    assert main([*words, "--model.members=2", "--model.hidden=[8]"]) == 0
    return folder / "run"


def refused(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line.removeprefix("rewardmodels: error: ")


def test_a_run_is_learned_reported_and_exported(run):
    result = RunDirectory(run).result
    assert result["comparisons"] == 8
    assert result["task"] == "own_parts:Endless-v7"
    assert "state" in result["video_note"]
    page = (run / "report.html").read_text("utf-8")
    assert "own_parts:Endless-v7" in page
    assert main(["export", str(run / "answers.sqlite"), str(run / "answers")]) == 0
    assert best_clip(run, 15) is None  # its model is found, and its clips have no states


def test_a_guard_of_ones_own_is_made_and_used_again(run, folder, capsys):
    own = shutil.copytree(run, folder / "guarded")
    words = ["guard", str(own), "--calibration=26", "--familiar=2", "--episodes=1", "--trust"]
    named = ["--detector=own_parts.Detector", "--statistic=own_parts.Statistic"]
    assert main([*words, *named]) == 0
    assert "Recording 28" in capsys.readouterr().out
    assert main([*words, *named]) == 0
    again = capsys.readouterr().out
    assert "Recording" not in again
    assert "Detector with Statistic" in again


@pytest.mark.parametrize(
    ("detector", "reason"),
    [
        ("own_parts.Fixed", "size"),
        ("own_parts.Forgetful", "size"),
        ("own_parts.KNN", "name"),
        ("own_parts.Nope", "Nope"),
        ("own_parts.Model", "OODDetector"),
        ("broken_parts.Detector", "SyntaxError"),
        ("no_parts.Detector", "no_parts"),
        ("ood.OODDetector", "abstract"),
        ("Joint", "detectors"),
    ],
)
def test_a_detector_that_cannot_be_used_is_refused_before_any_work(run, capsys, detector, reason):
    line = refused(capsys, "guard", run, "--detector", detector, "--trust")
    assert line.startswith("detector: expected ")
    assert reason in line


def test_people_are_not_asked_about_what_cannot_be_drawn(run, tmp_path, capsys):
    own, new = ("--task", "own_parts:Point-v7"), tmp_path / "new"
    assert "numeric state" in refused(capsys, "learn", *own, "--teacher", "human", "--out", new)
    assert not new.exists()
    assert "trust" in refused(capsys, "label", run)
    assert "state" in refused(capsys, "label", run, "--trust")


def test_an_environment_draws_its_states_or_is_refused(folder):
    check_renderable(find_task("own_parts:Drawn-v7"))
    for name, reason in (("Clock", "follow"), ("Point", "numeric state")):
        with pytest.raises(RenderingUnavailable, match=reason):
            check_renderable(find_task(f"own_parts:{name}-v7"))


@pytest.mark.parametrize(
    ("task", "argument"),
    [
        ("own_parts:Nope-v7", "task"),
        ("no_parts:Point-v7", "task"),
        ("broken_parts:Point-v7", "task"),
        ("own_parts:OldStyle-v7", "task"),
        ("own_parts:Endless-v7", "horizon"),
        ("own_parts:Tired-v7", "horizon"),
        ("own_parts:Brittle-v7", "task"),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_line(folder, capsys, task, argument):
    line = refused(capsys, "learn", "--task", task, "--steps=1", "--out=none")
    assert line.startswith(f"{argument}: expected ")


@pytest.mark.parametrize("name", ["FrozenLake-v1", "Blackjack-v1"])
def test_observations_of_choices_are_one_hot(name):
    with make_env(find_task(name, 10)) as env:
        observation, _ = env.reset(seed=0)
        assert observation.dtype == np.float32
        assert env.observation_space.contains(observation)
        assert set(np.unique(observation)) == {0, 1}


def test_observations_that_are_no_numbers_are_refused(monkeypatch):
    class Unknown(gymnasium.Env):
        observation_space = gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(2))
        action_space = gymnasium.spaces.Discrete(2)

    monkeypatch.setitem(gymnasium.registry, "Unknown-v7", EnvSpec("Unknown-v7", Unknown))
    with pytest.raises(InvalidInput, match="Sequence"):
        make_env(Task("Unknown", "Unknown-v7", 5))
