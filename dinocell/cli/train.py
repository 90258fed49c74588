"""`dinocell pretrain` and `dinocell train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinocell.cli.options import App

__all__ = ["app"]

app = App()


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML configuration, see configs/ssl.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace keys of the configuration."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Folder of the run.  [default: runs/ssl/NAME]"),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start anew; earlier checkpoints step aside.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Of start values and dropout; train.seed is the data's.")
    ] = 0,
) -> None:
    """Train a backbone on images without labels (DINO, iBOT, KoLeo), or continue a stopped run.

    Run the same command again after an interruption: it continues from the last checkpoint, bit
    for bit on a CPU.  The last line names the teacher's file, which `dinocell train` starts from
    with `backbone.weights=FILE`.

    Example: `dinocell pretrain configs/ssl/cells_tiny.yaml optim.epochs=2`
    """
    from dinocell.pretraining.run import pretrain as run

    result = run(config, overrides or [], output_dir=output_dir, resume=not no_resume, seed=seed)
    print(f"teacher: {result}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration, see configs/finetune.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace keys of the configuration."),
    ] = None,
) -> None:
    """Train a model on folders of images and label images, or continue a stopped run.

    Run the same command again after an interruption: it continues from the last checkpoint.

    Example: `dinocell train configs/finetune/dsb2018_tiny.yaml optimizer.lr=5e-4`

    On 2 GPUs: `torchrun --nproc-per-node=2 -m dinocell train configs/finetune/dsb2018_tiny.yaml`
    """
    from dinocell.settings import load_config
    from dinocell.training.processes import is_main_process
    from dinocell.training.trainer import train as run_training

    result = run_training(load_config(config, overrides or []))
    if not is_main_process():
        return
    settings = ", ".join(f"{name} {value:g}" for name, value in result.thresholds.items())
    print(
        f"model: {result.model_path} (step {result.step}"
        f"{', stopped early' if result.stopped_early else ''})\n"
        f"validation AP@0.5 (pooled): {result.val_ap50:.4f}; {settings}"
    )
