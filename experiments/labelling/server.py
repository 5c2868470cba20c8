"""The page's server: what the browser may ask for, each answered or refused with a reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from active import Conflict, Missing
from active.leases import SECONDS
from experiments.labelling.best import newest_checkpoint
from experiments.labelling.desk import Choice, Desk, Kind
from experiments.labelling.gate import Gate, Person
from experiments.labelling.videos import NotDrawn, Videos
from rewardmodels import RewardModelsError, UnreadableFile

T = TypeVar("T")

_FILES: Final = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
Id = Annotated[int, Field(ge=1, lt=2**63)]  # what SQLite counts to
_DAY: Final = 24 * 3600.0


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Named(_Body):
    """What somebody wants to be called."""

    name: str = Field(
        min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*\S[^\x00-\x1f\x7f]*$"
    )


class Answered(_Body):
    """An answer to a query."""

    query: Id
    choice: Choice
    seconds: float = Field(ge=0, le=_DAY, allow_inf_nan=False)


class Marked(_Body):
    """A stretch of one of a query's clips."""

    query: Id
    side: Literal[0, 1]
    first: int = Field(ge=0, lt=2**31)
    last: int = Field(ge=0, lt=2**31)
    good: bool


class Rated(_Body):
    """A rating of one of a query's clips."""

    query: Id
    side: Literal[0, 1]
    stars: int = Field(ge=1, le=5)


class Undone(_Body):
    """What is to be taken back."""

    kind: Kind
    id: Id


def make_app(
    run: Path,
    videos: Videos,
    *,
    host: str,
    port: int,
    people: int = 1,
    repeat_every: int = 10,
    lease_seconds: float = SECONDS,
) -> Gate:
    """The application, behind its gate.

    Args:
        run: The run's directory.
        videos: Draws its clips.
        host: What the server is bound to.
        port: Its port.
        people: Links to give out, each for one browser.
        repeat_every: Answers of a person after which a query is put once more; 0 for never.
        lease_seconds: How long somebody keeps a query whose page gives no sign of life.

    Raises:
        UnreadableFile: The store is damaged; it is left as it was.
    """
    make_desk = partial(Desk, run, repeat_every, lease_seconds)
    make_desk().close()  # what is damaged is refused before anything is served

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        # The store belongs to one thread, in which everything that reads or writes it takes turns.
        with ThreadPoolExecutor(1) as thread:
            loop = asyncio.get_running_loop()
            app.state.desk = await loop.run_in_executor(thread, make_desk)
            app.state.thread = thread
            app.state.best_of = None
            videos.start()
            videos.want(await _at_desk(app, lambda desk: desk.first_clips()))
            yield
            await videos.stop()
            await loop.run_in_executor(thread, app.state.desk.close)

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    gate = Gate(app, run=run, host=host, port=port, people=people)
    _serve_files(app, run, videos)
    _serve_people(app, gate, videos)
    _explain(app)
    return gate


def _serve_files(app: FastAPI, run: Path, videos: Videos) -> None:
    @app.get("/video/best")
    async def best() -> Response:
        newest = newest_checkpoint(run)
        if newest != app.state.best_of:  # drawing it anew takes seconds from the pairs'
            app.state.best_of = newest
            videos.forget("best")
        return _video(await videos.get("best"))

    @app.get("/video/{clip}")
    async def video(clip: int) -> Response:
        if not 0 < clip < 2**63 or not await _at_desk(app, lambda desk: desk.knows(clip)):
            raise Missing(f"clip: expected a clip in the store, got {clip}.")
        return _video(await videos.get(clip))

    @app.get("/")
    @app.get("/{name}")
    async def file(name: str = "") -> Response:
        if name not in _FILES:
            raise HTTPException(404, "path: expected one that the page asks for.")
        path, kind = _FILES[name]
        headers = {"cache-control": "no-cache"}
        static = Path(__file__).with_name("static")
        return FileResponse(static / path, media_type=kind, headers=headers)


def _serve_people(app: FastAPI, gate: Gate, videos: Videos) -> None:
    async def shown(person: Person, **more: Any) -> dict[str, Any]:
        state = await _at_desk(app, lambda desk: desk.next(person))
        videos.want([clip["id"] for query in state["queries"] for clip in query["clips"]])
        return {"name": person.name, **state, **more}

    @app.post("/api/name")
    async def name(request: Request, body: Named) -> Response:
        person = _person(request)._replace(name=body.name.strip())
        answer = JSONResponse(await shown(person))
        answer.headers["set-cookie"] = gate.signed(person)
        return answer

    @app.post("/api/next")
    async def next_(request: Request) -> dict[str, Any]:
        person = _person(request)
        return await shown(person) if person.name else {"name": ""}

    @app.post("/api/answer")
    async def answer(request: Request, body: Answered) -> dict[str, Any]:
        person = _person(request)
        id = await _at_desk(
            app, lambda desk: desk.answer(person, body.query, body.choice, body.seconds)
        )
        return await shown(person, kind="answer", id=id)

    @app.post("/api/mark")
    async def mark(request: Request, body: Marked) -> dict[str, Any]:
        person = _person(request)
        id = await _at_desk(app, lambda desk: desk.mark(person, **body.model_dump()))
        return {"kind": "mark", "id": id}

    @app.post("/api/rate")
    async def rate(request: Request, body: Rated) -> dict[str, Any]:
        person = _person(request)
        id = await _at_desk(app, lambda desk: desk.rate(person, **body.model_dump()))
        return {"kind": "rating", "id": id}

    @app.post("/api/undo")
    async def undo(request: Request, body: Undone) -> dict[str, Any]:
        person = _person(request)
        query = await _at_desk(app, lambda desk: desk.undo(person, body.kind, body.id))
        return await shown(person, query=query)

    @app.post("/api/leave")
    async def leave(request: Request) -> dict[str, Any]:
        await _at_desk(app, lambda desk: desk.leave(_person(request)))
        return {}

    @app.get("/api/learned")
    async def learned() -> dict[str, Any]:
        return {"curve": await _at_desk(app, lambda desk: desk.learned())}


def _explain(app: FastAPI) -> None:
    """A reason for everything that is refused, as JSON."""

    def said(status: int) -> Callable[[Request, Exception], Response]:
        return lambda request, error: JSONResponse({"reason": str(error)}, status)

    for kind, status in (
        (Missing, 404),
        (NotDrawn, 501),
        (Conflict, 409),
        (UnreadableFile, 500),
        (RewardModelsError, 422),
    ):
        app.add_exception_handler(kind, said(status))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"reason": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        # What came isn't repeated: it may be anything.
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()
        )
        return JSONResponse({"reason": wrong}, 422)


async def _at_desk(app: FastAPI, job: Callable[[Desk], T]) -> T:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(app.state.thread, lambda: job(app.state.desk))


def _person(request: Request) -> Person:
    person: Person = request.state.person
    return person


def _video(path: Path | None) -> Response:
    if path is None:
        raise HTTPException(404, "video: expected one to show, but the agent knows nothing yet.")
    # Named by its content's digest in our folder, and by its clip's number here: it never changes.
    how_long = "no-cache" if path.name.startswith("best") else "max-age=31536000, immutable"
    headers = {"cache-control": f"private, {how_long}"}
    return FileResponse(path, media_type="video/mp4", headers=headers)
