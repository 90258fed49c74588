"""`dinocell shards`: one batch of images in parts for many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinocell.cli.cluster import checked_parameters
from dinocell.cli.options import PASSES_ON, App
from dinocell.errors import DINOCellError

__all__ = ["app"]

app = App(
    name="shards",
    help="One batch of images in parts for many processes: plan, run, status, merge.",
    no_args_is_help=True,
)

ResultsFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results.")]


@app.command("plan", context_settings=PASSES_ON)
def shards_plan(
    context: typer.Context,
    count: Annotated[int, typer.Argument(metavar="COUNT", help="Number of parts.")],
) -> None:
    """Divide images into parts of about as many bytes; what follows is as of `dinocell segment`.

    Nothing is segmented yet: each part is done by `dinocell shards run OUT PART`, anywhere.

    Example: `dinocell shards plan 16 plate/ -o out --model model.safetensors`
    """
    from dinocell.cluster.submission import plan_batch

    parameters = checked_parameters(context.find_root().command, "segment", context.args)
    plan = plan_batch(parameters, count)
    print(
        f"{plan.images} images, {plan.total_bytes / 1e9:.3f} GB in {plan.count} shards: "
        f"{plan.out / 'shards'}"
    )


@app.command("run")
def shards_run(
    out: ResultsFolder,
    shard: Annotated[int, typer.Argument(metavar="PART", help="From 0.")],
) -> None:
    """Segment the images of one part; run again, it goes on with those that are missing.

    Images that fail are listed at the end and by `merge`; they stop nothing.

    Example: `dinocell shards run out 3`
    """
    from dinocell.batch.parts import run_shard

    print(run_shard(out, shard).text())


@app.command("status")
def shards_status(out: ResultsFolder) -> None:
    """Tell how far each part is.

    Example: `dinocell shards status out`
    """
    from dinocell.batch.parts import read_plan, shard_states

    for state in shard_states(read_plan(out)):
        failed = f", {state.failed} failed" if state.failed else ""
        print(f"shard {state.index}: {state.done} of {state.images} images done{failed}")


@app.command("merge")
def shards_merge(out: ResultsFolder) -> None:
    """Make `summary.csv` and `cells.csv` of all parts; exit code 1 if parts are not complete.

    Images that failed are listed, and have their reason in the last column of `summary.csv`.

    Example: `dinocell shards merge out`
    """
    from dinocell.batch.parts import merge_shards

    merged = merge_shards(out)
    print(merged.text())
    if merged.missing:
        raise DINOCellError(merged.missing_sentence())
