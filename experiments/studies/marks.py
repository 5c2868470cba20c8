"""What is a mark worth? Comparisons alone, beside as many with marks of the clips they show.

One agent's clips at ten stages of training are cut from its kept episodes (`datasets.pools`),
and pairs drawn at random are answered by the true return. For some counts of comparisons a
predictor is made anew and taught these, or these and marks: a synthetic person who has been shown
a pair also marks one of its clips, or both, the stretch with the best true reward as good and the
worst as bad (`active.SyntheticMarker`), mistakes one for the other as often as asked, and leaves
a clip alone where no stretch stands out. Accuracy is that on pairs of clips from other episodes.
Clips, pairs, tests and initial weights depend on the task and the seed alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from active import SyntheticMarker, SyntheticTeacher
from experiments.analysis.page import about_study
from experiments.datasets.minari import find_pool
from experiments.grid import Result, cell_file, run_study
from experiments.grid_files import read_cell
from experiments.studies.limits import check_least, check_tasks
from experiments.studies.marks_tables import write_tables
from experiments.studies.predictors import half, maker
from experiments.studies.summary import Row
from rewardmodels import Comparisons, InvalidInput, fit
from rewardmodels import calibration as score

TASKS = ("HalfCheetah", "Hopper", "Walker2d")
POOLS, OUT = Path("runs/pools"), Path("runs/study-marks")

_EPOCHS = 100
_FRAMES = 200  # clips whose frames are looked at one by one


def study_marks(
    tasks: Sequence[str] = TASKS,
    marked: Sequence[int] = (2,),
    predictor: str = "LaplaceHead",
    counts: Sequence[int] = (10, 20, 40, 80),
    length: int = 25,
    stretch: int = 5,
    stands_out: float = 0.5,
    mistake_rate: float = 0.0,
    tests: int = 1000,
    seeds: int = 5,
    jobs: int = 1,
    pools: Path = POOLS,
    out: Path = OUT,
    compute: bool = True,
) -> list[Row]:
    """Measures how many comparisons marks of good and bad parts of clips save.

    Args:
        tasks: Any that `rewardmodels learn` takes.
        marked: How many of each comparison's two clips are marked, 1 or 2; none always is among
            what is compared.
        predictor: A name or an import path.
        counts: Comparisons that are learned from, rising.
        length: Frames per clip.
        stretch: Frames that a mark covers, fewer than a clip's.
        stands_out: By how much a stretch's mean true reward has to differ from the rest's to be
            marked, in standard deviations of a frame's true reward.
        mistake_rate: Share of marks that call good bad, or bad good; comparisons have none, and
            the predictor isn't told.
        tests: Pairs that accuracy is measured on.
        seeds: Draws of clips, pairs, tests, mistakes and initial weights.
        jobs: Cells side by side.
        pools: Where the agents' episodes are kept.
        out: Where results are kept; a second call goes on with those that are there.
        compute: False makes the report from the cells that stand there, of a study that is half
            done.

    Returns:
        The cells of `marks_cell`; `out` has them as CSV, with `report.html`, `tables.md` and the
        figures.

    Raises:
        InvalidInput: A number out of range, clips longer than a task's episodes, a directory of
            another study or version, or, without `compute`, one without a cell of this grid.
        UnknownName: A task or predictor that there isn't.
    """
    settings = dict(locals())
    check_least(
        ("length", length, 2), ("stretch", stretch, 1), ("tests", tests, 10), ("seeds", seeds, 1),
        ("jobs", jobs, 1), ("counts", min(counts, default=0), 2),
    )  # fmt: skip
    if list(counts) != sorted(set(counts)) or len(counts) < 2:
        raise InvalidInput(f"counts: expected at least two, rising, got {list(counts)}.")
    if stretch >= length:
        raise InvalidInput(
            f"stretch: expected fewer frames than a clip's {length}, got {stretch}; a clip that is "
            "marked as a whole has no rest."
        )
    if not marked or not set(marked) <= {1, 2}:
        raise InvalidInput(f"marked: expected 1, 2 or both, got {list(marked)}.")
    SyntheticMarker(stretch, stands_out, mistake_rate)
    maker(predictor)
    check_tasks(tasks, length)
    cells = marks_cells(settings)
    if compute:
        for task in tasks:  # trained once, before cells share it
            find_pool(task, pools)
        run_study(marks_cell, cells, out / "cells", jobs=jobs)
    records = [(cell, read_cell(cell_file(marks_cell, cell, out / "cells"))) for cell in cells]
    rows: list[Row] = [{**cell, **record["result"]} for cell, record in records if record]
    if not rows:
        raise InvalidInput(
            f"out: expected cells of this grid, got {out}, where none stands. Leave --compute out, "
            "or pass the settings that the study was started with."
        )
    stand = len(rows)
    note = "" if stand == len(cells) else f"Not finished: {stand} of {len(cells)} cells stand."
    print(write_tables(rows, out, about_study(study_marks, settings, rows, out), note=note))
    return rows


def marks_cells(settings: Mapping[str, Any], **made: int) -> list[Row]:
    """The grid of `study_marks`.

    Args:
        settings: Of `study_marks`; those that aren't named are as it has them.
        made: What else `make_pool` is given.
    """
    usual = inspect.signature(study_marks).parameters
    of = {name: parameter.default for name, parameter in usual.items()} | dict(settings)
    names = ("predictor", "length", "stretch", "stands_out", "mistake_rate", "tests")
    shared = {name: of[name] for name in names}
    shared |= {"counts": list(of["counts"]), "pools": str(of["pools"])} | made
    return [
        {"task": task, "marked": clips, "seed": seed, **shared}
        for seed in range(of["seeds"]) for task in of["tasks"]
        for clips in (0, *sorted(set(of["marked"])))
    ]  # fmt: skip


def marks_cell(
    task: str,
    marked: int,
    seed: int,
    predictor: str,
    counts: Sequence[int],
    length: int,
    stretch: int,
    stands_out: float,
    mistake_rate: float,
    tests: int,
    pools: str,
    **made: int,
) -> Result:
    """What is learned from each count of comparisons, with `marked` clips of each pair marked.

    `made` goes to `make_pool`. Frame correlation is that of believed with true rewards of frames.
    """
    torch.set_num_threads(1)
    pool, draw = find_pool(task, Path(pools), progress=False, **made), _generator(seed)
    known, fresh = (half(pool, which) for which in (0, 1))
    shown, test = (of.clips(2 * n, length, draw) for of, n in ((known, counts[-1]), (fresh, tests)))
    asked, tested = (torch.arange(len(clips)).view(-1, 2) for clips in (shown, test))
    oracle = SyntheticTeacher()
    every = Comparisons(shown, asked, oracle.answer(shown, asked))
    right = oracle.answer(test, tested)
    assert shown.rewards is not None
    assert test.rewards is not None
    person = SyntheticMarker(stretch, stands_out * float(shown.rewards.std()), mistake_rate)
    marks = person.mark(shown, draw)
    # The first clip of a pair is as random as the second.
    marks = marks[marks.rows[:, 0] % 2 < marked]
    some, decided = test[:_FRAMES], right != 0.5
    figures: Result = {"marks": [], "accuracy": [], "log loss": [], "frame correlation": []}
    for n in counts:
        by_now = marks[marks.rows[:, 0] < 2 * n]
        model = maker(predictor)()
        fit(model, every[:n].compact(), marks=by_now, epochs=_EPOCHS, seed=seed)
        belief = model.posterior(test).preference(tested)
        frames = model.frame_posterior(some.observations.flatten(0, 1), some.actions.flatten(0, 1))
        correct = ((belief > 0.5) == (right > 0.5))[decided]
        pair = np.stack([frames.mean.numpy(), test.rewards[:_FRAMES].flatten().numpy()])
        figures["marks"].append(len(by_now))
        figures["accuracy"].append(float(correct.double().mean()))
        figures["log loss"].append(score.log_loss(belief, right))
        figures["frame correlation"].append(float(np.corrcoef(pair)[0, 1]))
    return figures


def _generator(seed: int) -> torch.Generator:
    (number,) = np.random.SeedSequence([seed, 3]).generate_state(1)
    return torch.Generator().manual_seed(int(number))
