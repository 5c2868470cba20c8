"""Epinet: one network, and a small one whose random index gives the uncertainty."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewardmodels.errors import check_positive, require
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, SampledRewardModel, sum_frames
from rewardmodels.networks import PRIOR_GAIN, FrameNetwork, MemberMLP

_PRIOR_HIDDEN = (5, 5)  # Osband et al. 2023, §4.1


class Epinet(SampledRewardModel):
    r"""A base network and an epinet, a small network that also takes a random index.

    Osband et al. 2023 (arXiv:2107.08924, eq. 5 and 6): with an index $\zeta \sim N(0, I)$,

    $$r(x, \zeta) = \mu(x) + \zeta^\top h(\mathrm{sg}[\phi(x)], x, \zeta)
    + \beta \sum_i \zeta_i p_i(x),$$

    where $\phi$ is the base network's last hidden layer, which the epinet's gradient doesn't
    reach (sg), $h$ has one hidden layer and is trained, and the $p_i$ are small random networks
    that aren't. Each index is a reward function. The S of the posterior follow from a seed drawn
    when the networks are made and saved with them. In training all comparisons of a minibatch
    share a few fresh indices, each held fixed over all frames.

    Frames pass the base network once, whatever the number of samples.

    Args:
        index_dim: Numbers in an index.
        samples: S, indices of the posterior.
        prior_scale: $\beta$, in reward units per frame for outputs of about one.
        epinet_width: Hidden units of the epinet.
        training_indices: Indices drawn for each minibatch.
        weight_decay: As for `RewardModel`. Each index is trained on all comparisons, none on a
            bootstrap, so that with less of it all agree too soon on rewards that are too large.
        options: As for `RewardModel`; the base network's.
    """

    network: FrameNetwork
    prior: MemberMLP
    index_seed: Tensor

    def __init__(
        self,
        index_dim: int = 8,
        samples: int = 64,
        prior_scale: float = 0.1,
        epinet_width: int = 16,
        training_indices: int = 8,
        weight_decay: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(weight_decay=weight_decay, **options)
        check_positive(index_dim=index_dim, samples=samples)
        check_positive(epinet_width=epinet_width, training_indices=training_indices)
        require("prior_scale", 0 <= prior_scale < math.inf, "a number of at least 0", prior_scale)
        self.index_dim, self.samples = index_dim, samples
        self.prior_scale, self.epinet_width = prior_scale, epinet_width
        self.training_indices = training_indices
        self.register_buffer("index_seed", torch.tensor(0))

    def build(self, inputs: int) -> None:
        """Make the three networks, and draw the seed of the indices."""
        self.index_seed.random_(2**31)
        self.network = self.frame_network(inputs)
        # The first layer in its two parts, so that frames and indices each pass theirs once.
        self.of_frame = nn.Linear(self.network.width + inputs, self.epinet_width)
        self.of_index = nn.Linear(self.index_dim, self.epinet_width, bias=False)
        self.out = nn.Linear(self.epinet_width, self.index_dim)
        prior = MemberMLP(self.index_dim, inputs, _PRIOR_HIDDEN, PRIOR_GAIN)
        self.prior = prior.requires_grad_(False)

    def indices(self) -> Tensor:
        """Indices `(S, Z)` of the posterior, the same at each call."""
        return self._draw(self.samples, torch.Generator().manual_seed(int(self.index_seed)))

    def rewards(self, inputs: Tensor) -> Tensor:
        """Rewards `(S, B)` under each index of the posterior."""
        return self.rewards_of(self.indices(), inputs)

    def rewards_of(self, indices: Tensor, frames: Tensor) -> Tensor:
        """Rewards `(I, B)` of frames with inputs `(B, D)` under indices `(I, Z)`, not centred."""
        features = self.network.features(frames)
        base: Tensor = self.network.last(features).squeeze(1)
        of_frame = self.of_frame(torch.cat([features.detach(), frames], 1))
        # Frames along the last axis: along the rows, this takes three times as long.
        hidden = F.leaky_relu(of_frame.T + self.of_index(indices)[:, :, None], inplace=True)
        # The index times the last layer's weights first: Z times fewer products than after it.
        learned = ((indices @ self.out.weight)[:, None] @ hidden).squeeze(1)
        constant = (indices @ self.out.bias)[:, None]
        return base + learned + constant + self.prior_scale * (indices @ self.prior(frames))

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean log loss over comparisons and a few fresh indices."""
        indices = self._draw(self.training_indices)
        first, second = (
            sum_frames(self.rewards_of(indices, self.clip_inputs(clips)), clips)
            for clips in (batch.first, batch.second)
        )
        return negative_log_likelihood(
            second - first, batch.preference, random_answer_rate=self.random_answer_rate
        ).mean()

    def _draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(n, self.index_dim, generator=generator).to(self.network.last.weight)
