"""Saved models, refused files, and atomic writes."""

import json
import math
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rewardmodels import (
    Calibrated,
    Clips,
    Comparisons,
    DeepEnsemble,
    InvalidInput,
    NotFitted,
    UnreadableFile,
    fit,
    load,
    save,
)
from rewardmodels.networks import MemberMLP
from rewardmodels.saving import atomic_path, content_checksum

CLIPS = Clips(torch.randn(12, 3, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(12, 3))
ANSWERS = Comparisons(CLIPS, torch.arange(12).view(6, 2), torch.tensor([0, 1, 1, 0, 0.5, 1]))


class Mine(DeepEnsemble):
    """A third party's, whose networks depend on the data that it saw first."""

    def build(self, inputs: int) -> None:
        super().build(inputs)
        self.network = MemberMLP(self.members, inputs, (len(self.reference_observations),))


@pytest.fixture(scope="module")
def model() -> DeepEnsemble:
    return fit(DeepEnsemble(members=3, hidden=(8, 4), random_answer_rate=0.1), ANSWERS, epochs=3)


@pytest.fixture
def file(model: DeepEnsemble, tmp_path: Path) -> Path:
    save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_round_trip_is_equal_to_the_last_bit(model, file):
    before = torch.get_rng_state()
    again = load(file)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(again) is DeepEnsemble
    assert dict(again.hparams) == dict(model.hparams)
    assert again.spec == model.spec
    assert torch.equal(again.posterior(CLIPS).samples, model.posterior(CLIPS).samples)
    one, other = model.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype


def test_a_loaded_model_goes_on_learning_as_the_saved_one_would(file, tmp_path):
    one, other = load(file), load(file)
    save(one, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    for each in (one, other, load(tmp_path / "again")):
        fit(each, ANSWERS, epochs=2)
        assert torch.equal(each.counts(6), one.counts(6))
        assert torch.equal(each.posterior(CLIPS).samples, one.posterior(CLIPS).samples)


def test_a_class_of_someone_elses(file, tmp_path):
    mine = fit(Mine(members=2), ANSWERS, epochs=2)
    save(mine, tmp_path / "mine")
    again = load(tmp_path / "mine", Mine)
    assert torch.equal(again.posterior(CLIPS).samples, mine.posterior(CLIPS).samples)
    with pytest.raises(UnreadableFile, match=r"expected one of .*, got a Mine; pass its"):
        load(tmp_path / "mine")
    with pytest.raises(UnreadableFile, match="expected Mine, got a DeepEnsemble"):
        load(file, Mine)


def test_nothing_to_save(tmp_path):
    with pytest.raises(NotFitted, match="DeepEnsemble: expected a fitted model"):
        save(DeepEnsemble(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a file's code was run",)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def checkpoint(path: Path) -> None:
    torch.save({"state_dict": {}, "code": Bomb()}, path)


def foreign(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


@pytest.mark.parametrize("make", [pickled, checkpoint, foreign, huge_header, Path.touch])
def test_what_was_never_a_model_is_refused(tmp_path, make: Callable[[Path], None]):
    make(tmp_path / "file")
    with pytest.raises(UnreadableFile, match=r"file: expected a model written by rewardmodels"):
        load(tmp_path / "file")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(file, keep):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UnreadableFile, match="damaged"):
        load(file)


def test_a_missing_file_is_no_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def rewritten(file: Path, about: Any = None, **tensors: torch.Tensor | None) -> None:
    """Writes the file again, with other metadata or tensors and their checksum."""
    with safetensors.safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["rewardmodels"])
    header.pop("checksum", None)
    kept = {**safetensors.torch.load_file(file), **tensors}
    kept = {name: value for name, value in kept.items() if value is not None}
    if about is None or isinstance(about, dict):
        about = {**header, **(about or {})}
        about["checksum"] = content_checksum(about, kept)
    safetensors.torch.save_file(kept, file, {"rewardmodels": json.dumps(about)})


def test_a_flipped_bit_anywhere_is_refused(file):
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [*range(0, header, 23), *range(header, len(whole), 101)]
    for i, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << i % 8
        file.write_bytes(damaged)
        with pytest.raises(UnreadableFile):
            load(file)


def test_every_tensor_is_covered_by_the_checksum(file):
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    for name, value in tensors.items():
        changed = {**tensors, name: ~value if value.dtype == torch.bool else value + 1}
        safetensors.torch.save_file(changed, file, metadata)
        with pytest.raises(UnreadableFile, match="checksum"):
            load(file)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_neither_read_nor_written(file, tmp_path, number):
    model = load(file)
    learned = dict(model.named_parameters())
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or (number == math.inf and name not in learned):
            continue
        broken = value.clone()
        broken.view(-1)[-1] = number
        rewritten(file, **{name: broken})
        with pytest.raises(UnreadableFile, match="NaN or infinity"):
            load(file)
        rewritten(file, **{name: value})
    load(file)
    with torch.no_grad():
        model.network.weights[0][0, 0, 0] = number
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        save(model, tmp_path / "broken")


def test_another_runs_model_has_another_checksum(model, file, tmp_path):
    other = fit(DeepEnsemble(members=3, hidden=(8, 4)), ANSWERS, epochs=1)
    one, two = save(model, tmp_path / "one"), save(other, tmp_path / "two")
    load(file, checksum=one)
    with pytest.raises(UnreadableFile, match="another one"):
        load(tmp_path / "two", checksum=one)
    load(tmp_path / "two", checksum=two)


def test_a_file_without_a_checksum_is_read_if_its_format_had_none(model, file):
    with safetensors.safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["rewardmodels"])
    tensors = safetensors.torch.load_file(file)
    del header["checksum"]
    for version in (3, 4):
        text = json.dumps({**header, "format": version})
        safetensors.torch.save_file(tensors, file, {"rewardmodels": text})
        if version == 3:
            assert torch.equal(load(file).posterior(CLIPS).samples, model.posterior(CLIPS).samples)
    with pytest.raises(UnreadableFile, match="checksum"):
        load(file)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"format": 5}, "expected format 4 or older, got 5; update rewardmodels"),
        ({"format": "new"}, "damaged"),
        ({"format": None}, "damaged"),
        ({"class": "os.system"}, "expected one of DeepEnsemble, .*, got a os.system"),
        ({"spec": 3}, "damaged"),
        (
            {"spec": {"observation": [7], "action": [], "discrete_actions": 0}},
            "expected the tensors of a DeepEnsemble",
        ),
        ({"spec": {"observation": ["a"], "action": []}}, "damaged"),
        ({"hyper_parameters": {"members": 4, "hidden": [8, 4]}}, "expected the tensors"),
        ({"hyper_parameters": {"members": 0}}, "expected the tensors"),
        ({"hyper_parameters": {"command": "rm"}}, "expected the tensors"),
        ({"hyper_parameters": [1]}, "expected the tensors"),
        ({"hyper_parameters": {"members": 3, "hidden": [10**15]}}, "expected the tensors"),
        ([1, 2], "damaged"),
        ("text", "damaged"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(file, about, message):
    rewritten(file, about)
    with pytest.raises(UnreadableFile, match=message):
        load(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network.weights.0", torch.zeros(3, 2, 2)),
        ("network.weights.0", None),
        ("frame_inputs.norm.mean", None),
        ("gauge", None),
        ("gauge", torch.zeros(7)),
        ("reference_observations", None),
        ("reference_actions", torch.zeros(5, 9)),
        ("extra", torch.zeros(1)),
        ("network.extra", torch.zeros(1)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(file, name, value):
    rewritten(file, **{name: value})
    with pytest.raises(UnreadableFile, match="expected the tensors of a DeepEnsemble"):
        load(file)


@pytest.mark.filterwarnings("ignore::rewardmodels.FewComparisonsWarning")
@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_a_calibrated_model_comes_back_calibrated(model, method, tmp_path):
    calibrated = Calibrated(model, method)
    with pytest.raises(NotFitted, match="call calibrate first"):
        save(calibrated, tmp_path / "model")
    calibrated.calibrate(ANSWERS, random=True)
    save(calibrated, tmp_path / "model")
    again = load(tmp_path / "model")
    assert type(again) is Calibrated
    assert type(again.model) is DeepEnsemble
    one, other = (x.posterior(CLIPS) for x in (calibrated, again))
    assert torch.equal(one.preference(ANSWERS.pairs), other.preference(ANSWERS.pairs))
    sets = [x.prediction_set(ANSWERS.pairs, 0.5) for x in (one, other)]
    assert torch.equal(*sets)


@pytest.mark.filterwarnings("ignore::rewardmodels.FewComparisonsWarning")
def test_a_calibration_that_is_missing_is_noticed(model, tmp_path):
    save(Calibrated(model).calibrate(ANSWERS, random=True), tmp_path / "model")
    rewritten(tmp_path / "model", **{"calibration.scores": None})
    with pytest.raises(UnreadableFile, match="expected the tensors"):
        load(tmp_path / "model")


# Atomic writes.


def test_the_old_file_stands_until_the_new_one_is_atomic_path(tmp_path):
    path = tmp_path / "notes"
    path.write_text("old")
    with atomic_path(str(path)) as temporary:
        assert temporary.parent == path.parent  # elsewhere may be another disk, to which none moves
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("stood", [True, False])
def test_what_fails_leaves_the_old_file_and_no_other(tmp_path, error, stood):
    path = tmp_path / "notes"
    if stood:
        path.write_text("old")

    def write():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [file.read_text() for file in tmp_path.iterdir()] == stood * ["old"]


def test_an_existing_file_stays_where_it_may_not_be_overwritten_or_nothing_is_written(tmp_path):
    path = tmp_path / "notes"
    with atomic_path(path, overwrite=False) as temporary:
        temporary.write_text("first")
    with pytest.raises(FileExistsError), atomic_path(path, overwrite=False) as temporary:
        temporary.write_text("second")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert [file.read_text() for file in tmp_path.iterdir()] == ["first"]


def test_writers_at_once_do_not_share_a_file(tmp_path):
    path = tmp_path / "notes"
    with atomic_path(path) as one, atomic_path(path) as other:
        one.write_text("first")
        other.write_text("second, and longer")
    assert path.read_text() == "first"  # the outer one ends last
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    for fails in (True, False):
        with suppress(OSError), atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "notes").write_text("all")
            if fails:
                raise OSError
        assert len(list(tmp_path.rglob("*"))) == (0 if fails else 2)


def test_a_model_of_the_first_format_is_read(model, file):
    """That format had other names, of which a file of today's has these instead."""
    with safetensors.safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["rewardmodels"])
    settings = header["hyper_parameters"]
    settings["mistake_rate"] = settings.pop("random_answer_rate")
    rewritten(file, {"format": 1, "hyper_parameters": settings})
    again = load(file)
    assert again.random_answer_rate == model.random_answer_rate
    assert torch.equal(again.posterior(CLIPS).samples, model.posterior(CLIPS).samples)


def test_a_model_is_not_saved_over_a_folder(model, tmp_path):
    with pytest.raises(InvalidInput, match="path"):
        save(model, tmp_path)
    with pytest.raises(OSError, match="none"):
        save(model, tmp_path / "none" / "model.safetensors")
