"""Durability and response times of the labelling page."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from json import dumps, loads
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from active import FeedbackStore, all_pairs
from experiments.analysis.page import check_json, publish
from experiments.envs.rollout import rollout
from experiments.envs.tasks import find_task
from experiments.envs.vector import make_vec_env
from experiments.labelling.auth import Person
from experiments.labelling.questions import PREFERENCES, Choice
from experiments.labelling.server import make_app
from experiments.labelling.videos import Job, Videos
from experiments.training.config import LearnConfig
from experiments.training.learn import learn
from experiments.training.run_directory import RunDirectory
from rewardmodels import InvalidInput

CHROMIUM: Final = Path("/usr/bin/chromium")
CHROMIUM_FLAGS: Final = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
)  # fmt: skip
_SHOWN: Final = "performance.getEntriesByName('pair-shown')"


def benchmark_page(
    quick: bool = False, json: Path | None = None, task: str = "Hopper", chromium: Path = CHROMIUM
) -> dict[str, Any]:
    """Measure what the labelling page loses when its server is killed, and how fast it responds.

    Args:
        quick: Take about two minutes, for trends: 200 answers, two kills, ten pairs.
        json: File for the key numbers, which are printed too.
        task: Task of the clips.
        chromium: The browser.

    Returns:
        Flat keys. Of four people who answer while the server is killed: `acknowledged`,
        `acknowledged_lost`, `doubled` (queries with two answers), `left_open` (queries whose
        lease never expired), `kills`. In Chromium: `ready_ms`, from opening the page to its first
        visible pair, with clips drawn before (median); `next_pair_ms_p95`, from a key to the next
        visible pair. `pair_render_seconds`: to draw and encode both clips of a pair (median).
        `resume_identical`: of `resumed` runs of `learn` that were killed at a random moment and
        resumed, the share whose answers and result equal an unkilled run's.

    Raises:
        InvalidInput: The file's folder, Chromium or Playwright is missing.
    """
    check_json(json)
    program = Path(chromium).is_file() and os.access(chromium, os.X_OK)
    if find_spec("playwright") is None or not program:
        raise InvalidInput(
            f"chromium: expected Chromium, and Playwright to drive it, got {chromium}; install "
            "them with apt-get install chromium (Debian) and pip install playwright."
        )
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        killed, shown = Path(folder) / "killed", Path(folder) / "shown"
        killed.mkdir()
        shown.mkdir()
        put_queries(killed, task, 200 if quick else 2000, clips=30 if quick else 70)
        put_queries(shown, task, 10 if quick else 40, clips=20 if quick else 80)
        numbers |= answer_during_kills(killed, kills=2 if quick else 10)
        numbers["pair_render_seconds"] = statistics.median(asyncio.run(_render_pairs(shown, task)))
        numbers |= resume_after_kills(Path(folder), runs=4 if quick else 20)
        numbers |= _response_times(shown, task, Path(chromium), answers=8 if quick else 30)
    publish(numbers, json)
    return numbers


def put_queries(run: Path, task: str, n: int, *, clips: int, length: int = 25) -> list[int]:
    """Put n queries about clips of a random policy into a run's store; return their ids."""
    short = replace(find_task(task), horizon=length)
    with closing(make_vec_env(short, clips, 0, "gymnasium")) as envs:
        space = envs.action_space
        space.seed(0)
        played = rollout(envs, lambda seen, _: np.stack([space.sample() for _ in seen])).clips()
    # Where there are enough clips, queries share none, so that every pair is drawn anew.
    pairs = torch.arange(2 * n).view(n, 2)
    if 2 * n > clips:
        every = all_pairs(clips)
        pairs = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:n]]
    with FeedbackStore(run / "answers.sqlite") as store:
        return store.add_queries(played, pairs, round=0)


class _NoVideos(Videos):
    """Draws nothing: only answers are measured."""

    def start(self) -> None:
        pass

    def prefetch(self, jobs: Sequence[Job]) -> None:
        pass

    async def obstacle(self) -> str | None:
        return None


@dataclass
class _Client:
    """One of several people who answer at once, and the answers acknowledged to them."""

    name: str
    acknowledged: dict[int, tuple[int, Choice]] = field(default_factory=dict)  # by query
    errors: list[str] = field(default_factory=list)
    new_browser: threading.Event = field(default_factory=threading.Event)


