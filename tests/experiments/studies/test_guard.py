"""The study of guards: scores by hand, episodes that pair up, and a small study end to end."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import studies
from experiments.datasets.pools import Pool
from experiments.envs.perturbations import perturb
from experiments.envs.rollout import play
from experiments.envs.tasks import TASKS, find_task, make_env
from experiments.studies import guard as study
from ood import CUSUM, Guard, Mahalanobis, Monitor, Spike, calibrate
from ood.conformal import episode_maxima
from rewardmodels import Clips

SHORT = replace(TASKS["Reacher"], horizon=20)


def usual_world():
    return make_env(SHORT)


def act(observations, noise):
    return np.tanh(observations[:, :2] + 0.1 * noise)


def test_an_alarm_before_the_onset_neither_finds_nor_misses():
    usual = np.zeros((4, 6))
    usual[0, 1] = 5.0  # a false alarm before the onset is one too
    other = np.zeros((3, 6))
    other[0, 3] = 5.0  # found at once
    other[1, [2, 4]] = 5.0  # an alarm before the onset
    other[2, 5] = 5.0
    assert study.detection_scores(usual, other, 2.0, onset=3) == {
        "found": 1.0, "found_of_all": pytest.approx(2 / 3), "delay": 2.0, "auroc": 1.0,
        "fpr_at_95_tpr": 0.0, "false_alarms": 0.25,
    }  # fmt: skip
    none = study.detection_scores(np.zeros((2, 4)), np.zeros((2, 4)), 1.0, onset=2)
    assert (none["found"], none["delay"], none["auroc"]) == (0.0, None, 0.5)
    before = study.detection_scores(np.zeros((2, 3)), np.array([[9.0, 0, 9]]), 1.0, onset=1)
    assert (before["found"], before["found_of_all"], before["delay"]) == (0.0, 0.0, None)


def test_auroc_and_false_positive_rate_by_counting_pairs():
    draw = np.random.default_rng(0)
    usual, other = draw.normal(size=(50, 10)), draw.normal(0.5, size=(40, 10))
    scores = study.detection_scores(usual, other, 9.0, onset=4)
    wins = [b[4:].max() > a[4:].max() for a in usual for b in other]
    assert scores["auroc"] == pytest.approx(np.mean(wins))
    level = np.sort(other[:, 4:].max(1))[2]  # 38 of 40 are at or above it
    assert scores["fpr_at_95_tpr"] == pytest.approx((usual[:, 4:].max(1) >= level).mean())


def test_episodes_pair_up_until_the_onset():
    every = play(usual_world, act, 4, seed=3)
    other = play(lambda: perturb(usual_world(), "mass", "severe", 12, 0), act, 2, seed=3, first=2)
    for usual, changed in zip(every.features()[2:], other.features(), strict=True):
        np.testing.assert_array_equal(usual[:12], changed[:12])
        assert (usual[12:] != changed[12:]).any()
        # Before, action and after: what follows one step is what comes before the next.
        np.testing.assert_array_equal(usual[1:, :10], usual[:-1, 12:])
    np.testing.assert_array_equal(every.rewards[2:, :12], other.rewards[:, :12])
    assert len({tuple(episode[0, :10].tolist()) for episode in every.features()}) == 4


def test_halted_episodes_earn_what_a_guard_lets_them_earn():
    """Step by step under `ood.Guard`, against the alarms of a monitor that only watched."""
    episodes = play(usual_world, act, 30, seed=0).features()
    monitor = Monitor(Mahalanobis().fit(torch.cat(episodes[:10])), CUSUM())
    threshold = monitor.calibrate(episodes[10:], alpha=0.1).value

    def changed():
        return perturb(usual_world(), "bias", "middle", 10, 0, observation_std=np.ones(10))

    other = play(changed, act, 3, seed=1)
    alarms = study._along(monitor, other.features()) > threshold
    halts = np.where(alarms.any(1), alarms.argmax(1) + 1.0, np.inf)
    assert np.isfinite(halts).any()
    halted = play(changed, act, 3, seed=1, halts=halts)
    assert (halted.rewards != other.rewards).any()
    for number, rewards in enumerate(halted.rewards):
        first, chance = np.random.SeedSequence([1, number]).generate_state(2)
        env, draw = Guard(changed(), monitor, "transition"), np.random.default_rng(int(chance))
        observation, _ = env.reset(seed=int(first))
        for step, expected in enumerate(rewards):
            action = act(observation[None], draw.standard_normal((1, 2)))[0]
            observation, reward, *_, info = env.step(action)
            assert reward == expected
            assert (info["guard"]["acting"] == "halted") == (step + 1 >= halts[number])


def test_the_limit_is_that_of_scores_that_keep_the_promise():
    draw, rates = np.random.default_rng(0), []
    for _ in range(400):
        alarms = 0
        for _ in range(3):
            maxima = draw.standard_normal(52 - 13)
            alarms += (draw.standard_normal(40) > np.sort(maxima)[37]).sum()
        rates.append(alarms / 120)
    limit = study.highest_rate(0.05, 3, 52, 40)
    assert np.mean(np.array(rates) <= limit) == pytest.approx(0.96, abs=0.03)
    assert np.mean(rates) == pytest.approx(0.05, abs=0.006)


def test_false_alarms_are_those_of_each_calibrations_own_episodes(small, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    episodes = list(torch.randn(5 + 4 * 31, 10, 22, generator=draw, dtype=torch.double))
    batch = SimpleNamespace(features=lambda: episodes)
    monkeypatch.setattr(study, "play_batch", lambda *_: batch)
    rows = study.cell(small, "promise", "Reacher", "Mahalanobis", 0)
    detector, alarms = Mahalanobis().fit(torch.cat(episodes[:5])), 0
    for start in range(5, len(episodes), 31):
        own = episodes[start : start + 31]
        threshold = calibrate([detector.score(x) for x in own[:26]], Spike(), small.alpha)
        maxima = episode_maxima([detector.score(x).numpy() for x in own[26:]], Spike(), threshold)
        alarms += (maxima > threshold.value).sum()
    rates = {row["statistic"]: row["false_alarms"] for row in rows}
    assert rates["Spike"] == alarms / 20


def test_frame_scores_by_counting_pairs():
    draw = np.random.default_rng(0)
    truth, values = draw.random(200) < 0.4, draw.normal(size=200)
    values[truth] += 0.7
    auroc, precision, fpr = study._ranking(truth, values)
    after, before = values[truth], values[~truth]
    assert auroc == pytest.approx(np.mean([a > b for a in after for b in before]))
    level = np.sort(after)[int(len(after) * 0.05)]
    assert fpr == pytest.approx(np.mean(before >= level), abs=0.03)
    assert precision == pytest.approx(np.mean([sum(after >= x) / sum(values >= x) for x in after]))


def test_the_report_by_hand():
    common = {
        "part": "detection", "task": "T", "detector": "KNN", "statistic": "CUSUM",
        "severity": "middle", "auroc": 0.5, "fpr_at_95_tpr": 0.25, "false_alarms": 0.0,
        "usual_return": 10.0, "headline": ["KNN", "CUSUM"],
    }  # fmt: skip
    mass = {**common, "shift": "mass", "halted_return": 8.0}
    push = {**common, "shift": "push", "found": 0.75, "found_of_all": 0.75, "delay": 2.0,
            "halted_return": 0.0, "shifted_return": 9.0}  # fmt: skip
    rows = [
        {**mass, "seed": 0, "found": 0.5, "found_of_all": 0.5, "delay": 4.0, "shifted_return": 7.0},
        {**mass, "seed": 1, "found": 0.0, "found_of_all": 0.0, "shifted_return": 8.0},
        {**push, "seed": 0},
        {**push, "seed": 1},
    ]
    report = study.report(pd.DataFrame(rows))
    [line] = report.sections[0].table.to_dict("records")
    assert line["found"] == pytest.approx((0.5, 0.375, 0.625))
    assert line["harm prevented"] == pytest.approx((16 - 15) / (20 - 15))
    assert report.numbers["found"] == report.numbers["found.T"] == 0.25
    assert report.numbers["shifts_found"] == 0.5
    assert report.numbers["found_harmless"] == 0.75
    assert report.numbers["median_delay_steps"] == 4.0
    assert report.numbers["shifts.T"]["mass"]["lost"] == pytest.approx(0.25)


def pool():
    draw = torch.Generator().manual_seed(0)
    frames = torch.randn(28, 60, 2, generator=draw)
    clips = Clips(frames, torch.zeros(28, 60, 1), rewards=frames @ torch.tensor([1.0, -2.0]))
    return Pool("Reacher", 0, clips, torch.arange(7).repeat_interleave(4), torch.arange(7))


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "find_pool", lambda *_, **__: pool())
    published = tmp_path / "published.csv"
    published.write_text(
        "env,mod,PEDM_auroc,PEDM_ap,PEDM_fpr95\n"
        + "".join(f"MJHalfCheetah-v0,{mod},0.97,0.96,0.06\n" for mod in study.PUBLISHED)
    )
    settings = study.Settings(
        tasks=["Reacher"], detectors=["Mahalanobis"], statistics=["CUSUM", "Spike"],
        shifts=["mass", "bias"], severities=["middle", "severe"], alpha=0.1, steps=0, horizon=20,
        onset=10, familiar=20, calibration=14, tests=2, seeds=2, promise_share=0.01, pairs=50,
        headline=("Mahalanobis", "CUSUM"), published=published, agents=tmp_path / "agents",
        pools=tmp_path / "pools",
    )  # fmt: skip
    study.prepare(settings)
    return settings


@pytest.mark.slow
def test_a_small_study_has_rows_of_everything_and_resumes(small, tmp_path, monkeypatch, capsys):
    run = studies.Run(tmp_path / "study")
    report = studies.run_study(study, small, run, progress=False)
    rows = pd.read_csv(run.out / "results.csv")
    detection = rows[rows["part"] == "detection"]
    assert len(detection) == 16
    assert (detection.loc[detection["shift"] == "bias", "auroc"] == 1.0).all()
    assert {"found.Reacher", "false_alarm.Reacher.Mahalanobis.Spike",
            "confident_mispredictions"} <= set(report.numbers)  # fmt: skip
    assert "With Spike" in (run.out / "report.html").read_text()
    monkeypatch.setattr(study, "load_policy", None)
    again = studies.run_study(study, small, run, report_only=True)
    assert again.numbers == report.numbers


def test_published_numbers_stand_beside_ours(small):
    cheetah = replace(small, tasks=["HalfCheetah"], shifts=None)
    study.train_agent(find_task("HalfCheetah"), 0, cheetah.agent("HalfCheetah"))
    short = replace(find_task("HalfCheetah"), horizon=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "replace", lambda *_, **__: short)
        rows = study.cell(cheetah, "published", "HalfCheetah", "Mahalanobis", 0)
    assert [row["auroc"] for row in rows if row["scorer"] == "PEDM"] == [0.97, 0.97]
    assert len(rows) == 2 * 3


def test_shifts_that_a_task_cannot_show_are_left_out():
    assert set(study._shifts(TASKS["Reacher"], None, ["middle"])) == {
        "mass", "damping", "strength", "dead_actuator", "noise", "bias", "frozen_sensor", "delay",
        "push",
    }  # fmt: skip
