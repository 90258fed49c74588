"""The HTTP API, below `/api/v1`, and the two addresses for those who watch the service."""

import asyncio
import base64
import contextlib
import io
import math
import re
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.exceptions import HTTPException

from dinocell import __version__
from dinocell.errors import DINOCellError, UsageError
from dinocell.results.formats import EXPORT_FORMATS
from dinocell.service.metrics import prometheus_text
from dinocell.service.queue import FINAL, Job
from dinocell.service.schemas import (
    Cells,
    ChangeInfo,
    Correction,
    Health,
    JobForm,
    JobInfo,
    JobRequest,
    ModelInfo,
    Problem,
    RevisionInfo,
    Segmented,
    ThresholdFields,
    change_info,
    job_info,
    metrics_of,
    revision_fields,
)
from dinocell.service.service import Service
from dinocell.service.stored import KINDS, StoredResult, stored_name

_MEDIA = {
    **{kind: one.media_type or "application/zip" for kind, one in EXPORT_FORMATS.items()},
    "csv": "text/csv; charset=utf-8",
    "overlay": "image/png",
    "npy": "application/octet-stream",
    "zip": "application/zip",
}
_BY_ACCEPT = {
    "image/png": "png",
    "image/tiff": "tif",
    "application/geo+json": "geojson",
    "text/csv": "csv",
}
_PROBLEM = Problem.model_json_schema()
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"content": {"application/problem+json": {"schema": _PROBLEM}}, "description": text}
    for status, text in {
        400: "The request could not be read.",
        401: "The token is missing or wrong.",
        403: "The request comes from another site's page, or the path may not be read.",
        404: "There is no such job or upload.",
        408: "No more of the upload came for a while.",
        409: "The job is not done, or its labels have changed meanwhile.",
        410: "The files of the job are gone.",
        413: "The upload is too large.",
        422: "A value is wrong, or the image cannot be segmented.",
        429: "The queue is full, or too many wrong tokens came; see Retry-After.",
        501: "The format needs a package that the service does not have.",
        502: "The server of the image fails.",
        504: "The server of the image is too slow.",
    }.items()
}
_LONGEST_TURN_S = 20.0
_LOOK_AGAIN_S = 0.05
BODY_OF_BYTES = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_BINARY = {"content": {"application/octet-stream": {}}, "description": "A numpy file (npy)."}

api = APIRouter(responses=PROBLEMS)
open_routes = APIRouter()


def _service(request: Request) -> Service:
    return request.app.state.service


def _any_job(request: Request, job_id: str) -> Job:
    job = _service(request).queue.get(job_id)
    if job is None:
        raise HTTPException(404, "There is no job of this id: check it")
    return job


def _result(request: Request, job_id: str) -> StoredResult:
    job = _any_job(request, job_id)
    if job.state in ("expired", "deleted", "cancelled"):
        raise HTTPException(410, f"The job is {job.state}, and its files are gone: upload it again")
    if job.state != "done":
        raise HTTPException(409, f"The job is {job.state}: its result exists when it is done")
    try:
        return _service(request).result(job)
    except FileNotFoundError as error:
        raise HTTPException(410, "The files of the job are gone: upload it again") from error


@contextlib.asynccontextmanager
async def in_turn(service: Service, longest_s: float = math.inf) -> AsyncIterator[None]:
    """A place among the requests that compute or write files; memory is for few at a time.

    Those that wait hold no thread, of which there are forty for everything else.  Raises HTTPException
    (429) if none is free for `longest_s`.
    """
    until = time.monotonic() + longest_s
    while not service.places.acquire(blocking=False):
        if time.monotonic() > until:
            raise HTTPException(
                429, "Too many requests compute at once: try again later", {"retry-after": "5"}
            )
        await asyncio.sleep(_LOOK_AGAIN_S)
    try:
        yield
    finally:
        service.places.release()


async def _in_turn(request: Request) -> AsyncIterator[None]:
    async with in_turn(_service(request), _LONGEST_TURN_S):
        yield


