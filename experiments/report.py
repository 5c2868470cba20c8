"""One page that says what a run of `learn` came to: figures, video, settings, how to repeat it."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments import figures
from experiments.figures import ARMS, Run, correlation, labels
from rewardmodels.errors import InvalidInput

# Larger pages are slow to open and refused by many mail servers.
EMBEDDED_VIDEO_BYTES = 8_000_000
REPEAT = "rewardmodels learn --config config.yaml --out NEW"
# The page's style sheet gives each of the figures' colours a second value for dark mode.
INKS = {
    figures.INK: "ink",
    figures.FAINT: "faint",
    figures.BLUE: "blue",
    figures.ORANGE: "orange",
    figures.GREY: "grey",
}


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
    main = Run.read(run)
    others = [Run.read(Path(p)) for p in references if Path(p).resolve() != run.resolve()]
    task = _task(main)
    for other in others:
        if None not in (task, _task(other)) and _task(other) != task:
            raise InvalidInput(
                f"references: expected runs of the task {task!r}, got {other.path} "
                f"of {_task(other)!r}. Returns of different tasks can't be compared."
            )
    templates = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        task=task or "unnamed task",
        arm=main.arm.name,
        headline=headline(main, others),
        plates=_plates(main, others),
        video=_video(main),
        runs=_table([main, *others]),
        settings=_flat(main.settings),
        versions=_flat(main.result.get("versions")),
        repeat=REPEAT,
    )
    target = run / "report.html"
    unfinished = run / f".report.html.{os.getpid()}.part"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, target)
    return target


def number(value: float) -> str:
    """A number as a sentence says it: three figures or whole, with a true minus sign.

    Example:
        >>> number(1234.5), number(-12.04), number(0.0512), number(float("nan"))
        ('1,234', '−12.0', '0.051', 'not known')
    """
    if not np.isfinite(value):
        return "not known"
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2
    if 0 < size < 1:
        digits = 3
    text = f"{value:,.{digits}f}".replace("-", "−")
    return text.lstrip("−") if float(text.replace("−", "").replace(",", "")) == 0 else text


def percent(value: float) -> str:
    """A fraction in whole per cent."""
    return f"{100 * value:.0f}%".replace("-", "−") if np.isfinite(value) else "not known"


def headline(run: Run, references: Sequence[Run] = ()) -> str:
    """What the run came to, beside its references, in one or two sentences.

    Args:
        run: The run.
        references: Other runs of the same task.

    Returns:
        Text, without markup.
    """
    reached = run.final_return
    if not np.isfinite(reached):
        return "No episode has finished yet, so there is no return to tell of."
    answers, steps = run.outcome("comparisons"), run.outcome("steps", "step")
    effort = [f"{number(steps)} steps"] if np.isfinite(steps) else []
    if answers > 0:
        effort.insert(0, f"{number(answers)} comparison{'s' if answers != 1 else ''}")
    others = "; ".join(
        f"{'another run on ' if n == 1 else f'{n} other runs on '}{name}: {text}"
        if name == run.arm.name
        else f"{name}{f', {n} runs' if n > 1 else ''}: {text}"
        for name, n, text in _by_arm([(r, r.final_return) for r in references])
    )
    opening = f"After {' and '.join(effort)} the agent" if effort else "The agent"
    if run.arm != ARMS["learned"]:
        opening += f", trained on {run.arm.name},"
    text = f"{opening} reaches {number(reached)}{f' ({others})' if others else ''}"
    returns = run.final_returns
    if not run.result:
        return f"{text} in its last round. The run hasn't ended: it has no result.json."
    if len(returns) > 1:
        text += (
            f": the mean true return of {len(returns)} evaluation episodes, "
            f"from {number(min(returns))} to {number(max(returns))}"
        )
    return f"{text}.{_share(run, references)}"


def _share(run: Run, references: Sequence[Run]) -> str:
    """How far from zero reward to the task's own reward the run came, where that has a sense."""
    means = {
        name: np.mean([r.final_return for r in references if r.arm == ARMS[name]] or [np.nan])
        for name in ("zero", "task")
    }
    if run.arm != ARMS["learned"] or not means["task"] > means["zero"]:
        return ""
    share = (run.final_return - means["zero"]) / (means["task"] - means["zero"])
    return f" That is {percent(float(share))} of the way from zero reward to the task's own reward."


def sentence_steps(runs: Sequence[Run]) -> str:
    """What `return_vs_steps` shows."""
    curves = [(run, run.curve("step", "task_return")) for run in runs]
    last = [(run, steps[-1], values[-1]) for run, (steps, values) in curves if len(steps)]
    together = len({step for _, step, _ in last}) == 1
    parts = [
        f"{value} with {name}{f', {n} runs' if n > 1 else ''}"
        + ("" if together else f" (at {step} steps)")
        for (name, n, value), (_, _, step) in zip(
            _by_arm([(run, value) for run, _, value in last]),
            _by_arm([(run, step) for run, step, _ in last]),
            strict=True,
        )
    ]
    when = f", at {number(last[0][1])} steps," if together else ""
    return f"In the last round{when} an episode of training returns on average {'; '.join(parts)}."


