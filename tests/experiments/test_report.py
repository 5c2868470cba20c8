"""Reports say what the run's files say."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from matplotlib import rcParams

from experiments import figures, report, sentences
from experiments.labelling import spread
from experiments.report import write_report
from experiments.results import ARMS, RunFiles
from experiments.sentences import headline
from experiments.video import write_video
from rewardmodels.errors import InvalidInput, UnreadableFile

COLUMNS = [
    *("step", "comparisons", "queries", "skipped", "episodes", "task_return", "learned_return"),
    *("held_out_accuracy", "held_out_log_loss", "train_log_loss", "reward_correlation", "seconds"),
]


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


def make_run(
    path: Path,
    reward: str = "learned",
    *,
    task: str = "Hopper-v5",
    seed: int = 0,
    rounds: int = 25,
    final: float = 812.4,
    ended: bool = True,
    frames: bool = True,
    video: bool = True,
) -> Path:
    """A run directory as `learn` leaves it, with plausible numbers."""
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(reward)])
    learned = reward == "learned"
    settings = {"task": task, "reward": reward, "seed": seed, "ppo": {"n_steps": 2048}, "out": None}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    rows: list[dict[str, Any]] = []
    for i in range(rounds):
        done = (i + 1) / rounds
        rising = final * (1 / (1 + np.exp(6 - 11 * done))) if reward != "zero" else final
        row = {
            "step": 20_000 * (i + 1),
            "comparisons": min(100, 5 * (i + 1)) if learned else 0,
            "queries": min(104, 5 * (i + 1) + i // 6) if learned else 0,
            "skipped": i // 6 if learned else 0,
            "episodes": 20,
            # The first round may end before an episode does.
            "task_return": "" if i == 0 else f"{rising + 25 * rng.normal():.4f}",
            "seconds": f"{31.5 * (i + 1):.2f}",
        }
        if learned:
            row |= {
                "learned_return": f"{40 * done:.3f}",
                "held_out_accuracy": f"{0.5 + 0.38 * (1 - np.exp(-4 * done)):.4f}",
                "held_out_log_loss": f"{0.72 - 0.4 * (1 - np.exp(-4 * done)):.4f}",
                "train_log_loss": f"{0.69 - 0.5 * (1 - np.exp(-6 * done)):.4f}",
                "reward_correlation": f"{0.8 * done:.4f}",
            }
        rows.append(row)
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    if ended:
        returns = (final + 18 * np.linspace(-1, 1, 10)).round(2).tolist()
        result = {
            "task": task,
            "reward": reward,
            "algorithm": "PPO",
            "seed": seed,
            "steps": 20_000 * rounds,
            "comparisons": 100 if learned else 0,
            "queries": 104 if learned else 0,
            "final_return": final,
            "final_returns": returns,
            "held_out_accuracy": 0.873 if learned else None,
            "reward_correlation": 0.8 if learned else None,
            "wall_seconds": 787.5,
            "steps_per_second": 634.9,
            "versions": {"rewardmodels": "0.1.0", "torch": "2.8.0", "mujoco": "3.3.2"},
        }
        if not video:
            result["video_note"] = "MuJoCo found neither EGL nor OSMesa."
        (path / "result.json").write_text(json.dumps(result))
    if frames and learned:
        true = np.clip(rng.gamma(4, 0.4, 3000), 0, 4)
        std = 0.08 + 0.1 * np.abs(true - 1.5)
        predicted = 0.6 * true - 0.4 + std * rng.normal(size=3000)
        np.savez(path / "frames.npz", predicted=predicted, std=std, true=true)
    if video and ended:
        shade = np.linspace(0, 255, 20, dtype=np.uint8)[:, None, None, None]
        write_video(np.broadcast_to(shade, (20, 64, 96, 3)).copy(), path / "video.mp4", fps=20)
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three arms of a demonstration, the first with its report; to be read only."""
    folder = tmp_path_factory.mktemp("demo")
    runs = {
        "learned": make_run(folder / "learned"),
        "zero": make_run(folder / "zero", "zero", final=-12.0, video=False),
        "task": make_run(folder / "task", "task", final=900.0, video=False),
    }
    # The run itself is among the references, as a pattern like `runs/demo/*` has it.
    assert write_report(runs["learned"], references=list(runs.values())) == (
        runs["learned"] / "report.html"
    )
    return runs


