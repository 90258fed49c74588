"""One file from a folder or over HTTP; a broken download continues where it stopped."""

import json
import os
import shutil
import ssl
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from dinocell.errors import DINOCellError, UsageError
from dinocell.files import write_text_atomically
from dinocell.progress import progress

_TRIES = 6
_BACKOFF_S = 0.2  # before the second try, then twice as long each time
_BLOCK = 2**16  # up to so many bytes are lost when a connection breaks
_TIMEOUT_S = 60.0
_HUB = "huggingface.co"  # the only host that gets HF_TOKEN


@dataclass(frozen=True)
class Advice:
    """The ends of messages: what to do when a server does not give a file."""

    refused: str  # after 401 and 403
    missing: str = "check `source`"  # after 404 and its like


def is_url(place: str) -> bool:
    """Whether a place is opened over HTTP."""
    return urllib.parse.urlsplit(place).scheme in ("http", "https")


def bring(place: str, part: Path, advice: Advice, *, offline: bool = False) -> None:
    """Copy or download one file.

    Parameters
    ----------
    place : URL of the file, its path, or a folder (path or file URL) that holds it
    part : where the file goes, named like the file with one more suffix.  If it exists, the download
        continues from its end; `part.json` beside it knows which file it is a part of.
    advice : for the messages
    offline : open no connection; `DINOCELL_OFFLINE=1` does the same

    Raises UsageError (the file cannot be had from there; the message says why); DINOCellError (the
    connection failed several times; the part that came is kept and continued next time).
    """
    if is_url(place):
        if offline or os.environ.get("DINOCELL_OFFLINE", "0") not in ("", "0"):
            raise UsageError(
                f"{part.stem} must be in {part.parent} when offline, but it is not: fetch it while "
                "connected, or give a folder as `source`"
            )
        _download(place, part, advice)
        return
    url = urllib.parse.urlsplit(place)
    local = Path(urllib.request.url2pathname(url.path) if url.scheme == "file" else place)
    local = local / part.stem if local.is_dir() else local
    if not local.is_file():
        raise UsageError(
            f"`source` must hold {part.stem}, got {place} without it: check the folder"
        )
    shutil.copyfile(local, part)


