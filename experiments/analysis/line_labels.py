"""Names of lines written where they end, which reads faster than a legend."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

End = tuple[float, float, str, str]  # where a line ends, and what to write there in which colour


def named(figure: Figure, ends: Mapping[Axes, Sequence[End]]) -> Figure:
    """Name the lines where they end, nudged apart so that no two names overlap."""
    for axes, lines in ends.items():
        axes.set_xlim(0, max(1, *(x for x, *_ in lines)))
        axes.margins(y=0.08)
    figure.draw_without_rendering()  # only now is it known where on the page a value falls
    for axes, each in ends.items():
        lines = _merged(each)
        texts = [textwrap.fill(name, 14) for _, _, name, _ in lines]
        points = 72 / figure.dpi
        at = [points * float(axes.transData.transform((x, y))[1]) for x, y, _, _ in lines]
        placed = spread(at, [7.0 * (1 + text.count("\n")) for text in texts])
        for (x, y, _, colour), text, old, new in zip(lines, texts, at, placed, strict=True):
            axes.annotate(
                text,
                (x, y),
                (8, new - old),
                textcoords="offset points",
                color=colour,
                va="center",
                linespacing=1.0,
                parse_math=False,
                annotation_clip=False,
            )
    return figure


def _merged(ends: Sequence[End]) -> list[End]:
    """One label for all lines of a name, at the mean of their ends."""
    groups: dict[str, list[End]] = {}
    for end in ends:
        groups.setdefault(end[2], []).append(end)
    return [
        (
            max(x for x, *_ in group),
            float(np.mean([y for _, y, *_ in group])),
            name if len(group) == 1 else f"{name}, {len(group)} runs",
            group[0][3],
        )
        for name, group in groups.items()
    ]


def spread(centres: Sequence[float], halves: Sequence[float]) -> list[float]:
    """Move labels along a line, as little as their order allows, until none overlaps the next.

    Args:
        centres: Where each would like to be.
        halves: Half of each one's height, in the same unit.

    Returns:
        Where each goes. Each group that touches is centred on what its members wanted.

    Example:
        >>> spread([0.0, 1.0, 50.0], [5.0, 5.0, 5.0])
        [-4.5, 5.5, 50.0]
    """
    groups: list[tuple[list[int], float, float]] = []  # members, wanted centre, half of the height
    for i in np.argsort(centres, kind="stable").tolist():
        members, centre, half = [i], centres[i], halves[i]
        while groups and groups[-1][1] + groups[-1][2] > centre - half:
            before, _, _ = groups.pop()
            members = before + members
            centre = float(np.mean([centres[j] for j in members]))
            half = sum(halves[j] for j in members)
        groups.append((members, centre, half))
    placed = [0.0] * len(centres)
    for members, centre, half in groups:
        bottom = centre - half
        for i in members:
            placed[i] = bottom + halves[i]
            bottom += 2 * halves[i]
    return placed
