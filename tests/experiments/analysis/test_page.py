"""A study's report: whole without anything else, and its sentences those of the numbers."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from experiments.analysis.page import (
    COLOURS,
    About,
    Section,
    Table,
    about_cells,
    as_markdown,
    command_line,
    verdict,
    write_report,
)
from experiments.grid import run_study
from experiments.studies.predictor_sentences import fold_interval
from experiments.training.run_directory import versions
from rewardmodels import InvalidInput


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def drawn() -> Figure:
    figure = Figure(figsize=(5.2, 3))
    axes = figure.subplots()
    for colour in COLOURS:
        axes.plot([0, 1], color=colour)
    return figure


def sections():
    return [
        Section("On Hopper <b>", ["It saves & wins."], drawn(), Table(["", "A"], [["x", "1 < 2"]])),
        Section("Cost", ["Nothing can be told."], table=Table(["", "ms"], [["x", "3"]])),
        Section("Only a figure", ["A tie."], drawn()),
    ]


ABOUT = About("rewardmodels study x --seeds 3", 3, {"seeds": 3, "data": None, "tasks": ["A", "B"]})


def test_the_page_needs_nothing_else_and_says_all(tmp_path):
    text = write_report(tmp_path, "A study", sections(), ABOUT, lead="All in all.").read_text()
    page = Page(text)
    names = [name for name, _ in page.tags]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    for said in ("On Hopper <b>", "It saves & wins.", "1 < 2", "All in all.", "A tie.", "A, B",
                 ABOUT.command, "Seeds: 3", "not known", versions()["torch"]):  # fmt: skip
        assert said in page.text
    assert names.count("svg") == 2
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if (link := attributes.get("href", "")).endswith(".pdf"):
            assert (tmp_path / link).read_bytes()[:4] == b"%PDF"
    # Every colour of a figure has a second value for dark mode.
    dark = text[text.index("prefers-color-scheme: dark") :]
    for ink in set(re.findall(r"var\(--(\w+)\)", text)):
        assert re.search(rf"--{ink}: #", dark), ink
    assert not any(colour in text[text.index("<svg") :] for colour in COLOURS)


def test_tables_come_as_markdown_too(tmp_path):
    write_report(tmp_path, "A study", sections(), ABOUT)
    text = (tmp_path / "tables.md").read_text()
    assert text == as_markdown(sections()) + "\n"
    assert "**Cost**\n\nNothing can be told.\n\n|  | ms |\n|---|---|\n| x | 3 |" in text
    assert "Only a figure" not in text


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="expected 2 cells in each"):
        Table(["", "A"], [["x"]])
    twice = [Section("Cost", []), Section("cost?", [])]
    with pytest.raises(InvalidInput, match="named alike: cost"):
        write_report(tmp_path / "new", "A study", twice, ABOUT)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("low", "high", "seeds", "even", "expected"),
    [
        (-0.2, -0.1, 5, 0, "it is lower"),
        (0.1, 0.2, 5, 0, "it is higher"),
        (1.1, np.inf, 5, 1, "it is higher"),
        (np.inf, np.inf, 5, 1, "it is higher"),
        (-0.1, 0.2, 5, 0, "no difference can be told, the interval includes 0"),
        (1.0, 1.0, 5, 1, "no difference can be told, the interval includes 1"),
        (0.1, 0.2, 4, 0, "a hint at most, as 4 seeds are too few for a claim"),
    ],
)
def test_ties_and_losses_are_said_as_plainly_as_wins(low, high, seeds, even, expected):
    assert verdict(low, high, seeds, even=even) == expected


def cell(seed, wide=False):
    return {"accuracy": seed / 10, "wide": wide}


def test_only_the_cells_of_this_grid_are_told_of(tmp_path):
    grids = [{"seed": 0}, {"seed": 1}], [{"seed": 0, "wide": True}]
    found = [run_study(cell, grid, tmp_path, progress=False) for grid in grids]
    rows = [{**a, **b} for a, b in zip(grids[0], found[0], strict=True)]
    about = about_cells(rows, tmp_path, command="x", seeds=2, settings={})
    alone = [
        about_cells([row], tmp_path, command="x", seeds=1, settings={}).seconds for row in rows
    ]
    assert about.seconds == pytest.approx(sum(alone))
    assert about.versions == versions()
    assert about_cells([], tmp_path, command="x", seeds=0, settings={}).seconds is None


def test_a_command_is_one_that_a_shell_takes():
    told = command_line("study x", {"tasks": [], "out": "a b", "data": None})
    assert told == "rewardmodels study x --tasks '[]' --out 'a b'"


def test_the_interval_over_folds_is_wider_than_students_by_what_folds_share():
    gaps = np.array([0.1, 0.3, 0.2, 0.25, 0.05])
    mean, low, high = fold_interval(gaps)
    naive = stats.t.interval(0.95, 4, loc=gaps.mean(), scale=stats.sem(gaps))
    assert mean == pytest.approx(gaps.mean())
    # sqrt(1/5 + 1/4) over sqrt(1/5).
    assert (high - low) / (naive[1] - naive[0]) == pytest.approx(np.sqrt(1 + 5 / 4))
    assert (low + high) / 2 == pytest.approx(mean)
