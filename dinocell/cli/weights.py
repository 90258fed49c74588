"""`dinocell weights`: model files and backbones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dinocell.cli.options import App, Which

__all__ = ["app"]

app = App(
    name="weights",
    help="List, describe, convert and download model files and backbones.",
    no_args_is_help=True,
)


@app.command("list")
def weights_list() -> None:
    """List the bundled models with their scores, and the released DINOv3 backbones.

    Example: `dinocell weights list`
    """
    from dinocell.network.info import describe_bundled
    from dinocell.network.weights import list_weights

    print(describe_bundled())
    print(list_weights())


@app.command("info")
def weights_info(
    model: Annotated[
        str,
        typer.Argument(
            help="Model file, name of a bundled model, SIZE/PATCH such as small/8 for an untrained "
            "architecture, backbone file, or checkpoint folder."
        ),
    ],
    decoder: Annotated[
        str,
        typer.Option(help="Use this decoder with SIZE/PATCH: unet, unet_wide or linear."),
    ] = "unet",
    image_px: Annotated[
        int,
        typer.Option(
            min=1, help="Count the operations for a square image with this edge length in px."
        ),
    ] = 256,
    which: Which = "teacher",
) -> None:
    """Describe a model (architecture, cost, training, thresholds) or a backbone file.

    Example: `dinocell weights info dinocell-tiny`
    """
    from dinocell.network.info import describe_model
    from dinocell.network.weights import describe_weights, find_weights, is_backbone_file

    if is_backbone_file(find_weights(model)):
        print(describe_weights(model, which=which))
    else:
        print(describe_model(model, decoder=decoder, image_px=image_px))


@dataclass(frozen=True)
class Conversion:
    """How a backbone is converted, named as the parameters of `convert_weights`."""

    to: Annotated[
        str | None,
        typer.Option(
            help="Write this format: meta, hf (Hugging Face), timm or dinocell.  [default: the one "
            "that fits the ending of OUT]"
        ),
    ] = None
    patch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Adapt the patch embedding to this patch size in px."),
    ] = None
    patch_method: Annotated[
        str,
        typer.Option(
            help="Resize the patch embedding with this method: nearest (exact), bilinear, "
            "pseudo_inverse or bicubic."
        ),
    ] = "nearest"
    which: Which = "teacher"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = (
        False
    )


@app.command("convert")
def weights_convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="Backbone file, checkpoint folder, model file, or name of a downloaded backbone.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="New file (.pth or .safetensors), or new folder for the format hf."
        ),
    ],
    options: Conversion,
) -> None:
    """Convert the backbone of a DINOv3 file to another format or another patch size.

    IN may be Meta's `.pth` file, a teacher file or checkpoint folder of a training run, a folder or
    `.safetensors` file of Hugging Face, a file of timm, or a DINOCell model.

    Example: `dinocell weights convert runs/ssl/a/ckpt/999 backbone.pth --patch-size 8`
    """
    from dinocell.network.weights import convert_weights

    print(convert_weights(source, target, **vars(options)))


@app.command("fetch")
def weights_fetch(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of a released backbone (see `dinocell weights list`), or name of a file."
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Copy or download from here: a folder, the URL of a mirror, or the whole URL from "
            "Meta's e-mail.",
        ),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="Open no network connection. The environment variable DINOCELL_OFFLINE=1 does the same.",
        ),
    ] = False,
    sha256: Annotated[
        str | None,
        typer.Option(help="Refuse a file whose SHA-256 checksum does not begin with this text."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Store the file in this folder.  [default: the cache]"),
    ] = None,
) -> None:
    """Download a backbone file, or copy it from a folder.

    After an interruption run the same command again: the download continues where it stopped.

    Example: `dinocell weights fetch dinov3_vits16 --from /data/dinov3`
    """
    from dinocell.network.download import fetch_weights

    print(fetch_weights(name, source=source, offline=offline, sha256=sha256, out=out))
