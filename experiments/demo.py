"""Everything in a few minutes: an agent that learns from comparisons, beside one that can't."""

from __future__ import annotations

from pathlib import Path


def demo(out: Path = Path("runs/demo")) -> None:
    """X."""
