"""The study of backflips: its key numbers over seeds, and runs that resume."""

import pytest

from experiments import studies
from experiments.studies import backflip as study


def test_figures_are_interquartile_means_over_seeds(tmp_path, monkeypatch):
    made = []

    def learn(config, *, resume, progress):
        made.append((config.task, config.seed, config.comparisons, config.steps, resume))
        return {
            "backflips_per_1000_steps": config.seed**2,
            "comparisons": 900 - config.seed,
            "reward_correlation": 0.9,
            "wall_seconds": 2.0,
        }

    monkeypatch.setattr(study, "learn", learn)
    started = tmp_path / "runs" / "seed-1-900-comparisons-default-steps"
    started.mkdir(parents=True)
    (started / "config.yaml").touch()
    settings = study.Settings(runs=tmp_path / "runs")
    run = studies.Run(tmp_path / "study")
    numbers = studies.run_study(study, settings, run, progress=False).numbers
    assert made == [("backflip", seed, 900, 1_000_000, seed == 1) for seed in range(5)]
    assert numbers["backflips"] == pytest.approx((1 + 4 + 9) / 3)
    low, high = numbers["backflips_interval"]
    assert 0 <= low < numbers["backflips"] < high <= 16
    assert numbers["backflips_comparisons"] == 900
    assert numbers["backflips_wall_seconds"] == 10
    assert numbers["backflips_by_seed"][4] == 16
