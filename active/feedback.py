"""The durable store of clips, queries and answers: one SQLite file, only ever added to.

People's answers are the dearest data in a study, so an answer that was acknowledged survives a
killed process and a power cut, and a query is on disk with both its clips or not at all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import safetensors.torch
import torch
from torch import Tensor

from active.database import connect, refuse_damage
from active.pairs import check_pairs
from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, UnreadableFile


@dataclass(frozen=True)
class Query:
    """One question, and its answer if it has one.

    Attributes:
        id: The number that `FeedbackStore.add_queries` gave it.
        round: The round it was put in.
        teacher: Who answered or skipped it; None while it is open.
        preference: 0 the first, 1 the second, 0.5 "the same"; None while open or if skipped.
    """

    id: int
    round: int
    teacher: str | None
    preference: float | None

    @property
    def skipped(self) -> bool:
        """Whether a teacher looked at it and declined."""
        return self.teacher is not None and self.preference is None


class Counts(NamedTuple):
    """How many queries were put, and how many of those were answered and skipped."""

    put: int
    answered: int
    skipped: int


class FeedbackStore:
    """Clips, queries and answers in one SQLite file (WAL, synchronous=FULL, append-only).

    Every method that writes is one transaction, on disk when it returns. Several processes may
    have the same file open; an object belongs to the thread that made it. Clips are kept once
    each, however many queries show them, as safetensors with every number as it came.

    Args:
        path: The file; made if there is none (or an empty one).

    Raises:
        UnreadableFile: A file that is damaged, isn't a feedback store, or was written by a
            newer version. It is left as it was.

    Example:
        >>> import tempfile
        >>> clips = Clips(torch.zeros(3, 5, 2), torch.arange(15.0).reshape(3, 5, 1))
        >>> path = Path(tempfile.mkdtemp()) / "answers.sqlite"
        >>> with FeedbackStore(path) as store:
        ...     ids = store.add_queries(clips, torch.tensor([[0, 1], [2, 1]]), round=0)
        ...     store.answer(ids[0], 1.0, teacher="ann")
        ...     store.answer(ids[1], None, teacher="ann")
        ...     store.counts(), store.comparisons().preference
        (Counts(put=2, answered=1, skipped=1), tensor([1.]))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._db = connect(self.path)

    def add_queries(self, clips: Clips, pairs: Tensor, *, round: int) -> list[int]:
        """Stores queries, and those of the clips that they show, in one transaction.

        Args:
            clips: The N clips that the pairs index into.
            pairs: `(Q, 2)` integers, indices into clips.
            round: Which round of asking this is, at least 0.

        Returns:
            Q ids, rising.

        Raises:
            InvalidInput: A bad pair, a clip against itself, a negative round, or frames of
                another shape than those in the store. Nothing is stored then.
        """
        check_pairs(pairs, len(clips))
        rows = pairs.tolist()
        for row, (first, second) in enumerate(rows):
            if first == second:
                raise InvalidInput(
                    f"pairs: expected two different clips, got clip {first} against itself in "
                    f"row {row}."
                )
        if round < 0:
            raise InvalidInput(f"round: expected at least 0, got {round}.")
        used = sorted({clip for row in rows for clip in row})
        self._check_frames(clips)
        blobs = {clip: _pack(clips, clip) for clip in used}
        with self._transaction():
            ids = []
            for first, second in rows:
                twins = blobs[first] == blobs[second]
                shown = self._clip(blobs[first], 0), self._clip(blobs[second], int(twins))
                sql = "INSERT INTO queries (round, first, second) VALUES (?, ?, ?) RETURNING id"
                ids.append(int(self._db.execute(sql, (round, *shown)).fetchone()[0]))
        return ids

    def answer(self, query_id: int, preference: float | None, teacher: str) -> None:
        """Stores an answer; it is on disk when this returns.

        Args:
            query_id: As `add_queries` returned it.
            preference: Probability that the second clip is better: 0, 1, 0.5 for "the same",
                or anything between; None or NaN for a skipped query.
            teacher: Who answered.

        Raises:
            InvalidInput: An unknown query, one that has its answer already (answers are never
                changed), a preference outside [0, 1], or an empty teacher.
        """
        if preference is not None and math.isnan(preference):
            preference = None
        if preference is not None and not 0 <= preference <= 1:
            raise InvalidInput(
                "preference: expected a probability from 0 to 1, or None for a skipped query, "
                f"got {preference}."
            )
        if not teacher:
            raise InvalidInput("teacher: expected the name of who answered, got an empty one.")
        with self._transaction():
            (query,) = self._read("WHERE queries.id = ?", (query_id,)) or (None,)
            if query is None:
                raise InvalidInput(
                    f"query_id: expected a query in {self.path}, got {query_id}, which isn't."
                )
            if query.teacher is not None:
                raise InvalidInput(
                    f"query_id: expected a query without an answer, got {query_id}, which "
                    f"{query.teacher!r} has answered; answers are never changed."
                )
            self._db.execute(
                "INSERT INTO answers (query, preference, teacher) VALUES (?, ?, ?)",
                (query_id, None if preference is None else float(preference), teacher),
            )

    def queries(self, round: int | None = None, unanswered: bool = False) -> list[Query]:
        """Lists queries by id.

        Args:
            round: Only those of this round.
            unanswered: Only those that nobody has answered or skipped.
        """
        conditions = ["TRUE"]
        if round is not None:
            conditions.append("queries.round = :round")
        if unanswered:
            conditions.append("answers.query IS NULL")
        with refuse_damage(self.path):
            return self._read("WHERE " + " AND ".join(conditions), {"round": round})

    def comparisons(self) -> Comparisons | None:
        """All answers but skipped ones, by query id, each clip once; None if there are none."""
        answered = [query for query in self.queries() if query.preference is not None]
        if not answered:
            return None
        clips, pairs = self.clips_of([query.id for query in answered])
        return Comparisons(clips, pairs, torch.tensor([query.preference for query in answered]))

    def clips_of(self, query_ids: Sequence[int]) -> tuple[Clips, Tensor]:
        """The clips that queries show.

        Args:
            query_ids: At least one id, in any order.

        Returns:
            The clips, each once, padded to the longest, and `(len(query_ids), 2)` long, indices
            into them.

        Raises:
            InvalidInput: No ids, or one that isn't in the store.
            UnreadableFile: A clip that is no longer what was stored.
        """
        if not query_ids:
            raise InvalidInput("query_ids: expected at least one, got none.")
        place: dict[int, int] = {}  # of a clip's id among the clips returned
        pairs = []
        with refuse_damage(self.path):
            for query_id in query_ids:
                sql = "SELECT first, second FROM queries WHERE id = ?"
                shown = self._db.execute(sql, (query_id,)).fetchone()
                if shown is None:
                    raise InvalidInput(
                        f"query_ids: expected queries in {self.path}, got {query_id}, which isn't."
                    )
                pairs.append([place.setdefault(clip, len(place)) for clip in shown])
            clips = Clips.cat([self._load(clip) for clip in place])
        return clips, torch.tensor(pairs)

    def counts(self) -> Counts:
        """How many queries were put, answered (skips aside) and skipped."""
        sql = """SELECT count(*), count(preference), count(query) - count(preference)
                 FROM queries LEFT JOIN answers ON answers.query = queries.id"""
        with refuse_damage(self.path):
            return Counts(*self._db.execute(sql).fetchone())

    def close(self) -> None:
        """Closes the file; closing twice does no harm."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with refuse_damage(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _read(self, where: str, values: tuple[int, ...] | dict[str, int | None]) -> list[Query]:
        sql = f"""SELECT queries.id, round, teacher, preference
                  FROM queries LEFT JOIN answers ON answers.query = queries.id
                  {where} ORDER BY queries.id"""
        return [Query(*row) for row in self._db.execute(sql, values)]

    def _clip(self, blob: bytes, twin: int) -> int:
        """The id of a clip, stored now if it isn't yet.

        Two clips of a query may hold the same frames; the second is then kept as a twin, since
        a query of a clip against itself is what every reader refuses.
        """
        key = (hashlib.sha256(blob).digest(), twin)
        sql = "INSERT INTO clips (sha256, twin, data) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        self._db.execute(sql, (*key, blob))
        sql = "SELECT id FROM clips WHERE sha256 = ? AND twin = ?"
        return int(self._db.execute(sql, key).fetchone()[0])

    def _load(self, clip: int) -> Clips:
        sql = "SELECT sha256, data FROM clips WHERE id = ?"
        digest, blob = self._db.execute(sql, (clip,)).fetchone()
        if hashlib.sha256(blob).digest() != digest:
            raise UnreadableFile(
                f"{self.path}: expected clip {clip} as it was stored, got other bytes (its "
                "checksum differs); restore the file from a copy."
            )
        return Clips(**{name: v[None] for name, v in safetensors.torch.load(blob).items()})

    def _check_frames(self, clips: Clips) -> None:
        # Clips of two shapes can't be one data set: refused now, not after people have answered.
        with refuse_damage(self.path):
            known = self._db.execute("SELECT min(id) FROM clips").fetchone()[0]
            stored = None if known is None else self._load(known)
        for name in () if stored is None else ("observations", "actions", "states"):
            old, new = getattr(stored, name), getattr(clips, name)
            if old is not None and new is not None and old.shape[2:] != new.shape[2:]:
                raise InvalidInput(
                    f"clips.{name}: expected frames of shape {tuple(old.shape[2:])} like those "
                    f"in {self.path}, got {tuple(new.shape[2:])}; use another file for another "
                    "task."
                )


def _pack(clips: Clips, index: int) -> bytes:
    """One clip as safetensors, cut after its last real frame: padding is nobody's data."""
    end = int(clips.mask[index].nonzero().max()) + 1
    named = {
        name: getattr(clips, name)
        for name in ("observations", "actions", "mask", "rewards", "states")
    }
    return safetensors.torch.save(
        {
            name: value[index, :end].detach().cpu().contiguous().clone()
            for name, value in named.items()
            if value is not None
        }
    )
