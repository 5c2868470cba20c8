"""People who answer while an agent trains, and answers that are replayed."""

import csv
import multiprocessing
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from active import (
    Constant,
    FeedbackStore,
    HumanTeacher,
    ReplayTeacher,
    Request,
    export_feedback,
    teachers,
)
from experiments.training import rewards
from experiments.training.learn import learn
from rewardmodels import Clips, InvalidInput

from .. import studying

pytestmark = pytest.mark.usefixtures("_short_updates")

COMPARISONS, ROUNDS, FIRST = studying.TINY["comparisons"], studying.TINY["rounds"], 10


@pytest.fixture(autouse=True)
def _look_often(monkeypatch, _no_report):
    monkeypatch.setattr(teachers, "_POLL_SECONDS", 0.02)


def tiny(out, teacher, **settings):
    first = Constant(initial=FIRST / COMPARISONS)
    return studying.tiny(out, teacher=teacher, steps=3 * 2048, epochs=1, schedule=first, **settings)


def answer(store, most=10**9, skip=lambda query: False):
    """Answers what is open, by the clips' true returns; says how many."""
    said = 0
    for query in store.queries(unanswered=True)[:most]:
        clips, pairs = store.clips_of([query.id])
        first, second = clips.returns[pairs[0]]
        store.answer(query.id, None if skip(query) else float(second > first), "ann")
        said += 1
    return said


