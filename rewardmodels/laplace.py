"""Laplace's method over a network's last layer: a Gaussian belief from one training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, NotFitted
from rewardmodels.likelihood import (
    check_random_answer_rate,
    negative_log_likelihood,
    preference_probability,
)
from rewardmodels.model import PairBatch, RewardModel, in_parts
from rewardmodels.networks import FrameNetwork
from rewardmodels.posterior import GaussianPosterior
from rewardmodels.scoring import Array, Fold, Layer, as_array, fold_mlp, pass_hidden

_LEAST_PRECISION, _MOST_PRECISION = 1e-4, 1e8


class LaplaceHead(RewardModel):
    r"""A network with a Gaussian belief about the weights of its last layer.

    The last layer makes returns linear in $\Phi(c) = \sum_t (\phi(x_t), 1)$, a clip's summed
    features: $R = \theta^\top \Phi$. A comparison with $z = \Phi_b - \Phi_a$ is a logistic
    regression's row, and Laplace's method (MacKay 1992; Daxberger et al. 2021,
    arXiv:2106.14806, §2) gives

    $$\theta \sim N(\hat\theta, H^{-1}), \quad H = \lambda I + \sum_q i(\hat\theta^\top z_q)\,
    z_q z_q^\top, \quad \mathrm{Var}(R_b - R_a) = z^\top H^{-1} z,$$

    where $i$ is the Fisher information of an answer (`fisher_information`): without mistakes the
    exact second derivative $p(1-p)$, whatever the answer. Comparisons of equal lengths don't see
    the bias; where lengths differ, what they leave open between it and the weights is counted.

    Only the last layer is uncertain: what the features don't tell apart, the belief can't.
    While `fit` runs, epochs are compared by the network alone, without a variance.

    Args:
        prior_precision: $\lambda$, in 1 / reward units²; None for the one that maximises the
            marginal likelihood of the training comparisons (`best_precision`).
        options: As `RewardModel` has them. The last hidden layer is the features; without any, this
            is Bayesian logistic regression.

    Attributes:
        precision: The $\lambda$ in use.

    Raises:
        InvalidInput: A number out of range.

    Example:
        >>> LaplaceHead(hidden=(64, 32)).hparams["prior_precision"] is None
        True
    """

    network: FrameNetwork
    precision: Tensor
    centre: Tensor
    root: Tensor

    def __init__(self, prior_precision: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        if prior_precision is not None and not 0 < prior_precision < math.inf:
            raise InvalidInput(
                "prior_precision: expected a number above 0, or None to choose one by the "
                f"marginal likelihood, got {prior_precision}."
            )
        self.prior_precision = prior_precision

    def build(self, inputs: int) -> None:
        """Makes the network, of whose last layer nothing is known to be uncertain yet."""
        self.network = self.frame_network(inputs)
        size = self.network.width + 1
        self.register_buffer("precision", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("root", torch.zeros(size, size))

    @property
    def weights(self) -> Tensor:
        r"""`(F,)`, $\hat\theta$: the last layer's weights and its bias."""
        return torch.cat([self.network.last.weight[0], self.network.last.bias])

    def features(self, clips: Clips) -> Tensor:
        r"""`(N, F)`, $\Phi$: features summed over each clip's real frames, and their number."""
        frames = self.inputs(clips.observations.flatten(0, 1), clips.actions.flatten(0, 1))
        features = self.network.features(frames).unflatten(0, clips.mask.shape)
        summed = features.masked_fill(~clips.mask[..., None], 0).sum(1)
        return torch.cat([summed, clips.lengths[:, None].to(summed)], 1)

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean log loss of the network alone."""
        difference = (self.features(batch.second) - self.features(batch.first)) @ self.weights
        return negative_log_likelihood(
            difference, batch.preference, random_answer_rate=self.random_answer_rate
        ).mean()

    def on_train_start(self) -> None:
        """Forgets how sure it was: that was of other features."""
        self.root.zero_()

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Centres the features on the reference batch."""
        frames = self.inputs(self.reference_observations, self.reference_actions)
        self.centre[:-1] = self.network.features(frames).mean(0)
        self.centre[-1] = 1

    @torch.no_grad()
    def after_fit(self, comparisons: Comparisons) -> None:
        """Takes the inverse of the Hessian, and chooses the precision of the prior."""
        rows = self._rows(comparisons)
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        values = values.clamp_min(0)
        chosen = self.prior_precision
        if chosen is None:
            chosen = best_precision(values, float(self.weights.double().square().sum()))
        self.precision.fill_(chosen)
        self.root.copy_(vectors / (chosen + values).sqrt())

    @torch.no_grad()
    def add(self, comparisons: Comparisons) -> LaplaceHead:
        r"""Takes more answers into account at once, by updates of rank one and without a fit.

        $H^{-1} = W W^\top$ and $v = \sqrt i\, W^\top z$ give
        $W \leftarrow W - W v v^\top / (1 + |v|^2 + \sqrt{1 + |v|^2})$ (Potter's square root,
        in Bierman 1977, §5.2), which is the Hessian that `fit` would have taken with these answers
        too, at the same weights. Only what is uncertain changes: the mean waits for the next
        fit, which has to be given these answers again, as it starts from none.

        Args:
            comparisons: New answers.

        Returns:
            The same model.

        Raises:
            NotFitted: The model has not been fitted yet.
            InvalidInput: Clips whose frames have other shapes than those learned from.
        """
        if not self.fitted:
            raise NotFitted(f"{type(self).__name__}: expected a fitted model; call fit first.")
        self.check(comparisons.clips)
        root = self.root.cpu().double()
        for row in self._rows(comparisons):
            v = root.T @ row
            grown = 1 + v @ v
            root -= torch.outer(root @ v, v) / (grown + grown.sqrt())
        self.root.copy_(root)
        return self

    def compute_posterior(self, clips: Clips) -> GaussianPosterior:
        """A normal belief of rank F."""
        features = torch.cat([self.features(part) for part in in_parts(clips)])
        centred = features - self.centre * clips.lengths[:, None]
        return GaussianPosterior(centred @ self.weights, centred @ self.root)

    def fold(self) -> Fold | None:
        """The layers and the root; None for a network that is no multilayer perceptron."""
        layers = fold_mlp(self.network.body)
        if layers is None:
            return None
        # Every frame counts as one, as on the reference: the bias, which comes last, cancels.
        mean_and_root = torch.cat([self.weights[:-1, None], self.root[:-1]], 1)
        return partial(_score, layers, as_array(self.centre[:-1]), as_array(mean_and_root))

    def _rows(self, comparisons: Comparisons) -> Tensor:
        r"""`(Q, F)`, $\sqrt{i_q} z_q$; in double precision, which not every device has."""
        comparisons = comparisons.compact()
        clips = comparisons.clips.to(self.device)
        features = torch.cat([self.features(part) for part in in_parts(clips)]).cpu().double()
        first, second = comparisons.pairs.cpu().T
        z = features[second] - features[first]
        difference = z @ self.weights.detach().cpu().double()
        return (
            z
            * fisher_information(difference, random_answer_rate=self.random_answer_rate).sqrt()[
                :, None
            ]
        )