AnyJob = Annotated[Job, Depends(_any_job)]
Result = Annotated[StoredResult, Depends(_result)]
Channel = Annotated[
    int | None, Query(ge=0, le=9999, description="A channel of the file, in place of that plane.")
]
# given back before the answer is sent, which a slow client may take minutes to read
IN_TURN = [Depends(_in_turn, scope="function")]


def _info(service: Service, job: Job) -> JobInfo:
    before = service.queue.place(job) if job.state == "queued" else None
    windows = service.news.windows.get(job.id) if service.news else None
    return job_info(job, waiting_before=before, windows=windows)


def refuse_if_viewing(service: Service) -> None:
    """Raise HTTPException where only results are shown."""
    if not _model(service).takes_images:
        raise HTTPException(
            409, "This service shows results, and takes or deletes no images: start dinocell serve"
        )


def _enqueue(service: Service, form: JobForm) -> Job:
    refuse_if_viewing(service)
    upload = form.image

    def write(path: Path) -> None:
        with path.open("wb") as target:
            shutil.copyfileobj(upload.file, target, 2**20)

    if not upload.size:
        raise UsageError(
            "`image` must be a file that is not empty, got 0 bytes: choose another one"
        )
    name = upload.filename or ""
    return service.enqueue(name, stored_name(name), form.options(), write)


def queued(response: Response, service: Service, job: Job) -> JobInfo:
    """The answer to a new job."""
    response.headers["location"] = f"/api/v1/jobs/{job.id}"
    return _info(service, job)


@api.post("/jobs", status_code=202, summary="Upload an image and queue it")
def create_job(request: Request, response: Response, form: JobRequest) -> JobInfo:
    """Answers at once; follow the job by its `events`."""
    service = _service(request)
    return queued(response, service, _enqueue(service, form))


