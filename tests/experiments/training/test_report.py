"""Reports agree with the run's files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.training import report
from experiments.training import report as figures
from experiments.training.report import write_report
from experiments.training.run_directory import RunDirectory
from rewardmodels.errors import InvalidInput, UnreadableFile

from ..made_runs import Page, column, make_run


@pytest.fixture(scope="module")
def page(demo: dict[str, Path]) -> Page:
    """The report's page."""
    return Page(demo["learned"] / "report.html")


def test_tables_have_the_files_numbers(demo: dict[str, Path], page: Page) -> None:
    run = demo["learned"]
    header, *rows = page.tables["Result"]
    results = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    learned = results["learned reward"]
    assert list(results) == ["learned reward", "zero reward", "the task's own reward"]
    assert [row["true return"] for row in results.values()] == ["812.4", "−12.0", "900.0"]
    assert (learned["lowest"], learned["highest"]) == ("794.4", "830.4")  # 812.4 ± 18
    assert learned["share"] == "90%"  # (812.4 + 12) / (900 + 12) = 0.904
    assert (learned["steps"], learned["comparisons"]) == ("500,000", "100")
    assert learned["minutes"] == "13.1"

    rounds = page.tables["True return while training"]
    returns = column(run, "task_return")
    ends = {row[1]: row for row in rounds if row[0] == "learned reward"}
    wanted = {"first": returns[0], "best": max(returns), "last": returns[-1]}
    assert {name: row[-1] for name, row in ends.items()} == {
        name: f"{value:.1f}".replace("-", "−") for name, value in wanted.items()
    }
    assert ends["last"][2:4] == ["500,000", "100"]

    scores = {row[0]: row[1:] for row in page.tables["Scores of the learned reward"]}
    assert scores["held-out accuracy"] == ["0.873", "0.500", "better"]
    loss = column(run, "held_out_log_loss")[-1]
    assert scores["held-out log loss, nats"] == [f"{loss:.3f}", "0.693", "better"]
    with np.load(run / "frames.npz") as frames:
        std = frames["std"].mean()
    assert scores["mean epistemic standard deviation"][0] == f"{std:.3f}"
    assert scores["frames"][0] == "3,000"


def test_scores_are_compared_with_guessing_and_events_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", frames=False, video=False)
    result = json.loads((run / "result.json").read_text())
    result |= {"held_out_accuracy": 0.5, "held_out_log_loss": 0.81, "epic_distance": 0.9,
               "calibration_error": 0.1, "aurc": None,
               "backflips": [2, 7], "backflips_per_1000_steps": 4.5}  # fmt: skip
    (run / "result.json").write_text(json.dumps(result))
    tables = Page(write_report(run)).tables
    header, row = tables["Result"]
    assert row[header.index("backflips per 1000 steps")] == "4.5"
    assert row[header.index("per episode")] == "2 to 7"
    scores = tables["Scores of the learned reward"]
    verdicts = {row[0].split(",")[0]: row[-1] for row in scores[1:]}
    assert verdicts == {
        "held-out accuracy": "unclear",
        "held-out log loss": "worse",
        "correlation with the true reward": "better",
        "EPIC distance to the true reward": "worse",
        "calibration error": "–",
    }


def test_the_page_needs_nothing_else(demo: dict[str, Path], page: Page) -> None:
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    (video,) = page.all("video")
    assert str(video["src"]).startswith("data:video/mp4;base64,")
    drawings = page.all("svg")
    assert len(drawings) == 4  # the run itself among the references isn't drawn twice
    for svg in drawings:
        assert svg["role"] == "img"
        assert len(str(svg["aria-label"])) > 60
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    raw = (demo["learned"] / "report.html").read_text("utf-8")
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', raw))
    assert used <= set(ids)
    assert report.COMMAND in page.text


def test_a_large_video_is_linked_and_a_missing_one_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", rounds=0, frames=False)
    monkeypatch.setattr(report, "EMBEDDED_VIDEO_BYTES", (run / "video.mp4").stat().st_size)
    (video,) = Page(write_report(run)).all("video")
    assert video["src"] == "video.mp4"
    page = Page(write_report(make_run(tmp_path / "other", "zero", rounds=0, video=False)))
    assert not page.all("video")
    assert "MuJoCo found neither EGL nor OSMesa." in page.text


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


@pytest.mark.parametrize(("rounds", "figures"), [(0, 0), (1, 1), (2, 3)])
def test_an_unfinished_run_shows_what_there_is(tmp_path: Path, rounds: int, figures: int) -> None:
    run = make_run(tmp_path / "run", rounds=rounds, ended=False, frames=False)
    page = Page(write_report(run))
    assert len(page.all("svg")) == figures  # no episode ends in the first round
    assert "hasn't ended" in page.text
    header, row = page.tables["Result"]
    returns = column(run, "task_return")
    assert row[header.index("true return")] == (f"{returns[-1]:.1f}" if returns else "–")


def test_runs_of_one_arm_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"s{s}", seed=s, frames=False, video=False) for s in (3, 4)]
    again = make_run(tmp_path / "again", seed=3, frames=False, video=False)
    for references, names in (
        (runs[1:], ["learned reward, seed 3", "learned reward, seed 4"]),
        ([again], ["learned reward, s3", "learned reward, again"]),
    ):
        table = Page(write_report(runs[0], references=references)).tables["Result"]
        assert [row[0] for row in table[1:]] == names
    axes = figures.return_vs_steps([RunDirectory(run) for run in runs]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["learned\nreward, 2 runs"]


def test_frames_without_a_value_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", video=False)
    np.savez(run / "frames.npz", predicted=[1, np.nan, 3], std=[1, 1, 1], true=[0, 1, np.inf])
    assert RunDirectory(run).frames["predicted"].tolist() == [1]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv"])
def test_other_directories_are_refused(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", video=False)
    (run / name).unlink()
    with pytest.raises(InvalidInput, match=f"without {name}"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_references_of_another_task_are_refused(demo: dict[str, Path], tmp_path: Path) -> None:
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
