"""Reports say what the run's files say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments.training import report, sentences
from experiments.training.report import write_report
from experiments.training.run_directory import RunDirectory
from experiments.training.sentences import headline
from rewardmodels.errors import InvalidInput, UnreadableFile

from ..made_runs import column, make_run


class Page(HTMLParser):
    """A page's tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(demo: dict[str, Path]) -> Page:
    """The report's page."""
    return Page(demo["learned"] / "report.html")


def test_sentences_have_the_files_numbers(demo: dict[str, Path], page: Page) -> None:
    run, text = demo["learned"], page.text
    ends = [f"{column(demo[arm], 'task_return')[-1]:.0f} with" for arm in ("learned", "task")]
    assert all(end in text for end in ends)
    assert "at 500,000 steps" in text
    accuracy, loss = column(run, "held_out_accuracy")[-1], column(run, "held_out_log_loss")[-1]
    assert f"predicts {accuracy:.0%} of the answers" in text
    assert f"log loss of {loss:.3f} nats an answer, better than" in text
    assert f"the best round, {max(column(run, 'task_return')):.0f}, came at" in text
    with np.load(run / "frames.npz") as frames:
        r = np.cov(frames["predicted"], frames["true"])
        assert f"correlate by {r[0, 1] / np.sqrt(r[0, 0] * r[1, 1]):.3f}" in text
        assert f"({frames['std'].mean():.3f} on average)" in text


def test_the_page_needs_nothing_else(demo: dict[str, Path], page: Page) -> None:
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    (video,) = page.all("video")
    assert str(video["src"]).startswith("data:video/mp4;base64,")
    drawings = page.all("svg")
    assert len(drawings) == 4
    for svg in drawings:
        assert svg["role"] == "img"
        assert len(str(svg["aria-label"])) > 60
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    raw = (demo["learned"] / "report.html").read_text("utf-8")
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', raw))
    assert used <= set(ids)
    assert report.REPEAT in page.text


def test_a_large_video_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", rounds=0, frames=False)
    monkeypatch.setattr(report, "EMBEDDED_VIDEO_BYTES", (run / "video.mp4").stat().st_size)
    (video,) = Page(write_report(run)).all("video")
    assert video["src"] == "video.mp4"


def test_a_missing_video_is_explained(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", "zero", rounds=0, video=False)))
    assert not page.all("video")
    assert "There is no video: MuJoCo found neither EGL nor OSMesa." in page.text


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "'\"><img src=x onerror=a()>"])
def test_names_from_files_are_text(tmp_path: Path, hostile: str) -> None:
    run = make_run(tmp_path / "run", task=hostile, rounds=0, frames=False, video=False)
    result = json.loads((run / "result.json").read_text())
    result |= {"video_note": hostile, "versions": {hostile: hostile}}
    (run / "result.json").write_text(json.dumps(result))
    twin = make_run(tmp_path / "$x^<script>", task=hostile, frames=False, video=False)
    page = Page(write_report(run, references=[twin]))
    assert not page.all("script")
    assert not page.all("img")
    assert hostile in page.text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", rounds=0, ended=False, frames=False)))
    assert "No episode has finished yet" in page.text
    assert "nothing to draw" in page.text
    assert not page.all("svg")


def test_a_run_that_hasnt_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1, ended=False, frames=False)
    page = Page(write_report(run))
    assert len(page.all("svg")) == 1  # no episode has ended, but answers were held out
    two = RunDirectory(make_run(tmp_path / "two", rounds=2, ended=False, frames=False))
    assert "The run hasn't ended" in headline(two)
    assert f"reaches {sentences.number(column(two.path, 'task_return')[-1])} in its" in headline(
        two
    )


def test_frames_without_a_value_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", video=False)
    np.savez(run / "frames.npz", predicted=[1, np.nan, 3], std=[1, 1, 1], true=[0, 1, np.inf])
    assert RunDirectory(run).frames["predicted"].tolist() == [1]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv"])
def test_refuses_what_is_no_run(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", video=False)
    (run / name).unlink()
    with pytest.raises(InvalidInput, match=f"without {name}"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_refuses_references_of_another_task(demo: dict[str, Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "ant", "task", task="Ant-v5", video=False)
    with pytest.raises(InvalidInput, match=r"references: .*Hopper-v5.*Ant-v5"):
        write_report(demo["learned"], references=[other])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"step,task_return\n1,abc\n"),
        ("result.json", b"{"),
        ("result.json", b"[1]"),
        ("config.yaml", b"a: [1"),
        ("frames.npz", b"PK\x03\x04 cut off"),
        ("frames.npz", b""),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path / "run", video=False)
    (run / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match=name):
        write_report(run)


def test_the_run_among_its_references_is_drawn_once(page: Page) -> None:
    assert page.text.count("(zero reward: −12; the task's own reward: 900)") == 1
    assert "learned reward, " not in page.text
