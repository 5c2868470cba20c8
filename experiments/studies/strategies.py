"""Which questions teach most? Strategies side by side, where every answer is already known.

**Pool mode.** One agent's clips at ten stages of training are cut from its kept episodes
(`datasets.pools`), and all their pairs may be asked about. Each strategy starts from the same
random batch; then it is shown the belief of a predictor that was taught the answers so far, chooses
a batch, and gets the answers. A predictor is made anew for each round, so that no strategy has
another's luck. After each batch its accuracy is measured on pairs of clips from other episodes.
Candidates, tests and first batches depend on the task and the seed alone: what is compared are
strategies, seed by seed.

**Real people.** The same with published answers (`datasets.people`): only pairs that
somebody compared may be asked about, and tests are of groups that were left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from active import STRATEGIES, QueryStrategy, SyntheticTeacher, all_pairs
from experiments.analysis.old_page import about_study
from experiments.datasets.minari import find_pool, is_minari
from experiments.datasets.people import HUMAN_DATA, HumanData, splits
from experiments.datasets.pools import Pool
from experiments.grid import Cell, Result, cell_file, read_cell, remember, run_study
from experiments.grid_workers import check_workers
from experiments.registry import find_class
from experiments.studies.limits import check_least, check_tasks
from experiments.studies.predictors import half, maker, people
from experiments.studies.strategy_tables import write_tables
from experiments.studies.summary import Row
from rewardmodels import Comparisons, InvalidInput, fit
from rewardmodels import calibration as score

TASKS = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d")

_EPOCHS = 100
_FOLDS = 5


def study_strategies(
    data: Path | None = None,
    tasks: Sequence[str] = TASKS,
    strategies: Sequence[str] = tuple(STRATEGIES),
    predictor: str = "LaplaceHead",
    budget: int = 200,
    batch: int = 20,
    clips: int = 200,
    length: int = 25,
    tests: int = 1000,
    seeds: int = 10,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    address: str | None = None,
    pools: Path = Path("runs/pools"),
    out: Path = Path("runs/study-strategies"),
    compute: bool = True,
) -> dict[str, list[Row]]:
    """Compares query strategies by the comparisons that they save over uniform ones.

    Args:
        data: Folder with people's answers, as `rewardmodels study predictors` takes it; None leaves
            people out.
        tasks: Any that `rewardmodels learn` takes, or Minari data sets with rewards, as
            `minari:NAME` or `minari:PATH`; may be none where there is `data`.
        strategies: Names of ours, or import paths of others; `Uniform` is always among them.
        predictor: A name or an import path.
        budget: Comparisons in all.
        batch: Comparisons between two fits.
        clips: Candidates, all pairs of which may be asked about.
        length: Frames per clip.
        tests: Pairs that accuracy is measured on.
        seeds: Draws of candidates, tests, first batches and initial weights.
        jobs: Cells side by side.
        backend: loky for this machine, or a cluster; as `experiments.grid` has it.
        address: The cluster's; None starts one here.
        pools: Where the agents' episodes are kept; a cluster's workers read it too.
        out: Where results are kept; a second call goes on with those that are there.
        compute: False makes the report from the cells that stand there, of a study that is half
            done.

    Returns:
        The cells of `pool_cell` and `people_cell`, as "pool" and "people"; `out` has them as CSV,
        with `report.html`, `tables.md` and the figures.

    Raises:
        InvalidInput: A number out of range, clips longer than a task's episodes, neither tasks nor
            data, a folder without the files, a pool whose rewards tell nothing apart, a directory
            of another study or version, or, without `compute`, one without a cell of this grid.
        UnknownName: A task, strategy or predictor that there isn't.
    """
    settings = dict(locals())
    check_least(
        ("batch", batch, 2), ("budget", budget, 2 * batch), ("clips", clips, 4),
        ("length", length, 1), ("tests", tests, 10), ("seeds", seeds, 1), ("jobs", jobs, 1),
    )  # fmt: skip
    if not tasks and data is None:
        raise InvalidInput(
            "tasks: expected at least one where there is no data of people's, got none."
        )
    if clips * (clips - 1) // 2 < budget:
        raise InvalidInput(f"clips: expected enough for {budget} different pairs, got {clips}.")
    maker(predictor)
    names = list(dict.fromkeys(["Uniform", *strategies]))
    for name in names:
        _strategy(name)
    check_tasks([task for task in tasks if not is_minari(task)], length)
    for task in filter(is_minari, tasks):
        _check_rewards(find_pool(task, pools))
    check_workers(backend, address)
    folder = {} if data is None else {"folder": str(data)}
    known = [] if data is None else [people(name, str(data)).name for name in HUMAN_DATA]
    common = {"predictor": predictor, "budget": budget, "batch": batch}
    grid = {
        "pool": [
            {"task": task, "strategy": name, "seed": seed, **common, "clips": clips,
             "length": length, "tests": tests, "pools": str(pools)}
            for seed in range(seeds) for task in tasks for name in names
        ],
        "people": [
            {"task": of, "strategy": name, "seed": seed, **common, **folder}
            for seed in range(seeds) for of in known for name in names
        ],
    }  # fmt: skip
    functions: dict[str, Callable[..., Result]] = {"pool": pool_cell, "people": people_cell}
    grid = {kind: cells for kind, cells in grid.items() if cells}
    if compute:
        for kind, cells in grid.items():  # a directory of another study costs no trained agent
            remember(functions[kind], cells, out / "cells")
        for task in tasks:
            if not is_minari(task):
                _check_rewards(find_pool(task, pools))
        for kind, cells in grid.items():
            run_study(
                functions[kind], cells, out / "cells", jobs=jobs, backend=backend, address=address
            )
    rows = {kind: _standing(functions[kind], cells, out) for kind, cells in grid.items()}
    rows = {kind: found for kind, found in rows.items() if found}
    if not rows:
        raise InvalidInput(
            f"out: expected cells of this grid, got {out}, where none stands. Leave --compute out, "
            "or pass the settings that the study was started with."
        )
    stand, all_ = sum(map(len, rows.values())), sum(map(len, grid.values()))
    note = "" if stand == all_ else f"Not finished: {stand} of {all_} cells stand there."
    if note:
        print(note + "\n")
    every = [row for cells in rows.values() for row in cells]
    about = about_study(study_strategies, settings, every, out)
    print(write_tables(rows, out, about, note=note))
    return rows


def _check_rewards(pool: Pool) -> None:
    """Refuses a pool that a synthetic teacher can't answer by."""
    if float(pool.returns.max()) == float(pool.returns.min()):
        raise InvalidInput(
            f"pools: expected episodes of {pool.task} with true rewards, by which the synthetic "
            f"teacher answers, got {len(pool.trajectories)} that all return "
            f"{float(pool.returns[0]):g}. Delete the file, and the pool is made anew."
        )


