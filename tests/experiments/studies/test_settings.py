"""Settings that a study cannot have are refused by name, before any work."""

import pytest

from experiments.studies import backflip, drift, feedback, guard, marks, predictors, strategies
from rewardmodels import InvalidInput, UnknownName


@pytest.mark.parametrize(
    ("study", "change", "argument"),
    [
        (backflip, {"comparisons": 7}, "comparisons"),
        (backflip, {"seeds": 0}, "seeds"),
        (backflip, {"steps": 0}, "steps"),
        (drift, {"seeds": 0}, "seeds"),
        (drift, {"steps": 0}, "steps"),
        (drift, {"batch": 9, "more": 8}, "more"),
        (drift, {"kappa": -1}, "kappa"),
        (drift, {"arms": ["thawed"]}, "thawed"),
        (drift, {"predictor": "Oracle"}, "Oracle"),
        (drift, {"task": "Croquet"}, "Croquet"),
        (feedback, {"tasks": []}, "tasks"),
        (feedback, {"budgets": [4]}, "budgets"),
        (feedback, {"steps": 0}, "steps"),
        (feedback, {"tasks": ["Hoper"]}, "task"),
        (feedback, {"schedules": ["Constnt"]}, "schedule"),
        (feedback, {"schedules": ["WhenUnsure(lvel=0.2)"]}, "schedule"),
        (feedback, {"schedules": ["WhenUnsure(0.2)"]}, "schedule"),
        (feedback, {"schedules": ["WhenUnsure(level=open('x'))"]}, "schedule"),
        (feedback, {"schedules": ["WhenUnsure(level=9)"]}, "level"),
        (feedback, {"teachers": ["orcle"]}, "teacher"),
        (feedback, {"strategy": "Unifrm"}, "strategy"),
        (feedback, {"predictor": "Laplce"}, "model"),
        (guard, {"onset": 400}, "horizon"),
        (guard, {"tests": 0}, "tests"),
        (guard, {"detectors": ["Mahalanobi"]}, "detector"),
        (guard, {"statistics": ["CUSUMM"]}, "statistic"),
        (guard, {"tasks": ["Reacher"], "shifts": ["gravity"]}, "Reacher"),
        (guard, {"shifts": ["winds"]}, "name"),
        (guard, {"parts": ["published"]}, "published"),
        (marks, {"counts": (20, 10)}, "counts"),
        (marks, {"counts": ()}, "counts"),
        (marks, {"stretch": 25}, "stretch"),
        (marks, {"marked": (3,)}, "marked"),
        (marks, {"flip_rate": 2.0}, "_rate"),
        (marks, {"seeds": 0}, "seeds"),
        (marks, {"length": 2000}, "length"),
        (predictors, {"comparisons": 3}, "comparisons"),
        (predictors, {"tests": 100}, "tests"),
        (predictors, {"predictors": ["Laplace"]}, "LaplaceHead"),
        (predictors, {"predictors": ["torch.nn.Linear"]}, "RewardModel"),
        (predictors, {"predictors": []}, "predictors"),
        (predictors, {"tasks": []}, "tasks"),
        (predictors, {"tasks": ["Hopper", "Pendulum"], "length": 201}, "length"),
        (predictors, {"tasks": ["Hoper"]}, "Hopper"),
        (strategies, {"batch": 1}, "batch"),
        (strategies, {"budget": 30}, "budget"),
        (strategies, {"clips": 5}, "clips"),
        (strategies, {"tasks": []}, "tasks"),
        (strategies, {"length": 5000}, "length"),
        (strategies, {"tasks": ["Hoper"]}, "task"),
        (strategies, {"strategies": ["Entrpy"]}, "strategy"),
        (strategies, {"predictor": "Laplace"}, "model"),
        (strategies, {"predictor": "active.BALD"}, "model"),
    ],
)
def test_bad_settings_are_refused(study, change, argument):
    with pytest.raises((InvalidInput, UnknownName), match=argument):
        study.Settings(**change)
