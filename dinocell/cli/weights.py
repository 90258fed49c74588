"""`dinocell weights`: model files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinocell.cli.options import App

__all__ = ["app"]

app = App(name="weights", help="Model files: what is there, what is in them.", no_args_is_help=True)


@app.command("list")
def weights_list() -> None:
    """List the bundled models with their score, and the released backbones.

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
            help="Model file, bundled name, SIZE/PATCH such as small/8, or any backbone file or "
            "checkpoint folder."
        ),
    ],
    decoder: Annotated[
        str, typer.Option(help="Decoder for SIZE/PATCH: unet, unet_wide or linear.")
    ] = "unet",
    image_px: Annotated[
        int, typer.Option(min=1, help="Edge of the image the cost is counted for.")
    ] = 256,
    which: Annotated[str, typer.Option(help="Of a checkpoint: teacher or student.")] = "teacher",
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


@app.command("convert")
def weights_convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="Backbone file, checkpoint folder, model file, or a fetched name."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help=".pth, .safetensors, or a folder (hf).")
    ],
    to: Annotated[
        str | None,
        typer.Option(help="meta, hf, timm or dinocell.  [default: by the ending of OUT]"),
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Adapt the patch embedding, for example 16 → 8.")
    ] = None,
    patch_method: Annotated[
        str, typer.Option(help="nearest (exact), bilinear, pseudo_inverse or bicubic.")
    ] = "nearest",
    which: Annotated[str, typer.Option(help="Of a checkpoint: teacher or student.")] = "teacher",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write the backbone of any DINOv3 file in another format, or for another patch size.

    IN may be Meta's `.pth`, a teacher file or checkpoint folder of a training run, Hugging Face's
    folder or `.safetensors`, timm's file, or a DINOCell model.

    Example: `dinocell weights convert runs/ssl/a/ckpt/999 backbone.pth --patch-size 8`
    """
    from dinocell.network.weights import convert_weights

    print(
        convert_weights(
            source,
            target,
            to=to,
            patch_size=patch_size,
            patch_method=patch_method,
            which=which,
            overwrite=overwrite,
        )
    )


@app.command("fetch")
def weights_fetch(
    name: Annotated[str, typer.Argument(help="Released backbone (see list), or a file's name.")],
    source: Annotated[
        str | None,
        typer.Option("--from", help="Folder, mirror URL, or the whole URL from Meta's e-mail."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Open no connection (also DINOCELL_OFFLINE=1).")
    ] = False,
    sha256: Annotated[str | None, typer.Option(help="Expected checksum, or its beginning.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder in place of the cache.")
    ] = None,
) -> None:
    """Bring a backbone file into the cache; an interrupted download goes on where it stopped.

    Example: `dinocell weights fetch dinov3_vits16 --from /data/dinov3`
    """
    from dinocell.network.weights import fetch_weights

    print(fetch_weights(name, source=source, offline=offline, sha256=sha256, out=out))
