"""Texts as numbers: embeddings by a language model on this machine, kept by content.

Needs the extra `rewardmodels[text]`. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from rewardmodels.errors import UnreadableFile, require
from rewardmodels.saving import atomic_path
from rewardmodels.tables import check_rows

Floats = NDArray[np.float32]

_BATCH = 32
_PART = 1024  # texts in a file of the cache, so that little is lost when a run is stopped
_LONGEST = 512  # tokens, for a model that doesn't tell
_MODULES = {"Transformer", "Pooling", "Normalize"}  # of sentence-transformers
_WEIGHTS = (".safetensors", ".bin")
_HASHED = (*_WEIGHTS, ".json", ".txt", ".model")


def embed_columns(
    frame: pd.DataFrame, columns: Sequence[str], prompt: str, model: Path
) -> tuple[pd.DataFrame, Floats, tuple[str, ...]]:
    """Replace columns of texts by row numbers of a matrix of their features.

    A text's features are its embedding, the product of this with the prompt's embedding where there
    is a prompt (whose sum is their cosine), and log(1 + number of characters). A text may also be a
    conversation, a list of messages with "content".

    Args:
        frame: The table.
        columns: Columns of texts.
        prompt: Column of prompts; may be missing.
        model: Folder of the model.

    Returns:
        The table with row numbers, the features `(N, D)` of distinct texts, and their names.

    Raises:
        InvalidInput: A row without a text, or what `embed` refuses.
        UnreadableFile: A damaged model.
    """
    for column in columns:
        require(column, column in frame, "a column of texts", "none")
    texts = [text for column in columns for text in _texts(frame, column)]
    prompts = _texts(frame, prompt) * len(columns) if prompt in frame else None
    keys = list(zip(texts, prompts or texts, strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    vectors = embed([text for key in numbers for text in key], model).reshape(len(numbers), 2, -1)
    dimensions = range(vectors.shape[-1])
    parts = [vectors[:, 0], np.log1p([[len(text)] for text, _ in numbers])]
    names = [f"embedding {i}" for i in dimensions] + ["log characters"]
    if prompts is not None:
        parts.append(vectors[:, 0] * vectors[:, 1])
        names += [f"embedding x prompt {i}" for i in dimensions]
    ids = np.array([numbers[key] for key in keys]).reshape(len(columns), -1)
    frame = frame.assign(**dict(zip(columns, ids, strict=True)))
    return frame, np.concatenate(parts, 1, dtype=np.float32), tuple(names)


def embed(texts: Sequence[str], model: Path, *, cache: Path | None = None) -> Floats:
    """Embeddings `(N, D)` of unit length: the mean over tokens, or the first one's.

    What is longer than the model reads (256 tokens for all-MiniLM-L6-v2) is cut off.

    Args:
        texts: N texts.
        model: Folder of a transformers model, or of a sentence-transformers one made of these.
        cache: Folder where embeddings are kept by the content of text and model; None is
            `rewardmodels/embeddings` in the user's cache folder.

    Raises:
        InvalidInput: No such model, one of another kind, or transformers isn't installed.
        UnreadableFile: A damaged model.
    """
    pooled, longest = _settings(model)
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = cache / "rewardmodels" / "embeddings"
    folder = cache / _checksum(model)
    keys = [hashlib.blake2b(t.encode(errors="replace"), digest_size=16).digest() for t in texts]
    known = _known(folder)
    new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if new:
        encode = _encoder(model, pooled, longest)
        # Texts of like lengths are padded least.
        order = sorted(new, key=lambda key: len(new[key]))
        for start in tqdm(range(0, len(order), _PART), "embedding texts", leave=False):
            part = order[start : start + _PART]
            vectors = np.concatenate(
                [
                    encode([new[key] for key in part[i : i + _BATCH]])
                    for i in range(0, len(part), _BATCH)
                ]
            )
            _keep(folder, part, vectors)
            known |= zip(part, vectors, strict=True)
    return np.stack([known[key] for key in keys])


def _texts(frame: pd.DataFrame, column: str) -> list[str]:
    texts = [_text(value) for value in frame[column]]
    check_rows(column, [text is not None for text in texts], "a text", frame[column])
    return [text for text in texts if text is not None]


def _text(value: Any) -> str | None:
    if isinstance(value, (list, np.ndarray)):
        parts = [message.get("content") for message in value if isinstance(message, dict)]
        known = len(parts) == len(value) > 0 and all(isinstance(part, str) for part in parts)
        return "\n\n".join(map(str, parts)) if known else None
    return value if isinstance(value, str) else None


def _settings(model: Path) -> tuple[str, int]:
    """Pooling of a model's tokens, "mean" or "cls", and the number of tokens that it reads."""
    here = (model / "config.json").is_file() and any(
        path.suffix in _WEIGHTS for path in model.glob("*")
    )
    expected = "the folder of a model, with config.json and weights (nothing is downloaded)"
    require("embed", here, expected, model)
    installed = find_spec("transformers") is not None
    got = "none; pip install 'rewardmodels[text]' brings it"
    require("transformers", installed, "it to be installed for texts", got)
    try:
        found = {
            name: json.loads((model / path).read_text("utf-8")) if (model / path).exists() else {}
            for name, path in {
                "config": "config.json",
                "modules": "modules.json",
                "pooling": "1_Pooling/config.json",
                "sentence": "sentence_bert_config.json",
            }.items()
        }
        kinds = [str(module["type"]).rpartition(".")[-1] for module in found["modules"]]
        longest = found["sentence"].get("max_seq_length") or _LONGEST
        longest = min(longest, found["config"].get("max_position_embeddings", longest))
        modes = {name for name, on in found["pooling"].items() if on is True}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableFile(
            f"{model}: expected a model, got a damaged one ({error!r})."
        ) from error
    odd = sorted(set(kinds) - _MODULES)
    require("embed", not odd, f"a model of {', '.join(sorted(_MODULES))}", ", ".join(odd))
    modes &= {name for name in modes if name.startswith("pooling_mode_")}
    known = modes <= {"pooling_mode_mean_tokens"} or modes == {"pooling_mode_cls_token"}
    require("embed", known, "a model that takes the mean of tokens or the first", sorted(modes))
    return "cls" if "pooling_mode_cls_token" in modes else "mean", int(longest)


