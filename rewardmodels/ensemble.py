"""Deep ensemble: what members trained on different draws of the evidence disagree about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, SampledRewardModel
from rewardmodels.networks import MemberMLP


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

    Args:
        members: K.
        hidden: Widths of the hidden layers.
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay of AdamW.
        mistake_rate: How often the teacher is taken to answer at random.
        prior_scale: $\beta$, in reward units per frame for outputs of about one; 0 for no prior.

    Raises:
        InvalidInput: A number out of range.

    Example:
        >>> DeepEnsemble(members=7, hidden=(64, 64)).hparams["members"]
        7
    """

    network: MemberMLP
    prior: MemberMLP | None
    bootstrap_seed: Tensor

    def __init__(
        self,
        members: int = 5,
        hidden: Sequence[int] = (64, 64),
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        mistake_rate: float = 0.0,
        prior_scale: float = 0.0,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate, weight_decay=weight_decay, mistake_rate=mistake_rate
        )
        if members < 1 or any(width < 1 for width in hidden):
            raise InvalidInput(
                f"members, hidden: expected numbers of at least 1, got {members} and {hidden}."
            )
        if not 0 <= prior_scale < math.inf:
            raise InvalidInput(f"prior_scale: expected a number of at least 0, got {prior_scale}.")
        hidden = tuple(hidden)
        self.save_hyperparameters()
        self.members, self.hidden, self.prior_scale = members, hidden, prior_scale
        self.register_buffer("bootstrap_seed", torch.tensor(0))

    def build(self, inputs: int) -> None:
        """Makes the members, and draws the seed of their bootstraps."""
        self.bootstrap_seed.random_(2**31)
        self.network = MemberMLP(self.members, inputs, self.hidden)
        self.prior = None
        if self.prior_scale > 0:
            self.prior = MemberMLP(self.members, inputs, self.hidden).requires_grad_(False)

    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(K, B)`, each member's view."""
        frames = self.inputs(observations, actions)
        rewards: Tensor = self.network(frames)
        return rewards if self.prior is None else rewards + self.prior_scale * self.prior(frames)

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean over members and comparisons of the log loss times its count."""
        difference = self.returns(batch.second) - self.returns(batch.first)
        nll = negative_log_likelihood(difference, batch.preference, mistake_rate=self.mistake_rate)
        index = batch.index.cpu()
        counts = self.counts(int(index.max()) + 1)[index].T.to(nll)
        return (nll * counts).mean()

    def counts(self, comparisons: int) -> Tensor:
        """`(Q, K)`, how often each member counts each of the first Q comparisons."""
        rows = 1 << (comparisons - 1).bit_length()  # so that few different tables are drawn
        return _poisson(int(self.bootstrap_seed), rows, self.members)[:comparisons]


@lru_cache(maxsize=8)
def _poisson(seed: int, rows: int, columns: int) -> Tensor:
    # Drawn row by row from one stream: the counts of earlier answers stay as they were.
    draws = np.random.default_rng(seed).poisson(1.0, (rows, columns))
    return torch.from_numpy(draws).float()
