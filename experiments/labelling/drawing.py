"""The process that draws clips: takes jobs on standard input, says on standard output what came.

It ends when its input does, so that it never outlives a server that was killed. It opens the
store for itself: nothing larger than a line goes through the pipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from active import FeedbackStore
from experiments.envs.rendering import Renderer, RenderingUnavailable
from experiments.envs.tasks import find_task
from experiments.envs.video import write_video
from experiments.labelling.best import best_stretch
from rewardmodels import RewardModelsError

SIDE: Final = 320  # pixels, of both sides of a picture
FRAMES_A_SECOND: Final = 25


class Drawer:
    """Draws clips of a store into a folder, each once.

    Args:
        run: The run's directory, with `answers.sqlite`; videos go to its `videos`.
        task: The task's name.
    """

    def __init__(self, run: Path, task: str) -> None:
        self.run, self.task = run, find_task(task)
        self.store = FeedbackStore(run / "answers.sqlite")
        self.folder = run / "videos"
        self.folder.mkdir(exist_ok=True)
        self._renderer: Renderer | None = None

    def clip(self, id: int) -> str:
        """Draws a clip unless it is drawn already; returns its video's name in the folder.

        Raises:
            RenderingUnavailable: This machine can't draw, or the clip can't be drawn.
        """
        clip = self.store.clips([id])
        seen, states = clip.observations[0], clip.states
        pictures = seen.dtype == torch.uint8 and seen.shape[3:] == (3,)
        if states is None and not pictures:
            raise RenderingUnavailable(
                f"clip {id}: expected simulator states or pictures as observations, got neither, "
                f"since {self.task.name} shows no state that can be set."
            )
        shown = (seen if states is None else states[0]).numpy()
        about = f"{self.task.name} {SIDE} {FRAMES_A_SECOND} {shown.dtype} {shown.shape}"
        digest = hashlib.sha256(about.encode() + np.ascontiguousarray(shown).tobytes())
        name = f"{digest.hexdigest()}.mp4"
        if not (self.folder / name).exists():
            frames = shown if states is None else self._draw(shown)
            write_video(frames, self.folder / name, FRAMES_A_SECOND)
        return name

    def best(self) -> str | None:
        """Draws the best the agent lately did by its own lights; None while it knows nothing."""
        found = best_stretch(self.run)
        if found is None:
            return None
        name = f"best-{hashlib.sha256(found.tobytes()).hexdigest()}.mp4"
        if not (self.folder / name).exists():
            write_video(self._draw(found), self.folder / name, FRAMES_A_SECOND)
            for old in self.folder.glob("best-*.mp4"):
                if old.name != name:
                    old.unlink()
        return name

    def close(self) -> None:
        """Closes the store, and the renderer if there is one."""
        self.store.close()
        if self._renderer is not None:
            self._renderer.close()

    def _draw(self, states: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        if self._renderer is None:
            self._renderer = Renderer(self.task, SIDE, SIDE, smooth=False)
        return self._renderer.draw(states)


def main() -> None:
    """Does jobs, a line of JSON each, until the input ends."""
    run, task = sys.argv[1:]
    torch.set_num_threads(1)
    drawer = Drawer(Path(run), task)
    # Libraries print as they please; only what is meant goes to the pipe.
    with os.fdopen(os.dup(1), "w") as say, closing(drawer):
        os.dup2(2, 1)
        for line in sys.stdin:
            job = json.loads(line)
            started = time.perf_counter()
            done: dict[str, Any] = {}
            try:
                done["file"] = drawer.best() if job == "best" else drawer.clip(job)
            except (RewardModelsError, OSError, ValueError, KeyError) as error:
                done["error"] = str(error)
            done["seconds"] = time.perf_counter() - started
            print(json.dumps(done), file=say, flush=True)


if __name__ == "__main__":
    # Ctrl-C in a terminal goes to both; the server ends this one by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
