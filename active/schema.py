"""The feedback store's tables, as the steps that lead from each version of them to the next.

What people said is only ever added to: triggers refuse to change or delete it. An answer, a mark
or a rating that is taken back gets a row in `withdrawals`, and stays. Leases say who is being
asked what just now; they are nobody's data, and come and go.
"""

from __future__ import annotations

from typing import Final

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
    # Once withdrawn, a query may be answered again: no more than one answer to it stands.
    "DROP INDEX answer_once",
    "CREATE INDEX answer_query ON answers (query)",
    """CREATE TRIGGER one_stands BEFORE INSERT ON answers
        WHEN EXISTS (SELECT 1 FROM standing WHERE query = NEW.query)
        BEGIN SELECT RAISE(ABORT, 'the query has an answer that stands'); END""",
    *_append_only("marks", "ratings", "withdrawals"),
)

STEPS: Final = (_CLIPS_QUERIES_ANSWERS, _PEOPLE)
