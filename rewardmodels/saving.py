"""One file for a fitted model: tensors and JSON, so that loading a stranger's runs no code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rewardmodels.ensemble import DeepEnsemble
from rewardmodels.errors import NotFitted, UnreadableFile
from rewardmodels.model import FrameSpec, RewardModel

AnyModel = TypeVar("AnyModel", bound=RewardModel)

FORMAT = 1
PREDICTORS: dict[str, type[RewardModel]] = {cls.__name__: cls for cls in (DeepEnsemble,)}
"""Those that `load` knows by name. It never imports what a file names."""


def save(model: RewardModel, path: str | os.PathLike[str]) -> None:
    """Writes a fitted model to one safetensors file, whole or not at all.

    Raises:
        NotFitted: There is nothing to save yet.
    """
    if not model.fitted or model.spec is None:
        raise NotFitted(f"{type(model).__name__}: expected a fitted model to save; call fit first.")
    about = {
        "format": FORMAT,
        "class": type(model).__name__,
        "hyper_parameters": dict(model.hparams),
        "observation": model.spec.observation,
        "action": model.spec.action,
    }
    tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    beside = Path(path).with_name(Path(path).name + ".part")
    save_file(tensors, beside, {"rewardmodels": json.dumps(about)})
    os.replace(beside, path)


def load(path: str | os.PathLike[str], cls: type[AnyModel] | None = None) -> AnyModel:
    """Reads a model that `save` wrote; its answers are the same to the last bit.

    Args:
        path: The file.
        cls: The model's class, where it isn't one of the library's own.

    Raises:
        UnreadableFile: Not such a file, damaged, of a newer format, or of another class.
        FileNotFoundError: There is no such file.

    Example:
        >>> load("pyproject.toml")
        Traceback (most recent call last):
            ...
        rewardmodels.errors.UnreadableFile: pyproject.toml: expected a model written by ...
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: expected a model written by rewardmodels.save.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["rewardmodels"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UnreadableFile(
            f"{path}: expected a model written by rewardmodels.save, got a damaged file or one of "
            f"another format ({error or type(error).__name__})."
        ) from error
    if about["format"] > FORMAT:
        raise UnreadableFile(
            f"{path}: expected format {FORMAT} or older, got {about['format']}; update rewardmodels."
        )
    known = cls or PREDICTORS.get(about["class"])
    if known is None or known.__name__ != about["class"]:
        expected = cls.__name__ if cls else f"one of {', '.join(PREDICTORS)}"
        raise UnreadableFile(
            f"{path}: expected {expected}, got a {about['class']}; pass its class as load(path, "
            "cls)."
        )
    model = known(**about["hyper_parameters"])
    model.spec = FrameSpec(tuple(about["observation"]), tuple(about["action"]))
    model.configure_model()
    for name in set(tensors) - set(model.state_dict()):
        # Buffers that are empty until a first fit; anything else the check below refuses.
        if name in model._buffers:
            setattr(model, name, tensors[name])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UnreadableFile(
            f"{path}: expected the tensors of a {about['class']} with {about['hyper_parameters']}, "
            f"got others: {error}"
        ) from error
    model.fitted = True
    return model.eval()  # type: ignore[return-value]
