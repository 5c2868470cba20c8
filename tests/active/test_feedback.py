"""What was acknowledged is there, whatever happened: round trips, kills, damage."""

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
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from active import Counts, FeedbackStore
from active import feedback as database
from rewardmodels.clips import Clips
from rewardmodels.errors import InvalidInput, UnreadableFile


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
    return tmp_path / "a folder #1" / "answers?.sqlite"


@pytest.fixture(autouse=True)
def _folder(path: Path) -> None:
    path.parent.mkdir()


def test_clips_and_answers_come_back_as_they_went(path):
    clips, pairs = some_clips(), torch.tensor([[3, 1], [1, 0], [4, 3], [0, 4]])
    with FeedbackStore(path) as store:
        ids = store.add_queries(clips, pairs, round=0)
        for i, preference in ((2, 0.25), (0, 1.0), (3, math.nan), (1, 0.5)):
            store.answer(ids[i], preference, "ann")
    with FeedbackStore(path) as store:
        said = store.comparisons()
        assert said is not None
        assert said.preference.tolist() == [1.0, 0.5, 0.25]  # by query, not by time of answer
        assert len(said.clips) == 4  # clip 2 was never shown, the others count once
        for row, (a, b) in zip(pairs[:3].tolist(), said.pairs.tolist(), strict=True):
            assert_same_clip(clips[row[0]], said.clips[a])
            assert_same_clip(clips[row[1]], said.clips[b])


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


def test_a_clip_is_kept_once_however_often_and_however_padded_it_is_shown(path):
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


def test_two_clips_of_the_same_frames_can_still_be_compared(path):
    still = Clips(torch.zeros(2, 4, 3), torch.zeros(2, 4, 1))
    with FeedbackStore(path) as store:
        for _ in range(2):
            (query,) = store.add_queries(still, torch.tensor([[0, 1]]), round=0)
            store.answer(query, 0.5, "ann")
        said = store.comparisons()
        assert said is not None
        assert (len(said), len(said.clips)) == (2, 2)


def test_answers_are_never_changed(path):
    with FeedbackStore(path) as store:
        ids = store.add_queries(some_clips(), torch.tensor([[0, 1], [1, 2]]), round=0)
        store.answer(ids[0], 1.0, "ann")
        store.answer(ids[1], None, "ann")
        for query in ids:
            with pytest.raises(InvalidInput, match="'ann' has answered"):
                store.answer(query, 0.0, "bob")
        assert [q.preference for q in store.queries()] == [1.0, None]
    with sqlite3.connect(path) as db:
        for table, column in (("answers", "teacher"), ("queries", "round"), ("clips", "data")):
            for sql in (f"UPDATE {table} SET {column} = 7", f"DELETE FROM {table}"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    db.execute(sql)
    db.close()


def test_bad_input_is_refused_and_nothing_is_stored(path):
    clips = some_clips()
    with FeedbackStore(path) as store:
        (query,) = store.add_queries(clips, torch.tensor([[0, 1]]), round=0)
        before, put = store.counts(), store.add_queries
        narrow = Clips(torch.zeros(2, 6, 2), torch.zeros(2, 6, 2))
        one = torch.tensor([[0, 1]])
        for message, refused in {
            r"pairs: .*0 to 4": lambda: put(clips, torch.tensor([[0, 5]]), round=0),
            r"pairs: .*row 1": lambda: put(clips, torch.tensor([[0, 1], [2, 2]]), round=0),
            r"round: .*-1": lambda: put(clips, one, round=-1),
            r"clips.observations: .*\(3,\).*\(2,\)": lambda: put(narrow, one, round=0),
            r"preference: .*1.5": lambda: store.answer(query, 1.5, "ann"),
            r"preference: .*inf": lambda: store.answer(query, math.inf, "ann"),
            r"teacher: ": lambda: store.answer(query, 1.0, ""),
            r"query_id: .*got 99": lambda: store.answer(99, 1.0, "ann"),
            r"query_ids: .*none": lambda: store.clips_of([]),
            r"query_id: .*got 99, which isn": lambda: store.clips_of([query, 99]),
        }.items():
            with pytest.raises(InvalidInput, match=message):
                refused()
        assert store.counts() == before
        assert store.queries()[0].teacher is None
        store.answer(query, 1.0, "ann")
    with pytest.raises(InvalidInput, match=r"path: .*existing folder"):
        FeedbackStore(path.parent / "nowhere" / "x.sqlite")


def test_two_connections_see_each_others_answers(path):
    with FeedbackStore(path) as one, FeedbackStore(path) as two:
        ids = one.add_queries(some_clips(), torch.tensor([[0, 1], [1, 2]]), round=0)
        two.answer(ids[0], 1.0, "ann")
        with pytest.raises(InvalidInput, match="has answered"):
            one.answer(ids[0], 0.0, "bob")
        assert one.counts() == two.counts() == Counts(2, 1, 0)


def test_every_commit_reaches_the_disk(path):
    with FeedbackStore(path) as store:
        settings = {
            name: store._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys", "user_version")
        }
    assert settings == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "user_version": 2,
    }  # fmt: skip


def write_for_ever(path: Path, say: int, statement: str, left: int) -> None:
    """Puts and answers queries, saying each thing once it is acknowledged.

    Given a statement and a count, it kills itself just before it runs that for so many a time.
    """
    store = FeedbackStore(path)

    def watch(sql: str) -> None:
        nonlocal left
        left -= sql.startswith(statement)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if statement:
        store._db.set_trace_callback(watch)
    os.write(say, b"ready\n")
    for round in itertools.count():
        clips = Clips(torch.randn(4, 50, 20), torch.randn(4, 50, 6))
        ids = store.add_queries(clips, torch.tensor([[0, 1], [1, 2], [2, 3]]), round=round)
        os.write(say, f"put {round} {' '.join(map(str, ids))}\n".encode())
        for query in ids:
            store.answer(query, (query % 3) / 2, "ann")
            os.write(say, f"answered {query}\n".encode())


