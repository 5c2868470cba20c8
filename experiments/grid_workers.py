"""Where a study's cells are computed: this process, others beside it, or a cluster's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from joblib import cpu_count
from joblib.externals.loky import get_reusable_executor

from rewardmodels.errors import InvalidInput, UnknownName

BACKENDS = {"loky": "joblib", "ray": "ray", "dask": "distributed"}
"""What computes, and the module that it takes."""

Submit = Callable[..., Future]
"""Takes a function and its arguments, and returns the future of what it returns."""


def check_workers(backend: str, address: str | None) -> None:
    """Refuses what `workers` couldn't start.

    Raises:
        InvalidInput: An address without a cluster, or an extra that isn't installed.
        UnknownName: No such backend.

    Example:
        >>> check_workers("loky", "10.0.0.1:8786")
        Traceback (most recent call last):
            ...
        rewardmodels.errors.InvalidInput: address: expected none with loky, ...
    """
    if backend not in BACKENDS:
        raise UnknownName("backend", backend, BACKENDS)
    if address is not None and backend == "loky":
        raise InvalidInput(
            f"address: expected none with loky, which stays on this machine, got {address!r}. Pass "
            "backend='ray' or 'dask' for a cluster."
        )
    if find_spec(BACKENDS[backend]) is None:
        raise InvalidInput(
            f"backend: expected {backend} to be installed, got none; pip install "
            f"'rewardmodels[{backend}]' brings it."
        )


@contextmanager
def workers(backend: str, jobs: int, address: str | None) -> Iterator[Submit]:
    """Starts workers, or joins a cluster's; those that it started end with the block.

    joblib's own way to Ray hands results over only when all are there, and its look-ahead takes
    calls long before they start. So each backend's futures are used as they are.

    Args:
        backend: Of `BACKENDS`.
        jobs: Calls at once; of loky, 1 computes in this process.
        address: The cluster's; None starts one here, or takes what `ray.init` connected to.

    Yields:
        A `Submit`. A call whose worker dies has a future that raises.

    Raises:
        InvalidInput: No cluster answers at the address.
    """
    start = {"loky": _here if jobs == 1 else _loky, "ray": _ray, "dask": _dask}[backend]
    with start(jobs, address) as submit:
        yield submit


@contextmanager
def _here(jobs: int, address: str | None) -> Iterator[Submit]:
    def submit(function: Callable[..., Any], *arguments: Any) -> Future:
        done: Future = Future()
        done.set_result(function(*arguments))
        return done

    yield submit


@contextmanager
def _loky(jobs: int, address: str | None) -> Iterator[Submit]:
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // jobs)))
    options = {"max_workers": jobs, "env": {"OMP_NUM_THREADS": threads}}
    try:
        # Asked for at each call, as it makes new workers where one has died.
        yield lambda *call: get_reusable_executor(**options).submit(*call)
    finally:
        get_reusable_executor(**options).shutdown(wait=True, kill_workers=True)


@contextmanager
def _dask(jobs: int, address: str | None) -> Iterator[Submit]:
    from distributed import Client

    local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": ":0"}
    with _reaching(address):
        started = Client(address) if address else Client(**local)
    with started as client:
        yield client.get_executor().submit


@contextmanager
def _ray(jobs: int, address: str | None) -> Iterator[Submit]:
    import ray

    joined = ray.is_initialized()
    if not joined:
        # Workers here find the modules that this process finds; a cluster has paths of its own.
        path = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
        local = {"address": "local", "num_cpus": jobs, "runtime_env": path}
        where = {"address": address} if address else local
        with _reaching(address):
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    try:
        call = ray.remote(max_retries=0)(lambda function, *arguments: function(*arguments))
        yield lambda *arguments: call.remote(*arguments).future()
    finally:
        if not joined:
            ray.shutdown()


@contextmanager
def _reaching(address: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # no connection, or none in time
        if address is None:
            raise
        raise InvalidInput(
            f"address: expected that of a cluster that answers, got {address!r}: {error}."
        ) from error
