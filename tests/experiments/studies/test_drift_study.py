"""The study of drift: its arithmetic by hand, and its arms on a task of a few rollouts."""

from __future__ import annotations

import csv

import av
import numpy as np
import pytest
import torch
from scipy import stats

from experiments.analysis.old_page import About
from experiments.envs.guard_episodes import train
from experiments.envs.tasks import Task, find_task
from experiments.studies.drift import drift_cell, study_drift
from experiments.studies.drift_figures import (
    curves,
    drift_kept,
    kept,
    on_one_grid,
    sentence,
    write_tables,
)
from ood import Mahalanobis, Monitor
from ood.conformal import Threshold
from rewardmodels import InvalidInput, UnknownName


def made_up(arm, seed, true, final, alarms=(), predicted=(0.0, 50.0, 90.0)):
    return {
        "task": "Hopper", "arm": arm, "seed": seed, "start": 100.0, "final": final,
        "step": [10, 20, 30], "true": list(true), "predicted": list(predicted),
        "std": [1.0, 1.0, 1.0], "comparisons": [12, 12, 12 + 10 * len(alarms)],
        "asked": 12 + 10 * len(alarms), "alarms": list(alarms), "states": [],
    }  # fmt: skip


ROWS = [
    *(made_up("frozen", s, (150, 200, 90 + s), 80.0 + 10 * s) for s in range(5)),
    *(made_up("guarded", s, (150, 180, 190), 190.0 - s, alarms=(12, 25)) for s in range(5)),
]


def test_what_is_kept_by_hand():
    frozen, guarded = ROWS[:5], ROWS[5:]
    assert kept(frozen).tolist() == [0.4, 0.45, 0.5, 0.55, 0.6]
    assert kept(guarded)[1] == 189 / 190
    figures = drift_kept(ROWS)
    assert figures["drift_frozen_kept"] == pytest.approx(stats.trim_mean(kept(frozen), 0.25))
    assert figures["drift_guard_kept"] == pytest.approx(188 / 190)
    assert drift_kept(frozen).keys() == {"drift_frozen_kept"}


def test_the_start_and_the_end_count_as_best_too():
    assert kept([made_up("frozen", 0, (40, 30, 20), 50.0)]).tolist() == [0.5]
    assert kept([made_up("frozen", 0, (40, 30, 20), 120.0)]).tolist() == [1.0]


def test_nothing_is_kept_of_what_is_no_gain():
    row = made_up("frozen", 0, (-40, -30, -20), -50.0) | {"start": -10.0}
    assert np.isnan(kept([row])).all()


def test_the_sentence_says_what_the_rows_say():
    text = sentence(ROWS)
    assert "Hopper, 5 seeds" in text
    assert "frozen 50.0%" in text
    assert "guarded 98.9%" in text
    assert "5 of 5 policies lost 30% or more" in text
    assert "went up for 5" in text


def test_the_sentence_sets_a_loss_against_that_on_rewards_that_say_nothing():
    paid = [
        *(made_up("zero", s, (100, 90, 80), 90.0) for s in range(5)),
        *(made_up("random", s, (100, 90, 80), 75.0) for s in range(5)),
    ]
    assert "reward that says nothing" not in sentence(ROWS)
    assert "a reward that says nothing keeps 75.0% or more" in sentence(ROWS + paid)
    above, below = curves(ROWS + paid).axes
    assert {text.get_text() for text in above.texts} == {"frozen", "guarded"}, "nothing predicted"
    assert {text.get_text() for text in below.texts} == {"frozen", "guarded", "zero", "random"}


def test_curves_of_other_steps_are_brought_together():
    rows = [
        {"step": [1, 4], "true": [0.0, 30.0]},
        {"step": [2, 3], "true": [7.0, 9.0]},  # ended early, and stays as it was
    ]
    steps, values = on_one_grid(rows, "true")
    assert steps.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [[0, 10, 20, 30], [7, 7, 9, 9]]


def test_the_figure_names_every_arm_and_marks_every_alarm():
    figure = curves(ROWS)
    above, below = figure.axes
    assert {text.get_text() for text in below.texts} == {"frozen", "guarded"}
    dots = [line.get_xdata().tolist() for line in below.lines if line.get_marker() == "o"]
    assert sum(map(len, dots)) == 10
    drawn = [line.get_ydata().tolist() for line in above.lines if line.get_linewidth() > 2]
    assert drawn == [[0, 50, 90], [0, 50, 90]]
    true = [line.get_ydata().tolist() for line in below.lines if line.get_linewidth() > 2]
    assert true == [[100, 150, 200, 92, 100], [100, 150, 180, 190, 188]]


def test_what_is_left_behind(tmp_path):
    text = write_tables(ROWS, tmp_path, About("rewardmodels study drift", 5, {}))
    assert "| guarded | 188 (" in text
    assert "| 0.500 (0.4" in text
    assert "No video: Hopper doesn" in (tmp_path / "report.html").read_text()
    lines = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert len(lines) == 30
    last = [line for line in lines if line["arm"] == "guarded" and line["step"] == "30"]
    assert {line["alarms"] for line in last} == {"2"}
    name = "return-while-training-on-the-learned-reward"
    assert (tmp_path / "figures" / f"{name}.pdf").stat().st_size > 1000
    assert (tmp_path / "figures" / f"{name}.svg").exists()


