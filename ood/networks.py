"""What the detectors that train networks share: the networks, their training and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ood.detectors import OODDetector
from rewardmodels import InvalidInput
from rewardmodels.scoring import Layer, as_array

BATCH = 256
_LEARNING_RATE = 2e-3


class Members(nn.Module):
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


def train(network: nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    """Takes so many steps down a loss that draws its own batch, ever smaller ones."""
    optimiser = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 100.0)
        optimiser.step()
        schedule.step()


def names_of(prefix: str, layers: int) -> list[str]:
    """Of the arrays that `keep` sets."""
    return [f"{prefix}_{kind}{i}" for i in range(layers) for kind in ("weight", "bias")]


def keep(detector: OODDetector, prefix: str, network: Members) -> None:
    """Sets a network's weights and biases as arrays of its detector, which are saved with it."""
    for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        setattr(detector, f"{prefix}_weight{i}", as_array(weight))
        setattr(detector, f"{prefix}_bias{i}", as_array(bias))


def layers_of(detector: OODDetector, prefix: str, layers: int) -> list[Layer]:
    """The layers that `keep` set, as `rewardmodels.scoring` passes frames through them."""
    return [
        (getattr(detector, f"{prefix}_weight{i}"), getattr(detector, f"{prefix}_bias{i}"), "silu")
        for i in range(layers)
    ]


def check_hidden(hidden: tuple[int, ...]) -> None:
    """Raises for widths below 1."""
    if any(width < 1 for width in hidden):
        raise InvalidInput(f"hidden: expected widths of at least 1, got {hidden}.")
