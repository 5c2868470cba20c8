"""The page that a study leaves: what was found, how sure it is, and how to repeat it.

A study makes `Section`s, each with sentences computed from the numbers, and calls `write_report`
once. Figures come out as PDF and SVG, tables as Markdown, and all of it as one page.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.analysis.page import inline
from experiments.analysis.plots import BLUE, INK, ORANGE, save
from experiments.grid import read_cell
from experiments.studies.summary import Row, markdown
from experiments.training.run_directory import versions
from rewardmodels.errors import InvalidInput
from rewardmodels.saving import write_text_atomically

LEAST_SEEDS = 5
"""With fewer, no sentence claims a difference."""

COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#b58900", "#7f3c8d", INK, "#56b4e9")
"""Apart for every kind of colour vision (mostly Okabe & Ito's)."""

# Settings of a study on which no figure depends: how it is computed, and where from and to.
_HOW, _WHERE = ("jobs", "backend", "address", "compute"), ("pools", "out")

# What the page calls those that a page of `learn` has no second value for, in dark mode.
_INKS = {
    "#009e73": "green",
    "#cc79a7": "pink",
    "#b58900": "yellow",
    "#7f3c8d": "purple",
    "#56b4e9": "sky",
}


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of a row names it.

    Args:
        header: Names of the columns; the first is mostly empty.
        rows: As many cells each.

    Raises:
        InvalidInput: A row of another length.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise InvalidInput(
                    f"rows: expected {len(self.header)} cells in each, as the header has, got "
                    f"{len(row)} in {list(row)}."
                )


@dataclass(frozen=True)
class Section:
    """A part of a report, under its own heading.

    Args:
        title: Different from every other section's, since files are named after it.
        sentences: What the figure or table shows and how sure that is, from the numbers.
        figure: Drawn in `experiments.analysis.figures.STYLE`, in `COLOURS`; None for none.
        table: None for none.

    Example:
        >>> Section("On Hopper, in all", ["BALD saves."]).name
        'on-hopper-in-all'
    """

    title: str
    sentences: Sequence[str]
    figure: Figure | None = None
    table: Table | None = None

    @property
    def name(self) -> str:
        """Of the figure's files, without an ending."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower().replace("'", "")).strip("-")


@dataclass(frozen=True)
class About:
    """How a study was made; `about_cells` fills in what its directory knows.

    Args:
        command: That makes it again.
        seeds: How many, the folds of people's answers among them.
        settings: By name, everything that decides a figure.
        versions: By package.
        seconds: Of all cells, one after the other; None where that isn't known.
    """

    command: str
    seeds: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=versions)
    seconds: float | None = None


def about_cells(
    rows: Iterable[Row], cells: Path, *, command: str, seeds: int, settings: Mapping[str, Any]
) -> About:
    """What is to be said of rows that `experiments.grid` computed.

    Args:
        rows: A cell's settings and its result in one, `{**cell, **result}`. Others that stand in
            the directory, of another grid, don't count.
        cells: The directory that `run_study` was given.
        command: As `About` has it.
        seeds: As `About` has it.
        settings: As `About` has it.
    """
    wanted = {json.dumps(row, sort_keys=True, default=str) for row in rows}
    seconds, found = 0.0, dict[str, dict[str, None]]()
    for file in sorted(cells.glob(f"{'?' * 20}.json")):
        if (record := read_cell(file)) is None:
            continue
        if json.dumps({**record["cell"], **record["result"]}, sort_keys=True) in wanted:
            seconds += record["seconds"]
            for package, version in record.get("versions", {}).items():
                found.setdefault(package, {})[version] = None
    told = {package: " and ".join(several) for package, several in found.items()}
    return About(command, seeds, settings, told or versions(), seconds or None)


def about_study(
    study: Callable[..., Any], settings: Mapping[str, Any], rows: Iterable[Row], out: Path
) -> About:
    """The same from the study's function, `study_marks` for `rewardmodels study marks`.

    Args:
        study: Its defaults are left out of the command.
        settings: That it was called with; one of them is `seeds`.
        rows: As of `about_cells`.
        out: Where the study left them.
    """
    usual = inspect.signature(study).parameters
    told = {name: value for name, value in settings.items() if name not in _HOW}
    flags = {name: value for name, value in told.items() if value != usual[name].default}
    return about_cells(
        rows,
        out / "cells",
        command=command_line(study.__name__.replace("_", " "), flags),
        seeds=settings["seeds"],
        settings={name: value for name, value in told.items() if name not in _WHERE},
    )


def command_line(words: str, flags: Mapping[str, Any]) -> str:
    """A command as a shell takes it; flags that are None are left out.

    Example:
        >>> command_line("study strategies", {"tasks": ["Hopper"], "data": None, "seeds": 3})
        "rewardmodels study strategies --tasks '[Hopper]' --seeds 3"
    """
    given = ["rewardmodels", *words.split()]
    for name, value in flags.items():
        if value is not None:
            listed = isinstance(value, list | tuple)
            text = f"[{','.join(map(str, value))}]" if listed else str(value)
            given += [f"--{name}", text]
    return shlex.join(given)


def verdict(
    low: float,
    high: float,
    seeds: int,
    *,
    even: float = 0.0,
    below: str = "it is lower",
    above: str = "it is higher",
) -> str:
    """What a 95% interval says of a difference or a ratio, ties and losses as plainly as wins.

    Args:
        low: Lower end.
        high: Upper end.
        seeds: That the interval was taken over.
        even: What no difference would be: 0, or 1 for a ratio.
        below: What an interval all below it says.
        above: What one all above it says.

    Example:
        >>> verdict(0.52, 0.88, 10, even=1, below="it saves", above="it loses")
        'it saves'
        >>> verdict(0.52, 1.1, 10, even=1)
        'no difference can be told, the interval includes 1'
        >>> verdict(0.52, 0.88, 3, even=1)
        'a hint at most, as 3 seeds are too few for a claim'
    """
    if low <= even <= high:
        return f"no difference can be told, the interval includes {even:g}"
    if seeds < LEAST_SEEDS:
        return f"a hint at most, as {plural(seeds, 'seed is', 'seeds are')} too few for a claim"
    return below if high < even else above


def plural(n: int, one: str, several: str) -> str:
    """A number and what it counts.

    Example:
        >>> plural(1, "seed", "seeds"), plural(3, "seed", "seeds")
        ('1 seed', '3 seeds')
    """
    return f"{n:,} {one if n == 1 else several}"


def write_report(
    out: Path, title: str, sections: Sequence[Section], about: About, *, lead: str = ""
) -> Path:
    """Writes `report.html`, `tables.md`, and each figure as `figures/<name>.pdf` and `.svg`.

    The page is one file that needs nothing else.

    Args:
        out: The study's directory; made if need be.
        title: Of the page.
        sections: In their order.
        about: How it was made; the page ends with it.
        lead: What it all came to, in a sentence or two.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: Two sections whose files would have the same name.
    """
    names = [section.name for section in sections]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InvalidInput(
            f"sections: expected a different title for each, got {len(names)} of which some are "
            f"named alike: {', '.join(sorted(twice))}."
        )
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    out.mkdir(parents=True, exist_ok=True)
    page = environment.get_template("old_study.html.jinja").render(
        title=title,
        lead=lead,
        sections=[(section, _drawn(section, out / "figures")) for section in sections],
        about=about,
        settings={k: _said(v) for k, v in about.settings.items()},
        clock=_clock(about.seconds),
    )
    write_text_atomically(out / "tables.md", as_markdown(sections) + "\n")
    write_text_atomically(out / "report.html", page)
    return out / "report.html"


def as_markdown(sections: Sequence[Section]) -> str:
    """The sections that have a table, as Markdown.

    Example:
        >>> print(as_markdown([Section("Ranks", ["By chance."], table=Table(["", "A"], []))]))
        **Ranks**
        <BLANKLINE>
        By chance.
        <BLANKLINE>
        |  | A |
        |---|---|
    """
    parts = []
    for section in sections:
        if section.table is not None:
            parts += [f"**{section.title}**", *section.sentences]
            parts.append(markdown(section.table.header, section.table.rows))
    return "\n\n".join(parts)


def _drawn(section: Section, folder: Path) -> Markup | None:
    if section.figure is None:
        return None
    # So that a phone scrolls a wide figure, whose text would be too small to read otherwise.
    least = round(0.6 * 96 * section.figure.get_size_inches()[0])
    svg = save(section.figure, folder / section.name)
    said = f"{section.title}. {' '.join(section.sentences)}"
    drawing = str(inline(svg, section.name, said))
    for colour, ink in _INKS.items():
        drawing = drawing.replace(colour, f"var(--{ink})")
    return Markup(drawing.replace("<svg", f'<svg style="min-width: {least}px"', 1))


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _clock(seconds: float | None) -> str:
    """Time as a reader says it."""
    if seconds is None:
        return "not known"
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
