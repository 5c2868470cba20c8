"""MC dropout: one network, evaluated with different units dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.errors import check_positive, require
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, SampledRewardModel
from rewardmodels.networks import MLP, FrameNetwork


class MCDropout(SampledRewardModel):
    """One network, evaluated under S dropout masks.

    Gal & Ghahramani 2016, arXiv:1506.02142, eq. 8. A sample is a mask held fixed over all clips and
    frames, so that it is a function. A mask drawn anew for each frame would make a clip differ
    from itself: covariances would vanish, and the variance of a difference would mean nothing. The
    masks follow from a seed drawn when the network is made and saved with it, so that the
    posterior is the same at each call.

    In training each comparison draws one mask, which all frames of its two clips share. It is
    one term of the log likelihood, and stands for one draw of the network's weights; comparisons
    are independent given the weights, so that each may have its own draw, at less noise in the
    gradient than one mask for all of a minibatch.

    Of a multilayer perceptron the units of each hidden layer are dropped, of any other network
    its features.

    Args:
        samples: S.
        rate: Share of units dropped, from 0 to below 1.
        options: As for `RewardModel`.
    """

    network: FrameNetwork
    mask_seed: Tensor

    def __init__(self, samples: int = 32, rate: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        check_positive(samples=samples)
        require("rate", 0 <= rate < 1, "a share from 0 to below 1", rate)
        layered = bool(self.hidden) or self.make_network is not None
        require("hidden", layered, "at least one hidden layer to drop units of", "none")
        self.samples, self.rate = samples, rate
        self.register_buffer("mask_seed", torch.tensor(0))

    def build(self, inputs: int) -> None:
        """Make the network, and draw the seed of its masks."""
        self.mask_seed.random_(2**31)
        self.network = self.frame_network(inputs)

    def masks(self) -> list[Tensor]:
        """A mask `(S, 1, H)` for each hidden layer: 0, or what keeps a unit's mean."""
        return self._draw(self.samples, torch.Generator().manual_seed(int(self.mask_seed)))

    def rewards(self, inputs: Tensor) -> Tensor:
        """Rewards `(S, B)` under each mask."""
        return self._masked(self.masks(), inputs)

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean over comparisons of the log loss, each under a mask of its own."""
        masks = self._draw(len(batch.index))
        return negative_log_likelihood(
            self._masked_returns(batch.second, masks) - self._masked_returns(batch.first, masks),
            batch.preference,
            random_answer_rate=self.random_answer_rate,
        ).mean()

    def _masked_returns(self, clips: Clips, masks: list[Tensor]) -> Tensor:
        """Returns `(N,)` of N clips, clip i under mask i."""
        rewards = self._masked(masks, self.clip_inputs(clips), clips.mask.shape)
        return rewards.masked_fill(~clips.mask, 0).sum(1)

    def _masked(self, masks: list[Tensor], frames: Tensor, shape: Sequence[int] = (-1,)) -> Tensor:
        """Rewards of frames `(B, D)` laid out as `shape`, against which masks broadcast."""
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
        masks = [torch.rand(n, 1, width, generator=generator).lt(keep) for width in widths]
        return [(mask.float() / keep).to(self.device) for mask in masks]
