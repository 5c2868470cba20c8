"""The study of strategies: savings by hand, no pair asked twice, and what is paired with what."""

import json

import numpy as np
import pytest
import torch

from active import GreedyInformation, KCenter
from experiments.analysis.old_page import About
from experiments.benchmarks import queries as benchmark
from experiments.cli import main
from experiments.datasets.people import HumanData
from experiments.datasets.pools import Pool
from experiments.grid import run_study
from experiments.studies import strategies as study
from experiments.studies.strategy_savings import friedman, labels_needed, labels_ratio
from experiments.studies.strategy_tables import ratios, write_tables
from rewardmodels import Clips, Comparisons, InvalidInput, UnknownName

BATCHES = np.array([20.0, 40.0, 60.0, 80.0, 100.0])
ABOUT = About("rewardmodels study strategies", 4, {})


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
    assert never == np.inf
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


def rows(strategies=("Uniform", "BALD"), tasks=("A", "B", "C"), seeds=4):
    return [
        {"task": task, "strategy": name, "seed": seed, "predictor": "LaplaceHead",
         "comparisons": BATCHES.astype(int).tolist(),
         "accuracy": (0.5 + BATCHES / (200 if name == "BALD" else 400) + seed / 100).tolist(),
         "log loss": [0.5] * 5}
        for task in tasks for name in strategies for seed in range(seeds)
    ]  # fmt: skip


def test_tables_and_a_figure_are_left_behind(tmp_path):
    text = write_tables({"pool": rows()}, tmp_path, ABOUT)
    assert "| BALD | 0.50 (0.50 to 0.50) | 4 |" in text
    assert "| BALD | +0.062 (+0.062 to +0.062) | +0.125 (+0.125 to +0.125) |" in text
    assert "| BALD | 1 | 1 | 1 | 1.0 |" in text
    assert (tmp_path / "figures" / "curves.svg").stat().st_size > 5000
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 3 * 2 * 4 * 5


@pytest.mark.parametrize(
    ("slope", "kind", "said"),
    [
        (200, "pool", "needs 0.50 of uniform's comparisons (95% interval 0.50 to 0.50, 5 seeds): "
         "it saves."),
        (400, "pool", "needs 1.00 of uniform's comparisons (95% interval 1.00 to 1.00, 5 seeds): "
         "no difference can be told, the interval includes 1."),
        (450, "pool", "needs 1.12 of uniform's comparisons (95% interval 1.12 to 1.12, 5 seeds): "
         "it needs more, it loses."),
        (600, "pool", "doesn't reach with 100 comparisons what uniform ones reach with 80 (95% "
         "interval wholly beyond the budget, 5 seeds): it needs more, it loses."),
        (450, "people", "doesn't reach with 100 comparisons what uniform ones reach with 100"),
    ],
)  # fmt: skip
def test_wins_ties_losses_and_what_is_never_reached_are_said(slope, kind, said, tmp_path):
    cells = [
        {
            **row,
            "accuracy": (0.5 + BATCHES / (slope if row["strategy"] == "BALD" else 400)).tolist(),
        }
        for row in rows(tasks=("A",), seeds=5)
    ]
    assert f"On A, BALD {said}" in write_tables({kind: cells}, tmp_path, ABOUT)


def test_curves_that_are_flat_and_noisy_save_nothing():
    """Of strategies that are alike, about one in twenty may seem to differ, and not one in four."""
    rng, claims = np.random.default_rng(0), 0
    comparisons = np.arange(20, 201, 20.0)
    mean = 0.68 + 0.04 * (1 - np.exp(-comparisons / 50))
    for _ in range(40):
        own, uniform = mean + rng.normal(0, 0.015, (2, 10, 10))
        _, low, high = labels_ratio(own, uniform, comparisons, 160)
        claims += not low <= 1 <= high
    assert claims <= 5  # of 40 with 5% each, 6 or more come by chance in 1.4%


def test_cells_that_are_missing_leave_out_their_seed_alone(tmp_path):
    cells = rows(tasks=("A", "B"))
    done = [row for row in cells if not (row["strategy"] == "BALD" and row["seed"] > 1)]
    text = write_tables({"pool": done}, tmp_path, ABOUT)
    assert "| BALD | 0.50 (0.50 to 0.50) | 2 |" in text
    assert "| Uniform | 2 | 2 | 2.0 |" in text
    alone = write_tables(
        {"pool": [row for row in cells if row["strategy"] == "BALD"]}, tmp_path, ABOUT
    )
    assert "no strategy shares a seed with uniform comparisons yet" in alone


