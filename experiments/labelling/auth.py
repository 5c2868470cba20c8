"""Authentication of the labelling page: token, signed cookie, Host and Origin checks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import html
import ipaddress
import os
import secrets
import socket
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from string import Template
from typing import Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from active import Missing

MAX_BODY: Final = 4096  # bytes; a request of the page has about a hundred
_MONTH: Final = 30 * 24 * 3600
_HEADERS: Final = (
    # The page loads nothing from elsewhere, and no other site may frame it.
    (
        b"content-security-policy",
        b"default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; "
        b"form-action 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    # Not "no-referrer", with which a browser sends a form with the origin "null".
    (b"referrer-policy", b"same-origin"),
)
_NO_STORE: Final = {"cache-control": "no-store"}
_PUBLIC: Final = ("/page.css", "/icon.svg", "/enter.js")  # what the pages for strangers need
_NEW_LINK: Final = (
    "To get a new link, press Enter in the terminal in which `rewardmodels label` runs, or start "
    "that command again. Answers that were saved stay saved."
)
_NO_LINK: Final = f"This page opens by its own link only. {_NEW_LINK}"
_FORM: Final = Template(
    '<form method="post" action="/"><input type="hidden" name="token" value="$token">'
    '<button>Open the page</button></form><script src="/enter.js" defer></script>'
)


class Person(NamedTuple):
    """User of the page: the browser's session, and the name that they typed, or ""."""

    session: str
    name: str


