"""The study of preferences: scores against loops by hand, rivals that learn, and a small study."""

import json

import numpy as np
import pytest
import torch
from scipy.special import expit

from experiments import studies
from experiments.datasets.people import HumanData
from experiments.studies import preferences as study
from rewardmodels import Clips, Comparisons

from ..studying import small_people


def asked(n: int = 300) -> Comparisons:
    draw = torch.Generator().manual_seed(0)
    clips = Clips.of_items(torch.randn(2 * n, 1, generator=draw))
    pairs = torch.arange(2 * n).view(n, 2)
    chance = clips.observations[pairs, 0, 0].diff(dim=1)[:, 0].sigmoid()
    return Comparisons(clips, pairs, (torch.rand(n, generator=draw) < chance).float())


def test_the_bounds_error_is_rewarduqs():
    known = asked()
    mean = 3 * study.items(known.clips)[:, 0]
    std = torch.full_like(mean, 0.1)
    found = study.bound_ece((mean, std), known)
    # As RewardUQ does of lower bounds: of each pair, and of it the other way round.
    a, b = mean[known.pairs].double().numpy().T
    lower = np.concatenate([expit(b - a - 0.2), expit(a - b - 0.2)])
    outcome = np.concatenate([known.preference, 1 - known.preference])
    bins = np.digitize(lower, np.linspace(0, 1, 21)[1:-1])
    each = [
        (bins == k).mean() * max(lower[bins == k].mean() - outcome[bins == k].mean(), 0)
        for k in np.unique(bins)
    ]
    assert found == pytest.approx(sum(each), abs=1e-6)
    assert found > 0.01
    assert study.bound_ece((mean, 100 * std), known) == 0


def test_accuracy_of_what_is_left_when_the_least_certain_are_withheld():
    known = asked()
    p = study.items(known.clips)[known.pairs, 0].diff(dim=1)[:, 0].sigmoid()
    found = study.scores(study.Predicted(p), known)
    right = ((p > 0.5) == (known.preference > 0.5)).numpy()
    order = np.argsort(-(p - 0.5).abs().numpy())
    for share in (0.0, 0.5):
        expected = right[order[: round(300 * (1 - share))]].mean()
        assert found["selective"][round(share * 20)] == pytest.approx(expected)
    sure = np.abs(p.numpy() - 0.5) > 0.4
    assert found["sure_and_wrong"] == pytest.approx((sure & ~right).mean())


def test_regret_is_what_the_best_answer_wins_more_than_the_chosen_one():
    clips = Clips.of_items(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    pairs = torch.combinations(torch.arange(4))
    preference = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5])  # 2 and 3 share the first place
    known = Comparisons(clips, pairs, preference)
    data = HumanData("fruit", known, np.zeros(6, int), np.ones((6, 1)), {})

    def predict(sign):
        return lambda clips, pairs: study.Predicted(
            (sign * study.items(clips)[pairs, 0].diff(dim=1)[:, 0]).sigmoid()
        )

    groups = np.array([0])
    assert study.regrets(data, predict(1.0), groups)[0] == 0
    assert study.regrets(data, predict(-1.0), groups)[0] == pytest.approx(2.5 / 3)


@pytest.mark.parametrize("method", ["best column", "Bayesian linear head", "low-rank ensemble"])
def test_rivals_learn_and_predict_the_same_of_pairs_either_way_round(method):
    data = small_people()
    rows = np.flatnonzero(data.decided)
    predict = study.METHODS[method](data, rows[:80], 0)
    some = data.comparisons[torch.from_numpy(rows[80:])]
    p = predict(some.clips, some.pairs).probability
    assert ((p > 0.5) == (some.preference > 0.5)).double().mean() > 0.75
    reverse = predict(some.clips, some.pairs.flip(1)).probability
    torch.testing.assert_close(p.double(), 1 - reverse.double(), rtol=0, atol=1e-6)


def test_the_regressions_weights_are_those_of_the_baseline():
    data = small_people()
    rows = np.flatnonzero(data.decided)
    train, test = rows[:80], rows[80:]
    some = data.comparisons[torch.from_numpy(test)]
    found = study.regression(data, train, 0)(some.clips, some.pairs).probability
    expected = study.baseline(data, train, test)
    assert found.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_small_study_leaves_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HUMAN_DATA", {"pandalm": lambda folder: small_people()})
    monkeypatch.setattr(study, "SHIFTS", {"pandalm": "odd"})
    methods = [study.BASELINE, "best column", "head ensemble"]
    settings = study.Settings(data=tmp_path, methods=methods, seeds=2)
    file = tmp_path / "numbers.json"
    run = studies.Run(tmp_path / "study")
    studies.run_study(study, settings, run, json=file, progress=False)
    numbers = json.loads(file.read_text())
    assert numbers["accuracy.pandalm.best column"] > 0.9
    assert numbers["log_loss.pandalm/odd.best column"] < np.log(2)
    assert (run.out / "figures" / "withheld.svg").is_file()
