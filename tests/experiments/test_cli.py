"""Unusable input ends in one line, before anything is written; settings are read back."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from sqlite3 import OperationalError

import numpy as np
import pytest
import torch
import yaml

from active import FeedbackStore, all_pairs
from experiments import deploy
from experiments.benchmarks.page import outcome
from experiments.cli import main
from experiments.labelling.videos import best_clip
from experiments.registry import constructor_arguments, describe_settings, find_class
from experiments.training import learn as learning
from experiments.training.config import LearnConfig
from experiments.training.report import write_report
from experiments.training.run_directory import RunDirectory
from rewardmodels import Clips, DeepEnsemble, load, save
from rewardmodels.errors import InvalidInput, UnreadableFile

pytestmark = pytest.mark.usefixtures("_short_updates")

TINY = [
    *("--task=Pendulum", "--steps=2048", "--rounds=2", "--comparisons=8", "--epochs=2"),
    *("--evaluate=2", "--video=false", "--model.hidden=[8]", "--model.members=2"),
]

MINE = """
import torch
from active import QueryStrategy
from rewardmodels import DeepEnsemble


class FirstFew(QueryStrategy):
    def __init__(self, start: int = 0):
        self.start = start

    def select(self, posterior, pairs, n, *, weights=None, generator=None):
        return torch.arange(self.start, self.start + n)


class Forgetful(FirstFew):
    def __init__(self, memory: int = 3):
        super().__init__()