def answer_during_kills(run: Path, *, kills: int, lease_seconds: float = 3.0) -> dict[str, int]:
    """Let four people answer all queries of a run at once while its server is killed repeatedly.

    Kills (SIGKILL) are spread over the answers. After each one a person returns in another browser,
    so that the queries of the old one must become free by themselves.

    Returns:
        The first five keys of `benchmark_page`.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Made for its key, with which clients' cookies are signed.
    authentication = make_app(run, _NoVideos(run, ""), host="127.0.0.1", port=port)
    with FeedbackStore(run / "answers.sqlite") as store:
        total = len(store.queries(unanswered=True))

    def start() -> Any:
        return _start(_serve, run, port, lease_seconds)

    draw = random.Random(0)
    clients = [_Client(f"person {i}") for i in range(4)]
    given = [(authentication, client, port, draw.random()) for client in clients]
    threads = [threading.Thread(target=_answer_all, args=one, daemon=True) for one in given]
    server = start()
    try:
        for thread in threads:
            thread.start()
        for kill in range(kills):
            due = total * (kill + draw.random()) / kills
            while sum(len(client.acknowledged) for client in clients) < due:
                if not any(thread.is_alive() for thread in threads):
                    break
                time.sleep(0.002)
            server.kill()
            server.join()
            server = start()
            clients[kill % len(clients)].new_browser.set()
        for thread in threads:
            thread.join()
    finally:
        server.kill()
        server.join()
    if errors := [error for client in clients for error in client.errors]:
        raise RuntimeError(f"the server refused a correct request: {errors[0]}")
    return {"kills": kills} | _compare(run, clients)


def _compare(run: Path, clients: Sequence[_Client]) -> dict[str, int]:
    """Compare the store's answers with those acknowledged to the clients."""
    with closing(sqlite3.connect(run / "answers.sqlite")) as db:
        rows = db.execute("SELECT id, query, teacher, preference, declined FROM answers")
        stored = {row[0]: row[1:] for row in rows}
    with FeedbackStore(run / "answers.sqlite") as store:
        still_open = len(store.queries(unanswered=True))
    lost = 0
    for client in clients:
        for query, (id, choice) in client.acknowledged.items():
            declined = choice if choice in ("unsure", "skip") else None
            lost += stored.get(id) != (query, client.name, PREFERENCES[choice], declined)
    per_query = Counter(row[0] for row in stored.values())
    return {
        "acknowledged": sum(len(client.acknowledged) for client in clients),
        "acknowledged_lost": lost,
        "doubled": sum(n > 1 for n in per_query.values()),
        "left_open": still_open,
    }


def _answer_all(authentication: Any, client: _Client, port: int, seed: float) -> None:
    draw, browser = random.Random(seed), 0
    choices: list[Choice] = list(PREFERENCES)
    while True:
        if client.new_browser.is_set():  # nobody renews the old one's leases from here on
            client.new_browser.clear()
            browser += 1
        session = f"{client.name}-{browser}".replace(" ", "-")
        cookie = authentication.set_cookie(Person(session, client.name)).partition(";")[0]
        try:
            status, state = _post(port, cookie, "next", None)
            if status != 200:
                client.errors.append(state["reason"])
                return
            if not state["queries"]:
                # Others may hold the remaining ones, and leave.
                if state["answered"] + state["declined"] >= state["budget"]:
                    return
                time.sleep(0.1)
                continue
            query, choice = state["queries"][0]["id"], draw.choice(choices)
            answer = {"query": query, "choice": choice, "seconds": draw.random()}
            status, state = _post(port, cookie, "answer", answer)
            if status == 200:
                client.acknowledged[query] = (state["id"], choice)
            elif status != 409:
                client.errors.append(state["reason"])
                return
        except (OSError, HTTPException, ValueError):
            time.sleep(0.05)  # the server was killed during the request


def _post(port: int, cookie: str, path: str, body: Any) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"cookie": cookie, "content-type": "application/json"}
    try:
        connection.request("POST", f"/api/{path}", dumps(body) if body else None, headers)
        reply = connection.getresponse()
        return reply.status, loads(reply.read())
    finally:
        connection.close()


def _serve(run: Path, port: int, lease_seconds: float) -> None:
    import uvicorn

    bound: dict[str, Any] = {"host": "127.0.0.1", "port": port}
    app = make_app(run, _NoVideos(run, ""), repeat_every=0, lease_seconds=lease_seconds, **bound)
    uvicorn.run(app, log_level="error", access_log=False, **bound)


