"""People who answer at once while the page's server is killed: what is lost, what is doubled."""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

from active import FeedbackStore
from experiments.labelling.desk import Choice
from experiments.labelling.gate import Person
from experiments.labelling.server import make_app
from experiments.labelling.videos import Job, Videos

_CHOICES: Final[tuple[Choice, ...]] = ("left", "right", "same", "unsure", "skip")
_PREFERENCE: Final = {"left": 0.0, "right": 1.0, "same": 0.5, "unsure": None, "skip": None}


class _NoVideos(Videos):
    """Draws nothing: what is measured then is the answers alone."""

    def start(self) -> None:
        pass

    def want(self, jobs: Sequence[Job]) -> None:
        pass


@dataclass
class _Somebody:
    """One of several who answer at once, and what they were told is saved."""

    name: str
    acknowledged: dict[int, tuple[int, Choice]] = field(default_factory=dict)  # by query
    wrong: list[str] = field(default_factory=list)


def answer_through_kills(
    run: Path, *, kills: int, people: int = 4, lease_seconds: float = 3.0, seed: int = 0
) -> dict[str, int]:
    """Has people answer all of a run's queries at once while its server is killed, again and again.

    Kills are spread over the answers. After each, one person comes back as if from another
    browser: what they held has to return to the queue by itself.

    Args:
        run: The run's directory, with open queries.
        kills: How many SIGKILLs.
        people: How many answer.
        lease_seconds: How long queries are held.
        seed: Of what they answer, and of when the server is killed.

    Returns:
        As of `benchmark_page`.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Only for its key: whoever has a cookie signed with it may come in.
    gate = make_app(run, _NoVideos(run, ""), host="127.0.0.1", port=port)
    with FeedbackStore(run / "answers.sqlite") as store:
        total = len(store.queries(unanswered=True))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    draw = random.Random(seed)
    everybody = [_Somebody(f"person {i}") for i in range(people)]
    comes_back = [threading.Event() for _ in everybody]
    with _server(context, run, port, lease_seconds) as started:
        threads = [
            threading.Thread(
                target=_answer_all, args=(gate, somebody, port, back, draw.random()), daemon=True
            )
            for somebody, back in zip(everybody, comes_back, strict=True)
        ]
        for thread in threads:
            thread.start()
        for kill in range(kills):
            due = total * (kill + draw.random()) / kills
            while sum(len(one.acknowledged) for one in everybody) < due:
                if not any(thread.is_alive() for thread in threads):
                    break
                time.sleep(0.002)
            started[-1].kill()
            started[-1].join()
            started.append(_start(context, run, port, lease_seconds))
            comes_back[kill % people].set()
        for thread in threads:
            thread.join()
    if wrong := [words for one in everybody for words in one.wrong]:
        raise RuntimeError(f"the server refused what it should have taken: {wrong[0]}")
    return {"kills": kills} | _compare(run, everybody)


def _compare(run: Path, everybody: Sequence[_Somebody]) -> dict[str, int]:
    """What the store holds against what people were told."""
    with FeedbackStore(run / "answers.sqlite") as store:
        rows = store._db.execute("SELECT id, query, teacher, preference, declined FROM answers")
        held = {row[0]: row[1:] for row in rows}
        still_open = len(store.queries(unanswered=True))
    lost = 0
    for one in everybody:
        for query, (id, choice) in one.acknowledged.items():
            declined = choice if choice in ("unsure", "skip") else None
            lost += held.get(id) != (query, one.name, _PREFERENCE[choice], declined)
    twice = Counter(row[0] for row in held.values())
    return {
        "acknowledged": sum(len(one.acknowledged) for one in everybody),
        "acknowledged_lost": lost,
        "doubled": sum(n > 1 for n in twice.values()),
        "left_open": still_open,
    }


def _answer_all(
    gate: Any, somebody: _Somebody, port: int, comes_back: threading.Event, seed: float
) -> None:
    draw = random.Random(seed)
    browser = 0
    while True:
        if comes_back.is_set():  # in a new browser: the old one's leases are nobody's now
            comes_back.clear()
            browser += 1
        session = f"{somebody.name}-{browser}".replace(" ", "-")
        cookie = gate.signed(Person(session, somebody.name)).partition(";")[0]
        try:
            status, state = _post(port, cookie, "next", None)
            if status != 200:
                somebody.wrong.append(state["reason"])
                return
            if not state["queries"]:
                # Others may hold the rest, and go.
                if state["answered"] + state["declined"] >= state["budget"]:
                    return
                time.sleep(0.1)
                continue
            query, choice = state["queries"][0]["id"], draw.choice(_CHOICES)
            said = {"query": query, "choice": choice, "seconds": draw.random()}
            status, state = _post(port, cookie, "answer", said)
            if status == 200:
                somebody.acknowledged[query] = (state["id"], choice)
            elif status != 409:
                somebody.wrong.append(state["reason"])
                return
        except (OSError, HTTPException, ValueError):
            time.sleep(0.05)  # killed just now


def _post(port: int, cookie: str, path: str, body: Any) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"cookie": cookie, "content-type": "application/json"}
    try:
        connection.request("POST", f"/api/{path}", json.dumps(body) if body else None, headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def _serve(run: Path, port: int, lease_seconds: float) -> None:
    import uvicorn

    app = make_app(
        run, _NoVideos(run, ""), host="127.0.0.1", port=port, repeat_every=0,
        lease_seconds=lease_seconds,
    )  # fmt: skip
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def _start(context: Any, run: Path, port: int, lease_seconds: float) -> Any:
    process = context.Process(target=_serve, args=(run, port, lease_seconds), daemon=True)
    process.start()
    return process


@contextmanager
def _server(context: Any, run: Path, port: int, lease_seconds: float) -> Any:
    started = [_start(context, run, port, lease_seconds)]
    try:
        yield started
    finally:
        started[-1].kill()
        started[-1].join()
