"""The labelling page's server without a browser: refused requests change nothing."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from starlette.testclient import TestClient

from active import Counts, FeedbackStore, HumanTeacher, all_pairs, teachers
from experiments.labelling import label
from experiments.labelling.auth import Authentication, Person, is_loopback
from experiments.labelling.server import make_app
from experiments.labelling.videos import Videos, VideoUnavailable
from experiments.training.learn import learn
from rewardmodels import Clips, InvalidInput, UnreadableFile

from ..studying import tiny

HERE = "http://127.0.0.1:8765"
ANSWER = {"query": 1, "choice": "left", "seconds": 1.0}
MARK = {"query": 1, "side": 0, "first": 0, "last": 1, "good": True}


class InstantVideos(Videos):
    """The same file for every clip, without a drawing process."""

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def prefetch(self, jobs) -> None:
        pass

    async def get(self, job):
        if job == "best":
            return None
        (self.folder / f"{job}.mp4").write_bytes(b"a video of some length")
        return self.folder / f"{job}.mp4"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    clips = Clips(torch.randn(5, 6, 2), torch.randn(5, 6, 1))
    with FeedbackStore(tmp_path / "answers.sqlite") as store:
        store.add_queries(clips, all_pairs(5), round=0)
    return tmp_path


def app_of(run: Path, host: str = "127.0.0.1", **settings: int) -> Authentication:
    return make_app(run, InstantVideos(run, ""), host=host, port=8765, **settings)


@pytest.fixture
def app(run):
    return app_of(run, people=2, repeat_every=0)


@pytest.fixture
def client(app) -> Iterator[TestClient]:
    """A browser without a cookie."""
    with TestClient(app, base_url=HERE, follow_redirects=False) as client:
        yield client


@pytest.fixture
def ann(client, app) -> TestClient:
    return sign_in(client, app)


def sign_in(
    client: TestClient, app: Authentication, name: str = "Ann", session: str = ""
) -> TestClient:
    client.cookies.clear()
    person = Person(session or f"{name}-1", name)
    client.headers["cookie"] = app.set_cookie(person).partition(";")[0]
    return client


def contents(run: Path) -> str:
    """All feedback and who holds which query, without times."""
    db = sqlite3.connect(run / "answers.sqlite")
    tables = ("answers", "marks", "ratings", "withdrawals")
    rows = [db.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    rows.append(db.execute("SELECT query, holder FROM leases").fetchall())
    db.close()
    return repr(rows)


def receipt_of(reply: dict[str, object]) -> dict[str, object]:
    """Body of the request that takes some feedback back."""
    return {name: reply[name] for name in ("kind", "id", "receipt")}


def query_ids(reply) -> list[int]:
    return [query["id"] for query in reply.json()["queries"]]


def enter(client: TestClient, token: str):
    return client.post("/", data={"token": token})


def test_a_token_is_replaced_by_a_cookie_once_and_previews_leave_it(client, app):
    assert client.get("/").status_code == 403
    assert client.post("/api/next").status_code == 403
    for _ in range(2):
        preview = client.get(f"/?token={app.tokens[0]}")
        assert preview.status_code == 200
        assert "set-cookie" not in preview.headers
        assert f'value="{app.tokens[0]}"' in preview.text
    used, other = app.tokens
    first = enter(client, used)
    assert (first.status_code, first.headers["location"]) == (303, "/")
    flags = {flag.strip() for flag in first.headers["set-cookie"].split(";")}
    assert {"HttpOnly", "SameSite=Strict"} <= flags
    assert "<title>" in client.get("/").text
    assert client.post("/api/next").json()["name"] == ""
    assert client.post("/api/answer", json=ANSWER).status_code == 422  # without a name
    assert client.post("/api/name", json={"name": "  Ånn O’B "}).json()["name"] == "Ånn O’B"
    assert client.post("/api/next").json()["name"] == "Ånn O’B"
    assert client.get(f"/?token={other}").status_code == 303  # has a cookie: not used up
    assert enter(client, other).status_code == 303
    client.cookies.clear()
    for token, status in ((used, 403), ("guessed", 403), (other, 303), (app.add_token(), 303)):
        client.cookies.clear()
        assert enter(client, token).status_code == status
    client.cookies.clear()
    assert client.get(f"/?token={used}").status_code == 403


def test_this_machine_may_use_a_token_again(app):
    with TestClient(app, base_url=HERE, follow_redirects=False, client=("127.0.0.1", 9)) as client:
        cookies = set()
        for _ in range(2):
            client.cookies.clear()
            cookies.add(enter(client, app.tokens[0]).headers["set-cookie"])
    assert len(cookies) == 2  # a session each


@pytest.mark.parametrize("path", ["/", "/?token=x", "/?token=%22%3E%3Cscript%3E"])
def test_a_stranger_gets_a_page_with_its_style_and_nothing_else(client, path):
    reply = client.get(path)
    assert reply.status_code == 403
    assert reply.headers["content-type"].startswith("text/html")
    assert "<script>" not in reply.text
    assert client.get(path, headers={"host": "evil.example"}).status_code == 403
    found = [client.get(f"/{name}").status_code for name in ("page.css", "enter.js", "page.js")]
    assert found == [200, 200, 403]


def test_a_cookie_survives_a_restart_and_cannot_be_forged(client, app, run):
    person = Person("s", "Ann")
    cookie = app.set_cookie(person).partition(";")[0]
    assert app_of(run).set_cookie(person) == app.set_cookie(person)
    assert stat.S_IMODE((run / "label.key").stat().st_mode) == 0o600
    for forged in (
        cookie[:-1] + ("0" if cookie[-1] != "0" else "1"),
        "label-8765=s.QW5u.",
        "label-8765=x",
        "label-8765=é.é.é",
    ):
        reply = client.post("/api/next", headers={"cookie": forged.encode()})
        assert reply.status_code == 403
    assert client.post("/api/next", headers={"cookie": cookie}).status_code == 200


@pytest.mark.parametrize(
    ("bound", "host", "origin", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8765", HERE, 200),
        ("127.0.0.1", "localhost:8765", "http://localhost:8765", 200),
        ("127.0.0.1", "[::1]:8765", None, 200),
        ("127.0.0.1", "evil.example:8765", None, 403),  # a name that was made to resolve to us
        ("127.0.0.1", "127.0.0.1", None, 403),
        ("127.0.0.1", "127.0.0.1:80", None, 403),
        ("127.0.0.1", "127.0.0.1:x", None, 403),
        ("127.0.0.1", "8.8.8.8:8765", None, 403),
        ("127.0.0.1", "a@127.0.0.1:8765", None, 403),
        ("127.0.0.1", "", None, 403),
        ("127.0.0.1", "127.0.0.1:8765", "http://evil.example", 403),
        ("127.0.0.1", "127.0.0.1:8765", "null", 403),
        ("127.0.0.1", "127.0.0.1:8765", "http://127.0.0.1:9999", 403),
        ("127.0.0.1", "127.0.0.1:8765", "http://localhost:8765", 403),
        ("0.0.0.0", "192.168.0.7:8765", None, 200),
        ("0.0.0.0", "[fe80::1]:8765", None, 200),
        ("0.0.0.0", "127.0.0.1:8765", None, 200),
        ("0.0.0.0", "evil.example:8765", None, 403),
        ("0.0.0.0", "192.168.0.7:80", None, 403),
    ],
)
def test_host_and_origin(run, bound, host, origin, status):
    app = app_of(run, bound)
    headers = {"host": host} | ({"origin": origin} if origin else {})
    with TestClient(app, base_url=HERE) as client:
        assert sign_in(client, app).post("/api/next", headers=headers).status_code == status


def test_answers_marks_ratings_and_undo_reach_the_store(ann, run):
    state = ann.post("/api/next").json()
    assert [query["id"] for query in state["queries"]] == [1, 2, 3]
    assert [clip["frames"] for clip in state["queries"][0]["clips"]] == [6, 6]
    one, two = (clip["id"] for clip in state["queries"][0]["clips"])
    shown = {"first": 2, "last": 5, "good": False}
    marked = ann.post("/api/mark", json={"query": 1, "side": 1, **shown}).json()
    rated = ann.post("/api/rate", json={"query": 1, "side": 0, "stars": 4}).json()
    mark = marked["id"]
    state = ann.post("/api/next").json()
    assert state["queries"][0]["clips"][1]["marks"] == [{"id": mark, **shown}]
    given = {}
    for query, choice in enumerate(("left", "right", "same", "unsure", "skip"), 1):
        reply = ann.post("/api/answer", json={"query": query, "choice": choice, "seconds": 0.25})
        given[query] = receipt_of(reply.json())
    state = reply.json()
    assert (state["answered"], state["declined"], state["budget"]) == (3, 2, 10)
    assert query_ids(reply) == [6, 7, 8]
    with FeedbackStore(run / "answers.sqlite") as store:
        stored = [(query.teacher, query.preference) for query in store.queries()[:5]]
        assert stored == [("Ann", value) for value in (0.0, 1.0, 0.5, None, None)]
        assert [m[1:] for m in store.marks.rows()] == [(two, 2, 5, False, "Ann")]
        assert [r[1:] for r in store.marks.ratings()] == [(one, 0.75, "Ann")]
        undone = ann.post("/api/undo", json=given[2])
        assert undone.json()["query"] == query_ids(undone)[0] == 2
        ann.post("/api/undo", json=receipt_of(marked))
        ann.post("/api/undo", json=receipt_of(rated))
        assert store.counts() == Counts(10, 2, 2)
        assert store.marks.rows() == store.marks.ratings() == []


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("answer", {**ANSWER, "query": 99}, 404),
        ("answer", {**ANSWER, "query": 5}, 409),  # leased to nobody
        ("answer", {**ANSWER, "query": 0}, 422),
        ("answer", {**ANSWER, "query": 2**70}, 422),
        ("answer", {**ANSWER, "query": "1"}, 422),
        ("answer", {**ANSWER, "query": True}, 422),
        ("answer", {**ANSWER, "query": "1; DROP TABLE answers"}, 422),
        ("answer", {**ANSWER, "choice": "both"}, 422),
        ("answer", {**ANSWER, "seconds": -1}, 422),
        ("answer", {**ANSWER, "preference": 0.3}, 422),
        ("answer", {"query": 1}, 422),
        ("answer", [], 422),
        ("answer", "{", 422),
        ("answer", '{"query": 1, "choice": "left", "seconds": NaN}', 422),
        ("answer", b"\xff\xfe", 422),
        ("answer", " " * 5000, 413),
        ("mark", {**MARK, "last": 6}, 422),  # of six frames
        ("mark", {**MARK, "first": 2}, 422),
        ("mark", {**MARK, "first": -1}, 422),
        ("mark", {**MARK, "side": 2}, 422),
        ("mark", {**MARK, "query": 5}, 409),
        ("mark", {**MARK, "query": 99}, 404),
        ("rate", {"query": 1, "side": 0, "stars": 6}, 422),
        ("rate", {"query": 5, "side": 0, "stars": 3}, 409),
        ("undo", {"kind": "answer", "id": 1, "receipt": "é"}, 404),
        ("undo", {"kind": "answer", "id": 1}, 422),
        ("undo", {"kind": "clips", "id": 1, "receipt": ""}, 422),
        ("name", {"name": " "}, 422),
        ("name", {"name": "x" * 65}, 422),
        *(("name", {"name": f"a{c}b"}, 422) for c in "\0\n\x1b\x85\u2028"),
        ("nowhere", {}, 404),
    ],
)
def test_bad_requests_get_a_reason_and_change_nothing(ann, run, path, body, status):
    ann.post("/api/next")
    before = contents(run)
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    reply = ann.post(f"/api/{path}", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert reply.json()["reason"]
    assert contents(run) == before


def test_a_body_of_undeclared_length_is_cut_off(ann):
    assert ann.post("/api/answer", content=(b" " * 1000 for _ in range(100))).status_code == 413


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/video/1", 200), ("/video/99", 404), ("/video/0", 404), ("/video/-1", 404),
        ("/video/999999999999999999999999", 404), ("/video/x", 422), ("/video/best", 404),
        ("/video/..%2Fanswers.sqlite", 404), ("/video/../answers.sqlite", 404),
        ("/page.js", 200), ("/page.css", 200), ("/auth.py", 404), ("/..%2Fserver.py", 404),
        ("/static/page.js", 404), ("/docs", 404), ("/openapi.json", 404),
    ],
)  # fmt: skip
def test_only_clips_and_the_files_of_the_page_are_served(ann, path, status):
    reply = ann.get(path)
    assert reply.status_code == status
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    if path == "/video/1":
        part = ann.get(path, headers={"range": "bytes=2-6"})
        assert (part.status_code, part.content) == (206, b"video")


def test_repeated_requests_and_expired_leases_change_nothing(ann, run):
    ann.post("/api/next")
    assert ann.post("/api/answer", json=ANSWER).status_code == 200
    before = contents(run)
    assert ann.post("/api/answer", json=ANSWER).status_code == 409
    with sqlite3.connect(run / "answers.sqlite") as db:
        db.execute("UPDATE leases SET expires = 0")
    db.close()
    assert ann.post("/api/answer", json={**ANSWER, "query": 2}).status_code == 409
    assert contents(run) == before


def test_leaving_returns_queries(ann, app):
    ann.post("/api/next")
    ann.post("/api/answer", json=ANSWER)
    bob = sign_in(ann, app, "Bob")
    assert query_ids(bob.post("/api/next")) == [5, 6, 7]
    bob.post("/api/leave")
    ann = sign_in(bob, app)
    replies = [ann.post("/api/answer", json={**ANSWER, "query": query}) for query in (2, 3, 4)]
    assert query_ids(replies[-1]) == [5, 6, 7]


def test_only_the_session_that_gave_feedback_takes_it_back(ann, app, run):
    ann.post("/api/next")
    given = receipt_of(ann.post("/api/answer", json=ANSWER).json())
    other = sign_in(ann, app, session="another", name="Ann")
    forged = app.receipt(Person("another", "Ann"), "mark", given["id"])
    before = contents(run)
    for receipt in (given["receipt"], forged):
        assert other.post("/api/undo", json={**given, "receipt": receipt}).status_code == 404
    assert contents(run) == before
    ann = sign_in(other, app_of(run))  # a restart doesn't matter
    assert ann.post("/api/undo", json=given).json()["query"] == 1


def test_queries_are_repeated_and_agreement_is_counted(run):
    app = app_of(run, repeat_every=3)
    with TestClient(app, base_url=HERE) as client:
        state = sign_in(client, app).post("/api/next").json()
        asked = []
        while state["queries"]:
            asked.append(state["queries"][0]["id"])
            # Always the left clip, which in a repeat is the other one.
            state = client.post("/api/answer", json={**ANSWER, "query": asked[-1]}).json()
    repeats = [query for query in asked if query > 10]
    assert repeats
    assert len(asked) == 10 + len(repeats)
    assert asked.index(repeats[0]) < asked.index(10)  # mixed in, not put at the end
    assert state["agreement"] == {"same": 0, "repeated": len(repeats)}
    assert state["answered"] == 10


def test_a_damaged_store_is_refused_before_anything_is_served(run):
    file = run / "answers.sqlite"
    file.write_bytes(file.read_bytes()[:5000])
    before = file.read_bytes()
    with pytest.raises(UnreadableFile):
        label(run, task="Hopper", port=0)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"run": Path("nowhere")}, "run: "),
        ({}, "task: "),
        ({"task": "Hoper"}, "Hopper"),
        ({"task": "Hopper", "people": 0}, "people: "),
        ({"task": "Hopper", "repeat_every": -1}, "repeat_every: "),
        ({"task": "Hopper", "host": "203.0.113.9"}, "host, port: "),
        ({"task": "Hopper", "port": 99999}, "port: "),
    ],
)
def test_label_refuses_what_it_cannot_serve(run, settings, argument):
    with pytest.raises(ValueError, match=argument):
        label(**{"run": run, **settings})


@pytest.fixture
def serve(monkeypatch):
    """Let `label` print, and call `serve.during` with its application in place of serving."""
    uvicorn = pytest.importorskip("uvicorn")

    def run(server, sockets) -> None:
        serve.during(server.config.app)

    serve = SimpleNamespace(during=lambda app: None)
    monkeypatch.setattr(uvicorn.Server, "run", run)
    return serve


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_printed_links_work_where_the_server_listens(run, serve, capsys, host):
    def open_link(app: Authentication) -> None:
        printed = capsys.readouterr()
        link = printed.out.split()[0]
        assert "0.0.0.0" not in link
        assert "[::]" not in link
        assert ("encrypted" in printed.err) == (host != "127.0.0.1")
        with TestClient(app, follow_redirects=False) as client:
            assert client.get(link).status_code == 200

    serve.during = open_link
    try:
        label(run, task="Hopper", host=host, port=0)
    except InvalidInput:
        if host != "::":
            raise
        pytest.skip("no IPv6 here")


def test_enter_in_a_terminal_prints_one_more_link(run, serve, capsys, monkeypatch):
    terminal, end = pytest.importorskip("pty").openpty()

    def press_enter(app: Authentication) -> None:
        os.write(terminal, b"\n")
        printed = capsys.readouterr().out
        for _ in range(500):
            if printed.count("token=") == 2:
                break
            time.sleep(0.01)
            printed += capsys.readouterr().out
        assert [line.partition("token=")[2] for line in printed.split()] == app.tokens
        assert len(app.tokens) == 2

    serve.during = press_enter
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with os.fdopen(end) as stdin, os.fdopen(terminal, "wb"):
        monkeypatch.setattr(sys, "stdin", stdin)
        label(run, task="Hopper", port=0)


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.2", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.0.7", "example.com")))


def progress(client: TestClient) -> tuple[str, list[int]]:
    reply = client.post("/api/next")
    return reply.json()["run"]["state"], query_ids(reply)


def test_the_page_knows_whether_the_run_goes_on(ann, run):
    assert progress(ann) == ("unknown", [1, 2, 3])
    lock = FileLock(run / ".lock")
    with lock:
        assert progress(ann) == ("waiting", [1, 2, 3])
        with FeedbackStore(run / "answers.sqlite") as store:
            for query in range(2, 11):
                store.answer(query, 1.0, "bob")
            assert progress(ann) == ("waiting", [1])
            store.answer(1, 1.0, "bob")
        assert progress(ann) == ("running", [])
    assert progress(ann) == ("paused", [])
    with lock:  # looking didn't take it
        assert progress(ann)[0] == "running"


def test_a_run_that_is_over_offers_no_questions_and_keeps_the_answer_being_given(ann, run):
    ann.post("/api/next")
    (run / "result.json").write_text("{}")
    reply = ann.post("/api/answer", json=ANSWER)  # was on the screen
    assert reply.status_code == 200
    assert "1 comparison" in reply.json()["run"]["text"]
    assert progress(ann) == ("over", [])
    assert ann.post("/api/undo", json=receipt_of(reply.json())).status_code == 200


def test_without_pictures_the_page_says_so_before_it_asks(run, monkeypatch, capsys):
    async def get(self, job):
        raise VideoUnavailable("no OpenGL library.")

    monkeypatch.setattr(InstantVideos, "get", get)
    app = app_of(run)
    with TestClient(app, base_url=HERE) as client:
        state = sign_in(client, app).post("/api/next").json()
        assert state["run"]["state"] == "unshown"
        assert "no OpenGL library" in state["run"]["text"]
        assert "queries" not in state
        assert "no OpenGL library" in capsys.readouterr().err
        (run / "result.json").write_text("{}")
        assert progress(client) == ("over", [])


def test_nothing_is_accepted_for_a_store_that_is_gone(ann, run):
    ann.post("/api/next")
    given = receipt_of(ann.post("/api/answer", json=ANSWER).json())
    (run / "answers.sqlite").rename(run / "moved.sqlite")
    for replaced in (False, True):
        if replaced:
            FeedbackStore(run / "answers.sqlite").close()
        assert ann.post("/api/next").json()["run"]["state"] == "gone"
        for path, body in (
            ("answer", {**ANSWER, "query": 2}),
            ("mark", {**MARK, "query": 2}),
            ("rate", {"query": 2, "side": 0, "stars": 3}),
            ("undo", given),
        ):
            assert ann.post(f"/api/{path}", json=body).status_code == 410
    with FeedbackStore(run / "answers.sqlite") as store:
        assert store.counts() == Counts(0, 0, 0)


def test_the_learning_curve_skips_rows_without_a_return(ann, run):
    rows = "step,comparisons,task_return\n10,4,\n20,8,1.5\n30,9,nan\n40,9,2\n"
    (run / "metrics.csv").write_text(rows)
    assert ann.get("/api/learned").json() == {"curve": [[8, 20, 1.5], [9, 40, 2]]}


def learned_from_page(out: Path, given: str) -> bytes:
    """Model of a run whose eight questions are answered on the page, where more is given once."""

    def sit() -> None:
        while not (out / "config.yaml").exists():
            time.sleep(0.01)
        app, left = app_of(out, repeat_every=0), 8
        with TestClient(app, base_url=HERE) as client:
            enter(client, app.tokens[0])
            client.post("/api/name", json={"name": "Ann"})
            while left:
                for id in query_ids(client.post("/api/next")):
                    on = {"query": id, "side": 0}
                    if given == "mark" and left == 8:
                        client.post("/api/mark", json={**on, "first": 3, "last": 9, "good": True})
                    if given == "ratings" and left > 6:
                        client.post("/api/rate", json={**on, "stars": left - 5})
                    first = left == 8 and given == "comparison"
                    choice = "left" if (id % 2 == 0) != first else "right"
                    client.post("/api/answer", json={"query": id, "choice": choice, "seconds": 1})
                    left -= 1
                    if not left:
                        return

    person = threading.Thread(target=sit)
    person.start()
    learn(tiny(out, teacher=HumanTeacher(), rounds=1, steps=2048, comparisons=8), progress=False)
    person.join()
    return (out / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("_short_updates", "_no_report")
def test_all_that_is_given_on_the_page_changes_what_is_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "_POLL_SECONDS", 0.02)
    kinds = ("none", "again", "comparison", "mark", "ratings")
    none, again, *others = (learned_from_page(tmp_path / kind, kind) for kind in kinds)
    assert none == again
    assert len({none, *others}) == 4
