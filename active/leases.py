"""Who is being asked what just now, so that several people answer without being asked the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from active.database import Conflict, Database
from rewardmodels.errors import InvalidInput

SECONDS: Final = 120.0


class Leases:
    """Leases on open queries: each is held by one person until it is answered or runs out.

    A lease that has run out goes to whoever asks next. Times are those of this machine's clock,
    which all processes with the same file share.

    Args:
        db: The open store.
        clock: Seconds since some fixed moment, the same for every process.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from active import FeedbackStore
        >>> from rewardmodels import Clips
        >>> clips = Clips(torch.rand(3, 5, 2), torch.rand(3, 5, 1))
        >>> with FeedbackStore(Path(tempfile.mkdtemp()) / "answers.sqlite") as store:
        ...     _ = store.add_queries(clips, torch.tensor([[0, 1], [1, 2]]), round=0)
        ...     anns, bobs = store.leases.take("ann's tab"), store.leases.take("bob's tab")
        ...     nobodys = store.leases.take("carla's tab")
        ...     store.leases.release("bob's tab")
        ...     anns, bobs, nobodys, store.leases.take("carla's tab")
        ([1], [2], [], [2])
    """

    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = db, clock

    def take(self, holder: str, n: int = 1, *, seconds: float = SECONDS) -> list[int]:
        """Leases open queries, oldest first; those that the holder has are renewed and come first.

        Args:
            holder: Who is asked; one name for one open page.
            n: The most queries that the holder shall have, at least 1.
            seconds: How long the leases hold.

        Returns:
            At most n ids; fewer where fewer are open and free.

        Raises:
            InvalidInput: An empty holder, n below 1, or seconds that aren't positive.
        """
        if not holder:
            raise InvalidInput("holder: expected the name of who is asked, got an empty one.")
        if n < 1:
            raise InvalidInput(f"n: expected at least 1 query, got {n}.")
        if not 0 < seconds < math.inf:
            raise InvalidInput(f"seconds: expected a positive number, got {seconds}.")
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

    def grant(self, query_id: int, holder: str, *, seconds: float = SECONDS) -> None:
        """Leases one query, as after its answer was withdrawn.

        Raises:
            Conflict: Somebody else holds it.
        """
        now = self._clock()
        with self._db.transaction() as db:
            sql = "SELECT holder FROM leases WHERE query = ? AND expires > ? AND holder <> ?"
            if db.execute(sql, (query_id, now, holder)).fetchone():
                raise Conflict(
                    f"query_id: expected a query that is free, got {query_id}, which somebody else "
                    "is being asked."
                )
            row = (query_id, holder, now + seconds)
            db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", row)

    def release(self, holder: str) -> None:
        """Puts a holder's queries back into the queue, as when they leave."""
        with self._db.transaction() as db:
            db.execute("DELETE FROM leases WHERE holder = ?", (holder,))

    def check(self, query_id: int, holder: str) -> None:
        """Raises Conflict unless the holder's lease on a query holds."""
        with self._db.reading() as db:
            sql = "SELECT 1 FROM leases WHERE query = ? AND holder = ? AND expires > ?"
            if not db.execute(sql, (query_id, holder, self._clock())).fetchone():
                raise Conflict(
                    f"query_id: expected a query that is leased to who answers, got {query_id}, "
                    "whose lease has run out or is somebody else's; ask for the next one."
                )
