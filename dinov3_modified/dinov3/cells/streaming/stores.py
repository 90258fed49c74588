"""Objects by key, from S3, any server of its protocol, or a folder, with retries and checks (ours)."""

import hashlib
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from dinov3.cells.streaming.store_options import (
    ObjectDamaged,
    ObjectUnreadable,
    StoreOptions,
    StoreUnreachable,
)
from dinov3.cells.streaming.transports import OPENERS, Body, Range, Transient, Transport

logger = logging.getLogger("dinov3")

T = TypeVar("T")

_SILENCE_LOGGED_S = 0.5  # a store that is silent for so long is mentioned in the log


class ObjectStore:
    """Objects of one store; may be copied to other processes.

    `counts` has the requests, bytes, and retries by kind, of this process.
    """

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        self._start()

    def _start(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        self._pid = -1
        self._last_success = 0.0
        self._successes = 0
        self._next_request = 0.0
        self._md5_means_nothing = self._md5_has_fitted = False
        self._md5_misfits: set[str] = set()
        # Not the global generator, whose numbers belong to the samples.
        self._random = random.Random()

    def __reduce__(self) -> Any:
        return type(self), (self.options,)

    def get(
        self, key: str, accept: Callable[[bytes], T] | None = None, *, part: Range | None = None
    ) -> T | bytes:
        """An object's bytes, or what `accept` makes of them.

        `accept`: raises ValueError for bytes that cannot be right; they are fetched again.  `part`:
        (first, end) of the bytes; (first, None) up to the end; (None, n) the last n.  A part has no
        checksum.  Raises ObjectMissing, ObjectDamaged, ObjectUnreadable, StoreUnreachable,
        StoreMisconfigured.
        """
        seen: Counter[bytes] = Counter()

        def once() -> T | bytes:
            body = self._open().get(key, part)
            with self._lock:
                self.counts["bytes"] += len(body.data)
            if part is None and not self._md5_fits(key, body, seen):
                raise Transient("damaged", "its MD5 is not its ETag")
            if accept is None:
                return body.data
            try:
                return accept(body.data)
            except ValueError as error:
                raise Transient("damaged", str(error)) from error

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
            except Transient as error:
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
                    if not waiting and silent_s > _SILENCE_LOGGED_S:
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

    def _open(self) -> Transport:
        with self._lock:
            if self._pid != os.getpid():
                self._transport, self._pid = None, os.getpid()
            if self._transport is None:
                name = "folder" if self.options.is_folder else self.options.transport
                self._transport = OPENERS[name](self.options)
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
