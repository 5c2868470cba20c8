"""MC dropout: what one network believes with different of its units missing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, SampledRewardModel
from rewardmodels.networks import MLP, FrameNetwork
from rewardmodels.scoring import (
    Array,
    Fold,
    Layer,
    as_array,
    fold_mlp,
    pass_hidden,
    sample_moments,
)


class MCDropout(SampledRewardModel):
    """One network, asked under S dropout masks (Gal & Ghahramani 2016, arXiv:1506.02142, eq. 8).

    A sample is a mask held fixed over every clip and frame, so that it is a function. A mask
    drawn anew for each frame would make a clip differ from itself: covariances would vanish,
    and the variance of a difference would say nothing. The masks follow from a seed drawn when
    the network is made and saved with it; asking twice gives the same belief twice.

    In training each comparison draws one mask, which all frames of its two clips share. It is
    one term of the log likelihood, and stands for one draw of the network's weights; comparisons
    are independent given the weights, so that each may have its own draw, at less noise in the
    gradient than one mask for all of a minibatch.

    Of a multilayer perceptron the units of each hidden layer are dropped, of any other network
    those of its features.

    Args:
        samples: S.
        rate: Share of units dropped, from 0 to below 1.
        options: As `RewardModel` has them.

    Raises:
        InvalidInput: A number out of range.

    Example:
        >>> MCDropout(samples=100, rate=0.2).hparams["rate"]
        0.2
    """

    network: FrameNetwork
    mask_seed: Tensor

    def __init__(self, samples: int = 32, rate: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        if samples < 1:
            raise InvalidInput(f"samples: expected at least 1, got {samples}.")
        if not 0 <= rate < 1:
            raise InvalidInput(f"rate: expected a share from 0 to below 1, got {rate}.")
        if not self.hidden and self.make_network is None:
            raise InvalidInput("hidden: expected at least one hidden layer to drop units of.")
        self.samples, self.rate = samples, rate
        self.register_buffer("mask_seed", torch.tensor(0))

    def build(self, inputs: int) -> None:
        """Makes the network, and draws the seed of its masks."""
        self.mask_seed.random_(2**31)
        self.network = self.frame_network(inputs)

    def masks(self) -> list[Tensor]:
        """A mask `(S, 1, H)` for each hidden layer: 0, or what keeps a unit's mean as it was."""
        generator = torch.Generator().manual_seed(int(self.mask_seed))
        return [mask.to(self.device) for mask in self._draw(self.samples, generator)]

    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(S, B)`, the network's view under each mask."""
        return self._under(self.masks(), self.inputs(observations, actions))

    def fold(self) -> Fold | None:
        """The layers and the masks; None for a network that is no multilayer perceptron."""
        layers, last = fold_mlp(self.network.body), self.network.last
        if layers is None:
            return None
        *masks, last_mask = (mask.squeeze(1) for mask in self.masks())
        return partial(
            _score,
            layers,
            [as_array(mask) for mask in masks],
            as_array(last_mask * last.weight),
            as_array(last.bias - self.gauge),
        )

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean over comparisons of the log loss, each under a mask of its own."""
        masks = [mask.to(self.device) for mask in self._draw(len(batch.index))]
        difference = self._each(batch.second, masks) - self._each(batch.first, masks)
        return negative_log_likelihood(
            difference, batch.preference, random_answer_rate=self.random_answer_rate
        ).mean()

    def _each(self, clips: Clips, masks: list[Tensor]) -> Tensor:
        """`(N,)` returns, of each clip under the mask at its own place."""
        frames = self.inputs(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
        rewards = self._under(masks, frames, clips.mask.shape)
        return rewards.masked_fill(~clips.mask, 0).sum(1)

    def _under(self, masks: list[Tensor], frames: Tensor, shape: Sequence[int] = (-1,)) -> Tensor:
        """Rewards of frames `(B, D)`, laid out as `shape`, which masks then meet from the right."""
        body = self.network.body
        if isinstance(body, MLP):
            features = body(frames.unflatten(0, shape), masks)
        else:
            features = self.network.features(frames).unflatten(0, shape) * masks[0]
        rewards: Tensor = self.network.last(features)
        return rewards.squeeze(-1)

    def _draw(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        keep, body = 1 - self.rate, self.network.body
        widths = self.hidden if isinstance(body, MLP) else (self.network.width,)
        return [
            torch.rand(n, 1, width, generator=generator).lt(keep).float() / keep for width in widths
        ]


def _score(
    layers: Sequence[Layer], masks: Sequence[Array], last: Array, constant: Array, inputs: Array
) -> tuple[Array, Array]:
    # All masks share the first layer; from there on hidden layers are (B, S, H).
    hidden = pass_hidden(inputs, layers[:1])[:, None]
    for mask, layer in zip(masks, layers[1:], strict=True):
        hidden = pass_hidden(hidden * mask, [layer])
    return sample_moments(np.vecdot(hidden, last) + constant)
