"""Several people at once: leases, withdrawals, repeats, marks, files of before, export."""

import csv
import itertools
import math
import sqlite3
import threading
from pathlib import Path

import pytest
import torch

from active import (
    Conflict,
    Counts,
    FeedbackStore,
    Missing,
    all_pairs,
    export_feedback,
    import_feedback,
)
from active.feedback import _APPLICATION, _STEPS, Leases
from rewardmodels import Clips, InvalidInput, UnknownName, UnreadableFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.sqlite"


def some_clips(n: int = 4) -> Clips:
    draw = torch.Generator().manual_seed(0)
    return Clips(torch.randn(n, 5, 2, generator=draw), torch.randn(n, 5, 1, generator=draw))


def opened(path: Path) -> tuple[FeedbackStore, list[int]]:
    store = FeedbackStore(path)
    return store, store.add_queries(some_clips(), all_pairs(4), round=0)


def tables(path: Path) -> dict[str, list[tuple[object, ...]]]:
    db = sqlite3.connect(path)
    names = ("clips", "queries", "answers", "marks", "ratings", "withdrawals")
    found = {name: db.execute(f"SELECT * FROM {name} ORDER BY id").fetchall() for name in names}
    db.close()
    return found


def test_leases_are_disjoint_renewed_and_return_when_they_run_out(path):
    store, ids = opened(path)
    now = [1000.0]
    leases = Leases(store._file, lambda: now[0])
    assert leases.take("ann", 2, seconds=10) == ids[:2]
    assert leases.take("bob", 2, seconds=10) == ids[2:4]
    now[0] += 6
    assert leases.take("ann", 3, seconds=10) == [*ids[:2], ids[4]]  # hers, renewed, come first
    now[0] += 5  # bob's have run out, ann's not
    with pytest.raises(Conflict, match="query_id"):
        leases.check(ids[2], "bob")
    leases.check(ids[0], "ann")
    assert leases.take("carla", 9, seconds=10) == [ids[2], ids[3], ids[5]]
    leases.release("ann")
    assert leases.take("bob", 9) == [ids[0], ids[1], ids[4]]
    with pytest.raises(Conflict, match="query_id"):
        leases.grant(ids[0], "ann")
    leases.grant(ids[0], "bob")
    store.close()


@pytest.mark.parametrize(
    "refused",
    [
        lambda s: s.leases.take(""),
        lambda s: s.leases.take("ann", 0),
        lambda s: s.leases.take("ann", seconds=math.inf),
        lambda s: s.marks.add(1, 3, 2, good=True, teacher="ann"),
        lambda s: s.marks.add(1, -1, 2, good=True, teacher="ann"),
        lambda s: s.marks.add(99, 0, 2, good=True, teacher="ann"),
        lambda s: s.marks.add(1, 0, 2, good=True, teacher=""),
        lambda s: s.marks.rate(1, 1.5, teacher="ann"),
        lambda s: s.marks.rate(1, math.nan, teacher="ann"),
        lambda s: s.answer(1, 1.0, "ann", seconds=-1.0),
        lambda s: s.answer(1, None, "ann", declined="bored"),
        lambda s: s.answer(1, 1.0, "ann", holder="nobody"),
        lambda s: s.withdraw("answer", 1, "ann"),
        lambda s: s.withdraw("clips", 1, "ann"),
        lambda s: s.repeats.put(99),
        lambda s: s.clips([]),
        lambda s: s.clips([99]),
    ],
)
def test_what_is_refused_changes_nothing(path, refused):
    store, _ = opened(path)
    before = "\n".join(store._db.iterdump())
    with pytest.raises((InvalidInput, UnknownName)):
        refused(store)
    assert "\n".join(store._db.iterdump()) == before
    store.close()


def test_an_answer_needs_the_lease_and_ends_it(path):
    store, ids = opened(path)
    store.leases.take("ann's tab")
    with pytest.raises(Conflict, match="query_id"):
        store.answer(ids[0], 0.0, "bob", holder="bob's tab")
    store.answer(ids[0], 1.0, "ann", seconds=2.5, holder="ann's tab")
    with pytest.raises(Conflict, match="'ann' has answered"):
        store.answer(ids[0], 1.0, "ann", holder="ann's tab")  # a double click
    assert store.leases.take("bob's tab", 9) == ids[1:]
    assert store._db.execute("SELECT teacher, seconds FROM answers").fetchall() == [("ann", 2.5)]
    store.close()


