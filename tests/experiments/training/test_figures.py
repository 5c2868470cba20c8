"""Figures show what the run's files hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams

from experiments.analysis import plots
from experiments.analysis.plots import ARMS, spread_labels
from experiments.training import report as figures
from experiments.training.run_directory import RunDirectory

from ..made_runs import column


def test_lines_are_the_csvs_columns(demo: dict[str, Path]) -> None:
    runs = [RunDirectory(demo[arm]) for arm in ("learned", "zero", "task")]
    lines = figures.return_vs_steps(runs).axes[0].lines
    for line, arm in zip(lines, ("learned", "zero", "task"), strict=True):
        # The first round has no finished episode.
        np.testing.assert_array_equal(line.get_xdata(), column(demo[arm], "step")[1:])
        np.testing.assert_array_equal(line.get_ydata(), column(demo[arm], "task_return"))
        assert line.get_color() == ARMS[arm].colour

    learned, zero, task = figures.return_vs_comparisons(runs).axes[0].lines
    np.testing.assert_array_equal(learned.get_xdata(), column(demo["learned"], "comparisons")[1:])
    np.testing.assert_array_equal(learned.get_ydata(), column(demo["learned"], "task_return"))
    np.testing.assert_array_equal(zero.get_ydata(), [-12, -12])
    np.testing.assert_array_equal(task.get_ydata(), [900, 900])

    top, bottom = figures.held_out(runs[0]).axes
    accuracy, chance = top.lines
    np.testing.assert_array_equal(
        accuracy.get_ydata(), column(demo["learned"], "held_out_accuracy")
    )
    np.testing.assert_array_equal(chance.get_ydata(), [0.5, 0.5])
    for line, name in zip(bottom.lines, ("held_out_log_loss", "train_log_loss"), strict=False):
        np.testing.assert_array_equal(line.get_xdata(), column(demo["learned"], "comparisons"))
        np.testing.assert_array_equal(line.get_ydata(), column(demo["learned"], name))
    np.testing.assert_allclose(np.asarray(bottom.lines[2].get_ydata()), -np.log([0.5, 0.5]))


def test_every_frame_is_in_the_density(demo: dict[str, Path]) -> None:
    frames = RunDirectory(demo["learned"]).frames
    axes = figures.predicted_vs_true(frames).axes[0]
    assert np.sum(np.asarray(axes.collections[0].get_array())) == 3000
    means = axes.lines[0]  # tenths of 3000 ordered frames: 300 each
    by_true = np.argsort(frames["true"], kind="stable").reshape(10, 300)
    np.testing.assert_allclose(np.asarray(means.get_xdata()), frames["true"][by_true].mean(1))
    np.testing.assert_allclose(np.asarray(means.get_ydata()), frames["predicted"][by_true].mean(1))


def test_figures_leave_matplotlibs_settings_alone(demo: dict[str, Path], tmp_path: Path) -> None:
    before = dict(rcParams)
    plots.save(figures.predicted_vs_true(RunDirectory(demo["learned"]).frames), tmp_path / "a")
    assert dict(rcParams) == before


def test_figures_are_files_too_and_the_same_each_time(
    demo: dict[str, Path], tmp_path: Path
) -> None:
    names = {
        *("true-return-while-training", "true-return-against-comparisons"),
        *("held-out-comparisons", "learned-against-true-reward"),
    }
    files = {f.name: f.read_bytes() for f in (demo["learned"] / "figures").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    assert all(files[f"{name}.pdf"].startswith(b"%PDF") for name in names)
    again = figures.predicted_vs_true(RunDirectory(demo["learned"]).frames)
    plots.save(again, tmp_path / "again")
    for kind in ("svg", "pdf"):
        assert (tmp_path / f"again.{kind}").read_bytes() == files[
            f"learned-against-true-reward.{kind}"
        ]


def test_spread_keeps_order_and_distance() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        centres, halves = rng.uniform(0, 60, 6), rng.uniform(2, 8, 6)
        placed = np.array(spread_labels(centres.tolist(), halves.tolist()))
        order = np.argsort(centres)
        gaps = np.diff(placed[order]) - (halves[order][1:] + halves[order][:-1])
        assert (gaps > -1e-9).all()
    assert spread_labels([40.0, 0.0], [5.0, 5.0]) == [40.0, 0.0]


@pytest.mark.parametrize("n", [1, 2, 11])
def test_frames_may_be_few_or_all_alike(n: int) -> None:
    frames = {name: np.ones(n) for name in ("predicted", "std", "true")}
    axes = figures.predicted_vs_true(frames).axes[0]
    assert np.sum(np.asarray(axes.collections[0].get_array())) == n
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), 1)
