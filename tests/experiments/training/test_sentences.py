"""Sentences have the numbers of the run's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.analysis import figures
from experiments.training import sentences
from experiments.training.run_directory import RunDirectory
from experiments.training.sentences import headline

from ..made_runs import column, make_run


def test_headline_has_the_results_numbers(demo: dict[str, Path]) -> None:
    text = headline(
        RunDirectory(demo["learned"]), [RunDirectory(demo["zero"]), RunDirectory(demo["task"])]
    )
    assert text == (
        "After 100 comparisons and 500,000 steps the agent reaches 812 (zero reward: −12; the "
        "task's own reward: 900): the mean true return of 10 evaluation episodes, from 794 to 830. "
        "That is 90% of the way from zero reward to the task's own reward."
    )  # (812.4 + 12) / (900 + 12) = 0.904; 812.4 ± 18 are 794.4 and 830.4


def test_headline_of_the_other_arms(demo: dict[str, Path]) -> None:
    text = headline(RunDirectory(demo["zero"]))
    assert text.startswith("After 500,000 steps the agent, trained on zero reward, reaches −12:")


def test_runs_of_one_arm_are_told_apart(tmp_path: Path) -> None:
    runs = [RunDirectory(make_run(tmp_path / f"s{s}", seed=s, video=False)) for s in (3, 4)]
    assert sentences.labels(runs) == ["learned reward, seed 3", "learned reward, seed 4"]
    same = [runs[0], RunDirectory(make_run(tmp_path / "again", seed=3, video=False))]
    assert sentences.labels(same) == ["learned reward, s3", "learned reward, again"]


def test_runs_of_one_arm_share_a_label_and_a_range(tmp_path: Path) -> None:
    runs = [
        RunDirectory(
            make_run(tmp_path / str(s), seed=s, final=700.0 + s, video=False, rounds=5 + s)
        )
        for s in range(4)
    ]
    assert "reaches 700 (3 other runs on learned reward: 701 to 703):" in headline(
        runs[0], runs[1:]
    )
    assert "reaches 700 (another run on learned reward: 702):" in headline(runs[0], runs[2:3])
    ends = sorted(column(run.path, "task_return")[-1] for run in runs)
    assert sentences.sentence_steps(runs) == (
        "In the last round an episode of training returns on average "
        f"{ends[0]:.0f} to {ends[-1]:.0f} with learned reward, 4 runs "
        "(at 100,000 to 160,000 steps)."
    )
    axes = figures.return_vs_steps(runs).axes[0]
    assert [text.get_text() for text in axes.texts] == ["learned\nreward, 4 runs"]


@pytest.mark.parametrize("n", [1, 2, 11])
def test_frames_that_are_few_or_all_alike(n: int) -> None:
    frames = {name: np.ones(n) for name in ("predicted", "std", "true")}
    figures.predicted_vs_true(frames)
    assert "no correlation" in sentences.sentence_frames(frames)
