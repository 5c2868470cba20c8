"""What the study of drift leaves behind: a figure, its sentence, tables, curves and a video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from experiments.analysis.old_page import (
    About,
    Section,
    Table,
    as_markdown,
    plural,
    write_report,
)
from experiments.analysis.old_stats import Values, bootstrap_interval, interquartile_mean
from experiments.analysis.plots import GREY, STYLE
from experiments.analysis.plots import label_lines as named
from experiments.envs.rendering import RenderingUnavailable, render_states
from experiments.envs.tasks import find_task
from experiments.envs.video import write_video
from experiments.studies.summary import Row, as_csv, by, number, numbers
from rewardmodels.saving import write_text_atomically

_CURVES = ("step", "true", "predicted", "std", "comparisons")
SAYING_NOTHING = ("zero", "constant", "random")
"""Arms that are paid what no answer had a part in."""

_COLOURS = {
    "frozen": "#b34b00",
    "continued": "#0072b2",
    "when unsure": "#56b4e9",
    "pessimistic": "#7f3c8d",
    "guarded": "#009e73",
} | dict.fromkeys(SAYING_NOTHING, GREY)
_DASHES = {"constant": "--", "random": "-."}
_FILMED = ("frozen", "guarded")
_FRAMES_A_SECOND = 25
_SIDE, _LINE = 320, 24  # pixels of a picture, and of a line of text above it


def write_tables(rows: Sequence[Row], out: Path, about: About) -> str:
    """Writes the report, curves as CSV and a video; returns what the report says.

    Args:
        rows: Of `experiments.studies.drift.study_drift`.
        out: The study's directory.
        about: How the cells were made.
    """
    lines = [
        {name: row[name] for name in ("task", "arm", "seed")}
        | dict(zip(_CURVES, values, strict=True))
        | {"alarms": sum(alarm <= values[0] for alarm in row["alarms"])}
        for row in rows
        for values in zip(*(row[name] for name in _CURVES), strict=True)
    ]
    write_text_atomically(out / "curves.csv", as_csv(lines))
    told = [sentence(rows), *_film(rows, out)]
    sections = [
        Section("Return while training on the learned reward", told, curves(rows)),
        Section("After training on the learned reward", [_before(rows)], table=_table(rows)),
    ]
    write_report(out, "What becomes of a policy on a learned reward", sections, about)
    return f"{told[0]}\n\n{as_markdown(sections)}"


def drift_kept(rows: Sequence[Row]) -> dict[str, float]:
    """Final over best true return, interquartile mean over seeds, as figures of a benchmark.

    Args:
        rows: Of `experiments.studies.drift.study_drift`.

    Returns:
        `drift_frozen_kept` and `drift_guard_kept`, of those arms that are there.
    """
    names = {"frozen": "drift_frozen_kept", "guarded": "drift_guard_kept"}
    of = by(rows, "arm")
    return {
        name: float(interquartile_mean(kept(of[arm]))) for arm, name in names.items() if arm in of
    }


def kept(rows: Sequence[Row]) -> Values:
    """`(N,)`: the final policy's true return over the best that it had at any time.

    NaN where the best isn't above zero, of which there is no share to keep.

    Example:
        >>> kept([{"start": 10.0, "true": [40.0, 30.0], "final": 20.0}]).tolist()
        [0.5]
    """
    return numbers(rows, lambda row: row["final"] / best(row) if best(row) > 0 else np.nan)


def best(row: Row) -> float:
    """The highest true return of a cell: before training, in any round of it, or after it."""
    return max(row["start"], *row["true"], row["final"])


def sentence(rows: Sequence[Row]) -> str:
    """What the figure shows, in words, from the numbers under it."""
    of, parts = by(rows, "arm"), []
    for arm, some in of.items():
        parts.append(f"{arm} {_middle(kept(some)):.1%}")
    least = [_middle(kept(of[arm])) for arm in SAYING_NOTHING if arm in of]
    seeds = len(by(rows, "seed"))
    text = (
        f"{rows[0]['task']}, {seeds} seed{'s' if seeds > 1 else ''}: of the best true return of "
        f"its training, the final policy keeps {'; '.join(parts)}."
    )
    if "frozen" in of:
        frozen = of["frozen"]
        lost = sum(kept(frozen) <= 0.7)
        gained = sum(row["predicted"][-1] > row["predicted"][0] for row in frozen)
        text += (
            f" On the frozen reward, {lost} of {len(frozen)} policies lost 30% or more, while the "
            f"return that the reward predicts went up for {gained}."
        )
    if least:
        text += (
            f" Training on a reward that says nothing keeps {min(least):.1%} or more: only what an "
            "arm loses beyond that can its reward be blamed for."
        )
    return f"{text} Dots are alarms; the dotted line is the return before training."


def curves(rows: Sequence[Row]) -> Figure:
    """Predicted return above, true return below, over steps: a colour an arm, a dot an alarm.

    Thick lines are interquartile means over seeds, thin ones the seeds. Predicted returns are those
    by each arm's own reward at the time, whose scale is one standard deviation of a frame; a reward
    that says nothing predicts nothing. The last true return is that of the final policy.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.2), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        ends: dict[object, list[tuple[float, float, str, str]]] = {above: [], below: []}
        for arm, some in by(rows, "arm").items():
            colour = _COLOURS.get(arm, GREY)
            both = ((below, "true"), (above, "predicted"))
            for axes, name in both[: 1 if arm in SAYING_NOTHING else 2]:
                shown = [_whole(row) for row in some] if name == "true" else some
                steps, each = on_one_grid(shown, name)
                middle = interquartile_mean(each, axis=0)
                for line in each:
                    axes.plot(steps, line, color=colour, linewidth=0.5, alpha=0.35)
                axes.plot(steps, middle, _DASHES.get(arm, "-"), color=colour, linewidth=2.4)
                ends[axes].append((float(steps[-1]), float(middle[-1]), arm, colour))
            for row in some:
                at = np.array(row["alarms"], float)
                below.plot(
                    at, np.interp(at, row["step"], row["true"]), "o", color=colour,
                    markersize=3.5, markeredgecolor="white", markeredgewidth=0.4,
                )  # fmt: skip
        below.axhline(numbers(rows, "start").mean(), color=GREY, linestyle=":", linewidth=1.2)
        above.set_ylabel("predicted return per episode\n(the learned reward's units)")
        below.set_ylabel("true return per episode\n(the task's reward units)")
        below.set_xlabel("environment steps on the learned reward")
        below.xaxis.set_major_formatter(EngFormatter(sep=""))
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
            patch.set_alpha(0)
        return named(figure, ends)  # type: ignore[arg-type]


