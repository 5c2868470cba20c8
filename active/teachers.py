"""Teachers: sources of comparisons, behind one interface that the training loop calls.

Synthetic ones compare by the task's own reward, with the errors that people make; `HumanTeacher`
waits for people at the labelling page; `ReplayTeacher` repeats recorded comparisons. A new one
implements `Teacher.answer` if it answers at once, or else `Teacher.collect`, and is a line in
`TEACHERS`; a user's own is named by its import path.
"""

from __future__ import annotations

import math
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from active.acquisition import check_pairs
from active.feedback import FeedbackStore, Mark, Query, Rating, import_feedback
from rewardmodels.clips import Clips
from rewardmodels.comparisons import Marks
from rewardmodels.errors import InvalidInput, require

_POLL_SECONDS: Final = 0.5  # between looks at the store while waiting for people


@dataclass(frozen=True)
class Request:
    """Request of a round of training to a teacher.

    Args:
        store: Store of the queries and comparisons.
        round: Number of the round of queries.
        due: Comparisons due by now, over all rounds.
        propose: Function of the training loop that lets the strategy select so many queries about
            the agent's latest clips, and adds them to the store.
        first: True before the policy is first trained, when all that are due are required.
        generator: Source of the teacher's randomness.
        report: Shows a line about the progress.
    """

    store: FeedbackStore
    round: int
    due: int
    propose: Callable[[int], None]
    first: bool = False
    generator: torch.Generator | None = None
    report: Callable[[str], Any] = str  # shows nothing


