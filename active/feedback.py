"""The durable store of clips, queries, comparisons, marks and ratings: one SQLite file.

Comparisons by people are the most expensive data of a study. One that was acknowledged survives a
killed process and a power cut; a query is on disk with both its clips or not at all. Rows are only
added: triggers refuse to change or delete them, and a withdrawn one gets a row in `withdrawals`.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self, get_args

import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

from active.acquisition import check_pairs
from rewardmodels import comparisons as kinds
from rewardmodels.clips import Clips
from rewardmodels.comparisons import Comparisons
from rewardmodels.errors import InvalidInput, UnknownName, UnreadableFile, require, require_rows
from rewardmodels.saving import atomic_path

LEASE_SECONDS: Final = 120.0

# Types and errors.

Declined = Literal["unsure", "skip"]
"""Reason of a missing preference: the person can't tell, or skipped the query."""

_TABLE: Final = {"answer": "answers", "mark": "marks", "rating": "ratings"}


@dataclass(frozen=True)
class Query:
    """A query, and its comparison if it has one.

    Attributes:
        id: As `FeedbackStore.add_queries` returned it.
        round: Number of its round.
        teacher: Name of the teacher who answered or skipped it; None while it is open.
        preference: 0 the first, 1 the second, 0.5 "the same"; None while open or if skipped.
    """

    id: int
    round: int
    teacher: str | None
    preference: float | None

    @property
    def skipped(self) -> bool:
        """True if a teacher declined to answer."""
        return self.teacher is not None and self.preference is None


class Counts(NamedTuple):
    """Numbers of queries put, answered and skipped."""

    put: int
    answered: int
    skipped: int


class Mark(NamedTuple):
    """A part of a clip that was marked good or bad.

    Attributes:
        id: Of the row.
        clip: The clip's id, as `FeedbackStore.shown` returns and `FeedbackStore.clips` takes it.
        first: Its first frame, from 0.
        last: Its last frame, inclusive.
        good: True if it is good, False if bad.
        teacher: Name of the teacher.
    """

    id: int
    clip: int
    first: int
    last: int
    good: bool
    teacher: str


class Rating(NamedTuple):
    """A rating of a clip.

    Attributes:
        id: Of the row.
        clip: The clip's id, as in `Mark`.
        rating: From 0, the worst, to 1, the best.
        teacher: Name of the teacher.
    """

    id: int
    clip: int
    rating: float
    teacher: str


class Feedback(NamedTuple):
    """Feedback of all kinds, each None if there is none, by the names that `fit` has for them."""

    comparisons: Comparisons | None
    marks: kinds.Marks | None
    ratings: kinds.Ratings | None


class Agreement(NamedTuple):
    """Repeated queries with two preferences, and how many of them agree."""

    same: int
    repeated: int


class Missing(InvalidInput):
    """An id that isn't in the store."""


class Conflict(InvalidInput):
    """A write that is too late, or a second one; nothing was changed."""