class Authentication:
    """ASGI middleware that admits only browsers which opened a link with a valid token.

    A link shows a page whose script (or button) sends the token back, so that a preview, which
    only reads, doesn't use it up. The token is then exchanged for a signed cookie: by this machine
    as often as it likes, by another one once. Every request must name this server as its `Host`,
    and as its `Origin` if it has one.

    Args:
        app: The application behind it; finds a `Person` in `scope["state"]["person"]`.
        run: Run directory. The key that signs cookies is kept there, so that an open page goes on
            working after a restart of the server.
        host: Address that the server is bound to.
        port: Port that the server is bound to.
        people: Number of tokens.

    Attributes:
        tokens: Tokens that weren't exchanged by another machine yet; they end with the server.
    """

    def __init__(self, app: ASGIApp, *, run: Path, host: str, port: int, people: int) -> None:
        self.app, self.host, self.port = app, host, port
        self.tokens: list[str] = []
        for _ in range(people):
            self.add_token()
        self._key = _load_key(run / "label.key")
        self.cookie = f"label-{port}"  # browsers keep one jar for all ports of a host

    def add_token(self) -> str:
        """Make one more token; any thread may do so."""
        self.tokens.append(secrets.token_urlsafe(24))
        return self.tokens[-1]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # the page has no WebSocket

        async def secure_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        front = scope["path"] == "/"
        try:
            self._check_addresses(headers)
            person = self._identify(headers.get(b"cookie", ""))
            if not front and person is None and scope["path"] not in _PUBLIC:
                raise HTTPException(403, _NO_LINK)
            body: bytes | None = await _read_body(headers, receive)
            if front and (reply := self._enter(scope, body or b"", person)):
                return await reply(scope, receive, secure_send)
        except HTTPException as error:
            reply = (
                _page("This page can’t be opened", error.detail, error.status_code)
                if front
                else JSONResponse({"reason": error.detail}, error.status_code, _NO_STORE)
            )
            return await reply(scope, receive, secure_send)
        scope.setdefault("state", {})["person"] = person

        async def replay() -> Message:
            # After the body, the only message that can follow is that the browser disconnected.
            nonlocal body
            if body is not None:
                whole, body = body, None
                return {"type": "http.request", "body": whole, "more_body": False}
            return await receive()

        return await self.app(scope, replay, secure_send)

    def set_cookie(self, person: Person) -> str:
        """Value of a `Set-Cookie` header that identifies a person."""
        name = base64.urlsafe_b64encode(person.name.encode()).decode()
        text = f"{person.session}.{name}"
        return (
            f"{self.cookie}={text}.{self._sign(text)}; Path=/; Max-Age={_MONTH}; HttpOnly; "
            "SameSite=Strict"
        )

    def receipt(self, person: Person, kind: str, id: int) -> str:
        """Proof that a session gave some feedback, which only the server can make."""
        return self._sign(f"{kind} {id} {person.session}", b"receipt")

    def check_receipt(self, receipt: str, person: Person, kind: str, id: int) -> None:
        """Raise Missing unless the session gave this feedback, whatever its name is."""
        if not hmac.compare_digest(self.receipt(person, kind, id).encode(), receipt.encode()):
            raise Missing(f"id: expected the id of {kind} that this browser gave, got {id}.")

    def _check_addresses(self, headers: dict[bytes, str]) -> None:
        if not self._is_own_host(host := headers.get(b"host", "")):
            raise HTTPException(403, "Host: expected this server's own address.")
        if headers.get(b"origin", f"http://{host}") != f"http://{host}":
            raise HTTPException(403, "Origin: expected this server's own page.")

    def _enter(self, scope: Scope, body: bytes, person: Person | None) -> Response | None:
        """Reply to a request that brings a token; None to let a known person in without one."""
        post = scope["method"] == "POST"
        token = parse_qs((body if post else scope["query_string"]).decode("latin-1")).get("token")
        reply = RedirectResponse("/", 303, _NO_STORE)
        if person is not None:
            return reply if token else None
        if not token:
            raise HTTPException(403, _NO_LINK)
        given = token[0].encode()
        known = [one for one in self.tokens if hmac.compare_digest(one.encode(), given)]
        if not known:
            raise HTTPException(403, f"This link is wrong, or was used already. {_NEW_LINK}")
        if not post:
            form = _FORM.substitute(token=html.escape(token[0]))
            return _page("Which is better?", "You were asked to compare clips.", 200, form)
        if not is_loopback((scope.get("client") or [""])[0]):
            self.tokens.remove(known[0])
        reply.headers["set-cookie"] = self.set_cookie(Person(secrets.token_hex(12), ""))
        return reply

    def _sign(self, text: str, purpose: bytes = b"") -> str:
        return hmac.new(self._key + purpose, text.encode(), hashlib.sha256).hexdigest()

    def _identify(self, cookie_header: str) -> Person | None:
        try:
            value = SimpleCookie(cookie_header)[self.cookie].value
            text, _, signature = value.rpartition(".")
            if not hmac.compare_digest(self._sign(text), signature):
                return None
            session, _, name = text.partition(".")
            return Person(session, base64.urlsafe_b64decode(name).decode())
        except (KeyError, CookieError, ValueError, TypeError):
            return None

    def _is_own_host(self, host: str) -> bool:
        parts = urlsplit(f"//{host}")
        try:
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if port != self.port or host != parts.netloc or "@" in host:
            return False
        local = is_loopback(self.host)
        try:
            return ipaddress.ip_address(name).is_loopback or not local
        except ValueError:
            # Another site's name that resolves to us (DNS rebinding) must not pass.
            own = {"localhost", self.host.lower()}
            return name in (own if local else {*own, socket.gethostname().lower()})


def is_loopback(host: str) -> bool:
    """Return True if a server bound to `host` is reachable from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _page(title: str, text: str, status: int, form: str = "") -> Response:
    page = Template(Path(__file__).with_name("static").joinpath("enter.html").read_text("utf-8"))
    filled = page.substitute(title=html.escape(title), text=html.escape(text), form=form)
    return HTMLResponse(filled, status, _NO_STORE)


async def _read_body(headers: dict[bytes, str], receive: Receive) -> bytes:
    too_large = HTTPException(413, f"body: expected at most {MAX_BODY} bytes.")
    declared = headers.get(b"content-length", "0")
    if not declared.isdigit() or int(declared) > MAX_BODY:
        raise too_large
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise too_large
    return body


def _load_key(path: Path) -> bytes:
    """Return the key that signs cookies, made on first use and readable by its owner only."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "wb") as new:
            new.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    key = path.read_bytes()
    if len(key) == 32:
        return key
    path.unlink()  # a server was killed while writing it, so no cookie was signed with it yet
    return _load_key(path)
