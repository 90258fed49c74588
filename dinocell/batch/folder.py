"""The folder of a batch: what it may hold before, the files of each image, and the summary after."""

import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinocell import __version__
from dinocell.batch.inputs import is_unchanged, refuse_other_options
from dinocell.batch.journal import JOURNAL_NAME, complete_last_line, read_journal
from dinocell.batch.options import FREE_OPTIONS, IMAGE_OPTIONS, SegmentOptions
from dinocell.batch.units import Unit
from dinocell.errors import ConfigError, DINOCellError, UsageError, some
from dinocell.files import atomic_path, write_text_atomically
from dinocell.io.s3 import place_of
from dinocell.network.model import DINOCell
from dinocell.results.formats import EXPORT_FORMATS
from dinocell.segmentation.thresholds import ThresholdChanges

SETTINGS_NAME = "settings.json"


def present_results(units: Sequence[Unit], out: Path, formats: Sequence[str]) -> list[Unit]:
    """Those of the units that have results in a folder."""
    endings = [EXPORT_FORMATS[name].suffix for name in formats if name in EXPORT_FORMATS]
    return [
        unit for unit in units if any(os.path.exists(out / f"{unit.name}{end}") for end in endings)
    ]


def refuse_results(
    units: Sequence[Unit], out: Path, formats: Sequence[str], *, resumable: bool = True
) -> None:
    """Refuse to replace finished work unasked.

    Raises UsageError (the folder has results of the images).
    """
    if present := present_results(units, out, formats):
        resume = "set `resume` to keep them, " if resumable else "set "
        raise UsageError(
            f"The output folder must not hold results of these images, got {len(present)} in {out}: "
            f"{resume}`overwrite` to replace them, or choose another folder"
        )


def settings_of(options: SegmentOptions, model: DINOCell) -> dict[str, Any]:
    """Everything that all results depend on, as JSON values; kept beside them in `settings.json`."""
    kept = _settings_without_model(options)
    for key in ThresholdChanges.__annotations__:
        kept.setdefault(key, getattr(model.config, key))
    kept["weights_sha256"] = _hash_of_weights(model)
    kept["dinocell_version"] = __version__
    return json.loads(json.dumps(kept))


def _settings_without_model(options: SegmentOptions) -> dict[str, Any]:
    """The part of `settings_of` that is known before a model is read: no thresholds that are its own."""
    own = (*FREE_OPTIONS, *IMAGE_OPTIONS)
    own += tuple(
        name for name in ThresholdChanges.__annotations__ if getattr(options, name) is None
    )
    return json.loads(json.dumps({k: v for k, v in asdict(options).items() if k not in own}))


def _hash_of_weights(model: DINOCell) -> str:
    """SHA-256 of names and values in float32.

    Kept at the first weight until one is changed in place, because a service asks for every job.
    """
    weights = sorted(model.state_dict(keep_vars=True).items())
    changes = [(id(value), value._version) for _, value in weights]
    known = getattr(weights[0][1], "dinocell_hash", None)
    if known is not None and known[0] == changes:
        return known[1]
    digest = hashlib.sha256()
    for key, value in weights:
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    weights[0][1].dinocell_hash = (changes, digest.hexdigest())
    return digest.hexdigest()


def make_folder(out: Path) -> None:
    """Make the folder of the results, if it does not exist.

    Raises UsageError (a file has that name, or one of a folder above); DINOCellError (the system
    refuses).
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"`out` must be a folder, got '{out}', which is a file or lies below one: choose another name"
        ) from error
    except OSError as error:
        raise DINOCellError(
            f"The results cannot be written to '{out}' ({error.strerror or error}): change the rights of the "
            "folder, or choose another one"
        ) from error


def open_folder(
    out: Path,
    journal_path: Path,
    units: Sequence[Unit],
    settings: dict[str, Any],
    options: SegmentOptions,
    *,
    is_part: bool,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Check a folder that exists, and prepare its journal and settings.

    For a part of a batch, `plan_shards` has checked already whether results may be present.

    Returns
    -------
    done : rows of the images that need not be repeated, by name
    changed : names of images whose files have changed since they were segmented
    """
    if not (options.resume or options.overwrite):
        refuse_results(units, out, options.formats)
    journal = read_journal(journal_path)
    settings_path = out / SETTINGS_NAME
    others = {row["name"] for row in journal} - {unit.name for unit in units}
    if settings_path.exists() and (others or not options.overwrite):
        _refuse_other_settings(
            settings_path, settings, others if options.overwrite else (), is_part=is_part
        )
    elif options.resume and not is_part and present_results(units, out, options.formats):
        raise UsageError(
            f"`resume` must find the settings of the results, got no {settings_path}: choose another "
            "folder, or set `overwrite`"
        )
    done, changed = _done_rows(out, journal, units, options) if options.resume else ({}, [])
    complete_last_line(journal_path)
    if options.overwrite:
        _forget_rows(journal_path, journal, units)
    write_text_atomically(settings_path, json.dumps(settings, indent=1, sort_keys=True))
    return done, changed