def check_teacher(name: str) -> None:
    """Raise InvalidInput for a teacher's name that is empty or holds control characters."""
    require("teacher", bool(name.strip()), "the teacher's name", "an empty one")
    bad = [c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    require("teacher", not bad, "a name in one line, without control characters", ascii(name))


# The store.


class FeedbackStore:
    """Clips, queries and comparisons in one SQLite file (WAL, synchronous=FULL, append-only).

    Every method that writes is one transaction, on disk when it returns; one that raises changes
    nothing. Several processes may have the same file open; an object belongs to the thread that
    made it. Clips are kept once each, however many queries show them, as exact safetensors.

    Args:
        path: The file; made if there is none (or an empty one), upgraded if an earlier version
            wrote it.

    Attributes:
        leases: Leases of open queries, so that several people are not shown the same one.
        marks: Marks and ratings of single clips.
        repeats: Queries put a second time, to measure agreement.

    Raises:
        InvalidInput: A folder that doesn't exist.
        UnreadableFile: A file that is damaged, isn't a feedback store, or was written by a
            newer version. It is left as it was.

    Example:
        >>> import tempfile
        >>> clips = Clips(torch.zeros(3, 5, 2), torch.arange(15.0).reshape(3, 5, 1))
        >>> path = Path(tempfile.mkdtemp()) / "answers.sqlite"
        >>> with FeedbackStore(path) as store:
        ...     ids = store.add_queries(clips, torch.tensor([[0, 1], [2, 1]]), round=0)
        ...     first = store.answer(ids[0], 1.0, teacher="ann")
        ...     _ = store.answer(ids[1], None, teacher="ann")
        ...     _ = store.withdraw("answer", first, teacher="ann")
        ...     _ = store.answer(ids[0], 0.5, teacher="ann")
        ...     store.counts(), store.comparisons().preference
        (Counts(put=2, answered=1, skipped=1), tensor([0.5000]))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = _Database(self.path)
        self._db = self._file.connection
        self.leases = Leases(self._file)
        self.marks = Marks(self._file)
        self.repeats = Repeats(self._file)

    def add_queries(self, clips: Clips, pairs: Tensor, *, round: int) -> list[int]:
        """Store queries, and the clips that they show, in one transaction.

        Args:
            clips: The N clips that the pairs index into.
            pairs: `(Q, 2)` integers, indices into clips.
            round: Number of the round, at least 0.

        Returns:
            Q ids, rising.

        Raises:
            InvalidInput: A bad pair, a clip against itself, a negative round, or frames of
                another shape than those in the store.
        """
        check_pairs(pairs, len(clips))
        rows = pairs.tolist()
        require_rows("pairs", pairs[:, 0] != pairs[:, 1], "two different clips", pairs)
        require("round", round >= 0, "at least 0", round)
        used = sorted({clip for row in rows for clip in row})
        self._check_frames(clips)
        blobs = {clip: _pack(clips, clip) for clip in used}
        with self._file.transaction():
            ids = []
            for first, second in rows:
                twins = blobs[first] == blobs[second]
                one, other = self._put(blobs[first], 0), self._put(blobs[second], int(twins))
                ids.append(self._file.insert("queries", round=round, first=one, second=other))
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
        """Store a comparison.

        Args:
            query_id: As `add_queries` returned it.
            preference: Probability that the second clip is better: 0, 1, 0.5 for "the same",
                or anything between; None or NaN for a skipped query.
            teacher: Name of the teacher.
            seconds: Time taken; None if unknown.
            declined: Reason of a missing preference.
            holder: Holder of a lease, which must be valid and ends now; None for no lease.

        Returns:
            The answer's id, for `withdraw`.

        Raises:
            Missing: An unknown query.
            Conflict: A query that has a comparison already, or whose lease has run out.
            InvalidInput: A preference outside [0, 1], negative seconds, or a teacher's name that
                is empty or holds control characters.
        """
        if preference is not None and math.isnan(preference):
            preference = None
        valid = preference is None or 0 <= preference <= 1
        expected = "a probability from 0 to 1, or None for a skipped query"
        require("preference", valid, expected, preference)
        valid = seconds is None or 0 <= seconds < math.inf
        require("seconds", valid, "a number of at least 0", seconds)
        if declined not in get_args(Declined):
            raise UnknownName("declined", declined, get_args(Declined))
        check_teacher(teacher)
        with self._file.transaction() as db:
            self.shown(query_id)
            sql = "SELECT teacher FROM standing WHERE query = ?"
            if other := db.execute(sql, (query_id,)).fetchone():
                raise Conflict(
                    f"query_id: expected an open query, got {query_id}, which {other[0]!r} has "
                    "answered; withdraw that answer first."
                )
            if holder is not None:
                self.leases.check(query_id, holder)
            db.execute("DELETE FROM leases WHERE query = ?", (query_id,))
            return self._file.insert(
                "answers",
                query=query_id,
                preference=None if preference is None else float(preference),
                teacher=teacher,
                seconds=seconds,
                declined=declined if preference is None else None,
            )

    def withdraw(
        self, kind: Literal["answer", "mark", "rating"], id: int, teacher: str
    ) -> int | None:
        """Withdraw a comparison, mark or rating; it stays in the file, and no longer counts.

        Args:
            kind: Kind of row.
            id: Of the row.
            teacher: Name of the teacher who gave it; others can't withdraw it.

        Returns:
            The query of an answer, which is open again; None for other kinds.

        Raises:
            Missing: No such row by this teacher.
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
                raise Conflict(f"id: expected a valid {kind}, got {id}, which is withdrawn.")
            db.execute(f"INSERT INTO withdrawals ({kind}) VALUES (?)", (id,))
            return None if found[0] is None else int(found[0])

    def queries(self, round: int | None = None, unanswered: bool = False) -> list[Query]:
        """List queries by id, without repeats; only a round's, or open ones, if so chosen."""
        conditions = ["repeats IS NULL"]
        if round is not None:
            conditions.append("queries.round = :round")
        if unanswered:
            conditions.append("standing.query IS NULL")
        sql = f"""SELECT queries.id, round, teacher, preference
                  FROM queries LEFT JOIN standing ON standing.query = queries.id
                  WHERE {" AND ".join(conditions)} ORDER BY queries.id"""
        return [Query(*row) for row in self._file.rows(sql, {"round": round})]

    def comparisons(self) -> Comparisons | None:
        """Return all comparisons by query id, each clip once; None if there are none."""
        answered = [query for query in self.queries() if query.preference is not None]
        if not answered:
            return None
        clips, pairs = self.clips_of([query.id for query in answered])
        return Comparisons(clips, pairs, torch.tensor([query.preference for query in answered]))

    def feedback(self) -> Feedback:
        """Return all comparisons, marks and ratings, whoever gave them, as `fit` takes them.

        Errors are as in `clips_of`, and InvalidInput for a mark that ends past its clip.

        Example:
            >>> import tempfile
            >>> from rewardmodels import DeepEnsemble, fit
            >>> clips = Clips(torch.rand(4, 5, 2), torch.rand(4, 5, 1))
            >>> with FeedbackStore(Path(tempfile.mkdtemp()) / "answers.sqlite") as store:
            ...     for query in store.add_queries(clips, torch.tensor([[0, 1], [2, 3]]), round=0):
            ...         _ = store.answer(query, 1.0, "ann")
            ...     _ = store.marks.add(1, 0, 2, good=True, teacher="ann")
            ...     model = fit(DeepEnsemble(), **store.feedback()._asdict(), epochs=1)
        """
        marks, ratings = self.marks.rows(), self.marks.ratings()
        marked, rated = (list(dict.fromkeys(row.clip for row in rows)) for rows in (marks, ratings))
        raters = list(dict.fromkeys(row.teacher for row in ratings))
        rows = [(marked.index(m.clip), m.first, m.last, int(m.good)) for m in marks]
        return Feedback(
            self.comparisons(),
            kinds.Marks(self.clips(marked), torch.tensor(rows)) if marks else None,
            kinds.Ratings(
                self.clips(rated),
                torch.tensor([rated.index(row.clip) for row in ratings]),
                torch.tensor([row.rating for row in ratings], dtype=torch.double),
                torch.tensor([raters.index(row.teacher) for row in ratings]),
            )
            if ratings
            else None,
        )

    def clips_of(self, query_ids: Sequence[int]) -> tuple[Clips, Tensor]:
        """Return the clips that queries show.

        Args:
            query_ids: At least one id, in any order.

        Returns:
            The clips, each once, padded to the longest, and `(len(query_ids), 2)` long, indices
            into them.

        Raises:
            InvalidInput: No ids.
            Missing: An unknown query.
            UnreadableFile: A clip whose bytes have changed.
        """
        require("query_ids", len(query_ids) > 0, "at least one", "none")
        place: dict[int, int] = {}  # of a clip's id among the clips returned
        pairs = [
            [place.setdefault(clip, len(place)) for clip in self.shown(query_id)]
            for query_id in query_ids
        ]
        return self.clips(list(place)), torch.tensor(pairs)

    def shown(self, query_id: int) -> tuple[int, int]:
        """Return the ids of the first and second clip of a query; Missing if there is none."""
        sql = "SELECT first, second FROM queries WHERE id = ?"
        if found := self._file.rows(sql, (query_id,)):
            return int(found[0][0]), int(found[0][1])
        raise Missing(f"query_id: expected a query in {self.path}, got {query_id}, which isn't.")

    def clips(self, ids: Sequence[int]) -> Clips:
        """Return clips by id, such as those of marks and ratings; errors as in `clips_of`."""
        require("ids", len(ids) > 0, "at least one", "none")
        return Clips.cat([self._load(clip) for clip in ids])

    def counts(self) -> Counts:
        """Count queries put, answered and skipped, without repeats."""
        sql = """SELECT count(*), count(preference), count(query) - count(preference)
                 FROM queries LEFT JOIN standing ON standing.query = queries.id
                 WHERE repeats IS NULL"""
        return Counts(*self._file.rows(sql)[0])

    def digest(self, n: int = -1) -> tuple[int, str]:
        """Number and SHA-256 of the first n answers, or of all, with the clips that they compare.

        Answers are only ever added, so that a store that has others isn't the same one.
        """
        sql = """SELECT query, preference, teacher, declined, one.sha256, other.sha256
                 FROM answers JOIN queries ON queries.id = query
                 JOIN clips AS one ON one.id = first JOIN clips AS other ON other.id = second
                 ORDER BY answers.id LIMIT ?"""
        rows = self._file.rows(sql, (n,))
        return len(rows), hashlib.sha256(repr(rows).encode()).hexdigest()

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _put(self, blob: bytes, twin: int) -> int:
        """Return the id of a clip, stored now if it isn't yet; call it in a transaction.

        Two clips of a query may hold the same frames; the second is then stored as a twin, since
        every reader refuses a query of a clip against itself.
        """
        key = (hashlib.sha256(blob).digest(), twin)
        sql = "INSERT INTO clips (sha256, twin, data) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        self._db.execute(sql, (*key, blob))
        sql = "SELECT id FROM clips WHERE sha256 = ? AND twin = ?"
        return int(self._db.execute(sql, key).fetchone()[0])

    def _load(self, clip: int) -> Clips:
        found = self._file.rows("SELECT sha256, data FROM clips WHERE id = ?", (clip,))
        if not found:
            raise Missing(f"ids: expected clips in {self.path}, got {clip}, which isn't.")
        ((digest, blob),) = found
        if hashlib.sha256(blob).digest() != digest:
            raise UnreadableFile(
                f"{self.path}: expected clip {clip} as it was stored, got other bytes (its "
                "checksum differs); restore the file from a copy."
            )
        return Clips(**{name: v[None] for name, v in safetensors.torch.load(blob).items()})

    def _check_frames(self, clips: Clips) -> None:
        """Raise InvalidInput for frames of another shape than the stored clips'."""
        ((oldest,),) = self._file.rows("SELECT min(id) FROM clips")
        stored = None if oldest is None else self._load(oldest)
        for name in () if stored is None else ("observations", "actions", "states"):
            old, new = getattr(stored, name), getattr(clips, name)
            if old is not None and new is not None:
                known, shape = tuple(old.shape[2:]), tuple(new.shape[2:])
                expected = f"frames of shape {known} like those in {self.path}"
                got = f"{shape}; use another file for another task"
                require(f"clips.{name}", shape == known, expected, got)


def _pack(clips: Clips, index: int) -> bytes:
    """Serialise one clip, cut after its last real frame."""
    end = int(clips.mask[index].nonzero().max()) + 1
    names = ("observations", "actions", "mask", "rewards", "states")
    named = {name: getattr(clips, name) for name in names}
    return safetensors.torch.save(
        {
            name: value[index, :end].detach().cpu().contiguous().clone()
            for name, value in named.items()
            if value is not None
        }
    )


class Leases:
    """Leases on open queries: each has one holder until it is answered or the lease expires.

    Args:
        db: The open store.
        clock: Seconds since some fixed moment, the same for every process with the file open.

    Example:
        >>> import tempfile
        >>> clips = Clips(torch.rand(3, 5, 2), torch.rand(3, 5, 1))
        >>> with FeedbackStore(Path(tempfile.mkdtemp()) / "answers.sqlite") as store:
        ...     _ = store.add_queries(clips, torch.tensor([[0, 1], [1, 2]]), round=0)
        ...     leased = [store.leases.take(tab) for tab in ("ann's", "bob's", "carla's")]
        ...     store.leases.release("bob's")
        ...     leased, store.leases.take("carla's")
        ([[1], [2], []], [2])
    """

    def __init__(self, db: _Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = db, clock

    def take(self, holder: str, n: int = 1, *, seconds: float = LEASE_SECONDS) -> list[int]:
        """Lease at most n open queries to a holder, such as one open page, for so many seconds.

        Returns:
            Up to n ids: the holder's own first, with renewed leases, then free ones, oldest first.

        Raises:
            InvalidInput: An empty holder, n below 1, or seconds that aren't positive.
        """
        require("holder", bool(holder), "a name", "an empty one")
        require("n", n >= 1, "at least 1 query", n)
        require("seconds", 0 < seconds < math.inf, "a positive number", seconds)
        now = self._clock()
        with self._db.transaction() as db:
            db.execute("DELETE FROM leases WHERE expires <= ?", (now,))
            sql = """SELECT id FROM queries LEFT JOIN leases ON leases.query = queries.id
                     WHERE NOT EXISTS (SELECT 1 FROM standing WHERE standing.query = queries.id)
                     AND (holder IS NULL OR holder = ?)
                     ORDER BY holder IS NULL, id LIMIT ?"""
            ids = [int(row[0]) for row in db.execute(sql, (holder, n))]
            db.executemany(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?)",
                [(query, holder, now + seconds) for query in ids],
            )
        return ids

    def grant(self, query_id: int, holder: str, *, seconds: float = LEASE_SECONDS) -> None:
        """Lease one query, as after its answer was withdrawn; Conflict if another holds it."""
        now = self._clock()
        with self._db.transaction() as db:
            sql = "SELECT holder FROM leases WHERE query = ? AND expires > ? AND holder <> ?"
            if db.execute(sql, (query_id, now, holder)).fetchone():
                raise Conflict(
                    f"query_id: expected a free query, got {query_id}, which is leased to another "
                    "holder; take the next one."
                )
            row = (query_id, holder, now + seconds)
            db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", row)

    def release(self, holder: str) -> None:
        """End a holder's leases, as when a page is closed."""
        with self._db.transaction() as db:
            db.execute("DELETE FROM leases WHERE holder = ?", (holder,))

    def check(self, query_id: int, holder: str) -> None:
        """Raise Conflict unless the holder's lease on a query is valid."""
        sql = "SELECT 1 FROM leases WHERE query = ? AND holder = ? AND expires > ?"
        if not self._db.rows(sql, (query_id, holder, self._clock())):
            raise Conflict(
                f"query_id: expected a query leased to {holder!r}, got {query_id}, whose lease has "
                "expired or is another holder's; take the next one."
            )


class Marks:
    """Marks and ratings of single clips; `FeedbackStore.withdraw` withdraws one."""

    def __init__(self, db: _Database) -> None:
        self._db = db

    def add(self, clip: int, first: int, last: int, *, good: bool, teacher: str) -> int:
        """Store a mark with the attributes of `Mark`; return its id.

        Raises:
            Missing: No such clip.
            InvalidInput: Frames out of order or below 0, or a teacher's name as in `answer`. The
                clip's length isn't checked, which would take reading it.
        """
        expected = "frames from 0 on with the last not before the first"
        require("first, last", 0 <= first <= last, expected, f"{first} and {last}")
        return self._insert("marks", clip, teacher, first=first, last=last, good=int(good))

    def rate(self, clip: int, rating: float, *, teacher: str) -> int:
        """Store a rating with the attributes of `Rating`; return its id.

        Raises:
            Missing: No such clip.
            InvalidInput: A rating outside [0, 1], or a teacher's name as in `answer`.
        """
        require("rating", 0 <= rating <= 1, "a number from 0 to 1", rating)
        return self._insert("ratings", clip, teacher, rating=float(rating))

    def rows(self) -> list[Mark]:
        """Return the marks that aren't withdrawn, oldest first."""
        return self._read("TRUE")

    def of(self, clip: int) -> list[Mark]:
        """Return a clip's marks that aren't withdrawn, oldest first."""
        return self._read("clip = ?", clip)

    def ratings(self) -> list[Rating]:
        """Return the ratings that aren't withdrawn, oldest first; a person's last one counts."""
        sql = """SELECT id, clip, rating, teacher FROM ratings WHERE NOT EXISTS
                 (SELECT 1 FROM withdrawals WHERE withdrawals.rating = ratings.id) ORDER BY id"""
        return [Rating(*row) for row in self._db.rows(sql)]

    def _read(self, condition: str, *values: int) -> list[Mark]:
        sql = f"""SELECT id, clip, first, last, good, teacher FROM marks WHERE {condition} AND
                  NOT EXISTS (SELECT 1 FROM withdrawals WHERE mark = marks.id) ORDER BY id"""
        rows = self._db.rows(sql, values)
        return [Mark(i, of, a, b, bool(good), who) for i, of, a, b, good, who in rows]

    def _insert(self, table: str, clip: int, teacher: str, **row: float) -> int:
        check_teacher(teacher)
        with self._db.transaction():
            if not self._db.rows("SELECT 1 FROM clips WHERE id = ?", (clip,)):
                raise Missing(f"clip: expected a clip in {self._db.path}, got {clip}.")
            return self._db.insert(table, clip=clip, teacher=teacher, **row)


class Repeats:
    """Repeats of queries, with the clips swapped, to measure agreement.

    They are leased and answered like any query, and left out of lists, counts and comparisons.
    """

    def __init__(self, db: _Database) -> None:
        self._db = db

    def put(self, query_id: int) -> int:
        """Put a query a second time; return the repeat's id.

        Raises:
            Missing: An unknown query.
            Conflict: It was repeated already, or is itself a repeat.
        """
        with self._db.transaction() as db:
            sql = "SELECT 1 FROM queries WHERE repeats = :id OR id = :id AND repeats IS NOT NULL"
            if db.execute(sql, {"id": query_id}).fetchone():
                raise Conflict(f"query_id: expected one never repeated, got {query_id}.")
            sql = """INSERT INTO queries (round, first, second, repeats)
                     SELECT round, second, first, id FROM queries WHERE id = ? RETURNING id"""
            if again := db.execute(sql, (query_id,)).fetchone():
                return int(again[0])
        raise Missing(f"query_id: expected a query in {self._db.path}, got {query_id}.")

    def candidates(self, teacher: str) -> list[int]:
        """Return a teacher's queries with a preference and no repeat, in order of the answers."""
        sql = """SELECT query FROM standing JOIN queries ON queries.id = query
                 WHERE teacher = ? AND preference IS NOT NULL AND repeats IS NULL
                 AND query NOT IN (SELECT repeats FROM queries WHERE repeats IS NOT NULL)
                 ORDER BY standing.id"""
        return [int(row[0]) for row in self._db.rows(sql, (teacher,))]

    def answered(self, teacher: str) -> tuple[int, int]:
        """Count a teacher's answered queries, and the repeats made of them."""
        sql = """SELECT count(*), count(again.id) FROM standing
                 JOIN queries ON queries.id = query AND queries.repeats IS NULL
                 LEFT JOIN queries AS again ON again.repeats = queries.id WHERE teacher = ?"""
        ((first, again),) = self._db.rows(sql, (teacher,))
        return int(first), int(again)

    def agreement(self) -> Agreement:
        """Count repeated queries with two preferences, and those of them that agree."""
        sql = """SELECT coalesce(sum(abs(one.preference + two.preference - 1) < 1e-9), 0), count(*)
                 FROM queries JOIN standing AS one ON one.query = queries.repeats
                 JOIN standing AS two ON two.query = queries.id
                 WHERE one.preference IS NOT NULL AND two.preference IS NOT NULL"""
        return Agreement(*self._db.rows(sql)[0])


# Export and import.

Format = Literal["csv", "parquet"]

# Each after those that it refers to.
_TABLES: Final = ("clips", "queries", "answers", "marks", "ratings", "withdrawals")
# A clip's digest is text in an export, and its bytes are a file of their own.
_TYPES: Final = {"INTEGER": "Int64", "REAL": "float64", "TEXT": "string", "BLOB": "string"}
# A spreadsheet runs a cell that begins so, unless an apostrophe precedes it.
_FORMULA: Final = r"^('*[=+\-@\t\r\n])"
Row = tuple[Any, ...]


def export_feedback(store: Path, folder: Path, format: Format = "csv") -> None:
    """Write everything in a feedback store to files that other tools can read.

    One table each of clips, queries, answers, marks, ratings and withdrawals, withdrawn rows
    included; and `clips/`, a safetensors file for each clip, named by its SHA-256. The store is
    only read. In CSV, text that a spreadsheet would run as a formula begins with an apostrophe,
    which `import_feedback` takes away.

    Args:
        store: File of the feedback store.
        folder: Directory to write to, new or empty.
        format: `csv`, or `parquet`, which needs pyarrow.

    Raises:
        InvalidInput: No such store, a folder that isn't empty, or no pyarrow.
        UnreadableFile: A file that is damaged, empty or no feedback store; nothing is written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with FeedbackStore(folder / "answers.sqlite") as store:
        ...     clips = Clips(torch.rand(2, 5, 2), torch.rand(2, 5, 1))
        ...     (query,) = store.add_queries(clips, torch.tensor([[0, 1]]), round=0)
        ...     _ = store.answer(query, 1.0, "ann")
        >>> export_feedback(folder / "answers.sqlite", folder / "export")
        >>> import_feedback(folder / "export", folder / "again.sqlite")
        >>> with FeedbackStore(folder / "again.sqlite") as store:
        ...     store.counts()
        Counts(put=1, answered=1, skipped=0)
    """
    _check_format(format)
    expected = "a feedback store's file, such as a run's answers.sqlite"
    require("store", store.is_file(), expected, store)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require("folder", empty, "a new or an empty folder", folder)

    def write(db: sqlite3.Connection) -> None:
        if _version(db) < _VERSION:  # its tables are added to a copy in memory
            old, db = db, sqlite3.connect(":memory:", isolation_level=None)
            old.backup(db)
            _upgrade(db)
        db.execute("BEGIN")  # a snapshot, whatever is written meanwhile
        (folder / "clips").mkdir(parents=True, exist_ok=True)
        for digest, blob in db.execute("SELECT DISTINCT sha256, data FROM clips"):
            (folder / "clips" / f"{digest.hex()}.safetensors").write_bytes(blob)
        for table in _TABLES:
            columns = _columns(db, table)
            chosen = ("lower(hex(sha256))" if name == "sha256" else name for name in columns)
            rows = db.execute(f"SELECT {', '.join(chosen)} FROM {table} ORDER BY id").fetchall()
            frame = pd.DataFrame(rows, columns=list(columns)).astype(columns)
            if format == "csv":
                for name, text in frame.select_dtypes("string").items():
                    frame[name] = text.str.replace(_FORMULA, r"'\1", regex=True)
                # By RFC 4180; a lone carriage return in a text would not be quoted otherwise.
                frame.to_csv(folder / f"{table}.csv", index=False, lineterminator="\r\n")
            else:
                frame.to_parquet(folder / f"{table}.parquet", index=False)
        db.execute("ROLLBACK")

    _read_only(store, write)


def import_feedback(folder: Path, store: Path) -> None:
    """Make a feedback store from an export of `export_feedback`, the same in every table.

    Args:
        folder: Directory of the export.
        store: File of the new store.

    Raises:
        InvalidInput: A store that exists already, a folder that isn't an export, or no pyarrow.
        UnreadableFile: A damaged export; no store is made.
    """
    require("store", not store.exists(), "a new file", f"{store}, which exists")
    require("store", store.parent.is_dir(), "a file in an existing folder", store)
    format = next((f for f in get_args(Format) if (folder / f"clips.{f}").is_file()), None)
    if format is None:
        raise InvalidInput(f"folder: expected what export_feedback wrote, got {folder}.")
    _check_format(format)
    try:
        # Under its name only once complete, and without replacing a file made meanwhile.
        with atomic_path(store, overwrite=False) as part:
            file = _Database(part)
            with closing(file.connection):
                # Not the trigger against second answers: withdrawals are read last.
                with file.transaction() as db:
                    (trigger,) = db.execute(
                        "SELECT sql FROM sqlite_master WHERE name = 'one_stands'"
                    )
                    db.execute("DROP TRIGGER one_stands")
                    for table in _TABLES:
                        columns = _columns(db, table)
                        rows = _read(folder / f"{table}.{format}", columns)
                        if table == "clips":
                            columns["data"] = "bytes"
                            rows = (_with_data(folder, row) for row in rows)
                        places = ", ".join("?" * len(columns))
                        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})"
                        db.executemany(sql, rows)
                    db.execute(trigger[0])
                    sql = "SELECT query FROM standing GROUP BY query HAVING count(*) > 1"
                    if twice := db.execute(sql).fetchone():
                        raise ValueError(f"query {twice[0]} has two valid answers")
                file.connection.execute("PRAGMA journal_mode = DELETE")  # one file, to be moved
    except (OSError, ValueError, KeyError, TypeError, sqlite3.Error) as error:
        raise UnreadableFile(f"{folder}: expected a whole export, got {error!r}.") from error


