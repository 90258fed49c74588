"""What goes into and out of the HTTP API."""

import base64
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Form, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from dinocell.io.planes import channel_of
from dinocell.results.formats import missing_formats
from dinocell.service.queue import Job
from dinocell.service.stored import Change

_EXAMPLE_ID = "3f0c9a5be3d14f0f8a3f0c9a5be3d14f"
PLANE = r"^(max|mean|[0-9]{1,9})$"
SHA256 = "^[0-9a-f]{64}$"
Coordinate = Annotated[float, Field(ge=-1e6, le=1e6)]
Threshold = Annotated[float | None, Field(ge=0, lt=1, examples=[0.47])]


class ThresholdFields(BaseModel):
    """Thresholds in place of the model's; see `dinocell segment --help`."""

    model_config = ConfigDict(extra="forbid")

    peak_threshold: Threshold = Field(
        None, description="A cell needs a peak of the distance map above this."
    )
    fill_threshold: Threshold = Field(
        None, description="Pixels of a cell have a distance map above this."
    )
    min_prominence: Annotated[float | None, Field(ge=0, le=1)] = Field(
        None, description="Peaks that rise less above their saddle are merged."
    )
    min_area_px: Annotated[int | None, Field(ge=0, le=2**31)] = Field(
        None, description="Cells of fewer pixels are removed."
    )
    min_score: Annotated[float | None, Field(ge=0, le=1)] = Field(
        None, description="Cells of a lower score are removed."
    )


class JobOptions(ThresholdFields):
    """How an image is segmented."""

    channels: list[Annotated[str, Field(max_length=100)]] = Field(
        [], description="Names or positions of channels; several are averaged."
    )
    page: Annotated[int | None, Field(ge=0, le=2**31)] = Field(
        None, description="Plane of a stack."
    )
    z: Annotated[str | None, Field(pattern=PLANE)] = Field(
        None, description="Plane along z, or max or mean of all."
    )
    time: Annotated[int | None, Field(ge=0, le=2**31)] = Field(None, description="Point in time.")
    scene: Annotated[int | None, Field(ge=0, le=2**31)] = Field(
        None, description="Scene of the file."
    )
    pixel_size_um: Annotated[float | None, Field(gt=0, le=1e6)] = Field(
        None, description="Edge of a pixel in µm, in place of the file's."
    )
    diameter_px: Annotated[float | None, Field(gt=0, le=1e6)] = Field(
        None,
        description="Typical diameter of a cell in px, brought to that of the training images.",
    )
    allow_mask: bool = Field(False, description="Accept images that look like label images.")
    tta: bool = Field(False, description="Mean of four predictions; four times as slow.")

    def options(self) -> dict[str, Any]:
        """The fields of `SegmentOptions` that differ from their defaults."""
        given = self.model_dump(include=set(JobOptions.model_fields), exclude_defaults=True)
        if self.channels:
            given["channels"] = [channel_of(name) for name in self.channels]
        if self.z is not None and self.z.isdecimal():
            given["z"] = int(self.z)
        return given


class JobForm(JobOptions):
    """An upload with its options, as multipart form."""

    image: UploadFile = Field(description="TIFF, PNG, JPEG, BMP, CZI, ND2, LIF or npy file.")


JobRequest = Annotated[JobForm, Form(media_type="multipart/form-data")]


class JobOfPath(JobOptions):
    """An image that the service can read, with its options."""

    path: str = Field(
        min_length=1,
        max_length=4096,
        description="Absolute path of a file or an OME-Zarr folder on the computer of the service, or "
        "address on S3 or the web, in a place that the service may read from.",
        examples=["/data/plate/A01.tif"],
    )


class UploadRequest(JobOptions):
    """An upload in parts, with the options of its job."""

    name: str = Field("", max_length=1000, description="Name of the file.", examples=["A01.tif"])
    bytes: int = Field(ge=1, le=2**53, description="Size of the file.", examples=[250_000_000])
    sha256: Annotated[str | None, Field(pattern=SHA256)] = Field(
        None, description="SHA-256 of the file, which is checked when it is whole."
    )


class UploadInfo(BaseModel):
    """How much of an upload has come."""

    id: str = Field(description="Of the upload, then of its job.", examples=[_EXAMPLE_ID])
    name: str = Field(examples=["A01"])
    offset: int = Field(description="Where the next part begins, in bytes.", examples=[8_388_608])
    bytes: int = Field(description="Size of the file.", examples=[250_000_000])


class ModelInfo(BaseModel):
    """The model of the service, with its thresholds."""

    name: str = Field(examples=["dinocell-cells"])
    architecture: str = Field(examples=["tiny/16"])
    device: str = Field(examples=["cpu"])
    knows_training_images: bool = Field(
        description="Whether images unlike the training images get a note."
    )
    takes_images: bool = Field(
        True, description="Whether new images are segmented; a page of results takes none."
    )
    missing_formats: dict[str, str] = Field(
        default_factory=missing_formats,
        description="Formats that cannot be written, because a package is not installed; and what to do.",
    )
    peak_threshold: float
    fill_threshold: float
    min_prominence: float
    min_area_px: int