def _standing(function: Callable[..., Result], cells: Sequence[Cell], out: Path) -> list[Row]:
    """Those of the cells that have a result, with it."""
    records = [(cell, read_cell(cell_file(function, cell, out / "cells"))) for cell in cells]
    return [{**cell, **record["result"]} for cell, record in records if record]


def pool_cell(
    task: str,
    strategy: str,
    seed: int,
    predictor: str,
    budget: int,
    batch: int,
    clips: int,
    length: int,
    tests: int,
    pools: str,
    teacher: str = "oracle",
    **made: int,
) -> Result:
    """What one strategy learns on one task, after each batch; `made` goes to `make_pool`.

    Raises:
        InvalidInput: A teacher who skips, of whom a pool's answers can't be had beforehand.
    """
    torch.set_num_threads(1)
    pool, draw = find_pool(task, Path(pools), progress=False, **made), _generator(seed)
    known, fresh = (half(pool, which) for which in (0, 1))
    candidates = known.clips(clips, length, draw)
    test = fresh.clips(2 * tests, length, draw)
    pairs, tested = all_pairs(clips), torch.arange(2 * tests).view(tests, 2)
    said = find_class("teacher", teacher)().answer(candidates, pairs, draw)
    if said.isnan().any():
        raise InvalidInput(
            f"teacher: expected one who answers every question, got {teacher}, who skips "
            f"{int(said.isnan().sum())} of {len(said)}."
        )
    every = Comparisons(candidates, pairs, said)
    right = Comparisons(test, tested, SyntheticTeacher().answer(test, tested, draw))
    return _learn(every, right, strategy, predictor, seed, budget, batch)


def people_cell(
    task: str, strategy: str, seed: int, predictor: str, budget: int, batch: int, folder: str
) -> Result:
    """What one strategy learns from one set of people's answers, after each batch."""
    torch.set_num_threads(1)
    known: HumanData = people(task, folder)
    train, test = list(splits(known, _FOLDS, seed=seed))[seed % _FOLDS]
    every, right = (
        known.comparisons[torch.from_numpy(rows[known.decided[rows]])].compact()
        for rows in (train, test)
    )
    return _learn(every, right, strategy, predictor, seed, min(budget, len(every)), batch)


def _learn(
    every: Comparisons,
    tests: Comparisons,
    strategy: str,
    predictor: str,
    seed: int,
    budget: int,
    batch: int,
) -> Result:
    chooser, draw = _strategy(strategy)(), _generator(seed, 1)
    asked = torch.randperm(len(every), generator=_generator(seed, 2))[:batch]
    left = torch.ones(len(every), dtype=torch.bool)
    figures: Result = {"comparisons": [], "accuracy": [], "log loss": []}
    while True:
        left[asked] = False
        model = fit(maker(predictor)(), every[asked].compact(), epochs=_EPOCHS, seed=seed)
        belief = model.posterior(tests.clips).preference(tests.pairs)
        decided = tests.preference != 0.5
        correct = ((belief > 0.5) == (tests.preference > 0.5))[decided]
        figures["comparisons"].append(len(asked))
        figures["accuracy"].append(float(correct.double().mean()))
        figures["log loss"].append(score.log_loss(belief, tests.preference))
        n = min(batch, budget - len(asked))
        if n <= 0:
            return figures
        rows = left.nonzero().squeeze(1)
        chosen = chooser.select(model.posterior(every.clips), every.pairs[rows], n, generator=draw)
        asked = torch.cat([asked, rows[chosen]])


def _strategy(name: str) -> Callable[[], QueryStrategy]:
    return find_class("strategy", name)


def _generator(*numbers: int) -> torch.Generator:
    (seed,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(seed))
