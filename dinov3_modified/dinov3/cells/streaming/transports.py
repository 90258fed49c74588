"""Objects over obstore, over boto3 and from a folder, behind the same four methods (ours).

obstore reads by its blocking calls, in threads: its asynchronous ones can abort when a program ends.
A client is made in the process that uses it: one that was used before a fork gives another worker's
bytes (boto3) or hangs (obstore).
"""

import datetime
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dinov3.cells.streaming.store_options import (
    ObjectForbidden,
    ObjectMissing,
    StoreError,
    StoreMisconfigured,
    StoreOptions,
)


class Transient(Exception):
    """A request that may succeed when it is repeated; `kind` is counted."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Body:
    """An object that arrived: its bytes and its entity tag."""

    data: bytes
    etag: str


Range = tuple[int | None, int | None]


class Transport(Protocol):
    def get(self, key: str, part: Range | None = None) -> Body: ...

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]: ...

    def folders(self, prefix: str) -> list[str]: ...

    def close(self) -> None: ...


class _Folder:
    """A folder in place of a bucket."""

    def __init__(self, options: StoreOptions) -> None:
        url = options.url
        self.root = Path(urllib.parse.urlsplit(url).path if "://" in url else url)
        if not self.root.is_dir():
            raise ObjectMissing(f"A store must be a folder that exists, got {url}: check the path")

    def get(self, key: str, part: Range | None = None) -> Body:
        try:
            with (self.root / key).open("rb") as stream:
                first, end = part or (0, None)
                if first is None:
                    size = stream.seek(0, os.SEEK_END)
                    first, end = max(0, size - (end or 0)), None
                stream.seek(first)
                return Body(stream.read(-1 if end is None else end - first), "")
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            reason = f"got none ({error.strerror})"
            raise ObjectMissing(f"{key} must be in {self.root}, {reason}") from error
        except OSError as error:
            raise Transient("reset", str(error)) from error

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        for folder, _, names in os.walk(self.root / prefix.rpartition("/")[0]):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    yield key, path.stat().st_size

    def folders(self, prefix: str) -> list[str]:
        top = self.root / prefix
        return [path.name for path in top.iterdir() if path.is_dir()] if top.is_dir() else []

    def close(self) -> None:
        """Nothing is open."""


# Where obstore has been used: a process forked from there can only hang.
_obstore_pids: set[int] = set()


class _Obstore:
    """obstore's blocking calls."""

    def __init__(self, options: StoreOptions) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError as error:
            raise StoreError(
                "Reading from S3 needs the package obstore, which is not installed: run "
                "pip install '.[s3]' in the clone of DINOCell"
            ) from error
        if _obstore_pids - {os.getpid()}:
            raise StoreError(
                "Workers must start by forkserver or spawn once their parent has read from S3, got a "
                "fork: leave multiprocessing_context as it is, or use transport boto3"
            )
        _obstore_pids.add(os.getpid())
        self._signed = options.signed
        place = urllib.parse.urlsplit(options.url)
        self._obstore = obstore
        self._no_parts = False
        config: dict[str, Any] = {"region": options.region}
        if options.endpoint:
            config |= {"endpoint": options.endpoint, "virtual_hosted_style_request": False}
        if not options.signed:
            config["skip_signature"] = True
        self._store = S3Store(
            place.netloc,
            prefix=place.path.strip("/") or None,
            config=config,  # type: ignore[arg-type]
            client_options={
                "timeout": f"{options.timeout_s}s",
                "connect_timeout": f"{options.connect_timeout_s}s",
                "allow_http": options.endpoint.startswith("http://"),
                "pool_max_idle_per_host": str(options.connections),
            },
            # Retries, of bodies too, are ours, the same for every transport.
            retry_config={
                "max_retries": 0,
                "retry_timeout": datetime.timedelta(seconds=options.timeout_s),
            },
        )

    def get(self, key: str, part: Range | None = None) -> Body:
        options: Any = None
        if part is not None:
            if self._no_parts:
                return _cut(self.get(key), part)
            first, end = part
            whole_end = {"suffix": end} if first is None else {"offset": first}
            options = {"range": whole_end if None in part else part}
        with _translated(key, self._signed):
            try:
                found = self._obstore.get(self._store, key, options=options)
            except Exception as error:
                if part is None or "non-partial response" not in str(error):
                    raise
                self._no_parts = True  # a server that answers parts as if they were the whole
                return _cut(self.get(key), part)
            data = bytes(found.bytes())
            meta = found.meta
            wanted = meta["size"] if part is None else found.range[1] - found.range[0]
        if len(data) != wanted:
            raise Transient("truncated", f"{len(data)} of {wanted} bytes")
        return Body(data, meta.get("e_tag") or "")

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        # Its prefixes are whole names between slashes: the rest is compared here.
        whole = prefix.rpartition("/")[0]
        with _translated(prefix, self._signed):
            for batch in self._obstore.list(self._store, prefix=whole or None):
                for item in batch:
                    if item["path"].startswith(prefix):
                        yield item["path"], item["size"]

    def folders(self, prefix: str) -> list[str]:
        with _translated(prefix, self._signed):
            found = self._obstore.list_with_delimiter(self._store, prefix=prefix.strip("/") or None)
        return [name.strip("/").rpartition("/")[2] for name in found["common_prefixes"]]

    def close(self) -> None:
        """It closes itself with its last reference."""


