"""`dinocell weights`: model files and backbones."""

from dataclasses import dataclass
from pathlib import Path

from dinocell.cli.options import App, Which, argument, option

app = App(
    name="weights",
    help="List, describe, convert and download model files and backbones.",
    no_args_is_help=True,
)


@app.command("list")
def weights_list() -> None:
    """List the bundled models with their scores, and the DINOv3 backbones that Meta released.

    Example: `dinocell weights list`
    """
    from dinocell.network.info import describe_bundled
    from dinocell.network.weights import list_weights

    print(describe_bundled())
    print(list_weights())


@app.command("info")
def weights_info(
    model: str = argument(
        "Model file, name of a bundled model, SIZE/PATCH such as small/8 for an untrained architecture, "
        "backbone file, or checkpoint folder."
    ),
    decoder: str = option(
        "Use this decoder with SIZE/PATCH: unet, unet_wide, detail, fpn or linear.", "unet"
    ),
    image_px: int = option(
        "Count the operations for a square image with this edge length in px.", 256, min=1
    ),
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

    to: str | None = option(
        "Write this format: meta, hf (Hugging Face), timm or dinocell.  [default: the one that fits the "
        "ending of OUT]"
    )
    patch_size: int | None = option(
        "Adapt the patch embedding to this patch size in px.  [default: that of IN]", min=1
    )
    patch_method: str = option(
        "Resize the patch embedding with this method: nearest (exact if the new size divides the old one), "
        "bilinear, pseudo_inverse or bicubic.",
        "nearest",
    )
    which: Which = "teacher"
    overwrite: bool = option("Replace OUT if it exists.", False)


@app.command("convert")
def weights_convert(
    *,
    source: Path = argument(
        "Backbone file, checkpoint folder, model file, or name of a downloaded backbone.",
        metavar="IN",
    ),
    target: Path = argument(
        "New file (.pth or .safetensors), or new folder for the format hf.", metavar="OUT"
    ),
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
    name: str = argument(
        "Name of a released backbone (see `dinocell weights list`), or name of a file."
    ),
    source: str | None = option(
        "Copy or download from here: a folder, the URL of a mirror, or the whole URL from Meta's e-mail.",
        names="--from",
    ),
    offline: bool = option(
        "Open no network connection. The environment variable DINOCELL_OFFLINE=1 does the same.",
        False,
    ),
    sha256: str | None = option(
        "Refuse a file whose SHA-256 checksum does not begin with this text."
    ),
    out: Path | None = option(
        "Store the file in this folder.  [default: the one that DINOCELL_WEIGHTS names, else ~/.cache/dinocell/weights]",
        names="--out -o",
    ),
) -> None:
    """Download a backbone file, or copy it from a folder.

    After an interruption run the same command again: the download continues where it stopped.

    Example: `dinocell weights fetch dinov3_vits16 --from /data/dinov3`
    """
    from dinocell.network.fetching import fetch_weights

    print(fetch_weights(name, source=source, offline=offline, sha256=sha256, out=out))
