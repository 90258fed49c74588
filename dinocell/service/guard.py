"""What every request must pass: host, origin, token, size; and the headers of every answer."""

import ipaddress
import json
import math
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException

from dinocell.service.options import ServiceOptions, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Refusal = tuple[int, str, dict[str, str] | None]

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_FORM_BYTES = 2**16  # of a multipart form beside its file


def problem(
    status: int, detail: str, headers: dict[str, str] | None = None
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an error as RFC 9457 wants it."""
    title = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return json.dumps(body).encode(), {
        "content-type": "application/problem+json",
        **(headers or {}),
    }


_LARGEST_AT_ONCE = 4
"""Uploads of the largest size that may be in temporary files at once, or more smaller ones."""

_MOST_WRONG, _WINDOW_S = 10, 60.0
"""Wrong tokens from an address within so many seconds after which it is asked to wait."""

_MOST_ADDRESSES = 10_000  # that are remembered


class _WrongTokens:
    """When wrong tokens came, by address.

    The /64 of an IPv6 address counts, of which one computer usually has all addresses.
    """

    def __init__(self) -> None:
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def note(self, address: str) -> None:
        """A wrong token came from there."""
        key = _place_of(address)
        times = self._times.setdefault(key, deque(maxlen=_MOST_WRONG))
        times.append(time.monotonic())
        self._times.move_to_end(key)
        if len(self._times) > _MOST_ADDRESSES:
            self._times.popitem(last=False)

    def wait_s(self, address: str) -> float:
        """How long the next wrong token from there is answered with 429; the right one always passes."""
        times = self._times.get(_place_of(address))
        if times is None or len(times) < _MOST_WRONG:
            return 0.0
        return _WINDOW_S - (time.monotonic() - times[0])


def _place_of(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a socket of the file system
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)


class Guard:
    """ASGI middleware; refuses with problem+json.

    Without a token, only names of this computer are accepted as host: a page of another site whose name
    was pointed to this computer (DNS rebinding) cannot read or send anything.  With and without, a
    request that another site's page makes (`Origin`) is refused.
    """

    def __init__(self, app: Any, options: ServiceOptions) -> None:
        self.app, self.options = app, options
        self._bytes = 0  # of all requests that are being answered
        self._wrong = _WrongTokens()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message.get("headers", [])}
                message["headers"] = [
                    *message.get("headers", []),
                    *(
                        (k.encode(), v.encode())
                        for k, v in HEADERS.items()
                        if k.encode() not in own
                    ),
                ]
            await send(message)

        given = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        address = (scope.get("client") or ("",))[0]
        refusal = self._refusal(given) or self._token_refusal(
            scope["path"], given.get("authorization", ""), address
        )
        if refusal is None:
            seen: list[int] = []
            try:
                await self.app(scope, self._counted(receive, seen), send_with_headers)
            finally:
                self._bytes -= sum(seen)
            return
        status, detail, extra = refusal
        body, headers = problem(status, detail, extra)
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
        await send_with_headers(start)
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, given: dict[str, str]) -> Refusal | None:
        host = given.get("host", "")
        if self.options.token is None and not self._is_own(_name_of(host)):
            return 403, "The host must be a name of this computer: open http://127.0.0.1", None
        origin = given.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Pages of other sites may not use the service: open its own page", None
        length = given.get("content-length", "")
        if length.isdecimal() and int(length[:18]) > self._limit():
            return 413, self._too_large(), {"connection": "close"}
        return None

    def _token_refusal(self, path: str, authorization: str, address: str) -> Refusal | None:
        """The right token is let in at all times: behind a proxy all users may have one address."""
        if self.options.token is None or not _is_protected(path):
            return None
        kind, _, token = authorization.partition(" ")
        token, right = token.strip(), self.options.token.encode()
        if kind.lower() == "bearer" and secrets.compare_digest(token.encode("latin-1"), right):
            return None
        if authorization and (wait_s := math.ceil(self._wrong.wait_s(address))) > 0:
            text = f"{_MOST_WRONG} wrong tokens came from this address within {_WINDOW_S:g} s"
            return 429, f"{text}: try again in {wait_s} s", {"retry-after": str(wait_s)}
        if authorization:
            self._wrong.note(address)
        return (
            401,
            "The token is missing or wrong: send it as `Authorization: Bearer TOKEN`",
            {"www-authenticate": "Bearer"},
        )

    def _is_own(self, name: str) -> bool:
        return is_loopback(name) or name == self.options.host

    def _limit(self) -> int:
        return self.options.max_bytes + _FORM_BYTES

    def _too_large(self) -> str:
        return f"An upload may have up to {self.options.max_mb:g} MB: send a smaller file"

    def _counted(self, receive: Receive, seen: list[int]) -> Receive:
        """Stops requests that become too large, alone or together; an upload is a file until its answer."""

        async def counted() -> MutableMapping[str, Any]:
            message = await receive()
            size = len(message.get("body", b""))
            seen.append(size)
            self._bytes += size
            if sum(seen) > self._limit():
                raise HTTPException(413, self._too_large())
            if self._bytes > _LARGEST_AT_ONCE * self._limit():
                raise HTTPException(
                    429, "Too many uploads arrive at once: try again later", {"retry-after": "5"}
                )
            return message

        return counted


def _name_of(host: str) -> str:
    """`localhost:8000` → `localhost`, `[::1]:8000` → `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_protected(path: str) -> bool:
    return path.startswith("/api/") or path == "/metrics"