def _start(function: Any, *arguments: Any) -> Any:
    """Start a function in another process, in which this module has been imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def resume_after_kills(folder: Path, *, runs: int) -> dict[str, float]:
    """Kill each of so many runs of `learn` once (SIGKILL), resume it, and compare the outcomes.

    Moments of the kills are uniform over the time that an unkilled run takes.

    Returns:
        The last two keys of `benchmark_page`.
    """
    seconds, same = 0.0, 0
    for name in ("warm up", "unkilled"):  # the first start also waits for the imports
        started = time.monotonic()
        _start(_learn, folder / name).join()
        seconds = time.monotonic() - started
    draw, expected = random.Random(0), outcome(folder / "unkilled")
    for run in range(runs):
        process = _start(_learn, out := folder / f"run {run}")
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
        _start(_learn, out).join()
        same += outcome(out) == expected
    return {"resumed": runs, "resume_identical": same / runs}


def outcome(run: Path) -> tuple[dict[str, Any], tuple[int, str]]:
    """Result of a finished run without the time that it took, and its answers' digest."""
    result = RunDirectory(run).result or {}
    with FeedbackStore(run / "answers.sqlite") as store:
        answers = store.digest()
    timed = ("wall_seconds", "steps_per_second")
    return {name: value for name, value in result.items() if name not in timed}, answers


def _learn(out: Path) -> None:
    config = LearnConfig("Reacher", 40, 8_192, rounds=4, epochs=10, video=False, out=out)
    learn(config, resume=RunDirectory(out).exists, progress=False)


async def _render_pairs(run: Path, task: str) -> list[float]:
    """Seconds in which both clips of each query are drawn and encoded, one query at a time."""
    with FeedbackStore(run / "answers.sqlite") as store:
        shown = [store.shown(query.id) for query in store.queries()]
    videos, seconds = Videos(run, task), []
    videos.start()
    try:
        # The first includes imports and the start of OpenGL, for which nobody waits: the server
        # draws the first pairs as it starts.
        await videos.get(shown[0][0])
        for pair in shown[1:]:
            started = time.perf_counter()
            videos.prefetch(pair)
            await asyncio.gather(*map(videos.get, pair))
            seconds.append(time.perf_counter() - started)
    finally:
        await videos.stop()
    return seconds


def _response_times(run: Path, task: str, chromium: Path, *, answers: int) -> dict[str, float]:
    """`ready_ms` and `next_pair_ms_p95` in Chromium, for a run whose clips are drawn."""
    from playwright.sync_api import sync_playwright

    with serve_in_background(run, task) as link, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), args=CHROMIUM_FLAGS)
        page = browser.new_page()
        page.goto(link)
        page.fill("#name", "benchmark")
        page.keyboard.press("Enter")
        wait_for_pairs(page, 1, seconds=120)
        ready = []
        for _ in range(5):
            page.reload()
            wait_for_pairs(page, 1)
            ready.append(page.evaluate(f"{_SHOWN}[0].startTime"))
        for given in range(answers):
            wait_until(page, "pairs.length > 1 && pairs[1].videos.every((v) => v.readyState > 2)")
            page.keyboard.press("ArrowLeft")
            wait_for_pairs(page, given + 2)
        times = ".map((mark) => mark.startTime)"
        answered = page.evaluate(f"performance.getEntriesByName('answered'){times}")
        next_shown = page.evaluate(f"{_SHOWN}{times}")[1:]
        browser.close()
    return {
        "ready_ms": statistics.median(ready),
        "next_pair_ms_p95": float(np.quantile(np.subtract(next_shown, answered), 0.95)),
    }


@contextmanager
def serve_in_background(run: Path, task: str) -> Iterator[str]:
    """Run `rewardmodels label` in another process until the block ends; yield its link."""
    command = [sys.executable, "-c", "from experiments.cli import main; raise SystemExit(main())"]
    command += ["label", str(run), "--task", task, "--repeat_every", "0", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            link = server.stdout.readline().strip()
            if not link:
                raise RuntimeError("label: the server didn't start; see its error above.")
            yield link
        finally:
            server.terminate()


def wait_for_pairs(page: Any, n: int, *, seconds: float = 30) -> None:
    """Wait until the page has shown n pairs since it was opened."""
    wait_until(page, f"{_SHOWN}.length >= {n}", seconds=seconds)


def wait_until(page: Any, condition: str, *, seconds: float = 30) -> None:
    """Wait until a JavaScript expression is true.

    Playwright's `wait_for_function` needs `eval`, which the page's security policy forbids.
    """
    limit = time.monotonic() + seconds
    while True:
        with suppress(Exception):  # the page is being loaded
            if page.evaluate(condition):
                return
        if time.monotonic() > limit:
            raise TimeoutError(f"the page: expected {condition} within {seconds} s.")
        time.sleep(0.02)
