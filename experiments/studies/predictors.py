"""May its uncertainty be believed? Every predictor, in distribution, shifted, and on real people.

**Simulated.** One agent is trained on each MuJoCo task's own reward, and its episodes at ten
stages of training are kept (`datasets.pools`). A synthetic teacher compares clips of the four
worst stages. A predictor is taught most of the answers and calibrated on the rest, and then
asked about clips of the same stages from episodes that weren't labelled ("in distribution"), and of
the three best stages ("shifted"): behaviour far better than any that was labelled. Right is what
the true return says.

**Real people.** Three published sets of comparisons (`datasets.people`), in folds that keep
together what belongs together; and deliveries through mud by predictors that never saw any. The
weight decay is chosen inside each training fold, for predictors as for the regression they
are compared with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits
from torch import Tensor

from active.teachers import SyntheticTeacher
from experiments.datasets.people import HUMAN_DATA, HumanData, baseline, splits
from experiments.datasets.pools import Pool, make_pool
from experiments.grid import Cell, Result, run_study
from experiments.registry import find_class
from experiments.studies.limits import check_least, check_tasks
from experiments.studies.predictor_scores import (
    CALIBRATED_ON,
    coverage,
    of_answers,
    of_returns,
    scores,
)
from experiments.studies.predictor_tables import BASELINE, write_tables
from experiments.studies.summary import Row
from rewardmodels import (
    Calibrated,
    Clips,
    Comparisons,
    DeepEnsemble,
    Epinet,
    FitOptions,
    GPHead,
    InvalidInput,
    LaplaceHead,
    MCDropout,
    RewardModel,
    fit,
)
from rewardmodels import calibration as score

TASKS = ("HalfCheetah", "Hopper", "Walker2d")
SINGLE = "single network"

PREDICTORS: dict[str, Callable[..., RewardModel]] = {
    SINGLE: lambda **options: DeepEnsemble(members=1, **options),
    "DeepEnsemble": lambda **options: DeepEnsemble(members=10, **options),
    "RandomisedPriors": lambda **options: DeepEnsemble(members=10, prior_scale=0.3, **options),
    "MCDropout": MCDropout,
    "LaplaceHead": LaplaceHead,
    "Epinet": Epinet,
    "GPHead": GPHead,
}
"""What is compared, by the name in the tables; a function of `RewardModel`'s options."""

_LABELLED, _SHIFTED = slice(0, 4), slice(-3, None)
_CALIBRATION_SHARE = 0.3
_WEIGHT_DECAYS = (1.0, 30.0)  # AdamW multiplies them by the learning rate
_PEOPLES_BATCH = 256  # of thousands of answers, and clips of few frames
_FOLDS = 5


def study_predictors(
    data: Path | None = None,
    tasks: Sequence[str] = TASKS,
    predictors: Sequence[str] = tuple(PREDICTORS),
    comparisons: int = 300,
    length: int = 25,
    tests: int = 5000,
    seeds: int = 5,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    address: str | None = None,
    pools: Path = Path("runs/pools"),
    out: Path = Path("runs/study-predictors"),
) -> dict[str, list[Row]]:
    """Compares predictors on simulated tasks and, with `data`, on real people's answers.

    Args:
        data: Folder with `delivery.npz`, `pandalm.npz` and `train_tickets.npz`; None leaves people
            out.
        tasks: Any that `rewardmodels learn` takes.
        predictors: Names of ours, or import paths of others.
        comparisons: Answers to learn from and calibrate on, in all.
        length: Frames per clip.
        tests: Pairs asked about afterwards.
        seeds: Draws of clips and of initial weights.
        jobs: Cells side by side.
        backend: loky for this machine, or a cluster; as `experiments.grid` has it.
        address: The cluster's; None starts one here.
        pools: Where the agents' episodes are kept; a cluster's workers read it too.
        out: Where results are kept; a second call goes on with those that are there.

    Returns:
        The cells of `simulated`, `human` and `speed`, by those names; the same stand in `out` as
        CSV, with `tables.md` and the figures.

    Raises:
        InvalidInput: A number out of range, clips longer than a task's episodes, no tasks, or a
            folder without the files.
        UnknownName: A task or predictor that there isn't.
    """
    check_least(
        ("comparisons", comparisons, 20), ("length", length, 1), ("seeds", seeds, 1),
        ("tests", tests, 2 * CALIBRATED_ON), ("jobs", jobs, 1),
    )  # fmt: skip
    if not tasks:
        raise InvalidInput("tasks: expected at least one, got none.")
    for predictor in predictors:
        maker(predictor)
    check_tasks(tasks, length)
    sets = [] if data is None else [people(name, str(data)) for name in HUMAN_DATA]
    for task in tasks:
        make_pool(task, folder=pools)  # before the fan-out, or each process would make its own
    settings = {"comparisons": comparisons, "length": length, "tests": tests, "pools": str(pools)}
    grid = [
        {"task": task, "predictor": predictor, "seed": seed, **settings}
        for seed in range(seeds)
        for task in tasks
        for predictor in predictors
    ]
    where: dict[str, Any] = {"jobs": jobs, "backend": backend, "address": address}
    rows = {"simulated": _run(simulated, grid, out, **where)}
    if data is not None:
        names = [name for known in sets for name in (known.name, *_left_out(known))]
        folds = [
            {"data": name, "predictor": predictor, "fold": fold, "folder": str(data)}
            for name in names
            for predictor in (BASELINE, *predictors)
            for fold in range(_FOLDS)
        ]
        rows["human"] = _run(human, folds, out, **where)
    # By itself, so that nothing else of ours takes its time.
    rows["speed"] = _run(speed, [{"predictor": predictor} for predictor in predictors], out)
    print(write_tables(rows, out))
    return rows


