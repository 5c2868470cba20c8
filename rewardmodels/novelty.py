"""Novelty: the part of a posterior that returns to "don't know" where nothing was compared.

Held-out comparisons can't show what a model doesn't know, since they are like those it learned
from. An input that was constant in training keeps a weight that no data has changed (Izmailov et
al. 2021, arXiv:2106.11905), and networks extrapolate with confidence (Ulmer & Cinà 2020,
arXiv:2012.05329). So `Novelty` adds variance outside the range of the compared frames, as much as
`learned_amplitudes` finds necessary on pseudo-shifts: comparisons at one end of an input's range,
held out from regressions on random units that are fitted to the rest.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput
from rewardmodels.likelihood import negative_log_likelihood
from rewardmodels.posterior import expected_preference

NoveltySetting = Literal["learned", "off"] | float
"""Novelty of a fit: learned by pseudo-shifts, none, or the amplitude of every input."""

CONSTANT_AMPLITUDE = 3.0
"""Amplitude of inputs that were constant: one unit of them matters as much as all else."""
_LEAST_AMPLITUDE = 1e-6  # of the others, so that the posterior returns to the prior at last
_GROWTH = 4.0  # squared excess from which variance grows faster than the square of a linear reward
_FURTHEST = 1e8  # excess beyond which variance stays: its fourth power is within single precision
_FREQUENCIES = 32
_CONSTANT = 1e-6  # of its size, as in the normalisation
_ROUNDING = 1e-6  # of the numbers that are subtracted
_POOLED = 8  # pixels, on a side, that an image is averaged to

# Pseudo-shifts.
_SHIFTS = 8
_SHARE_BEYOND = 0.15  # of the clips, at an end of an input's range
_SHARE_ORDINARY, _SHARE_STOPPING = 0.25, 0.15
_LEAST_HELD_OUT, _MOST_HELD_OUT = 10, 0.7
_LEAST_COMPARISONS = 40
_MOST_COMPARISONS, _MOST_FRAMES = 2000, 100_000
_UNITS = 32
_STEPS, _LEARNING_RATE = 100, 0.3
_PENALTIES = torch.logspace(-2, 2, 5)
_DECISIVE = 10.0  # nats by which answers have to be less likely
_AMPLITUDES = torch.cat([torch.zeros(1), torch.logspace(-3, 2, 21)])
_TEMPERATURES = torch.logspace(0, 1, 30)  # 1 to 10


class Novelty(nn.Module):
    r"""Gaussian process residual that vanishes at the compared frames and grows beyond them.

    The reward of a frame x gets an independent term $g(x)\, h(x)$, where h is a zero-mean Gaussian
    process with unit variance and kernel $\exp(-|x - x'|^2 / 2D)$, by random Fourier features
    (Rahimi & Recht 2007), and

    $$g(x)^2 = s^2 \sum_j a_j\, e_j^2 (1 + e_j^2 / 4), \quad
    e_j = \text{distance of } x_j \text{ from the range of input } j \text{ in compared frames}.$$

    So it is one function: two clips that share their novel frames don't differ by it. Its variance
    grows as the fourth power of the distance, faster than the square of any reward that is linear
    far out, so that preferences return to one half. Inputs are in standard deviations; those that
    were constant in units of their own. $s^2$ is the mean squared difference of the returns that
    were compared, so that amplitudes $a_j$ have no unit.

    Novel combinations of inputs, each within its range, are not seen. Of images, averages over
    squares of pixels are compared, since features that the network learns may collapse.

    Args:
        inputs: D, numbers per frame.
        image: Shape `(C, H, W)` of an image at the start of the inputs; None for vectors.

    Attributes:
        lowest: `(D,)`, of the compared frames, before normalisation; with images, D after pooling.
        highest: `(D,)`.
        amplitude: `(D,)`, $s^2 a_j$ in reward units²; zero without novelty.
        learned_from: Number of comparisons that the amplitudes were learned from; 0 for none.
    """

    lowest: Tensor
    highest: Tensor
    low: Tensor
    high: Tensor
    amplitude: Tensor
    learned: Tensor
    learned_from: Tensor
    frequencies: Tensor

    def __init__(self, inputs: int, image: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.image = image
        size = self.pool(torch.zeros(1, inputs)).shape[1]
        # Of its own generator, so that a model's initial weights are those without novelty.
        draw = torch.Generator().manual_seed(0)
        frequencies = torch.randn(size, _FREQUENCIES, generator=draw) / math.sqrt(size)
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("lowest", torch.full((size,), math.inf))
        self.register_buffer("highest", torch.full((size,), -math.inf))
        for name in ("low", "high", "amplitude", "learned"):
            self.register_buffer(name, torch.zeros(size))
        self.register_buffer("learned_from", torch.tensor(0))

    def pool(self, inputs: Tensor) -> Tensor:
        """Inputs `(B, D)` with the image at their start, if there is one, averaged over squares."""
        if self.image is None:
            return inputs
        pixels = math.prod(self.image)
        side = min(_POOLED, *self.image[1:])
        image = F.adaptive_avg_pool2d(inputs[:, :pixels].reshape(-1, *self.image), side)
        return torch.cat([image.flatten(1), inputs[:, pixels:]], 1)

    @property
    def constant(self) -> Tensor:
        """`(D,)` bool, True for inputs that all compared frames have alike."""
        return self.highest - self.lowest <= _CONSTANT * (1 + self.lowest.abs())

    @property
    def active(self) -> bool:
        """False if it adds nothing anywhere."""
        return bool(self.amplitude.any())

    def extend(self, inputs: Tensor, mean: Tensor, scale: Tensor) -> None:
        """Add compared frames to the range, and take over the present normalisation.

        Args:
            inputs: `(B, D)`, normalised and pooled.
            mean: `(D,)` of the normalisation, pooled.
            scale: `(D,)`.
        """
        self.lowest = torch.minimum(self.lowest, inputs.amin(0) * scale + mean)
        self.highest = torch.maximum(self.highest, inputs.amax(0) * scale + mean)
        low, high = ((bound - mean) / scale for bound in (self.lowest, self.highest))
        # Rounding mustn't take a compared frame out of the range.
        error = _ROUNDING * (1 + low.abs().maximum(high.abs()) + mean.abs() / scale)
        self.low, self.high = low - error, high + error

    def variance(self, inputs: Tensor) -> Tensor:
        """Variance `(B,)` of the novel part of frames' rewards, in reward units²."""
        return _excess(self.pool(inputs), self.low, self.high) @ self.amplitude

    def root(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Root `(N, F)` of the covariance of the novel part of clips' returns.

        Args:
            inputs: `(N * T, D)`, normalised.
            mask: `(N, T)`, True for real frames.

        Returns:
            Reward units; zero for clips without a novel frame.
        """
        pooled = self.pool(inputs)
        outside = (pooled != pooled.clamp(self.low, self.high)).any(1) & mask.flatten()
        novel = outside.nonzero().squeeze(1)
        some = pooled[novel]
        std = (_excess(some, self.low, self.high) @ self.amplitude).sqrt()
        features = std[:, None] * _process(some, self.frequencies)
        root = inputs.new_zeros(len(mask), features.shape[1])
        return root.index_add_(0, novel // mask.shape[1], features)


def _excess(inputs: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Growing function `(B, D)` of each input's distance from its range; zero inside it."""
    inside = torch.minimum(torch.maximum(inputs, low), high)
    square = (inputs - inside).square().clamp_max(_FURTHEST**2)
    return square + square.square() / _GROWTH


def _process(inputs: Tensor, frequencies: Tensor) -> Tensor:
    """Features `(B, F)` of unit length, whose products are the kernel between frames."""
    phase = inputs @ frequencies
    return torch.cat([phase.cos(), phase.sin()], 1) / math.sqrt(frequencies.shape[1])


class PseudoShift(NamedTuple):
    """Comparisons that are held out because they lie at one end of an input's range.

    Args:
        input: Its number.
        sparse: True if that input is mostly one value, and held out is all else.
        held_out: `(Q,)` bool.
    """

    input: int
    sparse: bool
    held_out: Tensor


def pseudo_shifts(
    inputs: Tensor, mask: Tensor, pairs: Tensor, preference: Tensor
) -> list[PseudoShift]:
    """Choose up to eight inputs, and hold out the comparisons beyond their usual values.

    Inputs are those that go most with the preference. Of an input that is mostly one value, held
    out are the comparisons with any other; else those with a clip among the 15% whose highest value
    (lowest, if less is preferred) goes furthest: where a policy goes.

    Args:
        inputs: `(N, T, D)`.
        mask: `(N, T)`, True for real frames.
        pairs: `(Q, 2)` indices of clips.
        preference: `(Q,)`.
    """
    frames = inputs[mask]
    other = (inputs != frames.median(0).values) & mask[..., None]
    sparse = other.sum((0, 1)) < 0.5 * len(frames)
    means = (inputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    difference = means[pairs[:, 1]] - means[pairs[:, 0]]
    # A column without variance divides nothing by a little, and goes last.
    centred = difference - difference.mean(0), (preference - preference.mean())[:, None]
    association = (centred[0] * centred[1]).mean(0) / (centred[0].square().mean(0).sqrt() + 1e-9)
    shifts: list[PseudoShift] = []
    for j in association.abs().argsort(descending=True, stable=True).tolist():
        if len(shifts) == _SHIFTS or association[j] == 0:
            break
        if sparse[j]:
            held_out = other[..., j].any(1)[pairs].any(1)
        else:
            merit = (inputs[..., j] * association[j].sign()).masked_fill(~mask, -math.inf).amax(1)
            usual = merit[pairs.unique()].quantile(1 - _SHARE_BEYOND)
            held_out = (merit[pairs] > usual).any(1)
        if _LEAST_HELD_OUT <= int(held_out.sum()) <= _MOST_HELD_OUT * len(pairs):
            shifts.append(PseudoShift(j, bool(sparse[j]), held_out))
    return shifts


def learning_sample(comparisons: Comparisons) -> Comparisons:
    """As many comparisons, drawn from torch's global generator, as amplitudes are learned from."""
    at_most = min(_MOST_COMPARISONS, max(1, _MOST_FRAMES // (2 * comparisons.clips.length)))
    return comparisons[torch.randperm(len(comparisons))[:at_most]].compact()


def learned_amplitudes(
    inputs: Tensor,
    comparisons: Comparisons,
    scale: Tensor,
    constant: Tensor,
    *,
    random_answer_rate: float = 0.0,
) -> Tensor:
    """Relative amplitude of each input by pseudo-shifts; draws from torch's global generator.

    A logistic regression on random units for each pseudo-shift, all trained together, learns from
    what is not held out, and one more leaves out an ordinary quarter, by which the temperature of
    all is chosen: only what a shift adds to their errors counts. An input gets an amplitude if its
    shift and that quarter are decisive (10 nats, a likelihood interval over eight inputs and many
    amplitudes) that it needs one, and then the largest that they don't rule out. Inputs without a
    shift take the median, those that were constant `CONSTANT_AMPLITUDE`, since no comparison can
    speak for them.

    Args:
        inputs: `(N, T, D)` of the comparisons' clips, normalised and pooled.
        comparisons: Q comparisons of N clips.
        scale: `(D,)` of the normalisation: an input that is constant in what is not held out is
            measured in units of its own there, as it would be had it never been seen.
        constant: `(D,)` bool, inputs that no comparison has changed.
        random_answer_rate: As for `RewardModel`.

    Returns:
        `(D,)`, amplitudes $a_j$.
    """
    mask, pairs, preference = comparisons.clips.mask, comparisons.pairs, comparisons.preference
    size = inputs.shape[2]
    amplitudes = torch.full((size,), _LEAST_AMPLITUDE)
    amplitudes[constant] = CONSTANT_AMPLITUDE
    if len(pairs) < _LEAST_COMPARISONS:
        return amplitudes
    shifts = pseudo_shifts(inputs, mask, pairs, preference)
    ordinary = torch.rand(len(pairs)) < _SHARE_ORDINARY
    held_out = torch.stack([shift.held_out for shift in shifts] + [ordinary])

    # The range, and the unit, of each input in what is not held out.
    clip_low = inputs.masked_fill(~mask[..., None], math.inf).amin(1)
    clip_high = inputs.masked_fill(~mask[..., None], -math.inf).amax(1)
    used = [pairs[~rows].unique() for rows in held_out]
    lows = torch.stack([clip_low[clips].amin(0) for clips in used])
    highs = torch.stack([clip_high[clips].amax(0) for clips in used])
    units = torch.where(highs - lows <= _CONSTANT * (1 + lows.abs()), scale, torch.ones(()))
    difference = _train(inputs, mask, pairs, preference, held_out, units, random_answer_rate)

    def losses(mean: Tensor, variance: Tensor, rows: Tensor) -> Tensor:
        p, q = (expected_preference(sign * mean, variance) for sign in (1, -1))
        p, q = ((1 - random_answer_rate) * x + random_answer_rate / 2 for x in (p, q))
        tiny = torch.finfo(p.dtype).tiny
        mu = preference[rows]
        return -(mu * p.clamp_min(tiny).log() + (1 - mu) * q.clamp_min(tiny).log())

    cooled = difference[-1, ordinary] / _TEMPERATURES[:, None]
    log_prior = _TEMPERATURES.log().square() / 2
    loss = losses(cooled, torch.zeros(()), ordinary).sum(1) + log_prior
    difference = difference / _TEMPERATURES[loss.argmin()]
    power = difference[-1].square().mean()

    frequencies = torch.randn(size, _FREQUENCIES) / math.sqrt(size)

    def tried(k: int, j: int) -> Tensor:
        """Losses `(A, Q')` of what regression k hasn't seen, by the amplitude of input j."""
        rows, unit = held_out[k], units[k, j]
        clips, places = pairs[rows].unique(return_inverse=True)
        flat = inputs[clips].flatten(0, 1)
        excess = _excess(*(unit * x for x in (flat[:, j], lows[k, j], highs[k, j])))
        root = excess.sqrt()[:, None] * _process(flat, frequencies)
        root = (root.unflatten(0, (len(clips), -1)) * mask[clips][..., None]).sum(1)
        variance = (root[places[:, 1]] - root[places[:, 0]]).square().sum(1)
        return losses(difference[k, rows], power * _AMPLITUDES[:, None] * variance, rows)

    for k, (j, _, _) in enumerate(shifts):
        each = torch.cat([tried(k, j), tried(-1, j)], 1)
        amplitudes[j] = max(_LEAST_AMPLITUDE, float(_AMPLITUDES[_cautious(each.sum(1))]))
    others = ~constant
    others[[shift.input for shift in shifts]] = False
    dense = [float(amplitudes[shift.input]) for shift in shifts if not shift.sparse]
    if dense:
        amplitudes[others] = median(dense)
    return amplitudes


def _cautious(losses: Tensor) -> int:
    """Last of A amplitudes that the data haven't ruled out; but the first, if it is one of them."""
    possible = (losses <= losses.min() + _DECISIVE).nonzero().flatten().tolist()
    return 0 if possible[0] == 0 else possible[-1]


def _train(
    inputs: Tensor,
    mask: Tensor,
    pairs: Tensor,
    preference: Tensor,
    held_out: Tensor,
    units: Tensor,
    random_answer_rate: float,
) -> Tensor:
    """Differences of returns `(K, Q)` by K logistic regressions on random units and the inputs.

    A regression doesn't see the comparisons `held_out`, `(K, Q)`; its inputs are multiplied by its
    `units`, `(K, D)`. All have the penalty that serves comparisons best that they didn't see but
    that were not held out.
    """
    size = inputs.shape[2]
    weights, biases = torch.randn(size, _UNITS) / math.sqrt(size), 2 * torch.rand(_UNITS) - 1
    unlike, which = units.unique(dim=0, return_inverse=True)
    features = []
    for unit in unlike:
        frames = inputs * unit
        frames = torch.cat([frames, (frames @ weights + biases).relu()], 2) * mask[..., None]
        returns = frames.sum(1).T  # a layout in which products are fast
        features.append(returns[:, pairs[:, 1]] - returns[:, pairs[:, 0]])
    x = torch.stack(features)
    x = (x / x.square().sum(1).mean(1).sqrt().clamp_min(1e-12)[:, None, None])[which]
    validation = ~held_out & (torch.rand(held_out.shape) < _SHARE_STOPPING)
    training = (~held_out & ~validation).float()

    coefficients = torch.zeros(len(x), len(_PENALTIES), x.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=_LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)

    def losses() -> Tensor:
        differences = (coefficients @ x).movedim(1, 0)
        return negative_log_likelihood(
            differences, preference, random_answer_rate=random_answer_rate
        )

    with torch.enable_grad():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            penalty = (_PENALTIES @ coefficients.square()).sum() / 2
            ((losses() * training).sum() + penalty).backward()
            optimizer.step()
            decay.step()
    best = (losses() * validation).sum((1, 2)).argmin()
    return (coefficients[:, best, None] @ x).squeeze(1).detach()


def check_novelty(novelty: NoveltySetting) -> None:
    """Raise InvalidInput unless novelty is "learned", "off" or a number of at least 0."""
    if novelty in ("learned", "off"):
        return
    if not isinstance(novelty, int | float) or not 0 <= novelty < math.inf:
        raise InvalidInput(
            f'novelty: expected "learned", "off" or an amplitude of at least 0, got {novelty!r}.'
        )
