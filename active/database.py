"""The feedback store's file: opening it without harming what isn't ours, and writing it whole."""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from active.schema import STEPS
from rewardmodels.errors import InvalidInput, UnreadableFile

VERSION: Final = len(STEPS)
APPLICATION: Final = 0x52574D46  # "RWMF" in the file's header: what tells our files from others

_MAGIC: Final = b"SQLite format 3\x00"


class Missing(InvalidInput):
    """Something was asked about, by its id, that isn't in the store."""


class Conflict(InvalidInput):
    """Somebody was quicker, or it was done already; nothing was changed."""


class Database:
    """An open feedback store: its connection, and transactions that are all or nothing.

    Args:
        path: The file; made if there is none (or an empty one), brought up to date if it is of
            an earlier version.

    Raises:
        InvalidInput: A folder that doesn't exist.
        UnreadableFile: Not a feedback store of this version or an earlier one, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection = connect(path)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Writes everything in the block, or nothing; on disk when the block ends."""
        with refuse_damage(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Reads, with damage said in our words."""
        with refuse_damage(self.path):
            yield self.connection

    def know(self, query_id: int) -> tuple[int, int]:
        """Ids of the first and second clip of a query.

        Raises:
            Missing: An unknown query.
        """
        with self.reading() as db:
            sql = "SELECT first, second FROM queries WHERE id = ?"
            found = db.execute(sql, (query_id,)).fetchone()
        if found is None:
            raise Missing(
                f"query_id: expected a query in {self.path}, got {query_id}, which isn't."
            )
        return int(found[0]), int(found[1])


def connect(path: Path) -> sqlite3.Connection:
    """Opens or makes a feedback store.

    A file that exists is first looked at through a connection that cannot write.

    Raises:
        InvalidInput: A folder that doesn't exist.
        UnreadableFile: Not a feedback store of this version or an earlier one, or damaged.
    """
    if not path.parent.is_dir():
        raise InvalidInput(f"path: expected a file in an existing folder, got {path}.")
    # A rollback journal is what a process killed while making the file leaves behind; SQLite
    # takes it back on the first connection that may write, and the rest is then as usual.
    interrupted = path.with_name(path.name + "-journal").exists()
    if path.exists() and path.stat().st_size > 0 and not interrupted:
        _look(path)
    with refuse_damage(path):
        db = _open(path, "rwc")
        try:
            _bring_up_to_date(db)
            if interrupted:
                _check(path, db)
            db.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            db.close()
            raise
    return db


@contextmanager
def refuse_damage(path: Path) -> Iterator[None]:
    """Turns SQLite's word for a damaged or foreign file into UnreadableFile."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        raise _damaged(path, str(error)) from error


def _look(path: Path) -> None:
    """Checks a file without writing to it or beside it."""
    while True:
        before = _state(path)
        try:
            with path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise _damaged(path, "file is not a database")
            with refuse_damage(path):
                # Nobody has a file open that has no log beside it; SQLite may then be told that
                # it won't change, and leaves no files of its own.
                looking = _open(path, "ro" if before.has_log else "ro&immutable=1")
                try:
                    _check(path, looking)
                finally:
                    looking.close()
            return
        except UnreadableFile:
            # What looks torn may be another process's write, which a second look finds whole.
            if _state(path) == before:
                raise


class _State(NamedTuple):
    modified_ns: int
    has_log: bool


def _state(path: Path) -> _State:
    return _State(path.stat().st_mtime_ns, path.with_name(path.name + "-wal").exists())


def _open(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    # Transactions are ours to begin and end, so that none is ever open by accident.
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA synchronous = FULL")
    return db


def _bring_up_to_date(db: sqlite3.Connection) -> None:
    """Takes the steps from the file's version to ours, all or nothing, whoever comes first."""
    db.execute("BEGIN IMMEDIATE")
    try:
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            db.execute(f"PRAGMA application_id = {APPLICATION}")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version < VERSION:
            for statement in (s for step in STEPS[version:] for s in step):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _check(path: Path, db: sqlite3.Connection) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION:
        raise UnreadableFile(
            f"{path}: expected a feedback store, got an SQLite database of another kind "
            f"(application id {application}). It was left as it was; choose another path."
        )
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise UnreadableFile(
            f"{path}: expected schema version {VERSION} or earlier, got {version}, written by a "
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