def _with_data(folder: Path, row: Row) -> Row:
    number, digest, twin = row
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"clip {number} has no SHA-256")  # it names a file
    blob = (folder / "clips" / f"{digest}.safetensors").read_bytes()
    if hashlib.sha256(blob).hexdigest() != digest:
        raise ValueError(f"the file of clip {number} has changed")
    return number, bytes.fromhex(digest), twin, blob


def _columns(db: sqlite3.Connection, table: str) -> dict[str, str]:
    """Types of a table's columns in pandas."""
    listed = db.execute(f"PRAGMA table_info({table})")
    return {name: _TYPES[kind] for _, name, kind, *_ in listed if name != "data"}


def _read(path: Path, columns: dict[str, str]) -> Iterable[Row]:
    names = list(columns)
    if path.suffix == ".csv":
        # No text in the store is empty, so that an empty field is a null.
        frame = pd.read_csv(
            path, usecols=names, dtype="string", keep_default_na=False, na_values=[""]
        )
        frame = frame.apply(lambda text: text.str.replace(f"^'(?={_FORMULA[1:]})", "", regex=True))
    else:
        frame = pd.read_parquet(path, columns=names)
    frame = frame[names].astype(columns).astype(object)
    return frame.where(frame.notna(), None).itertuples(index=False, name=None)


