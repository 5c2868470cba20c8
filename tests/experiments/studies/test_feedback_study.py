"""The study of feedback: comparisons needed by hand, what refuses, and what a second call adds."""

import numpy as np
import pytest
import torch

from active import Teacher
from experiments.analysis.old_page import About
from experiments.cli import main
from experiments.datasets.pools import make_pool
from experiments.grid import read_study
from experiments.studies import feedback as study
from experiments.studies.feedback_savings import Needed, labelled, needed, unsure_ratio
from experiments.studies.feedback_tables import write_tables
from experiments.studies.strategies import pool_cell
from rewardmodels import InvalidInput, UnknownName

SMALL = {"steps": 2048, "levels": 2, "episodes": 4}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    make_pool("Pendulum", folder=folder, progress=False, **SMALL)
    return folder


def cell(reward, value, seed=0, budget=0, comparisons=None, schedule="", teacher=""):
    return {
        "task": "Hopper", "reward": reward, "seed": seed, "budget": budget, "return": value,
        "schedule": schedule, "teacher": teacher, "correlation": 0.9, "queries": budget,
        "skipped": 0, "comparisons": budget if comparisons is None else comparisons,
        "by step": [100, 200], "by answers": [budget / 2, budget], "by return": [None, value],
        "by information": [0.1, 0.1],
    }  # fmt: skip


def grid(constant, unsure=None, own=1000.0, zero=0.0, seeds=6):
    """Cells of which every seed is alike, from returns by budget."""
    rows = []
    for seed in range(seeds):
        rows += [cell("task", own, seed), cell("zero", zero, seed)]
        rows += [
            cell("learned", value, seed, budget, schedule="Constant", teacher="oracle")
            for budget, value in constant.items()
        ]
        if unsure:
            comparisons, value = unsure
            rows.append(
                cell("learned", value, seed, 400, comparisons, "WhenUnsure", "oracle")
            )  # fmt: skip
    return rows


def test_comparisons_needed_are_read_off_the_line_through_the_budgets():
    rows = grid({100: 600.0, 200: 800.0, 400: 1000.0})
    assert needed(rows, "Constant, oracle") == pytest.approx((300, 300, 300))
    assert needed(rows, "Constant, oracle", share=0.7) == pytest.approx((150, 150, 150))
    # Below the smallest budget the line comes from the zero reward's return.
    assert needed(rows, "Constant, oracle", share=0.3) == pytest.approx((50, 50, 50))


def test_a_level_that_no_budget_reaches_is_said_so():
    found = needed(grid({100: 100.0, 400: 300.0}), "Constant, oracle")
    assert found.comparisons == np.inf
    assert str(found) == "never reached"
    assert str(Needed(150.0, 80.0, np.inf)) == "150 (80 to more than the budget)"


def test_a_negative_return_of_the_own_reward_asks_for_a_tenth_below_it():
    rows = grid({100: -200.0, 200: -110.0}, own=-100.0, zero=-900.0)
    assert needed(rows, "Constant, oracle").comparisons == pytest.approx(200)


def test_seeds_that_differ_widen_the_interval():
    rows = grid({100: 600.0, 200: 800.0, 400: 1000.0})
    rows = [{**row, "return": row["return"] + 120 * (row["seed"] - 2.5)} for row in rows]
    found = needed(rows, "Constant, oracle")
    assert found.low < 250 < 300 < found.high


@pytest.mark.parametrize(
    ("unsure", "ratio"),
    [((150, 800.0), 0.75), ((150, 1000.0), 0.375), ((400, 700.0), 400 / 150)],
)
def test_asking_when_unsure_is_set_against_what_the_constant_schedule_needs(unsure, ratio):
    rows = grid({100: 600.0, 200: 800.0, 400: 1000.0}, unsure)
    assert unsure_ratio(rows) == pytest.approx((ratio, ratio, ratio))


def test_a_return_that_the_constant_schedule_never_has_counts_as_its_whole_budget():
    rows = grid({100: 600.0, 400: 900.0}, (200, 2000.0))
    assert unsure_ratio(rows)[0] == pytest.approx(200 / 400)


def told(rows, out):
    write_tables(rows, "online", out, About("rewardmodels study feedback", 6, {}))
    return (out / "online" / "report.html").read_text()


def test_the_report_says_what_saves_what_does_not_and_what_trivial_rewards_give(tmp_path):
    page = told(grid({100: 600.0, 200: 800.0, 400: 1000.0}, (150, 1000.0), zero=20), tmp_path)
    assert "Constant, oracle: 300 (300 to 300) comparisons" in page
    assert "zero reward 20" in page
    assert "takes 0.38 of the comparisons" in page
    assert "it saves" in page
    assert "With the same budget, 400, it asks for 38% of what the constant one does" in page
    assert "less the constant one&#39;s is 0 (0 to 0)" in page
    page = told(grid({100: 600.0, 400: 1000.0}, (400, 600.0)), tmp_path)
    assert "it costs more" in page
    assert "WhenUnsure, oracle: not reached with 400" in page


