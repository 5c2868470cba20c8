"""Published figures beside ours: those that stand in the file, and frames counted by hand."""

import numpy as np
import pytest

from experiments.benchmarks.guard_published import NEAREST, THEIRS, compare_published, frame_figures
from experiments.envs.guard_episodes import train
from experiments.envs.shifts import Shift
from experiments.envs.tasks import find_task
from rewardmodels import InvalidInput

HEADER = (
    "env,mod,PEDM_auroc,PEDM_ap,PEDM_fpr95,KNN_auroc,KNN_ap,KNN_fpr95,GMM_auroc,GMM_ap,GMM_fpr95"
)


def test_figures_of_frames_are_those_of_all_pairs():
    draw = np.random.default_rng(0)
    values, onsets = draw.normal(size=(6, 20)), np.array([3, 5, 9, 12, 19, 2])
    before, after = [], []
    for row, onset in zip(values, onsets, strict=True):
        row[onset:] += 0.7
        before += row[:onset].tolist()
        after += row[onset:].tolist()
    auroc, ap, fpr = frame_figures(values, onsets)
    assert auroc == pytest.approx(np.mean([a > b for a in after for b in before]))
    level = np.sort(after)[int(len(after) * 0.05)]
    assert fpr == pytest.approx(np.mean(np.array(before) >= level), abs=0.02)
    precision = [sum(a >= x for a in after) / sum(v >= x for v in after + before) for x in after]
    assert ap == pytest.approx(np.mean(precision))


def test_their_figures_stand_beside_ours(tmp_path, capsys):
    agent, file = tmp_path / "agent.safetensors", tmp_path / "published.csv"
    train(find_task("HalfCheetah"), 0, agent)
    lines = [f"{THEIRS},{mod},0.97,0.96,0.06,0.91,0.9,0.1,0.93,0.5,0.4"
             for mod in ("bm_factor_severe", "act_factor_severe")]  # fmt: skip
    file.write_text("\n".join([HEADER, *lines]))
    text = compare_published(
        file, agent, detector="Mahalanobis", familiar=2, calibration=13, tests=2, horizon=12,
        out=tmp_path / "table.md",
    )  # fmt: skip
    assert text.count("| 0.97 / 0.96 / 0.06 | 0.93 / 0.50 / 0.40 (GMM) | ") == 2
    assert (tmp_path / "table.md").read_text() == text
    assert "What differs" in capsys.readouterr().out


def test_words_say_what_the_shifts_are():
    assert Shift("mass", "mild").amount == 1.5
    assert Shift("strength", "middle").amount == 0.5
    assert set(NEAREST) == {("mass", "mild"), ("strength", "middle")}


def test_a_file_without_their_rows_is_refused_first(tmp_path):
    (tmp_path / "other.csv").write_text(HEADER)
    with pytest.raises(InvalidInput, match="published: expected a row with env MJHalfCheetah-v0"):
        compare_published(tmp_path / "other.csv", tmp_path / "none.safetensors")
