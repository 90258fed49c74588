"""Where objects are, how patiently they are fetched, and what can go wrong on the way (ours)."""

import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from dinov3.cells.checks import one_of

TRANSPORTS = ("obstore", "boto3")
_ENDPOINT = re.compile(r"https?://[\w.\-\[\]:]+/?")


class StoreError(OSError):
    """A store or an object of it cannot be read."""


class ObjectMissing(StoreError):
    """The store answers that there is no such object, or that it is not public."""


class ObjectForbidden(ObjectMissing):
    """The store has it, perhaps, and does not show it."""


class ObjectDamaged(StoreError):
    """What arrives is not what was stored, again and again."""


class ObjectUnreadable(StoreError):
    """Requests for an object fail again and again while others succeed."""


class StoreUnreachable(StoreError):
    """Nothing answers any more."""


class StoreMisconfigured(StoreError):
    """The store refuses all requests: another region, a wrong address, no credentials."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """How patiently objects are requested, and from which server."""

    endpoint: str = ""  # URL of another server of the S3 protocol; empty for AWS
    region: str = "us-east-1"  # of the bucket
    signed: bool = False  # with the credentials of the environment; a public bucket needs none
    transport: str = "obstore"  # or boto3
    connect_timeout_s: float = 5.0
    timeout_s: float = 30.0  # of a request
    retries: int = 8  # of a request that failed
    backoff_max_s: float = 20.0  # longest wait before a retry
    outage_s: float = 600.0  # while no request at all succeeds, retry for so long
    requests_per_s: float = 0.0  # of this process; 0: as many as it can
    verify_md5: bool = True  # compare a body with its ETag where that is an MD5


@dataclass(frozen=True)
class StoreOptions(RequestOptions):
    """A store and how patiently its objects are fetched; ValueError for a wrong address or number.

    A retry waits a random time up to backoff_s * 2 ** attempt, at most backoff_max_s (full jitter,
    Brooker 2015).
    """

    url: str  # `s3://bucket[/prefix]`, or a folder
    damaged_retries: int = 4  # of an object that arrived but is damaged
    backoff_s: float = 0.1
    connections: int = 32  # kept open

    def __post_init__(self) -> None:
        if not self.url:
            raise ValueError(
                "A store must be s3://bucket or a folder, got nothing: give an address or a path"
            )
        place = urllib.parse.urlsplit(self.url)
        scheme = place.scheme.lower()
        if scheme == "s3" and not self.url.startswith("s3://"):
            object.__setattr__(self, "url", f"s3://{self.url.partition('://')[2]}")
        if scheme == "s3" and not place.netloc:
            raise ValueError(f"A store must name its bucket, got {self.url!r}: give s3://bucket")
        if self.endpoint and not _ENDPOINT.fullmatch(self.endpoint):
            raise ValueError(
                f"An endpoint must be http://HOST[:PORT] or https://, got {self.endpoint!r}: write for example http://localhost:9000"
            )
        if scheme not in ("s3", "", "file"):
            raise ValueError(
                f"A store must be s3://bucket or a folder, got {self.url!r}: a server of the S3 "
                "protocol is named by its endpoint"
            )
        one_of("transport", self.transport, TRANSPORTS)
        for name in ("connect_timeout_s", "timeout_s", "backoff_s", "backoff_max_s"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"`{name}` must be positive, got {getattr(self, name)}: give a larger number"
                )
        for name in ("retries", "damaged_retries", "outage_s", "requests_per_s"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}` must be 0 or more, got {getattr(self, name)}: give a larger number"
                )

    @property
    def is_folder(self) -> bool:
        """Whether the store is a folder of this machine."""
        return not self.url.startswith("s3://")


@dataclass(frozen=True)
class StreamOptions(RequestOptions):
    """How fields arrive; nothing here changes which samples a run sees."""

    store: str = ""  # URL or folder in place of the index's own, for example a local copy
    threads: int = 16  # requests at once, of each process
    ahead: int = 48  # time steps (new fields) that fetching runs ahead
    pool_gb: float = 0.0  # of decoded fields, shared by the workers; 0: what the order needs
    pool_folder: str = ""  # where it lies; empty: shared memory
    disk_cache: str = ""  # folder of fetched files; empty: none
    disk_cache_gb: float = 100.0  # its limit, over all processes that use it
    max_lost_share: float = 0.02  # of the fields reached; above it the run stops

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("ahead", 1), ("pool_gb", 0), ("max_lost_share", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"`streaming.{name}` must be at least {least}, got {getattr(self, name)}: give a larger number"
                )
        if self.disk_cache and self.disk_cache_gb <= 0:
            raise ValueError(
                f"`streaming.disk_cache_gb` must be positive, got {self.disk_cache_gb}: give a larger number"
            )

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> Self:
        """Of the section `streaming` of a configuration; ValueError for a wrong key or value."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(section) - known):
            raise ValueError(
                f"Keys of streaming must be among {', '.join(sorted(known))}, got "
                f"{', '.join(unknown)}: correct these keys"
            )
        options = cls(**section)
        options.of_store("s3://checked")
        return options

    def of_store(self, url: str) -> StoreOptions:
        """Those of the transport."""
        shared = {item.name: getattr(self, item.name) for item in fields(RequestOptions)}
        return StoreOptions(self.store or url, connections=max(self.threads, 1), **shared)
