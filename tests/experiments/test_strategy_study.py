"""The study of strategies: savings by hand, no pair asked twice, and what is paired with what."""

import numpy as np
import pytest
import torch

from active import GreedyInformation, KCenter
from experiments.benchmarks import queries as benchmark
from experiments.cli import main
from experiments.human_data import HumanData
from experiments.studies import strategies as study
from experiments.studies.strategy_tables import (
    labels_needed,
    labels_ratio,
    ratios,
    write_tables,
)
from rewardmodels import Clips, Comparisons, UnknownName

BATCHES = np.array([20.0, 40.0, 60.0, 80.0, 100.0])


@pytest.mark.parametrize(
    ("level", "expected"), [(0.6, 20), (0.65, 30), (0.7, 40), (0.75, 50), (0.9, 100)]
)
def test_labels_needed_are_read_off_the_curve(level, expected):
    curve = np.array([0.6, 0.7, 0.8, 0.7, 0.9])
    assert labels_needed(curve, BATCHES, level) == pytest.approx(expected)


def test_a_level_that_is_not_reached_is_told():
    assert np.isnan(labels_needed(np.full(5, 0.5), BATCHES, 0.6))


def test_a_strategy_that_learns_twice_as_fast_needs_half():
    seeds = np.linspace(-0.02, 0.02, 6)[:, None]
    uniform = 0.5 + BATCHES / 400 + seeds
    ratio, low, high = labels_ratio(0.5 + BATCHES / 200 + seeds, uniform, BATCHES, 80)
    # The seed's luck is the same for both, so that resampling seeds together changes nothing.
    assert ratio == pytest.approx(0.5)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.5)
    never, *_ = labels_ratio(np.full((6, 5), 0.5), uniform, BATCHES, 80)
    assert never == pytest.approx(120 / 80)
    assert labels_ratio(uniform, uniform, BATCHES, 80)[0] == pytest.approx(1)


def people() -> HumanData:
    clips = Clips.of_items(torch.randn(240, 3, generator=torch.Generator().manual_seed(0)))
    pairs = torch.arange(240).view(120, 2)
    features = clips.observations[pairs, 0].diff(dim=1)[:, 0].double().numpy()
    said = torch.from_numpy(features[:, 0] > 0).float()
    said[::10] = 0.5
    return HumanData("trains", Comparisons(clips, pairs, said), np.arange(120), features, {})


def test_every_strategy_starts_alike_and_asks_nothing_twice(monkeypatch):
    monkeypatch.setattr(study, "people", lambda *_: people())
    asked = {}
    fit = study.fit

    def watched(model, said, **settings):
        asked.setdefault(name, []).append(said.clips.observations[said.pairs][:, :, 0, 0])
        return fit(model, said, epochs=2, seed=0)

    monkeypatch.setattr(study, "fit", watched)
    for name in ("Uniform", "BALD"):
        came = study.people_cell("trains", name, 0, "LaplaceHead", 50, 20, "nowhere")
        assert came["comparisons"] == [20, 40, 50]
        assert len(came["accuracy"]) == len(came["log loss"]) == 3
        assert len(asked[name][-1].unique(dim=0)) == 50
        # What was asked stays among what is learned from.
        before = {tuple(pair) for pair in asked[name][0].tolist()}
        assert before <= {tuple(pair) for pair in asked[name][-1].tolist()}
    first = [set(map(tuple, asked[name][0].tolist())) for name in asked]
    last = [set(map(tuple, asked[name][-1].tolist())) for name in asked]
    assert first[0] == first[1]
    assert last[0] != last[1]


def rows(strategies=("Uniform", "BALD"), tasks=("A", "B", "C")):
    return [
        {"task": task, "strategy": name, "seed": seed, "predictor": "LaplaceHead",
         "comparisons": BATCHES.astype(int).tolist(),
         "accuracy": (0.5 + BATCHES / (200 if name == "BALD" else 400) + seed / 100).tolist(),
         "log loss": [0.5] * 5}
        for task in tasks for name in strategies for seed in range(4)
    ]  # fmt: skip


def test_tables_and_a_figure_are_left_behind(tmp_path):
    text = write_tables({"pool": rows()}, tmp_path)
    assert "| BALD | 0.50 (0.50 to 0.50) |" in text
    assert "+0.100" in text
    assert "| BALD | 1 | 1 | 1 | 1.0 |" in text
    assert (tmp_path / "curves.svg").stat().st_size > 5000
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 3 * 2 * 4 * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("study strategies --seeds 0", "seeds: expected at least 1, got 0"),
        ("study strategies --budget 30", "budget: expected at least 40, got 30"),
        ("study strategies --clips 10", "clips: expected enough for 200 different pairs, got 10"),
        ("study strategies --strategies [Bald]", "BALD"),
        ("study strategies --predictor Laplace", "'LaplaceHead'"),
        ("study strategies --tasks []", "tasks: expected at least one where there is no data"),
        (
            "study strategies --length 5000",
            "length: expected at most the 1000 frames of an episode of HalfCheetah, got 5000.",
        ),
        ("study strategies --tasks [Hoper]", "Did you mean 'Hopper'"),
        ("study strategies --data nowhere", "expected the folder that holds"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_strategy_of_ones_own_is_found_by_its_path():
    assert study._strategy("active.BALD").__name__ == "BALD"
    with pytest.raises(UnknownName):
        study._strategy("active.Nope")


@pytest.mark.slow
def test_a_small_study_runs_from_the_command_line(tmp_path, capsys):
    words = f"""study strategies --tasks [Pendulum] --strategies [BALD] --budget 40 --clips 30
        --tests 50 --seeds 2 --jobs 2 --pools {tmp_path}/pools --out {tmp_path}/out""".split()
    assert main(words) == 0
    assert "| BALD |" in capsys.readouterr().out


def test_queries_are_chosen_in_time():
    """Of all pairs of 1,000 clips, 100 samples; a lenient bound, as other tests run beside it."""
    assert benchmark.seconds_to_select(GreedyInformation(samples=100), clips=1000) < 15
    assert benchmark.seconds_to_select(KCenter(samples=100), clips=1000, pairs=1000) < 5


def test_the_benchmarks_ratio_is_the_tables(tmp_path):
    found = ratios(rows(), "BALD", 80)
    assert found["A"][0] == pytest.approx(0.5)
    assert list(found) == ["A", "B", "C"]
