"""Deep ensemble: networks trained on different bootstraps of the comparisons."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewardmodels.errors import check_positive, require
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, SampledRewardModel
from rewardmodels.networks import PRIOR_GAIN, MemberMLP, Members


class DeepEnsemble(SampledRewardModel):
    r"""K networks of one shape, each trained on its own bootstrap of the comparisons.

    Christiano et al. 2017, §2.2.3: "each trained on |D| triples sampled from D with
    replacement". The bootstrap is Oza & Russell's (2001): each member counts each comparison
    Poisson(1) times, which needs no redraw when comparisons are added. All members see the same
    minibatches; only their counts differ.

    With `prior_scale` $\beta > 0$ a member is $f_k = g_k + \beta p_k$, where $p_k$ is a random
    network of the same shape that is never trained (Osband et al. 2018, "Randomized prior
    functions", arXiv:1806.03335, algorithm 1): away from the comparisons each member falls back on
    its own prior, so that members go on disagreeing there.

    Multilayer perceptrons are one batched network where that is quicker (`MemberMLP`); members of
    any other kind are evaluated one after the other.

    Args:
        members: K.
        prior_scale: $\beta$, in reward units per frame for outputs of about one; 0 for no prior.
        options: As for `RewardModel`.
    """

    network: MemberMLP | Members
    prior: MemberMLP | Members | None
    bootstrap_seed: Tensor

    def __init__(self, members: int = 5, prior_scale: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        check_positive(members=members)
        require("prior_scale", 0 <= prior_scale < math.inf, "a number of at least 0", prior_scale)
        self.members, self.prior_scale = members, prior_scale
        self.register_buffer("bootstrap_seed", torch.tensor(0))

    def build(self, inputs: int) -> None:
        """Make the members, and draw the seed of their bootstraps."""
        self.bootstrap_seed.random_(2**31)
        self.network = self._networks(inputs, gain=1.0)
        self.prior = None
        if self.prior_scale > 0:
            self.prior = self._networks(inputs, gain=PRIOR_GAIN).requires_grad_(False)

    def _networks(self, inputs: int, gain: float) -> MemberMLP | Members:
        assert self.spec is not None
        if self.make_network is None and not self.spec.image:
            return MemberMLP(self.members, inputs, self.hidden, gain, self.activation)
        return Members(self.frame_network(inputs) for _ in range(self.members))

    def rewards(self, inputs: Tensor) -> Tensor:
        """Rewards `(K, B)` under each member."""
        rewards: Tensor = self.network(inputs)
        return rewards if self.prior is None else rewards + self.prior_scale * self.prior(inputs)

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean over members and comparisons of the log loss times its bootstrap count."""
        nll = negative_log_likelihood(
            self.returns(batch.second) - self.returns(batch.first),
            batch.preference,
            random_answer_rate=self.random_answer_rate,
        )
        index = batch.index.cpu()
        counts = self.counts(int(index.max()) + 1)[index].T.to(nll)
        return (nll * counts).mean()

    def counts(self, comparisons: int) -> Tensor:
        """Bootstrap counts `(Q, K)` of the first Q comparisons."""
        rows = 1 << (comparisons - 1).bit_length()  # so that few different tables are drawn
        return _poisson(int(self.bootstrap_seed), rows, self.members)[:comparisons]


@lru_cache(maxsize=8)
def _poisson(seed: int, rows: int, columns: int) -> Tensor:
    # Drawn row by row from one stream: the counts of earlier comparisons stay as they were.
    draws = np.random.default_rng(seed).poisson(1.0, (rows, columns))
    return torch.from_numpy(draws).float()
