"""Comparisons: what teachers said of pairs of clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewardmodels.clips import Clips, as_rows
from rewardmodels.errors import InvalidInput

_INTEGERS = (torch.int64, torch.int32, torch.int16)


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Q answers to "which of these two clips is better?".

    Args:
        clips: The N clips that were compared.
        pairs: `(Q, 2)` long, indices into clips.
        preference: `(Q,)`, probability that the second is preferred: 0 the first, 1 the second,
            0.5 "the same", or anything between.

    Raises:
        InvalidInput: Shapes that don't agree, a pair out of range or of a clip with itself, or a
            preference outside [0, 1].

    Example:
        >>> clips = Clips(torch.randn(3, 10, 2), torch.randn(3, 10, 1))
        >>> said = Comparisons(clips, torch.tensor([[0, 1], [2, 0]]), torch.tensor([1.0, 0.5]))
        >>> len(said), len(said[:1])
        (2, 1)
    """

    clips: Clips
    pairs: Tensor
    preference: Tensor

    def __post_init__(self) -> None:
        pairs, preference, n = self.pairs, self.preference, len(self.clips)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype not in _INTEGERS:
            raise InvalidInput(
                f"pairs: expected integers of shape (Q, 2), got {pairs.dtype} of shape "
                f"{tuple(pairs.shape)}."
            )
        if preference.shape != pairs.shape[:1]:
            raise InvalidInput(
                f"preference: expected shape (Q,) = ({len(pairs)},) as pairs has rows, got "
                f"{tuple(preference.shape)}."
            )
        outside = (pairs < 0) | (pairs >= n)
        if bool(outside.any()):
            row = int(outside.any(1).nonzero()[0])
            raise InvalidInput(
                f"pairs: expected indices from 0 to {n - 1} ({n} clips), got "
                f"{pairs[row].tolist()} in row {row}."
            )
        itself = pairs[:, 0] == pairs[:, 1]
        if bool(itself.any()):
            row = int(itself.nonzero()[0])
            raise InvalidInput(
                f"pairs: expected two different clips, got clip {int(pairs[row, 0])} against "
                f"itself in row {row}."
            )
        wrong = ~((preference >= 0) & (preference <= 1))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise InvalidInput(
                "preference: expected probabilities from 0 to 1 that the second clip is "
                f"preferred, got {float(preference[row])} in row {row}; leave skipped queries out."
            )
        if not preference.is_floating_point():
            object.__setattr__(self, "preference", preference.float())

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Comparisons:
        rows = as_rows(index)
        return replace(self, pairs=self.pairs[rows], preference=self.preference[rows])

    def swapped(self) -> Comparisons:
        """Returns the same answers with each pair written the other way round."""
        return replace(self, pairs=self.pairs.flip(1), preference=1 - self.preference)

    def compact(self) -> Comparisons:
        """Returns the same answers with only the clips that are in some pair."""
        used, pairs = self.pairs.unique(return_inverse=True)
        return replace(self, clips=self.clips[used], pairs=pairs)

    @classmethod
    def cat(cls, parts: Sequence[Comparisons]) -> Comparisons:
        """Joins answers; clips are concatenated and pairs renumbered to match.

        Raises:
            InvalidInput: No parts, or clips whose frames have different shapes.
        """
        clips = Clips.cat([part.clips for part in parts])
        offsets = torch.tensor([0, *(len(part.clips) for part in parts[:-1])]).cumsum(0)
        pairs = [part.pairs + offset for part, offset in zip(parts, offsets, strict=True)]
        return cls(clips, torch.cat(pairs), torch.cat([part.preference for part in parts]))
