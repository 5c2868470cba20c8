"""Whether the page loses an answer when its server is killed, and how long people wait for it."""

from __future__ import annotations

import asyncio
import json as json_
import multiprocessing
import random
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from active import FeedbackStore, all_pairs
from experiments.labelling_page.desk import Choice
from experiments.labelling_page.gate import Person
from experiments.labelling_page.people import page_beside
from experiments.labelling_page.server import make_app
from experiments.labelling_page.videos import Job, Videos
from experiments.run import versions, write_atomically
from experiments.tasks import find_task, make_env, simulator_state
from rewardmodels import Clips, InvalidInput

CHROMIUM: Final = Path("/usr/bin/chromium")
_CHOICES: Final[tuple[Choice, ...]] = ("left", "right", "same", "unsure", "skip")
_PREFERENCE: Final = {"left": 0.0, "right": 1.0, "same": 0.5, "unsure": None, "skip": None}


def benchmark_page(
    quick: bool = False,
    json: Path | None = None,
    task: str = "Hopper",
    chromium: Path = CHROMIUM,
) -> dict[str, Any]:
    """Measures what the page promises: nothing lost, nothing doubled, nobody kept waiting.

    Args:
        quick: In about a minute, for trends: 200 answers, two kills, ten pairs.
        json: File for the figures; they are printed too.
        task: Whose clips are drawn and shown.
        chromium: The browser.

    Returns:
        Flat keys. Of four people who answer at once while the server is killed: `acknowledged`,
        `acknowledged_lost`, `doubled` (queries with two answers), `left_open` (queries whose
        lease never came back), `kills`. In Chromium: `ready_ms`, from opening the page to its
        first pair in sight, clips drawn (median); `next_pair_ms_p95`, from a key to the next
        pair in sight. `pair_render_seconds`: both clips of a pair drawn and encoded (median).

    Raises:
        InvalidInput: No such folder, or no Chromium or Playwright to drive it.
    """
    if json is not None and not Path(json).absolute().parent.is_dir():
        raise InvalidInput(f"json: expected a file in a directory that exists, got {json}.")
    if find_spec("playwright") is None or not Path(chromium).is_file():
        raise InvalidInput(
            f"chromium: expected a browser and Playwright to drive it, got {chromium}; on Debian "
            "apt-get install chromium, and pip install playwright."
        )
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for name in ("killed", "shown"):
            (run / name).mkdir()
        put_queries(run / "killed", task, 200 if quick else 2000, clips=30 if quick else 70)
        put_queries(run / "shown", task, 10 if quick else 40, clips=20 if quick else 80)
        figures |= answer_through_kills(run / "killed", kills=2 if quick else 10)
        seconds = asyncio.run(pair_seconds(run / "shown", task))
        figures["pair_render_seconds"] = statistics.median(seconds)
        figures |= waits(run / "shown", task, Path(chromium), answers=8 if quick else 30)
    figures["versions"] = versions()
    text = json_.dumps(figures, indent=2)
    print(text)
    if json is not None:
        write_atomically(Path(json), text + "\n")
    return figures


def put_queries(run: Path, task: str, n: int, *, clips: int, length: int = 25) -> list[int]:
    """Puts n queries about clips of an agent that acts at random into a run's store."""
    env = make_env(find_task(task))
    env.action_space.seed(0)
    columns: dict[str, list[Any]] = {"observations": [], "actions": [], "states": []}
    for seed in range(clips):
        env.reset(seed=seed)
        for step in range(length):
            state, action = simulator_state(env.unwrapped), env.action_space.sample()
            seen = env.step(action)[0]
            for name, value in zip(columns, (seen, action, state), strict=True):
                if step == 0:
                    columns[name].append([])
                columns[name][-1].append(value)
    env.close()
    tensors = {
        name: torch.from_numpy(np.asarray(rows, np.float32)) for name, rows in columns.items()
    }
    pairs = all_pairs(clips)
    # Neighbours share no clip, so that every pair of the first is drawn anew.
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(2 * n).view(n, 2) if 2 * n <= clips else pairs[order[:n]]
    with FeedbackStore(run / "answers.sqlite") as store:
        return store.add_queries(Clips(**tensors), chosen, round=0)


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
        connection.request("POST", f"/api/{path}", json_.dumps(body) if body else None, headers)
        reply = connection.getresponse()
        return reply.status, json_.loads(reply.read())
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


async def pair_seconds(run: Path, task: str) -> list[float]:
    """Seconds in which both clips of each query are drawn and encoded, one query at a time."""
    with FeedbackStore(run / "answers.sqlite") as store:
        shown = [store.shown(query.id) for query in store.queries()]
    videos, taken = Videos(run, task), []
    videos.start()
    try:
        # Libraries are loaded and OpenGL is started with the first, which a person doesn't wait
        # for: the first pairs are drawn as the server starts.
        await videos.get(shown[0][0])
        for pair in shown[1:]:
            started = time.perf_counter()
            videos.want(pair)
            await asyncio.gather(*map(videos.get, pair))
            taken.append(time.perf_counter() - started)
    finally:
        await videos.stop()
    return taken


def waits(run: Path, task: str, chromium: Path, *, answers: int) -> dict[str, float]:
    """Milliseconds that a person in front of Chromium waits.

    Args:
        run: The run's directory, its clips drawn.
        task: Of which they are.
        chromium: The browser.
        answers: How many are given, each once the next pair is loaded.

    Returns:
        `ready_ms` and `next_pair_ms_p95`.
    """
    from playwright.sync_api import sync_playwright

    with page_beside(run, task, repeat_every=0) as (link,), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), args=CHROMIUM_FLAGS)
        page = browser.new_page()
        page.goto(link)
        page.fill("#name", "benchmark")
        page.keyboard.press("Enter")
        shown(page, 1, seconds=120)
        ready = []
        for _ in range(5):
            page.reload()
            shown(page, 1)
            ready.append(page.evaluate(f"{_SHOWN}[0].startTime"))
        for given in range(answers):
            until(page, "pairs.length > 1 && pairs[1].videos.every((v) => v.readyState > 2)")
            page.keyboard.press("ArrowLeft")
            shown(page, given + 2)
        marks = "performance.getEntriesByName('answered').map((mark) => mark.startTime)"
        began, ended = page.evaluate(marks), page.evaluate(f"{_SHOWN}.map((m) => m.startTime)")[1:]
        browser.close()
    took = [end - begin for begin, end in zip(began, ended, strict=True)]
    return {
        "ready_ms": statistics.median(ready),
        "next_pair_ms_p95": float(np.quantile(took, 0.95)),
    }


CHROMIUM_FLAGS: Final = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
)  # fmt: skip
_SHOWN: Final = "performance.getEntriesByName('pair-shown')"


def shown(page: Any, n: int, *, seconds: float = 30) -> None:
    """Waits until the page has shown n pairs since it was opened."""
    until(page, f"{_SHOWN}.length >= {n}", seconds=seconds)


def until(page: Any, true: str, *, seconds: float = 30) -> None:
    """Waits until an expression holds; Playwright's own way is refused by the page's policy."""
    limit = time.monotonic() + seconds
    while True:
        with suppress(Exception):  # the page is being opened
            if page.evaluate(true):
                return
        if time.monotonic() > limit:
            raise TimeoutError(f"the page: expected {true} within {seconds} s.")
        time.sleep(0.02)
