"""What a run of `learn` left behind, and the figures drawn from it."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec
from zipfile import BadZipFile

import matplotlib as mpl
import numpy as np
import yaml  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from rewardmodels.errors import InvalidInput, UnreadableFile

Floats = NDArray[np.float64]
P = ParamSpec("P")

INK, FAINT = "#222222", "#d9d9d9"
BLUE, ORANGE, GREY = "#0072b2", "#b34b00", "#767676"  # apart for every kind of colour vision


@dataclass(frozen=True)
class Arm:
    """How a run that optimises one kind of reward is called and drawn, in every figure."""

    name: str
    colour: str
    line: str
    marker: str


# Dashes and markers tell the arms apart where colour can't, on paper and in grey.
ARMS = {
    "learned": Arm("learned reward", BLUE, "-", "o"),
    "task": Arm("the task's own reward", ORANGE, "--", "s"),
    "zero": Arm("zero reward", GREY, ":", "^"),
}
OTHER = Arm("unknown reward", INK, "-.", "D")


@dataclass(frozen=True)
class Run:
    """A run directory, read; what isn't there yet is empty.

    Attributes:
        path: The directory.
        metrics: Columns of `metrics.csv`, each `(rounds,)`; an empty cell is NaN.
        result: `result.json`, empty before the run has ended.
        settings: `config.yaml`.
        frames: `frames.npz`: `predicted`, `std` and `true`, each `(M,)`, or empty.
    """

    path: Path
    metrics: Mapping[str, Floats]
    result: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    frames: Mapping[str, Floats] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run directory.

        Raises:
            InvalidInput: If it has no `config.yaml` or no `metrics.csv`.
            UnreadableFile: If one of its files is damaged.
        """
        for name in ("config.yaml", "metrics.csv"):
            if not (path / name).is_file():
                raise InvalidInput(
                    f"{path}: expected a run's directory, with config.yaml and metrics.csv, got "
                    f"one without {name}. `rewardmodels learn --out {path}` makes one."
                )
        return cls(
            path,
            _read(path / "metrics.csv", _columns),
            _read(path / "result.json", lambda file: json.loads(file.read_text("utf-8"))),
            _read(path / "config.yaml", lambda file: yaml.safe_load(file.read_text("utf-8"))),
            _read(path / "frames.npz", _arrays),
        )

    @property
    def arm(self) -> Arm:
        """How the run is called and drawn."""
        kind = self.result.get("reward", self.settings.get("reward"))
        return ARMS.get(kind, OTHER) if isinstance(kind, str) else OTHER

    def curve(self, x: str, y: str) -> tuple[Floats, Floats]:
        """Columns `x` and `y` of the metrics where both have a value, each `(rows,)`."""
        none = np.empty(0)
        xs, ys = self.metrics.get(x, none), self.metrics.get(y, none)
        if len(xs) != len(ys):
            return none, none
        there = np.isfinite(xs) & np.isfinite(ys)
        return xs[there], ys[there]

    def last(self, column: str) -> float:
        """A column's last value, or NaN."""
        values = self.metrics.get(column, np.empty(0))
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else float("nan")

    def outcome(self, key: str, column: str | None = None) -> float:
        """A number of the result, or else of the last round that has it, or NaN."""
        value = self.result.get(key)
        known = isinstance(value, int | float) and np.isfinite(value)
        return float(value) if known else self.last(column or key)  # type: ignore[arg-type]

    @property
    def final_returns(self) -> list[float]:
        """True return of each evaluation episode."""
        returns = self.result.get("final_returns")
        known = returns if isinstance(returns, list) else []
        return [float(r) for r in known if isinstance(r, int | float) and np.isfinite(r)]

    @property
    def final_return(self) -> float:
        """Mean true return of the evaluation, or of the last round while there is none."""
        return self.outcome("final_return", "task_return")


