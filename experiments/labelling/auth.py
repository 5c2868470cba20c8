"""Authentication of the labelling page: one-time token, signed cookie, Host and Origin checks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    (b"referrer-policy", b"no-referrer"),
)
_NO_STORE: Final = {"cache-control": "no-store"}


class Person(NamedTuple):
    """User of the page: the browser's session, and the name that they typed, or ""."""

    session: str
    name: str


class Authentication:
    """ASGI middleware that admits only browsers which opened a link with an unused token.

    The token is exchanged for a signed cookie. Every request must name this server as its `Host`,
    and as its `Origin` if it has one.

    Args:
        app: The application behind it; finds a `Person` in `scope["state"]["person"]`.
        run: Run directory. The key that signs cookies is kept there, so that an open page goes on
            working after a restart of the server.
        host: Address that the server is bound to.
        port: Port that the server is bound to.
        people: Number of tokens; each works once.
    """

    def __init__(self, app: ASGIApp, *, run: Path, host: str, port: int, people: int) -> None:
        self.app, self.host, self.port = app, host, port
        self.tokens = [secrets.token_urlsafe(24) for _ in range(people)]
        self._unused = set(self.tokens)
        self._key = _load_key(run / "label.key")
        self.cookie = f"label-{port}"  # browsers keep one jar for all ports of a host

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
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        try:
            self._check_addresses(headers)
            person = self._identify(headers.get(b"cookie", ""))
            if scope["path"] == "/" and token:
                return await self._exchange(token, person)(scope, receive, secure_send)
            if person is None:
                raise HTTPException(
                    403,
                    "token: expected the link that `rewardmodels label` printed, which works "
                    "once; start the command again for a new one.",
                )
            body: bytes | None = await _read_body(headers, receive)
        except HTTPException as error:
            reply = JSONResponse({"reason": error.detail}, error.status_code, _NO_STORE)
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

    def _check_addresses(self, headers: dict[bytes, str]) -> None:
        if not self._is_own_host(host := headers.get(b"host", "")):
            raise HTTPException(403, "Host: expected this server's own address.")
        if headers.get(b"origin", f"http://{host}") != f"http://{host}":
            raise HTTPException(403, "Origin: expected this server's own page.")

    def _exchange(self, token: str, person: Person | None) -> Response:
        reply = RedirectResponse("/", 303, _NO_STORE)
        if person is None:
            if token not in self._unused:
                raise HTTPException(
                    403, "token: expected an unused one; start the command again for a new link."
                )
            self._unused.discard(token)
            reply.headers["set-cookie"] = self.set_cookie(Person(secrets.token_hex(12), ""))
        return reply

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

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
