"""The store keeps what it acknowledged, through kills, damage, upgrades, people and exports."""

import csv
import itertools
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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
from active import feedback as database
from active.feedback import Leases
from rewardmodels import Clips, InvalidInput, UnknownName, UnreadableFile


def some_clips(n: int = 5, *, seed: int = 0, rewards: bool = True) -> Clips:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.randint(1, 7, (n, 1), generator=generator)
    return Clips(
        torch.randn(n, 6, 3, generator=generator),
        torch.randn(n, 6, 2, generator=generator, dtype=torch.float64),
        mask,
        torch.randn(n, 6, generator=generator) if rewards else None,
        torch.randint(0, 255, (n, 6, 4), generator=generator, dtype=torch.uint8),
    )


def assert_same_clip(one: Clips, other: Clips) -> None:
    """Bit for bit, over real frames; each is a Clips of one."""
    for name in ("observations", "actions", "rewards", "states"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a[one.mask], b[other.mask])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a folder #1" / "answers?.sqlite"
    path.parent.mkdir()
    return path


@pytest.fixture
def store(path: Path) -> Iterator[FeedbackStore]:
    """A store with all six queries of four clips."""
    with FeedbackStore(path) as store:
        store.add_queries(some_clips(4), all_pairs(4), round=0)
        yield store


