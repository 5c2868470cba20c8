"""Who may in: this machine's own addresses, a token that works once, then a signed cookie."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY: Final = 4096  # bytes; what the page sends has a hundred
_MONTH: Final = 30 * 24 * 3600
_HEADERS: Final = (
    # Nothing comes from elsewhere, and nobody may show the page in theirs.
    (
        b"content-security-policy",
        b"default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; "
        b"form-action 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Person(NamedTuple):
    """Somebody at an open page: the browser's session, and the name that they gave, or ""."""

    session: str
    name: str


class Gate:
    """Middleware that lets requests through only from people who came by a link with a token.

    Args:
        app: What is behind it; finds a `Person` in `scope["state"]["person"]`.
        run: The run's directory: the key that signs cookies is kept there, so that an open page
            goes on working when the server was started anew.
        host: What the server is bound to.
        port: Its port.
        people: How many tokens to give out; each works once.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        run: Path,
        host: str,
        port: int,
        people: int,
    ) -> None:
        self.app, self.host, self.port = app, host, port
        self.tokens = [secrets.token_urlsafe(24) for _ in range(people)]
        self._unused = set(self.tokens)
        self._key = _key(run / "label.key")
        self.cookie = f"label-{port}"  # browsers keep one jar for all ports of a host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # a WebSocket is never accepted: we have none

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not self._is_ours(headers.get(b"host", "")):
            return await refuse(answer, 403, "Host: expected this server's own address.")
        origin = headers.get(b"origin")
        if origin is not None and origin != f"http://{headers[b'host']}":
            return await refuse(answer, 403, "Origin: expected this server's own page.")
        person = self._known(headers.get(b"cookie", ""))
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and token:
            return await self._let_in(answer, person, token)
        if person is None:
            why = (
                "token: expected the link that `rewardmodels label` printed, which works once; "
                "start the command again for another."
            )
            return await refuse(answer, 403, why)
        scope.setdefault("state", {})["person"] = person
        try:
            body: bytes | None = await _body(headers, receive)
        except _TooLarge:
            return await refuse(answer, 413, f"body: expected at most {MAX_BODY} bytes.")

        async def replay() -> Message:
            # Once the body is read, what comes next can only be that the browser has gone.
            nonlocal body
            if body is not None:
                whole, body = body, None
                return {"type": "http.request", "body": whole, "more_body": False}
            return await receive()

        return await self.app(scope, replay, answer)

    def signed(self, person: Person) -> str:
        """A `Set-Cookie` header's value that says who somebody is."""
        named = base64.urlsafe_b64encode(person.name.encode()).decode()
        text = f"{person.session}.{named}"
        return (
            f"{self.cookie}={text}.{self._sign(text)}; Path=/; Max-Age={_MONTH}; HttpOnly; "
            "SameSite=Strict"
        )

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def _known(self, header: str) -> Person | None:
        try:
            value = SimpleCookie(header)[self.cookie].value
            text, _, signature = value.rpartition(".")
            if not hmac.compare_digest(self._sign(text), signature):
                return None
            session, _, named = text.partition(".")
            return Person(session, base64.urlsafe_b64decode(named).decode())
        except (KeyError, CookieError, ValueError, TypeError):
            return None

    def _is_ours(self, host: str) -> bool:
        parts = urlsplit(f"//{host}")
        try:
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if port != self.port or host != parts.netloc or "@" in host:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            # Somebody else's name that leads here is how a foreign page would reach us.
            ours = {"localhost", self.host.lower()}
            return name in (ours if loopback(self.host) else {*ours, socket.gethostname().lower()})
        return address.is_loopback or not loopback(self.host)

    async def _let_in(self, send: Send, person: Person | None, token: str) -> None:
        headers = [(b"location", b"/"), (b"cache-control", b"no-store")]
        if person is None:
            if token not in self._unused:
                why = "token: expected one that was not used yet; start the command again."
                return await refuse(send, 403, why)
            self._unused.discard(token)
            cookie = self.signed(Person(secrets.token_hex(12), ""))
            headers.append((b"set-cookie", cookie.encode()))
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return None


def loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a server that is bound to this."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answers with a reason, as JSON."""
    headers: Iterable[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": [*headers]})
    await send({"type": "http.response.body", "body": json.dumps({"reason": reason}).encode()})


class _TooLarge(Exception):
    pass


async def _body(headers: dict[bytes, str], receive: Receive) -> bytes:
    said = headers.get(b"content-length", "0")
    if not said.isdigit() or int(said) > MAX_BODY:
        raise _TooLarge
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise _TooLarge
    return body


def _key(path: Path) -> bytes:
    """The key that signs cookies; whoever can read it can read the answers themselves."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "wb") as new:
            new.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    key = path.read_bytes()
    if len(key) == 32:
        return key
    path.unlink()  # a server was killed while it wrote it: nobody has a cookie of it yet
    return _key(path)
