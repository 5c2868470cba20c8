"""The benchmark of speed: what it times gives right results, and every figure has its key."""

import json

import pytest

from active import Uniform
from experiments.benchmarks import speed
from experiments.cli import main
from ood import KNN
from rewardmodels.saving import PREDICTORS


@pytest.mark.slow
def test_scored_pairs_are_right_and_fit_into_memory():
    numbers = speed.score_pairs()
    assert numbers["pairs"] == 1000 * 999 / 2
    assert numbers["pairs_peak_mib"] < 1024
    assert numbers["pairs_max_error"] < 1e-5


def test_a_fitted_detector_keeps_what_it_says():
    cost = speed.detector_scale(lambda: KNN(frames=100), 3000)
    # 100 frames of 40 numbers in single precision, and little else.
    assert 100 * 40 * 4 < cost["memory_million_mb"] * 2**20 < 3 * 100 * 40 * 4
    assert speed.seconds_to_select(Uniform(), clips=30, n=5) > 0


@pytest.mark.slow
def test_the_quick_benchmark_has_every_key(tmp_path):
    assert main(["benchmark", "speed", "--quick", "--json", str(tmp_path / "f.json")]) == 0
    numbers = json.loads((tmp_path / "f.json").read_text())
    keys = [
        *("throughput_ratio", "pairs_seconds", "greedy_seconds"),
        *("kcenter_seconds", "guard_step_us", "guard_step_share", "fit_million_seconds"),
        *(
            f"{key}.{name}"
            for key in ("frame_us", "novelty_fit", "novelty_clips")
            for name in PREDICTORS
        ),
    ]
    assert all(numbers[key] > 0 for key in keys)
    # The growth of the process's peak: none where an earlier test needed as much.
    assert numbers["pairs_peak_mib"] >= 0