def _left_out(data: HumanData) -> list[str]:
    return [f"{data.name}/{name}" for name in data.held_out]


def _run(
    function: Callable[..., Result], cells: Sequence[Cell], out: Path, **where: Any
) -> list[Row]:
    results = run_study(function, cells, out / "cells", **where)
    return [{**cell, **result} for cell, result in zip(cells, results, strict=True)]


def simulated(
    task: str,
    predictor: str,
    seed: int,
    comparisons: int,
    length: int,
    tests: int,
    pools: str,
    **made: int,
) -> Result:
    """One predictor's scores on one task, with one draw of clips and one of initial weights.

    Args:
        task: Of `TASKS`, or any other that `make_pool` knows.
        predictor: Of `PREDICTORS`, or a class's import path.
        seed: Of everything that is drawn.
        comparisons: Answers to learn from and calibrate on, in all.
        length: Frames per clip.
        tests: Pairs asked about afterwards.
        pools: Directory of `make_pool`.
        made: What else it is given.
    """
    torch.set_num_threads(1)
    pool = make_pool(task, folder=Path(pools), progress=False, **made)
    known, fresh = (half(pool, which) for which in (0, 1))
    draw = torch.Generator().manual_seed(seed)

    said = asked(known, comparisons, length, draw, _LABELLED)
    test = {
        "in distribution": asked(fresh, tests, length, draw, _LABELLED),
        "shifted": asked(fresh, tests, length, draw, _SHIFTED),
    }
    kept = round(comparisons * _CALIBRATION_SHARE)
    model, figures = _taught(maker(predictor), said[kept:], seed=seed)
    calibrated = Calibrated(model).calibrate(said[:kept], random=True)
    for name, some in test.items():
        for kind, asks in (("", calibrated), ("raw ", model)):
            belief = asks.posterior(some.clips)
            found = scores(belief, some) | of_returns(belief, some)
            figures |= {f"{name}/{kind}{k}": v for k, v in found.items()}
    if seed == 0:
        figures["coverage"] = coverage(model, test["in distribution"])
    return figures


def human(data: str, predictor: str, fold: int, folder: str, seed: int = 0) -> Result:
    """One predictor's scores on the answers of people, in one fold.

    Args:
        data: Of `HUMAN_DATA`; "delivery/mud" leaves mud out of the training.
        predictor: Of `PREDICTORS`, a class's import path, or `BASELINE`.
        fold: Which of five is tested on.
        folder: Where the files are.
        seed: Of initial weights and of the folds.
    """
    torch.set_num_threads(1)
    name, _, left_out = data.partition("/")
    known = people(name, folder)
    train, test = list(splits(known, _FOLDS, seed=seed))[fold]
    if left_out:
        unknown = known.held_out[left_out]
        train, test = train[~unknown[train]], test[unknown[test]]
    decided = test[known.decided[test]]
    said = known.comparisons[torch.from_numpy(decided)].compact()
    if predictor == BASELINE:
        started = time.perf_counter()
        p = torch.from_numpy(baseline(known, train, decided))
        figures: Result = {"fit seconds": time.perf_counter() - started}
        return figures | of_answers(p, said.preference)
    make = maker(predictor)
    train = train[known.decided[train]]
    taught, asked = _inner_split(known, train)
    losses = []
    like: dict[str, Any] = {"seed": seed, "batch_size": _PEOPLES_BATCH}
    for weight_decay in _WEIGHT_DECAYS:
        model, _ = _taught(make, *_rows(known, taught), weight_decay=weight_decay, **like)
        some = known.comparisons[torch.from_numpy(asked)].compact()
        p = model.posterior(some.clips).preference(some.pairs)
        losses.append(score.log_loss(p, some.preference))
    best = _WEIGHT_DECAYS[int(np.argmin(losses))]
    model, figures = _taught(make, *_rows(known, train), weight_decay=best, **like)
    return figures | {"weight decay": best} | scores(model.posterior(said.clips), said)


