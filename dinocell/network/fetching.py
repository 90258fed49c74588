"""Bring a backbone file into the cache, from a folder or over HTTP."""

import os
import urllib.parse
from pathlib import Path

from dinocell.download import Advice, bring, is_url
from dinocell.errors import CheckpointError, UsageError
from dinocell.files import move_into_place
from dinocell.network.weights import RELEASED, cache_folder, how_to_get

_ADVICE = Advice(
    "the weights are gated, so ask for access first (docs/weights.md; for Hugging Face set HF_TOKEN), "
    "or the link has expired"
)


def fetch_weights(
    name: str,
    *,
    source: str | None = None,
    offline: bool = False,
    sha256: str | None = None,
    out: str | Path | None = None,
) -> Path:
    """Bring a backbone file into the cache, or find it there.

    Parameters
    ----------
    name : a name of `RELEASED`, or the name of a file below `source`
    source : folder or base URL of a mirror; `DINOCELL_WEIGHTS_MIRROR` by default.  For a released
        file also the whole personal URL from Meta's e-mail.
    offline : open no connection; `DINOCELL_OFFLINE=1` does the same
    sha256 : expected checksum, or its beginning; of released files the beginning is known
    out : folder in place of the cache

    Returns the complete, checked file.

    Raises UsageError (the file is not in the cache and cannot be fetched; the message says how to
    get it); DINOCellError (the connection failed several times; the part that came is kept and
    continued next time); CheckpointError (the checksum differs).
    """
    file = RELEASED.get(name, name)
    if "/" in file or file in ("", ".", ".."):
        raise UsageError(
            f"`name` must be one of {', '.join(RELEASED)} or a file name, got {name!r}: give its folder or "
            "URL as `source`"
        )
    expected = sha256 or (Path(file).stem.rsplit("-", 1)[-1] if name in RELEASED else None)
    folder = Path(out) if out is not None else cache_folder()
    target = folder / file
    if target.is_file():
        _check_sum(target, expected)
        return target
    source = source or os.environ.get("DINOCELL_WEIGHTS_MIRROR")
    if source is None:
        raise UsageError(how_to_get(name, file, folder))
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file}.part"
    bring(_url_of(file, source) if is_url(source) else source, part, _ADVICE, offline=offline)
    try:
        _check_kind(part)
        _check_sum(part, expected)
    except CheckpointError:
        part.unlink()
        raise
    move_into_place(part, target)
    return target


def _url_of(file: str, source: str) -> str:
    """The URL of the file at a mirror, or the URL that names a file itself; a query stays behind it."""
    url = urllib.parse.urlsplit(source)
    if url.path.endswith((".pth", ".pt", ".safetensors")):
        return url.geturl()
    return url._replace(path=f"{url.path.rstrip('/')}/{file}").geturl()


def _check_kind(path: Path) -> None:
    """Refuse what a server sends in place of a file: a page to sign in, an error, nothing."""
    with path.open("rb") as stream:
        start = stream.read(64)
    if not start or start.lstrip()[:1] == b"<":
        kind = "a web page" if start else "an empty file"
        raise CheckpointError(
            f"{path.stem} must be a file of weights, got {kind}: check `source`; gated files need "
            "access first (docs/weights.md)"
        )


def _check_sum(path: Path, expected: str | None) -> None:
    if expected is None:
        return
    from dinov3.cells import weights as formats

    found = formats.sha256(path)
    if not found.startswith(expected.lower()):
        raise CheckpointError(
            f"{path.name} must have a SHA-256 that begins with {expected}, got {found[:16]}...: it is "
            "damaged or another file, so remove it and fetch it again"
        )
