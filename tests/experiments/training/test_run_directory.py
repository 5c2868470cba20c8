"""A run's directory is complete at every moment, and its settings repeat the run."""

import csv
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from active import BALD
from experiments.training.run_directory import RunDirectory
from rewardmodels import InvalidInput, UnreadableFile


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


def test_a_repeated_round_is_logged_once_in_csv_and_tensorboard(tmp_path):
    run = started(tmp_path / "run")
    for i in (1, 2):
        run.log(row(i))
        run.checkpoint(i, write_number(i))
    run.log(row(3, task_return=1.0))  # and here it was killed
    again, restored = RunDirectory(run.path), []
    again.restore(lambda folder, number: restored.append((number, (folder / "number").read_text())))
    assert restored == [(2, "2")]
    for i in (3, 4):
        again.log(row(i, task_return=2.0))
    expected = [row(1), row(2), row(3, task_return=2.0), row(4, task_return=2.0)]
    assert rows(run.path) == again.rows == expected
    assert again.curve("step", "task_return")[0].tolist() == [300, 400]
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


def test_an_existing_run_is_never_overwritten(tmp_path):
    started(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "answers.sqlite").touch()
    (tmp_path / "file").touch()
    for name, resume, reason in (
        ("run", False, r"already holds a run .*--resume"),
        ("other", False, r"already holds a run \(answers.sqlite\)"),
        ("file/run", False, "can be written to"),
        ("none", True, "expected a run to go on with"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            RunDirectory(tmp_path / name).check_writable(Settings(), resume=resume)
    assert not (tmp_path / "none").exists()


def test_a_run_is_resumed_with_the_same_settings_only(tmp_path):
    run = started(tmp_path / "run")
    run.check_writable(Settings(out=Path("elsewhere")), resume=True)
    changes = r"steps \(20 in place of 10\), strategy\.power \(2\.0 in place of 1\.0"
    with pytest.raises(InvalidInput, match=changes):
        run.check_writable(Settings(steps=20, strategy=BALD(power=2.0)), resume=True)
    for damage in ("", "steps: [", "- 3"):
        run.settings_file.write_text(damage)
        with pytest.raises(UnreadableFile, match=r"config\.yaml"):
            run.check_writable(Settings(), resume=True)


def test_a_result_is_read_back(tmp_path):
    run = started(tmp_path / "run")
    assert run.result is None
    result = {"task": "T", "reward": "zero", "steps": 9, "comparisons": 0, "final_return": -3.5}
    result |= {"final_returns": [-4.0, -3.0], "aurc": None, "versions": {"python": "3"}}
    run.write_result(result)
    assert RunDirectory(run.path).result == result
    flips = {**result, "backflips_per_1000_steps": 0.5}  # and no `backflips`
    for damaged in (
        *({**result, "final_returns": "-4"}, {**result, "final_returns": None}, flips, {}),
        *({**result, "aurc": {}}, {**result, "steps": [9]}, {**result, "versions": 3}),
    ):
        run.write_result(damaged)
        with pytest.raises(UnreadableFile, match=r"result\.json"):
            _ = run.result
