"""What is wrong is refused with one line, before anything is written; what is right comes back."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from experiments.cli import main
from experiments.registry import describe_settings
from experiments.training import learn as learning
from rewardmodels.errors import InvalidInput

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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("guard", "run: expected a value, got none."),
        ("lern", "got 'lern'. Did you mean 'learn'?"),
        ("--nonsense", "got '--nonsense'"),
        ("study strategy", "command: expected one of study predictors, "),
        ("study strategy", "got 'study strategy'. Did you mean 'study strategies'?"),
        ("learn positional", "arguments: expected flags, such as --seed 1, got 'positional'."),
        ("learn --sed 3", "--sed: expected a flag of `rewardmodels learn`, got an unknown one. Did "
         "you mean --seed?"),
        ("learn --seed", "--seed: expected a value, got none."),
        ("learn --task Hoper", "got 'Hoper'. Did you mean 'Hopper'?"),
        ("learn --task CarRacing", "task: expected one of Ant, "),
        ("learn --steps many", "steps: expected a whole number or none, got 'many'."),
        ("learn --steps 1.5", "steps: expected a whole number or none, got '1.5'."),
        ("learn --steps -5", "steps: expected a number of at least 1, got -5."),
        ("learn --comparisons -5", "comparisons: expected a number of at least 8, got -5."),
        ("learn --clip_length 0", "clip_length: expected a number of at least 1, got 0."),
        ("learn --seed 99999999999", "seed: expected at most "),
        ("learn --teacher replay", "teacher: expected a file after replay, got none."),
        ("learn --pessimism x", "pessimism: expected a number, got 'x'."),
        ("learn --pessimism .nan", "pessimism: expected a number of at least 0, got nan."),
        ("learn --video maybe", "video: expected true or false, got 'maybe'."),
        ("learn --reward lerned",
         "reward: expected one of constant, learned, random, task, zero; got 'lerned'. Did "
         "you mean 'learned'?"),
        ("learn --algorithm PPOO", "algorithm: expected one of A2C, DDPG, DQN, PPO, SAC, TD3; got "
         "'PPOO'. Did you mean 'PPO'?"),
        ("learn --algorithm DQN --task Pendulum", "algorithm: expected one for Pendulum's actions"),
        ("learn --strategy BLAD", "strategy: expected one of BALD, BestVsWorst, DOptimal, "
         "Disagreement, EUBO, Entropy, GreedyInformation, KCenter, ScoredStrategy, Thompson, "
         "Uniform or an import path; got 'BLAD'. Did you mean 'BALD'?"),
        ("learn --strategy no_module.Mine", "strategy: expected a class, got 'no_module.Mine': No "
         "module named 'no_module'."),
        ("learn --strategy my_cli_classes.Nope", "strategy: expected a class, got "
         "'my_cli_classes.Nope': "),
        ("learn --strategy my_cli_classes.Forgetful", "Forgetful: expected each constructor "
         "argument"),
        ("learn --strategy BALD --strategy.power lots",
         "strategy.power: expected a number or none, got 'lots'."),
        ("learn --strategy BALD --strategy.power -1",
         "power: expected a finite number, at least 0, got -1"),
        ("learn --strategy ScoredStrategy --strategy.rule Tpk", "strategy.rule: expected one of "),
        ("learn --schedule Constnt", "Did you mean 'Constant'?"),
        ("learn --schedule WhenUnsure(levl=1)", "schedule: expected WhenUnsure with some of level"),
        ("learn --schedule WhenUnsure(level=lots)", "got WhenUnsure(level=lots)."),
        ("learn --teacher.rationality lots", "teacher.rationality: expected a number, got 'lots'."),
        ("learn --teacher SyntheticTeecher", "Did you mean 'SyntheticTeacher'?"),
        ("learn --model torch.nn.Linear", "import path of a RewardModel; got 'torch.nn.Linear'."),
        ("learn --model.memers 7", "model (DeepEnsemble): expected one of activation, "
         "discrete_actions, hidden, learning_rate, members, network, prior_scale, "
         "random_answer_rate, reward_of, weight_decay; got 'memers'. Did you mean 'members'?"),
        ("learn --model.members seven", "model.members: expected a whole number, got 'seven'."),
        ("learn --model.members -3", "members: expected at least 1, got -3"),
        ("learn --model.hidden [3,a]", "model.hidden: expected a whole number, got 'a'."),
        ("learn --model.network nope.make", "model.network: expected the import path of a torch "
         "Module, or of a function annotated to return one, got 'nope.make': No module named "
         "'nope'. Name one that can be imported from here."),
        ("learn --model.network math.tau", "got 'math.tau': Unexpected import object 6.28"),
        ("learn --config none.yaml", "config: expected a file, got "),
        ("learn --config list.yaml", "config: expected YAML with settings by name, got '- steps'."),
        ("learn --config open.yaml", "config: expected YAML with settings by name, got "),
        ("learn --config other.yaml", "got 'stepps'. Did you mean 'steps'?"),
        ("learn --config text.yaml", "steps: expected a whole number or none, got 'many'."),
        ("learn --config deep.yaml", "got 'memers'. Did you mean 'members'?"),
        ("learn --resume --out none", "resume: expected a run to go on with, got none, which has "),
        ("learn --out list.yaml/run", "out: expected a directory that can be written to, got "),
        ("demo --steps x", "steps: expected a whole number, got 'x'."),
        ("demo --task Hoper", "Did you mean 'Hopper'?"),
        ("benchmark learn --quick --jobs 0", "jobs: expected a number of at least 1, got 0."),
        ("benchmark learn --quick --json none/a.json", "json: expected a file in a "
         "directory that exists"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_a_line(words, line, capsys):
    assert line in refused(capsys, words.split())


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


def printed(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["learn", *words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_settings_that_were_printed_are_read_back(capsys, tmp_path):
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


def test_a_class_of_the_users_is_found_beside_them(capsys, monkeypatch):
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
    assert told["strategy"] == {
        "class_path": "my_cli_classes.FirstFew",
        "init_args": {"start": 5},
    }
    assert capsys.readouterr().out.endswith("Report: there/report.html\n")


def test_a_finished_run_is_shown_again_and_not_written_over(finished, capsys):
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


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("config.yaml", "config"),
        ("answers.sqlite", "answers.sqlite: expected a feedback store"),
        ("checkpoints/0000/agent.zip", "0000: expected a whole checkpoint"),
        ("checkpoints/0000/rows.json", "0000: expected a whole checkpoint"),
        ("checkpoints/0000/history.npz", "0000: expected a whole checkpoint"),
        ("checkpoints/0000/model.safetensors", "0000: expected a whole checkpoint"),
        ("checkpoints/0000/normalise.pkl", "0000: expected a whole checkpoint"),
    ],
)
def test_a_damaged_run_is_refused(file, line, finished, tmp_path, capsys):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints" / "0001")
    raw = (out / file).read_bytes()
    (out / file).write_bytes(raw[: len(raw) // 2] + b"\x00" * 40)
    words = ["learn", "--resume", "--out", str(out)]
    assert line in refused(capsys, words)


@pytest.mark.parametrize("kind", ["plain", "lightning"])
def test_ctrl_c_says_how_to_go_on(kind, capsys, monkeypatch):
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


def test_an_error_in_the_middle_is_told_in_a_line(capsys, monkeypatch):
    def learn(config, resume):
        raise InvalidInput("n: expected less, got more.")

    monkeypatch.setattr(learning, "learn", learn)
    assert refused(capsys, ["learn"]) == "n: expected less, got more."
