"""Queries, comparisons, marks and ratings of a run, as the labelling page needs them."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from active import FeedbackStore
from experiments.labelling.auth import Person
from experiments.offline.people import read_shown
from experiments.training.run_directory import RunDirectory
from rewardmodels import InvalidInput, RewardModelsError

Choice = Literal["left", "right", "same", "unsure", "skip"]
Kind = Literal["answer", "mark", "rating"]

PREFERENCES: Final[dict[Choice, float | None]] = {
    "left": 0.0, "right": 1.0, "same": 0.5, "unsure": None, "skip": None,
}  # fmt: skip
AHEAD: Final = 3  # the query on the screen, and two that the browser loads meanwhile
_REPEAT_GAP: Final = 5  # answers between a query and its repeat, so that it isn't just remembered


class RunGone(RewardModelsError):
    """The run's feedback store was deleted, moved or replaced; nothing more can be saved."""


class Progress(NamedTuple):
    """State of a run, for the people who answer.

    Attributes:
        state: `waiting` for answers, `running` without open queries, `over`, `paused` (no process
            holds the run), `gone`, `unknown` (nothing tells whether a process holds it), or
            `unshown` (its clips can't be drawn here).
        text: What that means for a person.
        command: What to run next in a terminal, or "".
    """

    state: Literal["waiting", "running", "over", "paused", "gone", "unknown", "unshown"]
    text: str
    command: str = ""


