"""The study of strategies: savings by hand, no pair asked twice, and a small study end to end."""

import numpy as np
import pandas as pd
import pytest
import torch

from active import GreedyInformation
from experiments import studies
from experiments.cli import main
from experiments.studies import strategies as study
from rewardmodels import InvalidInput

from ..studying import small_people, small_pool

BATCHES = np.arange(20, 101, 20)


class Own(GreedyInformation):
    """A strategy that isn't registered."""


def results(slopes: dict[str, float], tasks: int = 3, seeds: int = 6) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    luck = draw.normal(0, 1e-3, size=(tasks, seeds))
    return pd.DataFrame(
        {
            "kind": "pool", "task": f"T{task}", "strategy": name, "seed": seed,
            "comparisons": n, "accuracy": 0.5 + slope * n + luck[task, seed], "cell_seconds": 30.0,
        }
        for task in range(tasks)
        for name, slope in slopes.items()
        for seed in range(seeds)
        for n in BATCHES
    )  # fmt: skip


def test_a_strategy_that_learns_twice_as_fast_needs_half():
    rows = results({"Uniform": 0.002, "GreedyInformation": 0.004, "Entropy": 0.0005})
    report = study.report(rows)
    table = report.sections[0].table.set_index(["task", "strategy"])
    saving = table.loc[("T0", "GreedyInformation")]
    assert saving.iloc[0] == pytest.approx((0.5, 0.5, 0.5))  # seeds are resampled together
    assert saving["verdict"] == "better"
    assert table.loc[("T0", "Entropy")].iloc[0].value == np.inf
    assert table.loc[("T0", "Entropy")]["verdict"] == "worse"
    assert report.numbers["labels_ratio.T0"] == pytest.approx(0.5)
    assert report.numbers["labels_ratio.T0.Entropy"] == np.inf
    assert report.numbers["study_minutes"] == 3 * 3 * 6 * 30 / 60  # half a minute a cell
    differences = report.sections[2].table.set_index(["task", "strategy"])
    assert differences.loc[("all", "GreedyInformation"), "at 100%"].value == pytest.approx(0.2)
    assert differences.loc[("T1", "Entropy"), "verdict"] == "worse"
    ranks, test = (section.table for section in report.sections[-2:])
    assert list(ranks["strategy"]) == ["GreedyInformation", "Uniform", "Entropy"]
    assert report.numbers["friedman_p"] == test["p"][0] == pytest.approx(0.0498, abs=1e-3)


def test_missing_cells_leave_out_their_seed_alone():
    rows = results({"Uniform": 0.002, "GreedyInformation": 0.004}, tasks=1)
    missing = (rows["strategy"] == "Uniform") & (rows["seed"] == 0)
    assert list(study.report(rows[~missing]).sections[0].table["seeds"]) == [5]
    alone = study.report(rows[rows["strategy"] == "GreedyInformation"])
    assert not len(alone.sections[0].table)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "find_pool", lambda *_, **__: small_pool())
    monkeypatch.setattr(study, "HUMAN_DATA", {"trains": lambda folder: small_people()})
    monkeypatch.setattr(study, "EPOCHS", 2)
    return study.Settings(
        data=tmp_path, tasks=["Pendulum"], strategies=["GreedyInformation", f"{__name__}.Own"],
        budget=30, batch=10, clips=12, length=10, tests=20, seeds=1, pools=tmp_path,
    )  # fmt: skip


def test_strategies_start_alike_and_ask_nothing_twice(small, monkeypatch):
    asked, fit = [], study.fit

    def watched(model, comparisons, **options):
        asked.append(comparisons.clips.observations[comparisons.pairs].flatten(1))
        return fit(model, comparisons, **options)

    monkeypatch.setattr(study, "fit", watched)
    for kind, task, folder in (("people", "trains", "none"), ("pool", "Pendulum", None)):
        asked.clear()
        for name in ("Uniform", "GreedyInformation"):
            rows = study.cell(small, kind, task, folder, name, seed=0)
            assert [row["comparisons"] for row in rows] == [10, 20, 30]
        assert torch.equal(asked[0], asked[3])
        assert not torch.equal(asked[1], asked[4])
        for pairs in asked:
            assert len(pairs.unique(dim=0)) == len(pairs)


def test_a_small_study_leaves_a_page_and_resumes(small, tmp_path, monkeypatch):
    run = studies.Run(tmp_path / "study")
    found = studies.run_study(study, small, run, progress=False)
    rows = pd.read_csv(run.out / "results.csv")
    assert len(rows) == 2 * 3 * 3
    assert set(rows["strategy"]) == {"Uniform", "GreedyInformation", f"{__name__}.Own"}
    monkeypatch.setattr(study, "fit", None)
    again = studies.run_study(study, small, run, report_only=True)
    assert str(again.numbers) == str(found.numbers)


def test_a_pool_without_true_rewards_is_refused(small, monkeypatch):
    monkeypatch.setattr(studies, "find_pool", lambda *_, **__: small_pool((0.0, 0.0)))
    with pytest.raises(InvalidInput, match="pools"):
        study.prepare(small)


@pytest.mark.slow
def test_the_quick_study_runs_from_the_command_line(tmp_path, capsys):
    assert main(["study", "strategies", "--quick", "--json", str(tmp_path / "f.json")]) == 0
    assert "labels_ratio.Hopper" in (tmp_path / "f.json").read_text()