def fisher_information(difference: Tensor, *, random_answer_rate: float = 0.0) -> Tensor:
    r"""How much an answer is expected to tell about a difference of returns.

    $i(d) = P'(d)^2 / [P(d)\,(1 - P(d))]$ for $P$ of `preference_probability`. Without mistakes it
    is $p(1-p)$, the second derivative of the log loss whatever the answer. With mistakes that
    second derivative is negative where an answer looks like a mistake; its expectation, which this
    is, never is, so that a Hessian made of it has an inverse.

    Args:
        difference: Return of the second clip minus that of the first, any shape, reward units.
        random_answer_rate: $\epsilon$, from 0 to below 1.

    Returns:
        The same shape, in 1 / reward units².

    Raises:
        InvalidInput: A mistake rate out of range.

    Example:
        >>> fisher_information(torch.tensor([0.0, 2.0]))
        tensor([0.2500, 0.1050])
    """
    check_random_answer_rate(random_answer_rate)
    slope = (1 - random_answer_rate) * difference.sigmoid() * (-difference).sigmoid()
    if random_answer_rate == 0:
        return slope  # slope² / slope, which far out would be 0 / 0
    second = preference_probability(difference, random_answer_rate=random_answer_rate)
    first = preference_probability(-difference, random_answer_rate=random_answer_rate)
    return slope.square() / (second * first)


def best_precision(information: Tensor, weights_squared: float) -> float:
    r"""The prior's precision that maximises Laplace's marginal likelihood at given weights.

    $\log p(D \mid \lambda) = \mathrm{const} - \frac\lambda2 |\hat\theta|^2 + \frac12 \sum_i
    \log\frac{\lambda}{\lambda + a_i}$ has one maximum, where $\lambda |\hat\theta|^2 = \sum_i
    a_i / (\lambda + a_i)$, the number of well-determined weights (MacKay 1992, "Bayesian
    Interpolation", eq. 4.8). Found by bisection in $\log \lambda$, between 1e-4 and 1e8.

    Args:
        information: `(F,)`, $a_i$, eigenvalues of the data's part of the Hessian.
        weights_squared: $|\hat\theta|^2$.

    Example:
        >>> round(best_precision(torch.tensor([3.0, 0.0]), 0.75), 4)
        1.0
    """
    low, high = math.log(_LEAST_PRECISION), math.log(_MOST_PRECISION)
    information = information.double()
    for _ in range(60):
        middle = (low + high) / 2
        precision = math.exp(middle)
        determined = float((information / (precision + information)).sum())
        low, high = (low, middle) if precision * weights_squared > determined else (middle, high)
    return math.exp((low + high) / 2)


def _score(
    layers: Sequence[Layer], centre: Array, mean_and_root: Array, inputs: Array
) -> tuple[Array, Array]:
    centred: Array = pass_hidden(inputs, layers) - centre
    moments: Array = np.matmul(centred, mean_and_root)
    deviations = moments[:, 1:]
    return moments[:, 0], np.sqrt(np.vecdot(deviations, deviations))
