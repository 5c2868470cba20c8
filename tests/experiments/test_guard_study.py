"""The study of guards: figures by hand, episodes that pair up, and a monitor that says the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.cli import main
from experiments.guard_episodes import Episodes, play
from experiments.shifts import shifted
from experiments.studies import guard as study
from experiments.studies.guard_tables import tables
from experiments.tasks import TASKS, make_env
from ood import CUSUM, Mahalanobis, Monitor
from ood.monitor import scores_along
from rewardmodels import InvalidInput, UnknownName

SHORT = replace(TASKS["Reacher"], horizon=20)


def ordinary():
    return make_env(SHORT)


def act(observations, noise):
    return np.tanh(observations[:, :2] + 0.1 * noise)


def test_an_alarm_before_the_onset_finds_nothing():
    usual = np.zeros((4, 6))
    usual[0, 1] = 5.0  # a false alarm before the onset is one too
    other = np.zeros((3, 6))
    other[0, 3] = 5.0  # found at once
    other[1, [2, 4]] = 5.0  # an alarm that had nothing to do with it
    other[2, 5] = 5.0
    found = study.figures(usual, other, 2.0, onset=3)
    assert found == {
        "found": pytest.approx(2 / 3), "delay": 2.0, "auroc": 1.0, "fpr at 95% tpr": 0.0,
        "false alarms": 0.25,
    }  # fmt: skip


def test_nothing_found_has_no_delay():
    found = study.figures(np.zeros((2, 4)), np.zeros((2, 4)), 1.0, onset=2)
    assert found == {
        "found": 0.0,
        "delay": None,
        "auroc": 0.5,
        "fpr at 95% tpr": 1.0,
        "false alarms": 0.0,
    }


def test_auroc_counts_the_pairs_of_which_the_shifted_is_larger():
    draw = np.random.default_rng(0)
    usual, other = draw.normal(size=(7, 10)), draw.normal(0.5, size=(5, 10))
    wins = [b[4:].max() > a[4:].max() for a in usual for b in other]
    assert study.figures(usual, other, 9.0, onset=4)["auroc"] == pytest.approx(np.mean(wins))


def test_episodes_pair_up_until_the_onset():
    every = play(ordinary, act, 4, seed=3)
    other = play(lambda: shifted(ordinary(), "mass", "severe", 12, 0), act, 2, seed=3, first=2)
    for usual, changed in zip(every.features[2:], other.features, strict=True):
        assert usual.shape == (20, 10 + 2 + 10)
        np.testing.assert_array_equal(usual[:12], changed[:12])
        assert (usual[12:] != changed[12:]).any()
        # Before, action and after: what follows one step is what comes before the next.
        np.testing.assert_array_equal(usual[1:, :10], usual[:-1, 12:])
    np.testing.assert_array_equal(every.rewards[2:, :12], other.rewards[:, :12])
    starts = {tuple(episode[0, :10].tolist()) for episode in every.features}
    assert len(starts) == 4


def test_fpr_by_hand():
    draw = np.random.default_rng(0)
    usual, other = draw.normal(size=(50, 10)), draw.normal(0.5, size=(40, 10))
    level = np.sort(other[:, 4:].max(1))[2]  # 38 of 40 are at or above it
    expected = (usual[:, 4:].max(1) >= level).mean()
    assert study.figures(usual, other, 9.0, onset=4)["fpr at 95% tpr"] == pytest.approx(expected)


def test_statistics_are_those_of_a_monitor_that_watches_step_by_step():
    episodes = play(ordinary, act, 30, seed=0).features
    monitor = Monitor(Mahalanobis().fit(torch.cat(episodes[:10])), CUSUM())
    monitor.calibrate(episodes[10:28], alpha=0.1)
    expected = [scores_along(monitor, episode).statistic for episode in episodes[28:]]
    np.testing.assert_allclose(study.along(monitor, Episodes(episodes[28:], np.zeros(0))), expected)


@pytest.fixture
def settings(tmp_path):
    return {
        "task": "Reacher", "detectors": ["Mahalanobis"], "statistics": ["CUSUM", "Spike"],
        "shifts": ["mass", "bias"], "severities": ["middle", "severe"], "steps": 0,
        "horizon": 20, "onset": 10, "familiar": 20, "calibration": 14, "tests": 2, "seeds": 2,
        "out": tmp_path / "study",
    }  # fmt: skip


def test_a_study_has_a_row_of_everything_and_goes_on_where_it_stopped(settings, monkeypatch):
    rows = study.study_guard(**settings)
    seen = {(r["statistic"], r["shift"], r["severity"], r["seed"]) for r in rows}
    assert len(rows) == len(seen) == 16
    for row in rows:
        assert row["return"] < 0
        if row["shift"] == "bias":
            assert row["return"] != row["shifted return"]
            assert row["auroc"] == 1.0
    usual = {(r["seed"], r["return"]) for r in rows}
    assert len(usual) == 2
    text = (settings["out"] / "tables.md").read_text()
    assert "| Mahalanobis | CUSUM |" in text
    assert text.count("| bias | severe |") == 2
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr(study, "load_policy", None)
    assert study.study_guard(**settings) == rows


def test_tables_average_over_seeds_by_hand():
    common = {"detector": "KNN", "statistic": "CUSUM", "shift": "mass", "severity": "mild",
              "auroc": 0.5, "fpr at 95% tpr": 0.25, "false alarms": 0.0,
              "return": 10.0}  # fmt: skip
    rows = [
        {**common, "seed": 0, "found": 1.0, "delay": 4.0, "shifted return": 7.0},
        {**common, "seed": 1, "found": 0.0, "delay": None, "shifted return": 8.0},
    ]
    lines = tables(rows, 0.1).splitlines()
    assert (
        "| KNN | CUSUM | 0.50 (0.00 to 1.00) | 0.50 (0.50 to 0.50) | 0.25 (0.25 to 0.25) | "
        "0.00 (0.00 to 0.00) |"
    ) in lines
    assert "| mass | mild | 2.5 of 10.0 | 0.50 (4) |" in lines


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"onset": 20}, InvalidInput, "horizon: expected at least 21, got 20"),
        ({"tests": 0}, InvalidInput, "tests: expected at least 1"),
        ({"detectors": ["Mahalanobi"]}, UnknownName, "Did you mean 'Mahalanobis'"),
        ({"statistics": ["CUSUMM"]}, UnknownName, "Did you mean 'CUSUM'"),
        ({"shifts": ["gravity"]}, InvalidInput, "makes a difference to Reacher-v5"),
        ({"shifts": ["winds"]}, UnknownName, "name: expected one of"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_made(settings, change, error, message):
    with pytest.raises(error, match=message):
        study.study_guard(**{**settings, **change})
    assert not settings["out"].exists()


def test_shifts_that_a_task_cannot_feel_are_left_out_unless_named():
    assert set(study.worlds(TASKS["Reacher"], None, ["middle"])) == {
        "mass", "damping", "strength", "dead_actuator", "noise", "bias", "frozen_sensor", "delay",
        "push",
    }  # fmt: skip


def test_the_command_has_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["study", "guard", "--help"])
    assert stop.value.code == 0
    assert "--alpha" in capsys.readouterr().out