class Teacher:
    """Source of comparisons.

    A subclass that compares at once implements `answer`; one that takes its time, or has clips of
    its own, overrides `collect`.
    """

    def check(self, observation: Sequence[int] | None, action: Sequence[int] | None) -> None:
        """Raise, before work starts, if the teacher doesn't fit the task.

        Args:
            observation: Shape of the task's observations; None isn't checked.
            action: Shape of the task's actions; None isn't checked.

        Raises:
            InvalidInput: The teacher is for another task.
        """

    def collect(self, request: Request) -> None:
        """Add comparisons to the store until those due are there, as far as the teacher has them.

        By default let the training loop add the missing queries (`request.propose`), unless it did
        so before an interruption, and compare the round's by `answer`: all at once, also where an
        interruption left only some open, so that the teacher's draws are the same.
        """
        store, round = request.store, request.round
        missing = request.due - store.counts().answered
        if missing > 0 and not store.queries(round):
            request.propose(missing)
        queries = store.queries(round)
        if any(query.teacher is None for query in queries):
            ids = [query.id for query in queries]
            clips, pairs = store.clips_of(ids)
            preference = self.answer(clips, pairs, request.generator)
            # Before the comparisons, so that none is missing once the round counts as answered.
            if (marks := self.mark(clips, pairs, request.generator)) is not None:
                shown = list(dict.fromkeys(clip for id in ids for clip in store.shown(id)))
                _add_missing(
                    store,
                    (
                        Mark(0, shown[clip], first, last, bool(good), type(self).__name__)
                        for clip, first, last, good in marks.rows.tolist()
                    ),
                )
            for query, value in zip(queries, preference.tolist(), strict=True):
                if query.teacher is None:
                    store.answer(query.id, value, type(self).__name__)

    def answer(
        self, clips: Clips, pairs: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Compare every pair at once.

        Args:
            clips: The N clips.
            pairs: `(Q, 2)` integers, indices into clips.
            generator: Source of the teacher's randomness.

        Returns:
            `(Q,)`: 0 the first is better, 1 the second, 0.5 "the same", NaN skipped.

        Raises:
            InvalidInput: Wrong shapes, an index out of range, clips that lack what the teacher
                compares by, or a teacher who doesn't answer at once.
        """
        raise InvalidInput(
            f"teacher: expected one who answers at once, got {type(self).__name__}; pass a "
            "synthetic teacher, or a class that implements `answer`."
        )

    def mark(
        self, clips: Clips, pairs: Tensor, generator: torch.Generator | None = None
    ) -> Marks | None:
        """Mark good and bad parts of the clips of a round; by default none.

        Args:
            clips: The N clips.
            pairs: `(Q, 2)` integers, as in `answer`.
            generator: Source of the teacher's randomness.

        Returns:
            Marks of these clips, or None.
        """
        return None


@final
class SyntheticTeacher(Teacher):
    r"""A synthetic teacher who compares by the task's reward, with the errors of B-Pref.

    For returns $R = \sum_t r_t$ and discounted returns $G = \sum_t \gamma^{H-t} r_t$ over a
    clip's H real frames (Lee et al. 2021, arXiv 2111.03026, §3 and Algorithm 1), in this order:

    1. *skip* if $\max(R_1, R_2) < d_\text{skip}$: neither shows anything worth judging;
    2. *the same* if $|R_1 - R_2| < d_\text{same}$;
    3. else prefer the second with probability $\sigma(\beta\,(G_2 - G_1))$;
    4. and flip that preference with probability $\epsilon$.

    Both thresholds apply to the undiscounted return, as in the paper. A flip changes neither "the
    same" nor a skip. A model of this teacher has a `random_answer_rate` of $2\epsilon$, since half
    of all random answers are right.

    Sums are correctly rounded, so that a return doesn't depend on the padding and exact ties are
    found. Returns may be of either sign, and clips of any length.

    B-Pref's public code (rll-research/BPref, `get_label` in `reward_model.py`) differs in corner
    cases, which `as_published` reproduces for comparisons with published numbers:

    - a skip needs $\max(R_1, R_2) \le d_\text{skip}$, and a threshold that isn't positive skips
      nothing, even if returns are negative;
    - a rational teacher prefers the *first* of two clips that tie exactly, and may flip that;
    - a rationality of 0 (there: of 0 or below, -1 by default) means a rational teacher;
    - a threshold for "the same" may be negative, and is then never met.

    Args:
        rationality: $\beta$, at least 0, per reward unit; infinity always prefers the higher
            discounted return and calls an exact tie "the same", 0 prefers at random.
        myopia: $\gamma$ from 0 to 1, discount per frame back from the clip's last: 1 weighs all
            frames alike, 0 only the last.
        flip_rate: $\epsilon$ from 0 to 1, probability of the opposite preference.
        skip_threshold: $d_\text{skip}$, reward units; None never skips.
        same_threshold: $d_\text{same}$, at least 0, reward units; at None only exact ties at
            infinite rationality are "the same".
        as_published: Compare as B-Pref's public code does.
        marks: How many of each pair's two clips are also marked, 0 to 2, as `SyntheticMarker` does
            by default; marks are flipped at the same rate.

    Raises:
        InvalidInput: A value outside its range.

    Example:
        >>> clips = Clips(torch.zeros(3, 2, 1), torch.zeros(3, 2, 1),
        ...               rewards=torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 0.5]]))
        >>> SyntheticTeacher().answer(clips, torch.tensor([[0, 1], [1, 0], [0, 2]]))
        tensor([1.0000, 0.0000, 0.5000])
        >>> SyntheticTeacher(myopia=0.1).answer(clips, torch.tensor([[0, 1]]))
        tensor([0.])
    """

    def __init__(
        self,
        rationality: float = math.inf,
        myopia: float = 1.0,
        flip_rate: float = 0.0,
        skip_threshold: float | None = None,
        same_threshold: float | None = None,
        as_published: bool = False,
        marks: int = 0,
    ) -> None:
        require("rationality", rationality >= 0, "a number, at least 0", rationality)
        require("myopia", 0 <= myopia <= 1, "a discount from 0 to 1", myopia)
        require("flip_rate", 0 <= flip_rate <= 1, "a probability", flip_rate)
        skip, same = skip_threshold or 0.0, same_threshold or 0.0
        require("skip_threshold", math.isfinite(skip), "a finite number or None", skip)
        least = -math.inf if as_published else 0.0
        valid = math.isfinite(same) and same >= least
        require("same_threshold", valid, "a finite number from 0 or None", same)
        self.rationality, self.myopia, self.flip_rate = rationality, myopia, flip_rate
        self.skip_threshold, self.same_threshold = skip_threshold, same_threshold
        require("marks", marks in (0, 1, 2), "0, 1 or 2 clips of a pair", marks)
        self.as_published, self.marks = as_published, marks

    def answer(
        self, clips: Clips, pairs: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        check_pairs(pairs, len(clips))
        used, at = torch.unique(pairs.cpu().long(), return_inverse=True)
        clips = clips[used.to(clips.mask.device)]
        plain = _discounted(clips, 1.0)
        weighted = plain if self.myopia == 1 else _discounted(clips, self.myopia)
        preference = self._prefer(weighted[at[:, 1]] - weighted[at[:, 0]], generator)
        first, second = plain[at].unbind(1)
        if self.same_threshold is not None:
            preference[(first - second).abs() < self.same_threshold] = 0.5
        if self.skip_threshold is not None:
            better, threshold = torch.maximum(first, second), self.skip_threshold
            published = (better <= threshold) & (threshold > 0)
            preference[published if self.as_published else better < threshold] = math.nan
        return preference.float().to(pairs.device)

    def mark(
        self, clips: Clips, pairs: Tensor, generator: torch.Generator | None = None
    ) -> Marks | None:
        if not self.marks:
            return None
        marks = SyntheticMarker(flip_rate=self.flip_rate).mark(clips, generator)
        return marks[torch.isin(marks.rows[:, 0], pairs[:, : self.marks].cpu())]

    def _prefer(self, difference: Tensor, generator: torch.Generator | None) -> Tensor:
        # Two draws for every pair whether needed or not, so that a comparison depends on its place
        # in the batch alone, and teachers that differ in one parameter share their randomness.
        device = None if generator is None else generator.device
        draws = torch.rand(
            len(difference), 2, dtype=torch.float64, generator=generator, device=device
        ).to(difference.device)
        if self.as_published and self.rationality in (0, math.inf):
            preference = (difference > 0).double()
        elif math.isinf(self.rationality):
            preference = 0.5 + 0.5 * difference.sign()
        else:
            preference = (draws[:, 0] < torch.sigmoid(self.rationality * difference)).double()
        return torch.where(draws[:, 1] < self.flip_rate, 1 - preference, preference)


@final
class HumanTeacher(Teacher):
    """People, who compare at their own pace on the page that `rewardmodels label RUN` serves.

    Both commands have the run's `answers.sqlite` open; either may be stopped and started again. As
    many queries are kept open as comparisons are due. The first training waits for all comparisons
    due, and so do later ones unless they are told to go on with fewer.

    Args:
        patience: Share of the comparisons due, from 0 to 1, that later trainings wait for. At 0
            they go on with those that there are, and a run with a fast simulator may end before
            the budget is spent.

    Raises:
        InvalidInput: A patience outside [0, 1].
    """

    def __init__(self, patience: float = 1.0) -> None:
        require("patience", 0 <= patience <= 1, "a share from 0 to 1", patience)
        self.patience = patience

    def collect(self, request: Request) -> None:
        """Keep as many queries open as comparisons are missing, and wait for the required ones."""
        store, due = request.store, request.due
        required = due if request.first else int(self.patience * due)
        page, said = shlex.join(["rewardmodels", "label", str(store.path.parent)]), 0
        while True:
            counts = store.counts()
            still_open = counts.put - counts.answered - counts.skipped
            if (missing := due - counts.answered - still_open) > 0:
                request.propose(missing)
            if counts.answered >= required:
                return  # queries skipped from now on are replaced in the next round
            if (wanted := required - counts.answered) != said:
                request.report(f"waiting for {wanted} comparisons: {page}")
                said = wanted
            time.sleep(_POLL_SECONDS)


@final
class ReplayTeacher(Teacher):
    """Recorded comparisons: a run's `answers.sqlite`, or what `export_feedback` wrote.

    Another policy makes other clips, which nobody has compared. So the recorded queries are put
    instead of a strategy's, in their order and as many in each round as are due, until there are
    no more, with the marks and ratings of their clips. Skipped and open ones are left out.

    Args:
        file: File of the store, or directory of an export.

    Raises:
        InvalidInput: There is no such file or directory.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> clips, pairs = Clips(torch.rand(3, 5, 2), torch.rand(3, 5, 1)), [[0, 1], [1, 2], [2, 0]]
        >>> with FeedbackStore(folder / "recorded.sqlite") as store:
        ...     ids = store.add_queries(clips, torch.tensor(pairs), round=0)
        ...     for query, preference in zip(ids, (1.0, None, 0.5)):
        ...         _ = store.answer(query, preference, "ann")
        >>> with FeedbackStore(folder / "answers.sqlite") as store:
        ...     request = Request(store, round=0, due=10, propose=lambda n: None)
        ...     ReplayTeacher(folder / "recorded.sqlite").collect(request)
        ...     [(query.teacher, query.preference) for query in store.queries()]
        [('ann', 1.0), ('ann', 0.5)]
    """

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        expected = "an answers.sqlite or the directory of an export"
        require("file", self.file.exists(), expected, f"{file}, which doesn't exist")

    def check(self, observation: Sequence[int] | None, action: Sequence[int] | None) -> None:
        """Raise if the recording holds no comparison, a wrong mark or clips of another task.

        Raises:
            InvalidInput: No comparison, a mark past its clip's end, or frames of another shape.
            UnreadableFile: A damaged recording.
        """
        with self._recorded() as (store, answered):
            require("file", bool(answered), "comparisons", f"{self.file} without any")
            clips, _ = store.clips_of([answered[0].id])
            store.feedback()
        for name, wanted in (("observations", observation), ("actions", action)):
            shape = tuple(getattr(clips, name).shape[2:])
            if wanted is not None:
                expected = f"clips whose {name} have the task's shape {tuple(wanted)}"
                got = f"{shape} in {self.file}; pass the task that it was recorded on"
                require("file", shape == tuple(wanted), expected, got)

    def collect(self, request: Request) -> None:
        """Put the next recorded queries into the store, with all that was said of their clips."""
        store = request.store
        with self._recorded() as (recorded, answered):
            if more := [query.id for query in answered[len(store.queries()) : request.due]]:
                store.add_queries(*recorded.clips_of(more), round=request.round)
            # All of them, since a run may have been killed between a query and its comparison.
            clips: dict[int, int] = {}  # from the recording's ids to the store's
            for query, old in zip(store.queries(), answered, strict=False):
                if query.teacher is None:
                    store.answer(query.id, old.preference, str(old.teacher))
                clips |= zip(recorded.shown(old.id), store.shown(query.id), strict=True)
            said: list[Mark | Rating] = [*recorded.marks.rows(), *recorded.marks.ratings()]
            _add_missing(
                store, (row._replace(clip=clips[row.clip]) for row in said if row.clip in clips)
            )

    @contextmanager
    def _recorded(self) -> Iterator[tuple[FeedbackStore, list[Query]]]:
        """Open the recording; yield it with its queries that have a preference."""
        with tempfile.TemporaryDirectory() as folder:
            file = self.file
            if file.is_dir():
                file = Path(folder) / "recorded.sqlite"
                import_feedback(self.file, file)
            with FeedbackStore(file) as store:
                yield store, [query for query in store.queries() if query.preference is not None]


def _add_missing(store: FeedbackStore, said: Iterable[Mark | Rating]) -> None:
    """Add marks and ratings, of any id, except those that are there since an interruption."""
    there = Counter(row[1:] for row in (*store.marks.rows(), *store.marks.ratings()))
    for row in said:
        there[row[1:]] -= 1
        if there[row[1:]] >= 0:
            continue
        if isinstance(row, Mark):
            store.marks.add(row.clip, row.first, row.last, good=row.good, teacher=row.teacher)
        else:
            store.marks.rate(row.clip, row.rating, teacher=row.teacher)


# B-Pref's variants, as far as they are the same on every task (Lee et al. 2021, §5): skipping and
# "the same" need thresholds in the task's own reward units.
TEACHERS: Final[dict[str, Callable[..., Teacher]]] = {
    "synthetic": SyntheticTeacher,
    "human": HumanTeacher,
    "replay": ReplayTeacher,
    "oracle": SyntheticTeacher,
    "stochastic": partial(SyntheticTeacher, rationality=1.0),
    "mistaken": partial(SyntheticTeacher, flip_rate=0.1),
    "myopic": partial(SyntheticTeacher, myopia=0.9),
}


@final
class SyntheticMarker:
    r"""A synthetic teacher who marks the best part of each clip good and the worst bad.

    Candidates are the parts of `length` frames with the highest and the lowest sum of true rewards,
    the first of several. A part is marked if its mean reward is above that of the clip's other
    frames (or below it, for a bad one) by at least `stands_out` standard deviations of the true
    reward of all frames; with probability $\epsilon$ the mark is flipped. Clips of no more than
    `length` frames aren't marked.

    Args:
        length: Frames of a part, at least 1.
        stands_out: Least difference of the means, at least 0, in standard deviations.
        flip_rate: $\epsilon$ from 0 to 1, probability that good is marked bad, or bad good.

    Raises:
        InvalidInput: A value outside its range.

    Example:
        >>> clips = Clips(torch.zeros(2, 4, 1), torch.zeros(2, 4, 1),
        ...               rewards=torch.tensor([[0.0, 5.0, 0.0, -2.0], [1.0, 1.0, 1.0, 1.0]]))
        >>> SyntheticMarker(length=1).mark(clips).rows
        tensor([[0, 1, 1, 1],
                [0, 3, 3, 0]])
    """

    def __init__(self, length: int = 5, stands_out: float = 0.5, flip_rate: float = 0.0) -> None:
        require("length", length >= 1, "at least 1 frame", length)
        require("stands_out", 0 <= stands_out < math.inf, "a finite number from 0", stands_out)
        require("flip_rate", 0 <= flip_rate <= 1, "a probability", flip_rate)
        self.length, self.stands_out, self.flip_rate = length, stands_out, flip_rate

    def mark(self, clips: Clips, generator: torch.Generator | None = None) -> Marks:
        """Mark N clips.

        Args:
            clips: With the task's own rewards.
            generator: Source of flips, on the CPU. Each clip takes the same number of draws, so
                that its marks depend on its place alone.

        Returns:
            Two marks a clip at most, by clip, the good one first.

        Raises:
            InvalidInput: Clips without rewards.
        """
        rewards = _rewards(clips)
        draws = torch.rand(len(clips), 2, dtype=torch.double, generator=generator)
        if clips.length <= self.length:
            return Marks(clips, torch.zeros(0, 4, dtype=torch.long))
        lengths = clips.lengths.cpu()
        sums = rewards.unfold(1, self.length, 1).sum(2)
        outside = torch.arange(sums.shape[1]) > (lengths - self.length)[:, None]
        threshold = self.stands_out * rewards[clips.mask.cpu()].std()
        # Means of equal rewards differ by rounding.
        threshold = threshold.clamp_min(1e-9 * float(rewards.abs().max()))
        rows = []
        for good in (1, 0):
            sign = 2 * good - 1
            best, start = (sign * sums).masked_fill(outside, -math.inf).max(1)
            rest = (sign * rewards.sum(1) - best) / (lengths - self.length)
            marked = best / self.length - rest >= threshold
            marked &= lengths > self.length
            given = torch.where(draws[:, good] < self.flip_rate, 1 - good, good)
            clip, last = torch.arange(len(start)), start + self.length - 1
            rows.append(torch.stack([clip, start, last, given], 1)[marked])
        both = torch.cat(rows)
        return Marks(clips, both[both[:, 0].argsort(stable=True)])


def _rewards(clips: Clips) -> Tensor:
    """`(N, T)` doubles on the CPU, 0 past a clip's end."""
    if clips.rewards is None:
        raise InvalidInput(
            "clips.rewards: expected the task's own reward, by which a synthetic teacher compares "
            "and marks, got None; record the clips with rewards, or ask people."
        )
    return clips.rewards.detach().cpu().double().masked_fill(~clips.mask.cpu(), 0)


def _discounted(clips: Clips, discount: float) -> Tensor:
    """`(N,)` doubles on the CPU, each clip's last real frame weighing 1."""
    rewards = _rewards(clips)
    if discount != 1:
        mask = clips.mask.cpu()
        frames_left = mask.long().flip(1).cumsum(1).flip(1) - mask.long()
        rewards = rewards * torch.pow(discount, frames_left.double())
    # Rounded once: float sums differ with order and padding, which would break exact ties.
    return torch.tensor([math.fsum(row) for row in rewards.tolist()], dtype=torch.float64)
