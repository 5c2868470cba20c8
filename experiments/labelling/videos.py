"""Videos of clips, made in the background by one process, each once."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rewardmodels import RewardModelsError

Job = int | Literal["best"]


class NotDrawn(RewardModelsError):
    """A clip can't be drawn; the message says why."""


class Videos:
    """Asks the drawing process for videos, what somebody is waiting for first.

    Args:
        run: The run's directory.
        task: The task's name.
    """

    def __init__(self, run: Path, task: str) -> None:
        self.folder = run / "videos"
        self._command = [sys.executable, "-m", "experiments.labelling.drawing", run, task]
        self._waiting: deque[Job] = deque()
        self._done: dict[Job, asyncio.Future[Path | None]] = {}
        self._work = asyncio.Event()
        self._drawing: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None

    def start(self) -> None:
        """Starts the drawing process, so that it has its libraries by the time of the first job."""
        self._drawing = asyncio.create_task(self._draw())

    async def stop(self) -> None:
        """Ends the drawing process."""
        if self._drawing is not None:
            self._drawing.cancel()
            await asyncio.gather(self._drawing, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def want(self, jobs: Sequence[Job]) -> None:
        """Puts jobs at the end of the queue, save those known already."""
        for job in jobs:
            if job not in self._done:
                self._done[job] = asyncio.get_running_loop().create_future()
                self._waiting.append(job)
        self._work.set()

    async def get(self, job: Job) -> Path | None:
        """The video's file, once it is drawn; None if there is nothing to draw.

        Raises:
            NotDrawn: It can't be drawn.
        """
        self.want([job])
        if job in self._waiting and job != "best":  # which is long, and nobody's question
            self._waiting.remove(job)
            self._waiting.appendleft(job)
        return await asyncio.shield(self._done[job])

    def forget(self, job: Job) -> None:
        """Lets a job be done anew, if it is done."""
        if job in self._done and self._done[job].done():
            del self._done[job]

    async def _draw(self) -> None:
        while True:
            if self._process is None:
                await self._start()
            while not self._waiting:
                self._work.clear()
                await self._work.wait()
            job = self._waiting.popleft()
            future = self._done[job]
            try:
                future.set_result(await self._ask(job))
            except NotDrawn as error:
                future.set_exception(error)
                future.exception()  # seen, so that nobody is warned of it
                # A machine that can't draw won't; a process that was killed may next time.
            if future.exception() is not None and self._process is None:
                del self._done[job]

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *map(str, self._command), stdin=pipe, stdout=pipe
        )
        return self._process

    async def _ask(self, job: Job) -> Path | None:
        process = self._process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{json.dumps(job)}\n".encode())
            await process.stdin.drain()
            line = await process.stdout.readline()
        except ConnectionError:
            line = b""
        if not line:
            self._process = None
            raise NotDrawn("the process that draws has ended; its last words stand above.")
        said = json.loads(line)
        if "error" in said:
            raise NotDrawn(said["error"])
        return None if said["file"] is None else self.folder / said["file"]
