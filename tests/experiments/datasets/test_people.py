"""People's comparisons: each file's layout, by hand-made values, and the regression to beat."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from experiments.datasets import people
from experiments.datasets.people import (
    HUMAN_DATA,
    HumanData,
    baseline,
    load_delivery,
    load_pandalm,
    load_tickets,
    splits,
)
from rewardmodels import Clips, Comparisons, DeepEnsemble, fit
from rewardmodels.calibration import log_loss
from rewardmodels.errors import InvalidInput, UnreadableFile

LABELS = np.array(["move", "flag", "sheep", "coin", "roadblock", "mud"])


def walk(start, *steps):
    """Positions (4, 2) and actions (3, 2)."""
    actions = np.array(steps, np.int8)
    return np.concatenate([[start], start + actions.cumsum(0)]).astype(np.int8), actions


WALKS = [
    walk((0, 0), (1, 0), (1, 0), (0, 1)),
    walk((5, 5), (0, 1), (0, 1), (1, 0)),
    walk((9, 0), (-1, 0), (0, 1), (0, 1)),
    walk((4, 8), (0, -1), (1, 0), (1, 0)),
]
PAIRS = [(0, 1), (1, 0), (0, 1), (2, 3), (1, 2)]


@pytest.fixture
def delivery(tmp_path):
    board = np.zeros((10, 10), int)
    board[8, 9], board[2, 0], board[5, 6] = 7, 1, 6
    met = np.zeros((4, 3, 6), np.float32)
    met[..., 0] = 1
    met[1, 0] = (0, 0, 0, 0, 0, 1)
    positions, actions = (np.stack(part) for part in zip(*WALKS, strict=True))
    rows = np.array(PAIRS)
    np.savez(
        tmp_path / "delivery.npz",
        positions=positions[rows],
        actions=actions[rows],
        features=met[rows],
        feature_names=LABELS,
        preference=np.array([1, 0, 0.5, 0, 1], np.float32),
        board=board,
    )
    return tmp_path


@pytest.fixture
def pandalm(tmp_path):
    draw = np.random.default_rng(0)
    asked, answers = draw.normal(size=(2, 3)), draw.normal(size=(3, 3))
    first, second = np.array([0, 1, 0, 2]), np.array([1, 2, 1, 0])
    np.savez(
        tmp_path / "pandalm.npz",
        instruction=asked[[0, 0, 1, 0]].astype(np.float16),
        first=answers[first].astype(np.float16),
        second=answers[second].astype(np.float16),
        first_words=np.array([0, 5, 9])[first],
        second_words=np.array([0, 5, 9])[second],
        preference=np.array([1, 0.5, 0, 0], np.float32),
    )
    return tmp_path


def made(n=400, groups=20, seed=0):
    """Comparisons by a known linear reward, whose features differ a thousandfold in scale."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, 2, 2)) * (1, 1000)
    difference = x[:, 1] - x[:, 0]
    said = draw.random(n) < expit(difference @ (1.0, 0.001))
    clips = Clips(torch.from_numpy(x.reshape(2 * n, 1, 2)).float(), torch.zeros(2 * n, 1, 0))
    comparisons = Comparisons(clips, torch.arange(2 * n).view(n, 2), torch.from_numpy(said).float())
    return HumanData("made", comparisons, draw.integers(groups, size=n), difference, {})


def test_a_frame_of_a_delivery_holds_features_change_of_distance_and_position(delivery):
    data = load_delivery(delivery)
    seen, done = data.comparisons.clips.observations, data.comparisons.clips.actions
    for row, pair in enumerate(PAIRS):
        for side, which in enumerate(pair):
            clip = int(data.comparisons.pairs[row, side])
            places, steps = WALKS[which]
            for t in range(3):
                far = [
                    min(abs(int(x) - a) + abs(int(y) - b) for a, b in ((8, 9), (2, 0)))
                    for x, y in places[t : t + 2]
                ]
                mud = float(which == 1 and t == 0)
                expected = [1 - mud, 0, 0, 0, 0, mud, far[1] - far[0], *places[t]]
                assert seen[clip, t].tolist() == expected
                assert done[clip, t].tolist() == steps[t].tolist()


