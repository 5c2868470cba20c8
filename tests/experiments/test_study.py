"""A study ends complete, or says what is missing and why; and computes no cell in vain."""

import errno
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import study, workers
from experiments.run import versions
from experiments.study import StudyIncomplete, cell_file, read_study, run_study
from rewardmodels import InvalidInput, UnknownName, UnreadableFile

# Other processes import it by this name; what a cell does is written to a log.
CELLS = """
import os
import signal
import sys
import time
from pathlib import Path


def _log(log, n):
    with open(log, "a") as file:  # one short write at the end of a file isn't torn
        file.write(f"{n}\\n")


def square(n, log, seed=0):
    _log(log, n)
    return {"square": n * n}


def cube(n, log):
    return {"cube": n**3}


def slow(n, log, seconds):
    _log(log, n)
    time.sleep(seconds)
    return {"square": n * n}


def fragile(n, log, once=(), always=()):
    _log(log, n)
    died = Path(f"{log}.{n}")
    if n in always or (n in once and not died.exists()):
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    return {"square": n * n}


if __name__ == "__main__":
    from experiments.study import run_study

    out, log, n, seconds, jobs = sys.argv[1:]
    grid = [{"n": k, "log": log, "seconds": float(seconds)} for k in range(int(n))]
    found = run_study(slow, grid, Path(out), jobs=int(jobs), progress=False)
    print(sum(result["square"] for result in found))
"""


@pytest.fixture
def cells(tmp_path, monkeypatch):
    (tmp_path / "my_study_cells.py").write_text(CELLS)
    monkeypatch.syspath_prepend(tmp_path)
    import my_study_cells

    yield my_study_cells
    del sys.modules["my_study_cells"]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def grid(log, *n, **more):
    return [{"n": k, "log": str(log), **more} for k in n]


