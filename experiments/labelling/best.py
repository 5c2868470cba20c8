"""What the agent lately did best, by the reward that it has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.training.clip_buffer import History
from rewardmodels import load

FRAMES = 100


def newest_checkpoint(run: Path) -> Path | None:
    """The directory of a run's newest checkpoint; None while there is none."""
    return max((p for p in (run / "checkpoints").glob("[0-9]*") if p.is_dir()), default=None)


def best_stretch(run: Path, frames: int = FRAMES) -> NDArray[np.floating[Any]] | None:
    """Simulator states of the best stretch of the newest checkpoint's history.

    Args:
        run: The run's directory.
        frames: The stretch's length; an episode's or what there is where that is shorter.

    Returns:
        `(frames, s)`, or None where there is no checkpoint, no reward learned yet, no states, or
        the checkpoint was replaced while it was read.
    """
    newest = newest_checkpoint(run)
    if newest is None or not (newest / "model.safetensors").exists():
        return None
    try:
        model = load(newest / "model.safetensors")
        with np.load(newest / "history.npz", allow_pickle=False) as file:
            capacity, envs = file["ends"].shape
        history = History(capacity, envs)
        history.load(newest / "history.npz")
    except FileNotFoundError:
        return None
    length = min(frames, history.steps, capacity)
    # So many of them will do: neighbours share nearly all of their frames.
    clips = history.cut(length, 300, np.random.default_rng(0))
    if clips.states is None:
        return None
    with torch.no_grad():
        best = int(model.posterior(clips).mean.argmax())
    return clips.states[best].numpy()