def speed(predictor: str) -> Result:
    """Microseconds a frame at batch 1 and at batch 4096, with uncertainty; milliseconds of clips.

    Of frames of 17 and 6 numbers (HalfCheetah's), on one thread; medians.
    """
    torch.set_num_threads(1)
    with threadpool_limits(1):  # NumPy's
        return _speed(predictor)


def _speed(predictor: str) -> Result:
    draw = torch.Generator().manual_seed(0)
    clips = Clips(
        torch.randn(1000, 25, 17, generator=draw), torch.randn(1000, 25, 6, generator=draw)
    )
    some = Comparisons(clips[:200], torch.arange(200).view(100, 2), torch.arange(100) % 2.0)
    model = fit(maker(predictor)(), some, epochs=1)
    scorer = model.frame_scorer()
    observations, actions = (x.flatten(0, 1)[:4096] for x in (clips.observations, clips.actions))
    one = observations[0].numpy(), actions[0].numpy()
    return {
        "frame us": 1e6 * _median(lambda: scorer(*one), 3000),
        "frame us at 4096": 1e6
        / 4096
        * _median(lambda: scorer.batch(observations.numpy(), actions.numpy()), 20),
        "1,000 clips ms": 1e3 * _median(lambda: model.posterior(clips), 10),
    }


def _median(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _taught(
    make: Callable[..., RewardModel],
    comparisons: Comparisons,
    groups: Tensor | None = None,
    *,
    seed: int,
    batch_size: int = 64,
    **settings: Any,
) -> tuple[RewardModel, dict[str, Any]]:
    model = make(**settings)
    started = time.perf_counter()
    options = FitOptions(batch_size=batch_size, groups=groups)
    fit(model, comparisons, seed=seed, options=options)
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, {"fit seconds": seconds, "parameters": parameters}


def asked(pool: Pool, n: int, length: int, draw: torch.Generator, skills: slice) -> Comparisons:
    """N error-free answers about as many pairs of a pool's clips, of which no two share one."""
    clips = pool.clips(2 * n, length, draw, skills=skills)
    pairs = torch.arange(2 * n).view(n, 2)
    return Comparisons(clips, pairs, SyntheticTeacher().answer(clips, pairs, draw))


def half(pool: Pool, which: int) -> Pool:
    """The first half of each skill's episodes, or the second."""
    rows = torch.cat(
        [
            (pool.skill == skill).nonzero().squeeze(1).tensor_split(2)[which]
            for skill in range(len(pool.steps))
        ]
    )
    return replace(pool, trajectories=pool.trajectories[rows], skill=pool.skill[rows])


def maker(predictor: str) -> Callable[..., RewardModel]:
    """What makes a predictor, of a name in `PREDICTORS` or an import path.

    Raises:
        UnknownName: There is none.
        InvalidInput: It is something else.
    """
    return find_class("model", predictor, PREDICTORS)


def _rows(data: HumanData, rows: np.ndarray) -> tuple[Comparisons, Tensor]:
    return data.comparisons[torch.from_numpy(rows)], torch.from_numpy(data.groups[rows])


def _inner_split(data: HumanData, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A quarter of the rows' groups to choose settings by, and the rest."""
    taught, asked = next(GroupKFold(4).split(rows, groups=data.groups[rows]))
    return rows[taught], rows[asked]


@lru_cache(maxsize=4)
def people(name: str, folder: str) -> HumanData:
    """A set of people's answers, read once."""
    return HUMAN_DATA[name](Path(folder))
