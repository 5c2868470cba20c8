"""Tables of comparisons and of single items: what is read, and what is refused with its row."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from rewardmodels import Comparisons, InvalidInput, UnknownName
from rewardmodels.tables import Columns, ItemTable, PreferenceTable

FIRST = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
SECOND = np.array([[0.0, 1.0], [1.0, 1.0], [9.0, 7.0]], np.float32)
PREFERENCE = [1.0, 0.25, 0.0]


def in_columns(first="first", second="second", names=("0", "1")):
    sides = {first: FIRST, second: SECOND}
    parts = [pd.DataFrame(x, columns=names).add_prefix(f"{side}_") for side, x in sides.items()]
    return pd.concat(parts, axis=1).assign(preference=PREFERENCE)


def in_lists(convert):
    sides = {"first": [convert(x) for x in FIRST], "second": [convert(x) for x in SECOND]}
    return pd.DataFrame(sides | {"preference": PREFERENCE})


def small(**columns):
    """Three comparisons of prices, with columns replaced or added."""
    prices = {"first_price": [1.0, 2.0, 3.0], "second_price": [4.0, 5.0, 6.0]}
    return pd.DataFrame(prices | {"preference": [0, 1, 1]} | columns)


@pytest.mark.parametrize(
    "frame",
    [
        in_columns(),
        in_columns("chosen", "rejected"),
        in_columns().sample(frac=1, axis=1, random_state=0)[::1],
        in_columns().astype(object),
        in_columns().astype(str),
        in_lists(list),
        in_lists(np.asarray),
        in_lists(lambda x: str(x.tolist())),
        in_lists(torch.from_numpy),
        {"first": FIRST, "second": torch.from_numpy(SECOND), "preference": np.array(PREFERENCE)},
    ],
)
def test_features_are_read_from_columns_and_from_lists(frame):
    table = PreferenceTable.from_frame(frame)
    order = [table.names.index(name) for name in ("0", "1")]
    np.testing.assert_array_equal(table.differences()[:, order], SECOND - FIRST)
    np.testing.assert_allclose(table.comparisons.preference, PREFERENCE)
    assert table.rows.tolist() == [0, 1, 2]
    assert table.groups is table.tested is None


def test_named_features_of_both_sides_are_matched_by_name():
    frame = in_columns(names=("price", "time"))[
        ["second_time", "first_price", "second_price", "first_time", "preference"]
    ]
    table = PreferenceTable.from_frame(frame)
    assert table.names == ("price", "time")
    np.testing.assert_array_equal(table.differences(), SECOND - FIRST)
    of_model = PreferenceTable.from_frame(frame, names=["time"])
    np.testing.assert_array_equal(of_model.differences(), (SECOND - FIRST)[:, 1:])


def test_ids_are_rows_of_a_matrix_which_is_not_copied(tmp_path):
    np.save(tmp_path / "items.npy", np.concatenate([FIRST, SECOND]).astype(np.float16))
    features = np.load(tmp_path / "items.npy", mmap_mode="c")
    frame = {"first": [0, 1, 2], "second": [3, 4, 5], "preference": PREFERENCE}
    table = PreferenceTable.from_frame(frame, features=features)
    np.testing.assert_array_equal(table.differences(), SECOND - FIRST)
    assert np.shares_memory(table.comparisons.clips.observations.numpy(), features)


def test_chosen_is_preferred_by_its_margin():
    frame = in_columns("chosen", "rejected").drop(columns="preference")
    assert Comparisons.from_frame(frame).preference.tolist() == [0, 0, 0]
    margin = torch.tensor([0.0, 1.0, 50.0])
    found = Comparisons.from_frame(frame.assign(margin=margin.numpy())).preference
    torch.testing.assert_close(found, (-margin).sigmoid())


def test_weights_repeat_a_row_with_its_group_and_split():
    frame = small(weight=[2, 1, 3], group=["b", "a", "b"], split=["train", "test", "validation"])
    table = PreferenceTable.from_frame(frame)
    assert table.rows.tolist() == [0, 0, 1, 2, 2, 2]
    assert table.groups.tolist() == [0, 0, 1, 0, 0, 0]
    assert table.tested.tolist() == [False, False, True, True, True, True]
    part = table[table.tested]
    assert part.rows.tolist() == [1, 2, 2, 2]
    assert len(part.comparisons) == len(part.groups) == 4


def test_equal_items_are_one_clip():
    table = PreferenceTable.from_frame(small(second_price=[2.0, -0.0, 0.0]))
    assert table.comparisons.pairs.tolist() == [[0, 1], [1, 3], [2, 3]]
    assert table.comparisons.clips.observations.flatten().tolist() == [1, 2, 3, 0]


def test_columns_have_other_names_where_these_are_passed():
    frame = small().rename(
        columns={"first_price": "a_price", "second_price": "b_price", "preference": "b_wins"}
    )
    table = PreferenceTable.from_frame(frame, Columns(first="a", second="b", preference="b_wins"))
    assert table.differences().flatten().tolist() == [3, 3, 3]
    with pytest.raises(UnknownName, match="b_wins"):
        PreferenceTable.from_frame(frame, Columns(first="a", second="b", preference="b_win"))


def test_a_data_set_is_read_by_its_own_frame():
    class Split:
        def to_pandas(self):
            return small()

    torch.testing.assert_close(
        Comparisons.from_dataset(Split()).pairs, Comparisons.from_frame(small()).pairs
    )
    with pytest.raises(InvalidInput, match="one split"):
        Comparisons.from_dataset({"train": small()})


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (small()[:0], "at least one row"),
        (small().rename(columns={"first_price": "price"}), "first and second"),
        (small().drop(columns="preference"), "preference: expected a column"),
        (small(first_price=[1, np.nan, 3]), "first_price.*nothing in row 1"),
        (small(first_price=[1, np.inf, 3]), "first_price.*inf in row 1"),
        (small(first_price=[1, 1e300, 3]), r"first_price.*1e\+300 in row 1"),
        (small(first_price=[1, "2", "dear"]), "first_price.*'dear' in row 2"),
        (small(first_price=pd.array([1, None, 3], "Int64")), "first_price.*nothing in row 1"),
        (small(first_price=pd.to_datetime(["2020-01-01"] * 3)), "first_price.*datetime"),
        (small(first_price=[[1], {}, None]), "first_price"),
        (small(first_price=[4.0, 2.0, 6.0]), "two different items.*row 0 .*and in 1 more"),
        (small(first_time=[1, 2, 3]), "same features.*time"),
        (small(preference=[0, 1, 1.01]), "preference.*1.01 in row 2"),
        (small(preference=[0, -1, 1]), "preference.*-1 in row 1"),
        (small(preference=[0, None, 1]), "preference.*nothing in row 1"),
        (small(preference=["first", "second", "first"]), "preference.*'first' in row 0"),
        (small(margin=[1, -1, 1]), "margin.*-1 in row 1"),
        (small(weight=[1, 1.5, 1]), "weight.*1.5 in row 1"),
        (small(weight=[1, 0, 1]), "weight.*0 in row 1"),
        (small(weight=[9_000_000] * 3), "weight.*in all"),
        (small(group=["a", None, "b"]), "group.*nothing in row 1"),
        (small(split=["train", "tests", "test"]), "split.*'tests' in row 1"),
        (small(split="train"), "split.*train only"),
        (pd.concat([small(), small()], axis=1), "different names"),
        ({"first_0": [1, 2], "second_0": [1]}, "equal lengths"),
        (pd.DataFrame({"first": [[1, 2], [3]], "second": [[3, 4], [5, 6]]}), "first.*1 in row 1"),
        (pd.DataFrame({"first": [[1], [3]], "second": [[3], [5, 6]]}), "second.*2 in row 1"),
        (
            pd.DataFrame({"first": ["[1]", "[b"], "second": ["[3]", "[5]"]}),
            r"first.*'\[b' in row 1",
        ),
        (pd.DataFrame({"first": [[1], [np.nan]], "second": [[3], [5]]}), "first.*NaN.*row 1"),
        (pd.DataFrame({"first": [[1], None], "second": [[3], [5]]}), "first.*nothing in row 1"),
        (pd.DataFrame({"first": ["a", "b"], "second": ["c", "d"]}), "first.*texts with `embed`"),
        (pd.DataFrame({"first": [0, 1], "second": [1, 2]}), "first.*row numbers of `features`"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(frame, match):
    with pytest.raises(InvalidInput, match=match) as refused:
        PreferenceTable.from_frame(frame)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("ids", "features", "match"),
    [
        ([0, 1, 6], np.eye(6), "first.*6 in row 2"),
        ([0, -1, 2], np.eye(6), "first.*-1 in row 1"),
        ([0, None, 2], np.eye(6), "first.*nothing in row 1"),
        ([0, 1.5, 2], np.eye(6), "first.*1.5 in row 1"),
        ([0, "b", 2], np.eye(6), "first.*'b' in row 1"),
        ([0, 4, 2], np.eye(6), "two different.*row 1"),
        ([0, 1, 2], np.ones(6), "features.*shape"),
        ([0, 1, 2], np.diag([1.0] * 5 + [np.nan]), "features.*NaN.*row 5"),
    ],
)
def test_ids_without_features_are_refused(ids, features, match):
    frame = pd.DataFrame({"first": ids, "second": [3, 4, 5], "preference": PREFERENCE})
    with pytest.raises(InvalidInput, match=match):
        PreferenceTable.from_frame(frame, features=features)


@pytest.mark.parametrize(
    ("frame", "match"),
    [(small()[:1], "two rows"), (small(preference=0.5), "ties"), (small(margin=0), "ties")],
)
def test_a_table_that_teaches_nothing_is_refused(frame, match):
    with pytest.raises(InvalidInput, match=match):
        PreferenceTable.from_frame(frame).check()


TURNED = {"first_price": [1, 4, 3], "second_price": [4, 1, 6]}  # the same pair in two rows


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (TURNED | {"preference": [0, 0, 1]}, "1 pair.*0 and 1"),
        ({"group": "a"}, "one group"),
        ({"group": ["a", "b", "a"], "split": ["train", "train", "test"]}, "1 group.*row 2"),
        (TURNED | {"split": ["train", "test", "test"]}, "1 pair.*row 1"),
    ],
)
def test_what_may_mislead_is_warned_of(changed, match):
    with pytest.warns(UserWarning, match=match):
        PreferenceTable.from_frame(small(**changed)).check()


def test_an_agreeing_repetition_and_a_tie_are_no_contradiction():
    changed = {"first_price": [1, 4, 1], "second_price": [4, 1, 4], "preference": [0.2, 0.9, 0.5]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PreferenceTable.from_frame(small(**changed)).check()


def test_pairs_that_were_not_compared_need_no_preference():
    table = PreferenceTable.from_frame(small().drop(columns="preference"), labelled=False)
    assert table.comparisons.preference.tolist() == [0.5, 0.5, 0.5]


ITEMS = {"time": [1.0, 2.0], "price": [3.0, 4.0]}


@pytest.mark.parametrize(
    "columns",
    [
        ITEMS | {"group": ["b", "a"], "name": ["x", "y"]},
        {f"item_{name}": values for name, values in ITEMS.items()} | {"group": [7, 5]},
        {"item": [[3.0, 1.0], [4.0, 2.0]], "group": ["b", "a"]},
        ITEMS | {"item": ["text", "other"], "group": ["b", "a"]},
    ],
)
def test_items_have_the_features_of_a_model_in_its_order(columns):
    table = ItemTable.from_frame(columns, names=["price", "time"])
    assert table.clips.observations[:, 0].tolist() == [[3, 1], [4, 2]]
    assert table.names == ("price", "time")
    assert table.groups.tolist() == [0, 1]
    assert len(table) == 2


def test_items_without_a_model_have_all_features():
    table = ItemTable.from_frame(ITEMS | {"group": ["a", "b"]})
    assert table.names == ("time", "price")
    assert ItemTable.from_frame(pd.DataFrame(FIRST)).names == ("0", "1")


def test_items_are_rows_of_a_matrix_which_is_not_copied_if_they_are_in_its_order():
    features = FIRST.copy()
    every = ItemTable.from_frame({"item": [0, 1, 2]}, features=features)
    assert np.shares_memory(every.clips.observations.numpy(), features)
    some = ItemTable.from_frame({"item": [2, 0]}, features=features)
    np.testing.assert_array_equal(some.clips.observations[:, 0], FIRST[[2, 0]])


@pytest.mark.parametrize(
    ("columns", "features", "match"),
    [
        ({"time": [1.0]}, None, "a column for price"),
        ({"item": [[1.0, 2.0, 3.0]]}, None, "item.*2 numbers.*3 in row 0"),
        ({"item": [0]}, np.eye(3), "features.*2 numbers"),
        ({"item": [4]}, np.ones((3, 2)), "item.*4 in row 0"),
        ({"thing": [0]}, np.ones((3, 2)), "a column item"),
        ({"time": [1.0], "price": ["dear"]}, None, "price.*'dear' in row 0"),
    ],
)
def test_items_unlike_those_of_the_model_are_refused(columns, features, match):
    with pytest.raises(InvalidInput, match=match):
        ItemTable.from_frame(columns, features=features, names=["price", "time"])
