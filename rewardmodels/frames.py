"""Single frames: their shapes, and their normalised inputs to a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput, require

# Dividing by less would only add noise. A constant isn't divided at all: a first difference after
# training would else be multiplied by a thousand.
_SMALLEST_SCALE = 1e-3
_CONSTANT = 1e-6  # of its size
FURTHEST = 1e8
"""Standard deviations beyond which inputs, and so rewards and variances, no longer change."""
_LARGEST = 1e18  # larger ones have a variance that overflows, and the input would be ignored


@dataclass(frozen=True)
class FrameSpec:
    """Shapes of one frame, as of the first training data.

    Args:
        observation: Shape of an observation, without N and T. Three axes or more are an image
            `(C, H, W)`, or several of one size, such as those before and after an action.
        action: Shape of an action, without N and T.
        discrete_actions: Number of actions to choose from; 0 where an action is a vector.
    """

    observation: tuple[int, ...]
    action: tuple[int, ...]
    discrete_actions: int = 0

    @classmethod
    def of(cls, clips: Clips, discrete_actions: int = 0) -> FrameSpec:
        """Return the shapes of these clips' frames.

        Actions are discrete if each is one number of an integer type.

        Args:
            clips: N clips.
            discrete_actions: Number of actions; 0 for one more than the largest in the clips.
        """
        shapes = tuple(clips.observations.shape[2:]), tuple(clips.actions.shape[2:])
        if clips.actions.is_floating_point() or clips.actions.ndim != 2:
            return cls(*shapes)
        seen = int(clips.actions.max()) + 1 if clips.actions.numel() else 0
        return cls(*shapes, discrete_actions or seen)

    @property
    def image(self) -> tuple[int, int, int] | None:
        """Shape `(C, H, W)`, several images of one size stacked along C; None for vectors."""
        if len(self.observation) < 3:
            return None
        *several, height, width = self.observation
        return torch.Size(several).numel(), height, width

    def check_layout(self) -> None:
        """Raise InvalidInput for an image with its channels last, which would be a flat vector."""
        if len(self.observation) < 3:
            return
        height, width, channels = self.observation[-3:]
        valid = channels not in (1, 3, 4) or min(height, width) < 4 * channels
        got = f"{self.observation}, channels last; move that axis, as by np.moveaxis(x, -1, -3)"
        require("observations", valid, "images of shape (C, H, W)", got)

    def check(self, clips: Clips) -> None:
        """Raise InvalidInput unless the clips' frames have these shapes."""
        found = FrameSpec.of(clips, self.discrete_actions)
        if found != self:
            raise InvalidInput(
                f"clips: expected the frame shapes of the training data, {self}; got {found}."
            )
        if self.discrete_actions and clips.actions.numel():
            least, most = (int(x) for x in clips.actions.aminmax())
            if least < 0 or most >= self.discrete_actions:
                raise InvalidInput(
                    f"actions: expected numbers from 0 to {self.discrete_actions - 1}, got "
                    f"{least if least < 0 else most}. Their number was taken from the first clips "
                    "unless the model was made with discrete_actions=."
                )


class FrameInputs(nn.Module):
    """Input vector of a frame: normalised numbers, then a discrete action as one-hot.

    Images are normalised by channel, all else number by number.

    Args:
        spec: Shapes of a frame.
        actions: Include the action.

    Attributes:
        size: D, numbers in a vector.

    Example:
        >>> FrameInputs(FrameSpec((3,), (), discrete_actions=4)).size
        7
    """

    def __init__(self, spec: FrameSpec, *, actions: bool = True) -> None:
        super().__init__()
        self.choices = spec.discrete_actions if actions else 0
        self.actions = actions and not self.choices
        numbers = torch.arange(torch.Size(spec.observation).numel())
        if spec.image:
            channels, height, width = spec.image
            numbers = torch.arange(channels).repeat_interleave(height * width)
        if self.actions:
            more = torch.arange(torch.Size(spec.action).numel())
            numbers = torch.cat([numbers, more + len(numbers.unique())])
        self.norm = RunningNorm(numbers)
        self.size = len(numbers) + self.choices

    def update(self, observations: Tensor, actions: Tensor) -> None:
        """Add B frames to the normalisation's statistics.

        Raises:
            InvalidInput: A number whose square is more than single precision holds.
        """
        numbers = self._numbers(observations, actions)
        if len(numbers) and not (largest := float(numbers.abs().max())) <= _LARGEST:
            raise InvalidInput(
                f"clips: expected numbers of at most {_LARGEST:g} in size, got {largest:g}; "
                "rescale that input, or mend or drop the value if it is a fault."
            )
        self.norm.update(numbers)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return inputs `(B, D)` of B frames."""
        numbers: Tensor = self.norm(self._numbers(observations, actions))
        if not self.choices:
            return numbers
        return torch.cat([numbers, F.one_hot(actions.long(), self.choices).to(numbers)], 1)

    def _numbers(self, observations: Tensor, actions: Tensor) -> Tensor:
        parts = (observations, actions) if self.actions else (observations,)
        # The axis between is for frames that are a single number.
        return torch.cat([part[:, None].flatten(1).float() for part in parts], 1)


class RunningNorm(nn.Module):
    """Standardisation by the mean and variance of all frames passed to `update`.

    A frame passed again, as at each further fit, counts again. The statistics are buffers, so they
    are saved with the model; they change only in `update` (Chan et al. 1979, parallel variance),
    never in `forward`.

    Args:
        inputs: D, numbers per frame; or `(D,)` groups from 0, for inputs that share a mean and a
            variance with the others of their group.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    groups: Tensor

    def __init__(self, inputs: int | Tensor) -> None:
        super().__init__()
        groups = torch.arange(inputs) if isinstance(inputs, int) else inputs
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("mean", torch.zeros(len(groups)))
        self.register_buffer("variance", torch.ones(len(groups)))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, frames: Tensor) -> None:
        """Update the statistics with `(B, D)` more frames."""
        n, total = len(frames), self.count + len(frames)
        each = frames.mean(0)
        mean = self._shared(each)
        variance = self._shared(frames.var(0, correction=0) + (each - mean).square())
        between = (mean - self.mean).square() * (self.count * n / total)
        self.variance.copy_((self.variance * self.count + variance * n + between) / total)
        self.mean.lerp_(mean, n / float(total))
        self.count.copy_(total)

    def forward(self, frames: Tensor) -> Tensor:
        """Return standardised frames `(..., D)`, none further out than `FURTHEST`."""
        return ((frames - self.mean) / self.scale).clamp(-FURTHEST, FURTHEST)

    @property
    def scale(self) -> Tensor:
        """Divisor `(D,)` of the inputs."""
        std = self.variance.sqrt()
        constant = std <= _CONSTANT * (1 + self.mean.abs())
        return std.clamp_min(_SMALLEST_SCALE).masked_fill(constant, 1)

    def _shared(self, values: Tensor) -> Tensor:
        """Mean over its group for each of `(D,)` values."""
        sums = values.new_zeros(len(values)).index_add(0, self.groups, values)
        return (sums / self.groups.bincount(minlength=len(values)))[self.groups]
