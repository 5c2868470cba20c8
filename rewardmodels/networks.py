"""Networks over single frames: input normalisation and members trained as one batched network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Below this an input counts as constant: dividing by it would only add noise.
_SMALLEST_SCALE = 1e-3


class RunningNorm(nn.Module):
    """Standardises inputs by the mean and variance of every frame it was shown.

    A frame shown again, as at each further fit, counts again.

    The statistics are buffers, so they are saved with the model; they change only in `update`
    (Chan et al. 1979, parallel variance), never in `forward`.

    Args:
        inputs: D, numbers per frame.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("variance", torch.ones(inputs))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, frames: Tensor) -> None:
        """Takes `(B, D)` more frames into account."""
        n, total = len(frames), self.count + len(frames)
        mean, variance = frames.mean(0), frames.var(0, correction=0)
        between = (mean - self.mean).square() * (self.count * n / total)
        self.variance.copy_((self.variance * self.count + variance * n + between) / total)
        self.mean.lerp_(mean, n / float(total))
        self.count.copy_(total)

    def forward(self, frames: Tensor) -> Tensor:
        """Returns `(..., D)` standardised frames."""
        return (frames - self.mean) / self.variance.sqrt().clamp_min(_SMALLEST_SCALE)


class MLP(nn.Module):
    """A multilayer perceptron whose last layer is linear in what `features` returns.

    Args:
        inputs: D, numbers per frame.
        hidden: Widths of the hidden layers, at least one.

    Example:
        >>> network = MLP(inputs=3, hidden=(8, 4))
        >>> network(torch.zeros(10, 3)).shape, network.features(torch.zeros(10, 3)).shape
        (torch.Size([10]), torch.Size([10, 4]))
    """

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*widths) for widths in pairwise([inputs, *hidden]))
        self.last = nn.Linear(hidden[-1], 1)
        for layer in (*self.layers, self.last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def features(self, frames: Tensor, scales: Sequence[Tensor] | None = None) -> Tensor:
        """Returns `(..., H)`, the last hidden layer for frames `(..., D)`.

        Args:
            frames: Normalised inputs.
            scales: What each hidden layer's units are multiplied by, such as a dropout mask.
        """
        hidden = frames
        for i, layer in enumerate(self.layers):
            hidden = F.leaky_relu(layer(hidden), inplace=True)
            if scales is not None:
                hidden = hidden * scales[i]
        return hidden

    def forward(self, frames: Tensor, scales: Sequence[Tensor] | None = None) -> Tensor:
        """Returns `(...)` outputs for frames `(..., D)`."""
        outputs: Tensor = self.last(self.features(frames, scales))
        return outputs.squeeze(-1)


class MemberMLP(nn.Module):
    """K multilayer perceptrons of one shape, evaluated as one batched product per layer.

    Args:
        members: K.
        inputs: D, numbers per frame.
        hidden: Widths of the hidden layers.

    Example:
        >>> MemberMLP(members=5, inputs=3, hidden=(8,))(torch.zeros(10, 3)).shape
        torch.Size([5, 10])
    """

    def __init__(self, members: int, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs, *hidden, 1]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(members, width, before)) for before, width in pairwise(widths)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(members, width, 1)) for width in widths[1:]
        )
        for member in range(members):
            for weight in self.weights:
                nn.init.xavier_uniform_(weight.data[member])

    def forward(self, frames: Tensor) -> Tensor:
        """Returns `(K, B)` outputs for frames `(B, D)`."""
        *layers, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        # Frames run along the last axis: along the rows, a training step takes a third longer.
        hidden = frames.T.expand(len(last_weight), -1, -1)
        for weight, bias in layers:
            hidden = F.leaky_relu(torch.baddbmm(bias, weight, hidden), inplace=True)
        return torch.baddbmm(last_bias, last_weight, hidden).squeeze(1)
