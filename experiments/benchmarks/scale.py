"""Benchmark of scale: time, memory and accuracy of fits to many pairs of long vectors."""

from __future__ import annotations

import math
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, logit
from threadpoolctl import threadpool_limits

from experiments.analysis.page import Section, check_json, markdown, publish
from experiments.registry import make_named
from rewardmodels import Clips, Comparisons, RewardModel, fit
from rewardmodels.errors import check_positive, require

_FACTORS = 256  # that all numbers of an item share, as those of an embedding do
_LENGTH = 2.0  # standard deviation of an item's return, nats
_NOISE = 0.5  # of what no feature tells of it
_ROWS = 4096  # made, or gone through, at once
_TESTS = 10_000  # pairs
_BASELINE = "ridge regression"


class Setting(NamedTuple):
    """One fit.

    Args:
        predictor: A predictor, or "ridge regression".
        pairs: Compared; as many new items, the last of the matrix, are scored.
        items: That the pairs are drawn from, the first of the matrix.
        threads: Of the processor.
    """

    predictor: str
    pairs: int
    items: int
    threads: int


def benchmark_scale(
    quick: bool = False,
    json: Path | None = None,
    predictors: Sequence[str] = ("LaplaceHead", "Epinet", "DeepEnsemble"),
    pairs: Sequence[int] = (1_000, 10_000, 100_000),
    items_per_pair: float = 2.0,
    numbers: int = 4096,
    threads: int = 2,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Fit to pairs of items in a memory-mapped matrix, and score as many new items.

    An item's return is linear in its numbers, plus noise; answers are drawn from a logistic choice
    between two returns. Each fit has a process of its own, and a ridge regression beside it.

    Args:
        quick: In a minute, for trends: hundreds of pairs of 64 numbers.
        json: File for the key numbers, which are printed too.
        predictors: Names or import paths, with their default settings.
        pairs: Numbers of pairs, each for one fit.
        items_per_pair: Distinct items for each pair: with 2 none is compared twice.
        numbers: Of an item, in single precision.
        threads: Of the processor; small networks are fitted on one all the same.
        folder: Where the matrix is written, and deleted at the end; None for a temporary one.

    Returns:
        Figures by predictor and number of pairs, as `fit_seconds.<Predictor>.<pairs>`. Of the fit,
        seconds on the clock and of the processor, the machine's load (processes that wanted to
        run) and the epoch that was kept; of the mean and standard deviation of as many new items,
        `score_seconds`; accuracy and log loss (nats) of new pairs. `anonymous_mib` is the peak of
        the process's own memory, `resident_mib` that with the pages of the matrix, which the
        system takes back when it needs them. "true returns" is the best there is.

    Raises:
        InvalidInput: A number below one, an unknown predictor, or a directory that doesn't exist.
    """
    check_json(json)
    if quick:
        pairs, numbers = (100, 300), 64
    check_positive(numbers=numbers, threads=threads, **{f"pairs ({n})": n for n in pairs})
    valid = len(pairs) > 0 and round(items_per_pair * min(pairs)) >= 2
    require("pairs, items_per_pair", valid, "at least two items", f"{pairs} and {items_per_pair}")
    for name in predictors:
        make_named("model", name)
    items = [round(items_per_pair * n) for n in pairs]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as made:
        file = Path(made) / "items.npy"
        returns = write_items(file, max(items) + max(pairs), numbers)
        for n, of in zip(pairs, items, strict=True):
            for name in (*predictors, _BASELINE):
                with get_context("spawn").Pool(1) as pool:  # for a peak of its own
                    row = pool.apply(measure, (file, returns, Setting(name, n, of, threads)))
                print({key: row[key] for key in ("predictor", "pairs", "fit_seconds")}, flush=True)
                rows.append(row)
            true = _scores(_difference(returns[-n:], _test_pairs(n)), returns[-n:])
            rows.append({"predictor": "true returns", "pairs": n, "items": of, **true})
    table = pd.DataFrame(rows)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{os.cpu_count()} processors, {threads} of them used, {memory:.0f} GiB of memory."
    print(markdown([Section(f"Items of {numbers} numbers", text, table=table)]))
    figures = {
        f"{column}.{row['predictor']}.{row['pairs']}": row[column]
        for row in rows
        for column in row.keys() - {"predictor", "pairs"}
    }
    publish(dict(sorted(figures.items())), json)
    return figures


def write_items(file: Path, items: int, numbers: int) -> NDArray[np.float64]:
    """Write a matrix of items `(N, D)`, and return their returns `(N,)` in nats.

    Numbers are mixtures of factors and noise, so that no more than a few rows are in memory.
    """
    draw = np.random.default_rng(0)
    matrix = np.lib.format.open_memmap(file, "w+", np.float32, (items, numbers))
    mix = draw.standard_normal((_FACTORS, numbers), dtype=np.float32) / math.sqrt(_FACTORS)
    weights = draw.standard_normal(numbers, dtype=np.float32)
    parts = []
    for part in _parts(items):
        factors = draw.standard_normal((len(part), _FACTORS), dtype=np.float32)
        some = factors @ mix
        some += 0.5 * draw.standard_normal(some.shape, dtype=np.float32)
        matrix[part.start : part.stop] = some
        parts.append(some @ weights)
    matrix.flush()
    returns = np.concatenate(parts).astype(np.float64)
    returns *= _LENGTH / returns.std()
    return returns + _NOISE * draw.standard_normal(items)


def measure(file: Path, returns: NDArray[np.float64], setting: Setting) -> dict[str, Any]:
    """Fit and score once, and return a row of the table."""
    torch.set_num_threads(setting.threads)
    name, n, items, _ = setting
    matrix = np.load(file, mmap_mode="c")
    draw = np.random.default_rng(n)
    # Each item about as often as any other.
    order = np.concatenate([draw.permutation(items) for _ in range(-(-2 * n // items))])
    pairs = order[: 2 * n].reshape(n, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    answers = _answers(returns, pairs, draw)
    new, tests = matrix[-n:], _test_pairs(n)
    row: dict[str, Any] = {"predictor": name, "pairs": n, "items": items}
    with _memory(row), threadpool_limits(setting.threads):
        started = _clocks()
        if name == _BASELINE:
            weights = _ridge(matrix, pairs, answers)
        else:
            clips = Clips.of_items(matrix[:items])
            compared = Comparisons(clips, torch.from_numpy(pairs), torch.from_numpy(answers))
            model: RewardModel = fit(make_named("model", name), compared)
        row["fit_seconds"], row["fit_processor_seconds"] = _clocks() - started
        row["load"] = os.getloadavg()[0]
        if name != _BASELINE and model.fit_report:
            row["epochs"] = model.fit_report.epochs
        started = _clocks()
        if name == _BASELINE:
            mean = np.concatenate([new[part.start : part.stop] @ weights for part in _parts(n)])
        else:
            posterior = model.posterior(Clips.of_items(new))
            mean, std = posterior.mean.numpy(), posterior.variance.sqrt()
            assert bool(std.isfinite().all())
        row["score_seconds"], row["score_processor_seconds"] = _clocks() - started
    logits = _difference(mean, tests)
    if name != _BASELINE:
        logits = logit(posterior.preference(tests).double().numpy())
    return row | _scores(logits, returns[-n:])


def _ridge(
    matrix: NDArray[np.float32], pairs: NDArray[np.int64], answers: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Weights of a ridge regression of the answers on differences, in nats.

    The penalty, and the scale of the weights, are those that serve a held-out seventh best.
    """
    train = len(pairs) - len(pairs) // 7
    gram = np.zeros((matrix.shape[1], matrix.shape[1]), np.float32)
    moment = np.zeros(matrix.shape[1])
    for part in _parts(train):
        x = _difference(matrix, pairs[part.start : part.stop])
        gram += x.T @ x
        moment += x.T @ (2 * answers[part.start : part.stop] - 1)
    values, vectors = np.linalg.eigh(gram)
    rotated = vectors.T @ moment
    tries = [
        (vectors @ (rotated / (values + penalty))).astype(np.float32)
        for penalty in np.trace(gram) / len(values) * np.logspace(-4, 2, 13)
    ]
    held_out = [
        _difference(matrix, pairs[train:][part.start : part.stop]) @ np.stack(tries, 1)
        for part in _parts(len(pairs) - train)
    ]
    best: tuple[float, NDArray[np.float32]] = (np.inf, tries[0])
    for weights, logits in zip(tries, np.concatenate(held_out).T, strict=True):
        found = minimize_scalar(
            lambda log, x=logits: _log_loss(np.exp(log) * x, answers[train:]), (-3, 3)
        )
        if found.fun < best[0]:
            best = found.fun, weights * np.float32(np.exp(found.x))
    return best[1]