def _read(path: Path, reader: Callable[[Path], Mapping[str, Any] | None]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = reader(path) or {}
        if not isinstance(content, Mapping):
            raise TypeError(f"expected names with values, got a {type(content).__name__}")
    except (
        ValueError,
        TypeError,
        KeyError,
        OSError,
        EOFError,
        BadZipFile,
        yaml.YAMLError,
    ) as error:
        raise UnreadableFile(f"{path}: can't be read, {error}") from error
    return content


def _columns(path: Path) -> dict[str, Floats]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, restval=""))
    names = [name for name in (rows[0] if rows else ()) if name is not None]
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def _arrays(path: Path) -> dict[str, Floats]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name], float) for name in ("predicted", "std", "true")}
    if len({array.shape for array in arrays.values()}) > 1 or arrays["true"].ndim != 1:
        raise ValueError(f"expected one shape (M,), got {[a.shape for a in arrays.values()]}")
    there = np.all([np.isfinite(array) for array in arrays.values()], axis=0)
    return {name: array[there] for name, array in arrays.items()} if there.any() else {}


STYLE: Any = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "axes.unicode_minus": True,
    "svg.hashsalt": "rewardmodels",  # or the same figure gives another file each time
    "pdf.fonttype": 42,  # TrueType, which publishers accept
}


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the house style, and leave the caller's Matplotlib settings as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def save(figure: Figure, stem: Path) -> str:
    """Write `stem.svg`, for a page, and `stem.pdf`, for a paper; returns the SVG's text."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out now; each format would do so twice more
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
    return stem.with_suffix(".svg").read_text("utf-8")


@_styled
def return_vs_steps(runs: Sequence[Run]) -> Figure:
    """True return over training, a line a run; runs of one arm share a colour and a label.

    Raises:
        InvalidInput: If no run has a finished episode.
    """
    figure, axes = _figure()
    ends = []
    for run in runs:
        x, y = run.curve("step", "task_return")
        if len(x):
            ends.append(_line(axes, x, y, run.arm))
    if not ends:
        raise InvalidInput("runs: expected a row of metrics with a task_return, got none.")
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("true return per episode\n(the task's reward units)")
    return _named(figure, {axes: ends})


@_styled
def return_vs_comparisons(runs: Sequence[Run]) -> Figure:
    """True return over answers given; a run that asks nothing is a level line at its result.

    Raises:
        InvalidInput: If no run has made a comparison and finished an episode.
    """
    figure, axes = _figure()
    ends = []
    for run in runs:
        x, y = run.curve("comparisons", "task_return")
        if len(x) and x.max() > 0:
            ends.append(_line(axes, x, y, run.arm))
    if not ends:
        raise InvalidInput("runs: expected a run with comparisons and a task_return, got none.")
    right = max(end[0] for end in ends)
    for run in runs:
        if not run.last("comparisons") > 0 and np.isfinite(run.final_return):
            level = np.full(2, run.final_return)
            ends.append(_line(axes, np.array([0, right]), level, run.arm, marker=""))
    axes.set_xlabel("comparisons (answers given)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("true return per episode\n(the task's reward units)")
    return _named(figure, {axes: ends})


@_styled
def held_out(run: Run) -> Figure:
    """Accuracy and log loss on answers kept from training, over comparisons, beside guessing.

    Raises:
        InvalidInput: If the run has no held-out accuracy.
    """
    x, accuracy = run.curve("comparisons", "held_out_accuracy")
    if not len(x):
        raise InvalidInput("run: expected a row of metrics with held_out_accuracy, got none.")
    figure, top, bottom = _figure(4.8, rows=2)
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
    bottom.set_xlabel("comparisons (answers given)")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set_ylabel("answers predicted")
    bottom.set_ylabel("log loss\n(nats per answer)")
    return _named(figure, {top: above, bottom: below})


@_styled
def predicted_vs_true(frames: Mapping[str, Floats]) -> Figure:
    """Learned against true reward of single frames: their density, and the belief about them.

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
    figure, axes = _figure(3.8)
    # Ever more opaque rather than ever darker: it then works on a dark page too.
    shades = LinearSegmentedColormap.from_list("shades", [to_rgba(BLUE, 0.15), to_rgba(BLUE, 1)])
    axes.hexbin(true, predicted, gridsize=28, mincnt=1, bins="log", cmap=shades, edgecolors="none")
    tenths = np.array_split(np.argsort(true, kind="stable"), min(10, len(true)))
    x, y, reach = (np.array([v[part].mean() for part in tenths]) for v in (true, predicted, std))
    axes.errorbar(x, y, reach, fmt="o", color=INK, markersize=3.5, linewidth=1.2, capsize=2)
    axes.set_xlabel("true reward of a frame (the task's units)")
    axes.set_ylabel("learned reward of a frame\n(arbitrary units)")
    return figure


