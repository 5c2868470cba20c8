"""Teachers who aren't functions of two clips: people at the page, and answers once recorded."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

from active import Annotator, FeedbackStore, Query, import_feedback
from rewardmodels import InvalidInput

_LOOK_EVERY: Final = 0.5  # seconds between looks at the store while waiting


@final
class Human(Annotator):
    """People, who answer in their own time on the page that `rewardmodels label RUN` serves.

    Queries and answers meet in the run's `answers.sqlite`, which both commands have open; either
    may be stopped and started again. As many queries stand open as answers are due. Training
    waits for the answers that are due before it begins (the schedule's initial share); after that
    it goes on with those that there are.

    Args:
        patience: Share of the answers due in a later round, from 0 to 1, that its training waits
            for as well. Simulators are quick: at 0 a run may be over before the budget is spent.

    Raises:
        InvalidInput: A patience outside [0, 1].
    """

    def __init__(self, patience: float = 0.0) -> None:
        if not 0 <= patience <= 1:
            raise InvalidInput(f"patience: expected a share from 0 to 1, got {patience}.")
        self.patience = patience

    def ask(
        self,
        store: FeedbackStore,
        due: int,
        put: Callable[[int], None],
        tell: Callable[[str], None],
        *,
        first: bool,
    ) -> None:
        """Keeps as many queries open as answers are missing, and waits for what must be there.

        A query that somebody skips is replaced, by the next round at the latest.

        Args:
            store: Where queries and answers meet.
            due: Answers that there should be by now.
            put: Puts so many more queries.
            tell: Shown while waiting: for what, and the command to answer with.
            first: Whether this is before the policy is trained at all, when all have to be there.
        """
        needed = due if first else int(self.patience * due)
        while True:
            counts = store.counts()
            still_open = counts.put - counts.answered - counts.skipped
            if (missing := due - counts.answered - still_open) > 0:
                put(missing)
            if counts.answered >= needed:
                return
            page = shlex.join(["rewardmodels", "label", str(store.path.parent)])
            tell(f"waiting for {needed - counts.answered} answers: {page}")
            time.sleep(_LOOK_EVERY)


@final
class Replay(Annotator):
    """Answers that were recorded: a run's `answers.sqlite`, or what `export_feedback` wrote.

    Another policy comes by other clips, about which nobody has said anything. So the recorded
    queries themselves are put, in their order and with the answers that they got, as many in each
    round as are due; strategies have no say. Those that were skipped or never answered are passed
    over, and when all have been put nothing more is asked.

    Args:
        file: The store's file, or the folder of an export.

    Raises:
        InvalidInput: There is no such file or folder.

    Example:
        >>> import torch
        >>> from rewardmodels import Clips
        >>> folder = Path(tempfile.mkdtemp())
        >>> clips, pairs = Clips(torch.rand(3, 5, 2), torch.rand(3, 5, 1)), [[0, 1], [1, 2], [2, 0]]
        >>> with FeedbackStore(folder / "recorded.sqlite") as store:
        ...     ids = store.add_queries(clips, torch.tensor(pairs), round=0)
        ...     for query, said in zip(ids, (1.0, None, 0.5)):
        ...         _ = store.answer(query, said, "ann")
        >>> with FeedbackStore(folder / "answers.sqlite") as store:
        ...     Replay(folder / "recorded.sqlite").ask(store, due=10, round=0)
        ...     [(query.teacher, query.preference) for query in store.queries()]
        [('ann', 1.0), ('ann', 0.5)]
    """

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        if not self.file.exists():
            raise InvalidInput(
                f"file: expected an answers.sqlite or the folder of an export, got {file}, which "
                "isn't there."
            )

    def check(self, observation: Sequence[int] | None, action: Sequence[int] | None) -> None:
        """Refuses a recording that a task can't be learned from.

        Args:
            observation: Shape of the task's observations; None doesn't look at them.
            action: Shape of the task's actions.

        Raises:
            InvalidInput: Nothing was answered in it, or its clips are of another task.
            UnreadableFile: It is damaged.
        """
        with self._recorded() as (store, answered):
            if not answered:
                raise InvalidInput(f"file: expected recorded answers, got {self.file} without any.")
            clips, _ = store.clips_of([answered[0].id])
        for name, wanted in (("observations", observation), ("actions", action)):
            came = tuple(getattr(clips, name).shape[2:])
            if wanted is not None and came != tuple(wanted):
                raise InvalidInput(
                    f"file: expected clips whose {name} have the task's shape {tuple(wanted)}, got "
                    f"{came} in {self.file}; pass the task that it was recorded on."
                )

    def ask(self, store: FeedbackStore, due: int, round: int) -> None:
        """Puts the next recorded queries into a store, with their answers.

        Args:
            store: Of the run; it holds what was replayed before, and nothing else.
            due: Answers that there should be by now.
            round: Which round of asking this is.

        Raises:
            UnreadableFile: A damaged recording.
        """
        with self._recorded() as (recorded, answered):
            if more := [query.id for query in answered[len(store.queries()) : due]]:
                clips, pairs = recorded.clips_of(more)
                store.add_queries(clips, pairs, round=round)
        # All of them, for a run may have been killed between a query and its answer.
        for query, said in zip(store.queries(), answered, strict=False):
            if query.teacher is None:
                store.answer(query.id, said.preference, str(said.teacher))

    @contextmanager
    def _recorded(self) -> Iterator[tuple[FeedbackStore, list[Query]]]:
        """The open recording, and its queries that have a preference."""
        with tempfile.TemporaryDirectory() as folder:
            file = self.file
            if file.is_dir():
                file = Path(folder) / "recorded.sqlite"
                import_feedback(self.file, file)
            with FeedbackStore(file) as store:
                yield store, [query for query in store.queries() if query.preference is not None]


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """A command line in which `--teacher human` and `--teacher replay FILE` name their classes.

    Raises:
        InvalidInput: Nothing to replay.

    Example:
        >>> spelled_out(["--teacher", "replay", "answers.sqlite", "--seed", "1"])[1:]
        ['experiments.people.Replay', '--teacher.file', 'answers.sqlite', '--seed', '1']
    """
    words = [part for word in arguments for part in _apart(word)]
    for at, name in enumerate(words[1:], 1):
        if words[at - 1] == "--teacher" and name in _SHORT:
            if name == "replay" and (at + 1 == len(words) or words[at + 1].startswith("-")):
                raise InvalidInput("teacher: expected a file after replay, got none.")
            words[at : at + 1] = _SHORT[name]
            break
    return words


def _apart(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--teacher=") else [word]


# What follows `replay` is its file.
_SHORT: Final = {
    "human": [f"{__name__}.Human"],
    "replay": [f"{__name__}.Replay", "--teacher.file"],
}
