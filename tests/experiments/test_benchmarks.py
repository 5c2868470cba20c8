"""The benchmark's figures are what they are called, and what they promise holds."""

import json

import numpy as np
import pytest

from experiments.analysis.old_stats import interquartile_mean
from experiments.benchmarks import learn as benchmark
from rewardmodels import InvalidInput


@pytest.fixture
def made_up(monkeypatch):
    """Runs that end at once, with a return that tells them apart; returns what was run."""
    ran = []

    def learn(config, *, resume, progress):
        ran.append((config.task, config.reward, config.seed, config.steps, config.out.name, resume))
        level = {"learned": 90, "task": 100, "zero": 10}[config.reward]
        return {"final_return": level + config.seed**2}

    monkeypatch.setattr(benchmark, "learn", learn)
    return ran


def test_ratios_are_of_interquartile_means_over_seeds(made_up, tmp_path, capfd):
    figures = benchmark.compare_arms(
        tmp_path, ("Hopper", "Ant"), 5, 123, 1, ("learned", "task", "zero")
    )
    # Of 0, 1, 4, 9, 16 the middle three are left.
    assert figures["return_ratio.Hopper"] == pytest.approx((90 + 14 / 3) / (100 + 14 / 3))
    assert figures["return.Ant.zero"] == pytest.approx(10 + 14 / 3)
    assert figures["returns.Ant.task"] == [100, 101, 104, 109, 116]
    low, high = figures["return_ratio_interval.Ant"]
    assert low < figures["return_ratio.Ant"] < high
    assert len(set(made_up)) == len(made_up) == 2 * 5 * 3
    assert "30/30" in capfd.readouterr().err


def test_runs_that_are_there_are_gone_on_with(made_up, tmp_path):
    there = tmp_path / "Hopper-task-1"
    there.mkdir()
    (there / "config.yaml").touch()
    benchmark.compare_arms(tmp_path, ("Hopper",), 2, 123, 1, ("learned", "task"))
    assert [name for *_, name, resume in made_up if resume] == ["Hopper-task-1"]


def test_figures_are_printed_and_written_flat(made_up, tmp_path, capsys, monkeypatch):
    file = tmp_path / "figures.json"
    figures = benchmark.benchmark_learn(json=file, out=tmp_path, seeds=2, jobs=1)
    written = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == written
    for task in benchmark.TASKS:
        values = np.array([90.0, 91.0]), np.array([100.0, 101.0])
        ratio = interquartile_mean(values[0]) / interquartile_mean(values[1])
        assert written[f"return_ratio.{task}"] == figures[f"return_ratio.{task}"] == ratio


def test_what_cant_be_measured_or_written_is_refused_before_any_work(made_up, tmp_path):
    for name in ("seeds", "steps", "jobs"):
        with pytest.raises(InvalidInput, match=f"{name}: expected a number of at least 1, got 0"):
            benchmark.benchmark_learn(**{name: 0})
    with pytest.raises(InvalidInput, match="json: expected a file in a directory that exists"):
        benchmark.benchmark_learn(json=tmp_path / "none" / "figures.json")
    assert made_up == []