class Wide(DeepEnsemble):
    pass
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """An empty directory to work in, with a module of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "my_cli_classes.py").write_text(MINE)
    (tmp_path / "list.yaml").write_text("- steps\n")
    (tmp_path / "open.yaml").write_text("steps: [\n")
    (tmp_path / "bytes.yaml").write_bytes(b"steps: \xff\n")
    (tmp_path / "other.yaml").write_text("stepps: 3\n")
    (tmp_path / "text.yaml").write_text("steps: many\n")
    (tmp_path / "deep.yaml").write_text(
        "model:\n  class_path: DeepEnsemble\n  init_args: {memers: 2}"
    )
    yield
    sys.modules.pop("my_cli_classes", None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["learn", *TINY, "--out", str(out)]) == 0
    return out


def refused(capsys, words) -> str:
    """The one line by which the words are refused."""
    before = sorted(p for p in Path.cwd().rglob("*") if "__pycache__" not in p.parts)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("rewardmodels: error: ")
    assert "Traceback" not in lines[0]
    assert sorted(p for p in Path.cwd().rglob("*") if "__pycache__" not in p.parts) == before
    return lines[0].removeprefix("rewardmodels: error: ")


UNUSABLE = {
    "command": ["lern", "--nonsense", "study strategy", "benchmark pag"],
    "run": ["guard"],
    "arguments": ["learn positional"],
    "--sed": ["learn --sed 3"],
    "--seed": ["learn --seed"],
    "seed": ["learn --seed 2147483648", "learn --seed -1"],
    "task": ["learn --task Hoper", "learn --task CarRacing", "demo --task Hoper"],
    "steps": [
        *("learn --steps many", "learn --steps 1.5", "learn --steps 0", "demo --steps x"),
        "learn --config text.yaml",
    ],
    "comparisons": ["learn --comparisons -5", "learn --comparisons 7"],
    **{
        name: [f"learn --{name} 0"]
        for name in (
            "rounds",
            "clip_length",
            "evaluate",
            "threads",
            "epochs",
            "warm_up",
            "start_over",
        )
    },
    "candidates": [
        *("learn --candidates 10 --comparisons 46", "learn --candidates 10001"),
    ],
    "pessimism": [f"learn --pessimism {value}" for value in ("x", ".nan", ".inf", "1e308", "-0.1")],
    "focus": ["learn --focus .inf"],
    "video": ["learn --video maybe"],
    "reward": ["learn --reward lerned"],
    "algorithm": ["learn --algorithm PPOO", "learn --algorithm DQN --task Pendulum"],
    "strategy": [
        *("learn --strategy BLAD", "learn --strategy no_module.Mine"),
        "learn --strategy my_cli_classes.Nope",
    ],
    "Forgetful": ["learn --strategy my_cli_classes.Forgetful"],
    "strategy.power": ["learn --strategy BALD --strategy.power lots"],
    "power": ["learn --strategy BALD --strategy.power -1"],
    "strategy.rule": ["learn --strategy ScoredStrategy --strategy.rule Tpk"],
    "schedule": [
        *("learn --schedule Constnt", "learn --schedule WhenUnsure(levl=1)"),
        *("learn --schedule WhenUnsure(level=lots)", "learn --schedule Constant(initial="),
        *("learn --schedule active.BALD", "learn --schedule no_module.Schedule"),
        *("learn --schedule Constant(half_life=3)", "learn --schedule Constant(0.5)"),
    ],
    "teacher": ["learn --teacher SyntheticTeecher"],
    "teacher.file": ["learn --teacher replay"],
    "teacher.rationality": ["learn --teacher.rationality lots"],
    "model": ["learn --model torch.nn.Linear"],
    "model (DeepEnsemble)": ["learn --model.memers 7", "learn --config deep.yaml"],
    "model.members": ["learn --model.members seven"],
    "members": ["learn --model.members -3"],
    "model.hidden": ["learn --model.hidden [3,a]"],
    "model.network": ["learn --model.network nope.make", "learn --model.network math.tau"],
    "config": [
        *("learn --config none.yaml", "learn --config list.yaml", "learn --config open.yaml"),
        *("learn --config other.yaml", "learn --config bytes.yaml"),
    ],
    "resume": ["learn --resume --out none"],
    "out": [
        *("learn --out list.yaml/run", "learn --out=", "demo --out=", "demo --out list.yaml"),
        *("demo --out /proc/x", "study marks --out list.yaml", "study guard --out /proc/x"),
        f"study drift --out {'x' * 300}",
    ],
    "jobs": ["study marks --jobs 0"],
    "chromium": ["benchmark page --quick --chromium list.yaml"],
    "first_seed": ["study marks --first_seed -1"],
    "alpha": ["study guard --alpha 2"],
    "settings": ["study guard --parts []"],
    "published": ["study guard --parts [published] --published open.yaml"],
    "json": [
        *("study marks --quick --json none/a.json", "benchmark page --json none/a.json"),
        "benchmark speed --json none/a.json",
        *("benchmark page --json /proc/q.json --quick", "benchmark speed --json ."),
        f"study guard --json {'x' * 300}",
    ],
}


@pytest.mark.parametrize(
    ("argument", "words"), [(name, words) for name, each in UNUSABLE.items() for words in each]
)
def test_unusable_input_is_one_line_that_names_the_argument(argument, words, capsys):
    line = refused(capsys, words.split())
    assert line.startswith(f"{argument}: expected ")
    assert "Forgetful" in argument or "got" in line
    misspelt = {"lern": "learn", "--sed": "--seed", "BLAD": "BALD", "--model.memers": "members"}
    for word in misspelt.keys() & words.split():
        assert "Did you mean" in line
        assert misspelt[word] in line


@pytest.mark.parametrize(
    ("words", "listed", "left_out"),
    [
        ("", "benchmark page", "unlisted"),
        ("--help", "study marks", "unlisted"),
        ("study", "study marks", "benchmark"),
        ("study --help", "study drift", "learn a task"),
        ("benchmark -h", "benchmark page", "study"),
        ("--version", ".", "usage"),
    ],
)
def test_commands_are_listed(words, listed, left_out, capsys):
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    assert listed in printed
    assert left_out not in printed


@pytest.mark.parametrize("command", ["learn", "demo", "benchmark page"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: rewardmodels {command}" in capsys.readouterr().out


def helped(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["learn", *words])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("teacher", "human", "active.HumanTeacher"),
        ("teacher", "stochastic", "active.SyntheticTeacher"),
        ("model", "GPHead", "rewardmodels.GPHead"),
        ("strategy", "BALD", "active.BALD"),
        ("schedule", "WhenUnsure", "active.WhenUnsure"),
        ("strategy", "my_cli_classes.FirstFew", "my_cli_classes.FirstFew"),
    ],
)
def test_a_class_has_help_by_name_and_path_with_its_own_settings_alone(kind, name, path, capsys):
    by_name, joined, by_path = (
        helped(capsys, *words)
        for words in (
            [f"--{kind}.help", name],
            [f"--{kind}.help={name}"],
            [f"--{kind}.help={path}"],
        )
    )
    assert by_name == joined == by_path
    flags = {line.split()[0] for line in by_name.splitlines() if line.startswith("  --")}
    arguments = constructor_arguments(find_class(kind, path))
    assert flags == {f"--{kind}.{argument}" for argument in arguments}
    assert "torch.nn" not in by_name
    assert "torch.nn" not in helped(capsys, f"--{kind}.help")


@pytest.mark.parametrize("task", ["HalfCheetah", "backflip", "Pendulum"])
def test_help_shows_what_is_taken_for_the_task(task, capsys):
    text = " ".join(helped(capsys, "--task", task, "--help").split())
    taken = LearnConfig(task=task)
    for name in ("horizon", "comparisons", "steps", "rounds", "warm_up", "start_over"):
        shown = re.search(rf" --{name} [^(]*\([^)]*default: (\w+)\)", text)[1]
        assert shown == str(getattr(taken, name))
    assert "default: null" not in text


def printed(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["learn", *words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_printed_settings_are_read_back(capsys, tmp_path):
    words = "--task Hopper --strategy Disagreement --strategy.samples 9 --schedule Hyperbolic "
    words += "--schedule.half_life 500 --teacher.rationality 2 --model DeepEnsemble "
    words += "--model.members 7 --model.hidden [3,4] --pessimism 0.5"
    config = printed(capsys, *words.split())
    assert config["model"]["init_args"]["members"] == 7
    assert config["model"]["init_args"]["hidden"] == [3, 4]
    assert config["strategy"]["class_path"].endswith("Disagreement")
    assert config["strategy"]["init_args"]["samples"] == 9
    assert config["teacher"]["init_args"]["rationality"] == 2
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config))
    assert printed(capsys, "--config", str(file)) == config
    assert printed(capsys, "--config", str(file), "--seed", "4") == {**config, "seed": 4}


@pytest.mark.parametrize(
    "words",
    [
        ["--schedule", "WhenUnsure(level=0.5)", "--teacher", "stochastic"],
        ["--schedule=WhenUnsure(level=0.5)", "--teacher=SyntheticTeacher(rationality=1.0)"],
        ["--schedule", "WhenUnsure", "--schedule.level=0.5", "--teacher=stochastic"],
    ],
)
def test_classes_are_named_with_their_arguments(words, capsys):
    config = printed(capsys, *words)
    assert config["schedule"]["init_args"]["level"] == 0.5
    assert config["teacher"]["class_path"].endswith("SyntheticTeacher")
    assert config["teacher"]["init_args"]["rationality"] == 1


def test_a_runs_own_settings_are_read_back(finished, capsys):
    own = yaml.safe_load((finished / "config.yaml").read_text())
    again = printed(capsys, "--config", str(finished / "config.yaml"))
    assert {name: again[name] for name in own} == own


def test_a_class_in_the_working_directory_is_found(capsys, monkeypatch):
    seen = []
    result = {"task": "t", "reward": "r", "comparisons": 8, "final_return": 1.0, "steps": 9}
    monkeypatch.setattr(learning, "learn", lambda config, resume: seen.append(config) or result)
    words = (
        "learn --strategy my_cli_classes.FirstFew --strategy.start 5 --model my_cli_classes.Wide"
    )
    assert main([*words.split(), "--model.members", "3", "--out", "there"]) == 0
    (config,) = seen
    assert type(config.strategy).__name__ == "FirstFew"
    assert config.strategy.start == 5
    assert type(config.model).__name__ == "Wide"
    assert config.model.members == 3
    told = describe_settings(config)
    assert told["strategy"] == {"class_path": "my_cli_classes.FirstFew", "init_args": {"start": 5}}
    assert capsys.readouterr().out.endswith("Report: there/report.html\n")


def test_a_finished_run_is_shown_again_and_not_overwritten(finished, capsys):
    words = ["learn", "--out", str(finished)]
    before = (finished / "result.json").stat().st_mtime_ns
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--resume", *TINY]) == 0
    assert "8 comparisons: true return -" in capsys.readouterr().out
    assert "already holds a run" in refused(capsys, [*words, *TINY])
    assert "got another seed (3 in place of 0)" in refused(capsys, [*words, "--resume", "--seed=3"])
    line = refused(capsys, [*words, "--resume", "--strategy", "Uniform"])
    assert (
        "strategy (active.strategies.Uniform in place of active.strategies.GreedyInformation)"
        in line
    )
    assert (finished / "result.json").stat().st_mtime_ns == before


@pytest.fixture
def unfinished(finished, tmp_path):
    """The run after its first round."""
    out = shutil.copytree(finished, tmp_path / "unfinished")
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints" / "0001")
    return out


class Trap:
    """When it is unpickled, code runs."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    "name",
    [
        *("agent.pt", "agent.zip", "normalise.pkl", "replay.pkl", "clip_buffer.npz"),
        *("rows.json", "answers.json", "reward.json", "model.safetensors"),
    ],
)
def test_a_strangers_checkpoint_runs_no_code(name, unfinished, tmp_path, capsys):
    trap, file = Trap(tmp_path / "trace"), unfinished / "checkpoints" / "0000" / name
    if name == "clip_buffer.npz":
        np.savez(file, ends=np.array([[trap]], object), steps=1)
    elif name == "agent.zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data", pickle.dumps(trap))
    elif name == "agent.pt":
        torch.save({"parameters": trap}, file)
    else:
        file.write_bytes(pickle.dumps(trap))
    line = refused(capsys, ["learn", "--resume", "--out", str(unfinished)])
    assert "expected a checkpoint without code" in line or "expected a whole checkpoint" in line
    pickle.loads(pickle.dumps(trap))
    assert trap.trace.exists(), "the trap would have worked"


