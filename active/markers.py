"""Synthetic people who mark parts of clips, by the task's own reward."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from rewardmodels.clips import Clips
from rewardmodels.comparisons import Marks
from rewardmodels.errors import InvalidInput


@final
class SyntheticMarker:
    r"""Marks the best stretch of each clip good and the worst one bad, if they stand out.

    Of all stretches of `length` frames within a clip those with the highest and the lowest sum of
    true rewards are looked at, the first such of several. A stretch is marked if its mean reward
    is above that of the clip's other frames, or below it for a bad one, by at least `threshold`;
    and with probability $\epsilon$ a mark says the opposite, as a mistaken `SyntheticTeacher` does.
    Clips of no more than `length` frames aren't marked.

    Args:
        length: Frames of a stretch, at least 1.
        threshold: How far it has to stand out, at least 0, reward units per frame.
        mistake_rate: $\epsilon$ from 0 to 1, probability that good is called bad, or bad good.

    Raises:
        InvalidInput: A value outside its range.

    Example:
        >>> clips = Clips(torch.zeros(2, 4, 1), torch.zeros(2, 4, 1),
        ...               rewards=torch.tensor([[0.0, 5.0, 0.0, -2.0], [1.0, 1.0, 1.0, 1.0]]))
        >>> SyntheticMarker(length=1, threshold=0.5).mark(clips).rows
        tensor([[0, 1, 1, 1],
                [0, 3, 3, 0]])
    """

    def __init__(self, length: int = 5, threshold: float = 0.0, mistake_rate: float = 0.0) -> None:
        for name, right, expected, came in (
            ("length", length >= 1, "at least 1 frame", length),
            ("threshold", 0 <= threshold < math.inf, "a finite number from 0", threshold),
            ("mistake_rate", 0 <= mistake_rate <= 1, "a probability", mistake_rate),
        ):
            if not right:
                raise InvalidInput(f"{name}: expected {expected}, got {came}.")
        self.length, self.threshold, self.mistake_rate = length, threshold, mistake_rate

    def mark(self, clips: Clips, generator: torch.Generator | None = None) -> Marks:
        """Marks N clips.

        Args:
            clips: With the task's own rewards.
            generator: Source of mistakes, on the CPU. As many draws are made for each clip whether
                needed or not, so that a clip's marks depend on its place alone.

        Returns:
            Two marks a clip at most, by clip, the good one first.

        Raises:
            InvalidInput: Clips without rewards.
        """
        if clips.rewards is None:
            raise InvalidInput(
                "clips.rewards: expected the task's own reward, by which a synthetic person marks, "
                "got None; record the clips with rewards, or ask a person."
            )
        luck = torch.rand(len(clips), 2, dtype=torch.double, generator=generator)
        if clips.length <= self.length:
            return Marks(clips, torch.zeros(0, 4, dtype=torch.long))
        rewards = clips.rewards.detach().cpu().double().masked_fill(~clips.mask.cpu(), 0)
        lengths = clips.lengths.cpu()
        sums = rewards.unfold(1, self.length, 1).sum(2)
        outside = torch.arange(sums.shape[1]) > (lengths - self.length)[:, None]
        rows = []
        for good in (1, 0):
            sign = 2 * good - 1
            best, start = (sign * sums).masked_fill(outside, -math.inf).max(1)
            rest = (sign * rewards.sum(1) - best) / (lengths - self.length)
            marked = best / self.length - rest >= self.threshold
            marked &= lengths > self.length
            said = torch.where(luck[:, good] < self.mistake_rate, 1 - good, good)
            rows.append(self._rows(start, said, marked))
        both = torch.cat(rows)
        return Marks(clips, both[both[:, 0].argsort(stable=True)])

    def _rows(self, start: Tensor, said: Tensor, marked: Tensor) -> Tensor:
        clip = torch.arange(len(start))
        return torch.stack([clip, start, start + self.length - 1, said], 1)[marked]
