"""Files of preferences: formats, matrices beside them, and what is refused before it is read."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from experiments.datasets import files
from experiments.datasets.files import PreferenceFile
from rewardmodels import InvalidInput, UnreadableFile
from rewardmodels.tables import Columns

FRAME = pd.DataFrame(
    {
        "first": [[1.0, 2.0], [3.0, 4.0]],
        "second": [[0.5, 1.0], [1.0, 1.0]],
        "preference": [1, 0],
        "group": ["NA", "None"],
    }
)
DIFFERENCES = [[-0.5, -1.0], [-2.0, -3.0]]


def write(frame, path):
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    elif path.suffix == ".json":
        frame.to_json(path, orient="records")
    elif path.suffix in (".jsonl", ".ndjson"):
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    else:
        data = pytest.importorskip("datasets")
        data.Dataset.from_pandas(frame).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.parquet", "a.jsonl", "a.ndjson", "a.json", "folder"]
)
def test_every_format_holds_the_same_comparisons(tmp_path, name):
    table = PreferenceFile(write(FRAME, tmp_path / name)).read()
    assert table.differences().tolist() == DIFFERENCES
    assert table.comparisons.preference.tolist() == [1, 0]
    assert table.groups.tolist() == [0, 1]


def test_a_dictionary_of_data_sets_is_a_split(tmp_path):
    data = pytest.importorskip("datasets")
    parts = {"train": FRAME[:1], "test": FRAME[1:]}
    both = {name: data.Dataset.from_pandas(part) for name, part in parts.items()}
    data.DatasetDict(both).save_to_disk(tmp_path / "both")
    assert PreferenceFile(tmp_path / "both").read().tested.tolist() == [False, True]


@pytest.mark.parametrize("name", ["items.npy", "items.safetensors"])
def test_ids_are_rows_of_a_matrix_beside_the_file(tmp_path, name):
    matrix = torch.arange(8, dtype=torch.float).view(4, 2) ** 2
    if name.endswith("npy"):
        np.save(tmp_path / name, matrix)
    else:
        save_file({"items": matrix}, tmp_path / name)
    ids = pd.DataFrame({"chosen": [0, 1], "rejected": [3, 2]})
    file = PreferenceFile(write(ids, tmp_path / "ids.csv"), features=tmp_path / name)
    torch.testing.assert_close(file.read().differences(), matrix[[3, 2]] - matrix[[0, 1]])
    items = PreferenceFile(write(pd.DataFrame({"item": [2]}), tmp_path / "items.csv"))
    items = PreferenceFile(items.path, features=tmp_path / name).items(names=["a", "b"])
    torch.testing.assert_close(items.clips.observations[:, 0], matrix[[2]])


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("missing.csv", None, InvalidInput),
        ("empty.csv", b"", InvalidInput),
        ("header.csv", b"first_0,second_0,preference\n", InvalidInput),
        ("one.csv", b"first_0,second_0,preference\n1,2,1\n", InvalidInput),
        ("table.xlsx", b"PK", InvalidInput),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", UnreadableFile),
        ("quote.csv", b'a,b\n"1,2\n1,2\n', UnreadableFile),
        ("latin.csv", "a,b\né,1\n".encode("latin-1"), UnreadableFile),
        ("binary.csv", bytes(range(256)) * 9, UnreadableFile),
        ("cut.jsonl", b'{"first": [1], "sec', UnreadableFile),
        ("list.json", b"[1, 2", UnreadableFile),
        ("numbers.jsonl", b"1\n2\n", UnreadableFile),
        ("cut.parquet", b"PAR1 and no more PAR1", UnreadableFile),
        ("text.parquet", b"first_0,second_0\n1,2\n", UnreadableFile),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name, content, error):
    path = tmp_path / name
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as refused:
        PreferenceFile(path).read()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("missing.npy", None, InvalidInput),
        ("matrix.csv", b"1,2", InvalidInput),
        ("cut.npy", b"\x93NUMPY", UnreadableFile),
        ("cut.safetensors", b"\x10", UnreadableFile),
    ],
)
def test_a_matrix_that_cannot_be_read_is_refused(tmp_path, name, content, error):
    ids = write(pd.DataFrame({"chosen": [0, 1], "rejected": [3, 2]}), tmp_path / "ids.csv")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error):
        PreferenceFile(ids, features=tmp_path / name).read()


def test_a_file_of_two_tensors_is_refused(tmp_path):
    ids = write(pd.DataFrame({"chosen": [0, 1], "rejected": [3, 2]}), tmp_path / "ids.csv")
    save_file({"a": torch.eye(4), "b": torch.eye(4)}, tmp_path / "two.safetensors")
    with pytest.raises(InvalidInput, match="one tensor"):
        PreferenceFile(ids, features=tmp_path / "two.safetensors").read()


def test_a_file_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "available_memory", lambda: 4 * 2**30)
    monkeypatch.setattr(pd, "read_csv", pytest.fail)
    with open(tmp_path / "large.csv", "wb") as file:
        file.truncate(10 * 2**30)  # a hole, which takes no space
    with pytest.raises(InvalidInput, match=r"10\.0 GiB.*--features"):
        PreferenceFile(tmp_path / "large.csv").read()


def test_available_memory_is_at_most_the_machines():
    total = files.os.sysconf("SC_PAGE_SIZE") * files.os.sysconf("SC_PHYS_PAGES")
    assert 0 < files.available_memory() <= total


def test_a_damaged_folder_of_a_data_set_is_refused(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": 1}))
    with pytest.raises(UnreadableFile):
        PreferenceFile(tmp_path).read()


def test_a_matrix_and_a_language_model_exclude_each_other(tmp_path):
    path = write(FRAME, tmp_path / "a.jsonl")
    with pytest.raises(InvalidInput, match="both"):
        PreferenceFile(path, features=path, embed=tmp_path).read()


def test_pairs_that_were_not_compared_are_read_without_labels(tmp_path):
    path = write(FRAME.drop(columns="preference"), tmp_path / "pairs.jsonl")
    table = PreferenceFile(path, Columns(group="group")).read(names=["x", "y"], labelled=False)
    assert table.differences().tolist() == DIFFERENCES
    assert table.names == ("x", "y")
