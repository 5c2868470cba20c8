"""Deep ensemble: what members trained on different halves of the evidence disagree about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.model import PairBatch, SampledRewardModel
from rewardmodels.networks import MemberMLP


class DeepEnsemble(SampledRewardModel):
    """K networks of one shape, each trained on its own bootstrap of the comparisons.

    Christiano et al. 2017, §2.2.3: "each trained on |D| triples sampled from D with
    replacement". The bootstrap is Oza & Russell's (2001): each member counts each comparison
    Poisson(1) times, which needs no redraw when answers are added. All members are one batched
    network and see the same minibatches; only their counts differ.

    Args:
        members: K.
        hidden: Widths of the hidden layers.
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay of AdamW.
        mistake_rate: How often the teacher is taken to answer at random.

    Example:
        >>> DeepEnsemble(members=7, hidden=(64, 64)).hparams["members"]
        7
    """

    network: MemberMLP

    def __init__(
        self,
        members: int = 5,
        hidden: Sequence[int] = (64, 64),
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        mistake_rate: float = 0.0,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate, weight_decay=weight_decay, mistake_rate=mistake_rate
        )
        if members < 1 or any(width < 1 for width in hidden):
            raise InvalidInput(
                f"members, hidden: expected numbers of at least 1, got {members} and {hidden}."
            )
        hidden = tuple(hidden)
        self.save_hyperparameters()
        self.members, self.hidden = members, hidden
        self._counts = torch.empty(0, members)

    def build(self, inputs: int) -> None:
        """Makes the members."""
        self.network = MemberMLP(self.members, inputs, self.hidden)

    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`(K, B)`, each member's view."""
        rewards: Tensor = self.network(self.inputs(observations, actions))
        return rewards

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean over members of each one's mean over its bootstrap."""
        difference = self.returns(batch.second) - self.returns(batch.first)
        nll = negative_log_likelihood(difference, batch.preference, mistake_rate=self.mistake_rate)
        counts = self.counts(int(batch.index.max()) + 1)[batch.index.cpu()].T.to(nll)
        return (nll * counts).mean()

    def counts(self, comparisons: int) -> Tensor:
        """`(Q, K)`, how often each member counts each of the first Q comparisons."""
        if len(self._counts) < comparisons:
            # Drawn row by row from one stream: the counts of earlier answers stay as they were.
            draws = np.random.default_rng(self.members).poisson(
                1.0, (2 * comparisons, self.members)
            )
            self._counts = torch.from_numpy(draws).float()
        return self._counts[:comparisons]
