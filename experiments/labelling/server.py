"""Server of the labelling page: routes, request bodies, and a reason for every refusal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from active import Conflict, Missing
from active.feedback import LEASE_SECONDS, check_teacher
from experiments.labelling.auth import Authentication, Person
from experiments.labelling.questions import Choice, Kind, Progress, Questions, RunGone
from experiments.labelling.videos import Videos, VideoUnavailable
from experiments.training.run_directory import RunDirectory
from rewardmodels import RewardModelsError, UnreadableFile

T = TypeVar("T")

_FILES: Final = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "enter.js": ("enter.js", "text/javascript; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
_STATUS: Final = {
    Missing: 404,
    VideoUnavailable: 501,
    Conflict: 409,
    RunGone: 410,
    UnreadableFile: 500,
    RewardModelsError: 422,
}
Id = Annotated[int, Field(ge=1, lt=2**63)]  # SQLite's integers
_DAY: Final = 24 * 3600.0  # seconds


def _sender(request: Request) -> Person:
    person: Person = request.state.person
    return person


_Sender = Annotated[Person, Depends(_sender)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Name(_Body):
    name: str = Field(max_length=64)


class _Answer(_Body):
    query: Id
    choice: Choice
    seconds: float = Field(ge=0, le=_DAY, allow_inf_nan=False)


class _ClipBody(_Body):
    query: Id
    side: Literal[0, 1]


class _Mark(_ClipBody):
    first: int = Field(ge=0, lt=2**31)
    last: int = Field(ge=0, lt=2**31)
    good: bool


class _Rating(_ClipBody):
    stars: int = Field(ge=1, le=5)


class _Undo(_Body):
    kind: Kind
    id: Id
    receipt: str


def make_app(
    run: Path,
    videos: Videos,
    *,
    host: str,
    port: int,
    people: int = 1,
    repeat_every: int = 10,
    lease_seconds: float = LEASE_SECONDS,
) -> Authentication:
    """Build the application of a run's page, behind its authentication.

    Args:
        run: Run directory.
        videos: Videos of its clips.
        host: Address that the server is bound to.
        port: Port that the server is bound to.
        people: Number of links, each for one browser.
        repeat_every: Answers of a person after which one of their queries is repeated; 0: never.
        lease_seconds: Seconds for which a person keeps a query while their page is silent.

    Raises:
        UnreadableFile: The feedback store is damaged; it is left unchanged.
    """
    open_questions = partial(Questions, run, repeat_every, lease_seconds)
    open_questions().store.close()  # refuse a damaged store before anything is served

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # The store belongs to one thread; everything that reads or writes it queues there.
        with ThreadPoolExecutor(1) as thread:
            loop = asyncio.get_running_loop()
            app.state.questions = await loop.run_in_executor(thread, open_questions)
            app.state.thread = thread
            app.state.best_checkpoint = []
            videos.start()
            videos.prefetch(await _call(app, Questions.first_clips))
            warning = asyncio.create_task(_warn(videos))
            yield
            warning.cancel()
            await videos.stop()
            await _call(app, lambda questions: questions.store.close())

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    authentication = Authentication(app, run=run, host=host, port=port, people=people)
    _add_files(app, run, videos)
    _add_api(app, authentication, videos)
    _add_error_handlers(app)
    return authentication


async def _warn(videos: Videos) -> None:
    if reason := await videos.obstacle():
        print(f"Warning: no clip can be shown here: {reason}", file=sys.stderr, flush=True)


def _add_files(app: FastAPI, run: Path, videos: Videos) -> None:
    @app.get("/video/best")
    async def best() -> Response:
        newest = RunDirectory(run).checkpoints[-1:]
        if newest != app.state.best_checkpoint:  # not more often: it takes seconds from the pairs
            app.state.best_checkpoint = newest
            videos.forget("best")
        return _video(await videos.get("best"))

    @app.get("/video/{clip}")
    async def video(clip: int) -> Response:
        if not 0 < clip < 2**63 or not await _call(app, Questions.has_clip, clip):
            raise Missing(f"clip: expected a clip in the store, got {clip}.")
        return _video(await videos.get(clip))

    @app.get("/")
    @app.get("/{name}")
    async def file(name: str = "") -> Response:
        if name not in _FILES:
            raise HTTPException(404, "path: expected a file of the page.")
        path, kind = _FILES[name]
        static = Path(__file__).with_name("static")
        return FileResponse(static / path, media_type=kind, headers={"cache-control": "no-cache"})


def _add_api(app: FastAPI, authentication: Authentication, videos: Videos) -> None:
    async def state(person: Person, **more: Any) -> dict[str, Any]:
        state = await _call(app, Questions.state, person)
        shown = state.get("queries", [])
        videos.prefetch([clip["id"] for query in shown for clip in query["clips"]])
        return {"name": person.name, **state, **more}

    def given(person: Person, kind: Kind, id: int) -> dict[str, Any]:
        return {"kind": kind, "id": id, "receipt": authentication.receipt(person, kind, id)}

    @app.post("/api/name")
    async def name(person: _Sender, body: _Name) -> Response:
        person = person._replace(name=body.name.strip())
        check_teacher(person.name)
        cookie = {"set-cookie": authentication.set_cookie(person)}
        return JSONResponse(await state(person), headers=cookie)

    @app.post("/api/next")
    async def next_(person: _Sender) -> dict[str, Any]:
        progress = await _call(app, Questions.progress)
        if progress.state not in ("over", "gone") and (reason := await videos.obstacle()):
            text = f"No clip can be shown here, so that there is nothing to compare. {reason}"
            text += " Start `rewardmodels label` again once that is mended."
            progress = Progress("unshown", text)
        elif person.name:
            return await state(person)
        return {"name": person.name, "run": progress._asdict()}

    @app.post("/api/answer")
    async def answer(person: _Sender, body: _Answer) -> dict[str, Any]:
        id = await _call(app, Questions.answer, person, **body.model_dump())
        return await state(person, **given(person, "answer", id))

    @app.post("/api/mark")
    async def mark(person: _Sender, body: _Mark) -> dict[str, Any]:
        id = await _call(app, Questions.mark, person, **body.model_dump())
        return given(person, "mark", id)

    @app.post("/api/rate")
    async def rate(person: _Sender, body: _Rating) -> dict[str, Any]:
        id = await _call(app, Questions.rate, person, **body.model_dump())
        return given(person, "rating", id)

    @app.post("/api/undo")
    async def undo(person: _Sender, body: _Undo) -> dict[str, Any]:
        authentication.check_receipt(body.receipt, person, body.kind, body.id)
        query = await _call(app, Questions.undo, person, body.kind, body.id)
        return await state(person, query=query)

    @app.post("/api/leave")
    async def leave(person: _Sender) -> dict[str, Any]:
        await _call(app, lambda questions: questions.store.leases.release(person.session))
        return {}

    @app.get("/api/learned")
    async def learned() -> dict[str, Any]:
        return {"curve": await _call(app, Questions.learning_curve)}


def _add_error_handlers(app: FastAPI) -> None:
    """Turn every error into JSON with a reason."""

    async def known(request: Request, error: Exception) -> Response:
        status = next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
        return JSONResponse({"reason": str(error)}, status)

    app.add_exception_handler(RewardModelsError, known)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"reason": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        # The input isn't repeated in the reply: it may be anything.
        places = [(".".join(map(str, e["loc"][1:])) or "body", e["msg"]) for e in error.errors()]
        return JSONResponse({"reason": "; ".join(map(": ".join, places))}, 422)


async def _call(app: FastAPI, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a method of `Questions` in the thread that owns the store."""
    call = partial(method, app.state.questions, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(app.state.thread, call)


def _video(path: Path | None) -> Response:
    if path is None:
        raise HTTPException(404, "video: expected a learned reward, but there is none yet.")
    # A clip's video never changes; the best clip's does, under the same address.
    age = "no-cache" if path.name.startswith("best") else "max-age=31536000, immutable"
    headers = {"cache-control": f"private, {age}"}
    return FileResponse(path, media_type="video/mp4", headers=headers)