def tables(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as db:
        names = ("clips", "queries", "answers", "marks", "ratings", "withdrawals")
        return {name: db.execute(f"SELECT * FROM {name} ORDER BY id").fetchall() for name in names}


def test_clips_and_comparisons_are_returned_as_stored(path):
    clips, pairs = some_clips(), torch.tensor([[3, 1], [1, 0], [4, 3], [0, 4]])
    with FeedbackStore(path) as store:
        ids = store.add_queries(clips, pairs, round=0)
        for i, preference in ((2, 0.25), (0, 1.0), (3, math.nan), (1, 0.5)):
            store.answer(ids[i], preference, "ann")
    with FeedbackStore(path) as store:
        found = store.comparisons()
        assert found.preference.tolist() == [1.0, 0.5, 0.25]  # by query, not by time of answer
        assert len(found.clips) == 4  # clip 2 was never shown, the others count once
        for row, (a, b) in zip(pairs[:3].tolist(), found.pairs.tolist(), strict=True):
            assert_same_clip(clips[row[0]], found.clips[a])
            assert_same_clip(clips[row[1]], found.clips[b])


def test_queries_counts_and_rounds(path):
    with FeedbackStore(path) as store:
        assert store.comparisons() is None
        assert store.counts() == Counts(0, 0, 0)
        first = store.add_queries(some_clips(), torch.tensor([[0, 1], [1, 2]]), round=0)
        second = store.add_queries(some_clips(seed=1), torch.tensor([[0, 1]]), round=3)
        assert sorted({*first, *second}) == [*first, *second]
        store.answer(first[1], None, "bob")
        assert store.comparisons() is None
        store.answer(second[0], 0.0, "ann")
        assert store.counts() == Counts(put=3, answered=1, skipped=1)
        shown = [(q.id, q.round, q.teacher, q.preference, q.skipped) for q in store.queries()]
        assert shown == [
            (first[0], 0, None, None, False),
            (first[1], 0, "bob", None, True),
            (second[0], 3, "ann", 0.0, False),
        ]
        assert [q.id for q in store.queries(round=0)] == first
        assert [q.id for q in store.queries(unanswered=True)] == first[:1]
        assert store.queries(round=3, unanswered=True) == []


def test_a_clip_is_stored_once_for_all_queries_and_paddings(path):
    clips = some_clips()
    longer = Clips.cat([clips, Clips(torch.zeros(1, 9, 3), torch.zeros(1, 9, 2))])
    longer = Clips(longer.observations, longer.actions, longer.mask)
    shorter = Clips(clips.observations, clips.actions, clips.mask)
    with FeedbackStore(path) as store:
        ids = store.add_queries(shorter, torch.tensor([[0, 1], [1, 2]]), round=0)
        ids += store.add_queries(longer, torch.tensor([[2, 0], [5, 1]]), round=1)
        shown, pairs = store.clips_of(ids)
        assert len(shown) == 4
        assert pairs.tolist() == [[0, 1], [1, 2], [2, 0], [3, 1]]
        assert shown.length == 9
        again, turned = store.clips_of([ids[2], ids[0], ids[2]])
        assert turned.tolist() == [[0, 1], [1, 2], [0, 1]]
        assert_same_clip(again[0], shown[2])


def test_the_digest_of_the_first_answers_stays(tmp_path):
    def answered(name, *preferences):
        with FeedbackStore(tmp_path / name) as store:
            for query, preference in zip(
                store.add_queries(some_clips(), all_pairs(5)[:3], round=0), preferences, strict=True
            ):
                store.answer(query, preference, "ann")
            return [store.digest(n) for n in (0, 2, -1)]

    none, two, every = answered("one", 1.0, None, 0.5)
    assert [n for n, _ in (none, two, every)] == [0, 2, 3]
    assert answered("same", 1.0, None, 0.5) == [none, two, every]
    assert answered("other", 1.0, None, 0.0)[:2] == [none, two]
    assert answered("other 3", 1.0, None, 0.0)[2] != every
    assert answered("other 1", 0.0, None, 0.5)[1] != two


def test_two_clips_of_the_same_frames_can_be_compared(path):
    still = Clips(torch.zeros(2, 4, 3), torch.zeros(2, 4, 1))
    with FeedbackStore(path) as store:
        for query in (1, 2):
            store.add_queries(still, torch.tensor([[0, 1]]), round=0)
            store.answer(query, 0.5, "ann")
        found = store.comparisons()
        assert (len(found), len(found.clips)) == (2, 2)


def test_rows_are_only_ever_added(path, store):
    store.withdraw("answer", store.answer(1, 1.0, "ann"), "ann")
    store.answer(1, None, "ann")
    store.answer(2, 1.0, "ann")
    store.marks.add(1, 0, 2, good=True, teacher="ann")
    store.marks.rate(1, 0.5, teacher="ann")
    before = tables(path)
    for query in (1, 2):
        with pytest.raises(Conflict, match="query_id"):
            store.answer(query, 0.0, "bob")
    for table in before:
        for sql in (f"UPDATE {table} SET id = 99", f"DELETE FROM {table}"):
            # Other constraints would refuse some of these, too.
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                store._db.execute(sql)
    with pytest.raises(sqlite3.IntegrityError):
        store._db.execute("INSERT INTO answers (query, teacher) VALUES (1, 'eve')")
    assert tables(path) == before


NARROW = Clips(torch.zeros(2, 6, 2), torch.zeros(2, 6, 2))


@pytest.mark.parametrize(
    ("argument", "refused"),
    [
        ("path", lambda s: FeedbackStore(s.path.parent / "nowhere" / "x.sqlite")),
        ("pairs", lambda s: s.add_queries(some_clips(), torch.tensor([[0, 5]]), round=0)),
        ("pairs", lambda s: s.add_queries(some_clips(), torch.tensor([[0, 1], [2, 2]]), round=0)),
        ("round", lambda s: s.add_queries(some_clips(), all_pairs(2), round=-1)),
        ("observations", lambda s: s.add_queries(NARROW, all_pairs(2), round=0)),
        ("preference", lambda s: s.answer(1, 1.5, "ann")),
        ("preference", lambda s: s.answer(1, math.inf, "ann")),
        ("teacher", lambda s: s.answer(1, 1.0, "")),
        ("query_id", lambda s: s.answer(99, 1.0, "ann")),
        ("seconds", lambda s: s.answer(1, 1.0, "ann", seconds=-1.0)),
        ("declined", lambda s: s.answer(1, None, "ann", declined="bored")),
        ("query_id", lambda s: s.answer(1, 1.0, "ann", holder="nobody")),
        ("query_ids", lambda s: s.clips_of([])),
        ("query_id", lambda s: s.clips_of([1, 99])),
        ("ids", lambda s: s.clips([])),
        ("ids", lambda s: s.clips([99])),
        ("id", lambda s: s.withdraw("answer", 1, "ann")),
        ("kind", lambda s: s.withdraw("clips", 1, "ann")),
        ("holder", lambda s: s.leases.take("")),
        ("n", lambda s: s.leases.take("ann", 0)),
        ("seconds", lambda s: s.leases.take("ann", seconds=math.inf)),
        ("first, last", lambda s: s.marks.add(1, 3, 2, good=True, teacher="ann")),
        ("first, last", lambda s: s.marks.add(1, -1, 2, good=True, teacher="ann")),
        ("clip", lambda s: s.marks.add(99, 0, 2, good=True, teacher="ann")),
        ("teacher", lambda s: s.marks.add(1, 0, 2, good=True, teacher="")),
        ("rating", lambda s: s.marks.rate(1, 1.5, teacher="ann")),
        ("rating", lambda s: s.marks.rate(1, math.nan, teacher="ann")),
        ("query_id", lambda s: s.repeats.put(99)),
    ],
)
def test_bad_input_is_refused_by_name_and_changes_nothing(store, argument, refused):
    before = "\n".join(store._db.iterdump())
    with pytest.raises((InvalidInput, UnknownName), match=rf"{argument}\b"):
        refused(store)
    assert "\n".join(store._db.iterdump()) == before


def test_two_connections_share_their_comparisons(path, store):
    with FeedbackStore(path) as other:
        other.answer(1, 1.0, "ann")
        with pytest.raises(Conflict, match="query_id"):
            store.answer(1, 0.0, "bob")
        assert store.counts() == other.counts() == Counts(6, 1, 0)


def test_every_commit_reaches_the_disk(store):
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "user_version": 2}
    for name, value in expected.items():
        assert store._db.execute(f"PRAGMA {name}").fetchone()[0] == value


