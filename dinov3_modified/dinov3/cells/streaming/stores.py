"""Objects by key, from S3, any server of its protocol, or a folder (ours).

obstore reads (its blocking calls, in threads: its asynchronous ones can abort at the end of a
program); boto3 stands in for it behind the same methods.  A client is made in the process that uses
it: one that was used before a fork gives another worker's bytes (boto3) or hangs (obstore).
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

__all__ = [
    "Body",
    "ObjectDamaged",
    "ObjectMissing",
    "ObjectStore",
    "ObjectUnreadable",
    "Range",
    "StoreError",
    "StoreMisconfigured",
    "StoreOptions",
    "StoreUnreachable",
]

logger = logging.getLogger("dinov3")

T = TypeVar("T")

_ENDPOINT = re.compile(r"https?://[\w.\-\[\]:]+/?")
_OUTAGE_SAID_S = 0.5  # of silence before it is mentioned


class StoreError(OSError):
    """A store or an object of it cannot be read."""


class ObjectMissing(StoreError):
    """The store answers that there is no such object, or that it is not public."""


class ObjectDamaged(StoreError):
    """What arrives is not what was stored, again and again."""


class ObjectUnreadable(StoreError):
    """Requests for an object fail again and again while others succeed."""


class StoreUnreachable(StoreError):
    """Nothing answers any more."""


class StoreMisconfigured(StoreError):
    """The store refuses all requests: another region, a wrong address, no credentials."""


class _Transient(Exception):
    """A request that may succeed when it is repeated; `kind` is counted."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class StoreOptions:
    """Where objects are and how patiently they are fetched.

    Attributes:
        url: `s3://bucket[/prefix]`, or a folder.
        endpoint: URL of another server of the S3 protocol; empty for AWS.
        region: of the bucket.
        signed: sign requests with the credentials of the environment; a public bucket needs none.
        transport: obstore or boto3.
        connect_timeout_s, timeout_s: of a request.
        retries: of a request that failed.
        damaged_retries: of an object that arrived but is damaged.
        backoff_s, backoff_max_s: a retry waits a random time up to backoff_s * 2 ** attempt, at most
            backoff_max_s (full jitter, Brooker 2015).
        outage_s: while no request at all succeeds, retry for so long.
        requests_per_s: of this process; 0: as many as it can.
        connections: kept open.
        verify_md5: compare a body with its ETag where that is an MD5.
    """

    url: str
    endpoint: str = ""
    region: str = "us-east-1"
    signed: bool = False
    transport: str = "obstore"
    connect_timeout_s: float = 5.0
    timeout_s: float = 30.0
    retries: int = 8
    damaged_retries: int = 4
    backoff_s: float = 0.1
    backoff_max_s: float = 20.0
    outage_s: float = 600.0
    requests_per_s: float = 0.0
    connections: int = 32
    verify_md5: bool = True

    def __post_init__(self) -> None:
        if not self.url:
            raise ValueError("a store must be s3://bucket or a folder, got nothing: name one")
        place = urllib.parse.urlsplit(self.url)
        scheme = place.scheme.lower()
        if scheme == "s3" and not self.url.startswith("s3://"):
            object.__setattr__(self, "url", f"s3://{self.url.partition('://')[2]}")
        if scheme == "s3" and not place.netloc:
            raise ValueError(f"a store must name its bucket, got {self.url!r}: give s3://bucket")
        if self.endpoint and not _ENDPOINT.fullmatch(self.endpoint):
            raise ValueError(
                f"an endpoint must be http://HOST[:PORT] or https://, got {self.endpoint!r}: write it in "
                "full"
            )
        if scheme not in ("s3", "", "file"):
            raise ValueError(
                f"a store must be s3://bucket or a folder, got {self.url!r}: a server of the S3 "
                "protocol is named by its endpoint"
            )
        if self.transport not in _TRANSPORTS:
            raise ValueError(
                f"transport must be one of {', '.join(_TRANSPORTS)}, got {self.transport!r}: choose one"
            )
        for name in ("connect_timeout_s", "timeout_s", "backoff_s", "backoff_max_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}: raise it")
        for name in ("retries", "damaged_retries", "outage_s", "requests_per_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}: raise it")

    @property
    def is_folder(self) -> bool:
        """Whether the store is a folder of this machine."""
        return not self.url.startswith("s3://")


