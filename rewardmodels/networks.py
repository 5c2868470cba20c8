"""Networks over single frames: of vectors, of images, and of several members."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from rewardmodels.errors import InvalidInput, require

# Numbers in a layer of all members up to which one batched product is quicker than a product per
# member: above, it no longer fits in a processor's cache. Training step of five members of 64 units
# on one thread, batched against one by one: 32 frames 0.4 against 0.7 ms, 512 frames 2.1 against
# 2.5, 3,200 frames 16.4 against 10.3.
_TOGETHER = 1 << 18
_CHANNELS = (16, 32, 32, 64, 64)
BRANCH = 0.9  # Lipschitz constant of a residual branch; below 1, the map keeps points apart
_SMALLEST_SIDE = 4  # pixels; a smaller image isn't halved

PRIOR_GAIN = 2.5
"""Gain of initial weights for which SiLU layers keep inputs of about one at about one."""

Activation = Literal["silu", "leaky_relu"]

MakeNetwork = Callable[[int], nn.Module]
"""Function from D to a module from `(B, D)` inputs to `(B, H)` features."""


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """Apply an activation in place."""
    if activation == "silu":
        return F.silu(hidden, inplace=True)
    return F.leaky_relu(hidden, inplace=True)


class MLP(nn.Module):
    """Hidden layers of a multilayer perceptron, with SiLU units (Elfwing et al. 2018).

    Smooth units and PyTorch's own small initial weights suit few comparisons: with 210 of them,
    the last-layer Laplace model's held-out log loss was 0.17 on average over six draws from three
    MuJoCo tasks, and 0.25 with leaky ReLUs.

    Args:
        inputs: D, numbers per frame.
        hidden: Widths of the hidden layers.
        activation: "silu", or "leaky_relu", with initial weights as in Glorot & Bengio (2010).

    Example:
        >>> MLP(inputs=3, hidden=(8, 4))(torch.zeros(10, 3)).shape
        torch.Size([10, 4])
    """

    def __init__(self, inputs: int, hidden: Sequence[int], activation: Activation = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(*widths) for widths in pairwise([inputs, *hidden]))
        if activation == "leaky_relu":
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)

    def forward(self, frames: Tensor, scales: Sequence[Tensor] | None = None) -> Tensor:
        """Return the last hidden layer `(..., H)` for frames `(..., D)`.

        Args:
            frames: Normalised inputs.
            scales: Factors of each hidden layer's units, such as a dropout mask.
        """
        hidden = frames
        for i, layer in enumerate(self.layers):
            hidden = activate(layer(hidden), self.activation)
            if scales is not None:
                hidden = hidden * scales[i]
        return hidden


class CNN(nn.Module):
    """Convolutions that halve an image until it is small, then the hidden layers of an MLP.

    Inputs are the image's numbers, channel by channel and row by row, and then any others, such as
    those of an action, which join behind the convolutions.

    Args:
        image: `(C, H, W)`.
        inputs: D, numbers per frame, of the image and others.
        hidden: Widths of the layers behind the convolutions.

    Raises:
        InvalidInput: More numbers in the image than inputs.

    Example:
        >>> CNN((3, 20, 30), inputs=3 * 20 * 30 + 2, hidden=(8,))(torch.zeros(10, 1802)).shape
        torch.Size([10, 8])
    """

    def __init__(self, image: tuple[int, int, int], inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.image, self.pixels = image, torch.Size(image).numel()
        expected = f"at least the {self.pixels} numbers of an image {image}"
        require("inputs", inputs >= self.pixels, expected, inputs)
        before, *sides = image
        layers: list[nn.Module] = []
        for channels in _CHANNELS:
            if min(sides) <= _SMALLEST_SIDE:
                break
            layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1), nn.SiLU()]
            before, sides = channels, [-(-side // 2) for side in sides]
        self.convolutions = nn.Sequential(*layers)
        self.head = MLP(torch.Size([before, *sides]).numel() + inputs - self.pixels, hidden)

    def forward(self, frames: Tensor) -> Tensor:
        """Return features `(..., H)` of frames `(..., D)`."""
        image, rest = frames.split([self.pixels, frames.shape[-1] - self.pixels], -1)
        seen = self.convolutions(image.reshape(-1, *self.image)).flatten(1)
        features: Tensor = self.head(torch.cat([seen.unflatten(0, rest.shape[:-1]), rest], -1))
        return features


class ResidualFeatures(nn.Module):
    r"""Distance-preserving map of frames: $x \leftarrow x + c\, V \rho(U x + a) + b$.

    With the spectral norms of U and V held at 1, a leaky ReLU $\rho$ and $c = 0.9$, each block's
    branch is c-Lipschitz, so that L blocks change no distance by more than a factor between
    $(1 - c)^L$ and $(1 + c)^L$ (Liu et al. 2020, arXiv:2006.10108; Behrmann et al. 2019,
    arXiv:1811.00995): frames far from the data stay far from it. The norms are estimates by
    power iteration (Miyato et al. 2018, arXiv:1802.05957), a few per cent off while weights move.

    Args:
        inputs: D, numbers per frame, and features too.
        hidden: Width of each block; none is the identity.

    Example:
        >>> ResidualFeatures(inputs=3, hidden=(8, 4))(torch.zeros(10, 3)).shape
        torch.Size([10, 3])
    """

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.inputs = inputs
        self.inner = nn.ModuleList(_normed(inputs, width) for width in hidden)
        self.outer = nn.ModuleList(_normed(width, inputs) for width in hidden)

    def blocks(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """Two linear layers of each block."""
        return list(zip(self.inner, self.outer, strict=True))  # type: ignore[arg-type]  # made so

    def forward(self, frames: Tensor) -> Tensor:
        """Return features `(..., D)` of frames `(..., D)`."""
        for inner, outer in self.blocks():
            frames = frames + BRANCH * outer(F.leaky_relu(inner(frames)))
        return frames

    def __reduce__(self) -> Any:
        # torch pickles the numbers of normalised layers only.
        widths = tuple(inner.out_features for inner, _ in self.blocks())
        return _residual, (self.inputs, widths, self.training, self.state_dict())


def _residual(
    inputs: int, hidden: Sequence[int], training: bool, state: dict[str, Tensor]
) -> ResidualFeatures:
    with torch.device("meta"):  # nothing is drawn
        features = ResidualFeatures(inputs, hidden)
    features.load_state_dict(state, assign=True)
    return features.train(training)


class FrameNetwork(nn.Module):
    """Features with a linear layer behind them.

    Args:
        body: From `(B, D)` inputs to `(B, H)` features.
        inputs: D.

    Attributes:
        width: H.

    Raises:
        InvalidInput: A body that doesn't make such features.

    Example:
        >>> network = FrameNetwork(MLP(3, (8, 4)), inputs=3)
        >>> network(torch.zeros(10, 3)).shape, network.features(torch.zeros(10, 3)).shape
        (torch.Size([10]), torch.Size([10, 4]))
    """

    def __init__(self, body: nn.Module, inputs: int) -> None:
        super().__init__()
        self.body = body
        self.width = feature_count(body, inputs)
        self.last = nn.Linear(self.width, 1)

    def features(self, frames: Tensor) -> Tensor:
        """Return features `(..., H)` of frames `(..., D)`."""
        features: Tensor = self.body(frames)
        return features

    def forward(self, frames: Tensor) -> Tensor:
        """Return outputs `(...)` for frames `(..., D)`."""
        outputs: Tensor = self.last(self.features(frames))
        return outputs.squeeze(-1)


class Members(nn.ModuleList):
    """K networks of any kind, evaluated one after the other."""

    def forward(self, frames: Tensor) -> Tensor:
        """Return outputs `(K, B)` for frames `(B, D)`."""
        return torch.stack([member(frames) for member in self])


class MemberMLP(nn.Module):
    """K multilayer perceptrons of one shape: a batched product per layer, where that is quicker.

    Args:
        members: K.
        inputs: D, numbers per frame.
        hidden: Widths of the hidden layers.
        gain: Factor of the initial weights of `torch.nn.Linear`; unused with "leaky_relu".
        activation: As for `MLP`.

    Example:
        >>> MemberMLP(members=5, inputs=3, hidden=(8,))(torch.zeros(10, 3)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        members: int,
        inputs: int,
        hidden: Sequence[int],
        gain: float = 1.0,
        activation: Activation = "silu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, width in pairwise([inputs, *hidden, 1]):
            bound = 1 / math.sqrt(max(1, before))
            weight = torch.empty(members, width, before).uniform_(-gain * bound, gain * bound)
            self.weights.append(nn.Parameter(weight))
            bias = torch.empty(members, width, 1).uniform_(-bound, bound)
            self.biases.append(nn.Parameter(bias))
        if activation == "leaky_relu":
            for weight, bias in zip(self.weights, self.biases, strict=True):
                nn.init.zeros_(bias)
                for member in weight.data:
                    nn.init.xavier_uniform_(member)

    def forward(self, frames: Tensor) -> Tensor:
        """Return outputs `(K, B)` for frames `(B, D)`."""
        layers = list(zip(self.weights, self.biases, strict=True))
        widest = max(bias.shape[:2].numel() for bias in self.biases)
        if frames.is_cuda or len(frames) * widest <= _TOGETHER:
            return self._together(frames, layers)
        each = zip(
            *(zip(*(p.unbind() for p in layer), strict=True) for layer in layers), strict=True
        )
        return torch.cat([self._alone(frames, member) for member in each])

    def _together(self, frames: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        *layers, (last_weight, last_bias) = layers
        # Frames run along the last axis: along the rows, a training step takes a third longer.
        hidden = frames.T.expand(len(last_weight), -1, -1)
        for weight, bias in layers:
            hidden = activate(torch.baddbmm(bias, weight, hidden), self.activation)
        return torch.baddbmm(last_bias, last_weight, hidden).squeeze(1)

    def _alone(self, frames: Tensor, layers: Sequence[tuple[Tensor, ...]]) -> Tensor:
        *some, (last_weight, last_bias) = layers
        hidden = frames
        for weight, bias in some:
            hidden = activate(torch.addmm(bias.T, hidden, weight.T), self.activation)
        return torch.addmm(last_bias.T, hidden, last_weight.T).T


def network_maker(network: nn.Module | MakeNetwork) -> MakeNetwork:
    """Return a function from the number of inputs to a new network.

    Args:
        network: Such a function, or a module, which is copied at each call.

    Raises:
        InvalidInput: Neither.
    """
    if isinstance(network, nn.Module):
        return partial(_copied, network)  # not a lambda, which can't be pickled
    expected = "a torch.nn.Module, (B, D) inputs to (B, H) features, or a function from D to one"
    require("network", callable(network), expected, repr(network))
    return network


def _copied(network: nn.Module, inputs: int) -> nn.Module:
    return copy.deepcopy(network)


def feature_count(body: nn.Module, inputs: int) -> int:
    """Number of features H of a network from `(B, D)` inputs to `(B, H)` features.

    Raises:
        InvalidInput: The network doesn't return such features.
    """
    training = body.training
    body.eval()
    output: object
    try:
        with torch.no_grad():
            output = body(torch.zeros(2, inputs))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        output = error
    finally:
        body.train(training)
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == 2:
        return output.shape[1]
    found = tuple(output.shape) if isinstance(output, Tensor) else repr(output)
    raise InvalidInput(
        f"network: expected a module from (B, {inputs}) inputs to (B, H) features; for (2, "
        f"{inputs}) zeros it gave {found}."
    )


def _normed(inputs: int, outputs: int) -> nn.Module:
    # One iteration a step, the default, falls 20% behind weights that take large steps.
    return spectral_norm(nn.Linear(inputs, outputs), n_power_iterations=3)