@api.get("/jobs", summary="The newest jobs, newest first")
def list_jobs(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[JobInfo]:
    """Jobs whose files are gone are among them."""
    service = _service(request)
    return [_info(service, job) for job in service.queue.newest(limit)]


@api.get("/jobs/{job_id}", summary="A job")
def get_job(request: Request, job: AnyJob) -> JobInfo:
    """Its state, and its summary when it is done."""
    return _info(_service(request), job)


@api.delete("/jobs/{job_id}", summary="Cancel a job, or delete a finished one")
def delete_job(request: Request, job: AnyJob) -> JobInfo:
    """A running job stops after the next windows; the files are deleted."""
    service = _service(request)
    refuse_if_viewing(service)
    service.queue.remove(job.id)
    service.hear({"job": job.id})
    return _info(service, _any_job(request, job.id))


@api.get(
    "/jobs/{job_id}/events",
    summary="Follow a job (server-sent events)",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Events `job`."}},
)
async def follow_job(request: Request, job: AnyJob) -> Response:
    """An event `job` with the job as JSON now and after each step; the stream ends with the job."""
    service = _service(request)

    async def events() -> AsyncIterator[str]:
        assert service.news is not None
        async for state in service.news.follow(job.id):
            if state is None:
                yield ": still here\n\n"
            else:
                info = await asyncio.to_thread(_info, service, state)
                yield f"event: job\ndata: {info.model_dump_json()}\n\n"

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _file(result: StoredResult, kind: str) -> Response:
    path = result.file(kind)
    headers = {
        "cache-control": "no-store",
        "content-disposition": _as_attachment(result.download_name(path)),
    }
    return FileResponse(path, media_type=_MEDIA[kind], headers=headers)


def _as_attachment(name: str) -> str:
    """The header Content-Disposition (RFC 6266); curl and others read only the first name, which is ASCII."""
    plain = re.sub(r'[^ -~]|["%\\]', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


@api.get(
    "/jobs/{job_id}/result/{kind}",
    dependencies=IN_TURN,
    summary="A file of the result",
    response_class=FileResponse,
    responses={
        200: {
            "content": {kind: {} for kind in sorted({_MEDIA[kind] for kind in KINDS})},
            "description": "The file.",
        }
    },
)
def get_file(result: Result, kind: str) -> Response:
    """One of the formats of `segment` (tif, geojson, ...), csv (measurements), overlay, npy, or zip."""
    if kind not in KINDS:
        raise HTTPException(404, f"The format must be one of {', '.join(KINDS)}: choose one")
    return _file(result, kind)


@api.get("/jobs/{job_id}/cells", dependencies=IN_TURN, summary="Measurements of all cells")
def get_cells(result: Result) -> Cells:
    """The columns of NAME_cells.csv, of the labels that the job has now."""
    now, segmentation = result.segmentation()
    columns = segmentation.measure().to_dict()
    return Cells(revision=now.revision.number, numbers=now.numbers.tolist(), columns=columns)


@api.get(
    "/jobs/{job_id}/image",
    dependencies=IN_TURN,
    summary="The pixels that were segmented",
    responses={200: _BINARY},
    response_class=Response,
)
def get_image(result: Result, channel: Channel = None) -> Response:
    """(H, W) as in the file, of several channels their mean; or one of the `channels` of the file."""
    return _npy(result.stored_pixels(channel))


@api.get(
    "/jobs/{job_id}/labels",
    dependencies=IN_TURN,
    summary="The thresholds and the revision of the labels",
)
def get_revision(result: Result) -> RevisionInfo:
    """The labels themselves are `result/npy`, or `labels/npy` with the numbers of corrections."""
    return RevisionInfo(**revision_fields(result.state()))


@api.get(
    "/jobs/{job_id}/labels/npy",
    dependencies=IN_TURN,
    summary="The labels as corrections number them",
    responses={200: _BINARY},
    response_class=Response,
)
def get_numbered_labels(result: Result) -> Response:
    """(H, W) uint32; a cell keeps its number when others go, while `result/npy` closes the gaps."""
    return _npy(result.state().labels)


def npy_bytes(array: np.ndarray) -> bytes:
    """What `numpy.save` writes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(npy_bytes(array), media_type="application/octet-stream", headers=headers)


Expected = Annotated[int | None, Query(ge=0, le=2**31)]
WithPixels = Annotated[bool, Query(description="Whether the answer has the changed pixels.")]


@api.post(
    "/jobs/{job_id}/relabel", dependencies=IN_TURN, summary="Other thresholds, without the network"
)
def relabel(
    result: Result,
    thresholds: ThresholdFields,
    revision: Expected = None,
    amend: Annotated[
        bool, Query(description="One step, for undo, with the relabel before it.")
    ] = False,
    pixels: WithPixels = True,
) -> ChangeInfo:
    """Runs the watershed on the stored distance map; cells that were changed by hand stay.

    With `revision`, labels of another revision are not replaced (409).
    """
    changes = thresholds.model_dump()
    return change_info(result.relabel(changes, revision=revision, amend=amend), pixels)


@api.post("/jobs/{job_id}/corrections", dependencies=IN_TURN, summary="Change the labels by hand")
def correct(
    result: Result,
    correction: Correction,
    revision: Expected = None,
    pixels: WithPixels = True,
) -> ChangeInfo:
    """Removes, merges, splits, grows or paints cells; undo and redo are corrections, too.

    With `revision`, labels of another revision are not changed (409).
    """
    values = correction.model_dump()
    return change_info(result.correct(correction.kind, values, revision=revision), pixels)


@api.put(
    "/jobs/{job_id}/labels",
    dependencies=IN_TURN,
    summary="Replace the labels by corrected ones",
    openapi_extra=BODY_OF_BYTES,
)
async def put_labels(
    request: Request, result: Result, revision: Annotated[int, Query(ge=0, le=2**31)]
) -> RevisionInfo:
    """A numpy file (npy) of whole numbers of the shape of the image; 0 is background.

    `revision` is that of the labels that were corrected; if somebody has changed them since, nothing is
    replaced (409).  Cells with the same pixels as before do not count as changed by hand.
    """
    labels = _array(await request.body())

    def replace() -> RevisionInfo:
        return RevisionInfo(**revision_fields(result.replace_labels(labels, revision=revision)))

    return await asyncio.to_thread(replace)


def _array(body: bytes) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
    except Exception as error:  # of damaged files, it raises many kinds
        raise UsageError(
            f"Labels must be a numpy file, and it cannot be read ({error}): send what np.save wrote"
        ) from error


@api.post(
    "/segment",
    summary="Segment one picture and wait for the answer",
    responses={
        200: {
            "model": Segmented,
            "content": {kind: {} for kind in ("image/png", "image/tiff", "application/geo+json")},
            "description": "JSON, or the file that `format` or the header Accept asks for.",
        }
    },
)
async def segment(
    request: Request,
    form: JobRequest,
    format: Annotated[str | None, Query(description=f"One of {', '.join(KINDS)}.")] = None,
    accept: Annotated[str, Header()] = "",
) -> Response:
    """Labels, count and metrics as JSON; `format=png`, or `Accept: image/png`, gives the file itself."""
    service = _service(request)
    if format is not None and format not in KINDS:
        raise UsageError(f"`format` must be one of {', '.join(KINDS)}, got {format}: choose one")
    job = await asyncio.to_thread(_enqueue, service, form)
    ended = await _wait_for(request, service, job)
    if ended.state not in FINAL:
        raise HTTPException(
            503, f"The service stops; the job {job.id} continues when it starts again"
        )
    if ended.state != "done":
        raise HTTPException(
            422 if ended.state == "failed" else 410, ended.error or f"The job was {ended.state}"
        )
    kind = format or _BY_ACCEPT.get(accept.partition(",")[0].partition(";")[0].strip())
    headers = {"location": f"/api/v1/jobs/{job.id}"}
    result = await asyncio.to_thread(service.result, ended)
    async with in_turn(service):
        if kind is not None:
            answer = await asyncio.to_thread(_file, result, kind)
            answer.headers.update(headers)
            return answer
        whole = await asyncio.to_thread(_segmented, service, ended, result)
    return Response(whole.model_dump_json(), media_type="application/json", headers=headers)


async def _wait_for(request: Request, service: Service, job: Job) -> Job:
    """The job when it has ended; it is cancelled if the client leaves."""
    assert service.news is not None
    ended = job
    async for state in service.news.follow(job.id, beat_s=1.0):
        ended = state or ended
        if ended.state not in FINAL and await request.is_disconnected():
            await asyncio.to_thread(service.queue.remove, job.id)
    return ended


def _segmented(service: Service, job: Job, result: StoredResult) -> Segmented:
    kind = "png" if job.summary["num_cells"] <= 65_535 else "tif"
    notes = job.summary.get("warnings", "")
    return Segmented(
        job=job.id,
        num_cells=job.summary["num_cells"],
        labels=base64.b64encode(result.file(kind).read_bytes()).decode("ascii"),
        labels_format=kind,
        metrics=metrics_of(job.summary),
        warnings=notes.split("; ") if notes else [],
        model=_model(service).name,
    )


def _model(service: Service) -> ModelInfo:
    if service.worker is None or service.worker.model is None:
        raise DINOCellError("The worker has not loaded its model yet: try again later")
    return ModelInfo(**service.worker.model)


@api.get("/models", summary="The models of the service")
def list_models(request: Request) -> list[ModelInfo]:
    """One; its thresholds hold where a job gives none."""
    return [_model(_service(request))]


@open_routes.get("/health", summary="Whether the service works")
def health(request: Request, response: Response) -> Health:
    """Status 503 while the worker starts, or starts again."""
    service = _service(request)
    worker = service.worker
    ready = worker is not None and worker.model is not None and worker.alive
    response.status_code = 200 if ready else 503
    return Health(
        status="ok" if ready else "starting", version=__version__, **service.queue.depths()
    )


@open_routes.get("/metrics", summary="Figures for Prometheus", response_class=Response)
def metrics(request: Request) -> Response:
    """Images, cells, seconds by stage, jobs by their end, and the queue."""
    service = _service(request)
    text = prometheus_text(service.queue.counters(), service.queue.depths())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
