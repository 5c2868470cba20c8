"""Report pages: fixed text, figures and tables in one HTML file that needs nothing else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.analysis import plots
from experiments.analysis.stats import Interval, number
from experiments.envs.rendering import write_video
from experiments.training.run_directory import versions
from rewardmodels.errors import InvalidInput
from rewardmodels.saving import write_text_atomically

FRAMES_PER_SECOND = 25  # of videos

# The style sheet gives each of the figures' colours a second value for dark mode.
_VARIABLES = dict(
    zip(
        (*plots.COLOURS, plots.FAINT, plots.GREY),
        ("blue", "orange", "green", "pink", "yellow", "purple", "ink", "sky", "faint", "grey"),
        strict=True,
    )
)


@dataclass(frozen=True)
class Section:
    """A part of a page, under its own heading.

    Args:
        title: Different from every other section's, since files are named after it.
        text: What the figure or table shows and how to read it.
        figure: In the house style (`experiments.analysis.plots`).
        table: Tidy columns of text, numbers or `Interval`s.
        digits: Decimal places of the table's numbers.

    Example:
        >>> Section("On Hopper, in all", "").name
        'on-hopper-in-all'
    """

    title: str
    text: str
    figure: Figure | None = None
    table: pd.DataFrame | None = None
    digits: int = 3

    @property
    def name(self) -> str:
        """Stem of the figure's files."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower().replace("'", "")).strip("-")

    @property
    def cells(self) -> list[list[str]]:
        """The table as text, a list a row; the header comes first."""
        if self.table is None:
            return []
        rows = self.table.itertuples(index=False, name=None)
        return [
            [str(name) for name in self.table.columns],
            *([_cell(value, self.digits) for value in row] for row in rows),
        ]


@dataclass(frozen=True)
class Report:
    """Outcome of a study: a page, and the key numbers for `--json`.

    Args:
        title: Of the page: the question.
        sections: In their order.
        numbers: Key numbers by flat names, such as `labels_ratio.Hopper`.
        videos: Pictures `(frames, height, width, 3)` by name, each shown at the end of the page.
    """

    title: str
    sections: Sequence[Section]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    videos: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Origin of the results on a page.

    Args:
        command: Makes them again.
        settings: Everything that decides a number, by name.
        versions: Of packages.
        seconds: Computing all cells one after the other.
        note: Shown first: what is missing, say.
    """

    command: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    note: str = ""


def write_page(
    out: Path, report: Report, origin: Origin, layout: str = "study.html.jinja", **extra: Any
) -> Path:
    """Write `report.html`, `tables.md`, videos, and figures as `figures/<name>.pdf` and `.svg`.

    `layout` is the name of the page's template, `extra` are further variables of it.

    Returns:
        Path of the page.

    Raises:
        InvalidInput: Two sections whose files would have the same name.
    """
    names = [section.name for section in report.sections]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InvalidInput(
            f"sections: expected titles that differ, got several named {', '.join(sorted(twice))}."
        )
    out.mkdir(parents=True, exist_ok=True)
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = templates.get_template(layout).render(
        report=report,
        sections=[(section, _drawing(section, out / "figures")) for section in report.sections],
        origin=origin,
        settings={name: _setting(value) for name, value in origin.settings.items()},
        minutes=number(origin.seconds / 60, ".1f"),
        **extra,
    )
    for name, pictures in report.videos.items():
        write_video(pictures, out / f"{name}.mp4", FRAMES_PER_SECOND)
    write_text_atomically(out / "tables.md", markdown(report.sections))
    write_text_atomically(out / "report.html", page)
    return out / "report.html"


def markdown(sections: Sequence[Section]) -> str:
    """Format the tables of the sections as Markdown.

    Example:
        >>> table = pd.DataFrame({"arm": ["A"], "return": [Interval(2, 1.5, 2.25)]})
        >>> print(markdown([Section("Returns", "Ten seeds.", table=table, digits=1)]), end="")
        **Returns**
        <BLANKLINE>
        Ten seeds.
        <BLANKLINE>
        | arm | return |
        |---|---|
        | A | 2.0 (1.5 to 2.2) |
    """
    parts = []
    for section in sections:
        if section.table is not None:
            header, *rows = section.cells
            lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
            lines.insert(1, "|" + "---|" * len(header))
            parts += [f"**{section.title}**", section.text, "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def publish(numbers: Mapping[str, Any], file: Path | None) -> None:
    """Print key numbers and package versions as JSON, and write the same to a file, if given.

    Intervals become lists, what isn't finite null.
    """
    text = json.dumps({**_finite(numbers), "versions": versions()}, indent=2)
    print(text)
    if file is not None:
        write_text_atomically(file, text + "\n")


def check_json(file: Path | None) -> None:
    """Raise InvalidInput if `publish` couldn't write the file."""
    if file is None:
        return
    try:
        if (file := Path(file)).is_dir():
            raise IsADirectoryError("it is a directory")
        probe = file.with_name(f".{file.name}.{'0' * 32}.part")  # as long as what `publish` renames
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"json: expected a file in a directory that exists and can be written to, got {file}: "
            f"{error}."
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drawing(section: Section, folder: Path) -> Markup | None:
    """SVG of a section's figure, to stand inside the page, in the page's own colours."""
    if section.figure is None:
        return None
    svg, name = plots.save(section.figure, folder / section.name), section.name
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    # So that a phone scrolls a wide figure, whose text would be too small to read otherwise.
    least = round(0.6 * 96 * section.figure.get_size_inches()[0])
    return Markup("{} style='min-width: {}px' role='img' aria-label='{}'>{}").format(
        Markup(head), least, f"{section.title}. {section.text}", Markup(body)
    )


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, Interval):
        return f"{value:.{digits}f}"
    if isinstance(value, Integral):
        return f"{value:,}"
    return number(value, f".{digits}f") if isinstance(value, float) else str(value)


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
