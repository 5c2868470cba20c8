"""What the page asks of the store: hand out queries, take answers, marks and ratings, take back."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from active import FeedbackStore
from active.leases import SECONDS
from experiments.labelling.gate import Person
from rewardmodels import InvalidInput, UnreadableFile

Choice = Literal["left", "right", "same", "unsure", "skip"]
Kind = Literal["answer", "mark", "rating"]

AHEAD: Final = 3  # the query on the screen, and those that the browser loads meanwhile
_SAID: Final[dict[Choice, float | None]] = {
    "left": 0.0, "right": 1.0, "same": 0.5, "unsure": None, "skip": None,
}  # fmt: skip
_LET_PASS: Final = 5  # answers between a query and its repeat, so that it isn't simply remembered


class Desk:
    """The store as the page sees it; belongs to the thread that made it.

    Args:
        run: The run's directory.
        repeat_every: Answers of a person after which one of their queries is put once more; 0 for
            never.
        lease_seconds: How long somebody keeps a query whose page gives no sign of life.
        seed: Of which queries are repeated.
    """

    def __init__(
        self, run: Path, repeat_every: int, lease_seconds: float = SECONDS, *, seed: int = 0
    ) -> None:
        self.run, self.repeat_every, self.lease_seconds = run, repeat_every, lease_seconds
        self.store = FeedbackStore(run / "answers.sqlite")
        self._random = random.Random(seed)
        self._frames: dict[int, int] = {}
        self._budget = settings(run).get("comparisons")

    def close(self) -> None:
        """Closes the store."""
        self.store.close()

    def next(self, person: Person) -> dict[str, Any]:
        """What the page shows: a person's queries, oldest first, and how far everybody is."""
        self._repeat(person)
        ids = self.store.leases.take(person.session, AHEAD, seconds=self.lease_seconds)
        counts, agreement = self.store.counts(), self.store.repeats.agreement()
        return {
            "queries": [self._query(query, person) for query in ids],
            "answered": counts.answered,
            "declined": counts.skipped,
            "budget": self._budget or counts.put,
            "agreement": agreement._asdict(),
            "renew_seconds": self.lease_seconds / 4,
        }

    def first_clips(self) -> list[int]:
        """Clips that the first person to come will be shown."""
        return self._clips([query.id for query in self.store.queries(unanswered=True)[:AHEAD]])

    def answer(self, person: Person, query: int, choice: Choice, seconds: float) -> int:
        """Stores an answer to a query that the person holds."""
        return self.store.answer(
            query,
            _SAID[choice],
            _name(person),
            seconds=seconds,
            declined="unsure" if choice == "unsure" else "skip",
            holder=person.session,
        )

    def mark(self, person: Person, query: int, side: int, first: int, last: int, good: bool) -> int:
        """Stores a mark on one clip of a query that the person holds."""
        clip = self._held(person, query, side)
        if last >= self._length(clip):
            raise InvalidInput(
                f"last: expected a frame of the clip's {self._length(clip)}, got {last}."
            )
        return self.store.marks.add(clip, first, last, good=good, teacher=_name(person))

    def rate(self, person: Person, query: int, side: int, stars: int) -> int:
        """Stores a rating, of 1 to 5 stars, of one clip of a query that the person holds."""
        clip = self._held(person, query, side)
        return self.store.marks.rate(clip, (stars - 1) / 4, teacher=_name(person))

    def undo(self, person: Person, kind: Kind, id: int) -> int | None:
        """Takes back what the person said; a query that is open again is theirs."""
        query = self.store.withdraw(kind, id, _name(person))
        if query is not None:
            self.store.leases.grant(query, person.session, seconds=self.lease_seconds)
        return query

    def leave(self, person: Person) -> None:
        """Puts a person's queries back."""
        self.store.leases.release(person.session)

    def learned(self) -> list[list[float]]:
        """The learning curve: comparisons, steps and true return of each round."""
        return list(_curve(self.run / "metrics.csv"))

    def knows(self, clip: int) -> bool:
        """Whether there is such a clip."""
        try:
            return self._length(clip) > 0
        except InvalidInput:
            return False

    def _repeat(self, person: Person) -> None:
        if not self.repeat_every or not person.name:
            return
        answered, repeats = self.store.repeats.answered(person.name)
        if answered < self.repeat_every * (repeats + 1):
            return
        if old := self.store.repeats.candidates(person.name)[:-_LET_PASS]:
            again = self.store.repeats.put(self._random.choice(old))
            self.store.leases.grant(again, person.session, seconds=self.lease_seconds)

    def _query(self, query: int, person: Person) -> dict[str, Any]:
        return {"id": query, "clips": [self._clip(c, person) for c in self.store.shown(query)]}

    def _clip(self, clip: int, person: Person) -> dict[str, Any]:
        mine = [mark for mark in self.store.marks.of(clip) if mark.teacher == person.name]
        marks = [{"id": m.id, "first": m.first, "last": m.last, "good": m.good} for m in mine]
        return {"id": clip, "frames": self._length(clip), "marks": marks}

    def _clips(self, queries: list[int]) -> list[int]:
        return [clip for query in queries for clip in self.store.shown(query)]

    def _length(self, clip: int) -> int:
        if clip not in self._frames:
            self._frames[clip] = int(self.store.clips([clip]).lengths)
        return self._frames[clip]

    def _held(self, person: Person, query: int, side: int) -> int:
        clips = self.store.shown(query)
        self.store.leases.check(query, person.session)
        return clips[side]


def settings(run: Path) -> dict[str, Any]:
    """The settings that a run was started with; none where `learn` didn't make it.

    Raises:
        UnreadableFile: They are damaged.
    """
    file = run / "config.yaml"
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UnreadableFile(f"{file}: expected the settings of a run, got {error}.") from error
    return found if isinstance(found, dict) else {}


def _curve(file: Path) -> Iterator[list[float]]:
    if not file.is_file():
        return
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            try:
                point = [float(row[name]) for name in ("comparisons", "step", "task_return")]
            except (KeyError, ValueError, TypeError):
                continue  # a round in which no episode ended
            if all(map(math.isfinite, point)):
                yield point


def _name(person: Person) -> str:
    if not person.name:
        raise InvalidInput("name: expected your name first, got none.")
    return person.name
