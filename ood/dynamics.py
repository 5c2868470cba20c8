"""A detector that foretells what a step leads to, so that it notices when the world changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ood.detectors import CONSTANT, Array, OODDetector, whitening
from ood.networks import BATCH, Members, check_hidden, keep, layers_of, names_of, train
from rewardmodels import InvalidInput
from rewardmodels.fitting import isolated_randomness

_FRAMES_AT_ONCE = 1024
_SMALL = 0.01  # a variance too small to tell from none
_WHITENED = 20_000  # frames whose errors are decorrelated
# Of log standard deviations, where a change's own is 1: a simulator without noise would otherwise
# drive them to minus infinity, and what is hardly strange would be infinitely so.
_LOG_STD = (-5.0, 1.0)
# Standard deviations lie between exp(-5) and exp(-5) + exp(1), along a tanh.
_HALF_RANGE = math.exp(_LOG_STD[1]) / 2
_MIDDLE = math.exp(_LOG_STD[0]) + _HALF_RANGE


class DynamicsEnsemble(OODDetector):
    r"""How badly K networks foretold the observation that an action led to.

    PEDM (Haider et al. 2023, "Out-of-distribution detection for reinforcement learning agents with
    probabilistic dynamics models", AAMAS): each member predicts the change
    $\delta = s' - s$, in standard deviations $\sigma$ of that change, as a normal distribution
    $N(\mu_k(s, a), \sigma_k^2(s, a))$; each is trained on its own bootstrap sample of the
    transitions (Chua et al. 2018, arXiv:1805.12114). Scores are, per number of an observation,

    - "likelihood": $-\frac1O \log \frac1K \sum_k N(\delta; \mu_k, \sigma_k^2)$, in nats;
    - "error": $\min_k \frac1O \sum_d |\delta_d - \mu_{kd}|$, in standard deviations of the change.
      The authors' code takes the smallest mean error of 1,000 samples of the ensemble; this one,
      of the members' means, doesn't change from call to call.

    Its signed numbers, O + 1 of them, are what the mean of the members missed, in standard
    deviations of the mixture, decorrelated as on a sample of the training frames, and the mean
    logarithm of these errors' squares. In their moving average (`ood.MEWMA`) a world shows that
    pulls each step the same way by less than steps differ; by the last, one with more noise.

    Args:
        observation_size: O, so that features `(B, O + act + O)` of `ood.features.transition` come
            apart.
        members: K.
        hidden: Widths of the hidden layers.
        score_by: Which of the scores.
        steps: Training steps, of 256 transitions for each member.
        seed: Of the networks, the bootstrap and the batches.

    Raises:
        InvalidInput: A number below one, an unknown score, or features too narrow for two
            observations.

    Example:
        >>> before, action = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(0))
        >>> steps = torch.cat([before, action, before + action], 1)
        >>> detector = DynamicsEnsemble(1, members=2, hidden=(16,), steps=200).fit(steps)
        >>> strange = torch.tensor([[0.0, 1.0, -1.0]])
        >>> bool(detector.score(strange) > detector.score(steps).max())
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
        hidden = tuple(hidden)
        numbers = {"observation_size": observation_size, "members": members, "steps": steps}
        for name, value in numbers.items():
            if value < 1:
                raise InvalidInput(f"{name}: expected at least 1, got {value}.")
        check_hidden(hidden)
        if score_by not in (known := get_args(Literal["likelihood", "error"])):
            raise InvalidInput(f"score_by: expected one of {', '.join(known)}; got {score_by!r}.")
        self.observation_size, self.members, self.hidden = observation_size, members, hidden
        self.score_by: Literal["likelihood", "error"] = score_by
        self.steps, self.seed = steps, seed
        # To look layers up by their names takes as long as to pass through them.
        self._folded: tuple[int, _Folded | None] = -1, None
        moments = ("change_mean", "change_scale", "missed", "missed_whitening", "size")
        self._ARRAYS = (*moments, *names_of("member", len(hidden) + 1))

    def _fit(self, features: Array) -> None:
        size = self.observation_size
        if features.shape[1] < 2 * size:
            raise InvalidInput(
                f"features: expected at least {2 * size} numbers, those of an observation before "
                f"and after the action, got {features.shape[1]}."
            )
        change = features[:, -size:] - features[:, :size]
        self.change_mean = change.mean(0)
        floor = CONSTANT * np.maximum(1, np.abs(features[:, -size:]).max(0))
        self.change_scale = np.maximum(change.std(0), floor)
        inputs = torch.from_numpy(self._inputs(features))
        targets = torch.from_numpy((change - self.change_mean) / self.change_scale).float()
        with isolated_randomness(self.seed):
            network = Members(self.members, (inputs.shape[1], *self.hidden, 2 * size))
            bootstrap = torch.randint(len(inputs), (self.members, len(inputs)))

            def loss() -> Tensor:
                rows = bootstrap[:, torch.randint(len(inputs), (BATCH,))]
                mean, raw = network(inputs[rows]).chunk(2, -1)
                log_std = _bounded(raw)
                apart = (targets[rows] - mean) * (-log_std).exp()
                # Summed over members, who share nothing.
                return (apart.square() / 2 + log_std).mean((1, 2)).sum()

            train(network, loss, self.steps)
        keep(self, "member", network)
        some = features[:: -(-len(features) // _WHITENED)]
        self.size = np.array([0.0, 1.0])
        missed = self._missed(some)
        self.missed = missed.mean(0)
        self.missed_whitening = whitening(missed - self.missed)
        sizes = self._signed(some)[:, -1]
        self.size = np.array([sizes.mean(), max(sizes.std(), CONSTANT)])
        self._folded = -1, None  # of which the size is part

    def _score(self, features: Array) -> Array:
        return np.concatenate(
            [
                self._score_some(features[i : i + _FRAMES_AT_ONCE])
                for i in range(0, max(1, len(features)), _FRAMES_AT_ONCE)
            ]
        )

    def _score_some(self, features: Array) -> Array:
        apart, std = self._predict(features)
        if self.score_by == "error":
            error: Array = np.abs(apart).mean(2).min(0)
            return error
        white = apart / std
        log_p = np.vecdot(white, white) / -2 - np.log(std).sum(2)  # (K, B)
        most = log_p.max(0)
        each = np.log(np.exp(log_p - most).sum(0) / self.members) + most
        score: Array = math.log(2 * math.pi) / 2 - each / self.observation_size
        return score

    def _explain(self, frames: Array) -> Array:
        """Error of each number of the observation after, in predicted standard deviations."""
        explained = np.zeros_like(frames)
        explained[:, -self.observation_size :] = np.abs(self._missed(frames))
        return explained

    def _signed(self, features: Array) -> Array:
        apart = self._missed(features)
        apart -= self.missed
        white = apart.dot(self.missed_whitening)
        signed = np.empty((len(white), white.shape[1] + 1))
        signed[:, :-1] = white
        squared = np.multiply(white, white, out=white)
        squared += _SMALL
        folded = self._fold()
        size = np.log(squared, out=squared).dot(folded.of_size)
        np.subtract(size, folded.usual_size, out=signed[:, -1])
        return signed

    def _missed(self, features: Array) -> Array:
        """`(B, O)`: errors of the mean prediction, in predicted standard deviations."""
        if len(features) <= _FRAMES_AT_ONCE:
            return self._missed_some(features)
        return np.concatenate(
            [
                self._missed_some(features[i : i + _FRAMES_AT_ONCE])
                for i in range(0, max(1, len(features)), _FRAMES_AT_ONCE)
            ]
        )

    def _missed_some(self, features: Array) -> Array:
        apart, std = self._predict(features)
        # Law of total variance: what members expect, and how far apart they are.
        mean = self._over_members(apart)
        apart -= mean
        apart *= apart
        std *= std
        apart += std
        variance = self._over_members(apart)
        mean /= np.sqrt(variance, out=variance)
        return mean

    def _over_members(self, values: Array) -> Array:
        """The mean `(B, O)` of `(K, B, O)`."""
        # As a product, since for one frame NumPy's method takes thrice as long.
        mean: Array = self._fold().shares.dot(values.reshape(self.members, -1))
        return mean.reshape(values.shape[1:])

    def _predict(self, features: Array) -> tuple[Array, Array]:
        """Errors and standard deviations `(K, B, O)`, in standard deviations of the change."""
        size, folded = self.observation_size, self._fold()
        row = features.dot(folded.standardising)
        row -= folded.centre
        outputs = row[:, :-size].astype(np.float32)
        for half_weight, half_bias in folded.hidden:
            half = outputs @ half_weight
            half += half_bias
            outputs = np.tanh(half)
            outputs *= half
            outputs += half
        outputs = outputs @ folded.weight
        outputs += folded.bias
        std = np.tanh(outputs[..., size:], dtype=np.float64)
        std *= _HALF_RANGE
        std += _MIDDLE
        return row[:, -size:] - outputs[..., :size], std

    def _fold(self) -> _Folded:
        """What needn't be computed anew for each frame, since the last fit."""
        revision, folded = self._folded
        if folded is None or revision != self.revision:
            folded = _folded(self)
            self._folded = self.revision, folded
        return folded

    def _inputs(self, features: Array) -> Array:
        """What came before, `(B, O + act)`."""
        known = features.shape[1] - self.observation_size
        standard: Array = (features[:, :known] - self.mean[:known]) / self.scale[:known]
        return standard.astype(np.float32)


class _Folded(NamedTuple):
    """What a fitted ensemble passes a frame through."""

    standardising: Array  # (F, F), to (before, action, after - before) in standard deviations
    centre: Array  # (F,), of these
    hidden: list[tuple[Array, Array]]
    weight: Array  # (K, H, 2 O)
    bias: Array  # (K, 1, 2 O)
    shares: Array  # (K,), of each member
    of_size: Array  # (O,), of each number's logarithm
    usual_size: float


def _folded(detector: DynamicsEnsemble) -> _Folded:
    """Spares a ufunc wherever it can: each takes a microsecond of a guarded step, or more.

    With weights and biases halved, which is exact, silu(2h) is h + h tanh(h), and `_bounded` but a
    tanh of the outputs.
    """
    size, members = detector.observation_size, detector.members
    layers = layers_of(detector, "member", len(detector.hidden) + 1)
    *hidden, (weight, bias) = [(weight / 2, bias / 2) for weight, bias, _ in layers]
    weight[..., :size] *= 2
    bias[..., :size] *= 2
    bias[..., size:] -= _LOG_STD[1] / 2
    scale = np.append(detector.scale[:-size], detector.change_scale)
    change = np.eye(len(scale))
    change[:size, -size:] = -np.eye(size)
    usual, spread = detector.size.tolist()
    return _Folded(
        change / scale,
        np.append(detector.mean[:-size], detector.change_mean) / scale,
        hidden,
        weight,
        bias,
        np.full(members, 1 / members),
        np.full(size, 1 / (size * spread)),
        usual / spread,
    )


def _bounded(raw: Tensor) -> Tensor:
    """Log standard deviations that stay, smoothly, within `_LOG_STD` (Chua et al. 2018, A.1)."""
    low, high = _LOG_STD
    return low + F.softplus(high - F.softplus(high - raw) - low)
