"""Last-layer Laplace approximation: a Gaussian posterior from one training run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import is_whole, require
from rewardmodels.likelihood import (
    check_random_answer_rate,
    negative_log_likelihood,
    preference_probability,
)
from rewardmodels.model import PairBatch, RewardModel, clip_chunks
from rewardmodels.networks import FrameNetwork
from rewardmodels.posterior import GaussianPosterior

_LEAST_PRECISION, _MOST_PRECISION = 1e-4, 1e8
_ROUNDS, _STEPS = 10, 300  # of prior and mode in turn; of L-BFGS, at most


class LaplaceHead(RewardModel):
    r"""A network with a Gaussian posterior over the weights of its last layer.

    The last layer makes returns linear in $\Phi(c) = \sum_t (\phi(x_t), 1)$, a clip's summed
    features: $R = \theta^\top \Phi$. A comparison with $z = \Phi_b - \Phi_a$ is a logistic
    regression's row, and Laplace's method (MacKay 1992; Daxberger et al. 2021,
    arXiv:2106.14806, §2) gives

    $$\theta \sim N(\hat\theta, H^{-1}), \quad H = \lambda I + \sum_q i(\hat\theta^\top z_q)\,
    z_q z_q^\top, \quad \mathrm{Var}(R_b - R_a) = z^\top H^{-1} z,$$

    where $i$ is a comparison's `fisher_information`. Comparisons of equal lengths don't depend on
    the bias; where lengths differ, the joint uncertainty of bias and weights is counted.

    Only the last layer is uncertain: two clips with the same features have the same return under
    every sample. While `fit` runs, epochs are compared by the network alone, without a variance.

    Where no features are learned (no hidden layers, or a network of your own without parameters)
    this is Bayesian logistic regression: when the fit ends, $\hat\theta$ is brought to the mode
    under the prior, whatever the epochs did, so that one without held-out comparisons is enough.

    Args:
        prior_precision: $\lambda$, in 1 / reward units²; None for the one that maximises the
            marginal likelihood of the training comparisons (`best_precision`).
        standouts: Features with a prior precision of at most 1, the others with $\lambda$: those
            whose differences correlate the most with the preferences, so that one that says much
            isn't drowned by hundreds that say little. For features that aren't learned.
        options: As for `RewardModel`. The last hidden layer is the features.

    Attributes:
        precision: The $\lambda$ in use.
    """

    network: FrameNetwork
    precision: Tensor
    centre: Tensor
    root: Tensor

    def __init__(
        self, prior_precision: float | None = None, standouts: int = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        valid = prior_precision is None or 0 < prior_precision < math.inf
        expected = "a number above 0, or None to choose one by the marginal likelihood"
        require("prior_precision", valid, expected, prior_precision)
        valid = is_whole(standouts) and standouts >= 0
        require("standouts", valid, "a whole number of at least 0", standouts)
        self.prior_precision, self.standouts = prior_precision, standouts

    def build(self, inputs: int) -> None:
        """Make the network; its posterior has no variance yet."""
        self.network = self.frame_network(inputs)
        size = self.network.width + 1
        self.register_buffer("precision", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("root", torch.zeros(size, size))

    @property
    def weights(self) -> Tensor:
        r"""Last layer's weights and bias, $\hat\theta$, shape `(F,)`."""
        return torch.cat([self.network.last.weight[0], self.network.last.bias])

    def features(self, clips: Clips) -> Tensor:
        r"""Features summed over each clip's real frames, and their number: $\Phi$, `(N, F)`."""
        features = self.network.features(self.clip_inputs(clips)).unflatten(0, clips.mask.shape)
        summed = features.masked_fill(~clips.mask[..., None], 0).sum(1)
        return torch.cat([summed, clips.lengths[:, None].to(summed)], 1)

    def loss(self, batch: PairBatch) -> Tensor:
        """Mean log loss of the network, without its variance."""
        difference = (self.features(batch.second) - self.features(batch.first)) @ self.weights
        return negative_log_likelihood(
            difference, batch.preference, random_answer_rate=self.random_answer_rate
        ).mean()

    def on_train_start(self) -> None:
        """Reset the variance, which was of other features."""
        self.root.zero_()

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Centre the features on the reference batch."""
        frames = self.inputs(self.reference_observations, self.reference_actions)
        self.centre[:-1] = self.network.features(frames).mean(0)
        self.centre[-1] = 1

    @torch.no_grad()
    def after_fit(self, comparisons: Comparisons) -> None:
        """Choose the precision of the prior, go to the mode, and invert the Hessian."""
        comparisons = comparisons.compact()
        z, preference = self._differences(comparisons), comparisons.preference.cpu().double()
        learned = any(parameter.requires_grad for parameter in self.network.body.parameters())
        correlation = (preference - 0.5) @ z / z.square().mean(0).sqrt().clamp_min(1e-12)
        first = correlation.abs().topk(0 if learned else min(self.standouts, z.shape[1])).indices
        chosen = self.prior_precision or 1.0
        for _ in range(1 if learned or self.prior_precision else _ROUNDS):
            scale = torch.ones_like(z[0])  # weights times it have the precision of the others
            scale[first] = max(1.0, chosen**0.5)
            if not learned:
                self._go_to_mode(z * scale, scale, preference, chosen)
            weights = self.weights.cpu().double()
            information = fisher_information(
                z @ weights, random_answer_rate=self.random_answer_rate
            )
            rows = z * scale * information.sqrt()[:, None]
            values, vectors = torch.linalg.eigh(rows.T @ rows)
            values = values.clamp_min(0)
            if self.prior_precision is None:
                chosen = best_precision(values, float((weights / scale).square().sum()))
        self.precision.fill_(chosen)
        self.root.copy_(scale[:, None] * vectors / (chosen + values).sqrt())

    def compute_posterior(self, clips: Clips) -> GaussianPosterior:
        """Gaussian posterior of rank F."""
        features = torch.cat([self.features(part) for part in clip_chunks(clips)])
        centred = features - self.centre * clips.lengths[:, None]
        return GaussianPosterior(centred @ self.weights, centred @ self.root)

    def frame_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        # Every frame counts as one, as on the reference: the bias, which comes last, cancels.
        centred = self.network.features(inputs) - self.centre[:-1]
        return centred @ self.weights[:-1], (centred @ self.root[:-1]).square().sum(1).sqrt()

    def _differences(self, comparisons: Comparisons) -> Tensor:
        r"""Rows $z_q$, `(Q, F)`, in double precision, which not every device has."""
        clips = comparisons.clips.to(self.device)
        features = torch.cat([self.features(part) for part in clip_chunks(clips)]).cpu().double()
        first, second = comparisons.pairs.cpu().T
        return features[second] - features[first]

    def _go_to_mode(self, z: Tensor, scale: Tensor, preference: Tensor, precision: float) -> None:
        """Set the last layer to `scale` times the mode of its scaled posterior, by L-BFGS."""
        theta = torch.zeros_like(scale, requires_grad=True)
        optimiser = torch.optim.LBFGS([theta], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def negative_log_posterior() -> Tensor:
            optimiser.zero_grad()
            nll = negative_log_likelihood(
                z @ theta, preference, random_answer_rate=self.random_answer_rate
            )
            loss = (nll.sum() + precision / 2 * theta.square().sum()) / len(z)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimiser.step(negative_log_posterior)
        weights = theta.detach() * scale
        self.network.last.weight.copy_(weights[None, :-1])
        self.network.last.bias.copy_(weights[-1:])


def fisher_information(difference: Tensor, *, random_answer_rate: float = 0.0) -> Tensor:
    r"""Fisher information of a comparison about its difference of returns.

    $i(d) = P'(d)^2 / [P(d)\,(1 - P(d))]$ for $P$ of `preference_probability`. Without random
    answers it is $p(1-p)$, the second derivative of the log loss whatever the preference. With
    them that second derivative is negative where an answer looks random; its expectation, which
    this is, never is, so that a Hessian made of it has an inverse.

    Args:
        difference: Return of the second clip minus that of the first, any shape, reward units.
        random_answer_rate: $\epsilon$, from 0 to below 1.

    Returns:
        The same shape, in 1 / reward units².

    Raises:
        InvalidInput: A rate out of range.

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
    r"""Prior precision that maximises Laplace's marginal likelihood at given weights.

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
