"""Report of a run of `learn`: returns, the judged reward, figures, video, settings."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from experiments.analysis import plots
from experiments.analysis.page import Origin, Report, Section, write_page
from experiments.analysis.plots import ARMS, BLUE, GREY, INK, OTHER, Arm, End, label_lines
from experiments.analysis.stats import number
from experiments.training.run_directory import Floats, RunDirectory, flatten
from rewardmodels.errors import InvalidInput

# Larger pages are slow to open and refused by many mail servers.
EMBEDDED_VIDEO_BYTES = 8_000_000
COMMAND = "rewardmodels learn --config config.yaml --out NEW"


def write_report(run: Path, *, references: Sequence[Path] = ()) -> Path:
    """Write `report.html` into a run's directory, with `tables.md` and `figures/`.

    The page is one file that needs nothing else, except a video of 8 MB or more, which it links.
    What the run hasn't made (yet) is left out.

    Args:
        run: The run's directory, with `config.yaml` and `metrics.csv`.
        references: Directories of other runs of the same task, for comparison; the run itself
            among them is ignored.

    Returns:
        Path of the page.

    Raises:
        InvalidInput: A directory that isn't a run's, or a reference of another task.
        UnreadableFile: A damaged file of a run.
    """
    main = RunDirectory(run)
    others = [RunDirectory(p) for p in references if Path(p).resolve() != main.path.resolve()]
    runs = [main, *others]
    for each in runs:
        each.check_readable()
        if None not in (main.task, each.task) and each.task != main.task:
            raise InvalidInput(
                f"references: expected runs of the task {main.task!r}, got {each.path} "
                f"of {each.task!r}. Returns of different tasks can't be compared."
            )
    result = main.result or {}
    note = "The run hasn't ended: it has no result.json. Numbers are those of its last round."
    origin = Origin(
        COMMAND, flatten(main.settings), result.get("versions", {}),
        main.outcome("wall_seconds", "seconds"), "" if result else note,
    )  # fmt: skip
    title = f"{main.task or 'unnamed task'}, {arm_of(main).name}"
    report = Report(title, _sections(runs))
    return write_page(main.path, report, origin, "report.html.jinja", video=_video(main))


def _sections(runs: Sequence[RunDirectory]) -> list[Section]:
    main = runs[0]
    sections = [results_section(runs)]
    if any(len(run.curve("step", "task_return")[0]) for run in runs):
        text = "Mean true return of the episodes that ended in each round of training."
        figure, table = return_vs_steps(runs), _rounds_table(runs)
        sections.append(Section("True return while training", text, figure, table, digits=1))
    else:
        text = "No episode has finished yet, so there is nothing to draw."
        sections.append(Section("Training", text))
    if max(main.curve("comparisons", "task_return")[0], default=0) > 0:
        text = (
            "Level lines are final results of runs without comparisons. Where training goes on "
            "after the last comparison, the line ends upright."
        )
        figure = return_vs_comparisons(runs)
        sections.append(Section("True return against comparisons", text, figure))
    if len(main.curve("comparisons", "held_out_accuracy")[0]):
        text = (
            "Share of the comparisons kept from training that the learned reward predicts, and "
            "log loss in nats per comparison, against guessing."
        )
        sections.append(Section("Held-out comparisons", text, held_out(main)))
    if main.frames:
        text = (
            "Frames that the final policy visits; the stronger the colour, the more frames. Dots "
            "are means of a tenth of the frames each, bars one epistemic standard deviation. "
            "Comparisons leave the learned reward's scale and offset free."
        )
        figure = predicted_vs_true(main.frames)
        sections.append(Section("Learned against true reward", text, figure))
    if len(scores := _scores_table(main)):
        text = (
            "Held-out scores are of comparisons kept from training. Correlation and EPIC distance "
            "(Gleave et al. 2021, for rewards that depend on the frame alone) are over frames that "
            "the final policy visits; calibration error and area under the risk-coverage curve are "
            "over pairs of its clips, for the preference of the higher true return."
        )
        sections.append(Section("Scores of the learned reward", text, table=scores))
    return sections


def results_section(runs: Sequence[RunDirectory]) -> Section:
    """Outcome of each run, a row a run; the first is the one that is reported on."""
    means = {
        kind: np.mean([run.final_return for run in runs[1:] if run.reward == kind] or [np.nan])
        for kind in ("zero", "task")
    }
    gap, rows = means["task"] - means["zero"], []
    for run, name in zip(runs, _names(runs), strict=True):
        result = run.result or {}
        returns = result.get("final_returns", [])
        row: dict[str, Any] = {
            "reward": name,
            "true return": run.final_return,
            "lowest": min(returns, default=np.nan),
            "highest": max(returns, default=np.nan),
            "episodes": len(returns),
        }
        if gap > 0:
            row["share"] = number(float((run.final_return - means["zero"]) / gap), ".0%")
        for key in (key for key in result if key.endswith("_per_1000_steps")):
            counts = result[key.removesuffix("_per_1000_steps")]
            row[key.replace("_", " ")] = float(result[key])
            row["per episode"] = f"{min(counts)} to {max(counts)}"
        for column, key in (("steps", "step"), ("comparisons", "comparisons")):
            row[column] = number(run.outcome(column, key), ",.0f")
        row["minutes"] = run.outcome("wall_seconds", "seconds") / 60
        rows.append(row)
    return Section(
        "Result",
        "Mean true return of the final policy's evaluation episodes, with their range, by the "
        "task's own reward, which the learned reward never sees. The share is that of the way from "
        "zero reward to the task's own reward. A row is one seed: it takes at least five of each "
        "to say that one way of learning beats another.",
        table=pd.DataFrame(rows, dtype=object),
        digits=1,
    )


def _rounds_table(runs: Sequence[RunDirectory]) -> pd.DataFrame:
    """Returns of the first, best and last round in which an episode ended."""
    rows = []
    for run, name in zip(runs, _names(runs), strict=True):
        metrics = run.metrics.reindex(columns=["step", "comparisons", "task_return"])
        metrics = metrics.dropna(subset=["task_return"])
        if metrics.empty:
            continue
        best = metrics["task_return"].argmax()
        for label, place in (("first", 0), ("best", best), ("last", -1)):
            *counts, task_return = metrics.iloc[place]
            rows.append((name, label, *(number(x, ",.0f") for x in counts), task_return))
    columns = ["reward", "round", "steps", "comparisons", "true return"]
    return pd.DataFrame(rows, columns=columns, dtype=object)


# Name, key in the result, value for a reward that knows nothing, and whether higher is better.
_SCORES = (
    ("held-out accuracy", "held_out_accuracy", 0.5, True),
    ("held-out log loss, nats", "held_out_log_loss", float(np.log(2)), False),
    ("correlation with the true reward", "reward_correlation", 0.0, True),
    ("EPIC distance to the true reward", "epic_distance", float(np.sqrt(0.5)), False),
    ("area under the risk-coverage curve", "aurc", 0.5, False),
    ("calibration error", "calibration_error", np.nan, False),
)


def _scores_table(run: RunDirectory) -> pd.DataFrame:
    """Scores of the learned reward, compared with those of guessing."""
    rows = []
    for name, key, guessing, higher_is_better in _SCORES:
        if np.isfinite(value := run.outcome(key)):
            gain = value - guessing if higher_is_better else guessing - value
            verdict = "better" if gain > 0 else "worse" if gain < 0 else "unclear"
            rows.append((name, value, guessing, "–" if np.isnan(gain) else verdict))
    if frames := run.frames:
        rows.append(("mean epistemic standard deviation", frames["std"].mean(), np.nan, "–"))
        rows.append(("frames", len(frames["std"]), np.nan, "–"))
    return pd.DataFrame(rows, columns=["score", "value", "guessing", "than guessing"], dtype=object)


def _video(run: RunDirectory) -> dict[str, str]:
    """Source of the page's video, or the reason why there is none."""
    file = run.path / "video.mp4"
    if not file.is_file():
        return {"note": (run.result or {}).get("video_note") or "the run has left no video.mp4."}
    if file.stat().st_size >= EMBEDDED_VIDEO_BYTES:
        return {"source": file.name}
    return {"source": "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()}


def _names(runs: Sequence[RunDirectory]) -> list[str]:
    """Name of each run's reward, with the seed or directory where several have the same."""
    names = [arm_of(run).name for run in runs]
    seeds = [(run.result or {}).get("seed") for run in runs]
    unique = []
    for i, run in enumerate(runs):
        twins = [j for j in range(len(runs)) if names[j] == names[i] and j != i]
        by_seed = seeds[i] is not None and all(seeds[j] != seeds[i] for j in twins)
        extra = f", seed {seeds[i]}" if by_seed else f", {run.path.name}"
        unique.append(names[i] + (extra if twins else ""))
    return unique


def arm_of(run: RunDirectory) -> Arm:
    """Name and look of a run, by the reward that its policy maximises."""
    return ARMS.get(run.reward, OTHER)


@plots.style()
def return_vs_steps(runs: Sequence[RunDirectory]) -> Figure:
    """True return over training, a line a run; runs of one arm share a colour and a label.

    Raises:
        InvalidInput: If no run has a finished episode.
    """
    figure, [axes] = plots.panels(1)
    curves = [(*run.curve("step", "task_return"), arm_of(run)) for run in runs]
    ends = [_line(axes, x, y, arm) for x, y, arm in curves if len(x)]
    if not ends:
        raise InvalidInput("runs: expected a row of metrics with a task_return, got none.")
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("true return per episode\n(the task's reward units)")
    return label_lines(figure, {axes: ends})


@plots.style()
def return_vs_comparisons(runs: Sequence[RunDirectory]) -> Figure:
    """True return against comparisons; a run without any is a level line at its result.

    Raises:
        InvalidInput: If no run has made a comparison and finished an episode.
    """
    figure, [axes] = plots.panels(1)
    curves = [(*run.curve("comparisons", "task_return"), arm_of(run)) for run in runs]
    ends = [_line(axes, x, y, arm) for x, y, arm in curves if x.max(initial=0) > 0]
    if not ends:
        raise InvalidInput("runs: expected a run with comparisons and a task_return, got none.")
    right = max(end[0] for end in ends)
    for run in runs:
        if not run.outcome("comparisons") > 0 and np.isfinite(run.final_return):
            level = np.full(2, run.final_return)
            ends.append(_line(axes, np.array([0, right]), level, arm_of(run), marker=""))
    axes.set_xlabel("comparisons")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("true return per episode\n(the task's reward units)")
    return label_lines(figure, {axes: ends})


@plots.style()
def held_out(run: RunDirectory) -> Figure:
    """Accuracy and log loss on held-out comparisons, against the number of comparisons.

    Raises:
        InvalidInput: If the run has no held-out accuracy.
    """
    x, accuracy = run.curve("comparisons", "held_out_accuracy")
    if not len(x):
        raise InvalidInput("run: expected a row of metrics with held_out_accuracy, got none.")
    figure, [top, bottom] = plots.panels(2, height=2.4, sharex=True)
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    above = [_line(top, x, accuracy, ARMS["learned"], "held out")]
    above.append(_level(top, 0.5, x[-1], "chance"))
    looks = {"held_out": (ARMS["learned"], "held out"), "train": (OTHER, "training")}
    losses = [(*run.curve("comparisons", f"{of}_log_loss"), *look) for of, look in looks.items()]
    below = [_line(bottom, *line) for line in losses if len(line[0])]
    below.append(_level(bottom, float(np.log(2)), x[-1], "chance"))
    bottom.set_xlabel("comparisons")
    bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    top.set_ylabel("share predicted")
    bottom.set_ylabel("log loss\n(nats per comparison)")
    return label_lines(figure, {top: above, bottom: below})


@plots.style()
def predicted_vs_true(frames: Mapping[str, Floats]) -> Figure:
    """Learned against true reward of single frames: their density, and the uncertainty.

    The bars stand at the mean of each tenth of the frames, ordered by true reward, and reach one
    epistemic standard deviation (its mean in that tenth) to either side.

    Args:
        frames: `predicted`, `std` (both in the learned reward's units) and `true`, each `(M,)`.

    Raises:
        InvalidInput: If there are no frames.
    """
    if not len(frames.get("true", ())):
        raise InvalidInput("frames: expected predicted, std and true of at least one frame.")
    predicted, std, true = (frames[name] for name in ("predicted", "std", "true"))
    figure, [axes] = plots.panels(1, height=3.8)
    # Ever more opaque rather than ever darker: it then works on a dark page too.
    shades = LinearSegmentedColormap.from_list("shades", [to_rgba(BLUE, 0.15), to_rgba(BLUE, 1)])
    axes.hexbin(true, predicted, gridsize=28, mincnt=1, bins="log", cmap=shades, edgecolors="none")
    tenths = np.array_split(np.argsort(true, kind="stable"), min(10, len(true)))
    x, y, reach = (np.array([v[part].mean() for part in tenths]) for v in (true, predicted, std))
    axes.errorbar(x, y, reach, fmt="o", color=INK, markersize=3.5, linewidth=1.2, capsize=2)
    axes.set_xlabel("true reward of a frame (the task's units)")
    axes.set_ylabel("learned reward of a frame\n(arbitrary units)")
    return figure


def _line(
    axes: Axes, x: Floats, y: Floats, arm: Arm, name: str = "", marker: str | None = None
) -> End:
    name = name or arm.name
    if marker is None:
        marker = arm.marker if len(x) <= 40 else ""
    axes.plot(x, y, color=arm.colour, linestyle=arm.line, marker=marker, label=name, clip_on=False)
    return float(x[-1]), float(y[-1]), name, arm.colour


def _level(axes: Axes, y: float, right: float, name: str) -> End:
    axes.axhline(y, color=GREY, linestyle=":", label=name)
    return right, y, name, GREY