class Silent(Teacher):
    """Skips everything."""

    def answer(self, clips, pairs, generator=None):
        return torch.full((len(pairs),), torch.nan)


def test_a_pool_is_not_answered_by_who_skips(tmp_path, pool):
    name = f"{__name__}.Silent"
    with pytest.raises(InvalidInput, match=r"answers every question, got .*, who skips 45 of 45"):
        pool_cell("Pendulum", "Uniform", 0, "LaplaceHead", 20, 10, 10, 5, 10, str(pool),
                  teacher=name, **SMALL)  # fmt: skip


def test_a_pool_shows_what_teachers_are_worth(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(study, "make_pool", lambda task, folder: None)
    cells = study._pool_cells(["Pendulum"], [40], ["oracle", "mistaken"], "Uniform", None, 2, pool)
    rows = [{**cell, **pool_cell(**cell, **SMALL)} for cell in cells]
    write_tables(rows, "pool", tmp_path, About("rewardmodels study feedback", 2, {}))
    table = (tmp_path / "pool" / "tables.md").read_text()
    assert "| Pendulum | oracle |" in table
    assert "| Pendulum | mistaken |" in table
    first = {row["teacher"]: row["accuracy"] for row in rows if row["seed"] == 0}
    assert first["oracle"] != first["mistaken"]
    assert (tmp_path / "pool" / "cells.csv").read_text().count("\n") == 1 + 2 * 2 * 2


@pytest.mark.slow
def test_the_study_trains_tells_and_grows(tmp_path, capsys):
    small = ["--tasks", "[Pendulum]", "--arms", "[zero,task]", "--steps", "4096", "--seeds", "1"]
    small += ["--budgets", "[16]", "--predictor", "LaplaceHead", "--out", str(tmp_path)]
    assert main(["study", "feedback", "--schedules", "[Constant]", *small]) == 0
    first = (tmp_path / "online" / "cells.csv").read_text()
    assert main(["study", "feedback", "--schedules", "[Hyperbolic]", *small]) == 0
    rows = read_study(tmp_path / "cells")
    assert len(rows) == 4
    by = {(row["reward"], row["schedule"]): row for row in rows if row["reward"] == "learned"}
    assert {labelled(row) for row in by.values()} == {"Constant, oracle", "Hyperbolic, oracle"}
    for row in by.values():
        assert row["comparisons"] == row["by answers"][-1] == 16
        assert row["queries"] >= 16
    zero = next(row for row in rows if row["reward"] == "zero")
    assert zero["comparisons"] == 0
    assert zero["return"] == pytest.approx(-1200, abs=600)
    online = tmp_path / "online"
    assert len((online / "cells.csv").read_text().splitlines()) == 5 > first.count("\n")
    assert "the task's own reward" in (online / "tables.md").read_text()
    for name in ("return-by-number-of-comparisons", "when-they-were-asked-for"):
        assert (online / "figures" / f"{name}.pdf").stat().st_size > 5000
    capsys.readouterr()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"budgets": []}, "budgets: expected at least one"),
        ({"tasks": []}, "tasks: expected at least one"),
        ({"budgets": [4]}, "budgets: expected at least 8"),
        ({"seeds": 0}, "seeds: expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_made(tmp_path, wrong, named):
    with pytest.raises(InvalidInput, match=named):
        study.study_feedback(**wrong, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedules": ["Weekly"]}, {"teachers": ["nobody"]}, {"strategy": "Guess"},
        {"predictor": "Oracle"}, {"tasks": ["Nowhere"]},
    ],
)  # fmt: skip
def test_unknown_names_are_refused_before_anything_is_made(tmp_path, wrong):
    with pytest.raises(UnknownName):
        study.study_feedback(**wrong, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_schedule_may_be_named_with_arguments_and_the_task_still_says_what_is_asked_first():
    made = study._made_schedule("WhenUnsure(level=0.2)", "Walker2d")
    assert (made.level, made.share, made.initial) == (0.2, 0.1, 0.5)
    assert study._made_schedule("WhenUnsure(initial=0.1)", "Walker2d").initial == 0.1
    assert study._made_schedule("active.schedule.Constant(initial=0)", "Hopper").initial == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "WhenUnsure(lvel=0.2)",
            "with some of level, share, initial; got WhenUnsure",
        ),
        ("WhenUnsure(0.2)", "plain keyword arguments"),
        ("WhenUnsure(level=open('x'))", "plain keyword arguments"),
        ("WhenUnsure(level=0.2", "plain keyword arguments"),
        ("WhenUnsure(level=9)", "from 0 to log 2"),
    ],
)
def test_arguments_that_a_schedule_does_not_take_are_refused(tmp_path, name, said):
    with pytest.raises(InvalidInput, match=said):
        study.study_feedback(schedules=[name], out=tmp_path / "new")