class JobInfo(BaseModel):
    """A job; times are UTC."""

    id: str = Field(examples=[_EXAMPLE_ID])
    name: str = Field(examples=["nuclei"])
    state: str = Field(
        description="queued, running, done, failed, cancelled, deleted or expired",
        examples=["done"],
    )
    created: datetime
    started: datetime | None = None
    finished: datetime | None = None
    waiting_before: int | None = Field(None, description="While queued: jobs that come first.")
    windows_done: int | None = Field(None, description="While running.")
    windows_total: int | None = Field(None, description="While running.")
    error: str | None = Field(None, description="Why the job failed.")
    summary: dict[str, Any] = Field(
        {}, description="As summary.csv of segment.", examples=[{"num_cells": 42, "warnings": ""}]
    )
    options: dict[str, Any] = Field(
        {},
        description="What was asked for: channels, page, z, time, scene, thresholds and so on, as far as they were given.",
        examples=[{"channels": ["DNA"], "z": "max", "peak_threshold": 0.5}],
    )


class Correction(BaseModel):
    """One change by hand."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["remove", "merge", "split", "cut", "grow", "paint", "erase", "undo", "redo"] = (
        Field(
            description="split one cell by seeds, or by itself; cut along a line; grow a missed cell from "
            "a pixel; paint adds a stroke to a cell, or makes one; erase along a stroke",
            examples=["split"],
        )
    )
    cells: list[Annotated[int, Field(ge=1, lt=2**31)]] = Field(
        [], max_length=100_000, description="Numbers of cells.", examples=[[3]]
    )
    points: list[tuple[Coordinate, Coordinate]] = Field(
        [],
        max_length=10_000,
        description="Seeds, line, pixel or stroke: row and column.",
        examples=[[[10, 12], [10, 30]]],
    )
    radius_px: Annotated[float, Field(ge=0.5, le=500)] = Field(3.0, description="Of the brush.")


class RevisionInfo(BaseModel):
    """The labels that a job has now, and the thresholds that made them."""

    revision: int = Field(description="0 is what segment writes; each change adds 1.", examples=[1])
    num_cells: int = Field(examples=[42])
    edited: bool = Field(description="Whether labels were changed by hand.")
    undoable: int = Field(description="Changes that can be undone.")
    redoable: int
    touched: list[int] = Field(description="Numbers of the cells that were changed by hand.")
    peak_threshold: float
    fill_threshold: float
    min_prominence: float
    min_area_px: int
    min_score: float


class ChangeInfo(RevisionInfo):
    """A change, and the pixels that it has changed."""

    row: int = Field(description="Of the upper left corner of the changed pixels.")
    column: int
    height: int
    width: int
    labels: str = Field(
        description="Their labels: uint32, little endian, row by row, zlib, base64; empty if `pixels` is false.",
        examples=[""],
    )


def revision_fields(change: Change) -> dict[str, Any]:
    """The fields of `RevisionInfo`."""
    return {
        **change.revision.to_mapping(),
        "num_cells": change.numbers.size,
        "touched": change.touched.tolist(),
    }


def change_info(change: Change, with_pixels: bool = True) -> ChangeInfo:
    """A change as the API shows it."""
    row, column = change.corner
    height, width = change.labels.shape
    pixels = b""
    if with_pixels:
        pixels = zlib.compress(np.ascontiguousarray(change.labels, "<u4").tobytes(), 1)
    return ChangeInfo(
        **revision_fields(change),
        row=row,
        column=column,
        height=height,
        width=width,
        labels=base64.b64encode(pixels).decode("ascii"),
    )


class ChannelInfo(BaseModel):
    """A channel of the file."""

    name: str = Field(description="In the file, else its position.", examples=["DNA"])
    colour: str = Field(
        description="In the file, else the usual one, as #rrggbb.", examples=["#0000ff"]
    )
    shown: bool = Field(description="Whether the page shows it at first.")


class Cells(BaseModel):
    """Measurements: one list per column, one value per cell; units are px, or µm in `_um` columns."""

    revision: int
    numbers: list[int] = Field(
        description="What corrections call each cell; in the column `label` gaps are closed."
    )
    columns: dict[str, list[Any]] = Field(examples=[{"label": [1, 2], "area": [310, 295]}])


class Segmented(BaseModel):
    """The answer to one picture."""

    job: str = Field(description="For other formats and a relabel.", examples=[_EXAMPLE_ID])
    num_cells: int = Field(examples=[42])
    labels: str = Field(description="Label image, base64: PNG, or TIFF above 65,535 cells.")
    labels_format: str = Field(examples=["png"])
    metrics: dict[str, Any] = Field(examples=[{"num_cells": 42, "quality": 0.84}])
    warnings: list[str]
    model: str = Field(examples=["dinocell-cells"])


class Health(BaseModel):
    """Whether the service works."""

    status: str = Field(description="ok, or starting while the worker loads the model")
    version: str
    queued: int
    running: int


class Problem(BaseModel):
    """Every error, as `application/problem+json` (RFC 9457)."""

    type: str = "about:blank"
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no job of this id: check it"])


def job_info(job: Job, *, waiting_before: int | None, windows: tuple[int, int] | None) -> JobInfo:
    """A job as the API shows it; nothing tells of the folders of this computer."""
    done, total = windows if windows and job.state == "running" else (None, None)
    return JobInfo(
        id=job.id,
        name=job.name,
        state=job.state,
        created=datetime.fromtimestamp(job.created, UTC),
        started=_time(job.started),
        finished=_time(job.finished),
        waiting_before=waiting_before if job.state == "queued" else None,
        windows_done=done,
        windows_total=total,
        error=job.error,
        summary=job.summary,
        options={
            name: job.options[name] for name in JobOptions.model_fields if name in job.options
        },
    )


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def metrics_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a summary."""
    return {key: value for key, value in summary.items() if key != "warnings"}
