"""The results of many images as one zip, written while it is sent: `GET /api/v1/results`."""

import asyncio
import os
import time
import zipfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from dinocell.errors import DINOCellError
from dinocell.service.queue import Job
from dinocell.service.routes import PROBLEMS, in_turn
from dinocell.service.service import Service
from dinocell.service.stored import KINDS

_BLOCK_BYTES = 2**20
_TRIES = 3  # to open files before changes of the labels delete them
LEFT_OUT = "LEFT_OUT.txt"
"""Entry that names what could not be written, with the reason."""

download_routes = APIRouter(responses=PROBLEMS)


@download_routes.get(
    "/results",
    summary="The results of many images as one zip",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {}}, "description": "The files."}},
)
def get_results(
    request: Request,
    kind: Annotated[
        Sequence[Literal[KINDS]],  # type: ignore[valid-type]
        Query(min_length=1, max_length=len(KINDS), description="Formats."),
    ] = ("tif", "csv", "overlay"),
    job: Annotated[
        Sequence[str], Query(max_length=1000, description="Ids; without them all that are done.")
    ] = (),
) -> StreamingResponse:
    """Files of one image are of one revision.  What vanishes meanwhile is named in LEFT_OUT.txt."""
    service: Service = request.app.state.service
    jobs = _chosen(service, job)
    headers = {
        "content-disposition": 'attachment; filename="results.zip"',
        "cache-control": "no-store",
    }
    blocks = zipped_results(service, jobs, list(dict.fromkeys(kind)))
    return StreamingResponse(blocks, media_type="application/zip", headers=headers)


def _chosen(service: Service, ids: Sequence[str]) -> list[Job]:
    if not ids:
        return [job for job in reversed(service.queue.newest(2**31)) if job.state == "done"]
    jobs = []
    for job_id in dict.fromkeys(ids):
        job = service.queue.get(job_id)
        if job is None:
            raise HTTPException(404, f"There is no job {job_id}: check it")
        if job.state != "done":
            raise HTTPException(409, f"The job {job_id} is {job.state}: leave it out")
        jobs.append(job)
    return jobs


class _Sink:
    """What `zipfile` writes to; it cannot go back, and keeps what was not taken yet."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def write(self, block: bytes) -> int:
        """Take a block."""
        self._blocks.append(bytes(block))
        return len(block)

    def flush(self) -> None:
        """There is nothing to do."""

    def take(self) -> bytes:
        """All blocks since the last call."""
        taken, self._blocks = b"".join(self._blocks), []
        return taken


async def zipped_results(
    service: Service, jobs: Sequence[Job], kinds: Sequence[str]
) -> AsyncIterator[bytes]:
    """The blocks of a zip; one image is rendered, and one block of its files held, at a time."""
    sink, left_out, names = _Sink(), [], _Names()
    target: Any = sink
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for job in jobs:
            with ExitStack() as stack:
                try:
                    async with in_turn(service):
                        files = await asyncio.to_thread(_opened, service, job, kinds, stack)
                except (DINOCellError, OSError) as error:
                    reason = error if isinstance(error, DINOCellError) else "its files are gone"
                    left_out.append(f"{job.name} ({job.id}): {reason}\n")
                    continue
                name = names.free(job.name)
                for ending, file in files:
                    with archive.open(_entry(f"{name}{ending}", file), "w") as entry:
                        while block := await asyncio.to_thread(file.read, _BLOCK_BYTES):
                            await asyncio.to_thread(entry.write, block)
                            yield sink.take()
        if left_out:
            archive.writestr(LEFT_OUT, "".join(left_out))
    yield sink.take()


def _entry(name: str, file: BinaryIO) -> zipfile.ZipInfo:
    about = os.fstat(file.fileno())
    entry = zipfile.ZipInfo(name, time.localtime(about.st_mtime)[:6])
    entry.file_size, entry.compress_type = about.st_size, zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


def _opened(
    service: Service, job: Job, kinds: Sequence[str], stack: ExitStack
) -> list[tuple[str, BinaryIO]]:
    """Ending and content of the files of one image: open, they stay although their names go."""
    for tried in range(1, _TRIES + 1):
        with ExitStack() as opened:
            try:
                result = service.result(job)
                files: list[tuple[str, BinaryIO]] = [
                    (path.name.removeprefix(result.stem), opened.enter_context(path.open("rb")))
                    for path in result.files(kinds).values()
                ]
            except FileNotFoundError:
                if tried == _TRIES:
                    raise
                continue
            stack.enter_context(opened.pop_all())
            return files
    raise AssertionError


class _Names:
    """Names that differ, also where capital letters do not count."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def free(self, name: str) -> str:
        """`name`, or `name (2)` and so on if it is taken."""
        number, found = 1, name
        while found.casefold() in self._taken:
            number += 1
            found = f"{name} ({number})"
        self._taken.add(found.casefold())
        return found