@contextmanager
def somebody(out, most=10**9, skip=lambda query: False):
    """A person who answers in a thread of their own until `most` answers are given."""
    stop = threading.Event()

    def sit():
        while not (out / "config.yaml").exists() and not stop.is_set():
            time.sleep(0.01)
        if stop.is_set():
            return
        left = most
        with FeedbackStore(out / "answers.sqlite") as store:
            while left > 0 and not stop.is_set():
                left -= answer(store, min(left, 1), skip)
                time.sleep(0.005)

    thread = threading.Thread(target=sit)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def metrics(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_an_impatient_run_waits_for_the_first_share_alone(tmp_path, monkeypatch):
    fitted, fit = [], rewards.fit
    monkeypatch.setattr(rewards, "fit", lambda m, c, **k: fitted.append(len(c)) or fit(m, c, **k))
    out = tmp_path / "run"
    with somebody(out, most=FIRST):  # who then goes home
        result = learn(tiny(out, HumanTeacher(patience=0.0)), progress=False)
    assert fitted == [FIRST] * ROUNDS
    # As many stand open as are due, round by round, though nobody answers any more.
    assert [int(row["queries"]) for row in metrics(out)] == [10, 15, 20]
    assert (result["comparisons"], result["queries"]) == (FIRST, COMPARISONS)


def test_a_run_waits_for_every_answer_that_is_due(tmp_path):
    out = tmp_path / "run"
    with somebody(out):
        learn(tiny(out, HumanTeacher()), progress=False)
    assert [int(row["comparisons"]) for row in metrics(out)] == [10, 15, 20]


def test_what_people_skip_is_put_anew(tmp_path):
    out = tmp_path / "run"
    with somebody(out, skip=lambda query: query.id % 2 == 1):
        result = learn(tiny(out, HumanTeacher()), progress=False)
    assert result["comparisons"] == COMPARISONS
    assert result["skipped"] >= COMPARISONS - 1
    assert result["queries"] == result["comparisons"] + result["skipped"]


def test_waiting_says_for_what_and_how_to_answer(tmp_path):
    said, put = [], []
    out = tmp_path / "a run"
    out.mkdir()
    with FeedbackStore(out / "answers.sqlite") as store:
        clips = Clips(torch.rand(8, 3, 2), torch.rand(8, 3, 1), rewards=torch.rand(8, 3))

        def ask(n):
            put.append(n)
            store.add_queries(clips, torch.arange(2 * n).view(n, 2), round=0)

        def tell(text):
            said.append(text)
            answer(store, most=2)

        HumanTeacher().collect(Request(store, 0, 4, ask, first=True, report=tell))
    assert put == [4]
    assert said == [f"waiting for {n} comparisons: rewardmodels label '{out}'" for n in (4, 2)]


def _label(out, most):
    with FeedbackStore(out / "answers.sqlite") as store:
        answer(store, most)


def test_either_side_may_stop_and_start_again(tmp_path, monkeypatch):
    out, waited = tmp_path / "run", []

    def interrupt(_):
        waited.append(1)
        raise KeyboardInterrupt

    def page(most):
        # A fork has PyTorch imported already.
        process = multiprocessing.get_context("fork").Process(target=_label, args=(out, most))
        process.start()
        process.join()
        assert process.exitcode == 0

    with monkeypatch.context() as patch:
        patch.setattr(teachers.time, "sleep", interrupt)
        for resume, answers in ((False, 4), (True, 3)):
            with pytest.raises(KeyboardInterrupt):
                learn(tiny(out, HumanTeacher()), resume=resume, progress=False)
            with FeedbackStore(out / "answers.sqlite") as store:
                assert len(store.queries()) == FIRST  # not put a second time
            page(answers)
    with FeedbackStore(out / "answers.sqlite") as store:
        before = [query for query in store.queries() if query.teacher]
        assert len(before) == 7
        clips, _ = store.clips_of([before[0].id])
        assert clips.states.shape == (2, 40, 2)  # from which the page draws them
    with somebody(out):
        result = learn(tiny(out, HumanTeacher()), resume=True, progress=False)
    assert result["comparisons"] >= FIRST
    with FeedbackStore(out / "answers.sqlite") as store:
        assert [query for query in store.queries() if query.teacher][:7] == before


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Thirteen answers to fifteen queries; one was skipped and one never answered."""
    file = tmp_path_factory.mktemp("recorded") / "answers.sqlite"
    generator = torch.Generator().manual_seed(0)
    shapes = ((30, 40, 3), (30, 40, 1))
    observations, actions = (torch.rand(shape, generator=generator) for shape in shapes)
    with FeedbackStore(file) as store:
        ids = store.add_queries(Clips(observations, actions), torch.arange(30).view(15, 2), round=0)
        for query in ids:
            if query != ids[4]:
                said = None if query == ids[7] else (query % 4) / 3
                store.answer(query, said, f"person {query % 2}")
    return file


def check_replayed(recorded, file):
    """A store holds, in order, the queries of a recording that have a preference."""
    with FeedbackStore(recorded) as then, FeedbackStore(file) as now:
        old, new = then.comparisons(), now.comparisons()
        torch.testing.assert_close(new.preference, old.preference)
        for side in range(2):
            shown = [c.clips.observations[c.pairs[:, side]] for c in (old, new)]
            torch.testing.assert_close(*shown)
        wanted = [q.teacher for q in then.queries() if q.preference is not None]
        assert [query.teacher for query in now.queries()] == wanted


def test_recorded_queries_get_the_answers_that_they_got(recorded, tmp_path):
    out = tmp_path / "run"
    result = learn(tiny(out, ReplayTeacher(recorded)), progress=False)
    # As many as are due, until there are no more.
    assert [int(row["comparisons"]) for row in metrics(out)] == [10, 13, 13]
    assert result["queries"] == result["comparisons"] == 13
    check_replayed(recorded, out / "answers.sqlite")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_an_export_replays_as_the_store_does(recorded, form, tmp_path):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    export_feedback(recorded, tmp_path / "export", form)
    replay = ReplayTeacher(tmp_path / "export")
    replay.check((3,), (1,))
    with FeedbackStore(tmp_path / "answers.sqlite") as store:
        for round, due in enumerate((5, 5, 20)):
            replay.collect(Request(store, round, due, propose=len))
            assert store.counts().answered == min(due, 13)
    check_replayed(recorded, tmp_path / "answers.sqlite")


def test_a_replay_cut_off_between_query_and_answer_goes_on(recorded, tmp_path, monkeypatch):
    real, calls = FeedbackStore.answer, []

    def die_at_the_sixth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with FeedbackStore(tmp_path / "answers.sqlite") as store:
        with monkeypatch.context() as patch:
            patch.setattr(FeedbackStore, "answer", die_at_the_sixth)
            with pytest.raises(KeyboardInterrupt):
                ReplayTeacher(recorded).collect(Request(store, 0, 10, propose=len))
        assert store.counts() == (10, 5, 0)
        ReplayTeacher(recorded).collect(Request(store, 0, 10, propose=len))
        assert store.counts() == (10, 10, 0)
        ReplayTeacher(recorded).collect(Request(store, 1, 12, propose=len))
        said = [query.preference for query in store.queries()]
        with FeedbackStore(recorded) as then:
            assert said == [q.preference for q in then.queries() if q.preference is not None][:12]


def give(file, kind):
    """Marks or ratings of ten clips by two people, in random order."""
    with FeedbackStore(file) as store:
        for clip in torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist():
            teacher = f"person {clip % 2}"
            if kind == "marks":
                store.marks.add(clip + 1, clip, clip + 9, good=clip % 3 > 0, teacher=teacher)
            elif kind == "ratings":
                store.marks.rate(clip + 1, clip / 10, teacher=teacher)


def test_marks_and_ratings_change_what_is_learned(recorded, tmp_path):
    models = {}
    for number, kind in enumerate(["none", "marks", "ratings", "none"]):
        source, out = tmp_path / f"{number}.sqlite", tmp_path / str(number)
        shutil.copy(recorded, source)
        give(source, kind)
        if kind == "ratings":  # as well from an export as from a store
            export_feedback(source, tmp_path / "export")
            source = tmp_path / "export"
        learn(tiny(out, ReplayTeacher(source)), progress=False)
        models.setdefault(kind, []).append((out / "model.safetensors").read_bytes())
    assert models["none"][0] == models["none"][1]
    assert len({models[kind][0] for kind in models}) == 3


def test_marks_and_ratings_are_replayed_once_with_their_clips(recorded, tmp_path):
    source = tmp_path / "recorded.sqlite"
    shutil.copy(recorded, source)
    for kind in ("marks", "ratings"):
        give(source, kind)
    with FeedbackStore(source) as then, FeedbackStore(tmp_path / "answers.sqlite") as now:
        for due in (2, 2, 20):  # the second time as after an interruption
            ReplayTeacher(source).collect(Request(now, 0, due, propose=len))
            # Query 5, of clips 9 and 10, was left out.
            assert len(now.marks.rows()) == len(now.marks.ratings()) == min(2 * due, 8)
        replayed = {mark.clip: mark[2:] for mark in now.marks.rows()}
        for mark in then.marks.rows():
            if mark.clip <= 8:
                assert replayed[mark.clip] == mark[2:]


def test_a_recording_of_another_task_is_refused_before_anything_is_made(recorded, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InvalidInput, match=r"shape \(17,\), got \(3,\)"):
        learn(tiny(out, ReplayTeacher(recorded), task="HalfCheetah"), progress=False)
    with pytest.raises(InvalidInput, match="exist"):
        learn(tiny(out, ReplayTeacher(tmp_path / "none")), progress=False)
    with FeedbackStore(tmp_path / "empty.sqlite"):
        pass
    with pytest.raises(InvalidInput, match="without any"):
        learn(tiny(out, ReplayTeacher(tmp_path / "empty.sqlite")), progress=False)
    assert not out.exists()
