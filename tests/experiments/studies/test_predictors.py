"""The study of predictors: scores by hand, tests apart from training, and a small study."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from experiments import studies
from experiments.cli import main
from experiments.studies import predictors as study
from rewardmodels import (
    Clips,
    Comparisons,
    DeepEnsemble,
    InvalidInput,
    SampledPosterior,
)
from rewardmodels import calibration as score

from ..studying import small_people, small_pool


class Own(DeepEnsemble):
    """A predictor that isn't registered."""


def predicted(n: int = 400) -> tuple[SampledPosterior, Comparisons]:
    """Eight samples of the returns of single numbers, and comparisons by their noise-free value."""
    draw = torch.Generator().manual_seed(0)
    returns = torch.randn(2 * n, generator=draw)
    clips = Clips(returns[:, None, None], torch.zeros(2 * n, 1, 1), rewards=returns[:, None])
    samples = returns + torch.randn(8, 2 * n, generator=draw)
    return SampledPosterior(samples), studies.compare_by_return(clips)


def test_scores_follow_their_definitions():
    posterior, known = predicted()
    found = study.posterior_scores(posterior, known)
    samples = posterior.samples.double()
    each = (samples[:, known.pairs[:, 1]] - samples[:, known.pairs[:, 0]]).sigmoid()
    p, y = each.mean(0), known.preference.double()
    wrong, uncertainty = (p > 0.5) != (y > 0.5), torch.minimum(p, 1 - p)
    assert found["accuracy"] == pytest.approx(float((~wrong).double().mean()))
    loss = torch.nn.functional.binary_cross_entropy(p, y)
    assert found["log_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["error_auroc"] == pytest.approx(roc_auc_score(wrong, uncertainty), abs=1e-6)
    # 64 draws of eight equally likely samples are each of them eight times.
    spread = each.std(0, correction=0)
    by_rank = score.rank_correlation(spread, (p - y).abs())
    assert found["rank_correlation"] == pytest.approx(by_rank, abs=1e-3)
    confident = (wrong & ((p - 0.5).abs() > 0.4)).double().mean()
    assert found["sure_and_wrong"] == pytest.approx(float(confident))
    assert len(found["risk_by_coverage"]) == 20
    assert found["risk_by_coverage"][-1] == pytest.approx(1 - found["accuracy"])


def test_scores_of_returns_dont_depend_on_the_posteriors_scale():
    posterior, known = predicted()
    found = study.return_scores(posterior, known)
    assert study.return_scores(SampledPosterior(7 * posterior.samples), known) == pytest.approx(
        found, abs=1e-6
    )
    assert 0.5 < found["return_rank_correlation"] < 1


def test_the_epic_distance_is_over_the_frames_that_exist():
    clips = small_pool((1.0, -2.0)).trajectories
    mask = torch.arange(60) < torch.tensor([60, 1, 30, 7, 60, 60, 60, 60])[:, None]
    clips = replace(clips, mask=mask, rewards=clips.rewards.where(mask, 99.0))
    for weights, distance in (((2.0, -4.0), 0.0), ((-1.0, 2.0), 1.0)):
        rewards = torch.tensor(weights)
        model = SimpleNamespace(
            frame_posterior=lambda o, _, w=rewards: SampledPosterior((o @ w)[None])
        )
        assert study.reward_distance(model, clips) == pytest.approx(distance, abs=1e-3)


def test_coverage_is_that_of_the_prediction_sets(monkeypatch):
    monkeypatch.setattr(study, "RESPLITS", 60)
    _, known = predicted(500)
    noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
    model = SimpleNamespace(
        posterior=lambda clips: SampledPosterior(2 * clips.observations[:, 0, 0] + noise)
    )
    # Half the comparisons by a coin: sets of 95% then have to hold both preferences often.
    luck = torch.rand(500, generator=torch.Generator().manual_seed(2))
    preference = torch.where(luck < 0.5, (luck < 0.25).float(), known.preference)
    noisy = replace(known, preference=preference)
    covered = study.coverage(model, noisy)
    assert study.COVERAGE - 0.01 < covered < study.COVERAGE + 0.03


def test_joined_reliability_weighs_curves_bin_by_bin():
    curves = [
        {"probability": [0.2, 0.85], "frequency": [0.1, 0.5], "weight": [0.5, 0.1]},
        {"probability": [0.55, 0.82], "frequency": [0.6, 1.0], "weight": [0.5, 0.3]},
    ]
    probability, frequency = study._joined_reliability(curves)
    assert probability == pytest.approx([0.55, 0.8275])
    assert frequency == pytest.approx([0.6, 0.875])


def results(seeds: int = 5) -> pd.DataFrame:
    """Two predictors on two tasks, of which the second has a log loss lower by 0.1; and folds."""
    posterior, known = predicted(200)
    scores = study.posterior_scores(posterior, known) | study.return_scores(posterior, known)
    cost = {"fit_seconds": 1.0, "parameters": 10, "epic": 0.25}
    rows = [
        {"kind": "simulated", "task": task, "predictor": name, "seed": seed, "test": test,
         "version": version, **scores, **cost, "log_loss": 0.5 - better + 0.01 * seed,
         "ece": 0.2 - 0.05 * (version == "calibrated"),
         "coverage": 0.96 if seed == 0 and test == "in distribution" else None}
        for name, better in (("single network", 0.0), ("LaplaceHead", 0.1))
        for task in ("A", "B") for seed in range(seeds)
        for test in ("in distribution", "shifted")
        for version in ("calibrated", "as fitted", "without novelty")
    ]  # fmt: skip
    rows += [
        {"kind": "people", "task": task, "predictor": name, "seed": fold, **scores,
         "version": version, "log_loss": 0.5 + worse + 0.01 * fold + (version != "as fitted")}
        for name, worse in ((study.BASELINE, 0.0), ("single network", 0.1), ("LaplaceHead", 0.0))
        for task in ("trains", "trains/odd") for fold in range(5)
        for version in ("as fitted", "without novelty")
    ]  # fmt: skip
    speed = {"frame_us": 20.0, "batch_frame_us": 1.5, "clips_ms": 70.0, "samples_seconds": 0.5}
    rows += [{"kind": "speed", "predictor": "LaplaceHead", "seed": 0, **speed}]
    return pd.DataFrame(rows)


def test_differences_and_verdicts_are_of_seeds_and_folds():
    report = study.report(results())
    sections = {section.title: section for section in report.sections}
    scores = sections["Shifted"].table.set_index("predictor")
    assert scores.loc["LaplaceHead", "log loss less single network's"] == pytest.approx([-0.1] * 3)
    assert scores.loc["LaplaceHead", "verdict"] == "better"
    assert tuple(scores.loc["LaplaceHead", "EPIC"]) == (0.25, 0.25, 0.25)
    trust = sections["Trust"].table.set_index("predictor")
    assert trust.loc["LaplaceHead", "ECE less as fitted"] == pytest.approx([-0.05] * 3)
    people = sections["People"].table.set_index("predictor")
    assert list(people["verdict"]) == ["", "", "worse", "worse", "unclear", "unclear"]
    unknown = sections["Never taught"].table.set_index(["shift", "predictor"])
    assert set(unknown.index.get_level_values(0)) == {"better behaviour", "trains/odd"}
    row = unknown.loc[("trains/odd", "LaplaceHead")]
    assert row["log loss"] == pytest.approx(row["log loss, without novelty"] - 1)
    assert report.numbers["shift_nll.trains.odd.LaplaceHead"] == pytest.approx(row["log loss"])
    cost = sections["Cost"].table.set_index("predictor")
    assert cost.loc["LaplaceHead", "1,000 clips, ms"] == 70
    assert report.numbers["ece.SingleNetwork"] == pytest.approx(0.15)
    assert report.numbers["coverage_gap.LaplaceHead"] == pytest.approx(0.01)
    assert report.numbers["bayesian_rex_seconds"] == 0.5
    few = study.report(results(seeds=4)).sections[1].table
    assert few["verdict"].dropna().tolist() == ["unclear"]


@pytest.fixture
def fitted(monkeypatch):
    """Small pools and people's comparisons, and short fits; returns what was fitted to."""
    seen, fit = [], study.fit

    def short(model, comparisons, **options):
        seen.append(comparisons)
        return fit(model, comparisons, **{"epochs": 20, **options})

    monkeypatch.setattr(study, "fit", short)
    monkeypatch.setattr(study, "FOLDS", 2)
    monkeypatch.setattr(study, "RESPLITS", 2)
    monkeypatch.setattr(study, "HUMAN_DATA", {"trains": lambda folder: small_people()})
    monkeypatch.setattr(studies, "find_pool", lambda *_, **__: small_pool())
    return seen


def test_what_is_held_out_of_peoples_comparisons_is_never_fitted_to(fitted):
    settings = study.Settings()
    for name in (study.BASELINE, "LaplaceHead"):
        row, *_ = study.cell(settings, "people", "trains/odd", "folder", name, seed=0)
        assert row["accuracy"] > 0.6
    assert row["weight_decay"] in study.WEIGHT_DECAYS
    even = small_people().comparisons.pairs[::2].tolist()
    assert all(pair in even for known in fitted for pair in known.pairs.tolist())


@pytest.mark.slow
def test_a_small_study_of_tasks_people_and_speed_leaves_a_page(fitted, tmp_path, monkeypatch):
    own = f"{__name__}.Own"
    small = study.Settings(
        data=tmp_path, tasks=["Pendulum"], predictors=["LaplaceHead", own], seeds=1,
        comparisons=100, length=10, tests=200,
    )  # fmt: skip
    run = studies.Run(tmp_path / "study")
    found = studies.run_study(study, small, run, progress=False)
    rows = pd.read_csv(run.out / "results.csv")
    assert rows.groupby("kind").size().to_dict() == {"people": 20, "simulated": 12, "speed": 2}
    assert set(rows["predictor"]) == {study.BASELINE, "LaplaceHead", own}
    for key in ("epic", "nll_shifted", "coverage_gap", "batch_frame_us"):
        assert np.isfinite(found.numbers[f"{key}.LaplaceHead"])
    assert 0 < found.numbers["epic.LaplaceHead"] < np.sqrt(0.5)
    for stem in ("trust", "people"):
        assert (run.out / "figures" / f"{stem}.svg").is_file()
    monkeypatch.setattr(study, "fit", None)
    again = studies.run_study(study, small, run, report_only=True)
    assert str(again.numbers) == str(found.numbers)


def test_a_folder_without_peoples_comparisons_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "prepare", None)
    with pytest.raises(InvalidInput, match="data"):
        studies.run_study(study, study.Settings(data=tmp_path), studies.Run(tmp_path / "study"))


@pytest.mark.slow
def test_the_quick_study_measures_every_predictor(tmp_path):
    file = tmp_path / "numbers.json"
    assert main(["study", "predictors", "--quick", "--json", str(file)]) == 0
    numbers = json.loads(file.read_text())
    for name in study.PREDICTORS:
        for key in ("ece", "nll", "epic", "rank_correlation", "coverage_gap", "fit_seconds"):
            assert np.isfinite(numbers[f"{key}.{name}"])
        assert numbers[f"error_auroc.{name}"] > 0.6
