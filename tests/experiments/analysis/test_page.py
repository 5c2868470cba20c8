"""Report pages: whole without anything else, escaped, and the same as Markdown."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments.analysis import plots
from experiments.analysis.page import Origin, Report, Section, markdown, publish, write_page
from experiments.analysis.stats import Interval
from rewardmodels import InvalidInput

from ..made_runs import Page

ORIGIN = Origin("rewardmodels study x --seeds 3", {"seeds": 3, "data": None}, {"torch": "2"}, 90.0)


def figure():
    with plots.style():
        drawn, [axes] = plots.panels(1)
        for colour in plots.COLOURS:
            axes.plot([0, 1], color=colour)
    return drawn


def sections():
    table = pd.DataFrame({"arm": ["x"], "return": [Interval(2.0, 1.5, np.inf)], "seeds": [1200]})
    return [
        Section("On Hopper <b>", "It saves & wins.", figure(), table, digits=1),
        Section("Only a table", "A tie.", table=table.head(0)),
        Section("Only a figure", "A tie.", figure()),
    ]


def test_the_page_needs_nothing_else_and_escapes_text(tmp_path):
    path = write_page(tmp_path, Report("A study", sections()), ORIGIN)
    page, text = Page(path), path.read_text("utf-8")
    assert not {"script", "link", "img", "iframe"} & {name for name, _ in page.tags}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for part in ("A study", "On Hopper <b>", "It saves & wins.", "2.0 (1.5 to ∞)", "1,200",
                 ORIGIN.command, "1.5 minutes"):  # fmt: skip
        assert part in page.text
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert not any(colour in drawing for colour in plots.COLOURS)  # all have a dark mode
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        f"{name}.{ending}" for name in ("on-hopper-b", "only-a-figure") for ending in ("pdf", "svg")
    }
    assert markdown(sections()) == (tmp_path / "tables.md").read_text()


def test_sections_of_one_name_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="sections"):
        write_page(tmp_path, Report("A study", [Section("A b", ""), Section("A-b", "")]), ORIGIN)


def test_published_numbers_are_strict_json(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    publish({"a": np.float32(1), "interval": Interval(1, -np.inf, 2), "b": float("nan")}, file)
    found = json.loads(file.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert (found["a"], found["interval"], found["b"]) == (1, [1, None, 2], None)
    assert "torch" in found["versions"]