def _cut(body: Body, part: Range) -> Body:
    first, end = part
    data = body.data[-(end or 0) :] if first is None else body.data[first:end]
    return Body(data, body.etag)


class _Boto3:
    """boto3; one client is safe for many threads."""

    def __init__(self, options: StoreOptions) -> None:
        import boto3
        import botocore
        from botocore.config import Config

        self._signed = options.signed
        place = urllib.parse.urlsplit(options.url)
        self._bucket = place.netloc
        self._prefix = f"{place.path.strip('/')}/" if place.path.strip("/") else ""
        self._client = boto3.session.Session().client(
            "s3",
            region_name=options.region,
            endpoint_url=options.endpoint or None,
            config=Config(
                signature_version=None if options.signed else botocore.UNSIGNED,
                connect_timeout=options.connect_timeout_s,
                read_timeout=options.timeout_s,
                retries={"total_max_attempts": 1},
                max_pool_connections=options.connections,
                s3={"addressing_style": "path"} if options.endpoint else {},
            ),
        )

    def get(self, key: str, part: Range | None = None) -> Body:
        how = {}
        if part is not None:
            first, end = part
            last = "" if end is None else end if first is None else end - 1
            how["Range"] = f"bytes={'' if first is None else first}-{last}"
        with _translated(key, self._signed):
            found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **how)
            with found["Body"] as stream:
                data = stream.read()
        if len(data) != found["ContentLength"]:
            raise Transient("truncated", f"{len(data)} of {found['ContentLength']} bytes")
        body = Body(data, found.get("ETag", ""))
        return _cut(body, part) if part is not None and "ContentRange" not in found else body

    def _pages(self, prefix: str, **how: Any) -> Iterator[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2")
        return iter(pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix, **how))

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        with _translated(prefix, self._signed):
            for page in self._pages(prefix):
                for item in page.get("Contents", ()):
                    yield item["Key"].removeprefix(self._prefix), item["Size"]

    def folders(self, prefix: str) -> list[str]:
        with _translated(prefix, self._signed):
            pages = list(self._pages(prefix, Delimiter="/"))
        found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        return [name.strip("/").rpartition("/")[2] for name in found]

    def close(self) -> None:
        """Close idle connections; requests that run finish theirs."""
        self._client.close()


OPENERS: dict[str, Callable[[StoreOptions], Transport]] = {
    "obstore": _Obstore,
    "boto3": _Boto3,
    "folder": _Folder,
}


@contextmanager
def _translated(key: str, signed: bool) -> Iterator[None]:
    """Errors of a transport as ours: missing for good, or transient with its kind."""
    try:
        yield
    except (StoreError, Transient):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        status = _status(error, text)
        if 300 <= status < 400 or status in (400, 405) or _no_credentials(text):
            raise StoreMisconfigured(
                f"The store must take requests as they are made, got {status or 'no credentials'} for "
                f"{key} ({text.splitlines()[0][:200]}): check region, endpoint, bucket and credentials"
            ) from error
        if status == 416:
            raise ObjectMissing(
                f"{key} must be as long as its index says, got less: index the plate again"
            ) from error
        if status in (401, 403):
            who = "open to the credentials of the environment" if signed else "public"
            what = "these credentials" if signed else "key and bucket"
            raise ObjectForbidden(f"{key} must be {who}, got {status}: check {what}") from error
        if status == 404:
            raise ObjectMissing(f"{key} must exist, got 404: check key and bucket") from error
        raise Transient(_kind(status, text), text) from error


def _no_credentials(text: str) -> bool:
    signs = "unable to locate|nocredentials|not loaded|no credentials|missing|instance metadata"
    lower = text.lower()
    return "credentials" in lower and bool(re.search(rf"{signs}|169\.254\.169\.254", lower))


def _kind(status: int, text: str) -> str:
    """What failed, in the words of either transport."""
    lower = text.lower().replace("retry_timeout", "")
    if status in (500, 502, 503, 504) or "slowdown" in lower:
        return str(status or 503)
    if re.search("timed ?out|timeout", lower):
        return "timeout"
    return "truncated" if re.search("incomplete|end of file", lower) else "reset"


def _status(error: Exception, text: str) -> int:
    """HTTP status of a transport's error, 0 where there is none."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError":
        return 404
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return 403
    if "received redirec" in text.lower():
        return 301
    found = re.search(r"status(?: code)?:? ?(\d{3})\b", text.lower())
    found = found or re.search(r" (50[0234]) ", text)
    return 0 if found is None else int(found[1])