@pytest.fixture(scope="module")
def page(demo: dict[str, Path]) -> Page:
    """The report's page."""
    return Page(demo["learned"] / "report.html")


def column(run: Path, name: str) -> list[float]:
    """A column as the csv module alone reads it, empty cells left out."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_headline_has_the_results_numbers(demo: dict[str, Path]) -> None:
    text = headline(
        RunFiles.read(demo["learned"]), [RunFiles.read(demo["zero"]), RunFiles.read(demo["task"])]
    )
    assert text == (
        "After 100 comparisons and 500,000 steps the agent reaches 812 (zero reward: −12; the "
        "task's own reward: 900): the mean true return of 10 evaluation episodes, from 794 to 830. "
        "That is 90% of the way from zero reward to the task's own reward."
    )  # (812.4 + 12) / (900 + 12) = 0.904; 812.4 ± 18 are 794.4 and 830.4


def test_headline_of_the_other_arms(demo: dict[str, Path]) -> None:
    text = headline(RunFiles.read(demo["zero"]))
    assert text.startswith("After 500,000 steps the agent, trained on zero reward, reaches −12:")


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


def test_a_reward_worse_than_guessing_is_called_so(tmp_path: Path) -> None:
    run = RunFiles(
        tmp_path,
        {
            "comparisons": np.array([10.0, 20.0]),
            "held_out_accuracy": np.array([0.5, 0.45]),
            "held_out_log_loss": np.array([0.7, 0.81]),
        },
    )
    assert "0.810 nats an answer, no better than" in sentences.sentence_held_out(run)


def test_lines_are_the_csvs_columns(demo: dict[str, Path]) -> None:
    runs = [RunFiles.read(demo[arm]) for arm in ("learned", "zero", "task")]
    lines = figures.return_vs_steps(runs).axes[0].lines
    for line, arm in zip(lines, ("learned", "zero", "task"), strict=True):
        # The first round has no finished episode.
        np.testing.assert_array_equal(line.get_xdata(), column(demo[arm], "step")[1:])
        np.testing.assert_array_equal(line.get_ydata(), column(demo[arm], "task_return"))
        assert line.get_color() == ARMS[arm].colour

    learned, zero, task = figures.return_vs_comparisons(runs).axes[0].lines
    np.testing.assert_array_equal(learned.get_xdata(), column(demo["learned"], "comparisons")[1:])
    np.testing.assert_array_equal(learned.get_ydata(), column(demo["learned"], "task_return"))
    np.testing.assert_array_equal(zero.get_ydata(), [-12, -12])
    np.testing.assert_array_equal(task.get_ydata(), [900, 900])

    top, bottom = figures.held_out(runs[0]).axes
    accuracy, chance = top.lines
    np.testing.assert_array_equal(
        accuracy.get_ydata(), column(demo["learned"], "held_out_accuracy")
    )
    np.testing.assert_array_equal(chance.get_ydata(), [0.5, 0.5])
    for line, name in zip(bottom.lines, ("held_out_log_loss", "train_log_loss"), strict=False):
        np.testing.assert_array_equal(line.get_xdata(), column(demo["learned"], "comparisons"))
        np.testing.assert_array_equal(line.get_ydata(), column(demo["learned"], name))
    np.testing.assert_allclose(np.asarray(bottom.lines[2].get_ydata()), -np.log([0.5, 0.5]))


def test_every_frame_is_in_the_density(demo: dict[str, Path]) -> None:
    frames = RunFiles.read(demo["learned"]).frames
    axes = figures.predicted_vs_true(frames).axes[0]
    assert np.sum(np.asarray(axes.collections[0].get_array())) == 3000
    means = axes.lines[0]  # tenths of 3000 ordered frames: 300 each
    by_true = np.argsort(frames["true"], kind="stable").reshape(10, 300)
    np.testing.assert_allclose(np.asarray(means.get_xdata()), frames["true"][by_true].mean(1))
    np.testing.assert_allclose(np.asarray(means.get_ydata()), frames["predicted"][by_true].mean(1))


def test_figures_leave_matplotlibs_settings_alone(demo: dict[str, Path], tmp_path: Path) -> None:
    before = dict(rcParams)
    figures.save(figures.predicted_vs_true(RunFiles.read(demo["learned"]).frames), tmp_path / "a")
    assert dict(rcParams) == before


def test_figures_are_files_too_and_the_same_each_time(
    demo: dict[str, Path], tmp_path: Path
) -> None:
    names = {"return_vs_steps", "return_vs_comparisons", "held_out", "predicted_vs_true"}
    files = {f.name: f.read_bytes() for f in (demo["learned"] / "figures").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    assert all(files[f"{name}.pdf"].startswith(b"%PDF") for name in names)
    again = figures.predicted_vs_true(RunFiles.read(demo["learned"]).frames)
    figures.save(again, tmp_path / "again")
    for kind in ("svg", "pdf"):
        assert (tmp_path / f"again.{kind}").read_bytes() == files[f"predicted_vs_true.{kind}"]


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


def test_runs_of_one_arm_are_told_apart(tmp_path: Path) -> None:
    runs = [RunFiles.read(make_run(tmp_path / f"s{s}", seed=s, video=False)) for s in (3, 4)]
    assert sentences.labels(runs) == ["learned reward, seed 3", "learned reward, seed 4"]
    same = [runs[0], RunFiles.read(make_run(tmp_path / "again", seed=3, video=False))]
    assert sentences.labels(same) == ["learned reward, s3", "learned reward, again"]


def test_runs_of_one_arm_share_a_label_and_a_range(tmp_path: Path) -> None:
    runs = [
        RunFiles.read(
            make_run(tmp_path / str(s), seed=s, final=700.0 + s, video=False, rounds=5 + s)
        )
        for s in range(4)
    ]
    assert "reaches 700 (3 other runs on learned reward: 701 to 703):" in headline(
        runs[0], runs[1:]
    )
    assert "reaches 700 (another run on learned reward: 702):" in headline(runs[0], runs[2:3])
    ends = sorted(column(run.path, "task_return")[-1] for run in runs)
    assert sentences.sentence_steps(runs) == (
        "In the last round an episode of training returns on average "
        f"{ends[0]:.0f} to {ends[-1]:.0f} with learned reward, 4 runs "
        "(at 100,000 to 160,000 steps)."
    )
    axes = figures.return_vs_steps(runs).axes[0]
    assert [text.get_text() for text in axes.texts] == ["learned\nreward, 4 runs"]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", rounds=0, ended=False, frames=False)))
    assert "No episode has finished yet" in page.text
    assert "nothing to draw" in page.text
    assert not page.all("svg")


def test_a_run_that_hasnt_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1, ended=False, frames=False)
    page = Page(write_report(run))
    assert len(page.all("svg")) == 1  # no episode has ended, but answers were held out
    two = RunFiles.read(make_run(tmp_path / "two", rounds=2, ended=False, frames=False))
    assert "The run hasn't ended" in headline(two)
    assert f"reaches {sentences.number(column(two.path, 'task_return')[-1])} in its" in headline(
        two
    )


@pytest.mark.parametrize("n", [1, 2, 11])
def test_frames_that_are_few_or_all_alike(n: int) -> None:
    frames = {name: np.ones(n) for name in ("predicted", "std", "true")}
    figures.predicted_vs_true(frames)
    assert "no correlation" in sentences.sentence_frames(frames)


def test_frames_without_a_value_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", video=False)
    np.savez(run / "frames.npz", predicted=[1, np.nan, 3], std=[1, 1, 1], true=[0, 1, np.inf])
    assert RunFiles.read(run).frames["predicted"].tolist() == [1]


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


def test_spread_keeps_order_and_distance() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        centres, halves = rng.uniform(0, 60, 6), rng.uniform(2, 8, 6)
        placed = np.array(spread(centres.tolist(), halves.tolist()))
        order = np.argsort(centres)
        gaps = np.diff(placed[order]) - (halves[order][1:] + halves[order][:-1])
        assert (gaps > -1e-9).all()
    assert spread([40.0, 0.0], [5.0, 5.0]) == [40.0, 0.0]
