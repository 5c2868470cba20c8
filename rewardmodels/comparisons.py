"""Feedback from teachers: comparisons of two clips, marks of parts, and ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewardmodels.arrays import ArrayLike, as_integers, as_pairs, as_tensor
from rewardmodels.clips import Clips, ClipView, as_rows
from rewardmodels.errors import require, require_rows

if TYPE_CHECKING:
    import pandas as pd

    from rewardmodels.tables import Columns


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Q preferences between two clips each; arrays are tensors, NumPy arrays or lists.

    Args:
        clips: The N clips that were compared.
        pairs: `(Q, 2)` long, indices into clips.
        preference: `(Q,)`, probability that the second is preferred: 0 for the first, 1 for the
            second, 0.5 for a tie, or anything between.

    Raises:
        InvalidInput: Shapes that don't agree, a pair out of range or of a clip with itself, or a
            preference outside [0, 1].

    Example:
        >>> clips = Clips(torch.randn(3, 10, 2), torch.randn(3, 10, 1))
        >>> pairs, preference = torch.tensor([[0, 1], [2, 0]]), torch.tensor([1.0, 0.5])
        >>> comparisons = Comparisons(clips, pairs, preference)
        >>> len(comparisons), len(comparisons[:1])
        (2, 1)
    """

    clips: Clips
    pairs: Tensor
    preference: Tensor

    def __post_init__(self) -> None:
        _check_clips(self.clips)
        pairs = as_pairs(self.pairs, len(self.clips))
        preference = as_tensor("preference", self.preference).float()
        expected, shape = f"shape (Q,) = ({len(pairs)},) as pairs has rows", tuple(preference.shape)
        require("preference", shape == (len(pairs),), expected, shape)
        require_rows("pairs", pairs[:, 0] != pairs[:, 1], "two different clips", pairs)
        expected = "P(second is preferred) from 0 to 1 (leave skipped queries out)"
        require_rows("preference", (preference >= 0) & (preference <= 1), expected, preference)
        object.__setattr__(self, "pairs", pairs)
        object.__setattr__(self, "preference", preference)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | slice | ArrayLike) -> Comparisons:
        rows = as_rows(index)
        return replace(self, pairs=self.pairs[rows], preference=self.preference[rows])

    def compact(self) -> Comparisons:
        """Return the same comparisons with only the clips that are in some pair."""
        viewed = self.view()
        return replace(viewed, clips=viewed.clips[:]) if viewed is not self else self

    def view(self) -> Comparisons:
        """Return the same as `compact`, but without a copy of the clips (see `ClipView`)."""
        used, pairs = self.pairs.unique(return_inverse=True)
        if len(used) == len(self.clips):
            return self
        return replace(self, clips=ClipView(self.clips, used), pairs=pairs)

    @classmethod
    def cat(cls, parts: Sequence[Comparisons]) -> Comparisons:
        """Join comparisons; clips are concatenated and pairs renumbered to match.

        Raises:
            InvalidInput: No parts, or clips whose frames have different shapes.
        """
        clips = Clips.cat([part.clips for part in parts])
        offsets = torch.tensor([0, *(len(part.clips) for part in parts[:-1])]).cumsum(0)
        pairs = [part.pairs + offset for part, offset in zip(parts, offsets, strict=True)]
        return cls(clips, torch.cat(pairs), torch.cat([part.preference for part in parts]))

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame | Mapping[str, Any],
        columns: Columns | None = None,
        *,
        features: ArrayLike | None = None,
    ) -> Comparisons:
        """Comparisons of items from a data frame; arguments and errors of `PreferenceTable`'s.

        Example:
            >>> import pandas as pd
            >>> table = pd.DataFrame({"chosen_price": [3.0, 1.0], "rejected_price": [4.0, 2.0]})
            >>> Comparisons.from_frame(table).preference
            tensor([0., 0.])
        """
        from rewardmodels.tables import PreferenceTable

        return PreferenceTable.from_frame(frame, columns, features=features).comparisons

    @classmethod
    def from_dataset(
        cls, dataset: Any, columns: Columns | None = None, *, features: ArrayLike | None = None
    ) -> Comparisons:
        """Comparisons of items from a Hugging Face data set, or anything else with `to_pandas`."""
        valid = hasattr(dataset, "to_pandas")
        require("dataset", valid, "one split, or a table with `to_pandas`", type(dataset).__name__)
        return cls.from_frame(dataset.to_pandas(), columns, features=features)


