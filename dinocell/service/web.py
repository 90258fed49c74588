"""Images that the service fetches over HTTP, below addresses that whoever started it has named.

Compared are scheme, host, port and the parts of the path, each decoded once.  What servers may understand
in several ways (`..`, an encoded slash, a second encoding) is refused, and so are redirects to elsewhere.
"""

import http.client
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

from dinocell.errors import DINOCellError, UsageError
from dinocell.service.queue import QueueFullError
from dinocell.service.reading import ForbiddenError, is_web

LONGEST_S = 300.0
"""How long all of a file may take."""

_SILENCE_S = 30.0  # the longest wait for the next bytes
_MOST_REDIRECTS = 3
_BLOCK_BYTES = 2**16
_places = threading.BoundedSemaphore(4)  # files at once; each holds a thread of the service


class WebError(DINOCellError):
    """A file could not be fetched; `status` is that of the answer."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _DiskError(Exception):
    """The own disk, not the other server, has failed with `error`."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


class Address(NamedTuple):
    """An address on the web, in a form that can be compared; `parts` are those of the path."""

    scheme: str
    host: str
    port: int
    parts: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Address":
        """Take an address apart; UsageError if it is none, or not plain."""
        with suppress(ValueError):  # of a wrong port or host
            found = urlsplit(text)
            parts = tuple(map(unquote, found.path.split("/")[1:]))
            usual = {"http": 80, "https": 443}.get(found.scheme, 0)
            port = usual if found.port is None else found.port
            plain = text.isprintable() and not set(text) & set(" \\?#@")
            (found.hostname or "").encode("idna")  # a UnicodeError is a ValueError
            if plain and is_web(text) and found.hostname and port and all(map(_is_plain, parts)):
                return cls(found.scheme, found.hostname, port, parts)
        raise UsageError(
            f"An address must be http(s)://HOST/PATH without user, query, fragment and `..`, got {text!r}: "
            "correct it"
        )

    def is_below(self, other: "Address") -> bool:
        """Whether it is that of a file below another one."""
        is_longer = len(self.parts) > len(other.parts)
        return self[:3] == other[:3] and is_longer and self.parts[: len(other.parts)] == other.parts


def _is_plain(part: str) -> bool:
    return part.isprintable() and part not in ("", ".", "..") and not set(part) & set("/\\%;\ufffd")


def web_places(given: Sequence[str]) -> tuple[Address, ...]:
    """The addresses among what `serve` may read from; UsageError as for `Address.of`."""
    return tuple(Address.of(text.rstrip("/")) for text in given if is_web(text))


def allowed(text: str, places: Sequence[Address]) -> Address:
    """The address of a file; UsageError as for `Address.of`, ForbiddenError if it is below none of `places`."""
    address = Address.of(text)
    if not any(address.is_below(place) for place in places):
        raise ForbiddenError(
            "The service may not read there: choose an address below one that it was started with"
        )
    return address


def fetch(address: Address, places: Sequence[Address], target: Path, max_mb: float) -> None:
    """Write the file at an address of `allowed` to `target`, which may be incomplete after an error.

    Raises UsageError (there is no such file, or it is empty); ForbiddenError (it is elsewhere);
    WebError (413: above `max_mb`; 502: the other server fails; 504: it takes too long); OSError (the own
    disk is full or fails); QueueFullError (others are being fetched).
    """
    if not _places.acquire(blocking=False):
        raise QueueFullError("As many files as can be at once are being fetched: try again later")
    until = time.monotonic() + LONGEST_S
    try:
        for _ in range(_MOST_REDIRECTS + 1):
            moved = _fetch(address, target, max_mb, until)
            if moved is None:
                return
            try:
                address = allowed(moved, places)
            except (UsageError, ForbiddenError) as error:
                raise ForbiddenError(
                    "The other server redirects to where the service may not read: choose another file"
                ) from error
        raise WebError(502, "The other server redirects too often: give the last address")
    except _DiskError as error:
        raise error.error from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or time.monotonic() > until:
            raise WebError(504, "The other server is too slow: try again later") from error
        raise WebError(502, f"The other server does not answer well ({error})") from error
    finally:
        _places.release()


def _fetch(address: Address, target: Path, max_mb: float, until: float) -> str | None:
    """One request; returns where it is redirected to."""
    is_safe = address.scheme == "https"
    kind = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
    connection = kind(
        address.host, address.port, timeout=max(0.1, min(_SILENCE_S, until - time.monotonic()))
    )
    path = "/" + "/".join(quote(part, safe="") for part in address.parts)

    def end() -> None:  # also where single bytes come for ever
        with suppress(OSError):
            plug.shutdown(socket.SHUT_RDWR)

    answer: http.client.HTTPResponse | None = None
    connection.connect()
    plug = connection.sock  # the connection lets go of it before the answer is read
    timer = threading.Timer(max(0.0, until - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
        connection.request("GET", path, headers={"accept-encoding": "identity"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            host = f"[{address.host}]" if ":" in address.host else address.host
            here = f"{address.scheme}://{host}:{address.port}{path}"
            return urljoin(here, answer.headers.get("location", ""))
        if answer.status in (404, 410):
            raise UsageError("`path` must be the address of a file, and there is none: check it")
        if answer.status != 200:
            raise WebError(502, f"The other server answers {answer.status} {answer.reason}")
        _write(answer, target, max_mb)
        if time.monotonic() > until:
            raise TimeoutError
    finally:
        timer.cancel()
        if answer is not None:
            answer.close()
        connection.close()
    return None


def _write(answer: http.client.HTTPResponse, target: Path, max_mb: float) -> None:
    size, left = 0, answer.length or 0
    try:
        file = target.open("wb", buffering=0)  # so that closing it writes nothing
    except OSError as error:
        raise _DiskError(error) from error
    with file:
        while block := answer.read1(_BLOCK_BYTES) if size + left <= 1e6 * max_mb else b"":
            try:
                written = 0
                while written < len(block):
                    written += file.write(block[written:])
            except OSError as error:
                raise _DiskError(error) from error
            size += len(block)
            left = answer.length or 0
    if size + left > 1e6 * max_mb:
        raise WebError(413, f"A file may have up to {max_mb:g} MB: choose a smaller one")
    if left:
        raise http.client.IncompleteRead(b"", left)
    if not size:
        raise UsageError(
            "`path` must lead to a file that is not empty, got 0 bytes: choose another"
        )
