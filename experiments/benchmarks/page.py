"""Whether the page loses an answer, how long people wait for it, and what their answers teach."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from active import FeedbackStore, all_pairs
from experiments.benchmarks.figures import check_settings, publish
from experiments.benchmarks.page_kills import answer_through_kills
from experiments.envs.tasks import find_task, make_env, simulator_state
from experiments.labelling.beside import page_beside
from experiments.labelling.videos import Videos
from rewardmodels import Clips, InvalidInput

CHROMIUM: Final = Path("/usr/bin/chromium")


def benchmark_page(
    quick: bool = False,
    json: Path | None = None,
    task: str = "Hopper",
    chromium: Path = CHROMIUM,
) -> dict[str, Any]:
    """Measure what the page loses when it is killed, and how long people wait.

    Args:
        quick: In about two minutes, for trends: 200 answers, two kills, ten pairs.
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
    check_settings(json)
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
    return publish(figures, json)


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
