"""The study of guards: figures by hand, episodes that pair up, and a monitor that says the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.analysis.old_page import as_markdown
from experiments.cli import main
from experiments.envs.guard_episodes import Episodes, play
from experiments.envs.shifts import shifted
from experiments.envs.tasks import TASKS, make_env
from experiments.studies import guard as study
from experiments.studies import guard_figures as measured
from experiments.studies.guard_tables import lead, prevented, sections
from ood import CUSUM, Guard, Mahalanobis, Monitor
from ood.monitor import scores_along
from rewardmodels import InvalidInput, UnknownName

SHORT = replace(TASKS["Reacher"], horizon=20)


def ordinary():
    return make_env(SHORT)


def act(observations, noise):
    return np.tanh(observations[:, :2] + 0.1 * noise)


def test_an_alarm_before_the_onset_neither_finds_nor_misses():
    usual = np.zeros((4, 6))
    usual[0, 1] = 5.0  # a false alarm before the onset is one too
    other = np.zeros((3, 6))
    other[0, 3] = 5.0  # found at once
    other[1, [2, 4]] = 5.0  # an alarm that had nothing to do with it
    other[2, 5] = 5.0
    found = measured.figures(usual, other, 2.0, onset=3)
    assert found == {
        "found": 1.0, "found of all": pytest.approx(2 / 3), "delay": 2.0, "auroc": 1.0,
        "fpr at 95% tpr": 0.0, "false alarms": 0.25,
    }  # fmt: skip


def test_nothing_found_has_no_delay():
    found = measured.figures(np.zeros((2, 4)), np.zeros((2, 4)), 1.0, onset=2)
    assert found == {
        "found": 0.0,
        "found of all": 0.0,
        "delay": None,
        "auroc": 0.5,
        "fpr at 95% tpr": 1.0,
        "false alarms": 0.0,
    }


def test_where_all_had_an_alarm_before_the_onset_nothing_is_found():
    other = np.array([[9.0, 0.0, 9.0]])
    found = measured.figures(np.zeros((2, 3)), other, 1.0, onset=1)
    assert (found["found"], found["found of all"], found["delay"]) == (0.0, 0.0, None)


def test_auroc_counts_the_pairs_of_which_the_shifted_is_larger():
    draw = np.random.default_rng(0)
    usual, other = draw.normal(size=(7, 10)), draw.normal(0.5, size=(5, 10))
    wins = [b[4:].max() > a[4:].max() for a in usual for b in other]
    assert measured.figures(usual, other, 9.0, onset=4)["auroc"] == pytest.approx(np.mean(wins))


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
    assert measured.figures(usual, other, 9.0, onset=4)["fpr at 95% tpr"] == pytest.approx(expected)


def test_statistics_are_those_of_a_monitor_that_watches_step_by_step():
    episodes = play(ordinary, act, 30, seed=0).features
    monitor = Monitor(Mahalanobis().fit(torch.cat(episodes[:10])), CUSUM())
    monitor.calibrate(episodes[10:28], alpha=0.1)
    expected = [scores_along(monitor, episode).statistic for episode in episodes[28:]]
    np.testing.assert_allclose(
        measured.along(monitor, Episodes(episodes[28:], np.zeros(0))), expected
    )


def test_halted_episodes_earn_what_a_guard_lets_them_earn():
    """Step by step under `ood.Guard`, against the alarms of a monitor that only watched."""
    episodes = play(ordinary, act, 30, seed=0).features
    monitor = Monitor(Mahalanobis().fit(torch.cat(episodes[:10])), CUSUM())
    limit = monitor.calibrate(episodes[10:], alpha=0.1).value

    def changed():
        return shifted(ordinary(), "bias", "middle", 10, 0, observation_std=np.ones(10))

    other = play(changed, act, 3, seed=1)
    halts = measured.halting_steps(measured.along(monitor, other), limit)
    assert np.isfinite(halts).any()
    halted = play(changed, act, 3, seed=1, halts=halts)
    assert (halted.rewards != other.rewards).any()
    for number, paid in enumerate(halted.rewards):
        first, chance = np.random.SeedSequence([1, number]).generate_state(2)
        env, draw = Guard(changed(), monitor, "transition"), np.random.default_rng(int(chance))
        seen, _ = env.reset(seed=int(first))
        for step, expected in enumerate(paid):
            action = act(seen[None], draw.standard_normal((1, 2)))[0]
            seen, reward, *_, info = env.step(action)
            assert reward == expected
            assert (info["guard"]["acting"] == "halted") == (step + 1 >= halts[number])


def test_an_episode_is_halted_from_its_own_step_on():
    other = play(ordinary, act, 3, seed=3, halts=[np.inf, 5, 0])
    actions = np.stack(other.features)[:, :, 10:12]
    assert (actions[0] != 0).all()
    assert (actions[1, :5] != 0).all()
    assert not actions[1, 5:].any()
    assert not actions[2].any()
    with pytest.raises(InvalidInput, match="halts: expected one for each of 3 episodes, got 1"):
        play(ordinary, act, 3, seed=3, halts=[0])


def test_harm_prevented_by_hand():
    rows = [
        {"return": 10.0, "shifted return": 0.0, "guarded return": 5.0},
        {"return": 10.0, "shifted return": 6.0, "guarded return": -3.0},
    ]
    assert prevented(rows[:1]) == 0.5
    assert prevented(rows[1:]) == -2.25
    assert prevented(rows) == pytest.approx((5 - 9) / 14)
    assert prevented([{**rows[0], "shifted return": 11.0}]) is None


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
        assert row["step us"] > 0
        if row["shift"] == "bias":
            assert row["return"] != row["shifted return"]
            assert row["auroc"] == 1.0
    usual = {(r["seed"], r["return"]) for r in rows}
    assert len(usual) == 2
    text = (settings["out"] / "tables.md").read_text()
    assert "| Mahalanobis CUSUM |" in text
    assert text.count("| bias severe |") == 2
    page = (settings["out"] / "report.html").read_text()
    assert "What a guard finds on Reacher" in page
    assert "rewardmodels study guard --task Reacher" in page
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr(study, "load_policy", None)
    assert study.study_guard(**settings) == rows


@pytest.fixture
def two_seeds():
    """Of a shift that costs a quarter, halted for nothing, and one that costs a tenth."""
    common = {"detector": "KNN", "statistic": "CUSUM", "severity": "mild", "auroc": 0.5,
              "fpr at 95% tpr": 0.25, "false alarms": 0.0, "return": 10.0,
              "step us": 40.0}  # fmt: skip
    mass = {**common, "shift": "mass", "guarded return": 8.0}
    push = {**common, "shift": "push", "found": 0.75, "delay": 2.0, "guarded return": 0.0}
    return [
        {**mass, "seed": 0, "found": 0.5, "delay": 4.0, "shifted return": 7.0},
        {**mass, "seed": 1, "found": 0.0, "delay": None, "shifted return": 8.0},
        {**push, "seed": 0, "shifted return": 9.0},
        {**push, "seed": 1, "shifted return": 9.0},
    ]


def test_tables_average_over_seeds_by_hand(two_seeds):
    lines = as_markdown(sections(two_seeds, 0.1)).splitlines()
    assert (
        "| KNN CUSUM | 0.50 (0.38 to 0.62) | 0.50 (0.50 to 0.50) | 0.25 (0.25 to 0.25) | "
        "0.00 (0.00 to 0.00) | 0.20 | 40 |"
    ) in lines
    assert "| mass mild | 2.5 of 10.0 | 0.25 (4) | 0.20 |" in lines
    assert "| push mild | 1.0 of 10.0 | 0.75 (2) |  |" in lines


def test_sentences_say_what_was_missed_and_what_alarmed_for_nothing(two_seeds):
    said = " ".join(sections(two_seeds, 0.1)[1].sentences)
    assert "Of the shifts that take 20% of the return or more, KNN finds 0 of 1" in said
    assert "Not found: mass mild (takes 25%)." in said
    assert "Found though it takes less: push mild (75% of episodes)." in said
    assert "Halting gave back 20% of what those shifts took." in said
    assert "KNN with CUSUM finds most of what matters: 25% of" in lead(two_seeds)
    assert "2 seeds that is a hint at most" in lead(two_seeds)
    worse = [{**row, "guarded return": 5.0} for row in two_seeds]
    assert "Halting took another 100% of what" in " ".join(sections(worse, 0.1)[1].sentences)
    harmless = [row for row in two_seeds if row["shift"] == "push"]
    assert "had nothing to find" in " ".join(sections(harmless, 0.1)[1].sentences)
    assert "nothing to find" in lead(harmless)


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