def write_for_ever(path: Path, report: int, statement: str, left: int) -> None:
    """Put and answer queries, and report each once it is acknowledged.

    With a statement, end by SIGKILL just before it runs for the last of `left` times.
    """
    store = FeedbackStore(path)

    def watch(sql: str) -> None:
        nonlocal left
        left -= sql.startswith(statement)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if statement:
        store._db.set_trace_callback(watch)
    os.write(report, b"ready\n")
    for round in itertools.count():
        clips = Clips(torch.randn(4, 50, 20), torch.randn(4, 50, 6))
        ids = store.add_queries(clips, torch.tensor([[0, 1], [1, 2], [2, 3]]), round=round)
        os.write(report, f"put {round} {' '.join(map(str, ids))}\n".encode())
        for query in ids:
            store.answer(query, (query % 3) / 2, "ann")
            os.write(report, f"answered {query}\n".encode())


def killed(target: Callable[..., None], *args: object, seconds: float | None = None) -> list[str]:
    """Return the lines that `target(args[0], descriptor, *args[1:])` reports until SIGKILL.

    The signal comes from the target itself, or `seconds` after its first line.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Forked, since importing torch takes longer than the test; Python 3.12 warns of that.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(
            target=target, args=(args[0], writing, *args[1:]), daemon=True
        )
        child.start()
    os.close(writing)
    with os.fdopen(reading) as lines_of:
        if seconds is not None:
            assert lines_of.readline() == "ready\n"
            time.sleep(seconds)
            child.kill()
        lines = lines_of.read().splitlines()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    return [line for line in lines if line != "ready"]


def assert_nothing_lost(path: Path, reported: list[str]) -> None:
    with FeedbackStore(path) as store:
        queries = {query.id: query for query in store.queries()}
        for line in reported:
            kind, *numbers = line.split()
            if kind == "put":
                assert {queries[int(i)].round for i in numbers[1:]} == {int(numbers[0])}
            else:
                assert queries[int(numbers[0])].preference == int(numbers[0]) % 3 / 2
        acknowledged = sum(line.startswith("answered") for line in reported)
        counts = store.counts()
        # An unacknowledged write may be there as a whole, never in part.
        assert counts.answered - acknowledged in (0, 1)
        rounds = [query.round for query in queries.values()]
        assert all(rounds.count(r) == 3 for r in set(rounds))
        assert len(set(rounds)) - sum(line.startswith("put") for line in reported) in (0, 1)
        if queries:
            clips, pairs = store.clips_of(list(queries))
            assert len(clips) == 4 * len(set(rounds))
            assert len(pairs) == len(queries)
        assert store._db.execute("PRAGMA foreign_key_check").fetchall() == []
        # The store can be used further.
        open_ones = store.queries(unanswered=True)
        for query in open_ones:
            store.answer(query.id, None, "bob")
        assert store.counts().skipped == len(open_ones)


@pytest.mark.parametrize(
    ("statement", "count", "rounds", "answers"),
    [
        ("INSERT INTO queries", 3 * 4 + 2, 4, 12),  # in the middle of the fifth round's queries
        # In the middle of the eighth answer; its trigger is traced under the same name.
        ("INSERT INTO answers", 2 * 8, 3, 7),
    ],
)
def test_a_kill_between_two_statements_leaves_whole_transactions(
    path, statement, count, rounds, answers
):
    reported = killed(write_for_ever, path, statement, count)
    assert len(reported) == rounds + answers
    with FeedbackStore(path) as store:
        assert store.counts()[:2] == (3 * rounds, answers)
    assert_nothing_lost(path, reported)


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing_acknowledged(path):
    moments = random.Random(0)
    for attempt in range(8):
        file = path.with_name(f"{attempt}.sqlite")
        reported = killed(write_for_ever, file, "", 0, seconds=moments.uniform(0, 1.0))
        assert_nothing_lost(file, reported)


def die_making(path: Path, report: int) -> None:
    """End before the commit that makes the file, with some of its pages written."""
    real = database._open

    def opened(path: Path, mode: str) -> sqlite3.Connection:
        db = real(path, mode)
        db.execute("PRAGMA cache_size = 1")
        db.execute("PRAGMA cache_spill = 1")
        db.set_trace_callback(lambda sql: sql == "COMMIT" and os.kill(os.getpid(), signal.SIGKILL))
        return db

    database._open = opened
    FeedbackStore(path)


def test_a_file_whose_making_was_killed_opens(path):
    killed(die_making, path)
    assert path.stat().st_size > 0
    assert path.with_name(path.name + "-journal").exists()
    with FeedbackStore(path) as store:
        assert store.counts() == Counts(0, 0, 0)
        store.add_queries(some_clips(), torch.tensor([[0, 1]]), round=0)


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE bookmarks (url TEXT)")
        db.commit()


def newer(path: Path) -> None:
    FeedbackStore(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def filled(path: Path, n: int = 40) -> None:
    with FeedbackStore(path) as store:
        store.add_queries(some_clips(n), torch.combinations(torch.arange(n)), round=0)


def torn(path: Path) -> None:
    filled(path)
    with path.open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)


def scribbled(path: Path) -> None:
    filled(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(0).randbytes(8192))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("url,visits\n" * 500),
        lambda path: path.write_bytes(b"\x00" * 5000),
        lambda path: path.write_text("x"),
        *(foreign, newer, torn, scribbled),
    ],
    ids=["text", "zeros", "one byte", "foreign", "newer", "torn", "scribbled"],
)
def test_a_damaged_or_foreign_file_is_refused_and_left_as_it_was(path, make):
    make(path)
    before = path.read_bytes()
    with pytest.raises(UnreadableFile) as caught:
        FeedbackStore(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_clip_whose_bytes_have_changed_is_refused(path):
    clips = some_clips()
    with FeedbackStore(path) as store:
        (query,) = store.add_queries(clips, torch.tensor([[0, 1]]), round=0)
    data = bytearray(path.read_bytes())
    needle = clips.observations[0, 0].numpy().tobytes()
    data[data.index(needle)] ^= 1
    path.write_bytes(data)
    with FeedbackStore(path) as store, pytest.raises(UnreadableFile):
        store.clips_of([query])


def test_a_copy_of_a_closed_store_is_a_whole_store(path):
    filled(path)
    with FeedbackStore(shutil.copy(path, path.with_name("copy.sqlite"))) as store:
        assert store.counts().put == 780


def test_leases_are_disjoint_renewable_and_expire(store):
    now = [1000.0]
    leases = Leases(store._file, lambda: now[0])
    assert leases.take("ann", 2, seconds=10) == [1, 2]
    assert leases.take("bob", 2, seconds=10) == [3, 4]
    now[0] += 6
    assert leases.take("ann", 3, seconds=10) == [1, 2, 5]  # hers, renewed, come first
    now[0] += 5  # bob's have run out, ann's not
    with pytest.raises(Conflict, match="query_id"):
        leases.check(3, "bob")
    leases.check(1, "ann")
    assert leases.take("carla", 9, seconds=10) == [3, 4, 6]
    leases.release("ann")
    assert leases.take("bob", 9) == [1, 2, 5]
    with pytest.raises(Conflict, match="query_id"):
        leases.grant(1, "ann")
    leases.grant(1, "bob")


def test_an_answer_needs_the_lease_and_ends_it(store):
    store.leases.take("ann's tab")
    with pytest.raises(Conflict, match="query_id"):
        store.answer(1, 0.0, "bob", holder="bob's tab")
    store.answer(1, 1.0, "ann", seconds=2.5, holder="ann's tab")
    with pytest.raises(Conflict, match="query_id"):
        store.answer(1, 1.0, "ann", holder="ann's tab")  # a double click
    assert store.leases.take("bob's tab", 9) == [2, 3, 4, 5, 6]
    assert store._db.execute("SELECT teacher, seconds FROM answers").fetchall() == [("ann", 2.5)]


def test_four_threads_answer_each_query_once(path):
    with FeedbackStore(path) as store:
        store.add_queries(some_clips(21), all_pairs(21)[:200], round=0)

    def answer_all(name: str) -> None:
        with FeedbackStore(path) as mine:
            while ids := mine.leases.take(name, 2):
                mine.answer(ids[0], 1.0, name, holder=name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(answer_all, "abcd"))
    assert sorted(row[1] for row in tables(path)["answers"]) == list(range(1, 201))


def test_a_withdrawn_answer_is_kept_and_not_counted(store):
    first = store.answer(1, 1.0, "ann")
    with pytest.raises(Missing, match="id"):
        store.withdraw("answer", first, "bob")
    store.withdraw("answer", first, "ann")
    assert store.counts() == Counts(6, 0, 0)
    assert store.comparisons() is None
    with pytest.raises(Conflict, match="id"):
        store.withdraw("answer", first, "ann")
    second = store.answer(1, 0.0, "ann")
    assert store.comparisons().preference.tolist() == [0.0]
    assert [row[0] for row in store._db.execute("SELECT id FROM answers")] == [first, second]


def test_unsure_and_skipped_are_distinguished(store):
    store.answer(1, None, "ann", declined="unsure")
    store.answer(2, None, "ann")
    store.answer(3, 0.5, "ann", declined="unsure")  # there is a preference: nothing declined
    reasons = [row[0] for row in store._db.execute("SELECT declined FROM answers ORDER BY query")]
    assert reasons == ["unsure", "skip", None]
    assert store.counts() == Counts(6, 1, 2)


def test_repeats_are_swapped_uncounted_and_agree_with_the_swapped_preference(store):
    for query, preference in zip([1, 2, 3, 4], (1.0, 0.0, 0.5, 1.0), strict=True):
        store.answer(query, preference, "ann")
    assert store.repeats.candidates("ann") == [1, 2, 3, 4]
    again = [store.repeats.put(query) for query in [1, 2, 3, 4]]
    assert store.repeats.candidates("ann") == []
    assert store.repeats.answered("ann") == (4, 4)
    assert store.shown(again[0]) == store.shown(1)[::-1]
    for query in (1, again[0]):
        with pytest.raises(Conflict, match="query_id"):
            store.repeats.put(query)
    before = store.counts()
    for query, preference in zip(again, (0.0, 0.0, 0.5, None), strict=True):
        store.answer(query, preference, "bob")
    assert store.repeats.agreement() == (2, 3)  # the second went the other way; the last is none
    assert store.counts() == before
    assert len(store.comparisons()) == 4


def test_marks_and_ratings_are_returned_as_rows(store):
    one, two = store.shown(6)
    good = store.marks.add(one, 0, 2, good=True, teacher="ann")
    bad = store.marks.add(two, 4, 4, good=False, teacher="bob")
    rated = store.marks.rate(one, 0.75, teacher="ann")
    again = store.marks.rate(one, 0.25, teacher="ann")
    assert store.marks.rows() == [(good, one, 0, 2, True, "ann"), (bad, two, 4, 4, False, "bob")]
    assert store.marks.ratings() == [(rated, one, 0.75, "ann"), (again, one, 0.25, "ann")]
    for clip, index in ((one, 2), (two, 3)):
        assert_same_clip(some_clips(4)[index], store.clips([clip]))
    store.withdraw("mark", good, "ann")
    store.withdraw("rating", again, "ann")
    assert [mark.id for mark in store.marks.rows()] == [bad]
    assert [rating.rating for rating in store.marks.ratings()] == [0.75]


def first_version(path: Path) -> list[tuple[object, ...]]:
    """Write a store as the first version did; return its answers."""
    with closing(sqlite3.connect(path)) as db:
        for statement in (
            *database._STEPS[0],
            f"PRAGMA application_id = {database._APPLICATION}",
            "PRAGMA user_version = 1",
            "INSERT INTO clips (sha256, twin, data) VALUES (x'00', 0, x''), (x'01', 0, x'')",
            "INSERT INTO queries (round, first, second) VALUES (0, 1, 2), (1, 2, 1)",
            "INSERT INTO answers (query, preference, teacher) VALUES (1, 0.5, 'ann')",
        ):
            db.execute(statement)
        db.commit()
        return db.execute("SELECT * FROM answers").fetchall()


def test_a_file_of_the_first_version_is_upgraded(path):
    old = first_version(path)
    with FeedbackStore(path) as store:
        assert store.counts() == Counts(2, 1, 0)
        store.withdraw("answer", 1, "ann")
        store.answer(1, 1.0, "ann", seconds=1.0)
        assert [q.preference for q in store.queries()] == [1.0, None]
    assert [row[:5] for row in tables(path)["answers"]][:1] == old


@pytest.mark.parametrize("name", ["", " ", "a\0", "\x1b[2Ja", "a\nb", "a\x85", "a\ud800"])
def test_names_with_control_characters_are_refused(store, name):
    before = tables(store.path)
    for give in (
        lambda: store.answer(1, 1.0, name),
        lambda: store.marks.add(1, 0, 0, good=True, teacher=name),
        lambda: store.marks.rate(1, 0.5, teacher=name),
    ):
        with pytest.raises(InvalidInput, match="teacher: "):
            give()
    assert tables(store.path) == before


def test_no_text_of_an_export_is_a_formula_in_a_spreadsheet(path, store, tmp_path, monkeypatch):
    names = ["=HYPERLINK(1)", "+1", "-1", "@x", "'=x", "''+", "'t Hooft", "a=b", "\t=x", "\rx"]
    monkeypatch.setattr(database, "check_teacher", lambda name: None)  # as in an older store
    for query, name in zip(range(1, 7), names, strict=False):
        store.answer(query, 0.5, name, seconds=1e-5)
    for name in names:
        store.marks.add(1, 0, 0, good=True, teacher=name)
    export_feedback(path, tmp_path / "out")
    for file in (tmp_path / "out").glob("*.csv"):
        with file.open(newline="") as rows:
            for row in csv.reader(rows):
                assert not any(cell.startswith(tuple("=+-@\t\r\n")) for cell in row)
    import_feedback(tmp_path / "out", tmp_path / "again.sqlite")
    assert tables(tmp_path / "again.sqlite") == tables(path)


@pytest.mark.parametrize("make", [Path.touch, foreign, lambda path: path.write_text("id,x\n" * 99)])
def test_an_export_of_something_else_is_refused_and_writes_nothing(path, tmp_path, make):
    make(path)
    before = path.read_bytes()
    with pytest.raises(UnreadableFile, match="expected a feedback store"):
        export_feedback(path, tmp_path / "out")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert not (tmp_path / "out").exists()


def test_an_export_only_reads_also_a_store_of_the_first_version(path, tmp_path):
    first_version(path)
    before = path.read_bytes()
    export_feedback(path, tmp_path / "out")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert len((tmp_path / "out" / "answers.csv").read_text().splitlines()) == 2


def test_an_export_while_another_process_begins_to_write_is_one_state(path, tmp_path, monkeypatch):
    filled(path, 5)
    real, begun = database._columns, []

    def columns(db, table):
        if not begun:
            begun.append(FeedbackStore(path))
            begun[0].answer(1, 1.0, "ann")
        return real(db, table)

    monkeypatch.setattr(database, "_columns", columns)
    export_feedback(path, tmp_path / "out")
    begun[0].close()
    assert "ann" in (tmp_path / "out" / "answers.csv").read_text()


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_an_export_imports_to_the_same_tables(path, store, tmp_path, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    teacher = 'Ånn "the second", or so'
    withdrawn = store.answer(1, 0.1 + 0.2, teacher, seconds=1 / 3)
    store.withdraw("answer", withdrawn, teacher)
    store.answer(1, 1.0, teacher)
    store.answer(2, None, "bob", declined="unsure")
    store.repeats.put(1)
    store.marks.add(1, 0, 3, good=False, teacher="bob")
    store.withdraw("rating", store.marks.rate(2, 0.1, teacher="bob"), "bob")
    export_feedback(path, tmp_path / "out", format)
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
def test_a_damaged_export_makes_no_store(path, store, tmp_path, change):
    store.withdraw("answer", store.answer(1, 0.5, "ann"), "ann")
    store.answer(1, 0.5, "ann")
    out = tmp_path / "out"
    export_feedback(path, out)
    with pytest.raises(InvalidInput, match="store"):
        import_feedback(out, path)
    with pytest.raises(InvalidInput, match="folder"):
        export_feedback(path, out)
    change(out)
    with pytest.raises(UnreadableFile, match="out"):
        import_feedback(out, tmp_path / "again.sqlite")
    assert {file.name for file in tmp_path.iterdir()} == {path.parent.name, "out"}


@pytest.mark.parametrize(
    ("argument", "refused"),
    [
        ("format", lambda folder: export_feedback(folder / "no.sqlite", folder / "out", "xlsx")),
        ("store", lambda folder: export_feedback(folder / "no.sqlite", folder / "out")),
        ("folder", lambda folder: import_feedback(folder, folder / "no.sqlite")),
    ],
)
def test_formats_and_folders_of_exports_are_checked(tmp_path, argument, refused):
    with pytest.raises((InvalidInput, UnknownName), match=argument):
        refused(tmp_path)
    assert not list(tmp_path.iterdir())