def _check_format(format: str) -> None:
    if format not in get_args(Format):
        raise UnknownName("format", format, get_args(Format))
    installed = format != "parquet" or find_spec("pyarrow") is not None
    got = "none; pip install 'rewardmodels[parquet]' installs it"
    require("format", installed, "pyarrow to be installed for parquet", got)


# The file: schema, transactions, damage.

_NOW: Final = "TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))"


def _append_only(*tables: str) -> tuple[str, ...]:
    return tuple(
        f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'the feedback store is append-only'); END"
        for table in tables
        for verb in ("UPDATE", "DELETE")
    )


_CLIPS_QUERIES_ANSWERS: Final = (
    """CREATE TABLE clips (
        id INTEGER PRIMARY KEY,
        sha256 BLOB NOT NULL,
        twin INTEGER NOT NULL,
        data BLOB NOT NULL
    )""",
    "CREATE UNIQUE INDEX clip_once ON clips (sha256, twin)",
    f"""CREATE TABLE queries (
        id INTEGER PRIMARY KEY,
        round INTEGER NOT NULL,
        first INTEGER NOT NULL REFERENCES clips,
        second INTEGER NOT NULL REFERENCES clips,
        put_at {_NOW},
        CHECK (first <> second)
    )""",
    "CREATE INDEX query_round ON queries (round)",
    f"""CREATE TABLE answers (
        id INTEGER PRIMARY KEY,
        query INTEGER NOT NULL REFERENCES queries,
        preference REAL CHECK (preference BETWEEN 0 AND 1),
        teacher TEXT NOT NULL,
        answered_at {_NOW}
    )""",
    # An index, where UNIQUE in the table would do, can be dropped by a later version.
    "CREATE UNIQUE INDEX answer_once ON answers (query)",
    *_append_only("clips", "queries", "answers"),
)

