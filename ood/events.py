"""What a guard did and why, as lines of JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

Kind = Literal["alarm", "halt", "ask", "fallback", "hand back", "answer", "failure"]


@dataclass(frozen=True)
class Event:
    """One thing that a guard did.

    Args:
        kind: What; "failure" is a halt because something broke.
        environment: Which of several, from 0.
        episode: Which of that environment's episodes, from 0.
        step: Steps since the episode's start.
        score: The detector's; NaN where there is none.
        statistic: What the scores added up to.
        threshold: What it had to exceed.
        reason: In words, why.
        time: When, UTC, ISO 8601; now unless given.
    """

    kind: Kind
    environment: int
    episode: int
    step: int
    score: float
    statistic: float
    threshold: float
    reason: str
    time: str = ""

    def __post_init__(self) -> None:
        if not self.time:
            object.__setattr__(self, "time", datetime.now(UTC).isoformat(timespec="milliseconds"))


class EventLog:
    """Appends events to a file, one line of JSON each, at once, so that a crash loses none.

    JSON has no infinity and no NaN: both are null.

    Args:
        path: The file; made, with its folder, at the first event.

    Example:
        >>> import tempfile
        >>> log = EventLog(Path(tempfile.mkdtemp()) / "guard.jsonl")
        >>> log(Event("halt", 0, 0, 7, 3.0, float("inf"), 5.0, "NaN in observation[0]"))
        >>> [(event["kind"], event["statistic"]) for event in log.read()]
        [('halt', None)]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, event: Event) -> None:
        """Appends one.

        Raises:
            OSError: The file can't be written.
        """
        fields = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(event).items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All events so far, none where there is no file."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
