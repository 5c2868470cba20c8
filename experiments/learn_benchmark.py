"""x."""

from pathlib import Path


def benchmark_learn(quick: bool = False, json: Path | None = None) -> None:
    """X."""
