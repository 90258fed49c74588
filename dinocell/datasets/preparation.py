"""A data set as its publishers store it → folders that `train` and `evaluate` read.

The work is done in a folder `OUT.part`, which gets the name `OUT` when everything is in it.  A journal
there has one line per finished sample, so that the same command continues after an interruption.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.datasets.layouts import Layout, find_layout
from dinocell.datasets.pulling import DOWNLOAD_JSON
from dinocell.datasets.sample import MANIFESTS, PROGRESS, Content, Sample, labelled
from dinocell.datasets.splits import SplitOptions, count_splits, divide
from dinocell.errors import DataSetError, DINOCellError, UsageError, some
from dinocell.files import move_into_place, remove_temporary_files, write_text_atomically
from dinocell.io import write_image, write_labels
from dinocell.labels import check_labels, require_cells
from dinocell.progress import count_text, progress
from dinocell.settings import require

MANIFEST_CSV, MANIFEST_JSON = MANIFESTS
_JOURNAL, _RECIPE = PROGRESS
_COLUMNS = (
    *("name", "split", "stratum", "image", "labels", "height_px", "width_px", "channels"),
    *("num_cells", "pixel_size_um", "source_file", "image_sha256", "labels_sha256", "notes"),
)


@dataclass(frozen=True)
class Facts:
    """What the caller knows better than the table of layouts: None leaves it to the table."""

    licence: str | None = None
    pixel_size_um: float | None = None

    def __post_init__(self) -> None:
        size = self.pixel_size_um
        require(
            size is None or 0 < size < math.inf,
            f"`pixel_size_um` must be above 0, got {size}: give micrometres, or leave it out",
        )


@dataclass(frozen=True)
class Prepared:
    """A prepared data set: its folder, its manifest, and sentences for the user."""

    folder: Path
    manifest: dict[str, Any]
    notes: tuple[str, ...]

    def text(self) -> str:
        counts = ", ".join(f"{split} {count}" for split, count in self.manifest["splits"].items())
        lines = [
            f"{self.folder}: {counts} images, {count_text(self.manifest['num_cells'], 'cell')}"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def prepare(
    name: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    splits: SplitOptions | None = None,
    facts: Facts | None = None,
    shown: bool = True,
) -> Prepared:
    """Write `out/{train,val,test}/{images,labels}` and the manifest.

    Parameters
    ----------
    name : one of `LAYOUTS`
    source : the folder (or the file, for one npz or JSON) as it was downloaded and unpacked
    out : a new or empty folder outside `source`, or one that this same call has made
    splits : how the samples are divided
    facts : licence and pixel size, where the table of layouts does not know them

    Images without labels are left out, with a note, and the manifest lists them.  Images become TIFF in
    their own data type, labels 16-bit PNG (TIFF above 65,535 cells) with the cells numbered 1..n.  One
    image is in memory at a time.

    Raises
    ------
    UsageError
        `name` is unknown, `source` does not exist, or `out` is inside it or holds something else.
    DataSetError, ImageFileError
        The source is not what `name` says, no image has labels, or a file is damaged.  What was finished
        stays in `out.part`.
    """
    layout, splits, facts = find_layout(name), splits or SplitOptions(), facts or Facts()
    source, out = Path(source), Path(os.path.abspath(out))
    if not source.exists():
        raise UsageError(f"`source` must be a file or folder, got '{source}': check the path")
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"`out` must be outside `source`, whose files are all read, got '{out}' in '{source}': choose "
            "another folder"
        )
    recipe = {
        "data_set": name,
        "source": str(source.resolve()),
        "split": dataclasses.asdict(splits),
        "facts": dataclasses.asdict(facts),
    }
    if (known := _finished(out, recipe)) is not None:
        _forget_progress(out)  # a kill may have come before
        return Prepared(out, known, ("it was prepared before; nothing was changed",))
    part = out.with_name(f"{out.name}.part")
    for folder in (part, *part.rglob("*/")):
        remove_temporary_files(folder, before=math.inf)
    _check_part(part, recipe)
    notes: list[str] = []
    samples, alone = labelled(layout.read(source, notes), source, layout.files)
    _refuse_same_names(samples)
    chosen = divide(samples, splits)
    part.mkdir(parents=True, exist_ok=True)
    write_text_atomically(part / _RECIPE, json.dumps(recipe, indent=1))
    rows = _write_samples(part, chosen, facts.pixel_size_um or layout.pixel_size_um, shown=shown)
    manifest = _manifest(recipe, layout, facts, rows)
    manifest["images_without_labels"] = [_below(source, path) for path in alone]
    notes += _notes_without_labels(alone) + _general_notes(layout, manifest, rows)
    manifest["notes"] = notes
    if (pulled := source / DOWNLOAD_JSON).is_file():
        manifest["download"] = json.loads(pulled.read_text(encoding="utf-8"))
    _write_manifest(part, manifest, rows)
    move_into_place(part, out)
    _forget_progress(out)
    return Prepared(out, manifest, tuple(notes))


def _forget_progress(out: Path) -> None:
    for file in (_JOURNAL, _RECIPE):
        (out / file).unlink(missing_ok=True)


def _finished(out: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest if `out` is the result of this recipe, None if it is empty or missing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = json.loads((out / MANIFEST_JSON).read_text(encoding="utf-8"))
        if manifest["recipe"] == recipe:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f"`out` must be a new or empty folder, '{out}' holds something else: choose another one"
    )


def _check_part(part: Path, recipe: dict[str, Any]) -> None:
    if not part.exists() or (part.is_dir() and not any(part.iterdir())):
        return
    try:
        if json.loads((part / _RECIPE).read_text(encoding="utf-8")) == recipe:
            return
    except (OSError, ValueError):
        pass
    raise UsageError(
        f"'{part}' must hold the unfinished work of this same command, it holds something else: remove it, "
        "or choose another `out`"
    )


def _refuse_same_names(samples: Sequence[Sample]) -> None:
    seen: dict[str, Sample] = {}
    for sample in samples:
        other = seen.setdefault(sample.name.casefold(), sample)
        if other is not sample:
            raise DataSetError(
                f"Images must have names that differ, got '{other.source_file}' and "
                f"'{sample.source_file}' for {sample.name}: rename one, or prepare the folders one by one"
            )


def _write_samples(
    part: Path, chosen: Sequence[tuple[Sample, str]], pixel_size_um: float | None, *, shown: bool
) -> list[dict[str, Any]]:
    """Write what the journal does not list; returns the rows of all samples in their order."""
    rows = _read_journal(part)
    todo = [(sample, split) for sample, split in chosen if sample.name not in rows]
    with (
        progress("preparing", len(chosen), shown=shown, done=len(chosen) - len(todo)) as bar,
        open(part / _JOURNAL, "a", encoding="utf-8") as journal,
    ):
        for sample, split in todo:
            try:
                row = _write_sample(part, sample, split, pixel_size_um)
            except (DINOCellError, ValueError, TypeError) as error:
                raise _with_progress(error, sample, part, len(rows)) from error
            journal.write(json.dumps(row) + "\n")
            journal.flush()
            rows[sample.name] = row
            bar.advance(note=sample.name)
    return [rows[sample.name] for sample, _ in chosen]


def _read_journal(part: Path) -> dict[str, dict[str, Any]]:
    """Name → row of the samples that are finished; a line that a crash has cut is dropped."""
    path = part / _JOURNAL
    if not path.exists():
        return {}
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if (part / row["image"]).is_file() and (part / row["labels"]).is_file():
            rows[row["name"]] = row
    write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows.values()))
    return rows


def _with_progress(error: Exception, sample: Sample, part: Path, done: int) -> DINOCellError:
    """The error with what was kept; without a finished sample nothing is."""
    kind = type(error) if isinstance(error, DINOCellError) else DataSetError
    text = str(error).rstrip(".")
    if not isinstance(error, DINOCellError):
        text = f"'{sample.source_file}' cannot be used for {sample.name}: {text}"
    if not done:
        shutil.rmtree(part)
        return kind(text)
    return kind(
        f"{text}. {done} finished images were kept in '{part}': correct the source and run the same "
        "command again"
    )


def _write_sample(
    part: Path, sample: Sample, split: str, pixel_size_um: float | None
) -> dict[str, Any]:
    content = sample.read()
    labels = _numbered(_checked(content, sample))
    image, names = content.image, content.channel_names
    if image.dtype.kind in "iu" and image.dtype.itemsize > 4:  # TIFF readers know no such numbers
        image = image.astype(np.float64)
    pixel_size_um = content.pixel_size_um or pixel_size_um
    num_cells = int(labels.max(initial=0))
    image_path = Path(split) / "images" / f"{sample.name}.tif"
    suffix = ".png" if num_cells < 2**16 else ".tif"
    labels_path = Path(split) / "labels" / f"{sample.name}{suffix}"
    write_image(part / image_path, image, pixel_size_um=pixel_size_um, channel_names=names)
    write_labels(part / labels_path, labels, pixel_size_um=pixel_size_um)
    values = (
        *(sample.name, split, sample.stratum, image_path.as_posix(), labels_path.as_posix()),
        *(*labels.shape, ";".join(names or ()), num_cells, pixel_size_um, str(sample.source_file)),
        *(_sha256(part / image_path), _sha256(part / labels_path), "; ".join(content.notes)),
    )
    return dict(zip(_COLUMNS, values, strict=True))


def _checked(content: Content, sample: Sample) -> NDArray:
    labels = check_labels(content.labels)
    if content.image.shape[:2] != labels.shape:
        sizes = " and ".join(" × ".join(map(str, a.shape)) for a in (content.image, labels))
        raise DataSetError(
            f"An image and its labels must have the same size, got {sizes} for '{sample.source_file}': "
            "check that they belong together"
        )
    require_cells(labels, f"the labels of {sample.source_file}")
    return labels


def _numbered(labels: NDArray) -> NDArray[np.uint32]:
    """The same cells with the numbers 1..n in their order."""
    values, inverse = np.unique(labels, return_inverse=True)
    numbers = np.arange(len(values), dtype=np.uint32) + np.uint32(values[0] != 0)
    return numbers[inverse.reshape(labels.shape)]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(
    recipe: dict[str, Any], layout: Layout, facts: Facts, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "data_set": recipe["data_set"],
        "holds": layout.holds,
        "licence": facts.licence or layout.licence,
        "address": layout.address,
        "splits": count_splits([row["split"] for row in rows]),
        "num_cells": sum(row["num_cells"] for row in rows),
        "channels": sorted({row["channels"] for row in rows} - {""}),
        "pixel_sizes_um": sorted({row["pixel_size_um"] for row in rows} - {None}),
        "recipe": recipe,
    }


def _below(source: Path, path: Path) -> str:
    return Path(os.path.relpath(path, source)).as_posix()


def _notes_without_labels(alone: Sequence[Path]) -> list[str]:
    if not alone:
        return []
    return [
        f"Images without labels were left out: {len(alone)} ({some([path.name for path in alone])}); "
        f"{MANIFEST_JSON} lists all of them"
    ]


def _general_notes(
    layout: Layout, manifest: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> list[str]:
    notes = [layout.note] if layout.note else []
    if manifest["licence"] is None:
        notes.append(
            "The licence is unknown: find it out before you share a model, and set `licence`"
        )
    if noted := sum(bool(row["notes"]) for row in rows):
        notes.append(
            f"{noted} images have notes of their own: see the last column of {MANIFEST_CSV}"
        )
    notes += [f"no image is in {split}" for split, count in manifest["splits"].items() if not count]
    return notes


def _write_manifest(part: Path, manifest: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(part / MANIFEST_CSV, table.getvalue(), errors="backslashreplace")
    write_text_atomically(part / MANIFEST_JSON, json.dumps(manifest, indent=1) + "\n")