def test_the_video_is_of_median_seeds_and_counts_the_true_return(tmp_path):
    """Of each arm that seed whose state, drawn, and rewards, summed, are told from the others'."""
    rows = [
        made_up(arm, seed, (100, 90, 80), final)
        | {"states": [[0, 1.25 + seed / 10, *[0] * 10]] * 3, "rewards": [1.0 + seed, 2.0, 4.0]}
        for arm, finals in (("frozen", (60.0, 50.0, 40.0)), ("guarded", (80.0, 70.0, 99.0)))
        for seed, final in enumerate(finals)
    ]
    write_tables(rows, tmp_path, About("rewardmodels study drift", 3, {}))
    page = (tmp_path / "report.html").read_text()
    if "No video" in page:
        pytest.skip("nothing here draws")
    assert "frozen 8 (seed 1), guarded 7 (seed 0)" in page
    with av.open(tmp_path / "frozen-guarded.mp4") as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 3
    height, width, _ = frames[0].shape
    assert width == 2 * (height - 48)
    # The states stand still, so only the words above change; and the two arms' heights differ.
    change = np.abs(frames[2].astype(int) - frames[0]).max(2) > 100
    assert change[:48].any()
    assert not change[48:].any()
    assert np.abs(frames[0][48:, :320].astype(int) - frames[0][48:, 320:]).max() > 60


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    file = tmp_path_factory.mktemp("agent") / "agent.safetensors"
    task = find_task("HalfCheetah")
    train(Task(task.name, task.env_id, 64), 0, file)
    return str(file)


def cell(agent, arm, **settings):
    return drift_cell(
        **{
            "task": "HalfCheetah", "arm": arm, "seed": 3, "predictor": "LaplaceHead",
            "comparisons": 8, "more": 8, "batch": 4, "length": 5, "kappa": 2.0, "level": 0.0,
            "alpha": 0.05, "steps": 3 * 2048, "horizon": 64, "agent": agent,
        } | settings
    )  # fmt: skip


@pytest.fixture(scope="module")
def frozen(agent):
    return cell(agent, "frozen", steps=2048)


@pytest.mark.parametrize("arm", ["frozen", "continued", "when unsure"])
def test_arms_ask_as_they_say(agent, arm):
    found = cell(agent, arm)
    assert found["step"] == [2048, 4096, 6144]
    wanted = {"frozen": [8, 8, 8], "continued": [8, 12, 16], "when unsure": [8, 12, 16]}
    assert found["comparisons"] == wanted[arm]
    assert found["alarms"] == []
    assert np.shape(found["states"]) == (64, 18)


@pytest.mark.parametrize(("arm", "paid"), [("zero", 0.0), ("constant", 64.0), ("random", None)])
def test_rewards_that_say_nothing(agent, frozen, arm, paid):
    found = cell(agent, arm, steps=2048)
    assert found["asked"] == 0
    assert found["std"] == [0]
    assert found["start"] == frozen["start"]
    assert found["true"] == frozen["true"], "the first rollout knows no reward yet"
    if paid is None:  # the mean of 32 sums of 64 normal numbers
        assert 0 < abs(found["predicted"][0]) < 5 * np.sqrt(64 / 32)
    else:
        assert found["predicted"] == [paid]


def test_the_episode_kept_is_the_median_one(agent, monkeypatch):
    from experiments.studies import drift

    played, play = [], drift._Training.play
    monkeypatch.setattr(
        drift._Training, "play", lambda self: (played.append(play(self)), played[-1])[1]
    )
    found = cell(agent, "zero", steps=2048)
    returns = played[-1].returns.numpy()
    assert np.sum(returns < sum(found["rewards"]) - 1e-3) == 31
    assert np.sum(returns > sum(found["rewards"]) + 1e-3) == 32
    which = int(np.abs(returns - sum(found["rewards"])).argmin())
    assert found["states"] == played[-1].states[which].tolist()


def test_arms_start_alike_and_repeat(agent, frozen):
    assert frozen == cell(agent, "frozen", steps=2048)
    pessimistic = cell(agent, "pessimistic", steps=2048)
    assert pessimistic["start"] == frozen["start"]
    assert pessimistic["true"] == frozen["true"], "the first rollout knows no reward yet"
    assert pessimistic["predicted"] != frozen["predicted"]


def test_a_guard_that_is_never_alarmed_changes_nothing(agent):
    frozen, guarded = cell(agent, "frozen", steps=4096), cell(agent, "guarded", steps=4096)
    assert guarded["alarms"] == []
    assert guarded["true"] == frozen["true"]
    assert guarded["final"] == frozen["final"]


def test_a_guard_asks_until_the_budget_is_spent(agent, monkeypatch):
    """Every frame is strange: each alarm costs a batch, the one after the last ends it."""

    def always(training, episodes, alpha):
        frames = torch.cat([episodes.observations, episodes.actions], -1)
        return Monitor(Mahalanobis().fit(frames[0]), threshold=Threshold(-1e9))

    monkeypatch.setattr("experiments.studies.drift._Training.monitor", always)
    found = cell(agent, "guarded")
    assert found["alarms"] == [32, 64, 96], "at the first step of each copy"
    assert found["step"] == [32, 64, 96]
    assert found["comparisons"] == [8, 12, 16]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"seeds": 0}, InvalidInput),
        ({"steps": 0}, InvalidInput),
        ({"batch": 9, "more": 8}, InvalidInput),
        ({"kappa": -1}, InvalidInput),
        ({"arms": ["thawed"]}, UnknownName),
        ({"predictor": "Oracle"}, UnknownName),
        ({"task": "Croquet"}, UnknownName),
    ],
)
def test_refuses_before_it_trains(tmp_path, settings, error):
    with pytest.raises(error):
        study_drift(out=tmp_path, **settings)
    assert not list(tmp_path.iterdir())
