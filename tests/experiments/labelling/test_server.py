"""The page's server without a browser: what is taken, and that refusals change nothing."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from active import Counts, FeedbackStore, all_pairs
from experiments.labelling.auth import Person, is_loopback
from experiments.labelling.command import label
from experiments.labelling.server import make_app
from experiments.labelling.videos import Videos, VideoUnavailable, best_clip
from rewardmodels import Clips, UnreadableFile

HERE = "http://127.0.0.1:8765"


class Painted(Videos):
    """Draws instantly, whatever the clip."""

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


@pytest.fixture
def auth(run):
    return make_app(run, Painted(run, ""), host="127.0.0.1", port=8765, people=2, repeat_every=0)


@pytest.fixture
def client(auth) -> Iterator[TestClient]:
    """Nobody yet."""
    with TestClient(auth, base_url=HERE, follow_redirects=False) as client:
        yield client


def sign_in(client: TestClient, auth, name: str = "Ann") -> TestClient:
    client.cookies.clear()
    cookie = auth.set_cookie(Person(f"{name}-1", name)).partition(";")[0]
    client.headers["cookie"] = cookie
    return client


def contents(run: Path) -> str:
    """Everything that people said, and who holds what, save when."""
    db = sqlite3.connect(run / "answers.sqlite")
    tables = ("answers", "marks", "ratings", "withdrawals")
    rows = [db.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    rows.append(db.execute("SELECT query, holder FROM leases").fetchall())
    db.close()
    return repr(rows)


def test_a_link_works_once_and_then_the_cookie_does(client, auth):
    assert client.get("/").status_code == 403
    assert client.post("/api/next").status_code == 403
    first = client.get(f"/?token={auth.tokens[0]}")
    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=Strict"} <= {
        w.strip() for w in first.headers["set-cookie"].split(";")
    }
    assert "Which is better?" in client.get("/").text
    assert client.post("/api/next").json() == {"name": ""}
    assert (
        client.post("/api/answer", json={"query": 1, "choice": "left", "seconds": 1}).status_code
        == 422  # without a name
    )
    named = client.post("/api/name", json={"name": "  Ånn O’B "})
    assert named.json()["name"] == "Ånn O’B"
    assert client.post("/api/next").json()["name"] == "Ånn O’B"
    assert client.get(f"/?token={auth.tokens[1]}").status_code == 303  # in already: not used up
    client.cookies.clear()
    assert client.get(f"/?token={auth.tokens[0]}").status_code == 403
    assert client.get("/?token=guessed").status_code == 403
    assert client.get(f"/?token={auth.tokens[1]}").status_code == 303
    client.cookies.clear()


def test_a_cookie_holds_over_a_new_server_and_none_can_be_made_up(client, auth, run):
    again = make_app(run, Painted(run, ""), host="127.0.0.1", port=8765)
    person = Person("s", "Ann")
    assert again.set_cookie(person) == auth.set_cookie(person)
    assert stat.S_IMODE((run / "label.key").stat().st_mode) == 0o600
    cookie = auth.set_cookie(person).partition(";")[0]
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
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8765", "origin": HERE}, 200),
        ({"host": "localhost:8765", "origin": "http://localhost:8765"}, 200),
        ({"host": "[::1]:8765"}, 200),
        ({"host": "evil.example:8765"}, 403),  # a name that was made to lead here
        ({"host": "127.0.0.1"}, 403),
        ({"host": "127.0.0.1:80"}, 403),
        ({"host": "127.0.0.1:x"}, 403),
        ({"host": "8.8.8.8:8765"}, 403),
        ({"host": "a@127.0.0.1:8765"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "http://localhost:8765"}, 403),
    ],
)
def test_host_and_origin(client, auth, headers, status):
    assert sign_in(client, auth).post("/api/next", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.168.0.7:8765", 200),
        ("[fe80::1]:8765", 200),
        ("127.0.0.1:8765", 200),
        ("evil.example:8765", 403),
        ("192.168.0.7:80", 403),
    ],
)
def test_open_to_the_network_it_still_refuses_foreign_names(run, host, status):
    auth = make_app(run, Painted(run, ""), host="0.0.0.0", port=8765)
    with TestClient(auth, base_url=HERE) as client:
        assert sign_in(client, auth).post("/api/next", headers={"host": host}).status_code == status


def test_answers_marks_ratings_and_undo_reach_the_store(client, auth, run):
    sign_in(client, auth)
    state = client.post("/api/next").json()
    assert [query["id"] for query in state["queries"]] == [1, 2, 3]
    assert [clip["frames"] for clip in state["queries"][0]["clips"]] == [6, 6]
    one, two = (clip["id"] for clip in state["queries"][0]["clips"])
    mark = client.post(
        "/api/mark", json={"query": 1, "side": 1, "first": 2, "last": 5, "good": False}
    )
    rated = client.post("/api/rate", json={"query": 1, "side": 0, "stars": 4})
    state = client.post("/api/next").json()
    assert state["queries"][0]["clips"][1]["marks"] == [
        {"id": mark.json()["id"], "first": 2, "last": 5, "good": False}
    ]
    ids = {}
    for query, choice in enumerate(("left", "right", "same", "unsure", "skip"), 1):
        reply = client.post("/api/answer", json={"query": query, "choice": choice, "seconds": 0.25})
        ids[query] = reply.json()["id"]
    state = reply.json()
    assert (state["answered"], state["declined"], state["budget"]) == (3, 2, 10)
    assert [query["id"] for query in state["queries"]] == [6, 7, 8]
    with FeedbackStore(run / "answers.sqlite") as store:
        said = [(q.teacher, q.preference) for q in store.queries()[:5]]
        assert said == [("Ann", 0.0), ("Ann", 1.0), ("Ann", 0.5), ("Ann", None), ("Ann", None)]
        assert [m[1:] for m in store.marks.rows()] == [(two, 2, 5, False, "Ann")]
        assert [r[1:] for r in store.marks.ratings()] == [(one, 0.75, "Ann")]
        undone = client.post("/api/undo", json={"kind": "answer", "id": ids[2]}).json()
        assert undone["query"] == 2
        assert undone["queries"][0]["id"] == 2
        client.post("/api/undo", json={"kind": "mark", "id": mark.json()["id"]})
        client.post("/api/undo", json={"kind": "rating", "id": rated.json()["id"]})
        assert store.counts() == Counts(10, 2, 2)
        assert store.marks.rows() == store.marks.ratings() == []


ANSWER = {"query": 1, "choice": "left", "seconds": 1.0}
MARK = {"query": 1, "side": 0, "first": 0, "last": 1, "good": True}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("answer", {**ANSWER, "query": 99}, 404),
        ("answer", {**ANSWER, "query": 5}, 409),  # nobody leased it
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
        ("undo", {"kind": "answer", "id": 1}, 404),
        ("undo", {"kind": "clips", "id": 1}, 422),
        ("name", {"name": " "}, 422),
        ("name", {"name": "x" * 65}, 422),
        ("name", {"name": "a\nb"}, 422),
        ("nowhere", {}, 404),
    ],
)  # fmt: skip
def test_bad_requests_get_a_reason_and_change_nothing(client, auth, run, path, body, status):
    sign_in(client, auth)
    client.post("/api/next")
    before = contents(run)
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    reply = client.post(
        f"/api/{path}", content=content, headers={"content-type": "application/json"}
    )
    assert reply.status_code == status
    assert reply.json()["reason"]
    assert contents(run) == before


def test_an_endless_body_is_cut_off(client, auth, run):
    sign_in(client, auth)
    reply = client.post(
        "/api/answer", content=(b" " * 1000 for _ in range(100))
    )  # of unsaid length
    assert reply.status_code == 413


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
def test_only_clips_and_the_pages_own_files_are_served(client, auth, path, status):
    reply = sign_in(client, auth).get(path)
    assert reply.status_code == status
    assert "default-src 'self'" in reply.headers["content-security-policy"]


def test_videos_are_served_in_ranges(client, auth):
    reply = sign_in(client, auth).get("/video/1", headers={"range": "bytes=2-6"})
    assert (reply.status_code, reply.content) == (206, b"video")


def test_double_submits_and_expired_leases(client, auth, run):
    ann = sign_in(client, auth)
    ann.post("/api/next")
    assert ann.post("/api/answer", json=ANSWER).status_code == 200
    before = contents(run)
    again = ann.post("/api/answer", json=ANSWER)
    assert again.status_code == 409
    assert "has answered" in again.json()["reason"]
    assert contents(run) == before
    with sqlite3.connect(run / "answers.sqlite") as db:
        db.execute("UPDATE leases SET expires = 0")
    db.close()
    late = ann.post("/api/answer", json={**ANSWER, "query": 2})
    assert late.status_code == 409
    assert "run out" in late.json()["reason"]
    assert contents(run) == before


def test_what_one_leaves_another_gets_and_nobody_undoes_others(client, auth, run):
    ann = sign_in(client, auth)
    ann.post("/api/next")
    said = ann.post("/api/answer", json=ANSWER).json()["id"]
    bob = sign_in(client, auth, "Bob")
    assert [query["id"] for query in bob.post("/api/next").json()["queries"]] == [5, 6, 7]
    assert bob.post("/api/undo", json={"kind": "answer", "id": said}).status_code == 404
    bob.post("/api/leave")
    ann = sign_in(client, auth)
    for query in (2, 3, 4):
        state = ann.post("/api/answer", json={**ANSWER, "query": query}).json()
    assert [query["id"] for query in state["queries"]] == [5, 6, 7]


def test_queries_are_repeated_and_agreement_is_counted(run):
    auth = make_app(run, Painted(run, ""), host="127.0.0.1", port=8765, repeat_every=3)
    with TestClient(auth, base_url=HERE) as client:
        sign_in(client, auth)
        state = client.post("/api/next").json()
        asked = []
        while state["queries"]:
            query = state["queries"][0]["id"]
            asked.append(query)
            # Always the left one: of a pair turned round that is the other clip.
            said = {"query": query, "choice": "left", "seconds": 1}
            state = client.post("/api/answer", json=said).json()
    again = [query for query in asked if query > 10]
    assert len(asked) == 10 + len(again)
    assert again
    assert asked.index(again[0]) < asked.index(10)  # mixed in, not put at the end
    assert state["agreement"] == {"same": 0, "repeated": len(again)}
    assert state["answered"] == 10


def test_a_damaged_store_is_refused_before_anything_is_served(run):
    file = run / "answers.sqlite"
    file.write_bytes(file.read_bytes()[:5000])
    before = file.read_bytes()
    with pytest.raises(UnreadableFile, match="recover"):
        label(run, task="Hopper", port=0)
    assert file.read_bytes() == before


def test_label_refuses_what_it_cannot_serve(run, tmp_path):
    for settings, words in (
        ({"run": tmp_path / "nothing"}, "run: .*learn --teacher human"),
        ({"run": run}, "task: .*config.yaml"),
        ({"run": run, "task": "Hoper"}, "Hopper"),
        ({"run": run, "task": "Hopper", "people": 0}, "people: .*0"),
        ({"run": run, "task": "Hopper", "host": "203.0.113.9"}, "host, port"),
        ({"run": run, "task": "Hopper", "port": 99999}, "port: .*99999"),
    ):
        with pytest.raises(ValueError, match=words):
            label(**settings)
    assert is_loopback("127.0.0.2")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")


def test_the_curve_is_the_runs_and_rows_without_a_return_are_left_out(client, auth, run):
    (run / "metrics.csv").write_text(
        "step,comparisons,task_return\n10,4,\n20,8,1.5\n30,9,nan\n40,9,2\n"
    )
    reply = sign_in(client, auth).get("/api/learned")
    assert reply.json() == {"curve": [[8, 20, 1.5], [9, 40, 2]]}
    assert best_clip(run) is None


@pytest.mark.slow
def test_a_process_that_cannot_draw_says_why(run):
    async def ask() -> None:
        videos = Videos(run, "Hopper")
        videos.start()
        try:
            # These clips hold neither states nor pictures.
            with pytest.raises(VideoUnavailable, match="simulator states or images"):
                await videos.get(1)
            with pytest.raises(VideoUnavailable, match=r"expected clips in .*, got 77"):
                await videos.get(77)
            assert await videos.get("best") is None
            assert videos._process is not None
            videos._process.kill()
            with pytest.raises(VideoUnavailable, match="has ended"):
                await videos.get(2)
            with pytest.raises(VideoUnavailable, match="simulator states"):
                await videos.get(2)  # by a new one
        finally:
            await videos.stop()

    asyncio.run(ask())
