"""The feedback store as plain files, CSV or Parquet, and back."""

from __future__ import annotations

import csv
import hashlib
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Literal, get_args

from active.database import Database
from rewardmodels.errors import InvalidInput, UnknownName, UnreadableFile
from rewardmodels.saving import atomic_path

Format = Literal["csv", "parquet"]

# Each after those that it refers to.
_TABLES: Final = ("clips", "queries", "answers", "marks", "ratings", "withdrawals")
_TYPES: Final[dict[str, Callable[[str], Any]]] = {"INTEGER": int, "REAL": float, "TEXT": str}
Row = tuple[Any, ...]


def export_feedback(store: Path, folder: Path, format: Format = "csv") -> None:
    """Writes everything people said, and what they were shown, to files that any tool reads.

    A table each of clips, queries, answers, marks, ratings and withdrawals, one row for each,
    withdrawn ones too; and `clips/`, a safetensors file for each clip, named by its SHA-256.

    Args:
        store: The feedback store's file.
        folder: Where to write; made if it isn't there.
        format: `csv`, or `parquet`, which takes pyarrow.

    Raises:
        InvalidInput: No such store, a folder that holds something, or no pyarrow.
        UnreadableFile: A damaged store.

    Example:
        >>> import tempfile, torch
        >>> from active import FeedbackStore
        >>> from rewardmodels import Clips
        >>> folder = Path(tempfile.mkdtemp())
        >>> with FeedbackStore(folder / "answers.sqlite") as store:
        ...     clips = Clips(torch.rand(2, 5, 2), torch.rand(2, 5, 1))
        ...     (query,) = store.add_queries(clips, torch.tensor([[0, 1]]), round=0)
        ...     _ = store.answer(query, 1.0, "ann")
        >>> export_feedback(folder / "answers.sqlite", folder / "said")
        >>> import_feedback(folder / "said", folder / "again.sqlite")
        >>> with FeedbackStore(folder / "again.sqlite") as store:
        ...     store.counts()
        Counts(put=1, answered=1, skipped=0)
    """
    write = {"csv": _write_csv, "parquet": _write_parquet}.get(format)
    if write is None:
        raise UnknownName("format", format, get_args(Format))
    if not store.is_file():
        raise InvalidInput(f"store: expected a feedback store's file, got {store}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"folder: expected a new or an empty folder, got {folder}.")
    if format == "parquet":
        _arrow()
    file = Database(store)
    with closing(file.connection), file.reading() as db:
        db.execute("BEGIN")  # one moment of the store, whatever is answered meanwhile
        (folder / "clips").mkdir(parents=True)
        for digest, blob in db.execute("SELECT DISTINCT sha256, data FROM clips"):
            (folder / "clips" / f"{digest.hex()}.safetensors").write_bytes(blob)
        for table in _TABLES:
            columns = _columns(db, table)
            sql = f"SELECT {', '.join(columns)} FROM {table} ORDER BY id"
            rows: Iterable[Row] = db.execute(sql)
            if table == "clips":
                rows = [(i, digest.hex(), twin) for i, digest, twin in rows]
            write(folder / f"{table}.{format}", columns, rows)
        db.execute("ROLLBACK")


def import_feedback(folder: Path, store: Path) -> None:
    """Makes a feedback store of what `export_feedback` wrote, the same in every table.

    Args:
        folder: That it wrote.
        store: The new store's file.

    Raises:
        InvalidInput: A file that is there already, or a folder that isn't an export.
        UnreadableFile: An export that is damaged; no store is made then.
    """
    if store.exists():
        raise InvalidInput(f"store: expected a new file, got {store}, which is there.")
    if not store.parent.is_dir():
        raise InvalidInput(f"store: expected a file in an existing folder, got {store}.")
    format = next((f for f in get_args(Format) if (folder / f"clips.{f}").is_file()), None)
    if format is None:
        raise InvalidInput(f"folder: expected what export_feedback wrote, got {folder}.")
    read = _read_csv if format == "csv" else _read_parquet
    # It appears under its name only once it is whole.
    try:
        # A rename would overwrite what has come meanwhile.
        with atomic_path(store, overwrite=False) as part:
            file = Database(part)
            with closing(file.connection):
                # Ids and times come as they were, in an order that the trigger against second
                # answers couldn't know: withdrawals are read last.
                with file.transaction() as db:
                    (trigger,) = db.execute(
                        "SELECT sql FROM sqlite_master WHERE name = 'one_stands'"
                    )
                    db.execute("DROP TRIGGER one_stands")
                    for table in _TABLES:
                        columns = _columns(db, table)
                        rows = read(folder / f"{table}.{format}", columns)
                        if table == "clips":
                            columns = {**columns, "data": "BLOB"}
                            rows = (_with_data(folder, row) for row in rows)
                        places = ", ".join("?" * len(columns))
                        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})"
                        db.executemany(sql, rows)
                    db.execute(trigger[0])
                    sql = "SELECT query FROM standing GROUP BY query HAVING count(*) > 1"
                    if twice := db.execute(sql).fetchone():
                        raise ValueError(f"query {twice[0]} has two answers that stand")
                file.connection.execute("PRAGMA journal_mode = DELETE")  # one file, to be moved
    except (OSError, ValueError, KeyError, TypeError, sqlite3.Error) as error:
        raise UnreadableFile(f"{folder}: expected a whole export, got {error!r}.") from error


def _with_data(folder: Path, row: Row) -> Row:
    number, digest, twin = row
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"clip {number} has no SHA-256")  # which is about to be a file's name
    blob = (folder / "clips" / f"{digest}.safetensors").read_bytes()
    if hashlib.sha256(blob).hexdigest() != digest:
        raise ValueError(f"the file of clip {number} has changed")
    return number, bytes.fromhex(digest), twin, blob


def _columns(db: Any, table: str) -> dict[str, str]:
    """Types by name; a clip's bytes stand in a file of their own, its digest is text."""
    listed = {row[1]: row[2] for row in db.execute(f"PRAGMA table_info({table})")}
    return {"id": "INTEGER", "sha256": "TEXT", "twin": "INTEGER"} if table == "clips" else listed


def _write_csv(path: Path, columns: dict[str, str], rows: Iterable[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _read_csv(path: Path, columns: dict[str, str]) -> Iterable[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, strict=True):
            # No text of ours is ever empty, so an empty field can only be a null.
            yield tuple(
                _TYPES[kind](row[name]) if row[name] else None for name, kind in columns.items()
            )


def _write_parquet(path: Path, columns: dict[str, str], rows: Iterable[Row]) -> None:
    arrow, parquet = _arrow()
    types = {"INTEGER": arrow.int64(), "REAL": arrow.float64(), "TEXT": arrow.string()}
    values = list(zip(*rows, strict=True)) or [()] * len(columns)
    arrays = [arrow.array(v, types[k]) for v, k in zip(values, columns.values(), strict=True)]
    parquet.write_table(arrow.table(arrays, names=list(columns)), path)


def _read_parquet(path: Path, columns: dict[str, str]) -> Iterable[Row]:
    _, parquet = _arrow()
    table = parquet.read_table(path)
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidInput(
            "format: expected pyarrow to be installed for parquet, got none; "
            "pip install 'rewardmodels[parquet]' brings it."
        ) from error
    return pyarrow, pyarrow.parquet
