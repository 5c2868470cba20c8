"""The durable store of clips, queries and answers: one SQLite file, only ever added to.

People's answers are the dearest data in a study, so an answer that was acknowledged survives a
killed process and a power cut, and a query is on disk with both its clips or not at all. What is
taken back is marked so, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from active.clip_table import ClipTable, pack
from active.database import Conflict, Database, Missing
from active.leases import Leases
from active.marks import Marks
from active.pairs import check_pairs
from active.repeats import Repeats
from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, UnknownName

Declined = Literal["unsure", "skip"]
"""Why there is no preference: the person looked and can't tell, or didn't want to say."""

_TABLE: Final = {"answer": "answers", "mark": "marks", "rating": "ratings"}


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
        path: The file; made if there is none (or an empty one), brought up to date if an earlier
            version wrote it.

    Attributes:
        leases: Who is being asked what just now.
        marks: Marks and ratings of single clips.
        repeats: Queries put a second time, to see whether answers agree.

    Raises:
        UnreadableFile: A file that is damaged, isn't a feedback store, or was written by a
            newer version. It is left as it was.

    Example:
        >>> import tempfile
        >>> clips = Clips(torch.zeros(3, 5, 2), torch.arange(15.0).reshape(3, 5, 1))
        >>> path = Path(tempfile.mkdtemp()) / "answers.sqlite"
        >>> with FeedbackStore(path) as store:
        ...     ids = store.add_queries(clips, torch.tensor([[0, 1], [2, 1]]), round=0)
        ...     anns = store.answer(ids[0], 1.0, teacher="ann")
        ...     _ = store.answer(ids[1], None, teacher="ann")
        ...     _ = store.withdraw("answer", anns, teacher="ann")
        ...     _ = store.answer(ids[0], 0.5, teacher="ann")
        ...     store.counts(), store.comparisons().preference
        (Counts(put=2, answered=1, skipped=1), tensor([0.5000]))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = Database(self.path)
        self._db = self._file.connection
        self._clips = ClipTable(self._file)
        self.leases = Leases(self._file)
        self.marks = Marks(self._file)
        self.repeats = Repeats(self._file)

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
        self._clips.check_frames(clips)
        blobs = {clip: pack(clips, clip) for clip in used}
        with self._file.transaction():
            ids = []
            for first, second in rows:
                twins = blobs[first] == blobs[second]
                shown = self._clips.put(blobs[first], 0), self._clips.put(blobs[second], int(twins))
                sql = "INSERT INTO queries (round, first, second) VALUES (?, ?, ?) RETURNING id"
                ids.append(int(self._db.execute(sql, (round, *shown)).fetchone()[0]))
        return ids

    def answer(
        self,
        query_id: int,
        preference: float | None,
        teacher: str,
        *,
        seconds: float | None = None,
        declined: Declined = "skip",
        holder: str | None = None,
    ) -> int:
        """Stores an answer; it is on disk when this returns.

        Args:
            query_id: As `add_queries` returned it.
            preference: Probability that the second clip is better: 0, 1, 0.5 for "the same",
                or anything between; None or NaN for a skipped query.
            teacher: Who answered.
            seconds: How long they took; None if nobody looked at the clock.
            declined: Why there is no preference, where there is none.
            holder: Whose lease has to hold, and ends with the answer; None to answer without one.

        Returns:
            The answer's id, for `withdraw`.

        Raises:
            Missing: An unknown query.
            Conflict: A query that has its answer already (answers are never changed), or whose
                lease isn't the holder's any more.
            InvalidInput: A preference outside [0, 1], negative seconds, or an empty teacher.
        """
        if preference is not None and math.isnan(preference):
            preference = None
        if preference is not None and not 0 <= preference <= 1:
            raise InvalidInput(
                "preference: expected a probability from 0 to 1, or None for a skipped query, "
                f"got {preference}."
            )
        if seconds is not None and not 0 <= seconds < math.inf:
            raise InvalidInput(f"seconds: expected a number of at least 0, got {seconds}.")
        if declined not in get_args(Declined):
            raise UnknownName("declined", declined, get_args(Declined))
        if not teacher:
            raise InvalidInput("teacher: expected the name of who answered, got an empty one.")
        row = (
            (query_id, None, teacher, seconds, declined)
            if preference is None
            else (query_id, float(preference), teacher, seconds, None)
        )
        with self._file.transaction() as db:
            self._file.know(query_id)
            sql = "SELECT teacher FROM standing WHERE query = ?"
            if said := db.execute(sql, (query_id,)).fetchone():
                raise Conflict(
                    f"query_id: expected a query without an answer, got {query_id}, which "
                    f"{said[0]!r} has answered; answers are never changed."
                )
            if holder is not None:
                self.leases.check(query_id, holder)
            db.execute("DELETE FROM leases WHERE query = ?", (query_id,))
            sql = """INSERT INTO answers (query, preference, teacher, seconds, declined)
                     VALUES (?, ?, ?, ?, ?) RETURNING id"""
            return int(db.execute(sql, row).fetchone()[0])

    def withdraw(
        self, kind: Literal["answer", "mark", "rating"], id: int, teacher: str
    ) -> int | None:
        """Takes back what somebody said; it stays in the file, and no longer counts.

        A query whose answer is withdrawn is open again.

        Args:
            kind: What it is.
            id: Its number.
            teacher: Who said it: nobody else may take it back.

        Returns:
            The query that is open again, where it was an answer.

        Raises:
            Missing: There is no such thing, or somebody else said it.
            Conflict: It is withdrawn already.
            UnknownName: Another kind.
        """
        if kind not in _TABLE:
            raise UnknownName("kind", kind, _TABLE)
        with self._file.transaction() as db:
            about = "query" if kind == "answer" else "NULL"
            sql = f"SELECT {about} FROM {_TABLE[kind]} WHERE id = ? AND teacher = ?"
            found = db.execute(sql, (id, teacher)).fetchone()
            if found is None:
                raise Missing(f"id: expected the id of {kind} by {teacher!r}, got {id}.")
            if db.execute(f"SELECT 1 FROM withdrawals WHERE {kind} = ?", (id,)).fetchone():
                raise Conflict(f"id: expected what stands, got {kind} {id}, withdrawn already.")
            db.execute(f"INSERT INTO withdrawals ({kind}) VALUES (?)", (id,))
            return None if found[0] is None else int(found[0])

    def queries(self, round: int | None = None, unanswered: bool = False) -> list[Query]:
        """Lists queries by id, repeats aside.

        Args:
            round: Only those of this round.
            unanswered: Only those that nobody has answered or skipped.
        """
        conditions = ["repeats IS NULL"]
        if round is not None:
            conditions.append("queries.round = :round")
        if unanswered:
            conditions.append("standing.query IS NULL")
        sql = f"""SELECT queries.id, round, teacher, preference
                  FROM queries LEFT JOIN standing ON standing.query = queries.id
                  WHERE {" AND ".join(conditions)} ORDER BY queries.id"""
        with self._file.reading() as db:
            return [Query(*row) for row in db.execute(sql, {"round": round})]

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
        pairs = [
            [place.setdefault(clip, len(place)) for clip in self.shown(query_id)]
            for query_id in query_ids
        ]
        return self.clips(list(place)), torch.tensor(pairs)

    def shown(self, query_id: int) -> tuple[int, int]:
        """Ids of the first and second clip of a query.

        Raises:
            Missing: An unknown query.
        """
        return self._file.know(query_id)

    def clips(self, ids: Sequence[int]) -> Clips:
        """Clips by id, such as those that marks and ratings speak of, in the order of the ids.

        Raises:
            InvalidInput: No ids.
            Missing: One that isn't in the store.
            UnreadableFile: A clip that is no longer what was stored.
        """
        if not ids:
            raise InvalidInput("ids: expected at least one, got none.")
        return Clips.cat([self._clips.load(clip) for clip in ids])

    def counts(self) -> Counts:
        """How many queries were put, answered (skips aside) and skipped; repeats don't count."""
        sql = """SELECT count(*), count(preference), count(query) - count(preference)
                 FROM queries LEFT JOIN standing ON standing.query = queries.id
                 WHERE repeats IS NULL"""
        with self._file.reading() as db:
            return Counts(*db.execute(sql).fetchone())

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