def test_equal_walks_are_one_clip_and_a_pair_is_one_group_in_either_order(delivery):
    data = load_delivery(delivery)
    assert data.comparisons.clips.observations.shape == (4, 3, 9)
    same = data.groups[:, None] == data.groups
    expected = [[set(a) == set(b) for b in PAIRS] for a in PAIRS]
    assert same.tolist() == expected
    assert data.held_out["mud"].tolist() == [True, True, True, False, True]
    assert data.decided.tolist() == [True, True, False, True, True]


def test_features_of_a_delivery_are_sums_change_and_first_distance(delivery):
    features = load_delivery(delivery).features
    # Walk 0 goes from 2 cells off the nearer goal to 1, walk 1 from 7 to 4 by way of mud.
    assert features[0].tolist() == [-1, 0, 0, 0, 0, 1, -3 - -1, 7 - 2]
    assert features[1].tolist() == (-features[0]).tolist()


def test_a_board_without_a_goal_is_refused(delivery):
    with np.load(delivery / "delivery.npz") as file:
        content = dict(file)
    np.savez(delivery / "delivery.npz", **{**content, "board": np.zeros((10, 10), int)})
    with pytest.raises(InvalidInput, match="goal"):
        load_delivery(delivery)


def test_a_frame_of_a_response_is_its_embedding_product_and_length(pandalm):
    data = load_pandalm(pandalm)
    with np.load(pandalm / "pandalm.npz") as file:
        asked, first, second = (file[k].astype(float) for k in ("instruction", "first", "second"))
    pairs, clips = data.comparisons.pairs, data.comparisons.clips
    for row, words in enumerate([(0, 5), (5, 9), (0, 5), (9, 0)]):
        for side, answer in enumerate((first, second)):
            expected = [*answer[row], *(answer[row] * asked[row]), np.log(1 + words[side])]
            came = clips.observations[int(pairs[row, side]), 0]
            assert came.tolist() == pytest.approx(expected, rel=1e-6)
    assert clips.observations.dtype == torch.float32
    assert data.features[:, -1] == pytest.approx(np.log([6, 10 / 6, 6, 1 / 10]))
    # Three answers to one instruction, two of which were given to another too.
    assert clips.actions.shape == (5, 1, 0)
    assert (data.groups == data.groups[0]).tolist() == [True, True, False, True]


def test_equal_tickets_are_one_clip(tmp_path):
    tickets = np.array([[2400.0, 150, 0, 1], [4000, 150, 0, 1], [2400, 115, 1, 0]])
    first, second = [0, 1, 2, 0], [1, 2, 1, 1]
    np.savez(
        tmp_path / "train_tickets.npz",
        first=tickets[first],
        second=tickets[second],
        preference=np.array([0, 1, 1, 0], np.float32),
        person=np.array([4, 4, 9, 9], np.int32),
    )
    data = load_tickets(tmp_path)
    clips, pairs = data.comparisons.clips, data.comparisons.pairs
    assert clips.observations.shape == (3, 1, 4)
    assert clips.observations[pairs[:, 0], 0].tolist() == tickets[first].tolist()
    assert clips.observations[pairs[:, 1], 0].tolist() == tickets[second].tolist()
    assert data.features[0].tolist() == [1600, 0, 0, 0]
    assert data.groups.tolist() == [0, 0, 1, 1]


def test_a_predictor_learns_from_frames_without_an_action(pandalm):
    said = load_pandalm(pandalm).comparisons
    model = fit(DeepEnsemble(members=2, learning_rate=1e-2), said, epochs=60)
    assert (model.posterior(said.clips).preference(said.pairs[:1]) > 0.5).all()


@pytest.mark.parametrize("name", HUMAN_DATA)
def test_a_folder_without_the_file_is_refused_by_name(name, tmp_path):
    file = {"tickets": "train_tickets"}.get(name, name)
    with pytest.raises(InvalidInput, match=rf"{file}\.npz"):
        HUMAN_DATA[name](tmp_path)


def test_a_file_that_lacks_a_column_or_is_damaged_is_unreadable(tmp_path):
    path = tmp_path / "train_tickets.npz"
    np.savez(path, first=np.zeros((1, 4)))
    with pytest.raises(UnreadableFile, match="train_tickets"):
        load_tickets(tmp_path)
    path.write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(UnreadableFile, match="train_tickets"):
        load_tickets(tmp_path)


