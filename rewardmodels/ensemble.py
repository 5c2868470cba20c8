"""Deep ensemble: what members trained on different draws of the evidence disagree about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, SampledRewardModel
from rewardmodels.networks import PRIOR_GAIN, MemberMLP, Members
from rewardmodels.scoring import Array, Fold, Layer, fold_members, pass_members, sample_moments


class DeepEnsemble(SampledRewardModel):
    r"""K networks of one shape, each trained on its own bootstrap of the comparisons.

    Christiano et al. 2017, §2.2.3: "each trained on |D| triples sampled from D with
    replacement". The bootstrap is Oza & Russell's (2001): each member counts each comparison
    Poisson(1) times, which needs no redraw when answers are added. All members are one batched
    network and see the same minibatches; only their counts differ.

    With `prior_scale` $\beta > 0$ a member is $f_k = g_k + \beta p_k$, where $p_k$ is a random
    network of the same shape that is never trained (Osband et al. 2018, "Randomized prior
    functions", arXiv:1806.03335, algorithm 1): where no answer speaks against it, each member
    keeps its own prior's view, and members go on disagreeing.

    Multilayer perceptrons are one batched network where that is quicker (`MemberMLP`); members of
    any other kind take turns.

    Args:
        members: K.
        prior_scale: $\beta$, in reward units per frame for outputs of about one; 0 for no prior.
        options: As `RewardModel` has them.

    Raises:
        InvalidInput: A number out of range.

    Example:
        >>> DeepEnsemble(members=7, hidden=(64, 64)).hparams["members"]
        7
    """

    network: MemberMLP | Members
    prior: MemberMLP | Members | None
    bootstrap_seed: Tensor

    def __init__(self, members: int = 5, prior_scale: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        if members < 1:
            raise InvalidInput(f"members: expected at least 1, got {members}.")
        if not 0 <= prior_scale < math.inf:
            raise InvalidInput(f"prior_scale: expected a number of at least 0, got {prior_scale}.")
        self.members, self.prior_scale = members, prior_scale
        self.register_buffer("bootstrap_seed", torch.tensor(0))

    def build(self, inputs: int) -> None:
        """Makes the members, and draws the seed of their bootstraps."""
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

    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(K, B)`, each member's view."""
        frames = self.inputs(observations, actions)
        rewards: Tensor = self.network(frames)
        return rewards if self.prior is None else rewards + self.prior_scale * self.prior(frames)

    def fold(self) -> Fold | None:
        """The members, and their priors; None for members that are no multilayer perceptrons."""
        if not isinstance(self.network, MemberMLP):
            return None
        networks = [fold_members(self.network, self.gauge)]
        if isinstance(self.prior, MemberMLP):
            networks.append(fold_members(self.prior, scale=self.prior_scale))
        return partial(_score, networks)

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean over members and comparisons of the log loss times its count."""
        difference = self.returns(batch.second) - self.returns(batch.first)
        nll = negative_log_likelihood(
            difference, batch.preference, random_answer_rate=self.random_answer_rate
        )
        index = batch.index.cpu()
        counts = self.counts(int(index.max()) + 1)[index].T.to(nll)
        return (nll * counts).mean()

    def counts(self, comparisons: int) -> Tensor:
        """`(Q, K)`, how often each member counts each of the first Q comparisons."""
        rows = 1 << (comparisons - 1).bit_length()  # so that few different tables are drawn
        return _poisson(int(self.bootstrap_seed), rows, self.members)[:comparisons]


def _score(networks: Sequence[Sequence[Layer]], inputs: Array) -> tuple[Array, Array]:
    rewards, *priors = (pass_members(inputs, layers) for layers in networks)
    return sample_moments(sum(priors, start=rewards).T)


@lru_cache(maxsize=8)
def _poisson(seed: int, rows: int, columns: int) -> Tensor:
    # Drawn row by row from one stream: the counts of earlier answers stay as they were.
    draws = np.random.default_rng(seed).poisson(1.0, (rows, columns))
    return torch.from_numpy(draws).float()
