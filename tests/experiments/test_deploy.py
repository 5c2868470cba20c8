"""A guard is kept beside its run, is loaded with its agent alone, and does what it is told."""

import json
import shutil

import pytest
import torch
from stable_baselines3.common.vec_env import VecNormalize

from experiments.deploy import guard_run
from experiments.envs.tasks import find_task
from experiments.envs.vector import make_vec_env
from experiments.training.config import LearnConfig
from experiments.training.learn import learn
from ood import StaleThreshold, load_monitor
from rewardmodels import DeepEnsemble, InvalidInput, UnknownName, UnreadableFile

QUICK = {
    "detector": "Mahalanobis",
    "statistic": "EWMA",
    "familiar": 3,
    "calibration": 26,
    "episodes": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("guarding") / "run"
    model = DeepEnsemble(members=2, hidden=(8,))
    learn(
        LearnConfig(
            task="Reacher", steps=2048, rounds=1, comparisons=8, epochs=2, evaluate=2,
            video=False, model=model, out=out,
        ),
        progress=False,
    )  # fmt: skip
    guard_run(out, **QUICK)
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_guard_that_is_there_is_used_again(run, capsys):
    before = (run / "guard.safetensors").read_bytes()
    rows = guard_run(run, **QUICK)
    assert (run / "guard.safetensors").read_bytes() == before
    assert "Recording" not in capsys.readouterr().out
    assert [row["episode"] for row in rows] == [0, 1]
    assert all(row["return"] < 0 and row["doubt"] > 0 for row in rows)
    assert guard_run(run, **QUICK) == rows


def test_what_goes_wrong_is_seen_halted_and_written_down(run, capsys):
    (row, *_) = guard_run(run, **QUICK, shift="bias", severity="severe", onset=20)
    assert 20 < row["alarm"] <= 30
    assert row["reason"].startswith("Mahalanobis: most anomalous observation")
    assert f"alarm at step {row['alarm']}: {row['reason']}" in capsys.readouterr().out
    events = [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]
    halts = [event for event in events if event["kind"] == "halt"]
    assert halts[-2]["step"] == row["alarm"]
    guard_run(run, **QUICK, shift="bias", severity="severe", onset=20, on_alarm="watch")
    later = (run / "guard.jsonl").read_text().splitlines()[len(events) :]
    assert {json.loads(line)["kind"] for line in later} == {"alarm"}


@pytest.mark.parametrize(("said", "kinds"), [("y", ["ask", "resume"]), ("", ["ask", "halt"])])
def test_asks_in_the_terminal(run, monkeypatch, said, kinds):
    (run / "guard.jsonl").unlink(missing_ok=True)
    monkeypatch.setattr("builtins.input", lambda prompt: said)
    guard_run(run, **{**QUICK, "episodes": 1}, shift="bias", onset=45, on_alarm="ask")
    events = [json.loads(line)["kind"] for line in (run / "guard.jsonl").read_text().splitlines()]
    assert events[:2] == kinds


def test_an_agent_trained_since_is_refused_and_again_makes_another(run):
    (folder,) = (run / "checkpoints").iterdir()
    file = str(folder / "normalise.pkl")
    normalised = VecNormalize.load(file, make_vec_env(find_task("Reacher"), 1, 0))
    normalised.obs_rms.mean += 1
    normalised.save(file)
    with pytest.raises(StaleThreshold, match="got one of another agent"):
        guard_run(run, **QUICK)
    guard_run(run, **QUICK, again=True)
    guard_run(run, **QUICK)
    assert load_monitor(run / "guard.safetensors").threshold.alpha == 0.05


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 0.1}, InvalidInput, "alpha: expected 0.05, as of the guard.*--again"),
        ({"detector": "KNN"}, InvalidInput, "detector: expected Mahalanobis.*got KNN"),
        ({"statistic": "CUSUM"}, InvalidInput, "statistic: expected EWMA.*got CUSUM"),
        ({"detector": "KNM"}, UnknownName, "Did you mean 'KNN'"),
        ({"shift": "gravity"}, InvalidInput, "makes a difference to Reacher"),
        ({"shift": "wind"}, UnknownName, "expected one of"),
        ({"episodes": 0}, InvalidInput, "episodes: expected at least 1"),
        ({"onset": -1}, InvalidInput, "onset: expected at least 0"),
        ({"again": True, "calibration": 5}, InvalidInput, "calibration: expected at least 25"),
    ],
)
def test_what_cannot_be_used_is_refused_and_the_guard_stays(run, change, error, message):
    before = (run / "guard.safetensors").read_bytes()
    with pytest.raises(error, match=message):
        guard_run(run, **{**QUICK, **change})
    assert (run / "guard.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.yaml", "the directory of a run of rewardmodels learn"),
        ("result.json", "expected a finished run.*--resume"),
        ("checkpoints", "expected a finished run"),
        ("model.safetensors", "expected a run with a reward model"),
    ],
)
def test_a_run_with_something_missing_is_refused(run, missing, message):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InvalidInput, match=message):
        guard_run(run, **QUICK)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"which has no config\.yaml"):
        guard_run(tmp_path)
    with pytest.raises(InvalidInput, match=r"which has no config\.yaml"):
        guard_run(tmp_path / "nowhere")


def test_a_lost_agent_and_a_damaged_guard_are_named(run):
    (folder,) = (run / "checkpoints").iterdir()
    (run / "guard.safetensors").write_bytes(b"nothing")
    with pytest.raises(UnreadableFile, match=r"guard\.safetensors: expected a monitor"):
        guard_run(run, **QUICK)
    (folder / "agent.zip").unlink()
    with pytest.raises(UnreadableFile, match=r"agent\.zip: expected the agent"):
        guard_run(run, **QUICK)


def test_its_own_seed_changes_nothing_outside(run):
    torch.manual_seed(3)
    guard_run(run, **QUICK)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)
