"""The benchmark of guards: limits against simulation, costs that are there, keys that are named."""

import json

import numpy as np
import pytest
import torch

from experiments.benchmarks import guard as benchmark
from experiments.benchmarks import guard_promise
from experiments.benchmarks.guard_cost import scale_cost
from experiments.cli import main
from experiments.envs.guard_episodes import train
from experiments.envs.tasks import find_task
from ood import KNN, Mahalanobis, Spike, calibrate
from ood.conformal import episode_maxima
from rewardmodels import InvalidInput, UnknownName


def test_the_limit_is_that_of_scores_that_keep_the_promise():
    draw, rates = np.random.default_rng(0), []
    for _ in range(400):
        alarms = 0
        for _ in range(3):
            maxima = draw.standard_normal(52 - 13)
            alarms += (draw.standard_normal(40) > np.sort(maxima)[37]).sum()
        rates.append(alarms / 120)
    limit = guard_promise.highest_rate(3, 52, 40, draws=50_000)
    assert np.mean(np.array(rates) <= limit) == pytest.approx(0.96, abs=0.03)
    assert np.mean(rates) == pytest.approx(0.05, abs=0.006)


def test_rates_are_those_of_each_calibrations_own_episodes(tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    episodes = list(torch.randn(3 + 2 * 40, 10, 22, generator=draw, dtype=torch.double))
    monkeypatch.setattr(guard_promise, "play_batch", lambda *given: episodes)
    monkeypatch.setattr(guard_promise, "load_policy", lambda *given: None)
    found = guard_promise.false_alarm_rates(
        "Reacher", tmp_path, ["Mahalanobis"],
        calibrations=2, calibration=30, tests=10, familiar=3, horizon=10,
    )  # fmt: skip
    detector, alarms = Mahalanobis().fit(torch.cat(episodes[:3])), 0
    for own in (episodes[3:43], episodes[43:]):
        threshold = calibrate([detector.score(x) for x in own[:30]], Spike(), 0.05)
        maxima = episode_maxima([detector.score(x).numpy() for x in own[30:]], Spike(), threshold)
        alarms += (maxima > threshold.value).sum()
    assert found["Mahalanobis Spike"] == alarms / 20
    assert set(found) == {f"Mahalanobis {name}" for name in ("CUSUM", "EWMA", "MEWMA", "Spike")}


def test_episodes_in_batches_are_whole_and_apart(tmp_path):
    task = find_task("Pendulum")
    found = guard_promise.play_batch(task, lambda seen, noise: noise.clip(-2, 2), 3, seed=0)
    assert [tuple(x.shape) for x in found] == [(200, 7)] * 3
    for episode in found:
        torch.testing.assert_close(episode[1:, :3], episode[:-1, 4:])
    assert not torch.equal(found[0], found[1])


def test_costs_of_many_frames():
    cost = scale_cost(lambda: KNN(frames=100), 3000)
    assert cost["fit_seconds"] > 0
    assert 0 < cost["score_us"] < 1e5
    # 100 frames of 40 numbers in single precision, and little else.
    assert 100 * 40 * 4 < cost["memory_mb"] * 2**20 < 3 * 100 * 40 * 4


def test_harmless_shifts_are_counted_by_themselves():
    def shift(lost, found, delay, auroc):
        of_all = found / 2
        return {
            "lost": lost, "found": found, "found of all": of_all, "delay": delay, "auroc": auroc
        }  # fmt: skip

    shifts = [shift(0.2, 0.5, 4, 0.9), shift(0.9, 1.0, 2, 1.0), shift(0.3, 0.0, None, 0.5)]
    found = benchmark.summary([*shifts, shift(0.19, 0.25, 9, 0.6), shift(-1, 0.0, None, 0.5)])
    assert found == {
        "found": 0.5, "found_of_all": 0.25, "shifts_found": pytest.approx(2 / 3),
        "median_delay_steps": 3.0, "auroc": pytest.approx(0.8), "found_harmless": 0.125,
    }  # fmt: skip
    assert benchmark.summary([])["found"] is None


def test_every_figure_is_there_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "_QUICK_STEPS", 0)
    small = {"calibrations": 1, "calibration": 26, "tests": 2, "familiar": 2, "horizon": 8}
    monkeypatch.setattr(benchmark, "_QUICK_PROMISE", small)
    sizes = {"horizon": 8, "onset": 4, "familiar": 2, "calibration": 26, "tests": 2}
    monkeypatch.setattr(benchmark, "_QUICK_DETECTION", sizes)
    monkeypatch.setattr(benchmark, "worlds", lambda *given: ["bias"])
    step = {"step_us": 1.0, "share_of_step": 0.1, "policy_us": 1.0, "bare_step_us": 1.0}
    monkeypatch.setattr(benchmark, "step_cost", lambda *given, **more: step)
    cost = {"fit_seconds": 1.0, "score_us": 2.0, "memory_mb": 3.0}
    monkeypatch.setattr(benchmark, "scale_cost", lambda *given: cost)
    monkeypatch.setattr(benchmark, "make_pool", lambda *given, **more: None)
    passed = {"confident_errors": 4, "confident_errors_given": 1, "given": 50}
    monkeypatch.setattr(benchmark, "selective_cell", lambda **cell: passed)
    monkeypatch.setattr(
        benchmark, "run_study", lambda cell, cells, *rest, **more: [cell(**c) for c in cells]
    )
    monkeypatch.setattr(
        benchmark, "train", lambda task, steps, file: train(find_task("Reacher"), 0, file)
    )
    kept = {"drift_guard_kept": 0.9, "drift_frozen_kept": 0.6}
    monkeypatch.setattr(benchmark, "study_drift", lambda **settings: [])
    monkeypatch.setattr(benchmark, "drift_kept", lambda rows: kept)
    file = tmp_path / "figures.json"
    figures = benchmark.benchmark_guard(quick=True, json=file, tasks=["Reacher"])
    assert json.loads(file.read_text()) == json.loads(json.dumps(figures))
    assert figures["confident_mispredictions_passed"] == 0.25
    assert figures["confident_mispredictions_of_given"] == 0.02
    assert figures["score_million_us.KNN"] == 2.0
    assert 0 <= figures["false_alarm.Reacher.Mahalanobis.EWMA"] <= 1
    assert (figures["drift_kept"], figures["drift_lost"]) == (0.9, pytest.approx(0.4))
    assert figures["shifts.Reacher"]["bias"]["auroc"] >= 0
    assert {"found", "median_delay_steps", "auroc", "step_us", "share_of_step"} <= set(figures)
    assert (
        figures["rests_on"]["confident_mispredictions_passed"]
        == "4 confident mispredictions of 1,000 pairs"
    )
    assert "2 episodes for each of 1" in figures["rests_on"]["false_alarm.Reacher"]