@dataclass(frozen=True, eq=False)
class Marks:
    r"""M marks: stretches of clips that somebody called good or bad.

    A good stretch is better than the rest of its clip, frame by frame, a bad one worse. With
    $\bar r_\text{in}$ the mean reward of its frames, $\bar r_\text{out}$ that of the clip's other
    frames and T the clip's length,

    $$P(\text{good}) = \sigma(T\,(\bar r_\text{in} - \bar r_\text{out})).$$

    It is a reward-rational choice (Jeon et al. 2020, arXiv:2002.04833, §3) between two options,
    the stretch and the rest, each repeated to a clip of T frames. So a mark is as informative as a
    comparison of two whole clips of T frames, one like the stretch and one like the rest; rewards
    have the same unit as with comparisons, and a constant added to every frame's reward changes
    neither. Unlike a softmax over all stretches of the same length, it needs only a difference of
    two returns, so that every predictor learns from marks as it does from comparisons.

    Where the number of frames doesn't divide T, some count once more than others, and a mean is off
    by a little: for five frames of 25 on MuJoCo agents, the difference by 1% on Hopper and
    Walker2d, by 9% on HalfCheetah, whose gait is about as short; its sign never.

    Args:
        clips: The N clips that were marked.
        rows: `(M, 4)` integers: clip, first frame of the stretch (from 0), last frame
            (inclusive), and 1 for good or 0 for bad.

    Raises:
        InvalidInput: Rows of another shape or type, a clip out of range, frames out of order or
            past the clip's end, or a last number that is neither 0 nor 1.

    Example:
        >>> clips = Clips(torch.arange(5.0).reshape(1, 5, 1), torch.zeros(1, 5, 1))
        >>> comparisons = Marks(clips, torch.tensor([[0, 3, 4, 1]])).comparisons()
        >>> comparisons.clips.observations.squeeze()  # the rest and the stretch, of five frames
        tensor([[0., 0., 1., 2., 2.],
                [3., 3., 4., 4., 4.]])
    """

    clips: Clips
    rows: Tensor

    def __post_init__(self) -> None:
        _check_clips(self.clips)
        n, shape = len(self.clips), "(M, 4), clip, first frame, last frame and good"
        rows = as_integers("rows", self.rows, shape, 4)
        clip, first, last, good = rows.T
        _require_clips("rows", clip, n)
        end = self.clips.lengths.to(rows.device)[clip] - 1
        expected = "0 <= first frame <= last frame <= last frame of the clip"
        frames = torch.stack([first, last, end], 1)
        require_rows("rows", (first >= 0) & (first <= last) & (last <= end), expected, frames)
        require_rows("rows", (good == 0) | (good == 1), "1 for good or 0 for bad", good)
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | ArrayLike) -> Marks:
        return replace(self, rows=self.rows[as_rows(index)])

    def compared_rows(self) -> Tensor:
        """Rows `(Q,)` of the marks in `comparisons`: all but those of a whole clip."""
        clip, first, last, _ = self.rows.T
        partial = last - first + 1 < self.clips.lengths.to(clip.device)[clip]
        return partial.nonzero().squeeze(1)

    def comparisons(self) -> Comparisons:
        r"""Equivalent comparisons of Q pairs of clips: the rest of the clip, and the stretch.

        Both are as long as the clip, their n frames repeated as evenly as possible: each counts
        $\lfloor T/n \rfloor$ or $\lceil T/n \rceil$ times. A mark of a whole clip has no rest and
        is left out.
        """
        clip, first, last, good = self.rows[self.compared_rows()].T
        device = self.clips.mask.device
        lengths = self.clips.lengths.to(clip.device)[clip, None]
        first, inside = first[:, None], (last - first + 1)[:, None]
        step = torch.arange(self.clips.length, device=clip.device).expand(len(clip), -1)
        # Past a shorter clip's end the mask hides what stands there.
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
    """M ratings of single clips.

    Only the order of one person's ratings is used: two people's scales differ, and comparisons
    leave the constant free that an absolute rating would need. Each rating becomes a comparison of
    its clip with the last clip before it that the same person rated differently: M ratings are
    M - 1 comparisons at most, and no rating counts for more than one. Of one person's ratings of
    one clip the last counts.

    Args:
        clips: The N clips that were rated.
        which: `(M,)` integers, the clip of each rating, oldest first.
        rating: `(M,)`, any numbers; higher is better.
        raters: `(M,)` integers, a number for each person; None for one person.

    Raises:
        InvalidInput: Shapes that don't agree, a clip out of range, or a rating that isn't finite.

    Example:
        >>> clips = Clips(torch.zeros(3, 5, 2), torch.zeros(3, 5, 1))
        >>> ratings = Ratings(clips, torch.tensor([0, 2, 1]), torch.tensor([0.3, 0.9, 0.9]))
        >>> ratings.comparisons().pairs.tolist(), ratings.comparisons().preference
        ([[0, 2], [0, 1]], tensor([1., 1.]))
    """

    clips: Clips
    which: Tensor
    rating: Tensor
    raters: Tensor | None = None

    def __post_init__(self) -> None:
        _check_clips(self.clips)
        which = as_integers("which", self.which, "(M,)")
        object.__setattr__(self, "which", which)
        for name in ("rating", "raters"):
            if getattr(self, name) is not None:
                value = as_tensor(name, getattr(self, name))
                expected = f"shape (M,) = ({len(which)},) as which has"
                require(name, value.shape == which.shape, expected, tuple(value.shape))
                object.__setattr__(self, name, value)
        _require_clips("which", which, len(self.clips))
        require_rows("rating", self.rating.isfinite(), "finite numbers", self.rating)

    def __len__(self) -> int:
        return len(self.which)

    def compared_rows(self) -> Tensor:
        """Rows `(Q,)` of the ratings in `comparisons`: those with an earlier, different one."""
        return self._pairs()[:, 1]

    def comparisons(self) -> Comparisons:
        """Equivalent comparisons of Q pairs of clips: the one rated before, and the one rated."""
        pairs = self._pairs()
        before, after = self.rating.cpu()[pairs].T
        return Comparisons(self.clips, self.which.cpu()[pairs], (after > before).float())

    def _pairs(self) -> Tensor:
        """Rows `(Q, 2)` of ratings: the earlier one, and the one compared with it."""
        raters = [0] * len(self) if self.raters is None else self.raters.tolist()
        # Of one person's ratings of one clip the last.
        final = {key: row for row, key in enumerate(zip(raters, self.which.tolist(), strict=True))}
        # Of each person the latest row, and the last before it whose rating differs.
        last: dict[int, tuple[int, int | None]] = {}
        pairs, rating = [], self.rating.tolist()
        for row in sorted(final.values()):
            latest, other = last.get(raters[row], (None, None))
            if latest is not None and rating[latest] != rating[row]:
                other = latest
            if other is not None:
                pairs.append((other, row))
            last[raters[row]] = row, other
        return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def _check_clips(clips: object) -> None:
    require("clips", isinstance(clips, Clips), "Clips", type(clips).__name__)


def _require_clips(name: str, clip: Tensor, n: int) -> None:
    require_rows(name, (clip >= 0) & (clip < n), f"clips from 0 to {n - 1} ({n} clips)", clip)