def _difference(values: NDArray[Any], pairs: NDArray[np.int64]) -> NDArray[Any]:
    return values[pairs[:, 1]] - values[pairs[:, 0]]


def _answers(
    returns: NDArray[np.float64], pairs: NDArray[np.int64], draw: np.random.Generator
) -> NDArray[np.float64]:
    p = expit(_difference(returns, pairs))
    return (draw.random(len(pairs)) < p).astype(float)


def _test_pairs(items: int) -> NDArray[np.int64]:
    pairs = np.random.default_rng(1).integers(items, size=(_TESTS, 2))
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _scores(logits: NDArray[Any], returns: NDArray[np.float64]) -> dict[str, float]:
    answers = _answers(returns, _test_pairs(len(returns)), np.random.default_rng(2))
    right = (logits > 0) == (answers > 0.5)
    return {"accuracy": float(right.mean()), "log_loss": _log_loss(logits, answers)}


def _log_loss(logits: NDArray[Any], answers: NDArray[np.float64]) -> float:
    return float(-log_expit(np.where(answers > 0.5, logits, -logits)).mean())


def _clocks() -> NDArray[np.float64]:
    """Seconds on the clock, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def _parts(n: int) -> Iterator[range]:
    for start in range(0, n, _ROWS):
        yield range(start, min(n, start + _ROWS))


@contextmanager
def _memory(row: dict[str, Any]) -> Iterator[None]:
    """Add the peaks of the process's memory during the block to the row."""
    ended = Event()
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        status = Path("/proc/self/status")
        while not ended.wait(0.05):
            lines = status.read_text().splitlines() if status.exists() else []
            now = [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")]
            peak = max(peak, *now, 0.0)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row |= {"anonymous_mib": peak, "resident_mib": resident}
