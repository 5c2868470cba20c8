"""MC dropout: what one network believes with different of its units missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, SampledRewardModel
from rewardmodels.networks import MLP


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

    Args:
        samples: S.
        hidden: Widths of the hidden layers, each followed by dropout; at least one.
        rate: Share of units dropped, from 0 to below 1.
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay of AdamW.
        mistake_rate: How often the teacher is taken to answer at random.

    Raises:
        InvalidInput: A number out of range.

    Example:
        >>> MCDropout(samples=100, rate=0.2).hparams["rate"]
        0.2
    """

    network: MLP
    mask_seed: Tensor

    def __init__(
        self,
        samples: int = 32,
        hidden: Sequence[int] = (64, 64),
        rate: float = 0.1,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        mistake_rate: float = 0.0,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate, weight_decay=weight_decay, mistake_rate=mistake_rate
        )
        hidden = tuple(hidden)
        if samples < 1 or not hidden or any(width < 1 for width in hidden):
            raise InvalidInput(
                "samples, hidden: expected numbers of at least 1, and at least one hidden layer to "
                f"drop units of, got {samples} and {hidden}."
            )
        if not 0 <= rate < 1:
            raise InvalidInput(f"rate: expected a share from 0 to below 1, got {rate}.")
        self.save_hyperparameters()
        self.samples, self.hidden, self.rate = samples, hidden, rate
        self.register_buffer("mask_seed", torch.tensor(0))

    def build(self, inputs: int) -> None:
        """Makes the network, and draws the seed of its masks."""
        self.mask_seed.random_(2**31)
        self.network = MLP(inputs, self.hidden)

    def masks(self) -> list[Tensor]:
        """A mask `(S, 1, H)` for each hidden layer: 0, or what keeps a unit's mean as it was."""
        generator = torch.Generator().manual_seed(int(self.mask_seed))
        return [mask.to(self.device) for mask in self._draw(self.samples, generator)]

    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(S, B)`, the network's view under each mask."""
        rewards: Tensor = self.network(self.inputs(observations, actions), self.masks())
        return rewards

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean over comparisons of the log loss, each under a mask of its own."""
        masks = [mask.to(self.device) for mask in self._draw(len(batch.index))]
        difference = self._each(batch.second, masks) - self._each(batch.first, masks)
        return negative_log_likelihood(
            difference, batch.preference, mistake_rate=self.mistake_rate
        ).mean()

    def _each(self, clips: Clips, masks: list[Tensor]) -> Tensor:
        """`(N,)` returns, of each clip under the mask at its own place."""
        frames = self.inputs(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
        rewards: Tensor = self.network(frames.unflatten(0, clips.mask.shape), masks)
        return rewards.masked_fill(~clips.mask, 0).sum(1)

    def _draw(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        keep = 1 - self.rate
        return [
            torch.rand(n, 1, width, generator=generator).lt(keep).float() / keep
            for width in self.hidden
        ]
