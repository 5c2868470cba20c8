"""What is refused before any work: numbers that are too small, and tasks that can't serve."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.envs.tasks import find_task
from rewardmodels.errors import InvalidInput


def check_least(*limits: tuple[str, int, int]) -> None:
    """Refuses the first number that is too small.

    Args:
        limits: Of each number its name, what it is, and the least that it may be.

    Raises:
        InvalidInput: One is smaller.

    Example:
        >>> check_least(("seeds", 5, 1), ("jobs", 0, 1))
        Traceback (most recent call last):
            ...
        rewardmodels.errors.InvalidInput: jobs: expected at least 1, got 0.
    """
    for name, value, least in limits:
        if value < least:
            raise InvalidInput(f"{name}: expected at least {least}, got {value}.")


def check_tasks(tasks: Sequence[str], length: int) -> None:
    """Refuses tasks that there aren't, or whose episodes are shorter than clips are to be.

    Args:
        tasks: Any that `find_task` knows.
        length: Frames per clip.

    Raises:
        UnknownName: There is no such task.
        InvalidInput: A task without a time limit, or with a shorter one.

    Example:
        >>> check_tasks(["Hopper", "Pendulum"], length=500)
        Traceback (most recent call last):
            ...
        rewardmodels.errors.InvalidInput: length: expected at most the 200 frames of an episode of
        Pendulum, got 500.
    """
    for task in tasks:
        horizon = find_task(task).horizon
        if length > horizon:
            raise InvalidInput(
                f"length: expected at most the {horizon} frames of an episode of {task}, got "
                f"{length}."
            )