@dataclass(frozen=True)
class Body:
    """An object that arrived: its bytes and its entity tag."""

    data: bytes
    etag: str


Range = tuple[int | None, int | None]


class _Transport(Protocol):
    def get(self, key: str, part: Range | None = None) -> Body: ...

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]: ...

    def folders(self, prefix: str) -> list[str]: ...

    def close(self) -> None: ...


class ObjectStore:
    """Objects of one store; may be copied to other processes.

    Args:
        options: see `StoreOptions`.

    Attributes:
        counts: requests, bytes, and retries by kind, of this process.
    """

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        self._start()

    def _start(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._transport: _Transport | None = None
        self._pid = -1
        self._last_success = 0.0
        self._successes = 0
        self._next_request = 0.0
        self._md5_means_nothing = self._md5_has_fitted = False
        self._md5_misfits: set[str] = set()
        # Not the global generator, whose numbers belong to the samples.
        self._random = random.Random()

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options = state["options"]
        self._start()

    def get(
        self,
        key: str,
        accept: Callable[[bytes], T] | None = None,
        *,
        part: Range | None = None,
    ) -> T | bytes:
        """An object's bytes, or what `accept` makes of them.

        Args:
            accept: raises ValueError for bytes that cannot be right; they are fetched again.
            part: (first, end) of the bytes; (first, None) up to the end; (None, n) the last n.  A
                part has no checksum.

        Raises:
            ObjectMissing, ObjectDamaged, ObjectUnreadable, StoreUnreachable, StoreMisconfigured.
        """
        seen: Counter[bytes] = Counter()

        def once() -> T | bytes:
            body = self._open().get(key, part)
            with self._lock:
                self.counts["bytes"] += len(body.data)
            if part is None and not self._md5_fits(key, body, seen):
                raise _Transient("damaged", "its MD5 is not its ETag")
            if accept is None:
                return body.data
            try:
                return accept(body.data)
            except ValueError as error:
                raise _Transient("damaged", str(error)) from error

        return self._persist(key, once)

    def keys(self, prefix: str) -> list[tuple[str, int]]:
        """Keys below a prefix and their sizes in bytes, sorted."""
        return self._persist(prefix, lambda: sorted(self._open().keys(prefix)))

    def folders(self, prefix: str) -> list[str]:
        """Names of the next level below a prefix that ends with a slash, sorted."""
        return self._persist(prefix, lambda: sorted(self._open().folders(prefix)))

    def _persist(self, key: str, once: Callable[[], T]) -> T:
        options = self.options
        begun = time.monotonic()
        failures: Counter[str] = Counter()
        # Failures while other requests came through: they speak against this object.
        own, successes = 0, self._successes
        waiting = False
        while True:
            self._wait_for_budget()
            with self._lock:
                self.counts["requests"] += 1
            try:
                result = once()
            except _Transient as error:
                failures[error.kind] += 1
                with self._lock:
                    self.counts[f"retries.{error.kind}"] += 1
                reason = f"{error.kind}: " + str(error).strip().split("\n")[0][:200]
                if error.kind == "damaged":
                    self._renew()  # a reused connection has been seen to repeat a damaged answer
                    if failures["damaged"] > options.damaged_retries:
                        raise ObjectDamaged(
                            f"{key} must arrive as it was stored, got damaged bytes "
                            f"{failures['damaged']} times (last: {reason})"
                        ) from None
                else:
                    own += self._successes > successes
                    successes = self._successes
                    if own > options.retries:
                        raise ObjectUnreadable(
                            f"{key} must be readable, got {own} failures while others could be read "
                            f"(last: {reason})"
                        ) from None
                if sum(failures.values()) > options.retries and error.kind != "damaged":
                    silent_s = time.monotonic() - max(begun, self._last_success)
                    if silent_s > options.outage_s:
                        raise StoreUnreachable(
                            f"{options.url} must answer, got nothing for {options.outage_s:g} s (last: "
                            f"{reason}): check the network, then run the same command again"
                        ) from None
                    if not waiting and silent_s > _OUTAGE_SAID_S:
                        logger.warning("%s does not answer (%s): waiting", options.url, reason)
                        waiting = True
                exponent = min(sum(failures.values()) - 1, 30)
                limit = min(options.backoff_max_s, options.backoff_s * 2**exponent)
                time.sleep(self._random.uniform(0, limit))
            else:
                with self._lock:
                    self._last_success = time.monotonic()
                    self._successes += 1
                if waiting:
                    logger.warning("%s answers again", options.url)
                return result

    def _md5_fits(self, key: str, body: Body, seen: Counter[bytes]) -> bool:
        tag = body.etag.strip('"').lower()
        if not self.options.verify_md5 or self._md5_means_nothing or len(tag) != 32:
            return True
        digest = hashlib.md5(body.data, usedforsecurity=False).digest()
        if digest.hex() == tag:
            self._md5_has_fitted = True
            return True
        seen[digest] += 1
        if self._md5_has_fitted or len(seen) > 1 or seen[digest] < 3 or not body.data.strip(b"\0"):
            return False
        # The same bytes over three connections: the object is so, and its tag is no MD5.  Several
        # such objects: no tag of this store is one (encrypted buckets).
        with self._lock:
            self._md5_misfits.add(key)
            if len(self._md5_misfits) >= 3 and not self._md5_means_nothing:
                logger.warning("ETags of %s are not checksums: not compared", self.options.url)
                self._md5_means_nothing = True
        return True

    def _wait_for_budget(self) -> None:
        rate = self.options.requests_per_s
        if not rate:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_request)
            self._next_request = start + 1 / rate
        time.sleep(max(0.0, start - now))

    def _open(self) -> _Transport:
        with self._lock:
            if self._pid != os.getpid():
                self._transport, self._pid = None, os.getpid()
            if self._transport is None:
                name = "folder" if self.options.is_folder else self.options.transport
                self._transport = _TRANSPORTS[name](self.options)
            return self._transport

    def _renew(self) -> None:
        with self._lock:
            before, self._transport = self._transport, None
        if before is not None:
            before.close()

    def close(self) -> None:
        """Close idle connections; the next request opens new ones."""
        if self._pid == os.getpid():
            self._renew()


