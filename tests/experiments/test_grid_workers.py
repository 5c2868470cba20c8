"""Workers that die, are stopped, or are a cluster's: no cell is lost, none computed in vain."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import grid as study
from experiments import grid as workers
from experiments.grid import StudyIncomplete

from .studying import computed, finished, grid, run


def deadly(killers, together):
    """Workers of which some calls kill theirs, and as in a broken pool, those of all beside it."""

    @contextmanager
    def made(backend, jobs, address):
        with ThreadPoolExecutor(jobs) as pool:
            beside = {}

            def submit(call, function, cell):
                def work():
                    time.sleep(0.002)
                    if cell["n"] in killers:
                        killers[cell["n"]] -= 1
                        if not killers[cell["n"]]:
                            del killers[cell["n"]]
                        for broken in beside.values():
                            broken.set()
                        raise RuntimeError("killed")
                    time.sleep(0.008)
                    if beside[cell["n"]].is_set():
                        raise RuntimeError("killed by another")
                    return call(function, cell)

                beside[cell["n"]] = threading.Event()
                together.append(cell["n"])
                future = pool.submit(work)
                future.add_done_callback(lambda _: beside.pop(cell["n"]))
                return future

            yield submit

    return made


def test_cells_whose_workers_die_run_again_and_the_guilty_one_alone_is_named(
    cells, log, out, monkeypatch
):
    tried = []
    monkeypatch.setattr(study, "workers", deadly({1: 2, 6: 99}, tried))
    with pytest.raises(StudyIncomplete) as caught:
        run(cells.square, grid(log, *range(8)), out, jobs=4)
    said = str(caught.value)
    assert "expected 8 results, got 7. 1 failed" in said
    assert f"{grid(log, 6)[0]}: its worker failed 3 times, last by RuntimeError: killed" in said
    assert sorted(row["n"] for row in finished(out)) == [0, 1, 2, 3, 4, 5, 7]
    assert tried.count(6) == 3
    assert tried.count(1) == 3
    assert max(tried.count(n) for n in range(8)) == 3
    monkeypatch.setattr(study, "workers", deadly({}, tried))
    assert len(run(cells.square, grid(log, *range(8)), out, jobs=4)) == 8
    assert tried.count(6) == 4


def test_none_is_named_for_what_died_beside_it(cells, log, out, monkeypatch):
    for seed in range(8):
        draw = random.Random(seed)
        guilty = set(draw.sample(range(9), 2))
        killers = {n: draw.choice((1, 2)) for n in range(9)} | dict.fromkeys(guilty, 99)
        monkeypatch.setattr(study, "workers", deadly(killers, []))
        with pytest.raises(StudyIncomplete, match="2 failed"):
            run(cells.square, grid(log, *range(9), seed=seed), out, jobs=3)
        told = [json.loads(file.read_text())["cell"] for file in out.glob("*.error")]
        assert {cell["n"] for cell in told if cell["seed"] == seed} == guilty


def test_a_cells_last_life_is_spent_with_none_beside_it(cells, log, out, monkeypatch):
    dying, beside = [[0], [0, 1]], []

    @contextmanager
    def scripted(*_):
        def submit(*call):
            future = Future()
            future.call = call
            return future

        yield submit

    def wait(flying, return_when):
        beside.append([future.call[2]["n"] for future in flying])
        died = dying.pop(0) if dying else []
        for future in (done := [f for f in flying if f.call[2]["n"] in died] or list(flying)):
            function, *arguments = future.call
            if died:
                future.set_exception(RuntimeError("killed"))
            else:
                future.set_result(function(*arguments))
        return SimpleNamespace(done=sorted(done, key=lambda future: future.call[2]["n"]))

    monkeypatch.setattr(study, "workers", scripted)
    monkeypatch.setattr(study, "wait", wait)
    assert run(cells.square, grid(log, 0, 1), out, jobs=2) == [{"square": 0}, {"square": 1}]
    assert beside == [[0, 1], [1, 0], [0], [1]]


def test_workers_that_take_nothing_more_are_an_error_and_no_endless_loop(cells, out, monkeypatch):
    @contextmanager
    def gone(*_):
        def submit(*_):
            raise ConnectionError("no scheduler")

        yield submit

    monkeypatch.setattr(study, "workers", gone)
    with pytest.raises(StudyIncomplete, match=r"last by ConnectionError: no scheduler"):
        run(cells.square, grid("log", *range(5)), out, jobs=2)


@pytest.fixture
def script(cells, out, log):
    """Starts a study in a process of its own; what is left of it dies with the test."""
    started = []

    def start(n, seconds, jobs):
        process = subprocess.Popen(
            [sys.executable, cells.__file__, str(out), str(log), str(n), str(seconds), str(jobs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a Ctrl-C meets it and its workers, and nobody else
            env=os.environ | {"PYTHONPATH": str(Path(study.__file__).parents[1])},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition, seconds=300.0):
    """Wait long: on a busy machine each worker may need a minute to import torch."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_processes_at_once_share_the_cells_and_a_killed_ones_are_taken_over(script, log):
    three = [script(16, 0.5, jobs) for jobs in (1, 1, 2)]
    until(lambda: len(computed(log)) >= 4)
    three[0].kill()
    ends = [process.communicate(timeout=300) for process in three]
    assert [said for said, _ in ends[1:]] == 2 * [f"{sum(n * n for n in range(16))}\n"], ends
    assert [process.returncode for process in three] == [-signal.SIGKILL, 0, 0]
    assert set(computed(log)) == set(range(16))
    assert len(computed(log)) <= 17  # the killed one's


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_stops_every_worker_and_loses_nothing(cells, log, out, script, jobs):
    process = script(60, 1, jobs)
    until(lambda: len([*out.glob("*.json")]) >= 3)  # study.json and two cells
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    until(lambda: not alive(process.pid), 60)  # no worker is left in its group
    kept = {row["n"] for row in finished(out)}
    assert len(kept) >= 2
    before = len(computed(log))
    assert before - len(kept) <= jobs
    (out / "study.json").unlink()  # the script's own name isn't the module's
    run(cells.slow, grid(log, *range(max(kept) + 1), seconds=1.0), out)
    assert not set(computed(log)[before:]) & kept


BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(module) is None, reason=f"needs the extra rewardmodels[{name}]"
        ),
    )
    for name, module in workers.BACKENDS.items()
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_survive_the_death_of_their_workers(cells, log, out, backend):
    mortal = grid(log, *range(6), once=[2], always=[4])
    with pytest.raises(StudyIncomplete, match="its worker failed 3 times") as caught:
        run(cells.fragile, mortal, out, jobs=2, backend=backend)
    assert "expected 6 results, got 5. 1 failed" in str(caught.value)
    assert str(mortal[4]) in str(caught.value)
    assert sorted(row["square"] for row in finished(out)) == [0, 1, 4, 9, 25]
    assert computed(log).count(2) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_cluster_that_is_there_is_joined_and_left_running(cells, log, out, backend):
    if backend == "dask":
        from distributed import Client, LocalCluster

        with LocalCluster(2, threads_per_worker=1, dashboard_address=":0") as cluster:
            address = cluster.scheduler_address
            found = run(cells.square, grid(log, 2, 3), out, jobs=2, backend="dask", address=address)
            with Client(address) as client:
                assert client.submit(abs, -1).result() == 1
    else:
        import ray

        where = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
        ray.init("local", num_cpus=2, runtime_env=where, log_to_driver=False, logging_level="ERROR")
        try:
            found = run(cells.square, grid(log, 2, 3), out, jobs=2, backend="ray")
            assert ray.get(ray.put(1)) == 1
        finally:
            ray.shutdown()
    assert found == [{"square": 4}, {"square": 9}]
    assert sorted(computed(log)) == [2, 3]
