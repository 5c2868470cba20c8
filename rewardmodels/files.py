"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new path beside `path`, which takes its place once all is written.

    A reader, or a crash, sees the old file or the new one. Where writing fails, or is interrupted,
    the old one stays, and nothing is left beside it.

    Args:
        path: The file; one that stands there is replaced. Its directory exists.

    Raises:
        OSError: What the system raises where the file can't be put in place, or what writing does.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with whole(Path(folder) / "notes.txt") as beside:
        ...         _ = beside.write_text("all of it")
        ...     [file.name for file in Path(folder).iterdir()]
        ['notes.txt']
    """
    path = Path(path)
    # A process number wouldn't do: machines that share a folder may share that too.
    beside = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
