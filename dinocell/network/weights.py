"""Backbone files: what is in them, from one format to another, and from where they come."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from dinocell.errors import CheckpointError, DINOCellError, UsageError
from dinocell.files import move_into_place
from dinocell.progress import progress

__all__ = [
    "RELEASED",
    "cache_folder",
    "convert_weights",
    "describe_weights",
    "fetch_weights",
    "find_weights",
    "is_backbone_file",
    "list_weights",
]

# Meta's released ViTs: name → file.  Eight digits of the SHA-256 are part of the file's name.
RELEASED: dict[str, str] = {
    "dinov3_vits16": "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
    "dinov3_vits16plus": "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
    "dinov3_vitb16": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
    "dinov3_vitl16": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
    "dinov3_vitl16_sat": "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth",
    "dinov3_vith16plus": "dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth",
    "dinov3_vit7b16": "dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth",
    "dinov3_vit7b16_sat": "dinov3_vit7b16_pretrain_sat493m-a6675841.pth",
}
_TRIES = 6
_BLOCK = 2**20
_TIMEOUT_S = 60.0
_HUB = "huggingface.co"  # the only host that gets HF_TOKEN


def cache_folder() -> Path:
    """`DINOCELL_WEIGHTS`, else `~/.cache/dinocell/weights`."""
    return Path(
        os.environ.get("DINOCELL_WEIGHTS") or Path.home() / ".cache" / "dinocell" / "weights"
    )


def find_weights(name: str | Path) -> Path:
    """A path as it is, or the file of the cache that a name stands for; fetches nothing.

    Parameters
    ----------
    name : path or str
        A file or folder, a name of `RELEASED`, or the name of a file in the cache.

    Raises
    ------
    UsageError
        A released backbone that has not been fetched; the message says how to get it.
    """
    path = Path(name)
    if path.exists() or path.name != str(name):
        return path
    cached = cache_folder() / RELEASED.get(path.name, path.name)
    if cached.is_file():
        return cached
    if path.name in RELEASED:
        raise UsageError(_how_to_get(path.name, RELEASED[path.name], cache_folder()))
    return path


def list_weights() -> str:
    """One line a released backbone: name, file, whether it is in the cache."""
    folder = cache_folder()
    lines = [f"released DINOv3 backbones (gated by Meta's licence; cache: {folder})"]
    for name, file in RELEASED.items():
        here = "here" if (folder / file).is_file() else "not here"
        lines.append(f"{name:20} {here:9} {file}")
    return "\n".join(lines)


def is_backbone_file(path: str | Path) -> bool:
    """Whether `path` exists and is no DINOCell model with a decoder."""
    path = Path(path)
    if path.is_dir():
        return True
    if not path.is_file():
        return False
    if path.suffix != ".safetensors":
        return True
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return not any(key.startswith("decoder.") for key in file.keys())  # noqa: SIM118
    except SafetensorError:
        return False


def describe_weights(path: str | Path, *, which: str = "teacher") -> str:
    """Facts of a backbone file, as text.

    Parameters
    ----------
    path : path or str
        Any file that `convert_weights` reads.
    which : `teacher` or `student`

    Raises
    ------
    UsageError, CheckpointError
        No such file; not a backbone.
    """
    formats = _formats()
    path = find_weights(path)
    _, d = _read(path, which)
    guess = "" if d.heads_known else " (assumed)"
    base = "" if d.rope_base is None else f", RoPE base {d.rope_base:g}"
    lines = [
        f"{d.path}: {d.name}, {d.format} format" + (f", {d.which}" if d.which else ""),
        f"parameters: {d.num_parameters / 1e6:.2f} M, {d.dtype}",
        f"width {d.embed_dim}, {d.depth} blocks, {d.num_heads} heads{guess}, patch {d.patch_size}, "
        f"{d.in_chans} channels{base}",
        f"feed-forward: {d.ffn}, {d.ffn_hidden} wide; storage tokens: {d.n_storage_tokens}",
        f"k bias masked: {_yes(d.mask_k_bias)}; LayerScale: {_yes(d.layerscale)}; "
        f"norms of their own: {', '.join(d.untied_norms) or 'none'}",
    ]
    if path.is_file():
        lines.append(f"sha256: {formats.sha256(path)}")
    lines += [f"note: {note}" for note in d.notes]
    return "\n".join(lines)


def convert_weights(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    patch_size: int | None = None,
    patch_method: str = "nearest",
    which: str = "teacher",
    overwrite: bool = False,
) -> str:
    """Write the backbone of any DINOv3 file in another format, or for another patch size.

    Parameters
    ----------
    source, target : path
    to : `meta`, `hf`, `timm` or `dinocell`, optional
        By the target's suffix by default: `.pth` meta, `.safetensors` dinocell, a folder hf.
    patch_size : int, optional
        Of the new backbone; the source's by default.
    patch_method : `nearest`, `bilinear`, `pseudo_inverse` or `bicubic`
        See `docs/weights.md`.
    which : `teacher` or `student`
        Of a checkpoint with both.
    overwrite : bool
        Replace what is there.

    Returns
    -------
    str
        What was written, adapted, filled in and left out.

    Raises
    ------
    UsageError, CheckpointError
        No such file, not a backbone, wrong options; the target is there already.
    """
    formats = _formats()
    source, target = find_weights(source), Path(target)
    if target.resolve() == source.resolve():
        raise UsageError(f"OUT must not be IN, got {target} for both: name another file")
    if to is None:
        to = {".pth": "meta", ".pt": "meta", ".safetensors": "dinocell", "": "hf"}.get(
            target.suffix
        )
        if to is None:
            raise UsageError(f"OUT must end in .pth or .safetensors, got {target}: or add --to")
    state, description = _read(source, which)
    note = ""
    if patch_size is not None:
        from dinov3.checkpointer import patch_size_adaptation as adaptation

        try:
            state, done = adaptation.adapt_state_dict(state, patch_size, patch_method)
        except ValueError as error:
            raise UsageError(str(error)) from error
        note = f"; {done}" if done is not None else ""
    losses: list[str] = []
    try:
        formats.write_backbone(state, target, to, overwrite=overwrite, notes=losses)
    except FileExistsError as error:
        raise UsageError(str(error)) from error
    except formats.WeightsError as error:
        raise UsageError(str(error)) from error
    written = f"{description.name} ({description.format}) → {target} ({to}){note}"
    return "\n".join([written, *(f"note: {text}" for text in (*description.notes, *losses))])


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
    name : str
        A name of `RELEASED`, or the name of a file below `source`.
    source : str, optional
        Folder or base URL of a mirror; `DINOCELL_WEIGHTS_MIRROR` by default.  For a released file
        also the whole personal URL from Meta's e-mail.
    offline : bool
        Open no connection; `DINOCELL_OFFLINE=1` does the same.
    sha256 : str, optional
        Expected checksum, or its beginning; of released files the beginning is known.
    out : path, optional
        Folder in place of the cache.

    Returns
    -------
    Path
        The complete, checked file.

    Raises
    ------
    UsageError
        The file is not here and may not be fetched; the message says how to get it.
    DINOCellError
        The connection failed again and again; what came is kept and continued next time.
    CheckpointError
        The checksum differs.
    """
    file = RELEASED.get(name, name)
    if "/" in file or file in ("", ".", ".."):
        raise UsageError(
            f"NAME must be one of {', '.join(RELEASED)} or a file name, got {name!r}: give its folder or "
            "URL with --from"
        )
    expected = sha256 or (Path(file).stem.rsplit("-", 1)[-1] if name in RELEASED else None)
    folder = Path(out) if out is not None else cache_folder()
    target = folder / file
    if target.is_file():
        _check_sum(target, expected)
        return target
    source = source or os.environ.get("DINOCELL_WEIGHTS_MIRROR")
    offline = offline or os.environ.get("DINOCELL_OFFLINE", "0") not in ("", "0")
    if source is None:
        raise UsageError(_how_to_get(name, file, folder))
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file}.part"
    url = urllib.parse.urlsplit(source)
    if url.scheme in ("http", "https"):
        if offline:
            raise UsageError(
                f"{file} must be in {folder} when offline, got no such file: fetch it while connected, or "
                "give a folder with --from"
            )
        whole = url.path.endswith((".pth", ".pt", ".safetensors"))
        if not whole:  # a query, such as a signature, stays behind the path
            path = f"{url.path.rstrip('/')}/{file}"
            source = urllib.parse.urlunsplit(url._replace(path=path))
        _download(source, part)
    else:
        local = Path(urllib.request.url2pathname(url.path) if url.scheme == "file" else source)
        local = local / file if local.is_dir() else local
        if not local.is_file():
            raise UsageError(f"--from must hold {file}, got {source} without it: check the folder")
        shutil.copyfile(local, part)
    try:
        _check_kind(part)
        _check_sum(part, expected)
    except CheckpointError:
        part.unlink()
        raise
    move_into_place(part, target)
    return target