def _encoder(model: Path, pooled: str, longest: int) -> Any:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(str(model), **local)
        network = AutoModel.from_pretrained(str(model), **local).eval()
    except Exception as error:  # of many kinds, by the part that is damaged
        what = " ".join(str(error).split())[:300]
        raise UnreadableFile(f"{model}: expected a language model, got {what}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def encode(texts: list[str]) -> Floats:
        how: dict[str, Any] = {"padding": True, "truncation": True, "max_length": longest}
        tokens = tokenizer(texts, return_tensors="pt", **how).to(device)
        states = network(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None]
        vectors = states[:, 0]
        if pooled == "mean":
            vectors = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()

    return encode


def _checksum(model: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in model.rglob("*") if path.suffix in _HASHED):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
        digest.update(f"{path.relative_to(model)} {content}".encode())
    return digest.hexdigest()


def _known(folder: Path) -> dict[bytes, Floats]:
    known: dict[bytes, Floats] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found = load_file(path)
            keys = [key.tobytes() for key in found["keys"]]
            known |= zip(keys, found["vectors"], strict=True)
        except (SafetensorError, KeyError, ValueError, OSError):  # embedded anew
            continue
    return known


def _keep(folder: Path, keys: list[bytes], vectors: Floats) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.blake2b(b"".join(keys), digest_size=16).hexdigest()
    array = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
    with atomic_path(folder / f"{name}.safetensors") as path:
        save_file({"keys": array, "vectors": vectors}, path)
