"""A run's directory is whole at every moment, and its settings make the same run again."""

import csv
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from active import BALD, Hyperbolic, ScoredStrategy, SyntheticTeacher, preference_variance
from active.rules import Power
from experiments.registry import describe, describe_settings
from experiments.training.config import LearnConfig
from experiments.training.run_directory import RunDirectory
from rewardmodels import DeepEnsemble, InvalidInput, UnreadableFile
from rewardmodels.networks import MLP


@dataclass
class Settings:
    steps: int = 10
    hidden: tuple[int, ...] = (8, 8)
    strategy: BALD = field(default_factory=BALD)
    out: Path = Path("somewhere")


def started(path, config=None):
    run = RunDirectory(path)
    run.check_writable(config or Settings(), resume=False)
    run.start(config or Settings())
    return run


def rows(path):
    with open(path / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def row(i, **more):
    return {"step": 100.0 * i, "comparisons": float(i), "seconds": 1.5 * i, **more}


def write_number(number):
    return lambda folder: (folder / "number").write_text(str(number))


def test_what_was_logged_is_in_both_places(tmp_path):
    run = started(tmp_path / "run")
    for i in (1, 2, 3):
        run.log(row(i, task_return=-7.0 * i))
    assert rows(run.path) == [row(i, task_return=-7.0 * i) for i in (1, 2, 3)]
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("task_return")] == [
        (100, -7),
        (200, -14),
        (300, -21),
    ]


def test_a_round_that_is_repeated_stands_there_once(tmp_path):
    run = started(tmp_path / "run")
    for i in (1, 2):
        run.log(row(i))
        run.checkpoint(i, write_number(i))
    run.log(row(3, task_return=1.0))  # and here it was killed
    again, seen = RunDirectory(run.path), []
    again.restore(lambda folder, number: seen.append((number, (folder / "number").read_text())))
    assert seen == [(2, "2")]
    for i in (3, 4):
        again.log(row(i, task_return=2.0))
    expected = [row(1), row(2), row(3, task_return=2.0), row(4, task_return=2.0)]
    assert rows(run.path) == again.rows == expected
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("comparisons")] == [100, 200, 300, 400]
    assert [(e.step, e.value) for e in board.Scalars("task_return")] == [(300, 2), (400, 2)]


