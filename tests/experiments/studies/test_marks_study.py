"""The study of marks: its savings against curves made by hand, and a small one from end to end."""

import math

import numpy as np
import pytest
import torch

from experiments.analysis.page import About
from experiments.datasets.pools import Pool
from experiments.studies import marks as study
from experiments.studies.marks import marks_cell, study_marks
from experiments.studies.marks_tables import marks_saving, worth, write_tables
from rewardmodels import Clips, InvalidInput

COUNTS = [10, 20, 40, 80]


def rows(ahead: float, seeds: int = 6, tasks: tuple[str, ...] = ("A", "B")) -> list[dict]:
    """Accuracy 0.5 + 0.005 a comparison, reached with marks at `ahead` times as many."""
    draw = np.random.default_rng(0)
    found = []
    for task in tasks:
        for seed in range(seeds):
            luck = float(draw.normal(0, 1e-4))
            found += [
                {"task": task, "marked": marked, "seed": seed, "predictor": "P", "counts": COUNTS,
                 "marks": [2 * marked * n for n in COUNTS],
                 "accuracy": [0.5 + 0.005 * n * rate + luck for n in COUNTS],
                 "log loss": [0.5] * 4, "frame correlation": [0.1] * 4}
                for marked, rate in ((0, 1.0), (2, ahead))
            ]  # fmt: skip
    return found


def about() -> About:
    return About(command="rewardmodels study marks", seeds=6, settings={})


@pytest.mark.parametrize(("ahead", "saved"), [(2.0, 0.5), (1.0, 0.0), (1.25, 0.2), (0.9, -0.11)])
def test_learning_so_much_faster_saves_that_share(ahead, saved):
    found = marks_saving(rows(ahead))
    assert list(found) == ["A", "B"]
    for value, low, high in found.values():
        assert value == pytest.approx(saved, abs=0.01)
        assert low <= value <= high


def test_what_marks_never_reach_costs_twice_the_budget():
    value, low, high = marks_saving(rows(0.2))["A"]
    assert value == low == high == pytest.approx(1 - 160 / 64)


def test_a_mark_is_worth_the_comparisons_that_it_stands_for():
    cells = rows(2.0, tasks=("A",))
    own, alone = (
        np.array([row["accuracy"] for row in cells if row["marked"] == m]) for m in (2, 0)
    )
    counts, marks = np.array(COUNTS, float), np.array([[4 * n for n in COUNTS]] * 6)
    # 20 comparisons and 80 marks do what 40 comparisons do.
    assert worth(own, alone, counts, marks, 1)[0] == pytest.approx(20 / 80)
    assert math.isinf(worth(own, alone, counts, marks, 3)[0])
    # 20 comparisons do what 40 and 160 marks that mislead do.
    assert worth(alone, own, counts, marks, 2)[0] == pytest.approx(-20 / 160)


def test_the_report_says_what_was_saved(tmp_path):
    said = write_tables(rows(2.0), tmp_path, about())
    assert "save 50% (50% to 50%) on A, 50% (50% to 50%) on B of" in said
    assert "a quarter or more for sure on 2 of 2 tasks" in said
    assert "they save and a quarter for sure" in said
    assert {file.name for file in tmp_path.iterdir()} >= {
        "report.html", "tables.md", "curves.csv", "figures",
    }  # fmt: skip
    assert "never (never to never) on A" in write_tables(rows(0.2), tmp_path, about())
    assert "marks cost comparisons" in write_tables(rows(0.8), tmp_path, about())


def test_cells_that_are_missing_leave_out_their_seed_alone(tmp_path):
    some = [row for row in rows(2.0) if (row["task"], row["seed"], row["marked"]) != ("A", 0, 0)]
    said = write_tables(some, tmp_path, about(), note="Not finished.")
    assert "5 seeds" in said
    assert "Not finished." in (tmp_path / "report.html").read_text()
    alone = [row for row in rows(2.0) if not row["marked"]]
    assert write_tables(alone, tmp_path, about()) == ""


def pool() -> Pool:
    draw = torch.Generator().manual_seed(0)
    frames = torch.randn(8, 60, 2, generator=draw)
    clips = Clips(frames, torch.zeros(8, 60, 1), rewards=frames @ torch.tensor([1.0, -2.0]))
    return Pool("T", 0, clips, torch.arange(2).repeat_interleave(4), torch.tensor([0, 1]))


def cell(marked: int, **more: object) -> dict:
    settings: dict = {
        "task": "T", "marked": marked, "seed": 0, "predictor": "LaplaceHead", "counts": [10, 20],
        "length": 15, "stretch": 4, "stands_out": 0.2, "mistake_rate": 0.0, "tests": 50,
        "pools": "none",
    }  # fmt: skip
    return marks_cell(**{**settings, **more})


def test_a_cell_teaches_marks_beside_the_same_comparisons(monkeypatch):
    taught = []

    def watched(model, said, *, marks, **settings):
        taught.append((said, marks))
        return study_fit(model, said, marks=marks, **settings)

    study_fit = study.fit
    monkeypatch.setattr(study, "fit", watched)
    monkeypatch.setattr(study, "find_pool", lambda *_, **__: pool())
    monkeypatch.setattr(study, "_EPOCHS", 3)
    none, one, both = (cell(marked) for marked in (0, 1, 2))
    assert none["marks"] == [0, 0]
    assert 0 < one["marks"][1] < both["marks"][1] <= 80
    for place in (0, 1):
        said = [taught[2 * arm + place][0] for arm in range(3)]
        assert all(torch.equal(said[0].clips.observations, s.clips.observations) for s in said)
    _, marks = taught[4]
    assert int(marks.rows[:, 0].max()) < 20  # of clips of the ten comparisons alone
    windows = marks.clips.rewards.unfold(1, 4, 1).sum(2)
    for clip, first, _, good in marks.rows.tolist():
        assert first == int(windows[clip].argmax() if good else windows[clip].argmin())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"counts": (20, 10)}, "counts: expected at least two, rising"),
        ({"counts": ()}, "counts"),
        ({"stretch": 25}, "stretch: expected fewer frames"),
        ({"marked": (3,)}, "marked: expected 1, 2 or both"),
        ({"mistake_rate": 2.0}, "mistake_rate"),
        ({"seeds": 0}, "seeds"),
        ({"compute": False}, "out: expected cells of this grid"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(settings, said, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "find_pool", lambda *_, **__: pytest.fail("an agent was trained"))
    with pytest.raises(InvalidInput, match=said):
        study_marks(**{"out": tmp_path, "pools": tmp_path, **settings})


def test_a_small_study_leaves_a_report_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "find_pool", lambda *_, **__: pool())
    monkeypatch.setattr(study, "_EPOCHS", 2)
    settings: dict = {
        "tasks": ["Pendulum"], "marked": [1], "counts": [5, 10], "length": 15, "tests": 20,
        "seeds": 2, "out": tmp_path,
    }  # fmt: skip
    found = study_marks(**settings)
    assert [(row["seed"], row["marked"]) for row in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert "--counts '[5,10]'" in (tmp_path / "report.html").read_text().replace("&#39;", "'")
    monkeypatch.setattr(study, "fit", lambda *_, **__: pytest.fail("computed again"))
    assert study_marks(**settings, compute=False) == found
    assert "Pendulum" in capsys.readouterr().out