_PEOPLE: Final = (
    "ALTER TABLE queries ADD COLUMN repeats INTEGER REFERENCES queries",
    "CREATE UNIQUE INDEX repeat_once ON queries (repeats)",
    "ALTER TABLE answers ADD COLUMN seconds REAL CHECK (seconds >= 0)",
    "ALTER TABLE answers ADD COLUMN declined TEXT CHECK (declined IN ('unsure', 'skip'))",
    f"""CREATE TABLE marks (
        id INTEGER PRIMARY KEY,
        clip INTEGER NOT NULL REFERENCES clips,
        first INTEGER NOT NULL CHECK (first >= 0),
        last INTEGER NOT NULL CHECK (last >= first),
        good INTEGER NOT NULL CHECK (good IN (0, 1)),
        teacher TEXT NOT NULL,
        marked_at {_NOW}
    )""",
    "CREATE INDEX mark_clip ON marks (clip)",
    f"""CREATE TABLE ratings (
        id INTEGER PRIMARY KEY,
        clip INTEGER NOT NULL REFERENCES clips,
        rating REAL NOT NULL CHECK (rating BETWEEN 0 AND 1),
        teacher TEXT NOT NULL,
        rated_at {_NOW}
    )""",
    f"""CREATE TABLE withdrawals (
        id INTEGER PRIMARY KEY,
        answer INTEGER UNIQUE REFERENCES answers,
        mark INTEGER UNIQUE REFERENCES marks,
        rating INTEGER UNIQUE REFERENCES ratings,
        withdrawn_at {_NOW},
        CHECK ((answer IS NOT NULL) + (mark IS NOT NULL) + (rating IS NOT NULL) = 1)
    )""",
    """CREATE TABLE leases (
        query INTEGER PRIMARY KEY REFERENCES queries,
        holder TEXT NOT NULL,
        expires REAL NOT NULL
    )""",
    """CREATE VIEW standing AS SELECT * FROM answers WHERE NOT EXISTS
        (SELECT 1 FROM withdrawals WHERE withdrawals.answer = answers.id)""",
    # After a withdrawal a query may be answered again, with at most one valid answer at a time.
    "DROP INDEX answer_once",
    "CREATE INDEX answer_query ON answers (query)",
    """CREATE TRIGGER one_stands BEFORE INSERT ON answers
        WHEN EXISTS (SELECT 1 FROM standing WHERE query = NEW.query)
        BEGIN SELECT RAISE(ABORT, 'the query has an answer that stands'); END""",
    *_append_only("marks", "ratings", "withdrawals"),
)