def test_the_checkpoint_before_is_kept_as_a_spare(tmp_path):
    run = started(tmp_path / "run")
    for i in range(5):
        run.log(row(i))
        run.checkpoint(i, write_number(i))
    folders = sorted((run.path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["0003", "0004"]
    (folders[1] / "rows.json").write_text('[{"step": 1')
    with pytest.raises(UnreadableFile, match=r"0004: expected a whole checkpoint.*Delete this"):
        RunDirectory(run.path).restore(lambda *_: None)
    for file in folders[1].iterdir():
        file.unlink()
    folders[1].rmdir()
    again, seen = RunDirectory(run.path), []
    again.restore(lambda folder, number: seen.append(number))
    assert seen == [3]
    assert again.rows == [row(i) for i in range(4)]
    again.checkpoint(4, write_number(4))


def _checkpoint_for_ever(path):
    run = RunDirectory(path)
    run.check_writable(Settings(), resume=(path / "config.yaml").exists())
    run.start(Settings())
    first = []
    run.restore(lambda folder, number: first.append(number + 1))
    for i in range(first[0] if first else 0, 10**6):
        run.rows = [row(k) for k in range(i + 1)]

        def write(folder, i=i):
            for name in "ab":
                (folder / name).write_text(str(i) * 5000)

        run.checkpoint(i, write)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path, last, luck = tmp_path / "run", -1, random.Random(0)
    for _ in range(8):
        child = multiprocessing.get_context("fork").Process(
            target=_checkpoint_for_ever, args=(path,)
        )
        child.start()
        time.sleep(0.05 + 0.1 * luck.random())
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found = []

        def read(folder, number, found=found):
            for name in "ab":
                assert (folder / name).read_text() == str(number) * 5000
            found.append(number)

        run = RunDirectory(path)
        run.restore(read)
        if found:
            assert len(run.rows) == found[0] + 1
            assert found[0] >= last
            last = found[0]
    assert last > 0


def test_what_stands_there_is_never_written_over(tmp_path):
    started(tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"already holds a run .*--resume"):
        RunDirectory(tmp_path / "run").check_writable(Settings(), resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "answers.sqlite").touch()
    with pytest.raises(InvalidInput, match=r"already holds a run \(answers.sqlite\)"):
        RunDirectory(tmp_path / "other").check_writable(Settings(), resume=False)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="can be written to"):
        RunDirectory(tmp_path / "file" / "run").check_writable(Settings(), resume=False)
    with pytest.raises(InvalidInput, match="expected a run to go on with"):
        RunDirectory(tmp_path / "none").check_writable(Settings(), resume=True)
    assert not (tmp_path / "none").exists()


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    started(tmp_path / "run")
    RunDirectory(tmp_path / "run").check_writable(Settings(out=Path("elsewhere")), resume=True)
    other = Settings(steps=20, strategy=BALD(power=2.0))
    with pytest.raises(
        InvalidInput, match=r"steps \(20 in place of 10\), strategy\.power \(2\.0 in place of 1\.0"
    ):
        RunDirectory(tmp_path / "run").check_writable(other, resume=True)
    for damage in ("", "steps: [", "- 3"):
        (tmp_path / "run" / "config.yaml").write_text(damage)
        with pytest.raises(UnreadableFile, match=r"config\.yaml: expected a file of a run"):
            RunDirectory(tmp_path / "run").check_writable(Settings(), resume=True)


def test_a_result_comes_back_or_is_refused(tmp_path):
    run = started(tmp_path / "run")
    assert run.result is None
    run.write_result({"final_return": -3.5, "versions": {"python": "3"}})
    assert RunDirectory(run.path).result == {"final_return": -3.5, "versions": {"python": "3"}}
    (run.path / "result.json").write_text('{"final')
    with pytest.raises(UnreadableFile, match=r"result\.json.*Delete it"):
        _ = run.result


def test_objects_are_told_by_class_path_and_arguments():
    assert describe(DeepEnsemble(members=7, hidden=(3, 4))) == {
        "class_path": "rewardmodels.ensemble.DeepEnsemble",
        "init_args": {
            "members": 7,
            "prior_scale": 0.0,
            "hidden": [3, 4],
            "network": None,
            "activation": "silu",
            "reward_of": "observation_action",
            "discrete_actions": 0,
            "learning_rate": 1e-3,
            "weight_decay": 1.0,
            "random_answer_rate": 0.0,
        },
    }
    assert (
        describe(DeepEnsemble(network=MLP))["init_args"]["network"] == "rewardmodels.networks.MLP"
    )
    with pytest.raises(InvalidInput, match="top level of a module"):
        describe(DeepEnsemble(network=torch.nn.Linear(3, 2)))
    scored = ScoredStrategy(preference_variance, Power(2.0), samples=8)
    assert describe(scored)["init_args"] == {
        "acquisition": "preference_variance",
        "rule": {"class_path": "active.rules.Power", "init_args": {"power": 2.0}},
        "samples": 8,
    }

    assert describe(json.dumps) == "json.dumps"

    class Forgetful:
        def __init__(self, samples=3):
            pass

    with pytest.raises(InvalidInput, match=r"Forgetful: expected each constructor.*samples isn't"):
        describe(Forgetful())
    with pytest.raises(InvalidInput, match="top level of a module"):
        describe(ScoredStrategy(lambda returns, pairs: returns))


def test_settings_come_back_through_the_command_line():
    from jsonargparse import ArgumentParser

    config = LearnConfig(
        task="Hopper",
        comparisons=33,
        model=DeepEnsemble(members=2, hidden=(5,), random_answer_rate=0.1),
        strategy=ScoredStrategy("preference_variance", Power(2.0), samples=8),
        schedule=Hyperbolic(initial=0.5, half_life=1000),
        teacher=SyntheticTeacher(rationality=3.0, same_threshold=0.25),
        pessimism=0.5,
    )
    told = yaml.safe_load(yaml.safe_dump(describe_settings(config)))
    assert json.loads(json.dumps(told)) == told
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LearnConfig)
    parsed = parser.instantiate(parser.parse_object(told))
    again = LearnConfig(**parsed)
    assert describe_settings(again) == describe_settings(config)
    assert isinstance(again.strategy, ScoredStrategy)
    assert again.strategy.acquisition is preference_variance