def computed(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def names(out):
    return {file.name for file in out.iterdir()}


def run(function, cells, out, **options):
    return run_study(function, cells, out, progress=False, **options)


def test_cells_come_back_in_order_and_a_larger_grid_goes_on(cells, log, out):
    assert run(cells.square, grid(log, 3, 1, 3), out) == [{"square": k} for k in (9, 1, 9)]
    assert computed(log) == [3, 1]
    assert run(cells.square, grid(log, 1, 2, 3), out) == [{"square": k} for k in (1, 4, 9)]
    assert computed(log) == [3, 1, 2]
    run(cells.cube, grid(log, 1), out)  # of the same module
    told = json.loads((out / "study.json").read_text())
    assert told["study"] == "my_study_cells"
    assert told["versions"] == versions()
    assert told["functions"] == {
        "square": {"n": [3, 1, 2], "log": [str(log)]},
        "cube": {"n": [1], "log": [str(log)]},
    }
    files = {cell_file(cells.square, cell, out).name for cell in grid(log, 1, 2, 3)}
    assert names(out) - {"study.lock"} == files | {
        "study.json", cell_file(cells.cube, grid(log, 1)[0], out).name
    }  # fmt: skip


def test_a_cells_file_tells_all_and_rows_are_tidy(cells, log, out):
    run(cells.slow, grid(log, 2, seconds=0.2), out)
    run(cells.cube, grid(log, 2, 3), out)
    (cell,) = grid(log, 2, seconds=0.2)
    record = json.loads(cell_file(cells.slow, cell, out).read_text())
    assert 0.2 <= record.pop("seconds") < 1
    assert record == {
        "function": "slow", "cell": cell, "versions": versions(), "result": {"square": 4}
    }  # fmt: skip
    rows = read_study(out, "cube")
    assert {row.pop("seconds") < 0.1 for row in rows} == {True}
    assert sorted((row["n"], row["cube"]) for row in rows) == [(2, 8), (3, 27)]
    assert set(rows[0]) == {"n", "log", "cube"}
    assert len(read_study(out)) == 3
    with pytest.raises(InvalidInput, match=r"no study\.json there"):
        read_study(out.parent)


def test_numbers_of_any_library_return_as_they_will_be_read(tmp_path):
    def figures():
        return {"a": np.float32(0.5), "b": np.arange(2), "c": torch.ones(2), 4: Path("x")}

    first = run(figures, [{}], tmp_path)
    assert first == [{"a": 0.5, "b": [0, 1], "c": [1.0, 1.0], "4": "x"}]
    assert run(figures, [{}], tmp_path) == first


def test_a_directory_of_something_else_is_refused(cells, log, out):
    run(cells.square, grid(log, 1), out)
    file = out / "study.json"
    told = json.loads(file.read_text())

    def other(n, log):
        raise AssertionError("must not run")

    with pytest.raises(InvalidInput, match=r"holds my_study_cells\. Give another"):
        run(other, grid(log, 1), out)
    for changed, message in (
        ({"versions": {"rewardmodels": "0.0.9"}}, r"holds those of 0\.0\.9"),
        ({"format": 99}, r"\(format 99\)"),
    ):
        file.write_text(json.dumps(told | changed))
        with pytest.raises(InvalidInput, match=message):
            run(cells.square, grid(log, 1, 2), out)
    ours = versions()["rewardmodels"].split(".")
    file.write_text(json.dumps(told | {"versions": {"rewardmodels": ".".join(ours[:2])}}))
    run(cells.square, grid(log, 1), out)  # another patch release
    for damage in ("", "{", "[]", "{}", json.dumps(told | {"functions": 3})):
        file.write_text(damage)
        with pytest.raises(UnreadableFile, match="Delete it"):
            run(cells.square, grid(log, 1), out)
    file.unlink()
    run(cells.square, grid(log, 1), out)
    assert computed(log) == [1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"jobs": 0}, InvalidInput, "jobs: expected at least 1, got 0"),
        ({"backend": "lokky"}, UnknownName, "Did you mean 'loky'"),
        ({"address": "auto"}, InvalidInput, "address: expected none with loky.*got 'auto'"),
        ({"backend": "ray"}, InvalidInput, r"pip install 'rewardmodels\[ray\]'"),
        ({"backend": "dask"}, InvalidInput, r"pip install 'rewardmodels\[dask\]'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "find_spec", lambda _: None)
    with pytest.raises(error, match=message):
        run(dict, [{}], tmp_path / "new", **options)
    with pytest.raises(InvalidInput, match="cells: expected at least one"):
        run(dict, [], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    monkeypatch.undo()
    with pytest.raises(InvalidInput, match="out: expected a directory to write to"):
        run(dict, [{}], tmp_path / "file")


def test_a_cell_that_raises_stops_no_other_and_is_tried_again(log, out, monkeypatch):
    broken = {2, 3, 5}

    def sometimes(n, log):
        if n in broken:
            raise ZeroDivisionError(f"no {n}")
        return {"square": n * n}

    with pytest.raises(StudyIncomplete) as caught:
        run(sometimes, grid(log, *range(6)), out)
    said = str(caught.value)
    assert "expected 6 results, got 3. 3 failed" in said
    for n in broken:
        assert f"{grid(log, n)[0]}: ZeroDivisionError: no {n}" in said
    assert sorted(row["n"] for row in read_study(out)) == [0, 1, 4]
    errors = [json.loads(file.read_text()) for file in out.glob("*.error")]
    assert {told["cell"]["n"] for told in errors} == broken
    assert any("raise ZeroDivisionError" in line for line in errors[0]["traceback"])
    broken.clear()
    assert run(sometimes, grid(log, *range(6)), out) == [{"square": n * n} for n in range(6)]
    assert not list(out.glob("*.error"))

    def unfit():
        return {"a": {(1, 2): 3}}

    with pytest.raises(StudyIncomplete, match="TypeError: keys must be"):
        run(unfit, [{}], out)


def test_damaged_results_are_put_aside_and_computed_again(cells, log, out):
    whole = run(cells.square, grid(log, *range(4)), out)
    files = [cell_file(cells.square, cell, out) for cell in grid(log, *range(4))]
    for file, damage in zip(files, (b"", b'{"cell": {"n"', b"{}", b"\xff\xfe"), strict=True):
        file.write_bytes(damage)
    with pytest.warns(UserWarning, match="got a damaged file") as warned:
        assert run(cells.square, grid(log, *range(4)), out) == whole
    assert len(warned) == 4
    assert computed(log) == 2 * [0, 1, 2, 3]
    assert files[1].with_suffix(".damaged").read_bytes() == b'{"cell": {"n"'
    files[0].with_suffix(".json.part").write_text("{")  # of a process that was killed
    assert run(cells.square, grid(log, *range(4)), out) == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_loses_nothing_and_the_same_call_goes_on(cells, log, out):
    run(cells.square, grid(log, 0), out)
    full = cell_file(cells.square, grid(log, 2)[0], out)
    full.with_name(f"{full.name}.part").symlink_to("/dev/full")
    with pytest.raises(StudyIncomplete, match=r"No space left on device.*make room") as caught:
        run(cells.square, grid(log, *range(4)), out)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert sorted(row["n"] for row in read_study(out)) == [0, 1]
    assert not list(out.glob("*.part"))
    assert len(run(cells.square, grid(log, *range(4)), out)) == 4
    assert computed(log) == [0, 1, 2, 2, 3]
    assert names(out) - {"study.lock", "study.json"} == {
        cell_file(cells.square, cell, out).name for cell in grid(log, *range(4))
    }


def deadly(killers, together):
    """Workers of which some calls kill theirs, and as in a broken pool, those of all beside it."""

    @contextmanager
    def made(backend, jobs, address):
        with ThreadPoolExecutor(jobs) as pool:
            beside = {}

            def submit(call, function, cell):
                def work():
                    time.sleep(0.005)
                    if cell["n"] in killers:
                        killers[cell["n"]] -= 1
                        if not killers[cell["n"]]:
                            del killers[cell["n"]]
                        for broken in beside.values():
                            broken.set()
                        raise RuntimeError("killed")
                    time.sleep(0.02)
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
    assert sorted(row["n"] for row in read_study(out)) == [0, 1, 2, 3, 4, 5, 7]
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


def test_two_at_once_share_the_cells_and_compute_none_twice(cells, log, out):
    # Locks are of open files, so threads exclude each other just as processes do.
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(run, cells.slow, grid(log, *range(12), seconds=0.1), out) for _ in range(3)
        ]
    assert all(r.result() == [{"square": n * n} for n in range(12)] for r in runs)
    assert sorted(computed(log)) == list(range(12))


def test_the_bar_counts_only_what_is_computed_now(cells, log, out, capfd):
    run(cells.slow, grid(log, *range(40), seconds=0.0), out)
    capfd.readouterr()
    run_study(cells.slow, [*grid(log, *range(40), seconds=0.0), *grid(log, 0, 1, 2, seconds=0.25)],
              out)  # fmt: skip
    printed, bar = capfd.readouterr()
    assert printed == ""
    last = bar.split("\r")[-1]
    assert "43/43" in last
    # 3 cells of 0.25 s are 4 a second; with the 40 that were there it would be 57.
    assert 1 < float(re.search(r"([\d.]+)it/s", last)[1]) < 4.1


def script(cells, out, log, n, seconds, jobs):
    return subprocess.Popen(
        [sys.executable, cells.__file__, str(out), str(log), str(n), str(seconds), str(jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a Ctrl-C meets it and its workers, and nobody else
        env=os.environ | {"PYTHONPATH": str(Path(study.__file__).parents[1])},
    )


def until(condition, seconds=60.0):
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
def test_processes_at_once_share_the_cells_and_a_killed_ones_are_taken_over(cells, log, out):
    three = [script(cells, out, log, 16, 0.5, jobs) for jobs in (1, 1, 2)]
    until(lambda: len(computed(log)) >= 4)
    three[0].kill()
    ends = [process.communicate(timeout=120) for process in three]
    assert [said for said, _ in ends[1:]] == 2 * [f"{sum(n * n for n in range(16))}\n"], ends
    assert [process.returncode for process in three] == [-signal.SIGKILL, 0, 0]
    assert set(computed(log)) == set(range(16))
    assert len(computed(log)) <= 17  # the killed one's


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_stops_at_once_and_loses_nothing(cells, log, out, jobs):
    process = script(cells, out, log, 60, 1, jobs)
    until(lambda: len(computed(log)) >= 3)
    time.sleep(0.2)
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - pressed < 5
    assert process.returncode != 0
    until(lambda: not alive(process.pid), 10)  # no worker is left in its group
    kept = {row["n"] for row in read_study(out)}
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
            importlib.util.find_spec(module) is None,
            reason=f"needs the extra rewardmodels[{name}]",
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
    assert sorted(row["square"] for row in read_study(out)) == [0, 1, 4, 9, 25]
    assert computed(log).count(2) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_cluster_that_is_there_is_joined_and_left_running(cells, log, out, backend):
    if backend == "dask":
        from distributed import Client, LocalCluster

        with LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
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
