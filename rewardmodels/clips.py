"""Clips of behaviour, which teachers compare and models predict returns of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rewardmodels.arrays import ArrayLike, as_integers, as_tensor
from rewardmodels.errors import InvalidInput, require


@dataclass(frozen=True, eq=False)
class Clips:
    """N clips of up to T frames each; indexable like a tensor along N.

    A frame is an action and the observation *after* it. A whole trajectory is a long clip (see
    `cut`). Clips of different lengths share one T: `mask` is False past a clip's end, and values
    there are ignored (and set to 0 where they are floating-point, for the gradients' sake).

    Arrays are tensors, NumPy arrays or lists.

    Clips of different lengths may be compared, but then the constant per frame that comparisons
    of equal lengths leave free counts once for each frame more (see `RewardModel`).

    Args:
        observations: `(N, T, *obs)`, observation after each action.
        actions: `(N, T, *act)`.
        mask: `(N, T)` bool, True for real frames. Defaults to all True.
        rewards: `(N, T)`, the task's own reward; for synthetic teachers and evaluation only.
        states: `(N, T, s)`, simulator state, so that a clip can be rendered.

    Raises:
        InvalidInput: Not real numbers, shapes that don't agree, a clip without frames, or NaN or
            infinity in a real frame.

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
        for name, value in self._tensors():
            object.__setattr__(self, name, as_tensor(name, value))
        found = tuple(self.observations.shape)
        shape, n_and_t = found[:2], f"(N, T) = {found[:2]}"
        valid = len(shape) == 2 and shape[1] > 0
        require("observations", valid, "shape (N, T, *obs) with T of at least 1", found)
        whole = self.mask is None
        if whole:
            mask = torch.ones(shape, dtype=torch.bool, device=self.observations.device)
            object.__setattr__(self, "mask", mask)
        for name, value in self._tensors():
            found, expected = tuple(value.shape), f"first two axes {n_and_t} as in observations"
            require(name, found[:2] == shape, expected, found)
            valid = len(found) == 2 or name not in ("mask", "rewards")
            require(name, valid, f"shape {n_and_t}", found)
        require("mask", self.mask.dtype == torch.bool, "dtype bool", self.mask.dtype)
        padding = None if whole or bool(self.mask.all()) else ~self.mask
        if padding is not None and bool(padding.all(1).any()):
            empty = int(padding.all(1).nonzero()[0])
            raise InvalidInput(f"mask: expected a real frame in every clip, clip {empty} has none.")
        for name, value in self._tensors():
            if value.is_floating_point():
                if padding is not None:
                    # Padding may hold NaN, or what overflows: 0 x inf would spoil a gradient.
                    padded = padding.view(*shape, *(1,) * (value.ndim - 2))
                    value = value.masked_fill(padded, 0)
                    object.__setattr__(self, name, value)
                _check_finite(name, value)

    def __len__(self) -> int:
        return self.observations.shape[0]

    def __getitem__(self, index: int | slice | ArrayLike) -> Clips:
        rows = as_rows(index)
        return self._trusted({name: value[rows] for name, value in self._tensors()})

    @property
    def length(self) -> int:
        """Frames of the longest clip, T."""
        return self.observations.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Real frames of each clip, `(N,)` long."""
        return self.mask.sum(1)

    @property
    def returns(self) -> Tensor:
        """Sum `(N,)` of the task's own rewards over a clip's real frames, in reward units."""
        if self.rewards is None:
            raise InvalidInput(
                "clips.rewards: expected the task's own reward, got None; these clips were "
                "recorded without it, so they have no true return."
            )
        return self.rewards.masked_fill(~self.mask, 0).sum(1)

    def to(self, device: torch.device | str) -> Clips:
        """Return the same clips on another device."""
        return self._trusted({name: value.to(device) for name, value in self._tensors()})

    @classmethod
    def cat(cls, parts: Sequence[Clips]) -> Clips:
        """Join clips along N; shorter ones are padded to the longest.

        `rewards` and `states` are kept where every part has them.

        Raises:
            InvalidInput: No parts, or frames of different shapes.
        """
        require("parts", bool(parts), "at least one Clips", "none")
        length = max(part.length for part in parts)
        joined: dict[str, Tensor] = {}
        for name in _FIELDS:
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                continue
            if len({value.shape[2:] for value in values}) > 1:
                shapes = ", ".join(str(tuple(value.shape)) for value in values)
                raise InvalidInput(f"parts: expected {name} of one shape per frame, got {shapes}.")
            joined[name] = torch.cat([_pad(value, length) for value in values])
        return cls._trusted(joined)

    @classmethod
    def of_items(cls, features: ArrayLike) -> Clips:
        """Make a clip of one frame of each of N items, such as embedded texts or offers.

        Args:
            features: `(N, *features)`. There are no actions.

        Example:
            >>> Clips.of_items(torch.zeros(4, 384)).observations.shape
            torch.Size([4, 1, 384])
        """
        features = as_tensor("features", features)
        expected, found = "shape (N, *features)", tuple(features.shape)
        require("features", features.ndim >= 2, expected, found)
        return cls(features[:, None], features.new_zeros(len(features), 1, 0))

    @classmethod
    def _trusted(cls, tensors: dict[str, Tensor]) -> Clips:
        # Rows of checked clips need no second check, which would cost more than a small model.
        clips = object.__new__(cls)
        for name in _FIELDS:
            object.__setattr__(clips, name, tensors.get(name))
        return clips

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(name, getattr(self, name)) for name in _FIELDS]
        return [(name, value) for name, value in named if value is not None]


_FIELDS = tuple(field.name for field in fields(Clips))


class ClipView(Clips):
    """Some of the clips, of which no more is copied than is indexed.

    So that a memory-mapped matrix of items needn't fit into memory: go through it in parts, as in
    `view[start:stop]`. A whole tensor, such as `observations`, is copied each time it is asked for.

    Args:
        clips: N clips.
        rows: `(M,)` long, the clips of the view.
    """

    def __init__(self, clips: Clips, rows: Tensor) -> None:
        self._clips, self._rows = clips, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | ArrayLike) -> Clips:
        return self._clips[self._rows[as_rows(index)]]

    def __getattribute__(self, name: str) -> Any:
        if name not in _FIELDS:
            return super().__getattribute__(name)
        value = getattr(self._clips, name)
        return None if value is None else value[self._rows]

    @property
    def length(self) -> int:
        return self._clips.length

    def to(self, device: torch.device | str) -> Clips:
        return self if torch.device(device) == self._clips.mask.device else self[:].to(device)


def cut(
    trajectories: Clips, length: int, n: int, *, generator: torch.Generator | None = None
) -> Clips:
    """Cut n clips of `length` frames from trajectories, each place equally likely.

    A trajectory shorter than `length` has one place, and is cut whole and padded. Draws are with
    replacement between clips, so two clips may overlap.

    Args:
        trajectories: N trajectories, held as clips whose real frames come first.
        length: Frames per clip.
        n: Number of clips.
        generator: Source of randomness, on the CPU.

    Returns:
        n clips of T = `length` frames, or fewer where no trajectory is that long.

    Raises:
        InvalidInput: No trajectories, or a length or n below one.

    Example:
        >>> trajectories = Clips(torch.zeros(2, 100, 3), torch.zeros(2, 100, 1))
        >>> cut(trajectories, length=10, n=5).observations.shape
        torch.Size([5, 10, 3])
    """
    got = f"{len(trajectories)}, {length} and {n}"
    valid = len(trajectories) > 0 and min(length, n) >= 1
    require("trajectories, length, n", valid, "at least one of each", got)
    places = (trajectories.lengths.cpu() - length + 1).clamp_min(1)
    which = torch.multinomial(places.double(), n, replacement=True, generator=generator)
    # In single precision the product may round up to a place that doesn't exist.
    start = (torch.rand(n, dtype=torch.double, generator=generator) * places[which]).long()
    frame = start[:, None] + torch.arange(min(length, trajectories.length))
    frame = frame.clamp_max(trajectories.length - 1)
    parts = {name: value[which[:, None], frame] for name, value in trajectories._tensors()}
    return Clips(**parts)


def transitions(clips: Clips) -> Clips:
    """Stack each observation with the one before it, for rewards of transitions.

    Args:
        clips: N clips of T frames, each an action and the observation it led to.

    Returns:
        N clips of T - 1 frames: observations `(N, T - 1, 2, *obs)`, before and after the action.
        The first frame of each is left out, since the clip lacks the observation before it.

    Raises:
        InvalidInput: A clip of one frame.

    Example:
        >>> clips = Clips(torch.zeros(4, 10, 3), torch.zeros(4, 10, 1))
        >>> transitions(clips).observations.shape
        torch.Size([4, 9, 2, 3])
    """
    if len(clips) and int(clips.lengths.min()) < 2:
        raise InvalidInput("clips: expected at least two frames in each, got a clip of one.")
    parts = {name: value[:, 1:] for name, value in clips._tensors()}
    before_and_after = [clips.observations[:, :-1], clips.observations[:, 1:]]
    return Clips(**parts | {"observations": torch.stack(before_and_after, 2)})


def single_frames(observations: ArrayLike, actions: ArrayLike) -> Clips:
    """Make a clip of each of B frames, from `(B, *obs)` and `(B, *act)`."""
    named = {"observations": observations, "actions": actions}
    parts = {name: as_tensor(name, value) for name, value in named.items()}
    for name, value in parts.items():
        require(name, value.ndim > 0, "frames along the first axis", "a single number")
    return Clips(**{name: value[:, None] for name, value in parts.items()})


def as_rows(index: int | slice | ArrayLike) -> slice | Tensor:
    """Return an index that keeps the first axis, so that `x[3]` has length 1."""
    if isinstance(index, slice):
        return index
    rows = as_tensor("index", index).reshape(-1)
    return rows if rows.dtype == torch.bool else as_integers("index", rows, "(n,)")


def _pad(value: Tensor, length: int) -> Tensor:
    missing = length - value.shape[1]
    if missing == 0:
        return value
    return torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], 1)


def _check_finite(name: str, value: Tensor) -> None:
    # One sum finds the usual case (all finite) at a fraction of a mask's memory.
    if bool(torch.isfinite(value.sum())):
        return
    bad = (~torch.isfinite(value)).flatten(1 if value.ndim == 2 else 2)
    frames = (bad if value.ndim == 2 else bad.any(2)).nonzero()
    if len(frames):
        clip, frame = frames[0].tolist()
        raise InvalidInput(
            f"{name}: expected finite numbers, got NaN or infinity in {len(frames)} frame(s), "
            f"the first in clip {clip}, frame {frame}."
        )
