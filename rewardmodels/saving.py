"""Saved models, as safetensors and JSON (loading one runs no code), and atomic file writes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rewardmodels.calibrated import Calibrated
from rewardmodels.dropout import MCDropout
from rewardmodels.ensemble import DeepEnsemble
from rewardmodels.epinet import Epinet
from rewardmodels.errors import InvalidInput, NotFitted, UnreadableFile, require
from rewardmodels.fitting import isolated_randomness
from rewardmodels.frames import FrameSpec
from rewardmodels.gp import GPHead
from rewardmodels.laplace import LaplaceHead
from rewardmodels.model import RewardModel
from rewardmodels.networks import MakeNetwork

FORMAT = 4
_CHECKED = 4  # first format with a checksum
_RENAMED = {"mistake_rate": "random_answer_rate", "answers": "comparison_count"}  # since format 1
_CALIBRATION, _NOVELTY = "calibration.", "novelty."
PREDICTORS: dict[str, type[RewardModel]] = {
    cls.__name__: cls for cls in (DeepEnsemble, Epinet, GPHead, LaplaceHead, MCDropout)
}
"""Registry of predictors by name: `load` reads these, and tests and studies run on them."""


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` once the block is done.

    A reader, or a crash, finds the old file or the complete new one. If the block raises, the old
    file stays and the temporary one is deleted. What is written may also be a directory, which
    the block makes; then `path` may not exist.

    Args:
        path: Final path, in a directory that exists.
        overwrite: Replace a file that exists at the end of the block.

    Yields:
        A new hidden path in the same directory.

    Raises:
        FileExistsError: `overwrite` is False and `path` exists (files only).
        OSError: The system can't write or rename the file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder) / "notes.txt") as temporary:
        ...         _ = temporary.write_text("complete")
        ...     [file.name for file in Path(folder).iterdir()]
        ['notes.txt']
    """
    path = Path(path)
    # A process id wouldn't do: machines that share a folder may share that too.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            if file.is_file():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def content_checksum(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash of JSON and of the names, types, shapes and bytes of tensors."""
    digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():  # an empty one has no view
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_described(
    path: str | os.PathLike[str], key: str, about: dict[str, Any], tensors: dict[str, Tensor]
) -> str:
    """Write what `open_described` reads, atomically: tensors, JSON, and a checksum of both.

    Returns:
        The checksum.

    Raises:
        InvalidInput: `path` is a folder.
        OSError: The system can't write the file.
    """
    tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
    checksum = content_checksum(about, tensors)
    # Within the JSON, since the metadata's own keys are written in any order.
    metadata = {key: json.dumps({**about, "checksum": checksum})}
    require("path", not Path(path).is_dir(), "a file", f"the folder {path}")
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk, no such folder
            raise OSError(f"{path}: {error}") from error
    return checksum


