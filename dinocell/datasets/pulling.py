"""A public data set from its publisher into a folder that `prepare` reads.

Files are downloaded and unpacked in a folder `OUT.part`, which keeps what has arrived, so that the same
command continues after an interruption.  `OUT` appears when everything is in it.
"""

import hashlib
import json
import math
import os
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinocell.datasets.layouts import LAYOUTS
from dinocell.datasets.remote import Remote, RemoteFile, find_remote
from dinocell.download import Advice, bring, is_url
from dinocell.errors import DataSetError, DINOCellError, UsageError
from dinocell.files import move_into_place, remove_temporary_files, write_text_atomically
from dinocell.progress import progress

DOWNLOAD_JSON = "download.json"
"""In the folder of a download: data set, licence, and for each file address, bytes and SHA-256."""
_NAME = "data_set.txt"
_ADVICE = Advice(
    "the publishers may ask for a form or an account, so download the files yourself and give their "
    "folder as `source`",
    "the publishers may have moved it, so look for the files on the page of the data set, download them "
    "yourself, and give their folder as `source`",
)


@dataclass(frozen=True)
class Pulled:
    """A downloaded data set: its folder, the content of `DOWNLOAD_JSON`, and whether it is new."""

    folder: Path
    record: dict[str, Any]
    is_new: bool = True

    def text(self) -> str:
        lines = [f"{self.folder}: {self.record['data_set']}, licence {self.record['licence']}"]
        for file in self.record["files"]:
            state = "as expected" if file["is_verified"] else "not verified: no checksum is known"
            lines.append(f"  {file['name']}: SHA-256 {file['sha256']} ({state})")
        if not self.is_new:
            lines.append("note: it was pulled before; nothing was changed")
        return "\n".join(lines)


def terms(name: str, accept: str | None = None) -> str:
    """The licence of a data set in one sentence, if it is free or `accept` names it.

    Raises UsageError (the data set cannot be pulled, or its licence limits the use and `accept` is
    another text).
    """
    remote, layout = find_remote(name), LAYOUTS[name]
    if not remote.is_free and accept != layout.licence:
        got = "nothing" if accept is None else repr(accept)
        raise UsageError(
            f"`accept` must be '{layout.licence}' for {name}, got {got}: the licence forbids commercial "
            f"use, so read it at {layout.address} and name it if you agree"
        )
    return f"{name} has the licence {layout.licence}, as far as we know; see {layout.address}"


def pull(
    name: str,
    out: str | os.PathLike[str],
    *,
    accept: str | None = None,
    source: str | None = None,
    offline: bool = False,
    shown: bool = True,
) -> Pulled:
    """Download the files of a data set and unpack its archives.

    Parameters
    ----------
    name : one of `REMOTES`
    out : a new or empty folder, or one that this function has made for the same data set
    accept : the licence, word by word, where it limits the use
    source : folder, or base URL of a mirror, that holds the files in place of the publisher
    offline : open no connection; `DINOCELL_OFFLINE=1` does the same
    shown : show the progress of the unpacking

    Raises
    ------
    UsageError
        See `terms`; `out` holds something else; a file cannot be had from there; the disk is too small.
    DataSetError
        A file is a web page, a damaged archive, or has another checksum.  It is removed.
    DINOCellError
        The connection failed several times.  What arrived stays in `out.part`.
    """
    terms(name, accept)
    remote, out = find_remote(name), Path(os.path.abspath(out))
    part = out.with_name(f"{out.name}.part")
    if (record := _finished(out, name)) is not None:
        if _is_part_of(part, name) or part.exists():  # then it is empty
            _remove(part)
        return Pulled(out, record, is_new=False)
    if not _is_part_of(part, name):
        write_text_atomically(part / _NAME, name)
    (part / "files").mkdir(exist_ok=True)
    try:
        rows = [_fetch(file, part / "files", source, offline=offline) for file in remote.files]
    except DINOCellError:
        if not any((part / "files").iterdir()):
            _remove(part)
        raise
    record = {
        "data_set": name,
        "licence": LAYOUTS[name].licence,
        "address": LAYOUTS[name].address,
        "files": rows,
    }
    content = part / "content"
    shutil.rmtree(content, ignore_errors=True)  # of an interruption
    content.mkdir()
    _unpack(remote, part / "files", content, shown=shown)
    write_text_atomically(content / DOWNLOAD_JSON, json.dumps(record, indent=1) + "\n")
    move_into_place(content, out)
    _remove(part)
    return Pulled(out, record)