def correlation(frames: Mapping[str, Floats]) -> float:
    """Pearson correlation of learned and true reward over frames; NaN where either is constant."""
    predicted, true = frames["predicted"], frames["true"]
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, true)[0, 1])


def labels(runs: Sequence[Run]) -> list[str]:
    """What to call each run: its arm, and where two share one, the seed or the directory too."""
    names = [run.arm.name for run in runs]
    seeds = [run.result.get("seed") for run in runs]
    for i, run in enumerate(runs):
        twins = [j for j in range(len(runs)) if runs[j].arm == run.arm and j != i]
        if twins:
            told_by_seed = all(seeds[j] != seeds[i] for j in twins) and seeds[i] is not None
            names[i] += f", seed {seeds[i]}" if told_by_seed else f", {run.path.name}"
    return names


End = tuple[float, float, str, str]  # where a line ends, and what to write there in which colour


def _figure(height: float = 3.3, rows: int = 1) -> tuple[Any, ...]:
    """A figure and its axes, one above the other, through which the page's colour is seen."""
    # As wide as a phone shows without shrinking the text much.
    figure = Figure(figsize=(5.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for patch in figure.patch, *(axes.patch for axes in panels):
        patch.set_alpha(0)
    return figure, *panels


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


def _named(figure: Figure, ends: Mapping[Axes, Sequence[End]]) -> Figure:
    """Name the lines where they end, nudged apart so that no two names overlap."""
    for axes, lines in ends.items():
        axes.set_xlim(0, max(1, *(x for x, *_ in lines)))
        axes.margins(y=0.08)
    figure.draw_without_rendering()  # only now is it known where on the page a value falls
    for axes, each in ends.items():
        lines = _merged(each)
        texts = [textwrap.fill(name, 14) for _, _, name, _ in lines]
        points = 72 / figure.dpi
        at = [points * float(axes.transData.transform((x, y))[1]) for x, y, _, _ in lines]
        placed = spread(at, [7.0 * (1 + text.count("\n")) for text in texts])
        for (x, y, _, colour), text, old, new in zip(lines, texts, at, placed, strict=True):
            axes.annotate(
                text,
                (x, y),
                (8, new - old),
                textcoords="offset points",
                color=colour,
                va="center",
                linespacing=1.0,
                parse_math=False,
                annotation_clip=False,
            )
    return figure


def _merged(ends: Sequence[End]) -> list[End]:
    """One label for all lines of a name, at the mean of their ends."""
    groups: dict[str, list[End]] = {}
    for end in ends:
        groups.setdefault(end[2], []).append(end)
    return [
        (
            max(x for x, *_ in group),
            float(np.mean([y for _, y, *_ in group])),
            name if len(group) == 1 else f"{name}, {len(group)} runs",
            group[0][3],
        )
        for name, group in groups.items()
    ]


def spread(centres: Sequence[float], halves: Sequence[float]) -> list[float]:
    """Move labels along a line, as little as their order allows, until none overlaps the next.

    Args:
        centres: Where each would like to be.
        halves: Half of each one's height, in the same unit.

    Returns:
        Where each goes. Each group that touches is centred on what its members wanted.

    Example:
        >>> spread([0.0, 1.0, 50.0], [5.0, 5.0, 5.0])
        [-4.5, 5.5, 50.0]
    """
    groups: list[tuple[list[int], float, float]] = []  # members, wanted centre, half of the height
    for i in np.argsort(centres, kind="stable").tolist():
        members, centre, half = [i], centres[i], halves[i]
        while groups and groups[-1][1] + groups[-1][2] > centre - half:
            before, _, _ = groups.pop()
            members = before + members
            centre = float(np.mean([centres[j] for j in members]))
            half = sum(halves[j] for j in members)
        groups.append((members, centre, half))
    placed = [0.0] * len(centres)
    for members, centre, half in groups:
        bottom = centre - half
        for i in members:
            placed[i] = bottom + halves[i]
            bottom += 2 * halves[i]
    return placed
