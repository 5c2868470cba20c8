"""A study ends complete, or says what is missing and why; and computes no cell in vain."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pytest
import torch

from experiments import grid as workers
from experiments.grid import Run, StudyIncomplete, cell_file, read_cells, run_cells
from experiments.training.run_directory import versions
from rewardmodels import InvalidInput, UnknownName, UnreadableFile, saving

from .studying import computed, finished, grid, names, run


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


def test_a_cells_file_records_everything_and_finished_cells_are_read(cells, log, out):
    run(cells.slow, grid(log, 2, seconds=0.2), out)
    run(cells.cube, grid(log, 2, 3), out)
    (cell,) = grid(log, 2, seconds=0.2)
    record = json.loads(cell_file(cells.slow, cell, out).read_text())
    assert 0.2 <= record.pop("seconds") < 1
    assert record == {
        "function": "slow", "cell": cell, "versions": versions(), "result": {"square": 4}
    }  # fmt: skip
    records = read_cells(cells.cube, grid(log, 1, 2, 3), out)
    assert [(cell["n"], found["result"]["cube"]) for cell, found in records] == [(2, 8), (3, 27)]


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
    assert not (tmp_path / "new").exists()


def test_an_empty_grid_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="cells"):
        run(dict, [], tmp_path)


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
    assert sorted(row["n"] for row in finished(out)) == [0, 1, 4]
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
    killed = files[0].with_name(f".{files[0].name}.{uuid4().hex}.part")
    killed.write_text("{")  # of a process that was killed
    assert run(cells.square, grid(log, *range(4)), out) == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_loses_nothing_and_the_same_call_goes_on(cells, log, out, monkeypatch):
    run(cells.square, grid(log, 0), out)
    full = cell_file(cells.square, grid(log, 2)[0], out)
    monkeypatch.setattr(saving, "uuid4", lambda: SimpleNamespace(hex="beside"))
    full.with_name(f".{full.name}.beside.part").symlink_to("/dev/full")
    with pytest.raises(StudyIncomplete, match=r"No space left on device.*make room") as caught:
        run(cells.square, grid(log, *range(4)), out)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert sorted(row["n"] for row in finished(out)) == [0, 1]
    assert not list(out.glob(".*.part"))
    assert len(run(cells.square, grid(log, *range(4)), out)) == 4
    assert computed(log) == [0, 1, 2, 2, 3]
    assert names(out) - {"study.lock", "study.json"} == {
        cell_file(cells.square, cell, out).name for cell in grid(log, *range(4))
    }


def test_two_at_once_share_the_cells_and_compute_none_twice(cells, log, out):
    # Locks are of open files, so threads exclude each other just as processes do.
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(run, cells.slow, grid(log, *range(12), seconds=0.1), out) for _ in range(3)
        ]
    assert all(r.result() == [{"square": n * n} for n in range(12)] for r in runs)
    assert sorted(computed(log)) == list(range(12))


def test_progress_goes_to_stderr_and_counts_all_cells(cells, log, out, capfd):
    run(cells.square, grid(log, 0, 1), out)
    capfd.readouterr()
    run_cells(cells.square, grid(log, 0, 1, 2), Run(out))
    printed, bar = capfd.readouterr()
    assert printed == ""
    assert "3/3" in bar.split("\r")[-1]