def _remove(part: Path) -> None:
    """The name last: a call that is killed here must know what is left."""
    shutil.rmtree(part / "files", ignore_errors=True)
    shutil.rmtree(part)


def _finished(out: Path, name: str) -> dict[str, Any] | None:
    """The record if `out` holds this data set, None if it is empty or missing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / DOWNLOAD_JSON).read_text(encoding="utf-8"))
        if record["data_set"] == name:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f"`out` must be a new or empty folder, '{out}' holds something else: choose another one"
    )


def _is_part_of(part: Path, name: str) -> bool:
    """Whether `part` holds what an interrupted call has downloaded of this data set."""
    remove_temporary_files(part, before=math.inf)
    if not part.exists() or (part.is_dir() and not any(part.iterdir())):
        return False
    try:
        if (part / _NAME).read_text(encoding="utf-8") == name:
            return True
    except (OSError, ValueError):
        pass
    raise UsageError(
        f"'{part}' must hold the unfinished download of {name}, it holds something else: remove it, or "
        "choose another `out`"
    )


def _fetch(file: RemoteFile, folder: Path, source: str | None, *, offline: bool) -> dict[str, Any]:
    """Bring one file into `folder` unless the folder has it; returns its row of the record."""
    target = folder / file.name
    place = file.url if source is None else source
    if source is not None and is_url(source):
        place = f"{source.rstrip('/')}/{file.name}"
    if not target.is_file():
        part = target.with_name(f"{file.name}.part")
        bring(place, part, _ADVICE, offline=offline)
        _check_start(part, place)
        move_into_place(part, target)
    sha256 = _digest(target, "sha256")
    for kind, known in (("SHA-256", file.sha256), ("MD5", file.md5)):
        found = sha256 if kind == "SHA-256" else known and _digest(target, "md5")
        if known not in (None, found):
            target.unlink()
            raise DataSetError(
                f"{file.name} must have the {kind} {known}, got {found}: it was removed; the download was "
                "damaged, or the publishers have changed the file, so try again, or download it yourself "
                "and run `dinocell data prepare`"
            )
    values = {"name": file.name, "url": place, "bytes": target.stat().st_size, "sha256": sha256}
    return {**values, "is_verified": bool(file.sha256 or file.md5)}


def _digest(path: Path, kind: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def _check_start(part: Path, place: str) -> None:
    """Refuse what a server sends in place of a file: a page to sign in, an error, nothing."""
    with part.open("rb") as stream:
        start = stream.read(64)
    is_wrong = not zipfile.is_zipfile(part) if part.stem.endswith(".zip") else start[:1] != b"{"
    if is_wrong:
        part.unlink()
        kind = (
            "a web page" if start.lstrip()[:1] == b"<" else "something else" if start else "nothing"
        )
        wanted = "an archive (zip)" if part.stem.endswith(".zip") else "a JSON file"
        raise DataSetError(
            f"{part.stem} must be {wanted}, got {kind} from {place.split('?')[0]}: {_ADVICE.missing}"
        )


def _unpack(remote: Remote, folder: Path, content: Path, *, shown: bool) -> None:
    """Archives into `content`, other files as they are; a damaged archive is removed."""
    for file in remote.files:
        path, home = folder / file.name, content / file.folder
        home.mkdir(exist_ok=True)
        if path.suffix != ".zip":
            shutil.copyfile(path, home / path.name)
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.filename.startswith("__MACOSX/")]
                _require_room(content, sum(member.file_size for member in members))
                with progress(f"unpacking {path.name}", len(members), shown=shown) as bar:
                    for member in members:
                        archive.extract(member, home)  # never above `home`: see its documentation
                        bar.advance()
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            path.unlink()
            raise DataSetError(
                f"{path.name} must be an archive that can be unpacked, got {error}: it was removed; run "
                "the same command again to download it again"
            ) from error


def _require_room(folder: Path, size: int) -> None:
    room = shutil.disk_usage(folder).free
    if size > room:
        raise UsageError(
            f"'{folder}' must have room for {size / 1e6:.0f} MB, got {room / 1e6:.0f} MB: make room and run "
            "the same command again"
        )
