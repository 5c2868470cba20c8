"""Web page on which people compare clips: its local server, its videos and its static files."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path

from experiments.envs.tasks import find_task
from rewardmodels import InvalidInput


def label(
    run: Path,
    task: str | None = None,
    people: int = 1,
    repeat_every: int = 10,
    host: str = "127.0.0.1",
    port: int = 8765,
) -> None:
    """Serve the page on which people compare a run's clips, until Ctrl-C.

    Args:
        run: Run directory. `rewardmodels learn --teacher human` puts queries into its
            `answers.sqlite`, before or meanwhile.
        task: Task of the clips; None takes the one in the run's `config.yaml`.
        people: Number of links to print; each opens the page in one browser.
        repeat_every: Answers of a person after which one of their queries is repeated, to measure
            how consistent they are; 0: never.
        host: Address to listen at. Any other than this machine's own lets people on the network
            who have a link send answers, over a connection that isn't encrypted.
        port: Port to listen at; 0 for any that is free.

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
    from experiments.labelling.server import make_app
    from experiments.labelling.videos import Videos
    from experiments.training.run_directory import RunDirectory

    if not any((run / name).is_file() for name in ("answers.sqlite", "config.yaml")):
        raise InvalidInput(
            f"run: expected a run directory with answers.sqlite or config.yaml, got {run}. "
            f"Make one with `rewardmodels learn --teacher human --out {run}`."
        )
    for name, value, least in (("people", people, 1), ("repeat_every", repeat_every, 0)):
        if value < least:
            raise InvalidInput(f"{name}: expected at least {least}, got {value}.")
    if not 0 <= port < 2**16:
        raise InvalidInput(f"port: expected a number from 0 to {2**16 - 1}, got {port}.")
    task = task or RunDirectory(run).task
    if task is None:
        raise InvalidInput(f"task: expected --task, since {run} has no config.yaml that names it.")
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
        app = make_app(
            run, Videos(run, task), host=host, port=port, people=people, repeat_every=repeat_every
        )
        shown = f"[{host}]" if ":" in host else host
        for token in app.tokens:
            # Each link works once, since it passes through a terminal's log and the clipboard.
            print(f"http://{shown}:{port}/?token={token}", flush=True)
        options = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="on",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        uvicorn.Server(options).run(sockets=[listening])
