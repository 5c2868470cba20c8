"""What people say of single clips: parts of them that are good or bad, and how good one is."""

from __future__ import annotations

from typing import NamedTuple

from active.database import Database, Missing
from rewardmodels.errors import InvalidInput


class Mark(NamedTuple):
    """A stretch of a clip that somebody called good or bad.

    Attributes:
        id: Its number.
        clip: The clip's id, as `FeedbackStore.clips` takes it.
        first: Its first frame, from 0.
        last: Its last frame, itself part of it.
        good: Whether it is good, else bad.
        teacher: Who said so.
    """

    id: int
    clip: int
    first: int
    last: int
    good: bool
    teacher: str


class Rating(NamedTuple):
    """How good somebody called a clip.

    Attributes:
        id: Its number.
        clip: The clip's id, as `FeedbackStore.clips` takes it.
        rating: From 0, the worst, to 1, the best.
        teacher: Who said so.
    """

    id: int
    clip: int
    rating: float
    teacher: str


class Marks:
    """Marks and ratings of a store, only ever added to; `FeedbackStore.withdraw` takes one back.

    Args:
        db: The open store.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, clip: int, first: int, last: int, *, good: bool, teacher: str) -> int:
        """Stores a mark; it is on disk when this returns.

        Args:
            clip: The clip's id, as `FeedbackStore.shown` gives it.
            first: Its first frame, from 0.
            last: Its last frame, itself part of it.
            good: Whether it is good, else bad.
            teacher: Who says so.

        Returns:
            The mark's id.

        Raises:
            Missing: No such clip.
            InvalidInput: Frames out of order or below 0, or an empty teacher. Where a clip ends
                is for the caller to know: looking would take reading it.
        """
        if not 0 <= first <= last:
            raise InvalidInput(
                "first, last: expected frames from 0 on with the last not before the first, got "
                f"{first} and {last}."
            )
        row = (clip, first, last, int(good), teacher)
        return self._insert("marks (clip, first, last, good, teacher)", row)

    def rate(self, clip: int, rating: float, *, teacher: str) -> int:
        """Stores a rating; it is on disk when this returns.

        Args:
            clip: The clip's id, as `FeedbackStore.shown` gives it.
            rating: From 0, the worst, to 1, the best.
            teacher: Who says so.

        Returns:
            The rating's id.

        Raises:
            Missing: No such clip.
            InvalidInput: A rating outside [0, 1], or an empty teacher.
        """
        if not 0 <= rating <= 1:
            raise InvalidInput(f"rating: expected a number from 0 to 1, got {rating}.")
        return self._insert("ratings (clip, rating, teacher)", (clip, float(rating), teacher))

    def rows(self) -> list[Mark]:
        """Marks that stand, oldest first."""
        return self._read("TRUE", ())

    def of(self, clip: int) -> list[Mark]:
        """Marks of a clip that stand, oldest first."""
        return self._read("clip = ?", (clip,))

    def ratings(self) -> list[Rating]:
        """Ratings that stand, oldest first; of one person's of one clip, the last is meant."""
        sql = """SELECT id, clip, rating, teacher FROM ratings WHERE NOT EXISTS
                 (SELECT 1 FROM withdrawals WHERE withdrawals.rating = ratings.id) ORDER BY id"""
        with self._db.reading() as db:
            return [Rating(*row) for row in db.execute(sql)]

    def _read(self, condition: str, values: tuple[int, ...]) -> list[Mark]:
        sql = f"""SELECT id, clip, first, last, good, teacher FROM marks WHERE {condition} AND
                  NOT EXISTS (SELECT 1 FROM withdrawals WHERE mark = marks.id) ORDER BY id"""
        with self._db.reading() as db:
            return [
                Mark(i, of, a, b, bool(good), who)
                for i, of, a, b, good, who in db.execute(sql, values)
            ]

    def _insert(self, table: str, row: tuple[int | float | str, ...]) -> int:
        if not row[-1]:
            raise InvalidInput("teacher: expected the name of who says so, got an empty one.")
        with self._db.transaction() as db:
            if not db.execute("SELECT 1 FROM clips WHERE id = ?", row[:1]).fetchone():
                raise Missing(f"clip: expected a clip in {self._db.path}, got {row[0]}.")
            places = ", ".join("?" * len(row))
            sql = f"INSERT INTO {table} VALUES ({places}) RETURNING id"
            return int(db.execute(sql, row).fetchone()[0])
