"""Images and results on S3, or on any server of its protocol, by their address: `s3://BUCKET/KEY`.

Requests are those of obstore, which repeats what fails for a while.  The environment says where and who, with
the names that AWS's own tools read: ``AWS_ENDPOINT_URL`` (another server), ``AWS_REGION``, and the
credentials, which boto3 finds (variables, ``AWS_PROFILE``, roles); without any, requests are not signed,
as public buckets want it.
"""

import datetime
import errno
import io
import os
import re
import shutil
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

from dinocell.errors import DINOCellError, UsageError
from dinocell.io.optional import library
from dinocell.pairs import IMAGE_SUFFIXES, OUTPUT_ENDINGS, SEG_NPY

_SCHEME = "s3://"
_RETRY_S = 60.0  # of one request
_TIMEOUT_S, _CONNECT_S = 30.0, 5.0
_FORBIDDEN = re.compile(r"status(?: code)?:? 403\b")  # and no part of a port or time
_PREFIX = "dinocell-s3-"  # of the names of folders with copies
_COPIES = 2  # files that are kept here: the planes of a file come one after the other
_ZARR_FILES = ("zarr.json", ".zattrs")


class S3Error(DINOCellError, OSError):
    """S3 does not answer, or refuses."""


class S3Path(PurePosixPath):
    """An object, or all objects below a prefix (a folder), with the methods of `Path` that reading needs."""

    __slots__ = ()

    def __str__(self) -> str:
        if self.parts[:1] != ("s3:",):  # relative to another one
            return super().__str__()
        return _SCHEME + "/".join(self.parts[1:])

    @property
    def bucket(self) -> str:
        return self.parts[1]

    @property
    def key(self) -> str:
        return "/".join(self.parts[2:])

    def absolute(self) -> "S3Path":
        return self

    resolve = absolute

    def store(self, prefix: str | None = None) -> Any:
        """obstore's store of the bucket, or of what is below a prefix of it."""
        places = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        endpoint = next((os.environ[name] for name in places if os.environ.get(name)), "")
        names = ("AWS_REGION", "AWS_DEFAULT_REGION")
        region = next((os.environ[name] for name in names if os.environ.get(name)), "us-east-1")
        return _store(self.bucket, prefix, endpoint, region)

    def head(self) -> dict[str, Any]:
        """Size, time of change and tag of an object.

        Raises FileNotFoundError (there is none); S3Error.
        """
        with answered(self):
            return library("obstore", "Addresses on S3", "s3").head(self.store(), self.key)

    def is_file(self) -> bool:
        """Whether there is an object of this name; raises S3Error."""
        try:
            return bool(self.key) and bool(self.head())
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there are objects below this name, and none of this name; raises S3Error."""
        folders, files = self.entries()
        return bool(folders or files) and not self.is_file()

    def is_zarr(self) -> bool:
        """Whether this is a folder that stands for one image; raises S3Error."""
        if any((self / name).is_file() for name in _ZARR_FILES):
            return True
        return self.suffix.lower() == ".zarr" and self.is_dir()

    def stat(self) -> os.stat_result:
        """Kind, size and time; of a folder its kind alone.  Raises FileNotFoundError, S3Error."""
        if not self.is_file():
            if not self.is_dir():
                raise FileNotFoundError(errno.ENOENT, "No such object", str(self))
            return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        about = self.head()
        seconds = about["last_modified"].timestamp()
        values = (stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, about["size"], seconds, seconds, seconds)
        return os.stat_result(values)

    def read_bytes(self) -> bytes:
        """The content of an object.  Raises FileNotFoundError, S3Error."""
        with answered(self):
            return bytes(
                library("obstore", "Addresses on S3", "s3").get(self.store(), self.key).bytes()
            )

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(
        self, mode: str = "r", encoding: str = "utf-8", errors: str = "strict"
    ) -> io.StringIO | io.BytesIO:
        """The content of an object as a file that is read.  Raises FileNotFoundError, S3Error."""
        content = self.read_bytes()
        return io.BytesIO(content) if "b" in mode else io.StringIO(content.decode(encoding, errors))

    def entries(self) -> tuple[list["S3Path"], list["S3Path"]]:
        """Folders and objects one level below, sorted.  Raises S3Error."""
        with answered(self):
            found = library("obstore", "Addresses on S3", "s3").list_with_delimiter(
                self.store(), self.key or None
            )
        top = S3Path(f"{_SCHEME}{self.bucket}")
        return (
            sorted(top / prefix for prefix in found["common_prefixes"]),
            sorted(top / one["path"] for one in found["objects"] if top / one["path"] != self),
        )

    def iterdir(self) -> Iterator["S3Path"]:
        folders, files = self.entries()
        yield from (*folders, *files)

    def objects(self) -> list[dict[str, Any]]:
        """Every object below: `path` (its key), `size`, `last_modified`, `e_tag`.  Raises S3Error."""
        with answered(self):
            batches = library("obstore", "Addresses on S3", "s3").list(
                self.store(), self.key or None
            )
            found = [one for batch in batches for one in batch]
        return sorted(found, key=lambda one: one["path"])

    def put(self, content: bytes | Path, *, new: bool = False) -> bool:
        """Write an object from bytes or a file; `new`: False and nothing if there is one.

        Some servers do not know such a condition and replace it.  Raises S3Error.
        """
        obstore = library("obstore", "Addresses on S3", "s3")
        try:
            with answered(self):
                mode = "create" if new else "overwrite"
                obstore.put(self.store(), self.key, content, mode=mode)
        except FileNotFoundError as error:
            raise S3Error(
                f"'{self}' cannot be written, there is no such bucket: check it"
            ) from error
        except obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def remove(self) -> None:
        """Delete the object, and all objects below.  Raises S3Error."""
        keys = [one["path"] for one in self.objects()] + ([self.key] if self.is_file() else [])
        if keys:
            with answered(self):
                library("obstore", "Addresses on S3", "s3").delete(self.store(), keys)


def place_of(text: str | os.PathLike[str]) -> Path:
    """A path; an `S3Path` for an address of S3, also after `Path` has made one slash of its two.

    Raises UsageError (the address has no bucket).
    """
    if isinstance(text, S3Path):
        return cast(Path, text)
    if not os.fspath(text).startswith("s3:/"):
        return Path(text)
    place = S3Path(text)
    if len(place.parts) < 2:
        raise UsageError(
            f"An address of S3 must be {_SCHEME}BUCKET/NAME, got '{text}': name the bucket"
        )
    return cast(Path, place)


@lru_cache(maxsize=16)
def _store(bucket: str, prefix: str | None, endpoint: str, region: str) -> Any:
    library("obstore", "Addresses on S3", "s3")
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    config: dict[str, Any] = {"region": region}
    if endpoint:
        config |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
    provider = None
    session = library("boto3", "Addresses on S3", "s3").Session()
    if session.get_credentials() is None:
        config["skip_signature"] = True
    else:
        provider = Boto3CredentialProvider(session)
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=config,  # type: ignore[arg-type]
        credential_provider=provider,
        client_options={
            "timeout": f"{_TIMEOUT_S}s",
            "connect_timeout": f"{_CONNECT_S}s",
            "allow_http": endpoint.startswith("http://"),
        },
        retry_config={"max_retries": 10, "retry_timeout": datetime.timedelta(seconds=_RETRY_S)},
    )


@contextmanager
def answered(place: S3Path) -> Iterator[None]:
    """Turn what obstore raises, but FileNotFoundError and AlreadyExistsError, into a sentence."""
    try:
        yield
    except Exception as error:
        if (sentence := refusal(place, error)) is None:
            raise
        raise S3Error(sentence) from error


def refusal(place: S3Path, error: Exception) -> str | None:
    """The sentence on an error of obstore; None for others, and where an object is or is not there."""
    kind, text = type(error), str(error)
    if "NoSuchBucket" in text:
        return f"There is no bucket '{place.bucket}' on S3: check the address '{place}' and AWS_ENDPOINT_URL"
    if kind.__module__ != "obstore.exceptions" or kind.__name__ == "AlreadyExistsError":
        return None
    denied = kind.__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    if denied or _FORBIDDEN.search(text):
        return (
            f"You have no permission for '{place}' on S3: check the credentials (AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and the rights of the bucket"
        )
    reason = text.splitlines()[0].partition(" - ")[2] or text.splitlines()[0]
    return (
        f"S3 must answer, got nothing for '{place}' after several tries ({reason.strip()[:120]}): check the "
        "network and AWS_ENDPOINT_URL, then run the same command again"
    )


class _Copies:
    """Files of S3 in temporary folders; the last few are kept."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[str, str], tempfile.TemporaryDirectory[str]] = OrderedDict()
        self.lock = threading.Lock()
        self.folder: Path | None = None  # where the folders are; None: where temporary files are

    def of(self, place: S3Path) -> Path:
        about = place.head()
        wanted = (str(place), f"{about['e_tag']} {about['size']} {about['last_modified']}")
        with self.lock:
            if wanted not in self.kept:
                while len(self.kept) >= _COPIES:
                    self.kept.popitem(last=False)[1].cleanup()
                folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=self.folder)
                with answered(place), Path(folder.name, place.name).open("wb") as file:
                    body = library("obstore", "Addresses on S3", "s3").get(place.store(), place.key)
                    for piece in body.stream():
                        file.write(piece)
                self.kept[wanted] = folder
            self.kept.move_to_end(wanted)
            return Path(self.kept[wanted].name, place.name)


