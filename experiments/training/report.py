"""One page that says what a run of `learn` came to: figures, video, settings, how to repeat it."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.analysis import figures, plots
from experiments.analysis.figures import arm_of
from experiments.analysis.page import inline
from experiments.training import sentences
from experiments.training.run_directory import RunDirectory
from experiments.training.sentences import headline, labels, number, percent
from rewardmodels.errors import InvalidInput

# Larger pages are slow to open and refused by many mail servers.
EMBEDDED_VIDEO_BYTES = 8_000_000
REPEAT = "rewardmodels learn --config config.yaml --out NEW"


@dataclass(frozen=True)
class Plate:
    """A figure in the page: its name among the files, its drawing, and what it shows."""

    name: str
    svg: Markup
    title: str
    sentence: str


def write_report(run: Path, *, references: Sequence[Path] = ()) -> Path:
    """Write `report.html` into a run's directory, with its figures beside it in `figures/`.

    The page is one file that needs nothing else, save a video of 8 MB or more, which it links.
    What the run hasn't made (yet) is left out.

    Args:
        run: The run's directory, with `config.yaml` and `metrics.csv`.
        references: Directories of other runs of the same task, to draw along; the run itself
            among them is passed over.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: If a directory isn't a run's, or a reference is of another task.
        UnreadableFile: If a file of a run is damaged.
    """
    run = Path(run)
    main = RunDirectory(run)
    main.check_readable()
    others = [RunDirectory(Path(p)) for p in references if Path(p).resolve() != run.resolve()]
    task = _task(main)
    for other in others:
        if None not in (task, _task(other)) and _task(other) != task:
            raise InvalidInput(
                f"references: expected runs of the task {task!r}, got {other.path} "
                f"of {_task(other)!r}. Returns of different tasks can't be compared."
            )
    templates = jinja2.FileSystemLoader(Path(__file__).parents[1] / "analysis/templates")
    environment = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        task=task or "unnamed task",
        arm=arm_of(main).name,
        headline=headline(main, others),
        plates=_plates(main, others),
        video=_video(main),
        runs=_table([main, *others]),
        settings=_flat(main.settings),
        versions=_flat((main.result or {}).get("versions")),
        repeat=REPEAT,
    )
    target = run / "report.html"
    unfinished = run / f".report.html.{os.getpid()}.part"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, target)
    return target


def _plates(run: RunDirectory, references: Sequence[RunDirectory]) -> list[Plate]:
    """Every figure that the run has numbers for."""
    runs = [run, *references]
    comparisons, _ = run.curve("comparisons", "task_return")
    # Name, title, whether there are numbers for it, the drawing and the sentence.
    known: list[tuple[str, str, bool, Callable[[], Figure], Callable[[], str]]] = [
        (
            "return_vs_steps",
            "True return while training",
            any(len(r.curve("step", "task_return")[0]) for r in runs),
            lambda: figures.return_vs_steps(runs),
            lambda: sentences.sentence_steps(runs),
        ),
        (
            "return_vs_comparisons",
            "True return for answers given",
            max(comparisons, default=0) > 0,
            lambda: figures.return_vs_comparisons(runs),
            lambda: sentences.sentence_comparisons(runs),
        ),
        (
            "held_out",
            "Answers kept from training",
            len(run.curve("comparisons", "held_out_accuracy")[0]) > 0,
            lambda: figures.held_out(run),
            lambda: sentences.sentence_held_out(run),
        ),
        (
            "predicted_vs_true",
            "Learned against true reward",
            bool(run.frames),
            lambda: figures.predicted_vs_true(run.frames),
            lambda: sentences.sentence_frames(run.frames),
        ),
    ]
    plates = []
    for name, title, there, draw, say in known:
        if there:
            svg = plots.save(draw(), run.path / "figures" / name)
            plates.append(Plate(name, inline(svg, name, f"{title}. {say()}"), title, say()))
    return plates


def _video(run: RunDirectory) -> dict[str, str]:
    """Where the page finds the video, or why there is none."""
    file = run.path / "video.mp4"
    if not file.is_file():
        note = (run.result or {}).get("video_note") or "the run has left no video.mp4."
        return {"note": f"There is no video: {note}"}
    if file.stat().st_size >= EMBEDDED_VIDEO_BYTES:
        return {"source": file.name}
    return {"source": "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()}


def _table(runs: Sequence[RunDirectory]) -> list[list[str]]:
    """A row of outcomes for each run."""
    rows = []
    for run, name in zip(runs, labels(runs), strict=True):
        returns = run.final_returns
        spread = f" ({number(min(returns))} to {number(max(returns))})" if len(returns) > 1 else ""
        rows.append(
            [
                name,
                number(run.final_return) + spread,
                number(run.outcome("steps", "step")),
                number(run.outcome("comparisons")),
                percent(run.outcome("held_out_accuracy")),
                number(run.outcome("reward_correlation")),
                _clock(run),
            ]
        )
    return [[cell.replace("not known", "–") for cell in row] for row in rows]


def _clock(run: RunDirectory) -> str:
    seconds = run.outcome("wall_seconds", "seconds")
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{number(seconds)} s"


def _task(run: RunDirectory) -> str | None:
    task = (run.result or {}).get("task", run.settings.get("task"))
    return None if task is None else str(task)


def _flat(settings: Mapping[str, Any] | None, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names, the way the command line takes them."""
    flat: dict[str, str] = {}
    for name, value in (settings or {}).items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = "none" if value is None else str(value)
    return flat
