"""Comparisons: what teachers said of pairs of clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, eq=False)
class Marks:
    r"""M stretches of clips that somebody called good or bad.

    A good stretch is better than the rest of its clip, frame by frame, a bad one worse. With
    $\bar r_\text{in}$ the mean reward of its frames, $\bar r_\text{out}$ that of the clip's other
    frames and T the clip's length,

    $$P(\text{good}) = \sigma(T\,(\bar r_\text{in} - \bar r_\text{out})).$$

    It is a reward-rational choice (Jeon et al. 2020, arXiv:2002.04833, §3) between two options,
    the stretch and the rest, each standing for a clip of T frames drawn from it. So a mark is
    as clear as a comparison of two whole clips of T frames, one all like the stretch and one all
    like the rest; rewards of both kinds of answer have one unit, and a constant added to every
    frame's reward changes neither. Nothing is said of other clips. Against a softmax over all
    stretches of the same length, the other reading, it asks no more of a predictor than a
    difference of two returns, so that every one learns from marks as it does from comparisons.

    Where the number of frames doesn't divide T, some count once more than others, and a mean is off
    by a little: of five frames of 25 on agents of MuJoCo, the difference by 1% on Hopper and
    Walker2d, by 9% on HalfCheetah, whose gait is about as short; its sign never.

    Args:
        clips: The N clips that were marked.
        rows: `(M, 4)` integers: which clip, the stretch's first frame (from 0), its last, which is
            part of it, and whether it is good (1) or bad (0).

    Raises:
        InvalidInput: Rows of another shape or type, a clip that there isn't, frames out of order or
            past the clip's end, or a last number that is neither 0 nor 1.

    Example:
        >>> clips = Clips(torch.arange(5.0).reshape(1, 5, 1), torch.zeros(1, 5, 1))
        >>> said = Marks(clips, torch.tensor([[0, 3, 4, 1]])).comparisons()
        >>> said.clips.observations.squeeze()  # the rest, and the stretch, each five frames long
        tensor([[0., 0., 1., 2., 2.],
                [3., 3., 4., 4., 4.]])
    """

    clips: Clips
    rows: Tensor

    def __post_init__(self) -> None:
        rows, n = self.rows, len(self.clips)
        if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype not in _INTEGERS:
            raise InvalidInput(
                "rows: expected integers of shape (M, 4), clip, first frame, last frame and good, "
                f"got {rows.dtype} of shape {tuple(rows.shape)}."
            )
        clip, first, last, good = rows.T
        _check_clips("rows", clip, n)
        ends = self.clips.lengths.to(rows.device)[clip]
        _refuse(
            ~((first >= 0) & (first <= last) & (last < ends)),
            lambda row: (
                f"rows: expected frames from 0 to {int(ends[row]) - 1}, the clip's last, the first "
                f"not after the last, got {int(first[row])} to {int(last[row])} in row {row}."
            ),
        )
        _refuse(
            (good != 0) & (good != 1),
            lambda row: (
                f"rows: expected 1 for good or 0 for bad, got {int(good[row])} in row {row}."
            ),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Marks:
        return replace(self, rows=self.rows[as_rows(index)])

    def places(self) -> Tensor:
        """`(Q,)` long, which marks `comparisons` speaks of: all but those of a whole clip."""
        clip, first, last, _ = self.rows.T
        partial = last - first + 1 < self.clips.lengths.to(clip.device)[clip]
        return partial.nonzero().squeeze(1)

    def comparisons(self) -> Comparisons:
        r"""The same said of Q pairs of clips: the rest of the clip, and the stretch.

        Both are as long as the clip, their frames repeated as evenly as can be: each counts
        $\lfloor T/n \rfloor$ or $\lceil T/n \rceil$ times, where there are n. A mark of a whole
        clip has no rest, says nothing here and is passed over.
        """
        clip, first, last, good = self.rows[self.places()].long().T
        device = self.clips.mask.device
        lengths = self.clips.lengths.to(clip.device)[clip, None]
        first, inside = first[:, None], (last - first + 1)[:, None]
        step = torch.arange(self.clips.length, device=clip.device).expand(len(clip), -1)
        # Past a shorter clip's end stands what the mask hides.
        at = 2 * torch.minimum(step, lengths - 1) + 1
        stretch = first + at * inside // (2 * lengths)
        rest = at * (lengths - inside) // (2 * lengths)
        rest = rest + inside * (rest >= first)
        frame = torch.cat([rest, stretch]).to(device)
        which = clip.repeat(2).to(device)[:, None]
        parts = {
            name: value[which, frame]
            for name in ("observations", "actions", "rewards", "states")
            if (value := getattr(self.clips, name)) is not None
        }
        clips = Clips(**parts, mask=(step < lengths).repeat(2, 1).to(device))
        pairs = torch.arange(2 * len(clip), device=clip.device).view(2, -1).T
        return Comparisons(clips, pairs, good.float())


@dataclass(frozen=True, eq=False)
class Ratings:
    """M clips, each by itself, that somebody said how good they are.

    Only the order of one person's ratings is believed: what one calls 0.8 another calls 0.6, and
    comparisons leave the constant free that an absolute rating would need. So each rating is an
    answer to whether its clip is better than the one that the same person last rated otherwise
    before it: M ratings are M - 1 comparisons at most, and no rating counts for more than one
    answer. Of one person's ratings of one clip the last is meant.

    Args:
        clips: The N clips that were rated.
        which: `(M,)` integers, the clip of each rating, oldest first.
        rating: `(M,)`, any numbers of which a higher one is better.
        raters: `(M,)` integers, a number for each person; None for one person.

    Raises:
        InvalidInput: Shapes that don't agree, a clip that there isn't, or a rating that isn't
            finite.

    Example:
        >>> clips = Clips(torch.zeros(3, 5, 2), torch.zeros(3, 5, 1))
        >>> said = Ratings(clips, torch.tensor([0, 2, 1]), torch.tensor([0.3, 0.9, 0.9]))
        >>> said.comparisons().pairs.tolist(), said.comparisons().preference
        ([[0, 2], [0, 1]], tensor([1., 1.]))
    """

    clips: Clips
    which: Tensor
    rating: Tensor
    raters: Tensor | None = None

    def __post_init__(self) -> None:
        which = self.which
        if which.ndim != 1 or which.dtype not in _INTEGERS:
            raise InvalidInput(
                f"which: expected integers of shape (M,), got {which.dtype} of shape "
                f"{tuple(which.shape)}."
            )
        for name in ("rating", "raters"):
            value = getattr(self, name)
            if value is not None and value.shape != which.shape:
                raise InvalidInput(
                    f"{name}: expected shape (M,) = ({len(which)},) as which has, got "
                    f"{tuple(value.shape)}."
                )
        _check_clips("which", which, len(self.clips))
        _refuse(
            ~self.rating.isfinite(),
            lambda row: (
                f"rating: expected finite numbers, got {float(self.rating[row])} in row {row}."
            ),
        )

    def __len__(self) -> int:
        return len(self.which)

    def places(self) -> Tensor:
        """`(Q,)` long, which ratings `comparisons` speaks of: those with one to be set beside."""
        return torch.tensor([place for place, _ in self._beside()], dtype=torch.long)

    def comparisons(self) -> Comparisons:
        """The same said of Q pairs of clips: the one rated before, and the one rated."""
        beside = self._beside()
        pairs = torch.tensor([[before, place] for place, before in beside]).long().view(-1, 2)
        before, after = self.rating.cpu()[pairs].T
        return Comparisons(self.clips, self.which.cpu().long()[pairs], (after > before).float())

    def _beside(self) -> list[tuple[int, int]]:
        """Places of ratings that count, each with that of the rating it is set beside."""
        raters = [0] * len(self) if self.raters is None else self.raters.tolist()
        meant = {
            said: place for place, said in enumerate(zip(raters, self.which.tolist(), strict=True))
        }
        last: dict[int, tuple[int, int | None]] = {}  # and the last one that differs from it
        found, rating = [], self.rating.tolist()
        for place in sorted(meant.values()):
            latest, other = last.get(raters[place], (None, None))
            if latest is not None and rating[latest] != rating[place]:
                other = latest
            if other is not None:
                found.append((place, other))
            last[raters[place]] = place, other
        return found


def _check_clips(name: str, clip: Tensor, n: int) -> None:
    _refuse(
        (clip < 0) | (clip >= n),
        lambda row: (
            f"{name}: expected clips from 0 to {n - 1} ({n} clips), got {int(clip[row])} "
            f"in row {row}."
        ),
    )


def _refuse(wrong: Tensor, why: Callable[[int], str]) -> None:
    """Raises InvalidInput about the first row that is wrong, if one is."""
    if bool(wrong.any()):
        raise InvalidInput(why(int(wrong.nonzero()[0])))
