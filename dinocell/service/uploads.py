"""Uploads that come in parts, and continue after a cut connection or a restart of the service.

uploads/ID/about.json  what was announced: name, size, hash, options of the job
uploads/ID/part        the bytes that have come; its size is where the next part begins

A whole upload becomes the job of the same id, so that to finish it twice makes one job.  Its file is linked
into the folder of the job before the upload is deleted: a killed process leaves the upload, or both.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinocell.errors import DINOCellError, UsageError
from dinocell.files import ensure_folder, write_text_atomically
from dinocell.service.queue import QueueFullError


class BusyError(DINOCellError):
    """Another request writes the same upload."""


@dataclass(frozen=True)
class Upload:
    """An upload that is not whole yet, or not a job yet.

    Attributes
    ----------
    folder : of its files
    name : of the file, as the client gave it
    bytes : size of the whole file
    sha256 : of the whole file; None if the client gave none
    options : of the job
    """

    folder: Path
    name: str
    bytes: int
    sha256: str | None
    options: dict[str, Any]

    @property
    def id(self) -> str:
        """32 hexadecimal digits, drawn at random."""
        return self.folder.name

    @property
    def part(self) -> Path:
        """What has come."""
        return self.folder / "part"

    @property
    def offset(self) -> int:
        """Where the next part begins, in bytes."""
        return self.part.stat().st_size

    def put(self, path: Path) -> None:
        """Give the whole file another name, without copying it where the file system can."""
        try:
            os.link(self.part, path)
        except OSError:
            shutil.copyfile(self.part, path)


class Uploads:
    """The uploads of a service, which has one process.

    Parameters
    ----------
    folder : where they are; made when the first one begins
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._busy: set[str] = set()

    def begin(
        self,
        name: str,
        size: int,
        sha256: str | None,
        options: dict[str, Any],
        *,
        limit: int,
        limit_bytes: float,
    ) -> Upload:
        """An upload of `size` bytes, none of which has come.

        Raises QueueFullError (there are `limit` uploads, or together they will have more than
        `limit_bytes`).
        """
        with self._lock:
            begun = self._all()
            if len(begun) >= limit or size + sum(one.bytes for one in begun) > limit_bytes:
                raise QueueFullError(
                    f"Unfinished uploads may be {limit} and have {limit_bytes / 1e9:g} GB together, and "
                    "this one is too much: finish or delete others, or try again later"
                )
            upload = Upload(self.folder / secrets.token_hex(16), name, size, sha256, options)
            ensure_folder(upload.folder)
            upload.part.touch()
            values = {k: v for k, v in asdict(upload).items() if k != "folder"}
            write_text_atomically(upload.folder / "about.json", json.dumps(values))
        return upload

    def get(self, upload_id: str) -> Upload | None:
        """An upload by its id; None if there is none."""
        if not re.fullmatch(r"[0-9a-f]{32}", upload_id):
            return None
        folder = self.folder / upload_id
        try:
            values = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return Upload(folder, **values)

    def _all(self) -> list[Upload]:
        folders = self.folder.iterdir() if self.folder.exists() else ()
        return [upload for one in folders if (upload := self.get(one.name)) is not None]

    @contextlib.contextmanager
    def alone(self, upload: Upload) -> Iterator[None]:
        """Keep other requests from the upload; BusyError if one works on it."""
        with self._lock:
            if upload.id in self._busy:
                raise BusyError("Another request sends this upload: try again in a few seconds")
            self._busy.add(upload.id)
        try:
            yield
        finally:
            with self._lock:
                self._busy.remove(upload.id)

    def check_whole(self, upload: Upload) -> None:
        """Raise UsageError if bytes are missing, or are not those of the hash; then all are deleted."""
        if upload.offset < upload.bytes:
            raise UsageError(
                f"The upload must have all of its {upload.bytes} bytes, got {upload.offset}: send the rest"
            )
        if upload.sha256 is None:
            return
        with upload.part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != upload.sha256:
            self.remove(upload.id)
            raise UsageError(
                f"The upload must have the SHA-256 {upload.sha256}, got {found}: send it again"
            )

    def remove(self, upload_id: str) -> None:
        """Delete what has come of an upload."""
        shutil.rmtree(self.folder / upload_id, ignore_errors=True)

    def expire(self, keep_s: float) -> None:
        """Delete uploads of which nothing has come for `keep_s`, and what a killed process left of them."""
        for folder in self.folder.iterdir() if self.folder.exists() else ():
            with contextlib.suppress(FileNotFoundError):
                part = folder / "part"
                last = (part if part.exists() else folder).stat().st_mtime
                with self._lock:
                    if time.time() - last > keep_s and folder.name not in self._busy:
                        self.remove(folder.name)
