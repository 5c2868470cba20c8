"""An agent learns while somebody answers in Chromium, and either side may die on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from active import FeedbackStore
from experiments.benchmarks.page import CHROMIUM, CHROMIUM_FLAGS, serve_in_background, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs Chromium"),
]


def started(out, *flags):
    settings = [
        "--task", "Hopper", "--teacher", "human", "--comparisons", "16", "--steps", "2048",
        "--rounds", "2", "--candidates", "12", "--clip_length", "10", "--epochs", "5",
        "--evaluate", "1", "--video", "false",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from experiments.cli import main; raise SystemExit(main())"]
    command += ["learn", *settings, "--out", str(out), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def opened(browser, link):
    page = browser.new_page()
    page.goto(link)
    page.fill("#name", "Ann")
    page.keyboard.press("Enter")
    return page


def answer(page, n):
    """Presses a key for each of the next n pairs as it comes into sight."""
    for given in range(n):
        wait_until(page, "pairs.length > 0 && pairs[0].seen", seconds=120)
        page.keyboard.press("ArrowLeft" if given % 2 else "ArrowRight")
        wait_until(page, "unsaved === 0")


def test_an_agent_learns_while_somebody_answers_and_both_sides_die_on_the_way(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    run = tmp_path / "run"
    agent = started(run)
    try:
        limit = time.monotonic() + 120
        while not (run / "answers.sqlite").is_file():
            assert agent.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.1)
        with sync_api.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_FLAGS)
            with serve_in_background(run, "Hopper") as link:
                page = opened(browser, link)
                answer(page, 2)
            agent.kill()
            agent.communicate()
            with FeedbackStore(run / "answers.sqlite") as store:
                before = store.comparisons()
                assert len(before) == 2
            agent = started(run, "--resume")
            with serve_in_background(run, "Hopper") as link:
                page = opened(browser, link)
                answer(page, 2)
                # The rest while it trains; fewer where it is through before they are answered.
                while agent.poll() is None:
                    if page.evaluate("pairs.length > 0 && pairs[0].seen"):
                        answer(page, 1)
                    time.sleep(0.05)
            browser.close()
        said = agent.communicate()[1]
    finally:
        agent.kill()
        agent.wait()
    assert agent.returncode == 0, said
    found = json.loads((run / "result.json").read_text())
    with FeedbackStore(run / "answers.sqlite") as store:
        counts, after = store.counts(), store.comparisons()
        assert {query.teacher for query in store.queries()} <= {"Ann", None}
    assert 4 <= found["comparisons"] <= counts.answered <= counts.put <= 16
    assert after.preference[:2].tolist() == before.preference.tolist() == [1.0, 0.0]
    assert (run / "report.html").is_file()