class _Adapter(HTTPAdapter):
    """Trusts the certificates of this machine and of SSL_CERT_FILE besides those of requests."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=ssl.create_default_context(), **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=ssl.create_default_context(), **kwargs)


class _Session(requests.Session):
    """Follows redirects, but never from https to http; repeats what a busy server leaves unanswered.

    requests drops the header with the token when a redirect leaves the host.
    """

    def __init__(self) -> None:
        super().__init__()
        how: dict[str, Any] = {
            "backoff_factor": _BACKOFF_S,
            "backoff_max": 5,
            "raise_on_status": False,
        }
        retries = Retry(_TRIES - 1, status_forcelist=(429, 500, 502, 503, 504), **how)
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(max_retries=retries))

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target and resp.url.startswith("https:"):
            absolute = urllib.parse.urljoin(resp.url, target)
            if not absolute.startswith("https:"):
                raise UsageError(
                    f"{_shown(resp.url)} must stay on https, got a redirect to {_shown(absolute)}: use "
                    "another `source`"
                )
        return target


def _download(url: str, part: Path, advice: Advice) -> None:
    """Continue `part` until the whole file has arrived."""
    with _Session() as session:
        for _ in range(_TRIES):
            try:
                answer = session.get(
                    url,
                    headers=_headers(part),
                    auth=_with_token,
                    stream=True,
                    timeout=_TIMEOUT_S,
                )
            except requests.exceptions.SSLError as error:
                raise UsageError(
                    f"{_shown(url)} must have a certificate that this machine trusts, got {error}: set "
                    "SSL_CERT_FILE to the certificates of your network"
                ) from error
            except requests.exceptions.ConnectionError as error:
                if _size(part):
                    raise _interrupted(url, error) from error
                raise DINOCellError(
                    f"{urllib.parse.urlsplit(url).hostname} must be within reach, got no connection in "
                    f"{_TRIES} tries: check the network, or fetch {_shown(url)} on another computer"
                ) from error
            except requests.exceptions.RequestException as error:
                raise _interrupted(url, error) from error
            with answer:
                if answer.status_code == 416:  # no bytes are left, or the file has changed
                    if _size(part) != _facts(part).get("total"):
                        part.unlink(missing_ok=True)
                        continue
                    break
                _refuse_failure(url, answer, advice)
                try:
                    if _receive(answer, part):
                        break
                    reason: object = f"an end after {_size(part)} bytes"
                except (
                    requests.exceptions.ChunkedEncodingError,
                    requests.exceptions.ConnectionError,
                ) as error:
                    reason = error
        else:
            raise _interrupted(url, reason)
    _facts_path(part).unlink(missing_ok=True)


def _headers(part: Path) -> dict[str, str]:
    """Ask for what follows `part`, or for all if the file at the source has changed since."""
    headers = {"Accept-Encoding": "identity"}
    if begun := _size(part):
        headers["Range"] = f"bytes={begun}-"
        if validator := _facts(part).get("validator"):
            headers["If-Range"] = validator
    return headers


def _with_token(request: requests.PreparedRequest) -> requests.PreparedRequest:
    place = urllib.parse.urlsplit(str(request.url))
    token = os.environ.get("HF_TOKEN")
    if token and place.scheme == "https" and place.hostname == _HUB:
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def _refuse_failure(url: str, answer: requests.Response, advice: Advice) -> None:
    reason = f"{answer.status_code} {answer.reason}"
    if answer.status_code in (401, 403):
        raise UsageError(f"{_shown(url)} must be open to you, got {reason}: {advice.refused}")
    if answer.status_code in (400, 404, 410):
        raise UsageError(f"{_shown(url)} must exist, got {reason}: {advice.missing}")
    if not answer.ok:
        raise _interrupted(url, reason)


def _interrupted(url: str, reason: object) -> DINOCellError:
    return DINOCellError(
        f"The download of {_shown(url)} was interrupted {_TRIES} times (the last time by: {reason}); the "
        "part that arrived was kept; run the same command again to continue"
    )


def _receive(answer: requests.Response, part: Path) -> bool:
    """Append what comes, or start over if the server sends the file from its beginning.

    Returns whether the file is whole.
    """
    resumed = answer.status_code == 206
    begun = _size(part) if resumed else 0
    length = answer.headers.get("Content-Length")
    total = None if length is None else int(length) + begun
    if resumed and total != _facts(part).get("total", total):
        part.unlink()  # the file at the source is another one by now
        return False
    validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    if validator and validator.startswith("W/"):
        validator = None  # weak: equal in meaning, not in bytes
    write_text_atomically(_facts_path(part), json.dumps({"total": total, "validator": validator}))
    room = shutil.disk_usage(part.parent).free
    if total is not None and total - begun > room:
        raise UsageError(
            f"{part.parent} must have room for {(total - begun) / 1e6:.0f} MB, got {room / 1e6:.0f} MB: "
            "make room, or choose another folder as `out`"
        )
    with (
        part.open("ab" if resumed else "wb") as stream,
        progress(
            f"{part.stem} (KiB)",
            max((total or 0) // 1024, 1),
            shown=total is not None,
            done=begun // 1024,
        ) as bar,
    ):
        for block in answer.iter_content(_BLOCK):
            stream.write(block)
            bar.advance(len(block) // 1024)
    return total is None or _size(part) >= total


def _shown(url: str) -> str:
    """Without the query, which may be a signature."""
    return url.split("?")[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _facts_path(part: Path) -> Path:
    """Beside a partial file: the length and version of the file that it is a part of."""
    return part.with_name(f"{part.name}.json")


def _facts(part: Path) -> dict[str, Any]:
    """Length (`total`) and version (`validator`) of the file that `part` is a part of; may be empty."""
    path = _facts_path(part)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
