"""The study of predictors: its scores by hand, its splits without leaks, and what it leaves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from experiments.benchmarks import predictors as benchmark
from experiments.cli import main
from experiments.datasets.people import HumanData
from experiments.datasets.pools import Pool
from experiments.studies import predictor_scores as scores
from experiments.studies import predictors as study
from experiments.studies.predictor_tables import BASELINE, write_tables
from experiments.studies.summary import as_csv, markdown, pooled
from rewardmodels import (
    Clips,
    Comparisons,
    GaussianPosterior,
    SampledPosterior,
    UnknownName,
)
from rewardmodels import calibration as score


def asked(n: int = 400, seed: int = 0) -> tuple[SampledPosterior, Comparisons]:
    """Eight functions about single numbers, and answers by their mean, some of them wrong."""
    draw = torch.Generator().manual_seed(seed)
    worth = torch.randn(2 * n, generator=draw)
    clips = Clips(worth[:, None, None], torch.zeros(2 * n, 1, 1), rewards=worth[:, None])
    samples = worth + torch.randn(8, 2 * n, generator=draw)
    pairs = torch.arange(2 * n).view(n, 2)
    better = (worth[pairs[:, 1]] > worth[pairs[:, 0]]).float()
    return SampledPosterior(samples), Comparisons(clips, pairs, better)


def test_scores_are_those_of_their_definitions():
    belief, said = asked()
    came = scores.scores(belief, said)
    d = (belief.samples[:, said.pairs[:, 1]] - belief.samples[:, said.pairs[:, 0]]).double()
    each = d.sigmoid()
    p, y = each.mean(0), said.preference.double()
    wrong = (p > 0.5) != (y > 0.5)
    unsure = torch.minimum(p, 1 - p)
    assert came["accuracy"] == pytest.approx(float((~wrong).double().mean()))
    assert came["log loss"] == pytest.approx(
        float(torch.nn.functional.binary_cross_entropy(p, y)), rel=1e-5
    )
    assert came["error AUROC"] == pytest.approx(roc_auc_score(wrong, unsure), abs=1e-6)
    # 64 draws of eight equally likely functions are each of them eight times.
    spread = each.std(0, correction=0)
    assert came["rank correlation"] == pytest.approx(
        score.rank_correlation(spread, (p - y).abs()), abs=1e-3
    )
    assert came["confident and wrong"] == pytest.approx(
        float((wrong & (p - 0.5).abs().gt(0.4)).double().mean())
    )
    assert len(came["risk by coverage"]) == 20
    assert came["risk by coverage"][-1] == pytest.approx(1 - came["accuracy"])
    json.dumps(came)  # plain data


def test_errors_of_returns_are_taken_in_the_beliefs_best_scale():
    belief, said = asked()
    for factor in (1.0, 7.0):
        came = scores.of_returns(SampledPosterior(factor * belief.samples), said)
        if factor == 1.0:
            first = came
    assert came == pytest.approx(first, abs=1e-6)
    assert 0.5 < came["return rank correlation"] < 1


@pytest.mark.parametrize("kind", ["sampled", "gaussian"])
def test_coverage_is_what_the_sets_cover(kind):
    _, said = asked(500)

    class Model:
        def posterior(self, clips):
            worth = clips.observations[:, 0, 0]
            if kind == "gaussian":
                return GaussianPosterior(2 * worth, 0.1 * torch.eye(len(worth)))
            noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
            return SampledPosterior(2 * worth + noise)

    # Half the answers by a coin: sets of 95% then have to hold both often.
    luck = torch.rand(500, generator=torch.Generator().manual_seed(2))
    answers = torch.where(luck < 0.5, (luck < 0.25).float(), said.preference)
    noisy = replace(said, preference=answers)
    came = scores.coverage(Model(), noisy, resplits=60)
    assert scores.COVERAGE - 0.01 < came < scores.COVERAGE + 0.03


def test_what_is_tested_on_comes_from_episodes_that_were_not_labelled():
    frames = torch.arange(12.0).view(12, 1, 1).expand(12, 30, 1)
    episodes = Clips(frames, frames, rewards=frames[..., 0])
    pool = Pool("made up", 0, episodes, torch.arange(12) % 3, torch.arange(3))
    one, other = (
        set(study.half(pool, which).trajectories.observations.unique().tolist()) for which in (0, 1)
    )
    assert not one & other
    assert one | other == set(range(12))
    for which in (0, 1):
        assert study.half(pool, which).skill.bincount().tolist() == [2, 2, 2]


def people() -> HumanData:
    clips = Clips.of_items(torch.randn(80, 3, generator=torch.Generator().manual_seed(0)))
    pairs = torch.arange(80).view(40, 2)
    features = clips.observations[pairs, 0].diff(dim=1)[:, 0].double().numpy()
    said = torch.from_numpy(features[:, 0] > 0).float()
    held_out = {"odd": np.arange(40) % 4 == 3}
    groups = np.arange(40) // 2
    return HumanData("made up", Comparisons(clips, pairs, said), groups, features, held_out)


def test_settings_are_chosen_without_a_group_that_is_trained_on():
    data = people()
    taught, some = study._inner_split(data, np.arange(4, 40))
    assert not set(data.groups[taught]) & set(data.groups[some])
    assert sorted([*taught, *some]) == list(range(4, 40))


@pytest.mark.parametrize("name", ["made up", "made up/odd"])
def test_a_fold_is_scored_for_a_predictor_and_for_the_regression(name, monkeypatch):
    monkeypatch.setattr(study, "people", lambda *_: people())
    regression = study.human(name, BASELINE, 0, "nowhere")
    model = study.human(name, "LaplaceHead", 0, "nowhere")
    assert regression["accuracy"] > 0.6
    assert model["accuracy"] > 0.6
    assert model["weight decay"] in (1.0, 30.0)


def rows(predictors=("single network", "LaplaceHead"), seeds=3):
    belief, said = asked(200)
    found = scores.scores(belief, said) | scores.of_returns(belief, said)
    tests = [f"{test}/{kind}" for test in ("in distribution", "shifted") for kind in ("", "raw ")]
    cell = {f"{test}{key}": value for test in tests for key, value in found.items()}
    simulated = [
        {"task": task, "predictor": name, "seed": seed, "fit seconds": 1.0, "parameters": 10,
         **cell, "in distribution/ECE": 0.01 * seed}
        for name in predictors for task in ("A", "B") for seed in range(seeds)
    ]  # fmt: skip
    human = [
        {"data": "trains", "predictor": name, "fold": fold, **scores.scores(belief, said)}
        for name in (BASELINE, *predictors)
        for fold in range(5)
    ]
    speed = [
        {"predictor": name, "frame us": 20.0, "frame us at 4096": 1.5, "1,000 clips ms": 70.0}
        for name in predictors
    ]
    return {"simulated": simulated, "human": human, "speed": speed}


def test_tables_and_figures_are_left_behind(tmp_path):
    text = write_tables(rows(), tmp_path)
    assert (tmp_path / "tables.md").read_text() == text + "\n"
    assert "| LaplaceHead |" in text
    assert "| 0.010 (" in text
    for stem in ("trust", "people"):
        assert (tmp_path / "figures" / f"{stem}.svg").stat().st_size > 5000
        assert (tmp_path / "figures" / f"{stem}.pdf").exists()
    page = (tmp_path / "report.html").read_text()
    assert "--predictors &#39;[single network,LaplaceHead]&#39; --seeds 3" in page
    # Both are given the same cells: a tie, and 3 seeds. ECE is 0, 0.01 and 0.02, less what it was.
    assert (
        "LaplaceHead&#39;s log loss (lower is better), less single network&#39;s, is +0.000" in page
    )
    assert "the interval includes 0" in page
    wrong = rows()["simulated"][0]["shifted/risk by coverage"][9]
    assert f"and {wrong:.1%} (95% interval {wrong:.1%} to {wrong:.1%}) about far better" in page
    assert "3 seeds are too few for a claim" in page
    assert "better for sure in 0, worse for sure in 0, and in 2 no difference" in page
    header = (tmp_path / "simulated.csv").read_text().splitlines()[0]
    assert "shifted/raw log loss" in header
    assert "reliability" not in header


def test_pooled_is_the_interquartile_mean_over_all_and_resamples_within_tasks():
    mean, low, high = pooled([np.zeros(5), np.ones(5)])
    assert mean == pytest.approx(0.5)
    # Nothing varies within a task.
    assert (low, high) == (mean, mean)


def test_benchmark_keys_have_no_spaces(monkeypatch):
    cells = rows()["simulated"]
    for row in cells:
        row["coverage"] = 0.96
    figures = benchmark._figures(cells)
    assert figures["ece.SingleNetwork"] == pytest.approx(0.01)
    assert figures["coverage_gap.LaplaceHead"] == pytest.approx(0.01)
    assert all(" " not in key for key in figures)


def test_markdown_and_csv_take_what_is_there():
    assert markdown(["x"], [["1"]]).splitlines()[1] == "|---|"
    assert as_csv([{"a": 1, "b": "x,y"}]) == 'a,b\n1,"x,y"\n'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("study predictors --seeds 0", "seeds: expected at least 1, got 0"),
        ("study predictors --comparisons 3", "comparisons: expected at least 20, got 3"),
        ("study predictors --predictors [Laplace]", "'LaplaceHead'"),
        ("study predictors --predictors [torch.nn.Linear]", "expected a RewardModel"),
        ("study predictors --tasks []", "tasks: expected at least one, got none."),
        (
            "study predictors --tasks [Hopper,Pendulum] --length 201",
            "length: expected at most the 200 frames of an episode of Pendulum, got 201.",
        ),
        ("study predictors --tasks [Hoper]", "Did you mean 'Hopper'"),
        ("study predictors --data nowhere", "expected the folder that holds"),
        ("study predictor", "Did you mean 'study predictors'?"),
        ("benchmark predictors --seeds 0", "seeds: expected a number of at least 1, got 0"),
        ("benchmark predictors --json no/where.json", "json: expected a file in a directory"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_predictor_of_ones_own_is_found_by_its_path():
    assert study.maker("rewardmodels.GPHead").__name__ == "GPHead"
    with pytest.raises(UnknownName):
        study.maker("rewardmodels.Nope")


@pytest.mark.slow
def test_the_quick_benchmark_measures_every_predictor(tmp_path):
    file = tmp_path / "figures.json"
    assert main(["benchmark", "predictors", "--quick", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    for name in ("DeepEnsemble", "MCDropout", "LaplaceHead", "Epinet", "GPHead"):
        for key in ("ece", "nll", "error_auroc", "rank_correlation", "coverage_gap", "fit_seconds"):
            assert np.isfinite(figures[f"{key}.{name}"])
        assert figures[f"frame_us.{name}"] < 500
        assert figures[f"error_auroc.{name}"] > 0.6
    assert figures["bayesian_rex_seconds"] < 10
