"""The page of a run, served from a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewardmodels import RewardModelsError


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
    command = [sys.executable, "-m", "experiments.labelling.command", str(run)]
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