def _download(url: str, part: Path) -> None:
    """Continue `part` until the whole file is there."""
    shown = url.split("?")[0]
    reason = "nothing came"
    for attempt in range(_TRIES):
        try:
            with _open(url, part) as answer:
                if _receive(answer, part):
                    _facts_path(part).unlink(missing_ok=True)
                    return
            reason = f"an end after {_size(part)} bytes"
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"{error.code} {error.reason}"
            if error.code == 416:  # nothing is left to ask for, or the file has changed
                if _size(part) == _facts(part).get("total"):
                    _facts_path(part).unlink(missing_ok=True)
                    return
                part.unlink(missing_ok=True)
                continue
            if error.code in (401, 403):
                raise UsageError(
                    f"{shown} must be open to you, got {reason}: the weights are gated, so ask for access "
                    "first (docs/weights.md; for Hugging Face set HF_TOKEN), or the link has expired"
                ) from error
            if error.code in (400, 404, 410):
                raise UsageError(f"{shown} must exist, got {reason}: check --from") from error
        except urllib.error.URLError as error:
            reason = str(error.reason)
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UsageError(
                    f"{shown} must have a certificate that this machine trusts, got {reason}: set "
                    "SSL_CERT_FILE to your network's certificates"
                ) from error
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
        time.sleep(min(0.2 * 2**attempt, 5.0))
    raise DINOCellError(
        f"{shown} must arrive whole, got an interruption {_TRIES} times (last: {reason}): run the same "
        "command again, it goes on where it stopped"
    )