def killed(target: Callable[..., None], *args: object, seconds: float | None = None) -> list[str]:
    """Runs target in a process of its own until SIGKILL; returns the lines that it had said.

    Args:
        target: Called with the descriptor to write lines to, as its second argument.
        args: Its other arguments.
        seconds: Kill it so long after its first line; otherwise it kills itself.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Forked, since starting Python and importing torch anew takes longer than all the rest;
        # from Python 3.12 on that is warned of.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(
            target=target, args=(args[0], writing, *args[1:]), daemon=True
        )
        child.start()
    os.close(writing)
    with os.fdopen(reading) as said:
        if seconds is not None:
            assert said.readline() == "ready\n"
            time.sleep(seconds)
            child.kill()
        lines = said.read().splitlines()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    return [line for line in lines if line != "ready"]


def assert_nothing_lost(path: Path, said: list[str]) -> None:
    with FeedbackStore(path) as store:
        queries = {query.id: query for query in store.queries()}
        for line in said:
            kind, *numbers = line.split()
            if kind == "put":
                assert {queries[int(i)].round for i in numbers[1:]} == {int(numbers[0])}
            else:
                assert queries[int(numbers[0])].preference == int(numbers[0]) % 3 / 2
        acknowledged = sum(line.startswith("answered") for line in said)
        counts = store.counts()
        # What was being written may have come through whole, never in part.
        assert counts.answered - acknowledged in (0, 1)
        rounds = [query.round for query in queries.values()]
        assert all(rounds.count(r) == 3 for r in set(rounds))
        assert len(set(rounds)) - sum(line.startswith("put") for line in said) in (0, 1)
        if queries:
            clips, pairs = store.clips_of(list(queries))
            assert len(clips) == 4 * len(set(rounds))
            assert len(pairs) == len(queries)
        assert store._db.execute("PRAGMA foreign_key_check").fetchall() == []
        # And it goes on from there.
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
def test_a_kill_between_two_statements_leaves_only_whole_things(
    path, statement, count, rounds, answers
):
    said = killed(write_for_ever, path, statement, count)
    assert len(said) == rounds + answers
    with FeedbackStore(path) as store:
        assert store.counts()[:2] == (3 * rounds, answers)
    assert_nothing_lost(path, said)


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing_acknowledged(path):
    moments = random.Random(0)
    for attempt in range(8):
        file = path.with_name(f"{attempt}.sqlite")
        said = killed(write_for_ever, file, "", 0, seconds=moments.uniform(0, 1.0))
        assert_nothing_lost(file, said)


def die_making(path: Path, say: int) -> None:
    """Dies before the commit that makes the file, some of its pages written already."""
    real = database._open

    def opened(path: Path, mode: str) -> sqlite3.Connection:
        db = real(path, mode)
        db.execute("PRAGMA cache_size = 1")
        db.execute("PRAGMA cache_spill = 1")
        db.set_trace_callback(
            lambda sql: os.kill(os.getpid(), signal.SIGKILL) if sql == "COMMIT" else None
        )
        return db

    database._open = opened
    database._Database(path)


def test_a_kill_while_the_file_is_made_leaves_one_that_opens(path):
    killed(die_making, path)
    assert path.stat().st_size > 0
    assert path.with_name(path.name + "-journal").exists()
    with FeedbackStore(path) as store:
        assert store.counts() == Counts(0, 0, 0)
        store.add_queries(some_clips(), torch.tensor([[0, 1]]), round=0)


def foreign(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.commit()
    db.close()


def newer(path: Path) -> None:
    FeedbackStore(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()


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
    ("make", "message"),
    [
        (lambda path: path.write_text("url,visits\n" * 500), "not a database"),
        (lambda path: path.write_bytes(b"\x00" * 5000), "damaged or of another format"),
        (lambda path: path.write_text("x"), "damaged or of another format"),
        (foreign, "SQLite database of another kind"),
        (newer, "expected schema version 2 or earlier, got 99.*upgrade"),
        (torn, r"damaged.*Restore it from a copy.*\.recover"),
        (scribbled, r"damaged.*Restore it from a copy.*\.recover"),
    ],
    ids=["text", "zeros", "one byte", "foreign", "newer", "torn", "scribbled"],
)
def test_a_damaged_or_foreign_file_is_refused_and_left_as_it_was(path, make, message):
    make(path)
    before = path.read_bytes()
    with pytest.raises(UnreadableFile, match=message) as caught:
        FeedbackStore(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_clip_whose_bytes_have_changed_is_noticed(path):
    clips = some_clips()
    with FeedbackStore(path) as store:
        (query,) = store.add_queries(clips, torch.tensor([[0, 1]]), round=0)
    data = bytearray(path.read_bytes())
    needle = clips.observations[0, 0].numpy().tobytes()
    data[data.index(needle)] ^= 1
    path.write_bytes(data)
    with FeedbackStore(path) as store, pytest.raises(UnreadableFile, match="checksum"):
        store.clips_of([query])


def test_a_copy_of_a_closed_store_is_a_whole_store(path):
    filled(path)
    copy = path.with_name("copy.sqlite")
    shutil.copy(path, copy)
    with FeedbackStore(copy) as store:
        assert store.counts().put == 780