HOSTILE = [
    *({"strategy": {"class_path": "my_cli_classes.FirstFew"}}, {"model": "my_cli_classes.Wide"}),
    {"strategy": '{class_path: "my_cli_classes\\x2eFirstFew"}'},  # is parsed as YAML again
    {"model": {"class_path": "rewardmodels.DeepEnsemble", "init_args": {"network": "os.abort"}}},
    *({"config": "hidden"}, {"task": "my_cli_classes:Env-v0"}),
    {"strategy": {"class_path": "my_cli_classes.FirstFew"}, "trust": True},
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_strangers_settings_import_nothing(hostile, unfinished, capsys):
    file = unfinished / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **hostile}))
    (unfinished / "hidden").write_text("strategy: my_cli_classes.FirstFew")
    line = refused(capsys, ["learn", "--resume", "--out", str(unfinished)])
    assert line.startswith("trust: ")
    assert "--trust" in line
    assert "my_cli_classes" not in sys.modules


@pytest.mark.parametrize("given", ["--trust", "--strategy=my_cli_classes.FirstFew", "--config=my"])
def test_ones_own_settings_are_imported(given, unfinished, monkeypatch):
    seen, file = [], unfinished / "config.yaml"
    result = {"task": "t", "reward": "r", "comparisons": 8, "final_return": 1.0, "steps": 9}
    monkeypatch.setattr(learning, "learn", lambda config, resume: seen.append(config) or result)
    mine = {"strategy": {"class_path": "my_cli_classes.FirstFew"}}
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **mine}))
    Path("my").write_text(yaml.safe_dump(mine))
    assert main(["learn", "--resume", "--out", str(unfinished), given]) == 0
    assert type(seen[0].strategy).__name__ == "FirstFew"