def _open(url: str, part: Path) -> Any:
    """Ask for what follows `part`, or for all if the file at the source is another one by now."""
    facts = _facts(part)
    begun = _size(part)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if begun:
        request.add_header("Range", f"bytes={begun}-")
        if facts.get("validator"):
            request.add_header("If-Range", facts["validator"])
    place = urllib.parse.urlsplit(url)
    token = os.environ.get("HF_TOKEN")
    if token and place.scheme == "https" and place.hostname == _HUB:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The next request."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise UsageError(
                f"{req.full_url.split('?')[0]} must stay on https, got a redirect to "
                f"{newurl.split('?')[0]}: use another source"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(answer: Any, part: Path) -> bool:
    """Write what comes; whether the file is whole."""
    resumed = answer.status == 206
    begun = _size(part) if resumed else 0
    length = answer.headers.get("Content-Length")
    total = None if length is None else int(length) + begun
    if resumed and total != _facts(part).get("total", total):
        part.unlink()  # another file than the one begun: the next try starts anew
        return False
    validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    if validator and validator.startswith("W/"):
        validator = None  # weak: equal in meaning, not in bytes
    facts = {"total": total, "validator": validator}
    _facts_path(part).write_text(json.dumps(facts), encoding="utf-8")
    room = shutil.disk_usage(part.parent).free
    if total is not None and total - begun > room:
        raise UsageError(
            f"{part.parent} must have room for {(total - begun) / 1e6:.0f} MB, got {room / 1e6:.0f} MB: "
            "make room, or choose another folder with -o"
        )
    with (
        part.open("ab" if resumed else "wb") as stream,
        progress(
            f"{part.stem} (KiB)",
            max((total or 0) // 1024, 1),
            shown=total is not None,
            done=begun // 1024,
        ) as bar,
    ):
        while block := answer.read(_BLOCK):
            stream.write(block)
            bar.advance(len(block) // 1024)
    return total is None or _size(part) >= total


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _facts_path(part: Path) -> Path:
    """Beside a partial file: which version of the file it is a part of."""
    return part.with_name(f"{part.name}.json")


def _facts(part: Path) -> dict[str, Any]:
    """Empty where nothing is known of the beginning."""
    path = _facts_path(part)
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        part.unlink(missing_ok=True)  # cut off while it was written: the beginning is worth nothing
        return {}
    return facts if isinstance(facts, dict) else {}


def _check_kind(path: Path) -> None:
    """Refuse what a server sends in place of a file: a page to sign in, an error, nothing."""
    with path.open("rb") as stream:
        start = stream.read(64)
    if not start or start.lstrip()[:1] == b"<":
        kind = "a web page" if start else "an empty file"
        raise CheckpointError(
            f"{path.stem} must be a file of weights, got {kind}: check --from; gated files need access "
            "first (docs/weights.md)"
        )


def _check_sum(path: Path, expected: str | None) -> None:
    if expected is None:
        return
    found = _formats().sha256(path)
    if not found.startswith(expected.lower()):
        raise CheckpointError(
            f"{path.name} must have a SHA-256 that begins with {expected}, got {found[:16]}...: it is "
            "damaged or another file; remove it and fetch it again"
        )


def _how_to_get(name: str, file: str, folder: Path) -> str:
    if name not in RELEASED:
        return (
            f"a file that is not among the released ones needs its place, got {name!r} without --from: "
            f"give a folder or URL; known names: {', '.join(RELEASED)}"
        )
    return (
        f"{name} must be fetched with access of your own, because Meta gives the weights only to those "
        "who accept its licence, got no --from: ask for access on the DINOv3 downloads page of Meta AI, "
        f"then run `dinocell weights fetch {name} --from 'URL'` with the URL from the e-mail; or accept the licence of the model on "
        "Hugging Face, download its model.safetensors and use that file as it is; or save the file as "
        f"{folder / file}"
    )


def _formats() -> Any:
    from dinov3.cells import weights

    return weights


def _read(path: Path, which: str) -> tuple[dict[str, Any], Any]:
    formats = _formats()
    if which not in ("teacher", "student"):
        raise UsageError(f"--which must be teacher or student, got {which!r}: choose one")
    try:
        return formats.read_backbone(path, which=which)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    except formats.WeightsError as error:
        raise CheckpointError(str(error)) from error


def _yes(value: bool) -> str:
    return "yes" if value else "no"
