"""`dinocell shards`: one batch of images in parts for many processes."""

from pathlib import Path
from typing import Annotated

import typer

from dinocell.cli.cluster import checked_parameters
from dinocell.cli.options import PASSES_ON, App, argument
from dinocell.errors import DINOCellError

app = App(
    name="shards",
    help="Divide a large batch of images into parts, which many processes segment at once.",
    no_args_is_help=True,
)

ResultsFolder = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder of the results, as given to `plan`.")
]


@app.command("plan", context_settings=PASSES_ON)
def shards_plan(
    context: typer.Context,
    count: int = argument("Number of parts to make.", metavar="COUNT IMAGE|DIR|GLOB... --out OUT"),
) -> None:
    """Divide images into parts of about the same size in bytes; segment nothing yet.

    After COUNT, give the arguments and options of `dinocell segment`. Then run each part with
    `dinocell shards run OUT PART`, on any computer that has the same folders.

    Example: `dinocell shards plan 16 plate/ -o out --model model.safetensors`
    """
    from dinocell.cluster.submission import plan_batch
    from dinocell.progress import count_text

    parameters = checked_parameters(context.find_root().command, "segment", context.args)
    plan = plan_batch(parameters, count)
    print(
        f"{count_text(plan.images, 'image')}, {plan.total_bytes / 1e9:.3f} GB in "
        f"{count_text(plan.count, 'shard')}: "
        f"{plan.out / 'shards'}"
    )


@app.command("run")
def shards_run(
    out: ResultsFolder,
    shard: int = argument("Number of the part, counted from 0.", metavar="PART"),
) -> None:
    """Segment the images of one part; run it again to continue with the missing ones.

    Images that fail are listed at the end, and again by `merge`. They do not stop the others.

    Example: `dinocell shards run out 3`
    """
    from dinocell.batch.parts import run_shard
    from dinocell.cluster.slurm import claimant

    print(run_shard(out, shard, claimant=claimant()).text())


@app.command("status")
def shards_status(out: ResultsFolder) -> None:
    """Show how many images of each part are done.

    Example: `dinocell shards status out`
    """
    from dinocell.batch.parts import read_plan, shard_states

    for state in shard_states(read_plan(out)):
        failed = f", {state.failed} failed" if state.failed else ""
        print(f"shard {state.index}: {state.done} of {state.images} images done{failed}")


@app.command("merge")
def shards_merge(out: ResultsFolder) -> None:
    """Merge the tables of all parts into `summary.csv` and `cells.csv`.

    The exit code is 1 if a part is not complete. Images that failed are listed; the last column of
    `summary.csv` states why.

    Example: `dinocell shards merge out`
    """
    from dinocell.batch.merge import merge_shards

    merged = merge_shards(out)
    print(merged.text())
    if merged.missing:
        raise DINOCellError(merged.missing_sentence())
