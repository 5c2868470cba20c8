"""The study of feedback: comparisons needed and saved by hand, and small studies end to end."""

import numpy as np
import pandas as pd
import pytest

from experiments import studies
from experiments.studies import feedback as study


def results(slope: float, unsure_share: float, seeds: int = 6) -> pd.DataFrame:
    """Zero returns 0, the own reward 100; `slope` a comparison; WhenUnsure asks a share of them."""
    draw = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        luck = float(draw.normal(0, 0.01))
        common = {"mode": "online", "task": "T", "seed": seed, "skipped": 0, "correlation": 0.9,
                  "information": 0.1}  # fmt: skip
        for reward, value in (("zero", 0.0), ("task", 100.0)):
            rows.append(
                {**common, "reward": reward, "schedule": "", "teacher": "", "budget": 0,
                 "return": value + luck, "comparisons": 0, "step": 1, "asked": 0}
            )  # fmt: skip
        for budget in (25, 50, 100):
            for schedule, share in (("Constant", 1.0), ("WhenUnsure", unsure_share)):
                rows += [
                    {**common, "reward": "learned", "schedule": schedule, "teacher": "oracle",
                     "budget": budget, "return": min(100, slope * budget) + luck,
                     "comparisons": share * budget, "step": step,
                     "asked": share * budget * step / 2}
                    for step in (1, 2)
                ]  # fmt: skip
    return pd.DataFrame(rows)


def test_comparisons_needed_are_read_off_the_line():
    report = study.report(results(slope=1.2, unsure_share=0.5))
    assert report.numbers["comparisons_90.T"] == pytest.approx(87.5, abs=0.5)
    low, high = report.numbers["comparisons_90_interval.T"]
    assert low <= report.numbers["comparisons_90.T"] <= high
    assert study.report(results(0.5, 0.5)).numbers["comparisons_90.T"] == np.inf


def test_asking_for_half_with_the_same_return_saves_half():
    report = study.report(results(slope=1.0, unsure_share=0.5))
    assert report.numbers["unsure_ratio.T"] == pytest.approx(0.5, abs=0.01)
    assert report.numbers["unsure_asked.T"] == pytest.approx(0.5)
    assert report.numbers["unsure_return_gap.T"] == pytest.approx(0, abs=1e-6)
    assert list(report.sections[2].table["verdict"]) == ["better"]


def test_the_return_gap_is_a_difference_of_interquartile_means():
    runs = results(slope=1.0, unsure_share=0.5)
    unsure = (runs["schedule"] == "WhenUnsure") & (runs["budget"] == 100)
    constant = (runs["schedule"] == "Constant") & (runs["budget"] == 100)
    # The middle four count. The interquartile mean of the differences seed by seed would be 0.
    for arm, returns in ((unsure, [0, 0, 30, 60, 90, 90]), (constant, [90, 0, 0, 60, 90, 90])):
        for seed, value in enumerate(returns):
            runs.loc[arm & (runs["seed"] == seed), "return"] = value
    numbers = study.report(runs).numbers
    gap, (low, high) = numbers["unsure_return_gap.T"], numbers["unsure_return_gap_interval.T"]
    assert gap == pytest.approx(45 - 60)
    assert low < gap < high


def test_ratios_are_of_interquartile_means_over_seeds():
    numbers = study.report(results(slope=0.9, unsure_share=1.0)).numbers
    assert numbers["return_ratio.T"] == pytest.approx(0.9, abs=0.01)
    assert numbers["worst_ratio.T"] == pytest.approx(0.9, abs=0.01)
    assert len(numbers["returns.T.learned"]) == len(numbers["returns.T.task"]) == 6


def test_arms_may_be_missing():
    rows = results(1.0, 0.5)
    report = study.report(rows[rows["reward"] == "learned"])
    assert not len(report.sections[1].table)
    assert not len(report.sections[2].table)


def test_a_small_study_runs_learn_and_resumes(tmp_path, monkeypatch):
    settings = study.Settings(
        tasks=["Pendulum"], budgets=[8], schedules=["Constant", "WhenUnsure(level=0.1)"],
        arms=["zero"], predictor="LaplaceHead", steps=2048, seeds=1,
    )  # fmt: skip
    made = []

    def learn(config, *, progress):
        made.append(config)
        config.out.mkdir()
        (config.out / "config.yaml").write_text("task: Pendulum\n")
        (config.out / "metrics.csv").write_text(
            "step,comparisons,mean_information\n1,4,\n2,8,0.5\n"
        )
        return {"final_return": 1.0, "comparisons": 8, "skipped": 0, "reward_correlation": None}

    monkeypatch.setattr(study, "learn", learn)
    run = studies.Run(tmp_path / "study")
    studies.run_study(study, settings, run, progress=False)
    assert [config.reward for config in made] == ["zero", "learned", "learned"]
    assert made[2].schedule.level == 0.1
    rows = pd.read_csv(run.out / "results.csv")
    assert len(rows) == 3 * 2
    assert list(rows["asked"])[:2] == [4, 8]
    assert np.isnan(rows["information"].iloc[0])
    monkeypatch.setattr(study, "learn", None)
    studies.run_study(study, settings, run, report_only=True)


def test_teachers_are_compared_on_a_pool(tmp_path, monkeypatch):
    def cell(settings, kind, task, folder, strategy, seed):
        right = 0.9 if settings.teacher == "oracle" else 0.8
        return [{"comparisons": n, "accuracy": right + seed / 1e3} for n in (8, 16)]

    monkeypatch.setattr(study.strategies, "cell", cell)
    monkeypatch.setattr(study, "make_pools", lambda settings: None)
    settings = study.Settings(
        mode="pool", tasks=["Pendulum"], budgets=[40], teachers=["oracle", "mistaken"]
    )
    report = studies.run_study(study, settings, studies.Run(tmp_path), progress=False)
    [line] = report.sections[1].table.to_dict("records")
    assert line["difference"].value == pytest.approx(-0.1)
    assert line["verdict"] == "worse"
