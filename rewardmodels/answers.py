"""Answers of every kind as one list to learn from, and which of them are kept back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput
from rewardmodels.marks import Marks, Ratings
from rewardmodels.model import PairBatch


@dataclass(frozen=True, eq=False)
class Answers:
    """Comparisons, and what marks and ratings come to as comparisons.

    What concerns one answer depends on its place among those of its kind alone, so that it stays
    when answers of any kind are added.

    Args:
        said: `Q` comparisons: those that were made, then those of marks, then those of ratings.
        index: `(Q,)` long, each one's place among the answers of its kind.
        kept_back: `(Q,)` bool.
    """

    said: Comparisons
    index: Tensor
    kept_back: Tensor

    @classmethod
    def gather(
        cls,
        comparisons: Comparisons | None,
        marks: Marks | None,
        ratings: Ratings | None,
        *,
        held_out: float,
        groups: Sequence[int] | Tensor | None,
        seed: int,
    ) -> Answers:
        """Puts all answers in one list; as `fit` has the arguments.

        Raises:
            InvalidInput: Groups that aren't as many as the comparisons, or frames of one kind of
                answer that have another shape than those of another.
        """
        parts, index, kept_back = [], [], []
        if comparisons is not None:
            parts.append(comparisons)
            index.append(torch.arange(len(comparisons)))
            kept_back.append(_draw(len(comparisons), held_out, groups, [seed]))
        elif groups is not None:
            raise InvalidInput("groups: expected none without comparisons to be grouped.")
        for kind, single in enumerate((marks, ratings), start=1):
            if single is None or not len(single):
                continue
            # Two marks of one clip share their frames: one kept back would be known already.
            clip = single.rows[:, 0] if isinstance(single, Marks) else None
            places = single.places().cpu()
            parts.append(single.comparisons())
            index.append(places)
            kept_back.append(_draw(len(single), held_out, clip, [seed, kind])[places])
        if not parts:
            raise InvalidInput(
                "comparisons: expected answers of some kind to learn from, got none."
            )
        said = parts[0] if len(parts) == 1 else Comparisons.cat(parts)
        return cls(said, torch.cat(index), torch.cat(kept_back))

    def batches(self, rows: Tensor) -> Dataset[PairBatch]:
        """Serves these rows in minibatches, as a `DataLoader` asks for them."""
        return _Batches(self, rows)


class _Batches(Dataset[PairBatch]):
    """Serves whole minibatches by index, so that nothing is collated one by one."""

    def __init__(self, answers: Answers, rows: Tensor) -> None:
        self.answers, self.rows = answers, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> PairBatch:
        rows, said = self.rows[places], self.answers.said
        first, second = said.pairs[rows].T
        index = self.answers.index[rows]
        return PairBatch(said.clips[first], said.clips[second], said.preference[rows], index)


def _draw(
    n: int, share: float, groups: Sequence[int] | Tensor | None, seed: Sequence[int]
) -> Tensor:
    """`(n,)` bool, which answers of a kind are kept back."""
    draws = np.random.default_rng(seed).random(n)
    if groups is not None:
        if len(groups) != n:
            raise InvalidInput(
                f"groups: expected a number for each of {n} comparisons, got {len(groups)}."
            )
        # A group's draw is that of its first answer, so that it stays when answers are added.
        _, first, group = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        draws = draws[first[group.reshape(-1)]]
    return torch.from_numpy(draws < share)
