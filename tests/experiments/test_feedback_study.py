"""The study of feedback: comparisons needed by hand, what refuses, and what a second call adds."""

import numpy as np
import pytest

from active import SyntheticTeacher, Teacher
from experiments.cli import main
from experiments.studies import feedback as study
from experiments.studies.feedback_tables import Needed, labelled, needed, sentences, unsure_ratio
from experiments.study import read_study
from rewardmodels import InvalidInput, UnknownName


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


def test_sentences_say_what_saves_what_does_not_and_what_trivial_rewards_give():
    text = " ".join(sentences(grid({100: 600.0, 200: 800.0, 400: 1000.0}, (150, 1000.0), zero=20)))
    assert "Constant, oracle: 300 (300 to 300) comparisons" in text
    assert "zero reward 20" in text
    assert "takes 0.38 of the comparisons" in text
    assert "it saves" in text
    text = " ".join(sentences(grid({100: 600.0, 400: 1000.0}, (400, 600.0))))
    assert "it costs more" in text


class Silent(Teacher):
    """Skips everything."""

    def answer(self, clips, pairs, generator=None):
        return SyntheticTeacher(skip_threshold=1e9).answer(clips, pairs, generator)


@pytest.mark.slow
def test_the_study_trains_tells_and_grows(tmp_path, capsys):
    small = ["--tasks", "[Pendulum]", "--arms", "[zero,task]", "--steps", "4096", "--seeds", "1"]
    small += ["--budgets", "[16]", "--predictor", "LaplaceHead", "--out", str(tmp_path)]
    assert main(["study", "feedback", "--schedules", "[Constant]", *small]) == 0
    first = (tmp_path / "online.csv").read_text()
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
    assert len((tmp_path / "online.csv").read_text().splitlines()) == 5 > first.count("\n")
    assert "the task's own reward" in (tmp_path / "online.md").read_text()
    for name in ("returns", "asked"):
        assert (tmp_path / f"{name}.pdf").stat().st_size > 5000
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