def _forget_rows(
    journal_path: Path, journal: Sequence[dict[str, Any]], units: Sequence[Unit]
) -> list[dict[str, Any]]:
    """Remove images that are to be segmented again from a journal with these rows; the rows that stay."""
    names = {unit.name for unit in units}
    kept = [row for row in journal if row["name"] not in names]
    if len(kept) < len(journal):
        write_text_atomically(journal_path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def refuse_mixture(out: Path, units: Sequence[Unit], options: SegmentOptions) -> None:
    """Raise ConfigError if results of other images would stay in a folder beside those of other settings.

    Settings of the model are compared when a part runs; nothing here reads a model.
    """
    others = {row["name"] for row in read_journal(out / JOURNAL_NAME)} - {
        unit.name for unit in units
    }
    if others and (out / SETTINGS_NAME).exists():
        _refuse_other_settings(out / SETTINGS_NAME, _settings_without_model(options), others)


def forget_results(out: Path, units: Sequence[Unit]) -> None:
    """Take images that are to be segmented again from the journal, and settings that no image has."""
    journal_path = out / JOURNAL_NAME
    if not _forget_rows(journal_path, read_journal(journal_path), units):
        (out / SETTINGS_NAME).unlink(missing_ok=True)


def _refuse_other_settings(
    path: Path,
    settings: dict[str, Any],
    others: Collection[str] = (),
    *,
    is_part: bool = False,
) -> None:
    """Raise ConfigError if a folder has other settings; `others` are its images that would keep theirs."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = {}
    earlier = asdict(SegmentOptions()) | earlier  # an option that did not exist yet has its default
    differing = sorted(key for key in settings if settings[key] != earlier.get(key))
    if differing:
        way_out = "plan all its images with `overwrite`" if is_part else "set `overwrite`"
        if others:
            way_out = f"name also its other images ({some(sorted(others))})"
        raise ConfigError(
            f"Results in one folder must share their settings, got other values of "
            f"{', '.join(differing)} than {path}: choose another folder, or {way_out}"
        )


def _done_rows(
    out: Path, journal: Sequence[dict[str, Any]], units: Sequence[Unit], options: SegmentOptions
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Images whose label files all exist: rows of the unchanged ones, names of the others."""
    done: dict[str, dict[str, Any]] = {}
    changed = []
    suffixes = [EXPORT_FORMATS[name].suffix for name in options.formats]
    rows = {row["name"]: row for row in journal}  # the last one counts
    for unit in units:
        path, name, row = unit.path, unit.name, rows.get(unit.name)
        if row is None or not all(os.path.exists(out / f"{name}{end}") for end in suffixes):
            continue
        if place_of(row["source"]).resolve() != path.resolve():
            raise UsageError(
                f"`resume` must continue the same images, got {path.resolve()} where {out} holds "
                f"results of {row['source']}: choose another folder"
            )
        if is_unchanged(unit.image, row):
            refuse_other_options(row, unit.options(options))
            done[name] = row
        else:
            changed.append(name)
    return done, changed


def write_summary(
    path: Path, rows: Sequence[dict[str, Any]], failures: Sequence[tuple[Unit, str]]
) -> None:
    """One line per image; failed ones have their sentence in the last column `error`."""
    columns = ["name", "source"]
    rows = [{key: value for key, value in row.items() if key != "input"} for row in rows]
    for row in rows:
        columns += [key for key in row if key not in columns]
    for unit, _ in failures:
        columns += [key for key in unit.place if key not in columns]
    columns.append("error")
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        for unit, sentence in failures:
            known = {"name": unit.name, "source": str(unit.path), **unit.place}
            writer.writerow({**known, "error": sentence})
