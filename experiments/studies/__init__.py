"""Studies: each is one file with `Settings`, `cells`, `cell` and `report`; `run_study` runs any."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields, replace
from importlib import import_module
from json import dumps, loads
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pandas as pd
import torch

from active import SyntheticTeacher
from experiments.analysis.page import Origin, Report, check_json, markdown, publish, write_page
from experiments.datasets.minari import find_pool
from experiments.datasets.pools import Pool
from experiments.envs.tasks import find_task
from experiments.grid import Cell, Run, read_cells, run_cells
from rewardmodels import Clips, Comparisons, InvalidInput
from rewardmodels.saving import write_text_atomically


class Study(Protocol):
    """Shape of a study's module: a module is a `Study`; its functions have no `self`.

    It may also have a function `prepare(settings)`, which runs before the cells, for what they
    share (trained agents, say).

    Attributes:
        Settings: Frozen dataclass: the command's flags, validated in `__post_init__`.
        GRID: Names of the settings that only span the grid (tasks, seeds …), on which no cell
            depends otherwise: the grid may grow in them, and finished cells are kept.
        QUICK: Settings for trends in a minute or two, for `--quick`.
    """

    Settings: type
    GRID: Sequence[str]
    QUICK: Mapping[str, Any]

    def cells(self, settings: Any) -> list[dict[str, Any]]:
        """Axes of each cell: names and plain values."""

    def cell(self, settings: Any, **axes: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """Compute one cell: a row of results, or several."""

    def report(self, results: pd.DataFrame) -> Report:
        """Turn the rows of all cells into the sections and key numbers of a page.

        Args:
            results: A row for each row of each cell: its axes, the settings, what `cell` returned,
                and `cell_seconds`. Some cells may be missing.
        """


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """Settings of a study on agents' recorded episodes (`datasets.pools`).

    Args:
        tasks: Any that `rewardmodels learn` takes.
        seeds: Draws of clips and of initial weights.
        first_seed: The first of them.
        pools: Directory of the agents' episodes; a cluster's workers read it too.
        pool_steps: Environment steps that each agent is trained for.
        pool_episodes: Episodes kept of each stage of training.
    """

    tasks: Sequence[str] = ("HalfCheetah", "Hopper", "Walker2d")
    seeds: int = 5
    first_seed: int = 0
    pools: Path = Path("runs/pools")
    pool_steps: int = 300_000
    pool_episodes: int = 8

    def pool(self, task: str, *, progress: bool = False) -> Pool:
        """Return a task's pool, made if need be."""
        made = {"steps": self.pool_steps, "episodes": self.pool_episodes}
        return find_pool(task, self.pools, progress=progress, **made)


def make_pools(settings: PoolSettings) -> None:
    """Train each task's agent, which its cells share: `prepare` of a study."""
    for task in settings.tasks:
        settings.pool(task, progress=True)


def run_study(
    study: Study,
    settings: Any,
    run: Run | None = None,
    *,
    json: Path | None = None,
    report_only: bool = False,
    progress: bool = True,
) -> Report:
    """Compute the missing cells of a study, and write its page, tables, figures and CSV.

    `run.out` gets `report.html`, `tables.md`, `results.csv`, `figures/` and the cells.

    Args:
        study: Module of the study, such as `experiments.studies.marks`.
        settings: Instance of its `Settings`.
        run: Where and how; None computes here, in a temporary directory that is removed.
        json: File for the report's key numbers.
        report_only: Report on the cells that are there, of a study that is half done.
        progress: Show a progress bar.

    Raises:
        InvalidInput: What `run_cells` refuses, or, with `report_only`, no finished cell.
    """
    check_json(json)
    if hasattr(settings, "first_seed"):
        check_least(settings, first_seed=0)
    if not study.cells(settings):
        raise InvalidInput("settings: expected some cells to compute, got a list that is empty.")
    if run is not None and not report_only:
        try:
            run.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"out: expected a directory that can be written to, got {run.out}: {error}."
            ) from error
    with ExitStack() as stack:
        temporary = run is None
        if run is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            run = Run(folder)
            if isinstance(settings, PoolSettings):
                settings = replace(settings, pools=folder / "pools")
        all_settings = {field.name: getattr(settings, field.name) for field in fields(settings)}
        shared = {name: x for name, x in all_settings.items() if name not in study.GRID}
        shared = loads(dumps(shared, default=str))  # paths as text, tuples as lists
        grid = [{**axes, **shared} for axes in study.cells(settings)]
        compute, where = _CellFunction(study), replace(run, out=run.out / "cells")
        if not report_only:
            cast(Callable[[Any], None], getattr(study, "prepare", lambda _: None))(settings)
            run_cells(compute, grid, where, progress=progress)
        rows, versions = _rows(compute, grid, where.out)
        if not rows:
            raise InvalidInput(
                f"out: expected finished cells of this grid, got none in {run.out}. Leave "
                "--report_only out, or pass the settings that the study was started with."
            )
        results = pd.DataFrame([line for lines in rows for line in lines])
        report = study.report(results)
        plain = [
            n for n in results if not results[n].map(lambda x: isinstance(x, list | dict)).any()
        ]
        write_text_atomically(run.out / "results.csv", results[plain].to_csv(index=False))
        origin = Origin(
            command_line(study, settings),
            all_settings,
            versions,
            seconds=sum(lines[0]["cell_seconds"] for lines in rows),
            note=""
            if len(rows) == len(grid)
            else f"{len(rows)} of {len(grid)} cells are finished.",
        )
        page = write_page(run.out, report, origin)
        print(markdown(report.sections))
        publish(report.numbers, json)
        if not temporary:
            print(f"Report: {page}")
        return report


