"""Queries put a second time, to see whether answers agree."""

from __future__ import annotations

from typing import NamedTuple

from active.database import Conflict, Database


class Agreement(NamedTuple):
    """How many repeated queries were answered, and to how many the answer was the same."""

    same: int
    repeated: int


class Repeats:
    """Repeats of queries, each with its clips the other way round, so that sides don't help.

    They are leased and answered like any query, and are in no list, count or comparison.

    Args:
        db: The open store.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def put(self, query_id: int) -> int:
        """Puts a query once more.

        Returns:
            The repeat's id.

        Raises:
            Missing: An unknown query.
            Conflict: It was repeated already, or is itself a repeat.
        """
        with self._db.transaction() as db:
            self._db.know(query_id)
            sql = "SELECT 1 FROM queries WHERE repeats = :id OR id = :id AND repeats IS NOT NULL"
            if db.execute(sql, {"id": query_id}).fetchone():
                raise Conflict(f"query_id: expected one never repeated, got {query_id}.")
            sql = """INSERT INTO queries (round, first, second, repeats)
                     SELECT round, second, first, id FROM queries WHERE id = ? RETURNING id"""
            return int(db.execute(sql, (query_id,)).fetchone()[0])

    def candidates(self, teacher: str) -> list[int]:
        """Queries that a teacher gave a preference on, never repeated, in order of the answers."""
        sql = """SELECT query FROM standing JOIN queries ON queries.id = query
                 WHERE teacher = ? AND preference IS NOT NULL AND repeats IS NULL
                 AND query NOT IN (SELECT repeats FROM queries WHERE repeats IS NOT NULL)
                 ORDER BY standing.id"""
        with self._db.reading() as db:
            return [int(row[0]) for row in db.execute(sql, (teacher,))]

    def answered(self, teacher: str) -> tuple[int, int]:
        """How many queries a teacher has answered, and how many repeats were made of them."""
        sql = """SELECT count(*), count(again.id) FROM standing
                 JOIN queries ON queries.id = query AND queries.repeats IS NULL
                 LEFT JOIN queries AS again ON again.repeats = queries.id WHERE teacher = ?"""
        with self._db.reading() as db:
            first, again = db.execute(sql, (teacher,)).fetchone()
        return int(first), int(again)

    def agreement(self) -> Agreement:
        """Of the repeated queries with a preference both times, to how many it was the same."""
        sql = """SELECT coalesce(sum(abs(one.preference + two.preference - 1) < 1e-9), 0), count(*)
                 FROM queries JOIN standing AS one ON one.query = queries.repeats
                 JOIN standing AS two ON two.query = queries.id
                 WHERE one.preference IS NOT NULL AND two.preference IS NOT NULL"""
        with self._db.reading() as db:
            return Agreement(*db.execute(sql).fetchone())