_copies = _Copies()


def keep_copies_in(folder: Path) -> None:
    """Keep copies of objects in `folder`; those that a process which was killed has left there are removed.

    Raises OSError (it cannot be written).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    _copies.folder = folder


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file that can be opened here: `path` itself, or a copy of an object, of which errors do not speak.

    A folder (Zarr) stays where it is.  Raises FileNotFoundError, S3Error.
    """
    place: Any = path
    if not isinstance(place, S3Path) or place.is_zarr():
        yield path
        return
    copy = _copies.of(place)
    try:
        yield copy
    except DINOCellError as error:
        raise type(error)(str(error).replace(str(copy), str(path))) from error


def images_below(place: S3Path, *, recursive: bool) -> list[Path]:
    """Images that an address stands for: an object, a folder in Zarr format, or those in a folder.

    Results of earlier runs, beside their table of cells, and hidden names are left out.

    Raises UsageError (there is nothing); S3Error.
    """
    if any(letter in str(place) for letter in "*?["):
        raise UsageError(
            f"An address of S3 must be an image or a folder, got the pattern '{place}': name the folder"
        )
    if place.is_file() or (place.key and place.is_zarr()):
        return [cast(Path, place)]
    found: list[S3Path] = []
    waiting, any_found = [place], False
    while waiting:
        folders, files = waiting.pop().entries()
        any_found = any_found or bool(folders or files)
        tables = {file.name for file in files if file.name.endswith("_cells.csv")}
        found += [
            file
            for file in files
            if file.suffix.lower() in IMAGE_SUFFIXES
            and not file.name.startswith(".")
            and not file.name.endswith(SEG_NPY)
            and not _is_result(file, tables)
        ]
        for folder in folders:
            if folder.name.startswith("."):
                continue
            if folder.suffix.lower() == ".zarr" or folder.is_zarr():
                found += [] if _is_result(folder, tables) else [folder]
            elif recursive:
                waiting.append(folder)
    if not any_found:
        raise UsageError(f"There is no file or folder '{place}': check the address")
    return [cast(Path, image) for image in found]


def _is_result(path: S3Path, tables: set[str]) -> bool:
    stem = path.stem.removesuffix(".ome")
    ending = next((end for end in OUTPUT_ENDINGS if stem.endswith(end)), "")
    return bool(ending) and f"{stem.removesuffix(ending)}_cells.csv" in tables