def test_what_cannot_be_split_or_fitted_is_refused():
    data, rows = made(), np.arange(400)
    one = np.flatnonzero(data.groups == data.groups[0])
    for call, argument in (
        (lambda: replace(data, groups=data.groups[:-1]), "groups"),
        (lambda: replace(data, held_out={"mud": np.ones(3, bool)}), "held_out"),
        (lambda: replace(data, features=np.where(rows == 7, np.nan, 1.0)[:, None]), "features"),
        (lambda: splits(data, 1), "folds"),
        (lambda: splits(data, 21), "folds"),  # of 20 groups
        (lambda: baseline(data, one, one), "train"),
    ):
        with pytest.raises(InvalidInput, match=argument):
            call()


def test_splits_test_each_row_once_and_no_group_on_both_sides():
    data = made()
    tested = []
    for train, test in splits(data, seed=3):
        assert not set(data.groups[train]) & set(data.groups[test])
        assert sorted([*train, *test]) == list(range(400))
        tested.extend(test)
    assert sorted(tested) == list(range(400))
    folds = [[test.tolist() for _, test in splits(data, seed=seed)] for seed in (3, 3, 4)]
    assert folds[0] == folds[1] != folds[2]


def test_the_baseline_is_the_logistic_regression_that_a_minimiser_finds(monkeypatch):
    data = made()
    train, test = np.arange(300), np.arange(300, 400)
    strength = 0.05
    monkeypatch.setattr(people, "_STRENGTHS", [strength])
    x, said = data.features, data.comparisons.preference.numpy()
    scale = np.sqrt((x[train] ** 2).mean(0))
    sign = 2 * said[train] - 1

    def penalised(w):
        likelihood = np.logaddexp(0, -sign * (x[train] / scale @ w)).sum()
        return w @ w / 2 + strength * 2 * likelihood  # each pair both ways round

    weights = minimize(penalised, np.zeros(2), tol=1e-10).x
    expected = expit(x[test] / scale @ weights)
    assert baseline(data, train, test) == pytest.approx(expected, abs=1e-3)


def test_the_baseline_does_not_depend_on_which_was_written_first_nor_on_ties():
    data = made()
    train, test = np.arange(300), np.arange(300, 400)
    second = baseline(data, train, test)

    swap = np.random.default_rng(1).random(400) < 0.5
    pairs, said = data.comparisons.pairs, data.comparisons.preference
    turned = Comparisons(
        data.comparisons.clips,
        torch.where(torch.from_numpy(swap)[:, None], pairs.flip(1), pairs),
        torch.where(torch.from_numpy(swap), 1 - said, said),
    )
    sign = np.where(swap, -1.0, 1.0)[:, None]
    other = baseline(replace(data, comparisons=turned, features=data.features * sign), train, test)
    assert np.where(swap[test], 1 - other, other) == pytest.approx(second, abs=1e-4)

    # Ties whose features would pull hard, were they trained on.
    tied = replace(data.comparisons, preference=torch.where(torch.arange(400) < 50, 0.5, said))
    features = data.features.copy()
    features[:50] = 1e6
    without = baseline(replace(data, comparisons=tied, features=features), train, test)
    assert without == pytest.approx(baseline(data, train[50:], test), abs=1e-12)


@pytest.mark.slow
@pytest.mark.skipif("REWARDMODELS_DATA" not in os.environ, reason="REWARDMODELS_DATA isn't set")
@pytest.mark.parametrize(
    ("name", "answers", "accuracy", "loss"),
    [
        ("delivery", 2762, 0.750, 0.520),
        ("pandalm", 999, 0.638, 0.626),
        ("tickets", 2929, 0.689, 0.592),
    ],
)
def test_the_baselines_of_the_real_data(name, answers, accuracy, loss):
    data = HUMAN_DATA[name](Path(os.environ["REWARDMODELS_DATA"]))
    assert len(data.comparisons) == answers
    second = np.zeros(answers)
    for train, test in splits(data):
        second[test] = baseline(data, train, test)
    said = data.comparisons.preference[data.decided]
    p = torch.from_numpy(second[data.decided])
    assert float(((p > 0.5) == (said > 0.5)).double().mean()) == pytest.approx(accuracy, abs=0.01)
    assert log_loss(p, said) == pytest.approx(loss, abs=0.01)
