"""Noisy answers, and Gaussian processes fitted to them."""

from typing import Any

import torch

from rewardmodels import (
    Clips,
    Comparisons,
    FitOptions,
    GPHead,
    fit,
)


def some(n: int = 20, seed: int = 0, frames: int = 3, ragged: bool = False) -> Comparisons:
    """Noisy answers by the sum of a curve of the first input."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(2 * n, frames, dtype=torch.bool)
    if ragged:
        mask = torch.arange(frames) < torch.randint(1, frames + 1, (2 * n, 1), generator=draw)
    clips = Clips(
        torch.randn(2 * n, frames, 2, generator=draw), torch.zeros(2 * n, frames, 1), mask
    )
    pairs = torch.arange(2 * n).view(n, 2)
    worth = (clips.observations[..., 0].mul(2).sin() * mask).sum(1)
    said = torch.sigmoid(2 * (worth[pairs[:, 1]] - worth[pairs[:, 0]]))
    return Comparisons(clips, pairs, torch.bernoulli(said, generator=draw))


def fitted(comparisons: Comparisons, epochs: int = 3, **settings: Any) -> GPHead:
    """A model in double precision, so that what is compared is the formula."""
    settings = {"hidden": (8,), "inducing": 12, "random_features": 64, **settings}
    model = fit(
        GPHead(**settings), comparisons, epochs=epochs, options=FitOptions(held_out=0.0)
    ).double()
    model.after_epoch()
    model.after_fit(comparisons)
    return model