_STEPS: Final = (_CLIPS_QUERIES_ANSWERS, _PEOPLE)

_VERSION: Final = len(_STEPS)
_APPLICATION: Final = 0x52574D46  # "RWMF" in the file's header
_MAGIC: Final = b"SQLite format 3\x00"


class _Database:
    """Connection to a store's file, and its transactions; see `FeedbackStore` for the errors.

    A file that exists is first checked through a connection that cannot write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require("path", path.parent.is_dir(), "a file in an existing folder", path)
        # A process killed while making the file leaves a rollback journal, which SQLite applies
        # on the first connection that may write.
        interrupted = path.with_name(path.name + "-journal").exists()
        if path.exists() and path.stat().st_size > 0 and not interrupted:
            _read_only(path, lambda db: None)
        with _refuse_damage(path):
            self.connection = _open(path, "rwc")
            try:
                with self.transaction() as db:  # made or upgraded, all or nothing
                    _upgrade(db)
                if interrupted:
                    _check(path, self.connection)
                self.connection.execute("PRAGMA journal_mode = WAL")
            except BaseException:
                self.connection.close()
                raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write everything in the block or nothing; on disk when the block ends."""
        with _refuse_damage(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def rows(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Row]:
        """Return the rows that a statement selects."""
        with _refuse_damage(self.path):
            return self.connection.execute(sql, values).fetchall()

    def insert(self, table: str, **row: Any) -> int:
        """Add a row, inside a transaction; return its id."""
        names, places = ", ".join(row), ", ".join("?" * len(row))
        sql = f"INSERT INTO {table} ({names}) VALUES ({places}) RETURNING id"
        return int(self.connection.execute(sql, tuple(row.values())).fetchone()[0])


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _upgrade(db: sqlite3.Connection) -> None:
    if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
    if (version := _version(db)) < _VERSION:
        for statement in (s for step in _STEPS[version:] for s in step):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {_VERSION}")


@contextmanager
def _refuse_damage(path: Path) -> Iterator[None]:
    """Raise UnreadableFile for SQLite's errors of a damaged or foreign file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        raise _damaged(path, str(error)) from error


def _read_only(path: Path, read: Callable[[sqlite3.Connection], None]) -> None:
    """Check a file and read from it, without writing to it or next to it.

    `read` is called again if another process began to write meanwhile.
    """

    def state() -> tuple[int, bool]:
        return path.stat().st_mtime_ns, path.with_name(path.name + "-wal").exists()

    while True:
        before = state()
        # Without a log no process has the file open; "immutable" then keeps SQLite from making
        # files of its own. With one, a transaction of `read` sees one state of the store.
        log = before[1]
        try:
            with path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise _damaged(path, "file is not a database")
            mode = "ro" if log else "ro&immutable=1"
            with _refuse_damage(path), closing(_open(path, mode)) as db:
                _check(path, db)
                read(db)
            if log or state() == before:
                return
        except UnreadableFile:
            if state() == before:
                raise


def _open(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    # Without implicit transactions, so that none is ever left open.
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA synchronous = FULL")
    return db


def _check(path: Path, db: sqlite3.Connection) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != _APPLICATION:
        raise UnreadableFile(
            f"{path}: expected a feedback store, got an SQLite database of another kind "
            f"(application id {application}). It was left as it was; choose another path."
        )
    if (version := _version(db)) > _VERSION:
        raise UnreadableFile(
            f"{path}: expected schema version {_VERSION} or earlier, got {version}, written by a "
            "newer release. It was left as it was; upgrade the library to read it."
        )
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise _damaged(path, found)


def _damaged(path: Path, found: str) -> UnreadableFile:
    return UnreadableFile(
        f"{path}: expected a feedback store, got a file that is damaged or of another format "
        f"({' '.join(found.split())}). It was left as it was. Restore it from a copy, or save "
        f"what can be saved with `sqlite3 {shlex.quote(str(path))} .recover | sqlite3 "
        "rescued.sqlite` and open that."
    )