@pytest.mark.slow
def test_the_quick_benchmark_runs_from_end_to_end(tmp_path, capsys):
    file = tmp_path / "figures.json"
    main(["benchmark", "guard", "--quick", "--json", str(file)])
    figures = json.loads(file.read_text())
    keys = {"found", "median_delay_steps", "auroc", "step_us", "share_of_step", "drift_kept",
            "drift_lost", "confident_mispredictions_passed", "fit_million_seconds",
            "score_million_us", "memory_million_mb"}  # fmt: skip
    assert keys <= set(figures["rests_on"])
    assert keys <= set(figures)
    # Of 40 episodes, a rate that is promised to be 0.05 on average.
    rate = figures["false_alarm.HalfCheetah.SmallDynamics.MEWMA"]
    assert 0 <= rate <= figures["false_alarm_limit"] + 0.1
    assert 0.5 < figures["found"] <= 1
    assert 0.7 < figures["auroc"] <= 1
    assert 1 <= figures["median_delay_steps"] <= 75
    assert 5 < figures["step_us"] < 5000
    assert 0 < figures["share_of_step"] < 10
    passed = figures["confident_mispredictions_passed"]
    assert passed is None or 0 <= passed <= 1
    for name in ("fit_million_seconds", "score_million_us", "memory_million_mb"):
        for detector in ("KNN", "Mahalanobis", "SmallDynamics"):
            assert figures[f"{name}.{detector}"] > 0


def test_what_cannot_be_used_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "train", None)
    for change, error, message in (
        ({"jobs": 0}, InvalidInput, "jobs: expected a number of at least 1"),
        ({"tasks": []}, InvalidInput, "tasks: expected a number of at least 1"),
        ({"tasks": ["Hoper"]}, UnknownName, "Did you mean 'Hopper'"),
        ({"json": tmp_path / "none" / "x.json"}, InvalidInput, "json: expected a file in a dir"),
    ):
        with pytest.raises(error, match=message):
            benchmark.benchmark_guard(out=tmp_path, **change)
