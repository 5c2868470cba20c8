"""`rewardmodels fit`, `score` and `ask`, on a small file whose truth is a sum of two columns."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.cli import main
from experiments.labelling.auth import Person
from experiments.labelling.questions import Questions
from experiments.offline import fit as fit_module
from experiments.offline.ask import AskConfig, ask_file
from experiments.offline.fit import FitConfig, fit_file
from experiments.offline.people import answers
from experiments.offline.report import _twice, fit_report
from experiments.offline.run import FittedRun
from experiments.offline.score import ScoreConfig, score_file
from experiments.offline.selection import candidates, choose
from rewardmodels import Clips, Comparisons, InvalidInput, UnreadableFile, load

MODEL = "LaplaceHead(hidden=(8,), weight_decay=1.0)"
ROWS, WRONG = 150, 7  # row 7 says the opposite of the truth


def preferences(rows: int = ROWS) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    sides = {side: draw.normal(size=(rows, 2)) for side in ("first", "second")}
    sides["second"][WRONG] = sides["first"][WRONG] + 1.5
    frame = pd.DataFrame(
        {f"{side}_{name}": x[:, j] for side, x in sides.items() for j, name in enumerate("ab")}
    )
    frame["preference"] = (sides["second"].sum(1) > sides["first"].sum(1)).astype(float)
    frame.loc[WRONG, "preference"] = 0.0
    frame["group"] = np.arange(rows) // 5
    return frame


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    preferences().to_csv(folder / "pairs.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "FOLDS", 2)
        patch.setattr(fit_module, "CURVE", (0.5, 1.0))
        fit_file(FitConfig(folder / "pairs.csv", folder / "run", MODEL, jobs=1))
    return folder / "run"


@pytest.fixture
def items(tmp_path: Path) -> Path:
    file = tmp_path / "items.csv"
    rows = {"a": [0.0, 1.0, 2.0, 500.0], "b": [0.0, 1.0, 0.0, 0.0], "group": [1, 1, 2, 2]}
    pd.DataFrame(rows).to_csv(file, index=False)
    return file


def test_fit_beats_guessing_and_keeps_what_it_said_of_every_row(run):
    numbers = json.loads((run / "fit.json").read_text())["numbers"]
    assert numbers["accuracy"] > 0.85
    assert numbers["log_loss"] < 0.5
    assert numbers["regression.accuracy"] > 0.85
    rows = pd.read_csv(run / "rows.csv")
    assert rows["row"].tolist() == list(range(ROWS))
    assert rows["preference"].tolist() == preferences()["preference"].tolist()
    assert (run / "report.html").is_file()


def test_no_group_is_fitted_to_and_tested():
    table = fit_module.PreferenceTable.from_frame(preferences())
    fitting = fit_module._Fitting(MODEL, table, seed=0)
    tested = []
    for train, test in fitting.splits():
        assert not {*table.groups[train].tolist()} & {*table.groups[test].tolist()}
        tested += test.tolist()
    assert sorted(tested) == list(range(ROWS))


def test_a_file_s_own_split_is_kept():
    frame = preferences().assign(split=["test" if i % 3 == 0 else "train" for i in range(ROWS)])
    table = fit_module.PreferenceTable.from_frame(frame)
    ((train, test),) = fit_module._Fitting(MODEL, table, seed=0).splits()
    assert test.tolist() == list(range(0, ROWS, 3))
    assert sorted([*train, *test]) == list(range(ROWS))


def test_the_most_surprising_row_is_the_wrong_one(run):
    rows = pd.read_csv(run / "rows.csv")
    curve = pd.DataFrame({"part": [0], "comparisons": [ROWS], "log_loss": [0.4]})
    report = fit_report(rows, curve, "as given", grouped=True)
    (surprising,) = (s.table for s in report.sections if s.title == "The most surprising rows")
    assert surprising["row"].iloc[0] == WRONG


def test_gain_of_twice_as_many_by_a_known_law():
    n = np.array([100, 200, 400, 800])
    curve = pd.DataFrame({"comparisons": n, "log_loss": 0.5 + 20 / n})
    assert _twice(curve) == pytest.approx(20 / 800 - 20 / 1600, rel=1e-3)


def test_scores_are_those_of_the_model(run, tmp_path):
    new = preferences().drop(columns="preference")
    new.loc[3, "first_a"] = 1000.0
    new.to_csv(tmp_path / "new.csv", index=False)
    scores = score_file(ScoreConfig(run, tmp_path / "new.csv", tmp_path / "scores.csv"))
    model = load(run / "model.safetensors")
    table = fit_module.PreferenceTable.from_frame(new.assign(preference=1.0))
    posterior = model.posterior(table.comparisons.clips)
    mean, variance = posterior.difference(table.comparisons.pairs)
    np.testing.assert_allclose(scores["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(scores["std"], variance.sqrt(), rtol=1e-5)
    assert scores["flag"][3] == "novel"
    assert abs(scores["probability"][3] - 0.5) < 0.1
    assert (scores["flag"].drop(3) != "novel").mean() > 0.9
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores.csv").fillna(""), scores)


def test_best_of_a_group_by_its_mean_and_by_its_lower_bound(run, items, tmp_path):
    out = tmp_path / "scores.csv"
    by_mean = score_file(ScoreConfig(run, items, out, best_of="mean"))
    assert by_mean["best"].tolist() == [False, True, False, True]
    cautious = score_file(ScoreConfig(run, items, out, best_of="lower"))
    assert cautious["best"].tolist() == [False, True, True, False]
    assert cautious["flag"].tolist() == ["", "", "", "novel"]


@pytest.mark.parametrize("strategy", ["GreedyInformation", "Uniform", "BALD(power=None)"])
def test_ask_pairs_items_of_one_group(run, items, tmp_path, strategy):
    asked = ask_file(AskConfig(run, items, 2, strategy, tmp_path / "ask.csv"))
    assert sorted(map(tuple, asked[["first", "second"]].to_numpy().tolist())) == [(0, 1), (2, 3)]


def test_ask_chooses_where_an_answer_teaches_most(run, tmp_path):
    frame = pd.DataFrame({"first_a": [0, 0.0], "first_b": 0.0, "second_a": [3, 0.1], "second_b": 0})
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    asked = ask_file(AskConfig(run, tmp_path / "pairs.csv", 1, "Entropy", tmp_path / "ask.csv"))
    assert asked["row"].tolist() == [1]  # the other is clear


def test_what_people_answer_is_asked_as_text_and_used_by_the_next_fit(run, items, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    show = "{a} and {b}"
    ask_file(AskConfig(copied, items, 2, "Uniform", label=True, show=show))
    person = Person(session="s", name="ann")
    questions = Questions(copied, repeat_every=0, lease_seconds=60)
    asked = questions.state(person)["queries"]
    texts = {clip["text"] for query in asked for clip in query["clips"]}
    assert texts == {"0 and 0", "1 and 1", "2 and 0", "500 and 0"}
    for query in asked:
        questions.rate(person, query["id"], side=0, stars=query["id"])
        questions.answer(person, query["id"], "right", 1.0)
    progress = questions.progress()
    questions.store.close()
    assert progress.command.startswith("rewardmodels fit")
    assert f"--out {run}" in progress.command
    given = answers(copied)
    assert len(given) == 3  # two comparisons, and two ratings that differ
    table = fit_module.PreferenceTable.from_frame(preferences())
    extended = fit_module._with_answers(table, given)
    assert len(extended) == ROWS + 3
    assert extended.rows[-3:].tolist() == [-1, -2, -3]
    assert not {*extended.groups[-3:].tolist()} & {*table.groups.tolist()}


def test_an_answer_is_in_its_item_s_group():
    table = fit_module.PreferenceTable.from_frame(preferences())
    extended = fit_module._with_answers(table, table.comparisons[[12, 40]])
    assert extended.groups[-2:].tolist() == table.groups[[12, 40]].tolist()


def test_settings_that_are_given_are_not_chosen():
    assert list(candidates("LaplaceHead(weight_decay=3.0)")) == ["as given"]
    assert len(candidates("DeepEnsemble(members=2)")) > 1


def test_another_model_in_the_directory_is_refused(run, tmp_path):
    copied = tmp_path / "run"
    copied.mkdir()
    for name in ("fit.json", "model.safetensors"):
        (copied / name).write_bytes((run / name).read_bytes())
    about = json.loads((copied / "fit.json").read_text())
    (copied / "fit.json").write_text(json.dumps({**about, "checksum": "0" * 32}))
    with pytest.raises(UnreadableFile, match="checksum"):
        FittedRun(copied).model()
    (copied / "fit.json").write_text(json.dumps({**about, "model": "theirs.Mine"}))
    with pytest.raises(InvalidInput, match="trust"):
        FittedRun(copied).model()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fit {folder}/pairs.csv --out {folder}", "other files"),
        ("fit {folder}/pairs.csv --out {folder}/pairs.csv", "got a file"),
        ("fit {folder}/pairs.csv --model Laplace", "Did you mean"),
        ("fit {folder}/pairs.csv --seed -1", "seed"),
        ("fit {folder}/pairs.csv --columns.first left", "left"),
        ("fit {folder}/none.csv", "none.csv"),
        ("score {folder} {folder}/pairs.csv", "fit.json"),
        ("score {run} {folder}/pairs.csv --best_of mean", "single items"),
        ("score {run} {folder}/other.csv", "price"),
        ("score {run} {folder}/pairs.csv --kappa -1", "kappa"),
        ("ask {run} {folder}/pairs.csv --n 0", "at least 1"),
        ("ask {run} {folder}/pairs.csv --n 999", "999"),
        ("ask {run} {folder}/pairs.csv --strategy Bald", "BALD"),
    ],
)
def test_wrong_input_is_refused_in_one_line(run, tmp_path, capsys, command, message):
    preferences(20).to_csv(tmp_path / "pairs.csv", index=False)
    other = {"first_price": [1], "second_price": [2], "preference": [1]}
    pd.DataFrame(other).to_csv(tmp_path / "other.csv", index=False)
    before = sorted(tmp_path.rglob("*"))
    assert main(command.format(folder=tmp_path, run=run).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_one_column_that_says_all_is_singled_out_among_many():
    draw = torch.Generator().manual_seed(0)
    items = torch.randn(240, 150, generator=draw)
    pairs = torch.arange(240).view(120, 2)
    preference = (items[pairs, 0].diff(dim=1)[:, 0] > 0).float()
    known = Comparisons(Clips.of_items(items), pairs, preference)
    tried = candidates("LaplaceHead")
    assert choose(tried, known, torch.arange(120), np.arange(120), splits=1).endswith("standout")
    assert list(candidates("LaplaceHead(hidden=[8])")) == ["as given"]
