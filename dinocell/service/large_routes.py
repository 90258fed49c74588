"""The part of the HTTP API for large images: by their path, and uploaded in parts."""

import asyncio
import os
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dinocell.service.queue import Job
from dinocell.service.reading import is_web, readable
from dinocell.service.routes import BODY_OF_BYTES, IN_TURN, PROBLEMS, queued, refuse_if_viewing
from dinocell.service.schemas import JobInfo, JobOfPath, UploadInfo, UploadRequest
from dinocell.service.service import Service
from dinocell.service.stored import safe_name, stored_name
from dinocell.service.uploads import Upload
from dinocell.service.web import allowed, fetch

_LONGEST_PAUSE_S = 30.0  # between two blocks of a part; a connection may be lost without a sign

large_routes = APIRouter(responses=PROBLEMS)


def _upload(request: Request, upload_id: str) -> Upload:
    upload = request.app.state.service.uploads.get(upload_id)
    if upload is None:
        raise HTTPException(404, "There is no unfinished upload of this id: begin it again")
    return upload


AnUpload = Annotated[Upload, Depends(_upload)]


def _info(upload: Upload) -> UploadInfo:
    return UploadInfo(
        id=upload.id, name=safe_name(upload.name), offset=upload.offset, bytes=upload.bytes
    )


@large_routes.post(
    "/jobs/path", status_code=202, summary="Queue an image of the service's computer"
)
def create_job_of_path(request: Request, response: Response, form: JobOfPath) -> JobInfo:
    """Only below the places that `serve` was started with; a file is read where it is, or fetched from the web."""
    service: Service = request.app.state.service
    refuse_if_viewing(service)
    if is_web(form.path):
        address = allowed(form.path, service.web)
        service.queue.refuse_if_large(0, 1e9 * service.options.keep_gb)

        def write(target: Path) -> None:
            fetch(address, service.web, target, service.options.max_mb)

        name = address.parts[-1]
        job = service.enqueue(name, stored_name(name), form.options(), write)
        return queued(response, service, job)
    path = readable(form.path, service.readable)
    job = service.enqueue(path.name, str(path), form.options(), lambda upload: None)
    return queued(response, service, job)


@large_routes.post("/uploads", status_code=201, summary="Begin an upload in parts")
def begin_upload(request: Request, response: Response, form: UploadRequest) -> UploadInfo:
    """Then send the parts, and finish it; it continues after a cut connection or a restart."""
    service: Service = request.app.state.service
    options = service.options
    refuse_if_viewing(service)
    if form.bytes > options.max_bytes:
        raise HTTPException(
            413, f"An upload may have up to {options.max_mb:g} MB: send a smaller file"
        )
    service.queue.refuse_if_large(form.bytes, 1e9 * options.keep_gb)
    upload = service.uploads.begin(
        *(form.name, form.bytes, form.sha256, form.options()),
        limit=options.queue,
        limit_bytes=1e9 * options.keep_gb,
    )
    response.headers["location"] = f"/api/v1/uploads/{upload.id}"
    return _info(upload)


@large_routes.get("/uploads/{upload_id}", summary="Where the next part begins")
def get_upload(upload: AnUpload) -> UploadInfo:
    """After a cut connection, send the bytes from `offset` on."""
    return _info(upload)


@large_routes.put(
    "/uploads/{upload_id}",
    summary="Send a part",
    openapi_extra=BODY_OF_BYTES,
)
async def put_part(
    request: Request,
    upload: AnUpload,
    offset: Annotated[int, Query(ge=0, le=2**53, description="Of the first byte.")],
) -> UploadInfo:
    """Bytes of the file from `offset` on, of any number; 409 if the service has more or fewer."""
    with request.app.state.service.uploads.alone(upload):
        try:
            await _append(request, upload, offset)
        except ClientDisconnect as error:
            raise HTTPException(400, "The connection was cut: continue at the offset") from error
        except TimeoutError as error:
            raise HTTPException(
                408, f"Nothing came for {_LONGEST_PAUSE_S:g} s: continue at the offset"
            ) from error
    return await asyncio.to_thread(_info, upload)


async def _append(request: Request, upload: Upload, offset: int) -> None:
    if offset != upload.offset:
        raise HTTPException(
            409, f"`offset` must be {upload.offset}, where the upload ends, got {offset}: use it"
        )
    left, blocks = upload.bytes - offset, request.stream()
    with upload.part.open("ab") as file:
        while (block := await asyncio.wait_for(anext(blocks, None), _LONGEST_PAUSE_S)) is not None:
            left -= len(block)
            if left < 0:
                raise HTTPException(
                    413,
                    f"The upload must end after {upload.bytes} bytes, as announced: begin it again",
                )
            await asyncio.to_thread(file.write, block)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())


@large_routes.post(
    "/uploads/{upload_id}/finish",
    status_code=202,
    dependencies=IN_TURN,
    summary="Make a job of a whole upload",
)
def finish_upload(request: Request, response: Response, upload_id: str) -> JobInfo:
    """The job has the id of the upload; finishing again gives the same job."""
    service: Service = request.app.state.service
    job = service.queue.get(upload_id)
    if job is None:
        job = _job_of(service, _upload(request, upload_id))
    return queued(response, service, job)


def _job_of(service: Service, upload: Upload) -> Job:
    with service.uploads.alone(upload):
        job = service.queue.get(upload.id)  # another request may have made it meanwhile
        if job is None:
            service.uploads.check_whole(upload)
            file = stored_name(upload.name)
            job = service.enqueue(upload.name, file, upload.options, upload.put, upload.id)
        service.uploads.remove(upload.id)
        return job


@large_routes.delete("/uploads/{upload_id}", status_code=204, summary="Give an upload up")
def delete_upload(request: Request, upload: AnUpload) -> None:
    """What has come is deleted."""
    uploads = request.app.state.service.uploads
    with uploads.alone(upload):
        uploads.remove(upload.id)
