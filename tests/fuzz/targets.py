"""What is fuzzed: for each target the bytes of valid files, and a function that must only raise our errors."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "dinov3_modified")]
sys.path += [str(TESTS / "dinocell" / "io"), str(TESTS / "dinocell" / "results")]

from export_decoders import check_outlines  # noqa: E402
from test_damaged_files import valid_files  # noqa: E402

from dinocell.errors import ConfigError, DINOCellError  # noqa: E402
from dinocell.io import read_image, read_labels  # noqa: E402
from dinocell.network.config import ModelConfig  # noqa: E402
from dinocell.network.familiarity import KnownKinds  # noqa: E402
from dinocell.network.model import read_model_header  # noqa: E402
from dinocell.settings import config_from_mapping  # noqa: E402

MAX_PIXELS = 10**6
_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
_TEMPORARY = tempfile.TemporaryDirectory(prefix="fuzz-", dir=_MEMORY)
FOLDER = Path(_TEMPORARY.name)


class Target(NamedTuple):
    """`run` takes any bytes; `seeds` are valid ones."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def _check_sentence(error: DINOCellError) -> None:
    assert len(str(error).splitlines()) == 1, error


def _pictures() -> list[bytes]:
    return valid_files(FOLDER)


def image(content: bytes) -> None:
    """Pixels or one sentence, with and without a page and channels."""
    path = FOLDER / "a.tif"
    path.write_bytes(content)
    for options in ({}, {"page": 0}, {"channels": [0]}):
        try:
            pixels = read_image(path, max_pixels=MAX_PIXELS, **options).pixels
        except DINOCellError as error:
            _check_sentence(error)
        else:
            assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
            assert np.isfinite(pixels).all()


def labels(content: bytes) -> None:
    """Labels or one sentence."""
    path = FOLDER / "a.tif"
    path.write_bytes(content)
    try:
        found = read_labels(path, page=0, max_pixels=MAX_PIXELS)
    except DINOCellError as error:
        _check_sentence(error)
    else:
        assert found.ndim == 2
        assert found.dtype == np.uint32


def model(content: bytes) -> None:
    """The header of a model file or one sentence: the bytes are the file, or DINOCell's part of its header."""
    text = content[1:].decode("latin-1")
    path = FOLDER / "m.safetensors"
    path.write_bytes(_model_file(text) if content[:1] == b"{" else content)
    try:
        header = read_model_header(path)
        with contextlib.suppress(ConfigError):  # which has a line for each wrong key
            config_from_mapping(ModelConfig, header.get("model"))
        if header.get("statistics") is not None:
            KnownKinds.from_mapping(header["statistics"], path)
    except DINOCellError as error:
        _check_sentence(error)


def _model_file(text: str) -> bytes:
    weights = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    start = json.dumps({"__metadata__": {"dinocell": text}, **weights}).encode()
    return len(start).to_bytes(8, "little") + start + bytes(4)


def _headers() -> list[bytes]:
    header = read_model_header("dinocell-tiny")
    ranges = {name: [0, 1] for name in ("background", "texture", "cells")}
    new = {
        "mean": [1, 0.5],
        "limit": 2,
        "ranges": ranges,
        "images": 3,
        "examples": "AAAAAAAAAAAAAAAA",
    }
    old = {"mean": [1], "limit": 2, "ranges": ranges, "images": 3, "directions": [[1]]}
    known = [new | {"scales": {"edges": 9}}, old | {"variances": [4], "rest": 1}]
    texts = [json.dumps(header | {"statistics": statistics}) for statistics in (None, known)]
    short = json.dumps({"format": 1, "statistics": known})
    return [_model_file(texts[0]), *(b"{" + text.encode() for text in (*texts, short))]


def exports(content: bytes) -> None:
    """A label image drawn from the bytes comes back from GeoJSON, COCO and ROI files."""
    if len(content) < 4:  # too short for an image
        return
    kind = ("<u1", "<u2", ">u2", "<u4", "<i8")[content[0] % 5]
    values = np.frombuffer(content, np.uint8)[3:] % (2 + content[1] % 5)
    width = 1 + content[2] % min(len(values), 17)
    image = values[: len(values) // width * width].reshape(-1, width).astype(kind)
    check_outlines(FOLDER / "cells", image)


TARGETS: dict[str, Target] = {
    "image": Target(image, _pictures),
    "labels": Target(labels, _pictures),
    "model": Target(model, _headers),
    "exports": Target(exports, lambda: [bytes([k, 2, 5]) + bytes(range(60)) for k in range(5)]),
}
