"""Benchmark of scale: time, memory and accuracy of fits to many pairs of long vectors."""

from __future__ import annotations

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
from scipy.special import expit, log_expit

from experiments.analysis.page import Section, check_json, markdown, publish
from experiments.registry import make_named
from rewardmodels import Clips, Comparisons, RewardModel, fit
from rewardmodels.errors import check_positive

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
        pairs: Compared, of items that come first in the matrix.
        items: That they are drawn from.
        scored: Items that come last in the matrix.
        threads: Of the processor.
    """

    predictor: str
    pairs: int
    items: int
    scored: int
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
    """Fit to synthetic pairs of items in a memory-mapped matrix, and score as many new items.

    An item's return is linear in its numbers, plus noise; who compares errs as a logistic choice
    does. Each fit, and a ridge regression on the differences beside it, has a process of its own.

    Args:
        quick: In a minute, for trends: hundreds of pairs of 64 numbers.
        json: File for the key numbers, which are printed too.
        predictors: Names or import paths, with their default settings.
        pairs: Numbers of pairs, each a fit.
        items_per_pair: Distinct items for each pair: with 2 none is compared twice.
        numbers: Of an item, in single precision.
        threads: Of the processor, for each fit.
        folder: Where the matrix is written, and deleted at the end; None for a temporary one.

    Returns:
        Figures by predictor and number of pairs, as `wall_seconds.<Predictor>.<pairs>`, of the
        table that is printed: seconds of the fit, on the clock and of the processor; epochs;
        accuracy and log loss (nats) of new pairs; seconds of the mean and standard deviation of new
        items; peak of the process's memory in MiB, without the pages of the matrix
        (`anonymous_mib`, which can't be given back to the system) and with them (`resident_mib`).
        `best_accuracy` and `best_log_loss` are those of the true returns.

    Raises:
        InvalidInput: A number below one, an unknown predictor, or a directory that doesn't exist.
    """
    check_json(json)
    if quick:
        pairs, numbers = (100, 300), 64
    check_positive(numbers=numbers, threads=threads, **{f"pairs ({n})": n for n in pairs})
    for name in predictors:
        make_named("model", name)
    most = max(pairs)
    items = [max(2, round(items_per_pair * n)) for n in pairs]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as made:
        file = Path(made) / "items.npy"
        returns = write_items(file, max(items) + most, numbers)
        for n, of in zip(pairs, items, strict=True):
            for name in (*predictors, _BASELINE):
                setting = Setting(name, n, of, most, threads)
                with get_context("spawn").Pool(1) as pool:  # for a peak of its own
                    rows.append(pool.apply(measure, (file, returns, setting)))
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    text = f"{os.cpu_count()} processors of which {threads} used, {_gibibytes():.0f} GiB of memory."
    print(markdown([Section(f"Pairs of {numbers} numbers", text, table=table, digits=2)]))
    tests = _test_pairs(most)
    numbers_by_key: dict[str, Any] = {
        f"{column}.{row['predictor']}.{row['pairs']}": row[column]
        for row in rows
        for column in table.columns[2:]
    }
    best = _scores(_difference(returns[-most:], tests), _answers(returns[-most:], tests))
    publish({**{f"best_{k}": v for k, v in best.items()}, **numbers_by_key}, json)
    return numbers_by_key


def write_items(file: Path, items: int, numbers: int) -> NDArray[np.float64]:
    """Write a matrix of items `(N, D)`, and return their returns `(N,)` in nats.

    Numbers are mixtures of factors and noise, so that no more than a few rows are in memory.
    """
    draw = np.random.default_rng(0)
    matrix = np.lib.format.open_memmap(file, "w+", np.float32, (items, numbers))
    mix = draw.standard_normal((_FACTORS, numbers), dtype=np.float32) / np.sqrt(_FACTORS)
    weights = draw.standard_normal(numbers, dtype=np.float32)
    parts = []
    for part in _parts(items):
        factors = draw.standard_normal((len(part), _FACTORS), dtype=np.float32)
        some = factors @ mix.astype(np.float32)
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
    name, n, items, scored, _ = setting
    matrix = np.load(file, mmap_mode="c")
    draw = np.random.default_rng(n)
    # Every item about as often as any other.
    order = np.concatenate([draw.permutation(items) for _ in range(-(-2 * n // items))])
    pairs = order[: 2 * n].reshape(n, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    answers = _answers(returns, pairs)
    tests, new = _test_pairs(scored), returns[-scored:]
    row: dict[str, Any] = {"predictor": name, "pairs": n, "items": items}
    with _memory(row):
        started = time.perf_counter(), time.process_time()
        if name == _BASELINE:
            predict, epochs = _ridge(matrix, pairs, answers), 0
        else:
            compared = Comparisons(Clips.of_items(matrix[:items]), pairs, answers)
            model = fit(make_named("model", name), compared)
            assert model.fit_report is not None
            predict, epochs = model, model.fit_report.epochs
        row |= {
            "wall_seconds": time.perf_counter() - started[0],
            "processor_seconds": time.process_time() - started[1],
            "load": os.getloadavg()[0],
            "epochs": epochs,
        }
        started = time.perf_counter(), time.process_time()
        if isinstance(predict, RewardModel):
            posterior = predict.posterior(Clips.of_items(matrix[-scored:]))
            mean, std = posterior.mean, posterior.variance.sqrt()
            assert bool(mean.isfinite().all() and std.isfinite().all())
            p = posterior.preference(tests).double().numpy()
            logits = np.log(p) - np.log1p(-p)
        else:
            logits = _difference(np.concatenate(
                [matrix[-scored:][part.start : part.stop] @ predict for part in _parts(scored)]
            ), tests)
        row |= {
            "score_wall_seconds": time.perf_counter() - started[0],
            "score_processor_seconds": time.process_time() - started[1],
        }
    return row | _scores(logits, _answers(new, tests))


def _ridge(
    matrix: NDArray[np.float32], pairs: NDArray[np.int64], answers: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Weights of a ridge regression of the answers on differences, in nats.

    The penalty, and the scale of the weights, are those that serve a held-out seventh best.
    """
    train = len(pairs) - len(pairs) // 7
    gram, moment = 0.0, 0.0
    for part in _parts(train):
        x = _difference(matrix, pairs[part.start : part.stop])
        gram, moment = gram + x.T @ x, moment + x.T @ (2 * answers[part.start : part.stop] - 1)
    values, vectors = np.linalg.eigh(np.asarray(gram))
    rotated = vectors.T @ np.asarray(moment)
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


def _answers(returns: NDArray[np.float64], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    p = expit(_difference(returns, pairs))
    return (np.random.default_rng(len(pairs)).random(len(pairs)) < p).astype(float)


def _test_pairs(scored: int) -> NDArray[np.int64]:
    pairs = np.random.default_rng(1).integers(scored, size=(_TESTS, 2))
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _log_loss(logits: NDArray[np.float64], answers: NDArray[np.float64]) -> float:
    return float(-log_expit(np.where(answers > 0.5, logits, -logits)).mean())


def _scores(logits: NDArray[np.float64], answers: NDArray[np.float64]) -> dict[str, float]:
    right = (logits > 0) == (answers > 0.5)
    return {"accuracy": float(right.mean()), "log_loss": _log_loss(logits, answers)}


def _parts(n: int) -> Iterator[range]:
    for start in range(0, n, _ROWS):
        yield range(start, min(n, start + _ROWS))


def _gibibytes() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


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