@pytest.mark.parametrize("words", ["--trust run", "run --trust", "run --trust true"])
def test_a_setting_that_is_off_is_switched_on_by_its_flag(words, monkeypatch):
    seen = []
    monkeypatch.setattr(deploy, "guard_run", seen.append)
    assert main(["guard", *words.split()]) == 0
    assert (seen[0].run, seen[0].trust, seen[0].again) == (Path("run"), True, False)


def _hold(out, ready):
    with RunDirectory(out).locked():
        ready.set()
        time.sleep(60)


def test_a_run_is_one_processs_until_it_is_killed(unfinished, tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    for out in (unfinished, tmp_path / "new"):
        ready = context.Event()
        process = context.Process(target=_hold, args=(out, ready))
        process.start()
        assert ready.wait(30)
        words = ["learn", *TINY, "--out", str(out), *(["--resume"] if out == unfinished else [])]
        assert "no other process works on" in refused(capsys, words)
        process.kill()
        process.join()
        with RunDirectory(out).locked():
            pass


@pytest.mark.parametrize("change", ["deleted", "emptied", "swapped"])
def test_a_resumed_run_has_the_answers_that_it_knows(change, unfinished, capsys):
    file = unfinished / "answers.sqlite"
    recorded = file.read_bytes()
    for each in unfinished.glob("answers.sqlite*"):
        each.unlink()
    if change == "emptied":
        file.touch()
    if change == "swapped":
        clips = Clips(torch.rand(9, 5, 3), torch.rand(9, 5, 1))
        with FeedbackStore(file) as store:
            for query in store.add_queries(clips, all_pairs(9), round=0):
                store.answer(query, 1.0, "SyntheticTeacher")
        store.close()
    found = {"deleted": "0 of them", "emptied": "0 of them", "swapped": "others"}[change]
    # Nothing is made in place of a file that is missing.
    line = refused(capsys, ["learn", "--resume", "--out", str(unfinished)])
    assert f"expected the 2 answers that {unfinished / 'checkpoints' / '0000'} was made" in line
    assert found in line
    file.write_bytes(recorded)
    known = (unfinished / "checkpoints" / "0000" / "answers.json").read_text()
    with FeedbackStore(file) as store:
        assert json.loads(known) == list(store.digest(2)), "the run's own are accepted"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", b'{"task": "Pendulum"}'),
        ("result.json", b'["task"]'),
        ("result.json", b"[" * 100_000),
        ("config.yaml", "task: Pendulum  # \xfc".encode("latin-1")),
        ("config.yaml", b"steps: [" * 3),
        ("config.yaml", b"task: 3"),
    ],
)
def test_files_of_another_shape_are_refused(file, content, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "damaged")
    (out / file).write_bytes(content)
    for words in (["learn", "--resume", "--out"], ["learn", "--resume", "--trust", "--out"]):
        assert f"{file}: expected a file of a run" in refused(capsys, [*words, str(out)])
    assert f"{file}: expected a file of a run" in refused(capsys, ["guard", str(out)])
    with pytest.raises(UnreadableFile, match=file):
        write_report(out)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("config.yaml", "config"),
        ("answers.sqlite", "answers.sqlite: expected a feedback store"),
        ("checkpoints/0000/agent.pt", "0000: expected a whole checkpoint"),
        ("checkpoints/0000/rows.json", "0000: expected a whole checkpoint"),
        ("checkpoints/0000/clip_buffer.npz", "0000: expected a whole checkpoint"),
        ("checkpoints/0000/model.safetensors", "0000: expected a whole checkpoint"),
    ],
)
def test_a_damaged_run_is_refused(file, line, unfinished, capsys):
    raw = (unfinished / file).read_bytes()
    (unfinished / file).write_bytes(raw[: len(raw) // 2] + b"\x00" * 40)
    assert line in refused(capsys, ["learn", "--resume", "--out", str(unfinished)])


@pytest.mark.parametrize("change", ["flipped", "swapped", "missing"])
def test_a_run_reads_no_other_model_than_its_own(change, finished, unfinished, capsys):
    checkpoint, out = unfinished / "checkpoints" / "0000", unfinished.with_name("guarded")
    shutil.copytree(finished, out)
    for file in (checkpoint / "model.safetensors", out / "model.safetensors"):
        model, raw = load(file), bytearray(file.read_bytes())
        if change == "missing":
            file.unlink()
        elif change == "flipped":
            raw[-1] ^= 1
            file.write_bytes(raw)
        else:  # as sound as the run's own
            with torch.no_grad():
                next(model.parameters()).add_(1)
            save(model, file)
    line = refused(capsys, ["learn", "--resume", "--out", str(unfinished)])
    assert "0000: expected a whole checkpoint, got a damaged one" in line
    line = refused(capsys, ["guard", str(out)])
    assert re.search(r"checksum|reward model", line)
    if change != "missing":  # then there is no best clip
        with pytest.raises(UnreadableFile, match="checksum"):
            best_clip(unfinished)


@pytest.mark.parametrize("kind", ["plain", "lightning"])
def test_ctrl_c_prints_the_command_that_resumes(kind, capsys, monkeypatch):
    def learn(config, resume):
        config.out.mkdir()
        (config.out / "config.yaml").touch()
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if kind == "plain":
                raise
            exit(1)  # as Lightning's Trainer does

    monkeypatch.setattr(learning, "learn", learn)
    assert main(["learn", "--out", "a run"]) == 130
    err = capsys.readouterr().err
    assert err.strip() == (
        "rewardmodels: interrupted. To go on: rewardmodels learn --resume --out 'a run'"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        ("disk", 2, "rewardmodels: error: system: No space left on device."),
        (
            "SIGTERM",
            143,
            "rewardmodels: interrupted. To go on: rewardmodels learn --resume --out run",
        ),
    ],
)
def test_a_full_disk_and_sigterm_lose_nothing(stop, code, line, finished, capsys, monkeypatch):
    write = Path.write_bytes

    def fill(path, content):
        write(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if stop == "disk":
            patch.setattr(Path, "write_bytes", fill)
        else:  # in the fit, where Lightning has a handler too
            kill = lambda model: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
            patch.setattr(DeepEnsemble, "on_train_epoch_start", kill)
        assert main(["learn", *TINY, "--out", "run"]) == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == line
    assert "Traceback" not in err
    assert not [*Path("run").rglob("*.part")]
    assert main(["learn", "--resume", "--out", "run"]) == 0
    assert outcome(Path("run")) == outcome(finished)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory", "/proc/x"), "/proc/x"),
        (OSError(28, "No space left on device"), "No space"),
        (OperationalError("database or disk is full"), "disk is full"),
        (MemoryError("9 GiB"), "memory"),
        (RuntimeError("can't allocate memory"), "memory"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, reason, capsys, monkeypatch):
    def learn(config, resume):
        raise error

    monkeypatch.setattr(learning, "learn", learn)
    assert reason in refused(capsys, ["learn"])


def test_too_many_threads_are_refused(capsys):
    assert refused(capsys, ["learn", "--threads", "100000"]).startswith("threads: expected at most")
    assert refused(capsys, ["learn", "--out", ""]).startswith("out: expected ")


def test_an_error_while_running_is_one_line(capsys, monkeypatch):
    def learn(config, resume):
        raise InvalidInput("n: expected less, got more.")

    monkeypatch.setattr(learning, "learn", learn)
    assert refused(capsys, ["learn"]) == "n: expected less, got more."
