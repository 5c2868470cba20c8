"""Clips: stretches of behaviour, the things that teachers compare and models value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rewardmodels.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Clips:
    """N clips of up to T frames each; indexable like a tensor along N.

    A whole trajectory is simply a long clip, so the same type holds both (see `cut`).
    Clips of different lengths share one T: `mask` is False past a clip's end, and
    what stands there is never looked at.

    Args:
        observations: `(N, T, *obs)`, what the agent saw before it acted.
        actions: `(N, T, *act)`, what it then did.
        mask: `(N, T)` bool, True for real frames. Defaults to all True.
        rewards: `(N, T)`, the task's own reward; for synthetic teachers and evaluation only.
        states: `(N, T, s)`, simulator state, so that a clip can be rendered.

    Raises:
        InvalidInput: Shapes that don't agree, a clip without frames, or NaN or infinity in
            a real frame.

    Example:
        >>> clips = Clips(torch.zeros(4, 10, 3), torch.zeros(4, 10, 1))
        >>> len(clips), clips.length, len(clips[1:3])
        (4, 10, 2)
    """

    observations: Tensor
    actions: Tensor
    mask: Tensor = None  # type: ignore[assignment]  # filled in below: a clip always has one
    rewards: Tensor | None = None
    states: Tensor | None = None

    def __post_init__(self) -> None:
        if self.observations.ndim < 2:
            came = tuple(self.observations.shape)
            raise InvalidInput(f"observations: expected shape (N, T, *obs), got {came}.")
        shape = self.observations.shape[:2]
        if self.mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=self.observations.device)
            object.__setattr__(self, "mask", mask)
        for name, value in self._tensors():
            if value.shape[:2] != shape:
                raise InvalidInput(
                    f"{name}: expected its first two axes to be (N, T) = {tuple(shape)} as in "
                    f"observations, got shape {tuple(value.shape)}."
                )
        if self.mask.dtype != torch.bool:
            raise InvalidInput(f"mask: expected dtype bool, got {self.mask.dtype}.")
        if len(self) and not bool(self.mask.any(1).all()):
            empty = int((~self.mask.any(1)).nonzero()[0])
            raise InvalidInput(f"mask: expected a real frame in every clip, clip {empty} has none.")
        for name, value in self._tensors():
            if value.is_floating_point():
                object.__setattr__(self, name, _finite(name, value, self.mask))

    def __len__(self) -> int:
        return self.observations.shape[0]

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Clips:
        if isinstance(index, int):
            index = [index]
        return replace(self, **{name: value[index] for name, value in self._tensors()})

    @property
    def length(self) -> int:
        """T, frames of the longest clip."""
        return self.observations.shape[1]

    @property
    def lengths(self) -> Tensor:
        """`(N,)` long, real frames of each clip."""
        return self.mask.sum(1)

    @property
    def returns(self) -> Tensor:
        """`(N,)`, sum of the task's own rewards over a clip's real frames, in reward units."""
        if self.rewards is None:
            raise InvalidInput(
                "clips.rewards: expected the task's own reward, got None; these clips were "
                "recorded without it, so there is no true return to compare with."
            )
        return self.rewards.masked_fill(~self.mask, 0).sum(1)

    def to(self, device: torch.device | str) -> Clips:
        """Returns the same clips on another device."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})

    @classmethod
    def cat(cls, parts: Sequence[Clips]) -> Clips:
        """Joins clips along N; shorter ones are padded to the longest.

        `rewards` and `states` are kept where every part has them.
        """
        if not parts:
            raise InvalidInput("parts: expected at least one Clips, got none.")
        length = max(part.length for part in parts)
        joined = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if any(value is None for value in values):
                joined[field.name] = None
                continue
            if len({value.shape[2:] for value in values}) > 1:
                shapes = ", ".join(str(tuple(value.shape)) for value in values)
                raise InvalidInput(
                    f"parts: expected {field.name} of one shape per frame, got {shapes}."
                )
            joined[field.name] = torch.cat([_pad(value, length) for value in values])
        return cls(**joined)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in named if value is not None]


def cut(
    trajectories: Clips, length: int, n: int, *, generator: torch.Generator | None = None
) -> Clips:
    """Cuts n clips of `length` frames from trajectories, each place equally likely.

    A trajectory shorter than `length` yields its whole self, padded. Draws are with
    replacement between clips, so two clips may overlap.

    Args:
        trajectories: N trajectories, held as clips whose real frames come first.
        length: Frames per clip.
        n: Number of clips.
        generator: Source of randomness.

    Raises:
        InvalidInput: No trajectories, or a length or n below one.
    """
    if len(trajectories) == 0 or length < 1 or n < 1:
        raise InvalidInput(
            "trajectories, length, n: expected at least one of each, got "
            f"{len(trajectories)}, {length} and {n}."
        )
    places = (trajectories.lengths - length + 1).clamp_min(1)
    which = torch.multinomial(places.double(), n, replacement=True, generator=generator)
    start = (torch.rand(n, generator=generator) * places[which]).long()
    frame = start[:, None] + torch.arange(min(length, trajectories.length))
    frame = frame.clamp_max(trajectories.length - 1)
    parts = {name: value[which[:, None], frame] for name, value in trajectories._tensors()}
    return Clips(**parts)


def _pad(value: Tensor, length: int) -> Tensor:
    missing = length - value.shape[1]
    if missing == 0:
        return value
    return torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], 1)


def _finite(name: str, value: Tensor, mask: Tensor) -> Tensor:
    # One sum finds the usual case (all finite) at a fraction of a mask's memory.
    if bool(torch.isfinite(value.sum())):
        return value
    frames = torch.isfinite(value) if value.ndim == 2 else torch.isfinite(value).flatten(2).all(2)
    bad = (~frames & mask).nonzero()
    if len(bad):
        clip, frame = bad[0].tolist()
        raise InvalidInput(
            f"{name}: expected finite numbers, got NaN or infinity in {len(bad)} frame(s), "
            f"the first in clip {clip}, frame {frame}."
        )
    # Only the padding isn't finite. A gradient would still see it (0 x NaN), so it goes.
    return value.masked_fill(~mask.view(*mask.shape, *(1,) * (value.ndim - 2)), 0)
