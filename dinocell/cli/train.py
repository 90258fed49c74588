"""`dinocell pretrain` and `dinocell train`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dinocell.cli.options import App, Device, ModelOption, argument, channel_names, option

app = App()

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Values that replace those of the configuration file."
    ),
]


@app.command()
def pretrain(
    config: Path = argument("YAML configuration file; examples are in configs/ssl."),
    overrides: Overrides = None,
    output_dir: Path | None = option(
        "Write checkpoints and logs to this folder.  [default: runs/ssl/NAME, with the name of the "
        "configuration file]",
        names="--output-dir -o",
    ),
    no_resume: bool = option(
        "Start over; checkpoints, teachers and pictures of the earlier run are moved aside, not deleted.",
        False,
    ),
    seed: int = option(
        "Use this random seed for weight initialisation and dropout. The key train.seed of the "
        "configuration is the seed of the data order.",
        0,
        min=0,
    ),
) -> None:
    """Train a backbone on images without labels (DINO, iBOT and KoLeo losses).

    After an interruption run the same command again: training continues from the last checkpoint.
    On a CPU the result is bit for bit the same as without the interruption.

    The last line of the output names the teacher's file. To fine-tune it, start `dinocell train` with
    `backbone.weights=FILE`.

    Example: `dinocell pretrain configs/ssl/cells_tiny.yaml optim.epochs=2`
    """
    from dinocell.pretraining.run import pretrain as run

    result = run(config, overrides or [], output_dir=output_dir, resume=not no_resume, seed=seed)
    print(f"teacher: {result}")


@app.command()
def train(
    config: Path = argument("YAML configuration file; examples are in configs/finetune."),
    overrides: Overrides = None,
) -> None:
    """Train a segmentation model on folders of images and label images.

    After an interruption run the same command again: training continues from the last checkpoint.

    Example: `dinocell train configs/finetune/dsb2018_tiny.yaml optimizer.lr=5e-4`

    Start from a trained model, not from random weights: `model.init=dinocell-cells`. With at most 50
    training images this is the default where the configuration names no network (no `model.init`,
    `model.size`, `backbone.weights` or the like); `model.init=null` then means random weights.

    On 2 GPUs: `torchrun --nproc-per-node=2 -m dinocell train configs/finetune/dsb2018_tiny.yaml`
    """
    from dinocell.training.processes import is_main_process
    from dinocell.training.start import load_train_config
    from dinocell.training.trainer import train as run_training

    def note(text: str) -> None:
        if is_main_process():
            print(f"dinocell: {text}", file=sys.stderr)

    result = run_training(load_train_config(config, overrides or [], note=note))
    if not is_main_process():
        return
    settings = ", ".join(f"{name} {value:g}" for name, value in result.thresholds.items())
    print(
        f"model: {result.model_path} (step {result.step}"
        f"{', stopped early' if result.stopped_early else ''})\n"
        f"validation AP@0.5 (pooled): {result.val_ap50:.4f}; {settings}"
    )


@dataclass(frozen=True)
class AdaptFlags:
    """How long and from what `adapt` trains."""

    minutes: float = option(
        "Take at most about this long for everything; this sets the number of steps, of which there are at "
        "least 10.",
        5.0,
    )
    steps: int | None = option(
        "Train the best candidate for this many steps, and try all with some of them, whatever the time, so that "
        "a result can be repeated."
    )
    channels: str | None = option(
        "Use these channels of multi-channel images: names or indices counted from 0, separated by "
        "commas. Several are averaged."
    )
    seed: int = option("Use this random seed for crops and dropout.", 0, min=0)


@app.command()
def adapt(
    images: Path = argument("Folder with images."),
    labels: Path = argument(
        "Folder with label images of the same names; it may be the same folder."
    ),
    out: Path = option(
        "Write the adapted model to this new file (.safetensors).", ..., names="--out -o"
    ),
    model: ModelOption = "dinocell-cells",
    flags: AdaptFlags = AdaptFlags(),
    device: Device = "auto",
) -> None:
    """Adapt a trained model to a few labelled images.

    Whether the decoder, the last part of the network or all of it should learn is found by
    cross-validation: each candidate is trained on half of the images and scored on the other half. All
    have few steps, then the best one has many. What scored best is trained on all images. The model with
    new thresholds alone also competes. If none is better than the model was before, the result is that
    model. A single image is cut in two.

    Segment with the result by `dinocell segment more_images/ -m mine.safetensors -o out`.

    Example: `dinocell adapt images/ labels/ -o mine.safetensors`
    """
    from dinocell.training.adapt import AdaptOptions
    from dinocell.training.adapt import adapt as run_adaptation

    chosen = tuple(channel_names(flags.channels) or ())
    options = AdaptOptions(flags.minutes, flags.steps, chosen, flags.seed, device)
    print(run_adaptation(images, labels, out, start=model, options=options).text())


@app.command()
def ablate(
    config: Path = argument(
        "YAML file with base (a configuration of train), variants, seeds, test and output_dir."
    ),
    only: int | None = option(
        "Train and score this run only, counted from 0 (variants first, then seeds), as one task of a job "
        "array. Run the command without it at the end.",
        min=0,
    ),
) -> None:
    """Compare variants of a training: each with several seeds, on test images.

    Prints AP for every test set and variant, the standard deviation over seeds, and the gain over the
    first variant with its 95 % interval over images. Finished runs are kept: after an interruption run
    the same command again. `dinocell submit ablate FILE` makes a job array of it.

    Example: `dinocell ablate configs/ablation/generalist_conv.yaml`
    """
    from dinocell.training.ablation import ablate as run_ablation

    report = run_ablation(config, only=only)
    print(report.text())
    if only is None:
        print(f"written: {Path(report.config.output_dir) / 'summary.csv'} and images.csv")