class _Folder:
    """A folder in place of a bucket."""

    def __init__(self, options: StoreOptions) -> None:
        self.root = Path(
            urllib.parse.urlsplit(options.url).path if "://" in options.url else options.url
        )
        if not self.root.is_dir():
            raise ObjectMissing(
                f"a store must be a folder that exists, got {self.root}: check the path"
            )

    def get(self, key: str, part: Range | None = None) -> Body:
        try:
            with (self.root / key).open("rb") as stream:
                if part is None:
                    return Body(stream.read(), "")
                first, end = part
                if first is None:
                    size = stream.seek(0, os.SEEK_END)
                    stream.seek(max(0, size - (end or 0)))
                    return Body(stream.read(), "")
                stream.seek(first)
                return Body(stream.read() if end is None else stream.read(end - first), "")
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise ObjectMissing(
                f"{key} must be in {self.root}, got none ({error.strerror})"
            ) from error
        except OSError as error:
            raise _Transient("reset", str(error)) from error

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        top = self.root / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(top):
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
                "reading from S3 needs the package obstore, got none: pip install 'dinocell[s3]'"
            ) from error
        if _obstore_pids - {os.getpid()}:
            raise StoreError(
                "workers must start by forkserver or spawn once their parent has read from S3, got a "
                "fork: leave multiprocessing_context as it is, or use transport boto3"
            )
        _obstore_pids.add(os.getpid())
        place = urllib.parse.urlsplit(options.url)
        self._obstore = obstore
        self._no_parts = False
        self._prefix = place.path.strip("/")
        config: dict[str, Any] = {"region": options.region}
        if options.endpoint:
            config["endpoint"] = options.endpoint
            config["virtual_hosted_style_request"] = False
        if not options.signed:
            config["skip_signature"] = True
        self._store = S3Store(
            place.netloc,
            prefix=self._prefix or None,
            config=config,  # type: ignore[arg-type]
            client_options={
                "timeout": f"{options.timeout_s}s",
                "connect_timeout": f"{options.connect_timeout_s}s",
                "allow_http": options.endpoint.startswith("http://"),
                "pool_max_idle_per_host": str(options.connections),
            },
            # Retries, of bodies too, are ours, the same for every transport.
            retry_config={"max_retries": 0, "retry_timeout": _seconds(options.timeout_s)},
        )

    def get(self, key: str, part: Range | None = None) -> Body:
        options: Any = None
        if part is not None:
            first, end = part
            if first is None:
                options = {"range": {"suffix": end}}
            else:
                options = {"range": {"offset": first} if end is None else (first, end)}
        if self._no_parts and part is not None:
            return _cut(self.get(key), part)
        with _translated(key):
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
            raise _Transient("truncated", f"{len(data)} of {wanted} bytes")
        return Body(data, meta.get("e_tag") or "")

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        # Its prefixes are whole names between slashes: the rest is compared here.
        whole = prefix.rpartition("/")[0]
        with _translated(prefix):
            for batch in self._obstore.list(self._store, prefix=whole or None):
                for item in batch:
                    if item["path"].startswith(prefix):
                        yield item["path"], item["size"]

    def folders(self, prefix: str) -> list[str]:
        with _translated(prefix):
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
        with _translated(key):
            found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **how)
            with found["Body"] as stream:
                data = stream.read()
        if len(data) != found["ContentLength"]:
            raise _Transient("truncated", f"{len(data)} of {found['ContentLength']} bytes")
        body = Body(data, found.get("ETag", ""))
        return _cut(body, part) if part is not None and "ContentRange" not in found else body

    def _pages(self, **how: Any) -> Iterator[dict[str, Any]]:
        yield from self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, **how
        )

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        with _translated(prefix):
            for page in self._pages(Prefix=self._prefix + prefix):
                for item in page.get("Contents", ()):
                    yield item["Key"].removeprefix(self._prefix), item["Size"]

    def folders(self, prefix: str) -> list[str]:
        with _translated(prefix):
            pages = list(self._pages(Prefix=self._prefix + prefix, Delimiter="/"))
        return [
            item["Prefix"].strip("/").rpartition("/")[2]
            for page in pages
            for item in page.get("CommonPrefixes", ())
        ]

    def close(self) -> None:
        """Close idle connections; requests that run finish theirs."""
        self._client.close()


