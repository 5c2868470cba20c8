"""Learned detectors: an ensemble of dynamics models, and random network distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ood.detectors import CONSTANT_SCALE, Array, OODDetector, as_array, whitening
from rewardmodels.errors import check_positive, require
from rewardmodels.fitting import isolated_randomness
from rewardmodels.networks import PRIOR_GAIN

_BATCH = 256
_LEARNING_RATE = 2e-3
_CHUNK = 1024  # frames that pass through the networks at once
_SMALL = 0.01  # added to squared residuals, whose logarithm is taken
_WHITENING_FRAMES = 20_000  # training frames whose errors are decorrelated, at most
# Bounds of log standard deviations, relative to the change's own. A simulator without noise would
# otherwise drive them to minus infinity, and any small anomaly would have an infinite score.
_LOG_STD = (-5.0, 1.0)
# As a tanh, standard deviations lie between exp(-5) and exp(-5) + exp(1).
_HALF_RANGE = math.exp(_LOG_STD[1]) / 2
_MIDDLE = math.exp(_LOG_STD[0]) + _HALF_RANGE


class DynamicsEnsemble(OODDetector):
    r"""Error of K networks that predict the observation to which an action leads.

    PEDM (Haider et al. 2023, "Out-of-distribution detection for reinforcement learning agents with
    probabilistic dynamics models", AAMAS): each member predicts the change $\delta = s' - s$, in
    standard deviations $\sigma$ of that change, as $N(\mu_k(s, a), \sigma_k^2(s, a))$, and is
    trained on its own bootstrap sample of the transitions (Chua et al. 2018, arXiv:1805.12114).
    Scores are, per number of an observation,

    - "likelihood": $-\frac1O \log \frac1K \sum_k N(\delta; \mu_k, \sigma_k^2)$, in nats;
    - "error": $\min_k \frac1O \sum_d |\delta_d - \mu_{kd}|$, in standard deviations of the change.
      The authors take the smallest mean error of 1,000 samples; the members' means are repeatable.

    The O + 1 residuals are the errors of the mean prediction, in standard deviations of the mixture
    and decorrelated on training frames, and the mean logarithm of their squares. The moving average
    of the first (`ood.MEWMA`) finds dynamics that push each step the same way by less than steps
    differ; that of the last finds more noise.

    Args:
        observation_size: O; features are `(B, O + act + O)` of `ood.features.transition`.
        members: K.
        hidden: Widths of the hidden layers.
        score_by: "likelihood" or "error".
        steps: Training steps, of 256 transitions for each member.
        seed: Of the networks, the bootstrap and the batches.

    Raises:
        InvalidInput: A number below one, an unknown score, or features too narrow for two
            observations.

    Example:
        >>> before, action = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(0))
        >>> steps = torch.cat([before, action, before + action], 1)
        >>> detector = DynamicsEnsemble(1, members=2, hidden=(16,), steps=200).fit(steps)
        >>> anomaly = torch.tensor([[0.0, 1.0, -1.0]])
        >>> bool(detector.score(anomaly) > detector.score(steps).max())
        True
    """

    def __init__(
        self,
        observation_size: int,
        members: int = 3,
        hidden: Sequence[int] = (128, 128),
        score_by: Literal["likelihood", "error"] = "likelihood",
        steps: int = 20_000,
        seed: int = 0,
    ) -> None:
        check_positive(observation_size=observation_size, members=members, steps=steps)
        known = ("likelihood", "error")
        require("score_by", score_by in known, "'likelihood' or 'error'", repr(score_by))
        self.observation_size, self.members, self.hidden = observation_size, members, tuple(hidden)
        check_positive(hidden=min(self.hidden, default=1))
        self.score_by: Literal["likelihood", "error"] = score_by
        self.steps, self.seed = steps, seed
        self._folded: tuple[int, _Folded | None] = -1, None  # revision, and what belongs to it
        moments = ("change_mean", "change_scale", "missed", "missed_whitening", "size")
        self.learned = (*moments, *_layer_names("member", len(self.hidden) + 1))

    def fit_frames(self, frames: Array) -> None:
        size, width = self.observation_size, frames.shape[1]
        observed = "those of an observation before and after the action"
        require("features", width >= 2 * size, f"at least {2 * size} numbers, {observed}", width)
        change = frames[:, -size:] - frames[:, :size]
        self.change_mean = change.mean(0)
        smallest = CONSTANT_SCALE * np.maximum(1, np.abs(frames[:, -size:]).max(0))
        self.change_scale = np.maximum(change.std(0), smallest)
        inputs = torch.from_numpy(self.standardise(frames)[:, :-size]).float()
        targets = torch.from_numpy((change - self.change_mean) / self.change_scale).float()
        with isolated_randomness(self.seed):
            network = _Members(self.members, (inputs.shape[1], *self.hidden, 2 * size))
            bootstrap = torch.randint(len(inputs), (self.members, len(inputs)))

            def loss() -> Tensor:
                rows = bootstrap[:, torch.randint(len(inputs), (_BATCH,))]
                mean, raw = network(inputs[rows]).chunk(2, -1)
                log_std = _bounded(raw)
                error = (targets[rows] - mean) * (-log_std).exp()
                # Summed over members, which share no parameters.
                return (error.square() / 2 + log_std).mean((1, 2)).sum()

            _train(network, loss, self.steps)
        _store_layers(self, "member", network)
        sample = frames[:: -(-len(frames) // _WHITENING_FRAMES)]
        self.size = np.array([0.0, 1.0])
        errors = self._mean_errors(sample)
        self.missed = errors.mean(0)
        self.missed_whitening = whitening(errors - self.missed)
        sizes = self.residual_frames(sample)[:, -1]
        self.size = np.array([sizes.mean(), max(sizes.std(), CONSTANT_SCALE)])
        self._folded = -1, None  # since it contains the size

    def score_frames(self, frames: Array) -> Array:
        return _in_chunks(self._score_chunk, frames)

    def _score_chunk(self, frames: Array) -> Array:
        errors, std = self._predict(frames)
        if self.score_by == "error":
            return np.abs(errors).mean(2).min(0)
        white = errors / std
        log_p = np.vecdot(white, white) / -2 - np.log(std).sum(2)  # (K, B)
        most = log_p.max(0)
        mixture = np.log(np.exp(log_p - most).sum(0) / self.members) + most
        return math.log(2 * math.pi) / 2 - mixture / self.observation_size

    def explain_frames(self, frames: Array) -> Array:
        """Error of each number of the observation after, in predicted standard deviations."""
        explained = np.zeros_like(frames)
        explained[:, -self.observation_size :] = np.abs(self._mean_errors(frames))
        return explained

    def residual_frames(self, frames: Array) -> Array:
        errors = self._mean_errors(frames)
        errors -= self.missed
        white = errors.dot(self.missed_whitening)
        residuals = np.empty((len(white), white.shape[1] + 1))
        residuals[:, :-1] = white
        squared = np.multiply(white, white, out=white)
        squared += _SMALL
        folded = self._fold()
        size = np.log(squared, out=squared).dot(folded.size_weights)
        np.subtract(size, folded.size_mean, out=residuals[:, -1])
        return residuals

    def _mean_errors(self, frames: Array) -> Array:
        """Errors `(B, O)` of the mean prediction, in predicted standard deviations."""
        return _in_chunks(self._mean_errors_chunk, frames)

    def _mean_errors_chunk(self, frames: Array) -> Array:
        errors, std = self._predict(frames)
        # Law of total variance: mean of the members' variances, and variance of their means.
        mean = self._mean_over_members(errors)
        errors -= mean
        errors *= errors
        std *= std
        errors += std
        variance = self._mean_over_members(errors)
        mean /= np.sqrt(variance, out=variance)
        return mean

    def _mean_over_members(self, values: Array) -> Array:
        """Mean `(B, O)` of `(K, B, O)`."""
        # A product: for one frame NumPy's mean takes three times as long.
        mean: Array = self._fold().shares.dot(values.reshape(self.members, -1))
        return mean.reshape(values.shape[1:])

    def _predict(self, frames: Array) -> tuple[Array, Array]:
        """Errors and standard deviations `(K, B, O)`, in standard deviations of the change."""
        size, folded = self.observation_size, self._fold()
        row = frames.dot(folded.standardising)
        row -= folded.centre
        outputs = _forward(row[:, :-size].astype(np.float32), folded.layers)
        std = np.tanh(outputs[..., size:], dtype=np.float64)
        std *= _HALF_RANGE
        std += _MIDDLE
        return row[:, -size:] - outputs[..., :size], std

    def _fold(self) -> _Folded:
        """Matrices that a frame passes through, computed once per fit.

        Those that follow each other are merged: each ufunc takes a microsecond of a guarded step.
        """
        revision, folded = self._folded
        if folded is not None and revision == self.revision:
            return folded
        size, members = self.observation_size, self.members
        layers = _halved_layers(self, "member", len(self.hidden) + 1)
        # `_bounded` is a tanh of half the outputs for standard deviations.
        weight, bias = (array.copy() for array in layers[-1])
        weight[..., size:] /= 2
        bias[..., size:] /= 2
        bias[..., size:] -= _LOG_STD[1] / 2
        scale = np.append(self.scale[:-size], self.change_scale)
        change = np.eye(len(scale))
        change[:size, -size:] = -np.eye(size)
        mean, std = self.size.tolist()
        folded = _Folded(
            change / scale,
            np.append(self.mean[:-size], self.change_mean) / scale,
            [*layers[:-1], (weight, bias)],
            np.full(members, 1 / members),
            np.full(size, 1 / (size * std)),
            mean / std,
        )
        self._folded = self.revision, folded
        return folded


class _Folded(NamedTuple):
    standardising: Array  # (F, F), to (before, action, after - before) in standard deviations
    centre: Array  # (F,), of these
    layers: list[tuple[Array, Array]]
    shares: Array  # (K,), of each member
    size_weights: Array  # (O,), of the logarithm of each squared residual
    size_mean: float


def _bounded(raw: Tensor) -> Tensor:
    """Log standard deviations within `_LOG_STD`, smoothly (Chua et al. 2018, A.1)."""
    low, high = _LOG_STD
    return low + F.softplus(high - F.softplus(high - raw) - low)


class RandomNetworkDistillation(OODDetector):
    r"""Error $\frac1H \lVert f(x) - g(x) \rVert^2$ of a trained copy g of a random network f.

    Burda et al. 2019 (arXiv:1810.12894, §2.2): g is trained on training frames alone, and nothing
    makes it right elsewhere.

    Args:
        hidden: Widths of the hidden layers of both.
        outputs: H.
        steps: Training steps, of 256 frames.
        seed: Of both networks and the batches.

    Raises:
        InvalidInput: A number below one.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> detector = RandomNetworkDistillation(steps=200).fit(x)
        >>> bool(detector.score(torch.full((1, 3), 9.0)) > detector.score(x).max())
        True
    """

    def __init__(
        self, hidden: Sequence[int] = (64, 64), outputs: int = 32, steps: int = 3000, seed: int = 0
    ) -> None:
        self.hidden, self.outputs, self.steps, self.seed = tuple(hidden), outputs, steps, seed
        check_positive(hidden=min(self.hidden, default=1), outputs=outputs, steps=steps)
        layers = len(self.hidden) + 1
        self.learned = (*_layer_names("target", layers), *_layer_names("copy", layers))

    def fit_frames(self, frames: Array) -> None:
        inputs = torch.from_numpy(self.standardise(frames)).float()
        widths = (inputs.shape[1], *self.hidden, self.outputs)
        with isolated_randomness(self.seed):
            target, copy = _Members(1, widths, gain=PRIOR_GAIN), _Members(1, widths)
            target.requires_grad_(False)

            def loss() -> Tensor:
                rows = inputs[torch.randint(len(inputs), (_BATCH,))][None]
                return F.mse_loss(copy(rows), target(rows))

            _train(copy, loss, self.steps)
        _store_layers(self, "target", target)
        _store_layers(self, "copy", copy)

    def score_frames(self, frames: Array) -> Array:
        inputs, layers = self.standardise(frames).astype(np.float32), len(self.hidden) + 1
        target, copy = (
            _forward(inputs, _halved_layers(self, name, layers))[0].astype(np.float64)
            for name in ("target", "copy")
        )
        error = target - copy
        return np.vecdot(error, error) / self.outputs


class _Members(nn.Module):
    """K multilayer perceptrons of one shape, from `(K, B, D)` to `(K, B, H)`."""

    def __init__(self, members: int, widths: Sequence[int], gain: float = 1.0) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, width in pairwise(widths):
            bound = 1 / math.sqrt(before)
            weight = torch.empty(members, before, width).uniform_(-gain * bound, gain * bound)
            self.weights.append(nn.Parameter(weight))
            bias = torch.empty(members, 1, width).uniform_(-bound, bound)
            self.biases.append(nn.Parameter(bias))

    def forward(self, frames: Tensor) -> Tensor:
        *hidden, (last, last_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            frames = F.silu(torch.baddbmm(bias, frames, weight))
        return torch.baddbmm(last_bias, frames, last)


def _train(network: nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    """Run `steps` optimiser steps on `loss()`, which draws its own batch."""
    optimiser = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 100.0)
        optimiser.step()
        schedule.step()


def _layer_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}_{kind}{i}" for i in range(layers) for kind in ("weight", "bias")]


def _store_layers(detector: OODDetector, prefix: str, network: _Members) -> None:
    """Set a network's weights and biases as arrays of its detector, which are saved with it."""
    for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        setattr(detector, f"{prefix}_weight{i}", as_array(weight).copy())
        setattr(detector, f"{prefix}_bias{i}", as_array(bias).copy())


