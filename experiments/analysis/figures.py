"""Figures of a run of `learn`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from experiments.analysis import plots
from experiments.analysis.plots import ARMS, BLUE, GREY, INK, OTHER, Arm, End, label_lines
from experiments.training.run_directory import Floats, RunDirectory
from rewardmodels.errors import InvalidInput


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
    ends = []
    for run in runs:
        x, y = run.curve("step", "task_return")
        if len(x):
            ends.append(_line(axes, x, y, arm_of(run)))
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
    ends = []
    for run in runs:
        x, y = run.curve("comparisons", "task_return")
        if len(x) and x.max() > 0:
            ends.append(_line(axes, x, y, arm_of(run)))
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
    below = []
    for column, arm, name in (
        ("held_out_log_loss", ARMS["learned"], "held out"),
        ("train_log_loss", OTHER, "training"),
    ):
        at, loss = run.curve("comparisons", column)
        if len(at):
            below.append(_line(bottom, at, loss, arm, name))
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
