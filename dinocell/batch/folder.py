"""The folder of a batch: what it may hold before, the files of each image, and the summary after."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinocell import __version__
from dinocell.batch.journal import complete_last_line, read_journal
from dinocell.batch.options import FREE_OPTIONS, SegmentOptions
from dinocell.errors import ConfigError, DINOCellError, UsageError
from dinocell.files import atomic_path, write_text_atomically
from dinocell.network.model import DINOCell
from dinocell.results.exports import EXPORT_FORMATS
from dinocell.results.report import ReportEntry, write_report

SETTINGS_NAME = "settings.json"
REPORT_LIMIT = 500
"""Images that a report shows."""


def present_results(paths: Sequence[Path], out: Path, formats: Sequence[str]) -> list[Path]:
    """Those of the images that have results in a folder."""
    endings = [EXPORT_FORMATS[name].suffix for name in formats if name in EXPORT_FORMATS]
    return [
        path for path in paths if any(os.path.exists(out / f"{path.stem}{end}") for end in endings)
    ]


def refuse_results(paths: Sequence[Path], out: Path, formats: Sequence[str]) -> None:
    """Refuse to replace finished work unasked.

    Raises
    ------
    UsageError
        The folder has results of the images.
    """
    present = present_results(paths, out, formats)
    if present:
        raise UsageError(
            f"the output folder must not hold results of these images, got {len(present)} in {out}: "
            "set `resume` to keep them, `overwrite` to replace them, or choose another folder"
        )


def settings_of(options: SegmentOptions, model: DINOCell) -> dict[str, Any]:
    """Everything that the results depend on, as JSON values; kept beside them in `settings.json`."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    kept = {key: value for key, value in asdict(options).items() if key not in FREE_OPTIONS}
    config = model.config
    for key in ("peak_threshold", "fill_threshold", "min_prominence", "min_area_px"):
        if kept[key] is None:
            kept[key] = getattr(config, key)
    kept["weights_sha256"] = digest.hexdigest()
    kept["dinocell_version"] = __version__
    return json.loads(json.dumps(kept))


def make_folder(out: Path) -> None:
    """Make the folder of the results, if it does not exist.

    Raises
    ------
    UsageError
        A file has that name, or one of a folder above.
    DINOCellError
        The system refuses.
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
            f"the results cannot be written to '{out}' ({error.strerror or error}): change the rights of the "
            "folder, or choose another one"
        ) from error


def open_folder(
    out: Path,
    journal_path: Path,
    paths: Sequence[Path],
    settings: dict[str, Any],
    options: SegmentOptions,
    *,
    is_part: bool,
) -> dict[str, dict[str, Any]]:
    """Check the folder, make it, and return the rows of images that need not be repeated, by name.

    For a part of a batch, `plan_shards` has checked already whether results may be present.
    """
    if not (options.resume or options.overwrite):
        refuse_results(paths, out, options.formats)
    journal = read_journal(journal_path)
    settings_path = out / SETTINGS_NAME
    if settings_path.exists() and not options.overwrite:
        _refuse_other_settings(settings_path, settings)
    elif options.resume and not is_part and present_results(paths, out, options.formats):
        raise UsageError(
            f"`resume` must find the settings of the results, got no {settings_path}: choose another "
            "folder, or set `overwrite`"
        )
    done = _done_rows(out, journal, paths, options) if options.resume else {}
    make_folder(out)
    complete_last_line(journal_path)
    if options.overwrite and journal:
        stems = {path.stem for path in paths}
        kept = [row for row in journal if row["name"] not in stems]
        write_text_atomically(journal_path, "".join(json.dumps(row) + "\n" for row in kept))
    write_text_atomically(settings_path, json.dumps(settings, indent=1, sort_keys=True))
    return done


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        earlier = {}
    differing = sorted(key for key in settings if settings[key] != earlier.get(key))
    if differing:
        raise ConfigError(
            f"results in one folder must share their settings, got other values of "
            f"{', '.join(differing)} than {path}: choose another folder, or set `overwrite`"
        )


def _done_rows(
    out: Path, journal: Sequence[dict[str, Any]], paths: Sequence[Path], options: SegmentOptions
) -> dict[str, dict[str, Any]]:
    """Rows of the images whose label files all exist."""
    done: dict[str, dict[str, Any]] = {}
    suffixes = [EXPORT_FORMATS[name].suffix for name in options.formats]
    wanted = {path.stem: path.resolve() for path in paths}
    for row in journal:
        name = row["name"]
        if name not in wanted or not all(os.path.exists(out / f"{name}{end}") for end in suffixes):
            continue
        if Path(row["source"]).resolve() != wanted[name]:
            raise UsageError(
                f"`resume` must continue the same images, got {wanted[name]} where {out} holds "
                f"results of {row['source']}: choose another folder"
            )
        done[name] = row
    return done


def write_summary(
    path: Path, rows: Sequence[dict[str, Any]], failures: Sequence[tuple[Path, str]]
) -> None:
    """One line per image; failed ones have their sentence in the last column `error`."""
    columns = ["name", "source"]
    for row in rows:
        columns += [key for key in row if key not in columns]
    columns.append("error")
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        for failed, sentence in failures:
            writer.writerow({"name": failed.stem, "source": str(failed), "error": sentence})


def write_report_page(
    out: Path,
    paths: Sequence[Path],
    entries: dict[str, ReportEntry],
    failures: Sequence[tuple[Path, str]],
    options: SegmentOptions,
) -> None:
    """`report.html` over the images of this run, in input order."""
    errors = {path.stem: sentence for path, sentence in failures}
    listed = []
    for path in paths:
        if path.stem in entries:
            listed.append(entries[path.stem])
        elif path.stem in errors:
            listed.append(ReportEntry(name=path.stem, error=errors[path.stem]))
    notes = []
    left_out = len(paths) - len(listed)
    if left_out:
        notes.append(
            f"{left_out} images are not shown: done in an earlier run, or beyond the first "
            f"{REPORT_LIMIT}. All are in summary.csv."
        )
    write_report(
        out / "report.html",
        listed,
        title="DINOCell: segmented cells",
        summary={"model": options.model, "images": len(paths)},
        notes=notes,
    )