def test_folds_of_different_sizes_are_compared_where_all_have_answers(tmp_path):
    cells = rows(tasks=("A",))
    cells[0] = {**cells[0], "comparisons": [20, 40, 60, 80, 93]}
    assert "what uniform ones" not in write_tables({"people": cells}, tmp_path, ABOUT)
    assert "at 20 | at 40 | at 60 | at 80" in (tmp_path / "tables.md").read_text()


def test_ranks_by_chance_are_told_from_others():
    # By hand: chi squared is 12 / (n k (k + 1)) sum R^2 - 3 n (k + 1).
    alike = np.array([[1, 2, 3], [2, 3, 1], [3, 1, 2]] * 3)
    assert "can't be told from 9 tasks (Friedman test, p = 1.000)" in friedman(alike)
    ordered = np.tile([1, 2, 3], (3, 1))
    chi = 12 / (3 * 3 * 4) * (3**2 + 6**2 + 9**2) - 3 * 3 * 4
    assert f"p = {np.exp(-chi / 2):.3f}" in friedman(ordered)  # two degrees of freedom
    assert friedman(np.full((4, 3), 2.0)) == "All strategies tie on all 4 tasks."
    assert "can't be told" in friedman(np.tile([1, 2], (9, 1)))


def test_a_half_done_study_is_reported_from_the_cells_that_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "people", lambda name, _: people())
    monkeypatch.setattr(study, "HUMAN_DATA", {"trains": None})
    usual = {"predictor": "LaplaceHead", "budget": 40, "batch": 20, "folder": "nowhere"}
    cells = [{"task": "trains", "strategy": s, "seed": 0, **usual} for s in ("Uniform", "BALD")]
    run_study(study.people_cell, cells, tmp_path / "cells", progress=False)
    monkeypatch.setattr(study, "run_study", None)  # nothing more is computed
    words = (
        f"study strategies --data nowhere --tasks [] --strategies [BALD,Thompson] --budget 40 "
        f"--seeds 2 --compute false --out {tmp_path}"
    )
    assert main(words.split()) == 0
    assert "1 seed)" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "2 of 6 cells" in page
    assert "On trains, Thompson" not in page
    assert main([*words.split(), "--batch", "10"]) == 2
    assert "expected cells of this grid" in capsys.readouterr().err


@pytest.mark.parametrize("rewards", [None, 0.0])
def test_a_pool_without_true_rewards_is_refused(rewards, tmp_path, monkeypatch, capsys):
    frames = torch.zeros(4, 30, 3), torch.zeros(4, 30, 1)
    skill, steps = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2048])

    def made(*_, **__):
        paid = None if rewards is None else torch.full((4, 30), rewards)
        return Pool("Pendulum", 0, Clips(*frames, rewards=paid), skill, steps)

    monkeypatch.setattr(study, "find_pool", made)
    monkeypatch.setattr(study, "run_study", None)
    words = f"study strategies --tasks [Pendulum] --strategies [BALD] --out {tmp_path}"
    assert main(words.split()) == 2
    assert "rewards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            {"study": "experiments.studies.predictors"},
            "expected a directory of experiments.studies.s",
        ),
        ({"versions": {"rewardmodels": "0.0.9"}}, "expected results of rewardmodels"),
        ({"format": 0}, "(format 1), got"),
    ],
)
def test_a_directory_of_another_study_is_refused_before_an_agent_is_trained(
    kept, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(study, "find_pool", None)
    (tmp_path / "cells").mkdir()
    usual = {"format": 1, "study": study.__name__, "versions": {"rewardmodels": "0.1.0"}}
    told = json.dumps({**usual, "functions": {}, **kept})
    (tmp_path / "cells" / "study.json").write_text(told)
    with pytest.raises(InvalidInput) as refused:
        study.study_strategies(tasks=["Pendulum"], strategies=["BALD"], out=tmp_path)
    assert message in str(refused.value)
    assert (tmp_path / "cells" / "study.json").read_text() == told


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
        ("study strategies --address 10.0.0.1:1", "address: expected none with loky"),
        ("study strategies --compute false", "out: expected cells of this grid"),
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
