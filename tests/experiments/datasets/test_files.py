"""Files of preferences: formats, matrices beside them, and what is refused before it is read."""

import json
from pathlib import Path

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


@pytest.fixture
def episodes(tmp_path):
    """A Minari data set of episodes of 5, 6 and 7 steps, without rewards."""
    minari = pytest.importorskip("minari")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    boxes = Box(-99, 99, (2,), np.float32), Box(-99, 99, (1,), np.float32)
    (tmp_path / "set").mkdir()
    storage = MinariStorage.new(tmp_path / "set" / "data", *boxes, None)
    storage.update_metadata({"dataset_id": "own/walks-v0", "minari_version": minari.__version__})
    buffers = [
        EpisodeBuffer(
            observations=np.arange(2.0 * n + 2, dtype=np.float32).reshape(-1, 2) + 10 * n,
            actions=np.arange(n, dtype=np.float32)[:, None],
            rewards=np.full(n, np.nan),
            terminations=np.zeros(n, bool),
            truncations=np.arange(n) == n - 1,
        )
        for n in (5, 6, 7)
    ]
    storage.update_episodes(buffers)
    return buffers, Path(f"minari:{tmp_path / 'set'}")


CLIPS = pd.DataFrame(
    {
        "first_episode": [0, 2],
        "first_start": [1, 4],
        "second_episode": [2, 1],
        "second_start": [4, 0],
        "preference": [0, 1],
    }
)


@pytest.mark.parametrize("length", [[3, 2], None])
def test_clips_of_recorded_episodes_are_compared(episodes, tmp_path, length):
    buffers, data = episodes
    frame = CLIPS if length is None else CLIPS.assign(length=length)
    table = PreferenceFile(write(frame, tmp_path / "clips.csv"), features=data).read()
    for row in range(2):
        summed = []
        for side in ("first", "second"):
            buffer, start = buffers[frame[f"{side}_episode"][row]], frame[f"{side}_start"][row]
            end = len(buffer.actions) if length is None else start + length[row]
            frames = [buffer.observations[start + 1 : end + 1], buffer.actions[start:end]]
            summed.append(np.concatenate(frames, 1).sum(0))
        np.testing.assert_allclose(table.differences()[row], summed[1] - summed[0])
    assert table.names == ("observation 0", "observation 1", "action 0")
    # The second of the one is the first of the other, where their lengths are the same.
    assert len(table.comparisons.clips) == (3 if length is None else 4)


@pytest.mark.parametrize(
    ("column", "values", "match"),
    [
        ("first_episode", [0, 3], "first_episode.*3 in row 1"),
        ("second_start", [5, 0], "second_start.*5 in row 0"),
        ("first_start", [1, None], "first_start.*nothing in row 1"),
        ("length", [3, 0], "length.*0 in row 1"),
    ],
)
def test_clips_that_are_not_in_the_episodes_are_refused(episodes, tmp_path, column, values, match):
    frame = CLIPS.assign(length=[3, 2]).assign(**{column: values})
    with pytest.raises(InvalidInput, match=match):
        PreferenceFile(write(frame, tmp_path / "clips.csv"), features=episodes[1]).read()


def test_clips_need_a_data_set_that_is_there(tmp_path):
    pytest.importorskip("minari")
    path = write(CLIPS, tmp_path / "clips.csv")
    with pytest.raises(InvalidInput):
        PreferenceFile(path, features=Path("minari:no/such-v0")).read()
