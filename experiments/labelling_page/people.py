"""Learning from people: the teacher who answers on the page, and waiting for what they say."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from active import FeedbackStore, Teacher
from rewardmodels import Clips, InvalidInput, RewardModelsError


@final
class Human(Teacher):
    """People, who answer on the page that `rewardmodels label RUN` serves, in their own time."""

    def answer(
        self, clips: Clips, pairs: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Refuses: people answer queries of a store, for which `wait_for_answers` waits."""
        raise InvalidInput(
            "teacher: expected one who answers at once, got people. Put the queries into a "
            "FeedbackStore, and call experiments.labelling_page.people.wait_for_answers."
        )


def wait_for_answers(
    answers: FeedbackStore,
    round: int,
    *,
    say: Callable[[str], object] = lambda text: None,
    poll_seconds: float = 0.5,
) -> None:
    """Waits until every query of a round is answered or skipped.

    What is taken back meanwhile is waited for again. Ctrl-C ends it, and loses nothing.

    Args:
        answers: The store that the page has open too.
        round: Whose queries.
        say: Is told how many are open, whenever that changes.
        poll_seconds: Between two looks at the store.
    """
    before = -1
    while still := len(answers.queries(round, unanswered=True)):
        if still != before:
            say(f"waiting for {still} answers")
            before = still
        time.sleep(poll_seconds)


@contextmanager
def page_beside(
    run: Path, task: str, *, people: int = 1, repeat_every: int = 10, port: int = 0
) -> Iterator[list[str]]:
    """Serves the page of a run from a process of its own, until the block ends.

    Args:
        run: The run's directory.
        task: Of which its clips are.
        people: As of `label`.
        repeat_every: As of `label`.
        port: As of `label`.

    Yields:
        The links that open it, each in one browser.

    Raises:
        RewardModelsError: It didn't start; what it said stands on standard error.
    """
    command = [sys.executable, "-m", "experiments.labelling_page.command", str(run)]
    settings = {"task": task, "people": people, "repeat_every": repeat_every, "port": port}
    command += [f"--{name}={value}" for name, value in settings.items()]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        links = [server.stdout.readline().strip() for _ in range(people)]
        if not all(links):
            raise RewardModelsError("label: expected the page's address, got none; see above.")
        yield links
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()
