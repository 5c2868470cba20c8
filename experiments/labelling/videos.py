"""Videos of clips, drawn in the background by one process of its own, each clip once.

`Videos` runs in the server. It starts this module as a process that reads jobs from standard input
and writes results to standard output, one line of JSON each. The process ends when its input does,
so that it doesn't outlive a server that was killed; it opens the feedback store itself, so that
only short lines go through the pipe.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from active import FeedbackStore
from experiments.envs.rendering import Renderer, RenderingUnavailable, write_video
from experiments.envs.tasks import find_task, make_env, simulator_state
from experiments.registry import load_model
from experiments.training.clip_buffer import ClipBuffer
from experiments.training.run_directory import RunDirectory
from rewardmodels import RewardModelsError

Job = int | Literal["best", "check"]
"""A clip's id, the best clip by the learned reward, or a check that clips can be drawn at all."""

SIZE_PX: Final = 320  # width and height
FPS: Final = 25
BEST_FRAMES: Final = 100


class VideoUnavailable(RewardModelsError):
    """A clip can't be drawn; the message gives the reason."""


class Videos:
    """Queue of videos in front of the drawing process; requested videos overtake prefetched ones.

    Args:
        run: Run directory; videos are kept in its `videos`.
        task: Name of the task.
    """

    def __init__(self, run: Path, task: str) -> None:
        self.folder = run / "videos"
        self._command = [sys.executable, "-m", "experiments.labelling.videos", str(run), task]
        # Priority (lower is sooner), number, job; a job may be in it twice.
        self._queue: asyncio.PriorityQueue[tuple[int, int, Job]] = asyncio.PriorityQueue()
        self._numbers = count()
        self._results: dict[Job, asyncio.Future[Path | None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None

    def start(self) -> None:
        """Start the drawing process now, so that its imports are done before the first job."""
        self._task = asyncio.create_task(self._work_off())

    async def stop(self) -> None:
        """End the drawing process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Append jobs to the queue, except those already known."""
        for job in jobs:
            if job not in self._results:
                self._results[job] = asyncio.get_running_loop().create_future()
                self._queue.put_nowait((1, next(self._numbers), job))

    async def get(self, job: Job) -> Path | None:
        """Return the file of a video once it is drawn; None if there is nothing to draw yet.

        Raises:
            VideoUnavailable: It can't be drawn.
        """
        self.prefetch([job])
        if job != "best" and not self._results[job].done():  # the best takes long; it can wait
            self._queue.put_nowait((0, next(self._numbers), job))
        return await asyncio.shield(self._results[job])

    async def obstacle(self) -> str | None:
        """Return the reason why no clip of the run can be shown here; None if they can."""
        try:
            await self.get("check")
        except VideoUnavailable as error:
            return str(error)
        return None

    def forget(self, job: Job) -> None:
        """Drop a finished job's result, so that the next request draws it again."""
        if job in self._results and self._results[job].done():
            del self._results[job]

    async def _work_off(self) -> None:
        while True:
            if self._process is None:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
                )
            _, _, job = await self._queue.get()
            result = self._results.get(job)
            if result is None or result.done():
                continue
            try:
                result.set_result(await self._draw(self._process, job))
            except VideoUnavailable as error:
                result.set_exception(error)
                result.exception()  # mark it as retrieved: perhaps nobody waits for this video
                if self._process is None:  # it was killed, so the next attempt may succeed
                    del self._results[job]

    async def _draw(self, process: asyncio.subprocess.Process, job: Job) -> Path | None:
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
            raise VideoUnavailable("the drawing process has ended; see the server's terminal.")
        reply = json.loads(line)
        if "error" in reply:
            raise VideoUnavailable(reply["error"])
        return None if reply["file"] is None else self.folder / reply["file"]


class NoVideos(Videos):
    """In place of `Videos` where clips are shown as text."""

    def __init__(self) -> None:
        """Nothing is drawn."""

    def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to end."""

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Nothing to draw."""

    def forget(self, job: Job) -> None:
        """Nothing to draw again."""

    async def get(self, job: Job) -> Path | None:
        """There is no video."""
        return None


class ClipRenderer:
    """Renders clips of a feedback store to video files, each once.

    Args:
        run: Run directory, with `answers.sqlite`; videos go to its `videos`.
        task: Name of the task.
    """

    def __init__(self, run: Path, task: str) -> None:
        self.run, self.task = run, find_task(task, RunDirectory(run).settings.get("horizon"))
        self.store = FeedbackStore(run / "answers.sqlite")
        self.folder = run / "videos"
        self.folder.mkdir(exist_ok=True)
        self._renderer: Renderer | None = None

    def clip(self, id: int) -> str:
        """Render a clip unless its video exists; return the video's name in the folder.

        Raises:
            RenderingUnavailable: This machine can't render, or the clip can't be rendered.
        """
        clip = self.store.clips([id])
        shown, states = clip.observations[0].numpy(), clip.states
        if states is not None:
            shown = states[0].numpy()
        elif not _is_image(shown[0]):
            raise RenderingUnavailable(
                f"clip {id}: expected simulator states or images as observations, got neither, "
                f"since {self.task.name} has no state that can be set."
            )
        header = f"{self.task.name} {SIZE_PX} {FPS} {shown.dtype} {shown.shape}"
        digest = hashlib.sha256(header.encode() + np.ascontiguousarray(shown).tobytes())
        return self._write(f"{digest.hexdigest()}.mp4", shown, drawn=states is None)

    def best(self) -> str | None:
        """Render the agent's best recent clip by the learned reward; None before there is one."""
        # The buffer holds a horizon's steps at least, and so half of an episode without a break.
        states = best_clip(self.run, min(BEST_FRAMES, -(-self.task.horizon // 2)))
        if states is None:
            return None
        name = self._write(f"best-{hashlib.sha256(states.tobytes()).hexdigest()}.mp4", states)
        for old in self.folder.glob("best-*.mp4"):
            if old.name != name:
                old.unlink()
        return name

    def check(self) -> str | None:
        """Draw the first clip, or the environment's first state if there is none yet.

        Returns:
            Name of the first clip's video, if there is one.

        Raises:
            RenderingUnavailable: No clip can be rendered here.
        """
        try:
            if queries := self.store.queries():
                return self.clip(self.store.shown(queries[0].id)[0])
            with make_env(self.task) as env:
                seen = env.reset(seed=0)[0]
                state = simulator_state(env.unwrapped)
            if not _is_image(np.asarray(seen)):
                renderer = self._open_renderer()
                if state is not None:
                    renderer.draw(state[None])
            return None
        except RewardModelsError:
            raise
        except Exception as error:  # a user's environment may raise anything
            raise RenderingUnavailable(
                f"task: expected an environment that can be drawn with render_mode='rgb_array', "
                f"got {self.task.name}, which fails with {type(error).__name__}: {error}."
            ) from error

    def close(self) -> None:
        """Close the store and the renderer."""
        self.store.close()
        if self._renderer is not None:
            self._renderer.close()

    def _open_renderer(self) -> Renderer:
        if self._renderer is None:
            self._renderer = Renderer(self.task, SIZE_PX, SIZE_PX, smooth=False)
        return self._renderer

    def _write(self, name: str, shown: NDArray[Any], drawn: bool = False) -> str:
        """Write states, or images that are drawn already, to a file unless it exists."""
        if not (self.folder / name).exists():
            if not drawn:
                shown = self._open_renderer().draw(shown)
            write_video(shown, self.folder / name, FPS)
        return name


def _is_image(observation: NDArray[Any]) -> bool:
    return observation.dtype == np.uint8 and observation.shape[2:] == (3,)


def best_clip(run: Path, frames: int = BEST_FRAMES) -> NDArray[np.floating[Any]] | None:
    """Simulator states of the recent clip with the highest learned return.

    Args:
        run: Run directory; its newest checkpoint is read.
        frames: Frames of the clip, at most.

    Returns:
        `(frames, s)`, or None if there is no checkpoint, learned reward or state, or if the
        checkpoint was replaced meanwhile.
    """
    checkpoints = RunDirectory(run).checkpoints
    if not checkpoints or not (checkpoints[-1] / "model.safetensors").exists():
        return None
    newest = checkpoints[-1]
    try:
        model = load_model(newest / "model.safetensors", RunDirectory(run).settings)
        buffer = ClipBuffer.load(newest / "clip_buffer.npz")
    except FileNotFoundError:
        return None
    # 300 candidates are enough: neighbouring clips share nearly all of their frames.
    clips = buffer.sample(min(frames, buffer.steps, buffer.capacity), 300, np.random.default_rng(0))
    if clips.states is None:
        return None
    with torch.no_grad():
        best = int(model.posterior(clips).mean.argmax())
    return clips.states[best].numpy()


def main() -> None:
    """Do jobs, one line of JSON each, until standard input ends."""
    run, task = sys.argv[1:]
    torch.set_num_threads(1)
    renderer = ClipRenderer(Path(run), task)
    # Libraries may print to standard output: it becomes standard error, and replies get a copy.
    with os.fdopen(os.dup(1), "w") as replies, closing(renderer):
        os.dup2(2, 1)
        for line in sys.stdin:
            job = json.loads(line)
            try:
                if job == "check":
                    file = renderer.check()
                else:
                    file = renderer.best() if job == "best" else renderer.clip(job)
                reply = {"file": file}
            except (RewardModelsError, OSError, ValueError, KeyError) as error:
                reply = {"error": str(error)}
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    # Ctrl-C in a terminal reaches both processes; the server ends this one by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
