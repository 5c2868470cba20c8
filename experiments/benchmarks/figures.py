"""What every benchmark does with its figures: checks where they may go, prints and writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from experiments.training.run_directory import versions
from rewardmodels import InvalidInput
from rewardmodels.saving import write_text_atomically

# What `make_pool` is given for figures that only show a trend.
QUICK_POOL: Final[dict[str, int]] = {"steps": 20_480, "episodes": 4}


def check_settings(file: Path | None, **counts: int) -> None:
    """Refuses what can't be measured or written, before any work.

    Args:
        file: That `publish` is to write.
        counts: Numbers by name, each at least 1.

    Raises:
        InvalidInput: A number below 1, or a file in no directory.

    Example:
        >>> check_settings(None, seeds=5, jobs=0)
        Traceback (most recent call last):
            ...
        rewardmodels.errors.InvalidInput: jobs: expected a number of at least 1, got 0.
    """
    for name, value in counts.items():
        if value < 1:
            raise InvalidInput(f"{name}: expected a number of at least 1, got {value}.")
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise InvalidInput(f"json: expected a file in a directory that exists, got {file}.")


def publish(figures: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Prints figures and the versions behind them as JSON, and writes the same to a file.

    Args:
        figures: By flat names.
        file: Where to; None only prints.

    Returns:
        The figures, with the versions.
    """
    figures = {**figures, "versions": versions()}
    text = json.dumps(figures, indent=2)
    print(text)
    if file is not None:
        write_text_atomically(Path(file), text + "\n")
    return figures