def _whole(row: Row) -> Row:
    """True return with the policy's before training, and the final one's, at either end."""
    step, true = row["step"], row["true"]
    return {"step": [0, *step, step[-1] + 1], "true": [row["start"], *true, row["final"]]}


def on_one_grid(rows: Sequence[Row], name: str) -> tuple[Values, Values]:
    """`(M,)` steps and `(N, M)` values at them, linear in between; what ended early stays.

    Example:
        >>> steps, values = on_one_grid(
        ...     [{"step": [1, 3], "true": [5.0, 7.0]}, {"step": [1, 2], "true": [1.0, 2.0]}], "true"
        ... )
        >>> steps.tolist(), values.tolist()
        ([1.0, 2.0, 3.0], [[5.0, 6.0, 7.0], [1.0, 2.0, 2.0]])
    """
    steps = np.unique(np.concatenate([row["step"] for row in rows])).astype(float)
    return steps, np.stack([np.interp(steps, row["step"], row[name]) for row in rows])


def _table(rows: Sequence[Row]) -> Table:
    frozen_best = {row["seed"]: best(row) for row in rows if row["arm"] == "frozen"}
    lines = []
    for arm, some in by(rows, "arm").items():
        against = numbers(
            [row for row in some if row["seed"] in frozen_best],
            lambda row: row["final"] / frozen_best[row["seed"]],
        )
        lines.append([
            arm, _figure(numbers(some, "final"), number), _figure(kept(some), _share),
            _figure(against, _share) if len(against) else "",
            number(_middle(numbers(some, lambda row: row["comparisons"][-1]))),
            number(_middle(numbers(some, lambda row: len(row["alarms"])))),
        ])  # fmt: skip
    header = ["", "true return", "of its own best", "of the frozen arm's best", "comparisons"]
    return Table([*header, "alarms"], lines)


def _before(rows: Sequence[Row]) -> str:
    before = number(float(numbers(rows, "start").mean()))
    return (
        f"Interquartile mean over {plural(len(by(rows, 'seed')), 'seed', 'seeds')}, and its 95% "
        f"interval. Before it the policy's true return was {before}."
    )


def _share(value: float) -> str:
    return f"{value:.3f}"


def _figure(values: Values, said: object) -> str:
    low, high = bootstrap_interval(interquartile_mean, values)
    return f"{said(_middle(values))} ({said(low)} to {said(high)})"  # type: ignore[operator]


def _middle(values: Values) -> float:
    return float(interquartile_mean(values))


def _film(rows: Sequence[Row], out: Path) -> list[str]:
    """Writes a video of two final policies side by side; returns what it shows, or why not."""
    of = by(rows, "arm")
    shown = {arm: _median(of[arm]) for arm in _FILMED if arm in of}
    if not shown:
        return []
    try:
        films = [_captioned(arm, row) for arm, row in shown.items()]
    except RenderingUnavailable as error:
        return [f"No video: {error}"]
    path = out / f"{'-'.join(shown)}.mp4"
    write_video(np.concatenate(films, axis=2), path, _FRAMES_A_SECOND)
    each = ", ".join(
        f"{arm} {number(sum(row['rewards']))} (seed {row['seed']})" for arm, row in shown.items()
    )
    return [
        f"{path.name} shows whole episodes of final policies. Of each arm it is the seed of median "
        f"return, and of that policy's episodes the one of median true return: {each}."
    ]


def _median(rows: Sequence[Row]) -> Row:
    return sorted(rows, key=lambda row: float(row["final"]))[(len(rows) - 1) // 2]


def _captioned(arm: str, row: Row) -> NDArray[np.uint8]:
    """Pictures of a cell's episode, below its arm, the step and the true return so far."""
    if not row["states"]:
        raise RenderingUnavailable(f"{row['task']} doesn't show the simulator's state.")
    states = np.array(row["states"], np.float32)
    pictures = render_states(find_task(row["task"]), states, _SIDE, _SIDE)
    font, frames = ImageFont.load_default(_LINE * 2 // 3), []
    for step, (picture, so_far) in enumerate(
        zip(pictures, np.cumsum(row["rewards"]), strict=True), start=1
    ):
        frame = Image.new("RGB", (_SIDE, _SIDE + 2 * _LINE), "white")
        frame.paste(Image.fromarray(picture), (0, 2 * _LINE))
        draw = ImageDraw.Draw(frame)
        draw.text((8, 3), arm, _COLOURS[arm], font, stroke_width=0.3)
        draw.text((8, _LINE), f"step {step}", "black", font)
        draw.text((_SIDE // 3, _LINE), f"true return {so_far:.0f}", "black", font)
        frames.append(np.asarray(frame))
    return np.stack(frames)
