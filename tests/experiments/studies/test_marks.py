"""The study of marks: its savings against curves made by hand, and a small study end to end."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import studies
from experiments.studies import marks as study
from rewardmodels import InvalidInput

from ..studying import small_pool

COUNTS = [10, 20, 40, 80]


def results(speed: float, seeds: int = 6) -> pd.DataFrame:
    """Accuracy 0.5 + 0.005 per comparison, with marks at `speed` times the rate."""
    draw = np.random.default_rng(0)
    rows = []
    for task in ("A", "B"):
        for seed in range(seeds):
            luck = float(draw.normal(0, 1e-4))
            rows += [
                {
                    "task": task,
                    "marks_per_pair": marked,
                    "seed": seed,
                    "comparisons": n,
                    "marks": 2 * marked * n,
                    "accuracy": 0.5 + 0.005 * n * rate + luck,
                    "frame_correlation": 0.1,
                }
                for marked, rate in ((0, 1.0), (2, speed))
                for n in COUNTS
            ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("speed", "saved", "verdict"),
    [(2.0, 0.5, "better"), (1.25, 0.2, "better"), (0.9, -0.11, "worse")],
)
def test_faster_learning_saves_that_share_of_comparisons(speed, saved, verdict):
    report = study.report(results(speed))
    table = report.sections[0].table
    assert list(table["task"]) == ["A", "B"]
    assert list(table["verdict"]) == [verdict] * 2
    for value, low, high in table["saved"]:
        assert low <= value <= high
        assert value == pytest.approx(saved, abs=0.01)
    assert report.numbers["marks_saving"] == pytest.approx(saved, abs=0.01)


def test_of_four_seeds_no_verdict_is_given_and_accuracy_never_reached_is_not_extrapolated():
    assert study.report(results(2.0, seeds=4)).sections[0].table["verdict"][0] == "unclear"
    assert study.report(results(0.2)).numbers["marks_saving.A"] == -np.inf


def test_a_mark_is_worth_the_comparisons_that_it_replaces():
    table = study.report(results(2.0)).sections[1].table
    worth = table[(table["task"] == "A") & (table["arm"] == study.ARMS[2])].iloc[:, -1]
    # 20 comparisons and 80 marks do what 40 comparisons do.
    assert worth.iloc[1].value == pytest.approx(20 / 80, rel=0.01)
    assert worth.iloc[3].value == np.inf


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "find_pool", lambda *_, **__: small_pool())
    monkeypatch.setattr(study, "EPOCHS", 2)
    return study.Settings(
        tasks=["Pendulum"], marked=[1, 2], counts=[5, 10], length=15, tests=20, seeds=2,
        stands_out=0.2, stretch=4, pools=tmp_path / "pools",
    )  # fmt: skip


def test_a_cell_fits_marks_beside_the_same_comparisons(small, monkeypatch):
    fitted, fit = [], study.fit

    def watched(model, comparisons, *, marks, **options):
        fitted.append((comparisons, marks))
        return fit(model, comparisons, marks=marks, **options)

    monkeypatch.setattr(study, "fit", watched)
    none, one, both = (study.cell(small, "Pendulum", marked, seed=0) for marked in (0, 1, 2))
    assert [row["marks"] for row in none] == [0, 0]
    assert 0 < one[1]["marks"] < both[1]["marks"]
    for place in (0, 1):
        first, *others = (fitted[2 * arm + place][0].clips.observations for arm in range(3))
        assert all(torch.equal(first, other) for other in others)
    _, marks = fitted[4]
    assert int(marks.rows[:, 0].max()) < 10  # of clips of the five comparisons alone
    windows = marks.clips.rewards.unfold(1, 4, 1).sum(2)
    for clip, first_frame, _, good in marks.rows.tolist():
        assert first_frame == int(windows[clip].argmax() if good else windows[clip].argmin())


def test_a_small_study_leaves_a_page_and_resumes(small, tmp_path, monkeypatch, capsys):
    run = studies.Run(tmp_path / "study")
    with pytest.raises(InvalidInput, match="out"):
        studies.run_study(study, small, run, report_only=True)
    found = studies.run_study(study, small, run, json=tmp_path / "numbers.json", progress=False)
    assert len(pd.read_csv(run.out / "results.csv")) == 2 * 3 * 2
    page = (run.out / "report.html").read_text().replace("&#39;", "'")
    assert "rewardmodels study marks" in page
    assert "--counts '[5,10]'" in page
    monkeypatch.setattr(study, "fit", lambda *_, **__: pytest.fail("computed again"))
    assert studies.run_study(study, small, run, report_only=True).numbers == found.numbers