class Questions:
    """Feedback store of a run as the page sees it; used by the thread that made it only.

    Args:
        run: Run directory.
        repeat_every: Answers of a person after which one of their queries is repeated; 0: never.
        lease_seconds: Seconds for which a person keeps a query while their page is silent.
    """

    def __init__(self, run: Path, repeat_every: int, lease_seconds: float) -> None:
        self.run = RunDirectory(run)
        self.repeat_every, self.lease_seconds = repeat_every, lease_seconds
        self.store = FeedbackStore(run / "answers.sqlite")
        self.items = read_shown(run)
        self._random = random.Random(0)
        self._frames: dict[int, int] = {}
        self._budget = self.run.settings.get("comparisons")
        self._inode = self.store.path.stat().st_ino

    def check_there(self) -> None:
        """Raise RunGone unless the file that is open is still the run's store."""
        try:
            there = self.store.path.stat().st_ino == self._inode
        except OSError:
            there = False
        if not there:
            raise RunGone(
                f"{self.store.path} was deleted, moved or replaced, so nothing more can be saved. "
                "Start `rewardmodels label` again with the directory of the run."
            )

    def progress(self) -> Progress:
        """State of the run, and what happens next."""
        try:
            self.check_there()
        except RunGone as gone:
            return Progress("gone", str(gone))
        counts, path = self.store.counts(), self.run.path
        waiting = counts.put > counts.answered + counts.skipped
        if self.items:
            text = "Other people have the questions that are left." if waiting else ""
            text = text or "All questions are answered. Fit again, and they count:"
            command = json.loads((path / "fit.json").read_text(encoding="utf-8"))["command"]
            return Progress("waiting" if waiting else "paused", text, "" if waiting else command)
        if (path / "result.json").is_file():
            given = f"{counts.answered} comparison{'s' * (counts.answered != 1)}"
            text = f"The run is over: {given} given. It asks no more; you can close this page."
            return Progress("over", f"{text} What came of it is in {path / 'report.html'}.")
        resume = shlex.join(["rewardmodels", "learn", "--resume", "--out", str(path)])
        held = _is_held(path)
        if held is False:
            text = "The run was stopped. Answers are kept, and count once it is resumed with"
            return Progress("paused", text, resume)
        if self._budget and counts.answered >= self._budget:
            text = "All comparisons are given. The agent trains on with them and asks no more."
        elif waiting:
            text = "Other people have the questions that are left. Come back, or wait for new ones."
        else:
            text = "The agent is training. New questions appear here as it asks them."
        if held is None and self.run.exists:
            return Progress("unknown", f"{text} If it was stopped, resume it with", resume)
        return Progress("unknown" if held is None else "waiting" if waiting else "running", text)

    def state(self, person: Person) -> dict[str, Any]:
        """State of the page: the person's queries, oldest first, and everybody's progress.

        A run that is gone has the key `run` alone.
        """
        progress, ids = self.progress(), []
        if progress.state == "gone":
            return {"run": progress._asdict()}
        if progress.state != "over":
            self._repeat(person)
            ids = self.store.leases.take(person.session, AHEAD, seconds=self.lease_seconds)
        counts, agreement = self.store.counts(), self.store.repeats.agreement()
        return {
            "run": progress._asdict(),
            "queries": [
                {"id": id, "clips": [self._clip(clip, person) for clip in self.store.shown(id)]}
                for id in ids
            ],
            "answered": counts.answered,
            "declined": counts.skipped,
            "budget": self._budget or counts.put,
            "agreement": agreement._asdict(),
            "renew_seconds": self.lease_seconds / 4,
        }

    def first_clips(self) -> list[int]:
        """Clips of the oldest open queries, which the first person will see."""
        queries = self.store.queries(unanswered=True)[:AHEAD]
        return [clip for query in queries for clip in self.store.shown(query.id)]

    def answer(self, person: Person, query: int, choice: Choice, seconds: float) -> int:
        """Store a person's answer to a query that they hold; return its id."""
        return self.store.answer(
            query,
            PREFERENCES[choice],
            self._teacher(person),
            seconds=seconds,
            declined="unsure" if choice == "unsure" else "skip",
            holder=person.session,
        )

    def mark(self, person: Person, query: int, side: int, first: int, last: int, good: bool) -> int:
        """Store a mark on one clip of a query that the person holds; return its id."""
        clip = self._held_clip(person, query, side)
        if last >= (frames := self._length(clip)):
            raise InvalidInput(f"last: expected a frame below the clip's {frames}, got {last}.")
        return self.store.marks.add(clip, first, last, good=good, teacher=self._teacher(person))

    def rate(self, person: Person, query: int, side: int, stars: int) -> int:
        """Store a rating (1 to 5 stars) of a clip of a query that the person holds."""
        clip = self._held_clip(person, query, side)
        return self.store.marks.rate(clip, (stars - 1) / 4, teacher=self._teacher(person))

    def undo(self, person: Person, kind: Kind, id: int) -> int | None:
        """Withdraw the person's feedback; a query that is open again is leased to them."""
        query = self.store.withdraw(kind, id, self._teacher(person))
        if query is not None:
            self.store.leases.grant(query, person.session, seconds=self.lease_seconds)
        return query

    def learning_curve(self) -> list[list[float]]:
        """Comparisons, environment steps and task return of each round that has a return."""
        columns = ["comparisons", "step", "task_return"]
        rows = self.run.metrics.reindex(columns=columns).to_numpy(float)
        return rows[np.isfinite(rows).all(1)].tolist()

    def has_clip(self, clip: int) -> bool:
        """Return True if the store has a clip of this id."""
        try:
            return self._length(clip) > 0
        except InvalidInput:
            return False

    def _teacher(self, person: Person) -> str:
        """Name under which a person's feedback is stored, if it can be."""
        self.check_there()
        if not person.name:
            raise InvalidInput("name: expected a name before the first answer, got none.")
        return person.name

    def _repeat(self, person: Person) -> None:
        if not self.repeat_every or not person.name:
            return
        answered, repeats = self.store.repeats.answered(person.name)
        if answered < self.repeat_every * (repeats + 1):
            return
        if old := self.store.repeats.candidates(person.name)[:-_REPEAT_GAP]:
            again = self.store.repeats.put(self._random.choice(old))
            self.store.leases.grant(again, person.session, seconds=self.lease_seconds)

    def _clip(self, clip: int, person: Person) -> dict[str, Any]:
        marks = [
            {"id": mark.id, "first": mark.first, "last": mark.last, "good": mark.good}
            for mark in self.store.marks.of(clip)
            if mark.teacher == person.name
        ]
        shown = {"id": clip, "frames": self._length(clip), "marks": marks}
        return shown | {"text": self.items[clip]} if clip in self.items else shown

    def _length(self, clip: int) -> int:
        if clip not in self._frames:
            self._frames[clip] = int(self.store.clips([clip]).lengths)
        return self._frames[clip]

    def _held_clip(self, person: Person, query: int, side: int) -> int:
        clips = self.store.shown(query)
        self.store.leases.check(query, person.session)
        return clips[side]


def _is_held(run: Path) -> bool | None:
    """Return whether a process holds a run's lock; None if it has no lock file, or no right."""
    try:
        if not (run / ".lock").is_file():
            return None
        with FileLock(run / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return None
