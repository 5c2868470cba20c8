"""`rewardmodels label RUN`: serves the page until it is interrupted."""

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
    """Serves the page on which people answer a run's queries, until Ctrl-C.

    Args:
        run: The run's directory; `rewardmodels learn --teacher human` puts queries into its
            `answers.sqlite`, meanwhile or before.
        task: Of which the clips are; None takes that of the run's `config.yaml`.
        people: How many may come: so many links are printed, each of which opens the page in one
            browser.
        repeat_every: Answers of a person after which one of their queries is put once more, to
            see whether answers agree; 0 for never.
        host: Address to listen at. Another than this machine's own lets others on the network
            send answers over a connection that isn't encrypted, if they have a link.
        port: Port to listen at; 0 for any that is free.

    Raises:
        InvalidInput: No run, no task, an address that can't be listened at, or the extra `label`
            isn't installed.
        UnreadableFile: The store is damaged; it is left as it was.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise InvalidInput(
            "label: expected FastAPI and uvicorn to be installed, got none; "
            "pip install 'rewardmodels[label]' brings them."
        )
    import uvicorn

    from experiments.labelling.desk import settings
    from experiments.labelling.server import make_app
    from experiments.labelling.videos import Videos

    run = Path(run)
    if not any((run / name).is_file() for name in ("answers.sqlite", "config.yaml")):
        raise InvalidInput(
            f"run: expected a run's directory, with answers.sqlite or config.yaml, got {run}. "
            f"`rewardmodels learn --teacher human --out {run}` makes one."
        )
    for name, value, least in (("people", people, 1), ("repeat_every", repeat_every, 0)):
        if value < least:
            raise InvalidInput(f"{name}: expected a number of at least {least}, got {value}.")
    if not 0 <= port < 2**16:
        raise InvalidInput(f"port: expected a number from 0 to {2**16 - 1}, got {port}.")
    task = task or settings(run).get("task")
    if task is None:
        raise InvalidInput(f"task: expected one, since {run} has no config.yaml that names it.")
    find_task(task)
    try:
        listening = socket.create_server((host, port), family=_family(host))
    except OSError as error:
        raise InvalidInput(
            f"host, port: expected an address that is free, got {host} and {port}: {error}. "
            "Pass another --port; 0 takes any that is free."
        ) from error
    with listening:
        port = listening.getsockname()[1]
        app = make_app(
            run, Videos(run, task), host=host, port=port, people=people, repeat_every=repeat_every
        )
        shown = f"[{host}]" if ":" in host else host
        for token in app.tokens:
            # For one browser each, since it goes through the terminal's log and the clipboard.
            print(f"http://{shown}:{port}/?token={token}", flush=True)
        options = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="on",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        uvicorn.Server(options).run(sockets=[listening])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(label)
