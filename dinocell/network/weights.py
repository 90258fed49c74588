"""Backbone files: which are released, where they lie, what is in them, and their conversion."""

import os
from pathlib import Path
from typing import Any

from dinocell.errors import CheckpointError, UsageError, raised_as
from dinocell.files import home_folder, require_writable, saying_what_failed
from dinocell.tree import tree_imports

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


EXPORTED = (".onnx", ".pt2", ".zip")
"""Endings of the files that `dinocell export` writes."""

BUNDLED_FOLDER = Path(__file__).parents[1] / "models"


def cache_folder() -> Path:
    """`DINOCELL_WEIGHTS`, else `~/.cache/dinocell/weights`; UsageError without a home."""
    chosen = os.environ.get("DINOCELL_WEIGHTS")
    if chosen:
        return Path(chosen)
    home = home_folder()
    if home is None:
        raise UsageError(
            "The home folder of this user is not known: set DINOCELL_WEIGHTS to the folder for weights"
        )
    return home / ".cache" / "dinocell" / "weights"


def find_weights(name: str | Path) -> Path:
    """A path as it is, or the file that a name stands for: bundled, or in the cache; fetches nothing.

    Raises UsageError (a released backbone that has not been fetched; the message says how to get
    it).
    """
    path = Path(name)
    if path.exists() or path.name != str(name):
        return path
    for suffix in (".safetensors", ".onnx"):
        if (bundled := BUNDLED_FOLDER / f"{path.name}{suffix}").is_file():
            return bundled
    cached = cache_folder() / RELEASED.get(path.name, path.name)
    if cached.is_file():
        return cached
    if path.name in RELEASED:
        raise UsageError(how_to_get(path.name, RELEASED[path.name], cache_folder()))
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
        return path.suffix not in EXPORTED
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return not any(key.startswith("decoder.") for key in file.keys())  # noqa: SIM118
    except SafetensorError:
        return False


def describe_weights(path: str | Path, *, which: str = "teacher") -> str:
    """Facts of a backbone file that `convert_weights` reads, as text.

    Raises UsageError, CheckpointError (the file does not exist, or holds no backbone).
    """
    formats = _formats()
    path = find_weights(path)
    _, d = _read(path, which)
    yes = {True: "yes", False: "no"}
    guess = "" if d.heads_known else " (assumed)"
    base = "" if d.rope_base is None else f", RoPE base {d.rope_base:g}"
    lines = [
        f"{d.path}: {d.name}, {d.format} format" + (f", {d.which}" if d.which else ""),
        f"parameters: {d.num_parameters / 1e6:.2f} M, {d.dtype}",
        f"width {d.embed_dim}, {d.depth} blocks, {d.num_heads} heads{guess}, patch {d.patch_size}, "
        f"{d.in_chans} channels{base}",
        f"feed-forward: {d.ffn}, {d.ffn_hidden} wide; storage tokens: {d.n_storage_tokens}",
        f"k bias masked: {yes[d.mask_k_bias]}; LayerScale: {yes[d.layerscale]}; "
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
    to : `meta`, `hf`, `timm` or `dinocell`; by the target's suffix by default: `.pth` meta,
        `.safetensors` dinocell, a folder hf
    patch_size : of the new backbone; the source's by default
    patch_method : `nearest`, `bilinear`, `pseudo_inverse` or `bicubic`, see `docs/weights.md`
    which : `teacher` or `student`, of a checkpoint with both
    overwrite : replace the target if it exists

    Returns what was written, adapted, filled in and left out.

    Raises UsageError, CheckpointError (the file does not exist, or holds no backbone; an option is
    wrong; the target exists); DINOCellError (the disk refuses).
    """
    from dinov3.checkpointer import patch_size_adaptation as adaptation

    formats = _formats()
    source, target = find_weights(source), Path(target)
    if target.resolve() == source.resolve():
        raise UsageError(f"`target` must not be `source`, got {target} for both: name another file")
    if to is None:
        to = {".pth": "meta", ".pt": "meta", ".safetensors": "dinocell", "": "hf"}.get(
            target.suffix
        )
        if to is None:
            raise UsageError(
                f"`target` must end in .pth or .safetensors, got {target}: or choose the format by `to`"
            )
    if patch_method not in adaptation.METHODS:
        raise UsageError(
            f"`patch_method` must be one of {', '.join(adaptation.METHODS)}, got {patch_method}: choose one "
            "of these"
        )
    if patch_size is None and patch_method != "nearest":
        raise UsageError(
            f"`patch_method` must come with `patch_size`, got {patch_method} alone: give both, or neither"
        )
    state, description = _read(source, which)
    note = ""
    if patch_size is not None:
        with raised_as(UsageError, ValueError):
            state, done = adaptation.adapt_state_dict(state, patch_size, patch_method)
        note = f"; {done}" if done is not None else ""
    losses: list[str] = []
    require_writable("target", target)
    refused = raised_as(UsageError, FileExistsError, formats.WeightsError)
    with saying_what_failed(target), refused:
        formats.write_backbone(state, target, to, overwrite=overwrite, notes=losses)
    written = f"{description.name} ({description.format}) → {target} ({to}){note}"
    return "\n".join([written, *(f"note: {text}" for text in (*description.notes, *losses))])


def how_to_get(name: str, file: str, folder: Path) -> str:
    """The sentence for a backbone that is not in `folder` and has no `source` to fetch it from."""
    if name not in RELEASED:
        return (
            f"`source` must name a folder or URL for a file that is not a released backbone, got {name!r} "
            f"without it: give one, or choose among {', '.join(RELEASED)}"
        )
    return (
        f"{name} must be downloaded by you, because Meta gives the weights only to those who accept its "
        "licence: ask for access on the DINOv3 downloads page of Meta AI, then run `dinocell weights fetch "
        f"{name}` with the URL from the e-mail as `source`; or accept the licence of the model on Hugging "
        f"Face, download its model.safetensors and use that file as it is; or save the file as {folder / file}"
    )


def _formats() -> Any:
    with tree_imports():
        from dinov3.cells import weights

    return weights


def _read(path: Path, which: str) -> tuple[dict[str, Any], Any]:
    formats = _formats()
    if which not in ("teacher", "student"):
        raise UsageError(f"`which` must be teacher or student, got {which!r}: choose one")
    with (
        raised_as(UsageError, FileNotFoundError),
        raised_as(CheckpointError, formats.WeightsError),
    ):
        return formats.read_backbone(path, which=which)
