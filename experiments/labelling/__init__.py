"""Web page on which people compare clips: its local server, its videos and its static files."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from experiments.envs.tasks import TASKS, find_task
from rewardmodels import InvalidInput


def label(
    run: Path,
    task: str | None = None,
    people: int = 1,
    repeat_every: int = 10,
    host: str = "127.0.0.1",
    port: int = 8765,
    trust: bool = False,
) -> None:
    """Serve the page on which people compare a run's clips, until Ctrl-C.

    Links go to standard output, one a line, everything else to standard error. In a terminal,
    Enter prints one more link.

    Args:
        run: Run directory. `rewardmodels learn --teacher human` puts queries into its
            `answers.sqlite`, before or meanwhile.
        task: Task of the clips; None takes the one in the run's `config.yaml`.
        people: Number of links to print. One that another machine opened works for that browser
            only; on this machine each works until the server ends.
        repeat_every: Answers of a person after which one of their queries is repeated, to measure
            how consistent they are; 0: never.
        host: Address to listen at. Any other than this machine's own lets people on the network
            who have a link send answers, over a connection that isn't encrypted.
        port: Port to listen at; 0 for any that is free.
        trust: Import what the run's settings name, which may be a stranger's code.

    Raises:
        InvalidInput: There is no run or no task, the address can't be listened at, or the extra
            `label` isn't installed.
        UnreadableFile: The feedback store is damaged; it is left unchanged.
        RenderingUnavailable: Clips of the task can't be shown here.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise InvalidInput(
            "label: expected FastAPI and uvicorn to be installed; "
            "install them with pip install 'rewardmodels[label]'."
        )
    import uvicorn

    from experiments.envs.rendering import check_renderable
    from experiments.labelling.auth import is_loopback
    from experiments.labelling.server import make_app
    from experiments.labelling.videos import NoVideos, Videos
    from experiments.training.run_directory import RunDirectory

    items = (run / "fit.json").is_file()  # of a file of preferences, shown as text
    if not any((run / name).is_file() for name in ("answers.sqlite", "config.yaml")):
        raise InvalidInput(
            f"run: expected a run directory with answers.sqlite or config.yaml, got {run}. "
            f"Make one with `rewardmodels learn --teacher human --out {run}`; or put questions "
            "into that of a fit with `rewardmodels ask --label`."
        )
    for name, value, least in (("people", people, 1), ("repeat_every", repeat_every, 0)):
        if value < least:
            raise InvalidInput(f"{name}: expected at least {least}, got {value}.")
    if not 0 <= port < 2**16:
        raise InvalidInput(f"port: expected a number from 0 to {2**16 - 1}, got {port}.")
    if not trust and not items:
        RunDirectory(run).check_trusted(only=("model",) if task else ("task", "model"))
    task = task or RunDirectory(run).task
    if task is None and not items:
        raise InvalidInput(f"task: expected --task, since {run} has no config.yaml that names it.")
    if task is not None and task not in TASKS:  # where one of ours can't be drawn, the page says so
        check_renderable(find_task(task, RunDirectory(run).settings.get("horizon")))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise InvalidInput(
            f"host, port: expected a free address, got {host} and {port}: {error}. "
            "Pass another --port; 0 takes any that is free."
        ) from error
    with listening:
        port = listening.getsockname()[1]
        videos = NoVideos() if task is None else Videos(run, task)
        app = make_app(run, videos, host=host, port=port, people=people, repeat_every=repeat_every)
        address = _address(host)
        shown = f"[{address}]" if ":" in address else address

        def link(token: str) -> str:
            return f"http://{shown}:{port}/?token={token}"

        where = "in a browser" if people == 1 else "in a browser each"
        _say(f"Open {'this link' if people == 1 else 'these links'} {where}, and type a name:")
        for token in list(app.tokens):
            print(link(token), flush=True)
        _say(
            "Keys there: left and right arrow for the better clip, up for the same, down for can't "
            "tell, S to skip, U to undo; the page lists the others. Answers are saved at once."
        )
        if not is_loopback(host):
            _say(
                "Warning: the connection isn't encrypted, so that others on the network can read "
                "what is sent, links included. Each link works once from another machine."
            )
        if sys.stdin is not None and sys.stdin.isatty():
            _say("Enter: one more link. Ctrl-C: end; nothing that was saved is lost.")
            _on_enter(lambda: print(link(app.add_token()), flush=True))
        else:
            _say("Ctrl-C: end; nothing that was saved is lost.")
        options = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="on",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        uvicorn.Server(options).run(sockets=[listening])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _address(host: str) -> str:
    """Address under which other machines reach a server bound to `host`."""
    if host not in ("0.0.0.0", "::"):
        return host
    # Addresses kept for documentation: connecting sends nothing, but chooses the network card.
    family, outside = (
        (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    )
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as chosen:
        chosen.connect((outside, 9))
        return str(chosen.getsockname()[0])
    return socket.gethostname()


def _on_enter(act: Callable[[], None]) -> None:
    """Call `act` in a thread of its own for each line typed in the terminal."""
    terminal = sys.stdin.fileno()
    if hasattr(signal, "SIGTTIN"):  # reading in the background must not stop the process
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)

    def read() -> None:
        # Not sys.stdin, whose lock a thread that waits would hold at the interpreter's end.
        with suppress(OSError):
            while os.read(terminal, 1024):
                act()

    threading.Thread(target=read, daemon=True).start()