@contextmanager
def open_described(
    path: str | os.PathLike[str],
    key: str,
    what: str,
    *,
    newest: int,
    checked: int,
    expected: str | None = None,
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Yield the JSON that a safetensors file's metadata has under `key`, and its tensors by name.

    The checksum finds damage, and edits by those who don't know of it. It is no signature: whoever
    changes a file on purpose can compute it anew.

    Args:
        path: File.
        key: Name of the JSON.
        what: Kind of file, for errors.
        newest: Newest format.
        checked: First format with a checksum; older files may do without.
        expected: Checksum that the file has to have; None for any that fits its contents.

    Raises:
        UnreadableFile: Another kind of file than `what`, a damaged or changed one, a `format` above
            `newest`, another checksum, or contents that raise in the block.
        FileNotFoundError: The file doesn't exist.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: expected {what}.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[key])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version, kept = int(about["format"]), about.pop("checksum", None)
        if version > newest:
            raise UnreadableFile(
                f"{path}: expected format {newest} or older, got {about['format']}; update "
                "rewardmodels."
            )
        without = kept is None and version < checked
        if not without and kept != content_checksum(about, tensors):
            raise UnreadableFile(
                f"{path}: expected what was saved, got a damaged file or one that was changed "
                "since: its checksum doesn't fit."
            )
        if expected is not None and kept != expected:
            raise UnreadableFile(
                f"{path}: expected the file with checksum {expected}, got {kept}: {what}, but "
                "another one."
            )
        yield about, tensors
    except (
        SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError,
    ) as error:  # fmt: skip
        raise UnreadableFile(
            f"{path}: expected {what}, got a damaged file or one of another kind ({error!r})."
        ) from error


def save(model: RewardModel | Calibrated, path: str | os.PathLike[str]) -> str:
    """Write a fitted model to one safetensors file, atomically.

    Args:
        model: A fitted model whose hyper-parameters are numbers, strings or tuples, or a
            calibrated one that holds such a model.
        path: File, replaced if it exists.

    Returns:
        The file's checksum, by which `load` can tell it from another model's.

    Raises:
        NotFitted: The model isn't fitted, or `Calibrated` not calibrated.
        InvalidInput: A calibrated model that holds no RewardModel, NaN or infinity in a tensor, or
            a `path` that is a folder.
        OSError: The system can't write the file.

    Example:
        >>> save(DeepEnsemble(), "model.safetensors")
        Traceback (most recent call last):
            ...
        rewardmodels.errors.NotFitted: DeepEnsemble: expected a fitted model to save; call fit ...
    """
    calibration: dict[str, Tensor] = {}
    method = None
    if isinstance(model, Calibrated):
        calibration, method = model.state(), model.method
        if not isinstance(model.model, RewardModel):
            raise InvalidInput(
                f"model: expected a calibrated RewardModel, got a calibrated {type(model.model)}."
            )
        model = model.model
    if not model.fitted or model.spec is None:
        raise NotFitted(f"{type(model).__name__}: expected a fitted model to save; call fit first.")
    about = {
        "format": FORMAT,
        "class": type(model).__name__,
        "hyper_parameters": dict(model.hparams),
        "own_network": model.make_network is not None,
        "spec": asdict(model.spec),
        "calibrated": method,
    }
    tensors: dict[str, Tensor] = dict(model.state_dict())
    tensors |= {_CALIBRATION + name: value for name, value in calibration.items()}
    if broken := _not_finite(model, calibration):
        raise InvalidInput(f"model: expected finite tensors, got NaN or infinity in {broken}.")
    return write_described(path, "rewardmodels", about, tensors)


def load(
    path: str | os.PathLike[str],
    cls: type[RewardModel] | None = None,
    *,
    network: nn.Module | MakeNetwork | None = None,
    checksum: str | None = None,
) -> Any:
    """Read a model that `save` wrote, calibrated or not; its posterior is bitwise the same.

    A checksum in the file finds damage, and edits by those who don't know of it; it is no
    signature, since whoever changes the file on purpose can compute it anew. Files of the formats
    before 4 have none, and are only checked for NaN, infinity and shapes.

    Args:
        path: File.
        cls: Class of the model, if it isn't one of `PREDICTORS`.
        network: Network that the model was made with, if it was your own: a file holds its
            tensors, but no code.
        checksum: The one that `save` returned, to refuse another model; None for any.

    Raises:
        UnreadableFile: Another kind of file, a damaged or changed one, NaN or infinity in a tensor,
            a newer format, another class, or another checksum.
        InvalidInput: `network` was passed for a model made without one, or the other way round.
        FileNotFoundError: The file doesn't exist.

    Example:
        >>> load("pyproject.toml")
        Traceback (most recent call last):
            ...
        rewardmodels.errors.UnreadableFile: pyproject.toml: expected a model written by ...
    """
    what = "a model written by rewardmodels.save"
    with open_described(
        path, "rewardmodels", what, newest=FORMAT, checked=_CHECKED, expected=checksum
    ) as (about, tensors):
        version, name, hparams = int(about["format"]), about["class"], about["hyper_parameters"]
        own_network, shapes = bool(about["own_network"]), about["spec"]
        method = about["calibrated"]
        spec = FrameSpec(
            tuple(shapes["observation"]), tuple(shapes["action"]), int(shapes["discrete_actions"])
        )
    known = cls or PREDICTORS.get(name)
    if known is None or known.__name__ != name:
        expected = cls.__name__ if cls else f"one of {', '.join(PREDICTORS)}"
        raise UnreadableFile(
            f"{path}: expected {expected}, got a {name}; pass its class as load(path, cls)."
        )
    which = "the one that the model was made with" if own_network else "none"
    got = f"{network!r}; pass it as load(path, network=...)"
    require("network", own_network == (network is not None), which, got)
    try:
        if version == 1:
            hparams, tensors = (
                {_RENAMED.get(name, name): value for name, value in found.items()}
                for found in (hparams, tensors)
            )
        if network is not None:
            hparams["network"] = network
        # Building draws initial weights, which the file's then replace.
        calibration = {
            name.removeprefix(_CALIBRATION): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_CALIBRATION)
        }
        with isolated_randomness(0):
            model = _rebuilt(known, hparams, spec, tensors)
        if broken := _not_finite(model, calibration):
            raise ValueError(f"NaN or infinity in {broken}")
        if method is None:
            return model
        calibrated = Calibrated(model, method)
        calibrated.load_state(calibration)
        return calibrated
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UnreadableFile(
            f"{path}: expected the tensors of a {name} with {hparams}, got others: {error}"
        ) from error


def _not_finite(model: RewardModel, calibration: dict[str, Tensor]) -> str:
    """Name of a tensor that holds NaN, or infinity where it is learned; empty if none does."""
    # A buffer may hold an infinite bound.
    finite = {name for name, _ in model.named_parameters()} | set(calibration)
    for name, value in [*model.state_dict().items(), *calibration.items()]:
        if not bool((value.isfinite() if name in finite else ~value.isnan()).all()):
            return name
    return ""


def _rebuilt(
    cls: type[RewardModel],
    hyper_parameters: dict[str, Any],
    spec: FrameSpec,
    tensors: dict[str, Tensor],
) -> RewardModel:
    model = cls(**hyper_parameters)
    model.spec = spec
    # Buffers that are None until a first fit, and that `build` may depend on.
    for name in set(tensors) & {name for name, value in model._buffers.items() if value is None}:
        setattr(model, name, tensors[name])
    model.configure_model()
    if not any(name.startswith(_NOVELTY) for name in tensors):  # before format 3
        own = model.state_dict().items()
        tensors |= {name: value for name, value in own if name.startswith(_NOVELTY)}
    model.load_state_dict(tensors)
    model.fitted = True
    model.eval()
    # Tensors whose shapes don't match raise here.
    model.frame_posterior(model.reference_observations[:1], model.reference_actions[:1])
    return model
