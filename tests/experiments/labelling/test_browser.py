"""The labelling page in Chromium, alone and beside `learn`; screenshots go to runs/."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from active import FeedbackStore
from experiments.benchmarks.page import (
    CHROMIUM,
    CHROMIUM_FLAGS,
    answer_during_kills,
    benchmark_page,
    put_queries,
    serve_in_background,
    wait_for_pairs,
    wait_until,
)
from rewardmodels import InvalidInput

SCREENSHOTS = Path(__file__).parents[3] / "runs" / "labelling-page"
KEYS = {"ArrowLeft": 0.0, "ArrowRight": 1.0, "ArrowUp": 0.5, "ArrowDown": None, "s": None}
pytestmark = pytest.mark.slow
needs_chromium = pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs Chromium")


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def idle(page: Any) -> None:
    wait_until(page, "unsaved === 0")


def next_loaded(page: Any, seconds: float = 30) -> None:
    wait_until(page, "pairs.length > 0 && pairs[0].seen", seconds=seconds)


def rows(run: Path, sql: str) -> list[Any]:
    db = sqlite3.connect(run / "answers.sqlite")
    found = db.execute(sql).fetchall()
    db.close()
    return found


def photograph(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@needs_chromium
def test_thirty_answers_by_keyboard_are_in_the_store_exactly(tmp_path, browser):
    put_queries(tmp_path, "HalfCheetah", 40, clips=16)
    curve = [(0, 0, -300), (10, 3000, -120), (20, 6000, 240), (30, 9000, 700)]
    lines = [f"{step},{n},{value}" for n, step, value in curve]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,comparisons,task_return", *lines]))
    keys, given_answers, errors = list(KEYS), {}, []
    with serve_in_background(tmp_path, "HalfCheetah") as link:
        context = browser.new_context(viewport={"width": 1100, "height": 1000})
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(link)
        page.fill("#name", "Ann")
        photograph(page, "name")
        page.keyboard.press("Enter")
        wait_for_pairs(page, 1, seconds=120)
        photograph(page, "first")

        # The first clip, by keys: a mark while + is held, and four stars.
        next_loaded(page)
        first = page.evaluate("pairs[0].clips.map((clip) => clip.id)")
        page.evaluate("pairs[0].videos.forEach((v) => { v.currentTime = 0.2; }); playOrPause()")
        page.keyboard.down("+")
        page.wait_for_timeout(300)
        page.keyboard.up("+")
        idle(page)
        held = [*map(int, re.findall(r"\d+", page.inner_text("#status")))]
        page.keyboard.press("4")
        # The second, with the mouse: dragged backwards over its lower lane, frames 14 to 5 of 25.
        lane = page.locator(".pair.now .clip:nth-child(2) .lane.bad").bounding_box()
        y = lane["y"] + lane["height"] / 2
        page.mouse.move(lane["x"] + lane["width"] * 14.5 / 25, y)
        page.mouse.down()
        page.mouse.move(lane["x"] + lane["width"] * 5.5 / 25, y, steps=4)
        page.mouse.up()
        idle(page)
        photograph(page, "marks")
        # One more, which is undone.
        page.keyboard.press("f")
        page.keyboard.press("f")
        page.keyboard.press("1")
        page.keyboard.press("u")
        idle(page)

        for given in range(30):
            if given == 12:
                idle(page)
                page.close(run_before_unload=False)
                page = context.new_page()
                page.on("pageerror", lambda error: errors.append(error))
                page.goto(link.partition("?")[0])
                wait_for_pairs(page, 1)
            next_loaded(page)
            query, key = page.evaluate("pairs[0].id"), keys[given % len(keys)]
            page.keyboard.press(key)
            if given == 20:
                idle(page)
                page.keyboard.press("u")
                wait_until(page, f"pairs[0].id === {query}")
                next_loaded(page)
                key = "ArrowUp"
                page.keyboard.press(key)
            wait_until(page, f"!pairs.length || pairs[0].id !== {query}")
            given_answers[query] = KEYS[key]
        idle(page)
        wait_until(page, "!document.getElementById('curve').hidden")
        names = page.evaluate(
            "[...document.querySelectorAll('button, input, .clip, video, [role=img]')].map((e) => "
            "e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.innerText "
            "|| (e.labels && e.labels.length) || e.closest('[hidden]') || '')"
        )
        assert all(names)
        for width in (1100, 375):
            for scheme in ("light", "dark"):
                page.set_viewport_size({"width": width, "height": 800})
                page.emulate_media(color_scheme=scheme)
                page.wait_for_timeout(300)
                photograph(page, f"{width}-{scheme}")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
        context.close()
    assert not errors
    standing = dict(rows(tmp_path, "SELECT query, preference FROM standing WHERE teacher = 'Ann'"))
    assert standing == given_answers
    assert len(given_answers) == 30
    assert len(rows(tmp_path, "SELECT * FROM answers")) == 31
    assert len(rows(tmp_path, "SELECT * FROM withdrawals")) == 2
    assert all(0 <= taken < 60 for (taken,) in rows(tmp_path, "SELECT seconds FROM answers"))
    marks = rows(tmp_path, "SELECT clip, first, last, good FROM marks ORDER BY id")
    assert marks == [(first[0], *held, 1), (first[1], 5, 14, 0)]
    assert held[0] < held[1]
    assert rows(tmp_path, "SELECT clip, rating FROM ratings")[0] == (first[0], 0.75)


@needs_chromium
def test_the_page_tells_what_becomes_of_the_run(tmp_path, browser, monkeypatch):
    put_queries(tmp_path, "HalfCheetah", 3, clips=6)
    (tmp_path / "config.yaml").write_text("task: HalfCheetah\ncomparisons: 3\n")
    (tmp_path / "metrics.csv").write_text("step,comparisons,task_return\n0,0,-300\n3000,3,90\n")
    lock = FileLock(tmp_path / ".lock")

    def told(state: str, name: str) -> None:
        wait_until(page, f"run.state === '{state}'")
        photograph(page, name)

    with serve_in_background(tmp_path, "HalfCheetah") as link, lock:
        page = browser.new_page()
        page.goto(f"{link}x")
        photograph(page, "wrong-link")
        assert page.locator("h1").count() == 1
        reader = browser.new_context(java_script_enabled=False).new_page()
        reader.goto(link)
        photograph(reader, "link")
        reader.click("button")
        assert reader.url == link.partition("?")[0]
        page = open_page(browser, link)
        answer_pairs(page, 1)
        lock.release()
        page.reload()
        next_loaded(page)
        told("paused", "paused")
        lock.acquire()
        answer_pairs(page, 2)
        told("running", "all-given")
        wait_until(page, "!document.getElementById('curve').hidden")
        (tmp_path / "result.json").write_text("{}")
        told("over", "over")
        assert page.is_hidden("#answers")
        assert page.is_visible("#curve")
        newcomer = browser.new_context().new_page()
        newcomer.goto(link)
        wait_until(newcomer, "run.state === 'over'")
        assert newcomer.is_hidden("#name")
        (tmp_path / "answers.sqlite").rename(tmp_path / "moved.sqlite")
        told("gone", "gone")
    (tmp_path / "moved.sqlite").rename(tmp_path / "answers.sqlite")
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "videos")
    monkeypatch.setenv("MUJOCO_GL", "nothing")
    with serve_in_background(tmp_path, "HalfCheetah") as link:
        page = browser.new_page()
        page.goto(link)
        told("unshown", "no-pictures")
        assert page.is_hidden("#name")


def test_kills_neither_lose_nor_double_answers(tmp_path):
    put_queries(tmp_path, "Hopper", 120, clips=20)
    found = answer_during_kills(tmp_path, kills=3, lease_seconds=1.0)
    assert found["acknowledged_lost"] == found["doubled"] == found["left_open"] == 0
    # A kill may take away the reply to an answer that is stored.
    assert 120 - 3 * 4 <= found["acknowledged"] <= 120
    assert len(rows(tmp_path, "SELECT DISTINCT query FROM answers")) == 120


def test_the_benchmark_refuses_before_it_starts(tmp_path):
    with pytest.raises(InvalidInput, match="chromium: "):
        benchmark_page(chromium=tmp_path / "chromium")


def start_learning(out, *flags):
    settings = [
        "--task", "Hopper", "--teacher", "human", "--comparisons", "16", "--steps", "2048",
        "--rounds", "2", "--candidates", "12", "--clip_length", "10", "--epochs", "5",
        "--evaluate", "1", "--video", "false",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from experiments.cli import main; raise SystemExit(main())"]
    command += ["learn", *settings, "--out", str(out), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def open_page(browser, link):
    page = browser.new_page()
    page.goto(link)
    page.fill("#name", "Ann")
    page.keyboard.press("Enter")
    return page


def answer_pairs(page, n):
    """Press a key for each of the next n pairs once it is visible."""
    for given in range(n):
        next_loaded(page, seconds=120)
        page.keyboard.press("ArrowLeft" if given % 2 else "ArrowRight")
        idle(page)


@needs_chromium
def test_learning_from_a_person_survives_kills_of_both_processes(tmp_path, browser):
    run = tmp_path / "run"
    agent = start_learning(run)
    try:
        limit = time.monotonic() + 120
        while not (run / "answers.sqlite").is_file():
            assert agent.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.1)
        with serve_in_background(run, "Hopper") as link:
            page = open_page(browser, link)
            answer_pairs(page, 2)
        agent.kill()
        agent.communicate()
        with FeedbackStore(run / "answers.sqlite") as store:
            before = store.comparisons()
            assert len(before) == 2
        agent = start_learning(run, "--resume")
        with serve_in_background(run, "Hopper") as link:
            page = open_page(browser, link)
            answer_pairs(page, 2)
            # Further answers while it trains; it may finish before all are given.
            while agent.poll() is None:
                if page.evaluate("pairs.length > 0 && pairs[0].seen"):
                    answer_pairs(page, 1)
                time.sleep(0.05)
        log = agent.communicate()[1]
    finally:
        agent.kill()
        agent.wait()
    assert agent.returncode == 0, log
    found = json.loads((run / "result.json").read_text())
    with FeedbackStore(run / "answers.sqlite") as store:
        counts, after = store.counts(), store.comparisons()
        assert {query.teacher for query in store.queries()} <= {"Ann", None}
    assert 4 <= found["comparisons"] <= counts.answered <= counts.put <= 16
    assert after.preference[:2].tolist() == before.preference.tolist() == [1.0, 0.0]
    assert (run / "report.html").is_file()