_TRANSPORTS: dict[str, Callable[[StoreOptions], _Transport]] = {
    "obstore": _Obstore,
    "boto3": _Boto3,
    "folder": _Folder,
}


def _seconds(value: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=value)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Errors of a transport as ours: missing for good, or transient with its kind."""
    try:
        yield
    except (StoreError, _Transient):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        status = _status(error, text)
        if 300 <= status < 400 or status in (400, 405) or _no_credentials(text):
            raise StoreMisconfigured(
                f"the store must take requests as they are made, got {status or 'no credentials'} for "
                f"{key} ({text.splitlines()[0][:200]}): check region, endpoint, bucket and credentials"
            ) from error
        if status == 416:
            raise ObjectMissing(f"{key} must be as long as its index says, got less") from error
        if status in (401, 403, 404):
            what = "be public" if status in (401, 403) else "exist"
            raise ObjectMissing(f"{key} must {what}, got {status}: check key and bucket") from error
        raise _Transient(_kind(status, text), text) from error


def _no_credentials(text: str) -> bool:
    lower = text.lower()
    return "credentials" in lower and any(
        word in lower for word in ("unable to locate", "nocredentials", "not loaded", "no credentials",
                                   "missing", "instance metadata", "169.254.169.254")
    )  # fmt: skip


def _kind(status: int, text: str) -> str:
    """What failed, in the words of either transport."""
    lower = text.lower().replace("retry_timeout", "")
    if status in (500, 502, 503, 504) or "slowdown" in lower:
        return str(status or 503)
    if "timed out" in lower or "timeout" in lower or "timedout" in lower:
        return "timeout"
    if "incomplete" in lower or "end of file" in lower:
        return "truncated"
    return "reset"


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
    if found is not None:
        return int(found[1])
    for status in (500, 502, 503, 504):
        if f" {status} " in text:
            return status
    return 0