def _halved_layers(detector: OODDetector, prefix: str, layers: int) -> list[tuple[Array, Array]]:
    """Stored weights and biases as `_forward` takes them, those of hidden layers halved."""
    pairs = [
        (getattr(detector, f"{prefix}_weight{i}"), getattr(detector, f"{prefix}_bias{i}"))
        for i in range(layers)
    ]
    return [*((weight / 2, bias / 2) for weight, bias in pairs[:-1]), pairs[-1]]


def _forward(inputs: Array, layers: Sequence[tuple[Array, Array]]) -> Array:
    """Outputs `(K, B, H)` of `_Members` for inputs `(B, D)`."""
    # Weights and biases are halved, which is exact, since silu(2h) is h + h tanh(h).
    for weight, bias in layers[:-1]:
        half = inputs @ weight
        half += bias
        inputs = np.tanh(half)
        inputs *= half
        inputs += half
    weight, bias = layers[-1]
    outputs: Array = inputs @ weight
    outputs += bias
    return outputs


def _in_chunks(function: Callable[[Array], Array], frames: Array) -> Array:
    if len(frames) <= _CHUNK:  # a copy would take part of a guarded step
        return function(frames)
    starts = range(0, len(frames), _CHUNK)
    return np.concatenate([function(frames[i : i + _CHUNK]) for i in starts])
