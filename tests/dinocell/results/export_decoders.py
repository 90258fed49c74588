"""Decoders of exported files, written from the descriptions of the formats: files back to labels."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def fill(rings: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Pixels inside closed rings of (row, col) corners, even-odd: each upright side flips the rest."""
    flips = np.zeros((shape[0], shape[1] + 1), bool)
    for ring in rings:
        for (row_a, col_a), (row_b, col_b) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if col_a == col_b:
                flips[min(row_a, row_b) : max(row_a, row_b), col_a] ^= True
            else:
                assert row_a == row_b
    return np.logical_xor.accumulate(flips, axis=1)[:, :-1]


def signed_area(ring: np.ndarray) -> float:
    """Shoelace formula for (row, col) corners with x = col and y = row."""
    y, x = ring.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def expand(text: str) -> list[int]:
    """COCO's string of run lengths back to numbers."""
    counts: list[int] = []
    number = shift = 0
    for letter in text.encode():
        group = letter - 48
        number += (group % 32) * 2**shift
        shift += 5
        if group < 32:
            if group >= 16:
                number -= 2**shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    return counts


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def read_json(path: Path) -> dict[str, Any]:
    """JSON as RFC 8259 defines it: no NaN, no infinity."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)


def geojson_to_labels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    labels = np.zeros(shape, np.uint32)
    for feature in read_json(path)["features"]:
        geometry = feature["geometry"]
        pieces = geometry["coordinates"]
        if geometry["type"] == "Polygon":
            pieces = [pieces]
        else:
            assert geometry["type"] == "MultiPolygon"
            assert len(pieces) > 1
        rings = [np.array(ring) for piece in pieces for ring in piece]
        assert all((ring[0] == ring[-1]).all() for ring in rings)
        inside = fill([ring[:-1, ::-1] for ring in rings], shape)
        assert not labels[inside].any()
        labels[inside] = feature["properties"]["label"]
    return labels


def coco_to_labels(path: Path) -> np.ndarray:
    document = read_json(path)
    (entry,) = document["images"]
    labels = np.zeros((entry["height"], entry["width"]), np.uint32)
    for annotation in document["annotations"]:
        assert annotation["segmentation"]["size"] == list(labels.shape)
        counts = expand(annotation["segmentation"]["counts"])
        assert sum(counts) == labels.size
        assert min(counts[1:], default=1) > 0
        inside = np.repeat(np.arange(len(counts)) % 2, counts).astype(bool)
        inside = inside.reshape(labels.shape, order="F")
        labels[inside] = annotation["id"]
        rows, cols = np.nonzero(inside)
        size = [np.ptp(cols) + 1, np.ptp(rows) + 1]
        assert annotation["bbox"] == [cols.min(), rows.min(), *size]
        assert annotation["area"] == len(rows)
    return labels


def rois_to_labels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    import roifile

    labels = np.zeros(shape, np.uint32)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            roi = roifile.ImagejRoi.frombytes(archive.read(name))
            assert name == f"{roi.name}.roi"
            rings = [np.asarray(ring)[:, ::-1].astype(int) for ring in roi.coordinates(multi=True)]
            is_simple = len(rings) == 1 and len(rings[0]) <= 65_535
            assert (roi.roitype == roifile.ROI_TYPE.TRACED) == is_simple
            inside = fill(rings, shape)
            rows, cols = np.nonzero(inside)
            ends = [rows.min(), cols.min(), rows.max() + 1, cols.max() + 1]
            assert [roi.top, roi.left, roi.bottom, roi.right] == ends
            labels[inside] = int(roi.name)
    return labels


def check_outlines(path: Path, labels: np.ndarray) -> None:
    """GeoJSON, COCO and ROI files written to `path` give the labels back."""
    from dinocell.results.exports import write_coco_rle, write_geojson
    from dinocell.results.imagej_rois import write_imagej_rois

    expected = labels.astype(np.uint32)
    write_geojson(path, labels)
    np.testing.assert_array_equal(geojson_to_labels(path, labels.shape), expected)
    write_coco_rle(path, labels)
    np.testing.assert_array_equal(coco_to_labels(path), expected)
    write_imagej_rois(path, labels)
    np.testing.assert_array_equal(rois_to_labels(path, labels.shape), expected)