def command_line(study: Study, settings: Any) -> str:
    """Return the command that runs a study with these settings."""
    words = ["rewardmodels", "study", str(cast(Any, study).__name__).rpartition(".")[2]]
    for field in fields(settings):
        value = getattr(settings, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if default is MISSING or value != default:
            listed = isinstance(value, list | tuple)
            words += [f"--{field.name}", f"[{','.join(map(str, value))}]" if listed else str(value)]
    return shlex.join(words)


def compare_by_return(clips: Clips) -> Comparisons:
    """Compare the first clip with the second, the third with the fourth …, by true return."""
    pairs = torch.arange(len(clips)).view(-1, 2)
    return Comparisons(clips, pairs, SyntheticTeacher().answer(clips, pairs))


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator seeded by several numbers."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(seed))


def seed_range(settings: Any) -> range:
    """Return the seeds of a study's settings with `first_seed` and `seeds`."""
    return range(settings.first_seed, settings.first_seed + settings.seeds)


def check_least(settings: Any, **least: float) -> None:
    """Raise InvalidInput if one of the named settings is below its least value.

    Example:
        >>> check_least(Run(Path("out"), jobs=2), jobs=3)
        Traceback (most recent call last):
            ...
        rewardmodels.errors.InvalidInput: jobs: expected at least 3, got 2.
    """
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise InvalidInput(
                f"{name}: expected at least {value:g}, got {getattr(settings, name)}."
            )


def check_tasks(tasks: Sequence[str], length: int) -> None:
    """Raise unless all tasks exist and their episodes hold clips of `length` frames.

    Raises:
        UnknownName: There is no such task.
        InvalidInput: A task without a time limit, or with a shorter one.
    """
    for task in tasks:
        if length > (horizon := find_task(task).horizon):
            raise InvalidInput(
                f"length: expected at most the {horizon} frames of an episode of {task}, got "
                f"{length}."
            )


class _CellFunction:
    """A study's `cell` as a function of plain values, which other processes can import."""

    def __init__(self, study: Study) -> None:
        # The grid keeps a function's module in `study.json` and names files after its qualified
        # name: these are the study's own, as if its `cell` were computed directly. Pickling carries
        # the module's name, by which workers import the study.
        self.__module__, self.__qualname__ = cast(Any, study).__name__, "cell"

    def __call__(self, **cell: Any) -> Any:
        study = cast(Any, import_module(self.__module__))
        known = {field.name: str(field.type) for field in fields(study.Settings)}
        settings = {name: value for name, value in cell.items() if name in known}
        for name, value in settings.items():
            if "Path" in known[name] and value is not None:
                settings[name] = Path(value)
        axes = {name: value for name, value in cell.items() if name not in known}
        return study.cell(study.Settings(**settings), **axes)


def _rows(
    compute: _CellFunction, grid: Sequence[Cell], out: Path
) -> tuple[list[list[dict[str, Any]]], dict[str, str]]:
    """Rows of each finished cell, and the package versions that computed them."""
    rows, versions = [], dict[str, dict[str, None]]()
    for cell, record in read_cells(compute, grid, out):
        found = record["result"]
        about = {**cell, "cell_seconds": record["seconds"]}
        rows.append([{**about, **row} for row in (found if isinstance(found, list) else [found])])
        for package, version in record["versions"].items():
            versions.setdefault(package, {})[version] = None
    return rows, {package: " and ".join(several) for package, several in versions.items()}
