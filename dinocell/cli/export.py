"""`dinocell export`."""

from dataclasses import dataclass
from pathlib import Path

from dinocell.cli.options import App, argument, channel_choice, option

app = App()


@dataclass(frozen=True)
class Export:
    """How a model is exported, named as the parameters of `export_model`."""

    to: str = option(
        "Write this: onnx, torch (a program of torch.export, .pt2, which loads without DINOCell), or "
        "bioimageio (a package of the BioImage Model Zoo, .zip).",
        "onnx",
    )
    precision: str = option(
        "Compute in fp32, fp16, or for onnx in int8 (weights and activations in 8 bit).", "fp32"
    )
    images: Path | None = option(
        "Take the ranges of int8 from the images in this folder, which must be like those that will be "
        "segmented."
    )
    channels: str | None = option(
        "Use these channels of the images: names or indices counted from 0, separated by commas. "
        "Several are averaged."
    )


@app.command()
def export(
    *,
    name: str = argument("Model file, or name of a bundled model.", metavar="MODEL"),
    out: Path = option("Write this new file.", ..., names="--out -o"),
    options: Export,
) -> None:
    """Write a model as a graph that other programs run.

    The graph takes windows of any size that is a multiple of the patch size, normalised as docs/export.md
    says, and gives their distance maps. The file carries thresholds, licence and training data of the
    model. `dinocell segment -m FILE.onnx` runs it with onnxruntime.

    Example: `dinocell export dinocell-cells -o dinocell-cells.onnx`
    """
    from dinocell.export import export_model

    given = vars(options) | {"channels": channel_choice(options.channels)}
    print(export_model(name, out, **given))
