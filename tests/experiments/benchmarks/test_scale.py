"""The benchmark of scale, on a few short items."""

import json
import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from experiments.benchmarks import scale
from experiments.cli import main


def test_the_baseline_predicts_as_a_logistic_regression_does(tmp_path):
    file = tmp_path / "items.npy"
    returns = scale.write_items(file, 8000 + 1000, 8)
    matrix, draw = np.load(file), np.random.default_rng(0)
    pairs = draw.permutation(8000).reshape(4000, 2)
    answers = (draw.random(4000) < expit(returns[pairs[:, 1]] - returns[pairs[:, 0]])).astype(float)
    weights = scale._ridge(matrix, pairs, answers)
    rival = LogisticRegression().fit(matrix[pairs[:, 1]] - matrix[pairs[:, 0]], answers).coef_[0]
    new = matrix[8000:]
    assert np.corrcoef(new @ weights, new @ rival)[0, 1] > 0.99
    assert np.std(new @ weights) == pytest.approx(np.std(new @ rival), rel=0.2)


def test_a_row_has_scores_that_follow_the_truth(tmp_path):
    file = tmp_path / "items.npy"
    returns = scale.write_items(file, 400 + 200, 4)
    row = scale.measure(file, returns, scale.Setting("LaplaceHead", 200, 400, threads=1))
    best = scale._scores(scale._difference(returns[-200:], scale._test_pairs(200)), returns[-200:])
    assert 0.6 < row["accuracy"] < best["accuracy"] + 0.02
    assert best["log_loss"] < row["log_loss"] < math.log(2)


@pytest.mark.slow
def test_the_quick_benchmark_has_every_figure(tmp_path, capsys):
    file = tmp_path / "scale.json"
    flags = ["--predictors", "[LaplaceHead]", "--threads", "1", "--folder", str(tmp_path)]
    assert main(["benchmark", "scale", "--quick", "--json", str(file), *flags]) == 0
    figures = json.loads(file.read_text())
    assert 0.5 < figures["accuracy.LaplaceHead.300"] <= figures["accuracy.true returns.300"] + 0.02
    for name in ("fit_seconds", "score_seconds", "anonymous_mib", "resident_mib", "load"):
        assert figures[f"{name}.LaplaceHead.100"] > 0
    assert "| LaplaceHead | 300 | 600 |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]  # the matrix is gone