def _by_arm(values: Sequence[tuple[Run, float]]) -> list[tuple[str, int, str]]:
    """For each arm its name, how many runs have a value, and the value or its range in words."""
    groups: dict[str, list[float]] = {}
    for run, value in values:
        if np.isfinite(value):
            groups.setdefault(run.arm.name, []).append(float(value))
    return [
        (name, len(group), " to ".join(dict.fromkeys(map(number, (min(group), max(group))))))
        for name, group in groups.items()
    ]


def sentence_comparisons(runs: Sequence[Run]) -> str:
    """What `return_vs_comparisons` shows."""
    x, y = runs[0].curve("comparisons", "task_return")
    best = int(np.argmax(y))
    text = (
        f"The mean return goes from {number(y[0])} after {number(x[0])} comparisons to "
        f"{number(y[-1])} after {number(x[-1])}; the best round, {number(y[best])}, "
        f"came at {number(x[best])}."
    )
    if np.sum(x == x[-1]) > 1:
        text += " Training goes on after the last answer, hence the upright end."
    if any(not run.last("comparisons") > 0 for run in runs):
        text += " Level lines are final results of runs that asked nothing."
    return text


def sentence_held_out(run: Run) -> str:
    """What `held_out` shows."""
    x, accuracy = run.curve("comparisons", "held_out_accuracy")
    loss = run.curve("comparisons", "held_out_log_loss")[1]
    text = (
        f"After {number(x[-1])} comparisons the learned reward predicts {percent(accuracy[-1])} "
        "of the answers kept from its training (guessing: 50%)"
    )
    if len(loss):
        better = "better" if loss[-1] < np.log(2) else "no better"
        text += (
            f", with a log loss of {number(loss[-1])} nats an answer, "
            f"{better} than saying 50% each time ({number(float(np.log(2)))})"
        )
    return text + "."


def sentence_frames(frames: Mapping[str, figures.Floats]) -> str:
    """What `predicted_vs_true` shows."""
    n, r = len(frames["true"]), correlation(frames)
    text = f"On {n:,} frames that the final policy visits, learned and true reward "
    text += (
        f"correlate by {number(r)}."
        if np.isfinite(r)
        else "have no correlation, as one of them never changes."
    )
    return text + (
        " The stronger the colour, the more frames. Dots are means of a tenth of the frames each, "
        f"bars one epistemic standard deviation ({number(float(frames['std'].mean()))} on "
        "average). Comparisons leave the learned reward's scale and offset free."
    )


def _plates(run: Run, references: Sequence[Run]) -> list[Plate]:
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
            lambda: sentence_steps(runs),
        ),
        (
            "return_vs_comparisons",
            "True return for answers given",
            max(comparisons, default=0) > 0,
            lambda: figures.return_vs_comparisons(runs),
            lambda: sentence_comparisons(runs),
        ),
        (
            "held_out",
            "Answers kept from training",
            len(run.curve("comparisons", "held_out_accuracy")[0]) > 0,
            lambda: figures.held_out(run),
            lambda: sentence_held_out(run),
        ),
        (
            "predicted_vs_true",
            "Learned against true reward",
            bool(run.frames),
            lambda: figures.predicted_vs_true(run.frames),
            lambda: sentence_frames(run.frames),
        ),
    ]
    plates = []
    for name, title, there, draw, say in known:
        if there:
            svg = figures.save(draw(), run.path / "figures" / name)
            plates.append(Plate(name, inline(svg, name, f"{title}. {say()}"), title, say()))
    return plates


def inline(svg: str, name: str, alt: str) -> Markup:
    """An SVG file's drawing as it goes into a page: described, sized by the page, in its colours.

    Args:
        svg: The file's text.
        name: What its ids begin with, so that two figures in one page don't share any.
        alt: What a screen reader says.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, ink in INKS.items():
        svg = svg.replace(colour, f"var(--{ink})")
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return Markup("{} role='img' aria-label='{}'>{}").format(Markup(head), alt, Markup(body))


def _video(run: Run) -> dict[str, str]:
    """Where the page finds the video, or why there is none."""
    file = run.path / "video.mp4"
    if not file.is_file():
        note = run.result.get("video_note") or "the run has left no video.mp4."
        return {"note": f"There is no video: {note}"}
    if file.stat().st_size >= EMBEDDED_VIDEO_BYTES:
        return {"source": file.name}
    return {"source": "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()}


def _table(runs: Sequence[Run]) -> list[list[str]]:
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


def _clock(run: Run) -> str:
    seconds = run.outcome("wall_seconds", "seconds")
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{number(seconds)} s"


def _task(run: Run) -> str | None:
    task = run.result.get("task", run.settings.get("task"))
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
