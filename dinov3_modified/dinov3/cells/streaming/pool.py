"""A folder of entries with a limit in bytes that many processes share: RAM (/dev/shm) or disk (ours).

An entry is written under a temporary name and renamed, so a half-written one is never read.  A process
that needs an entry which another process is making waits at that entry's file lock; the kernel frees
the lock of a process that is killed, so nobody waits forever.  The modification time of a file is its
time of last use, and the least recently used entries are removed first; a process that has a removed
entry mapped keeps its pages.  A hit costs two system calls, a new entry one scan of the folder.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dinov3.cells.files import move_into_place

logger = logging.getLogger("dinov3")

_SUFFIX = ".entry"
_PREFIX = "dinov3-fields-"
_ALIVE = "alive.lock"
_TOTAL = "total-bytes"
_ABANDONED_S = 3600.0
_CHECKSUM_BYTES = 16

T = TypeVar("T")
Entry = tuple[dict[str, Any], dict[str, np.ndarray]]


class SharedFolder:
    """Entries by key; may be copied to other processes.

    Args:
        folder: made if need be.
        limit_bytes: of all entries together; at least one entry is kept.
        keep_first: once full, take nothing new instead of dropping what is oldest.  With shuffled
            passes over more data than the limit this hits more often than LRU does.

    `counts` has the hits, misses and evictions of this process.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, *, keep_first: bool = False) -> None:
        if limit_bytes < 1:
            raise ValueError(f"A limit must be positive, got {limit_bytes}: give bytes")
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.keep_first = keep_first
        self.folder.mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        if keep_first:
            self._settle()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "counts": Counter(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def path(self, key: str) -> Path:
        """File of an entry, which may not exist yet."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / f"{digest}{_SUFFIX}"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def count(self, what: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self.counts[what] += 1

    def touched(self, path: Path) -> bool:
        """Whether an entry exists; if so it counts as used now."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def retire(self, key: str) -> None:
        """Let an entry go before all others: it is not needed again soon."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(key), (0, 0))

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """One process, and one thread of it, makes an entry; the lock of a killed one is free."""
        lock = self.path(key).with_suffix(".lock")
        with lock.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Who waits has this file open and gets its lock; who comes later locks a new file.  Both
                # can then make the entry at once, which is the same entry, renamed into place whole.
                lock.unlink(missing_ok=True)

    def store(self, key: str, parts: Sequence[bytes | np.ndarray]) -> bool:
        """Write an entry; False where it has no room."""
        size = sum(len(p) if isinstance(p, bytes) else p.nbytes for p in parts)
        if self.keep_first:
            with self._total() as total:
                if total[0] + size > self.limit_bytes:
                    return False
                total[0] += size
        path = self.path(key)
        part_path = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
        try:
            with part_path.open("wb") as stream:
                for part in parts:
                    stream.write(part if isinstance(part, bytes) else part.data)
            move_into_place(part_path, path, flush=False)
        except OSError as error:
            logger.warning("%s cannot be written (%s): not kept", path, error.strerror)
            return False
        finally:
            part_path.unlink(missing_ok=True)
        if not self.keep_first:
            self._evict(path)
        return True

    @contextlib.contextmanager
    def _total(self) -> Iterator[list[int]]:
        """Bytes that are taken, in a file that all processes change in turn."""
        descriptor = os.open(self.folder / _TOTAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 32, 0).strip()
            value = [int(text) if text.isdigit() else 0]
            yield value
            os.pwrite(descriptor, f"{max(value[0], 0):<31d}\n".encode(), 0)
        finally:
            os.close(descriptor)

    def _settle(self) -> None:
        """Once, when it is opened: count its entries, drop those over the limit and files of killed processes."""
        with self._total() as total:
            now = time.time()
            for path in self.folder.iterdir():
                # A killed process leaves these; a living one writes for seconds.
                if path.suffix in (".part", ".lock"):
                    with contextlib.suppress(FileNotFoundError):
                        if now - path.stat().st_mtime > _ABANDONED_S:
                            path.unlink()
            entries = sorted(self._entries())
            total[0] = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if total[0] <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                total[0] -= size

    def _entries(self) -> list[tuple[float, int, Path]]:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        facts = entry.stat()
                        found.append((facts.st_mtime, facts.st_size, Path(entry.path)))
        return found

    def _evict(self, newest: Path) -> None:
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit_bytes:
                return
            if path == newest:
                continue
            # A process that has it mapped keeps its pages.
            path.unlink(missing_ok=True)
            self.count("evictions")
            total -= size

    def close(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found_or_made(
        self, key: str, find: Callable[[Path], T | None], make: Callable[[], T]
    ) -> T:
        """An entry that `find` reads from its file, or else what `make` stores, by one process alone."""
        path = self.path(key)
        if (found := find(path)) is None:
            with self.locked(key):
                if (found := find(path)) is None:
                    self.count("misses")
                    return make()
        self.count("hits")
        return found


class ByteCache(SharedFolder):
    """Objects as they came from a store, each behind its checksum: disks fail too."""

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of an entry, fetched if need be."""

        def make() -> bytes:
            data = fetch()
            self.store(key, [_checksum(data), data])
            return data

        return self._found_or_made(key, self._read, make)

    def _read(self, path: Path) -> bytes | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        data = content[_CHECKSUM_BYTES:]
        if content[:_CHECKSUM_BYTES] != _checksum(data):
            self.count("damaged")
            self.drop(path)
            return None
        self.touched(path)
        return data

    def drop(self, path: Path) -> None:
        """Forget an entry that turned out to be of no use."""
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            if self.keep_first:
                with self._total() as total:
                    total[0] -= size


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()


class FieldPool(SharedFolder):
    """Decoded fields: a line of JSON, then the planes, memory-mapped when they are read."""

    def get(self, key: str, make: Callable[[], Entry]) -> Entry:
        """Facts and arrays of an entry, made if need be; arrays are read-only."""

        def kept() -> Entry:
            facts, arrays = make()
            shapes = {name: [a.dtype.str, list(a.shape)] for name, a in arrays.items()}
            header = json.dumps({"facts": facts, "arrays": shapes}).encode()
            header += b" " * (-(len(header) + 1) % 64) + b"\n"
            self.store(key, [header, *(np.ascontiguousarray(a) for a in arrays.values())])
            return facts, arrays

        return self._found_or_made(key, self._map, kept)

    def _map(self, path: Path) -> Entry | None:
        if not self.touched(path):
            return None
        try:
            raw = np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError:  # it went between the two calls
            return None
        end = bytes(raw[: 1 << 16]).index(b"\n") + 1
        header = json.loads(bytes(raw[:end]))
        arrays, offset = {}, end
        for name, (kind, shape) in header["arrays"].items():
            dtype = np.dtype(kind)
            size = int(np.prod(shape)) * dtype.itemsize
            arrays[name] = raw[offset : offset + size].view(dtype).reshape(shape)
            offset += size
        return header["facts"], arrays


def shared_memory_folder(limit_bytes: int, folder: str = "") -> Path:
    """A folder of this process for a pool: in shared memory if that has the room, else on disk.

    Folders that killed processes left there are removed.  `folder` says where instead.
    """
    place = Path(folder or "/dev/shm")
    if not folder and (not place.is_dir() or shutil.disk_usage(place).free < 1.1 * limit_bytes):
        other = Path(tempfile.gettempdir())
        gigabytes = limit_bytes / 1e9
        logger.warning("%s has no room for %.1f GB of fields: using %s", place, gigabytes, other)
        place = other
    place.mkdir(parents=True, exist_ok=True)
    for left in place.glob(f"{_PREFIX}*"):
        if _is_left_behind(left):
            shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=place))
    # Open as long as this process lives, wherever it is seen from: a number of a process means
    # nothing in another container or on another node.
    descriptor = os.open(made / _ALIVE, os.O_WRONLY | os.O_CREAT, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _alive.append(descriptor)
    return made


_alive: list[int] = []


def _is_left_behind(folder: Path) -> bool:
    """Whether the process that made a pool has ended."""
    try:
        with (folder / _ALIVE).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # it is being made, or of an older version
        with contextlib.suppress(FileNotFoundError):
            return time.time() - folder.stat().st_mtime > _ABANDONED_S
        return False
    except OSError:
        return False
    return True