def test_four_threads_never_get_the_same_query_and_answer_each_once(path):
    clips = some_clips(21)
    with FeedbackStore(path) as store:
        store.add_queries(clips, all_pairs(21)[:200], round=0)
    failed = []

    def person(name: str) -> None:
        with FeedbackStore(path) as mine:
            while ids := mine.leases.take(name, 2):
                try:
                    mine.answer(ids[0], 1.0, name, holder=name)
                except InvalidInput as error:
                    failed.append(error)

    threads = [threading.Thread(target=person, args=(f"person {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    answers = tables(path)["answers"]
    assert sorted(row[1] for row in answers) == list(range(1, 201))


def test_a_withdrawn_answer_stays_and_counts_no_more(path):
    store, ids = opened(path)
    first = store.answer(ids[0], 1.0, "ann")
    with pytest.raises(Missing, match="by 'bob'"):
        store.withdraw("answer", first, "bob")
    store.withdraw("answer", first, "ann")
    assert store.counts() == Counts(6, 0, 0)
    assert store.comparisons() is None
    with pytest.raises(Conflict, match="id"):
        store.withdraw("answer", first, "ann")
    second = store.answer(ids[0], 0.0, "ann")
    assert store.comparisons().preference.tolist() == [0.0]
    assert [row[0] for row in store._db.execute("SELECT id FROM answers")] == [first, second]
    with pytest.raises(sqlite3.IntegrityError, match="an answer that stands"):
        store._db.execute("INSERT INTO answers (query, teacher) VALUES (?, 'eve')", (ids[0],))
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        store._db.execute("DELETE FROM withdrawals")
    store.close()


def test_unsure_and_skipped_are_told_apart(path):
    store, ids = opened(path)
    store.answer(ids[0], None, "ann", declined="unsure")
    store.answer(ids[1], None, "ann")
    store.answer(ids[2], 0.5, "ann", declined="unsure")  # there is a preference: nothing declined
    said = [row[0] for row in store._db.execute("SELECT declined FROM answers ORDER BY query")]
    assert said == ["unsure", "skip", None]
    assert store.counts() == Counts(6, 1, 2)
    store.close()


def test_repeats_are_turned_round_uncounted_and_agree_when_the_answer_is_turned_round(path):
    store, ids = opened(path)
    for query, preference in zip(ids[:4], (1.0, 0.0, 0.5, 1.0), strict=True):
        store.answer(query, preference, "ann")
    assert store.repeats.candidates("ann") == ids[:4]
    again = [store.repeats.put(query) for query in ids[:4]]
    assert store.repeats.candidates("ann") == []
    assert store.repeats.answered("ann") == (4, 4)
    assert store.shown(again[0]) == store.shown(ids[0])[::-1]
    for query in (ids[0], again[0]):
        with pytest.raises(Conflict, match="never repeated"):
            store.repeats.put(query)
    before = store.counts()
    for query, preference in zip(again, (0.0, 0.0, 0.5, None), strict=True):
        store.answer(query, preference, "bob")
    assert store.repeats.agreement() == (2, 3)  # the second went the other way; the last is none
    assert store.counts() == before
    assert len(store.comparisons()) == 4
    store.close()


def test_marks_and_ratings_come_back_as_rows(path):
    store, ids = opened(path)
    one, two = store.shown(ids[5])
    good = store.marks.add(one, 0, 2, good=True, teacher="ann")
    bad = store.marks.add(two, 4, 4, good=False, teacher="bob")
    rated = store.marks.rate(one, 0.75, teacher="ann")
    again = store.marks.rate(one, 0.25, teacher="ann")
    assert store.marks.rows() == [(good, one, 0, 2, True, "ann"), (bad, two, 4, 4, False, "bob")]
    assert store.marks.ratings() == [(rated, one, 0.75, "ann"), (again, one, 0.25, "ann")]
    assert torch.equal(store.clips([two, one]).observations, some_clips().observations[[3, 2]])
    store.withdraw("mark", good, "ann")
    store.withdraw("rating", again, "ann")
    assert [mark.id for mark in store.marks.rows()] == [bad]
    assert [rating.rating for rating in store.marks.ratings()] == [0.75]
    store.close()


def test_a_file_of_the_first_version_is_brought_up_to_date(path):
    db = sqlite3.connect(path)
    for statement in _STEPS[0]:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {_APPLICATION}")
    db.execute("PRAGMA user_version = 1")
    db.execute("INSERT INTO clips (sha256, twin, data) VALUES (x'00', 0, x''), (x'01', 0, x'')")
    db.execute("INSERT INTO queries (round, first, second) VALUES (0, 1, 2), (1, 2, 1)")
    db.execute("INSERT INTO answers (query, preference, teacher) VALUES (1, 0.5, 'ann')")
    db.commit()
    old = db.execute("SELECT * FROM answers").fetchall()
    db.close()
    with FeedbackStore(path) as store:
        assert store.counts() == Counts(2, 1, 0)
        store.withdraw("answer", 1, "ann")
        store.answer(1, 1.0, "ann", seconds=1.0)
        assert [q.preference for q in store.queries()] == [1.0, None]
    assert [row[:5] for row in tables(path)["answers"]][:1] == old


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_everything_exports_and_comes_back(path, tmp_path, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    store, ids = opened(path)
    teacher = 'Ånn "the\nsecond", or so'
    withdrawn = store.answer(ids[0], 0.1 + 0.2, teacher, seconds=1 / 3)
    store.withdraw("answer", withdrawn, teacher)
    store.answer(ids[0], 1.0, teacher)
    store.answer(ids[1], None, "bob", declined="unsure")
    store.repeats.put(ids[0])
    store.marks.add(1, 0, 3, good=False, teacher="bob")
    store.withdraw("rating", store.marks.rate(2, 0.1, teacher="bob"), "bob")
    export_feedback(path, tmp_path / "out", format)
    store.close()
    import_feedback(tmp_path / "out", tmp_path / "again.sqlite")
    assert tables(tmp_path / "again.sqlite") == tables(path)
    with FeedbackStore(tmp_path / "again.sqlite") as again:
        assert again.comparisons().preference.tolist() == [1.0]
        again.leases.take("ann", 9)
    if format == "csv":
        with (tmp_path / "out" / "answers.csv").open(newline="") as file:
            assert [row["teacher"] for row in csv.DictReader(file)] == [teacher, teacher, "bob"]


def spoil(name: str, old: str, new: str):
    def change(folder: Path) -> None:
        file = next(folder.glob(name))
        file.write_bytes(file.read_bytes().replace(old.encode(), new.encode()))

    return change


@pytest.mark.parametrize(
    "change",
    [
        spoil("clips/*", "observations", "0bservations"),
        spoil("queries.csv", "id,", "di,"),
        spoil("answers.csv", "0.5", "1.5"),
        spoil("answers.csv", "0.5", "a half"),
        spoil("answers.csv", "\n1,1,", "\n1,77,"),
        lambda folder: (folder / "marks.csv").unlink(),
        lambda folder: (folder / "withdrawals.csv").write_text(
            "id,answer,mark,rating,withdrawn_at\n"
        ),
        lambda folder: (folder / "clips.csv").write_text("id,sha256,twin\n1,../../x,0\n"),
    ],
)  # fmt: skip
def test_a_damaged_export_makes_no_store(path, tmp_path, change):
    store, ids = opened(path)
    store.withdraw("answer", store.answer(ids[0], 0.5, "ann"), "ann")
    store.answer(ids[0], 0.5, "ann")
    store.close()
    out = tmp_path / "out"
    export_feedback(path, out)
    with pytest.raises(InvalidInput, match="store"):
        import_feedback(out, path)
    with pytest.raises(InvalidInput, match="empty folder"):
        export_feedback(path, out)
    change(out)
    with pytest.raises(UnreadableFile, match="whole export"):
        import_feedback(out, tmp_path / "again.sqlite")
    assert {file.name for file in tmp_path.iterdir()} == {"answers.sqlite", "out"}


def test_formats_and_folders_are_checked(path, tmp_path):
    with pytest.raises(UnknownName, match="format"):
        export_feedback(path, tmp_path / "out", "xlsx")  # type: ignore[arg-type]
    for refused in (
        lambda: export_feedback(path, tmp_path / "out"),
        lambda: import_feedback(tmp_path, path),
    ):
        with pytest.raises(InvalidInput):
            refused()
    assert not list(itertools.islice(tmp_path.iterdir(), 1))
