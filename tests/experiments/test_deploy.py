"""A guard is kept beside its run, loaded with its agent alone, and responds as its settings say."""

import json
import pickle
import shutil

import pytest
import torch
import yaml

from experiments.deploy import GuardConfig, guard_run
from experiments.training.learn import learn
from ood import StaleThreshold, load_monitor
from rewardmodels import InvalidInput, UnknownName, UnreadableFile, load, save

from .studying import tiny

pytestmark = pytest.mark.usefixtures("_short_updates")

QUICK = {
    "detector": "Mahalanobis",
    "statistic": "EWMA",
    "familiar": 3,
    "calibration": 26,
    "episodes": 2,
}
SHIFT = {"shift": "bias", "severity": "severe", "onset": 20}


def guard(run, **settings):
    return guard_run(GuardConfig(run, **{**QUICK, **settings}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("deploy") / "run"
    learn(tiny(out, task="Reacher", steps=2048, rounds=1, comparisons=8), progress=False)
    guard(out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def events(run):
    return [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]


def test_a_guard_is_made_once_and_used_again(run):
    before = (run / "guard.safetensors").read_bytes()
    torch.manual_seed(3)
    rows = guard(run)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1), "the seed of a guarded run changes nothing outside"
    assert (run / "guard.safetensors").read_bytes() == before
    assert [row["episode"] for row in rows] == [0, 1]
    assert all(row["return"] < 0 and row["doubt"] > 0 for row in rows)
    assert guard(run) == rows


def test_a_shift_is_detected_halted_and_logged(run, capsys):
    (row, *_) = guard(run, **SHIFT)
    assert 20 < row["alarm"] <= 30
    assert row["reason"].startswith("Mahalanobis")
    assert row["reason"] in capsys.readouterr().out
    halts = [event for event in events(run) if event["kind"] == "halt"]
    assert halts[-2]["step"] == row["alarm"]
    before = len(events(run))
    guard(run, **SHIFT, on_alarm="watch")
    assert {event["kind"] for event in events(run)[before:]} == {"alarm"}


@pytest.mark.parametrize(("line", "kinds"), [("y", ["ask", "resume"]), ("", ["ask", "halt"])])
def test_asks_in_the_terminal(run, monkeypatch, line, kinds):
    (run / "guard.jsonl").unlink(missing_ok=True)
    monkeypatch.setattr("builtins.input", lambda prompt: line)
    guard(run, episodes=1, shift="bias", onset=45, on_alarm="ask")
    assert [event["kind"] for event in events(run)][:2] == kinds


def test_an_agent_trained_since_is_refused_and_again_makes_another_guard(run):
    (folder,) = (run / "checkpoints").iterdir()
    state = torch.load(folder / "agent.pt")
    state["moments"][0][0] += 1
    torch.save(state, folder / "agent.pt")
    with pytest.raises(StaleThreshold):
        guard(run)
    guard(run, again=True)
    guard(run)
    assert load_monitor(run / "guard.safetensors").threshold.alpha == 0.05


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"alpha": 0.1}, InvalidInput, "alpha"),
        ({"detector": "KNN"}, InvalidInput, "detector"),
        ({"statistic": "CUSUM"}, InvalidInput, "statistic"),
        ({"detector": "KNM"}, UnknownName, "detector"),
        ({"shift": "gravity"}, InvalidInput, "shift"),
        ({"shift": "wind"}, UnknownName, "wind"),
        ({"episodes": 0}, InvalidInput, "episodes"),
        ({"onset": -1}, InvalidInput, "onset"),
        ({"again": True, "calibration": 5}, InvalidInput, "calibration"),
    ],
)
def test_refused_settings_leave_the_guard_as_it_is(run, change, error, argument):
    before = (run / "guard.safetensors").read_bytes()
    with pytest.raises(error, match=argument):
        guard(run, **change)
    assert (run / "guard.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.yaml", r"config\.yaml"),
        ("result.json", "finished"),
        ("checkpoints", "finished"),
        ("model.safetensors", "reward model"),
    ],
)
def test_an_incomplete_run_is_refused(run, missing, message):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InvalidInput, match=message):
        guard(run)


def test_a_missing_agent_and_a_damaged_guard_are_named(run):
    (folder,) = (run / "checkpoints").iterdir()
    (run / "guard.safetensors").write_bytes(b"nothing")
    with pytest.raises(UnreadableFile, match=r"guard\.safetensors"):
        guard(run)
    raw = (folder / "agent.pt").read_bytes()
    for damaged in (raw[: len(raw) // 2], pickle.dumps(Trap()), b""):
        (folder / "agent.pt").write_bytes(damaged)
        with pytest.raises(UnreadableFile, match=r"agent\.pt") as refusal:
            guard(run)
        assert "\n" not in str(refusal.value)
    (folder / "agent.pt").unlink()
    with pytest.raises(UnreadableFile, match=r"agent\.pt"):
        guard(run)
    (folder / "agent.zip").touch()
    with pytest.raises(UnreadableFile, match=r"earlier version, whose agent\.zip"):
        guard(run)


def test_another_runs_model_is_refused(run):
    file = run / "model.safetensors"
    model = load(file)
    next(model.parameters()).data += 1
    save(model, file)
    with pytest.raises(UnreadableFile, match="expected the file with checksum"):
        guard(run)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"task": "a_strangers:Env-v0"}, (InvalidInput, "trust")),
        ({"model": {"class_path": "a_strangers.Model"}}, (InvalidInput, "trust")),
        ({"algorithm": "common.logger"}, (UnknownName, "algorithm")),
        ({"algorithm": None}, (UnreadableFile, "algorithm")),
    ],
)
def test_a_strangers_settings_run_nothing(run, change, error):
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    with pytest.raises(error[0], match=error[1]):
        guard(run)
