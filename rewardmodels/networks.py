"""Networks over single frames: input normalisation and members trained as one batched network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SMALLEST_SCALE = (
    1e-3  # below this an input counts as constant: dividing by it would only add noise
)


class RunningNorm(nn.Module):
    """Standardises inputs by the mean and variance of every frame it was shown.

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
        shapes = list(zip(widths[:-1], widths[1:], strict=True))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(members, *s)) for s in shapes)
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(members, 1, out)) for _, out in shapes
        )
        for member in range(members):
            for weight in self.weights:
                nn.init.xavier_uniform_(weight.data[member])

    def forward(self, frames: Tensor) -> Tensor:
        """Returns `(K, B)` outputs for frames `(B, D)`."""
        members = len(self.weights[0])
        hidden = frames.expand(members, *frames.shape)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = F.leaky_relu(torch.baddbmm(bias, hidden, weight))
        return torch.baddbmm(self.biases[-1], hidden, self.weights[-1]).squeeze(-1)
