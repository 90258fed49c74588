"""`dinocell upstream`: our additions on a checkout of Meta's DINOv3."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dinocell.cli.options import App

__all__ = ["app"]

app = App(
    name="upstream",
    help="Our additions on a checkout of Meta's DINOv3: apply, undo, rebase, verify.",
    no_args_is_help=True,
)

Checkout = Annotated[Path, typer.Option("--checkout", help="A git checkout of DINOv3.")]
SeriesFolder = Annotated[
    Path | None,
    typer.Option("--series", help="Folder of patches.  [default: patches of this clone]"),
]


@app.command("status")
def upstream_status(checkout: Checkout, series: SeriesFolder = None) -> None:
    """Tell which release a checkout is, which patches apply to it, and what is in place.

    Exit code 1 if a patch does not apply.

    Example: `dinocell upstream status --checkout ../dinov3`
    """
    from dinocell.upstream.overlay import status_of
    from dinocell.upstream.report import status_text

    status = status_of(checkout, _series(series))
    print(status_text(status))
    if not all(outcome.applies for outcome in status.outcomes):
        raise typer.Exit(1)


@app.command("apply")
def upstream_apply(
    checkout: Checkout,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Make a new folder; the checkout is left alone."),
    ] = None,
    series: SeriesFolder = None,
) -> None:
    """Put our files and patches into a checkout without changes, all of them or none.

    Example: `dinocell upstream apply --checkout ../dinov3 --out ../dinov3-cells`
    """
    from dinocell.upstream.overlay import apply_series
    from dinocell.upstream.report import merged_text

    merged, tree = apply_series(checkout, _series(series), out=out)
    print(merged_text(merged))
    print(f"written: {tree}", file=sys.stderr)
    print(f"use it: DINOCELL_DINOV3={tree} dinocell ...", file=sys.stderr)


@app.command("undo")
def upstream_undo(checkout: Checkout, series: SeriesFolder = None) -> None:
    """Take our lines and files out of a checkout again; nothing else is touched.

    Example: `dinocell upstream undo --checkout ../dinov3`
    """
    from dinocell.upstream.overlay import undo

    changed = undo(checkout, _series(series))
    print(f"{len(changed)} files are upstream's again" if changed else "nothing of ours was there")


@app.command("rebase")
def upstream_rebase(
    checkout: Checkout,
    onto: Annotated[str, typer.Option("--onto", help="Commit, tag or branch of the checkout.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would become of each patch.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Run the conformance suite before the series is written."
        ),
    ] = True,
    series: SeriesFolder = None,
) -> None:
    """Move the series onto another commit; it is written only if everything passes.

    The checkout is not touched.  Exit code 1 and both sides of each place after a conflict.

    Example: `dinocell upstream rebase --checkout ../dinov3 --onto origin/main`
    """
    from dinocell.upstream.rebase import rebase
    from dinocell.upstream.report import merged_text
    from dinocell.upstream.verify import verify_tree

    def check(tree: Path) -> bool:
        print("running the conformance suite ...", file=sys.stderr)
        result = verify_tree(tree)
        print(result.text())
        return result.passed

    merged, written = rebase(
        checkout, onto, _series(series), check=check if verify else None, dry_run=dry_run
    )
    print(merged_text(merged))
    if not merged.applies:
        raise typer.Exit(1)
    if not dry_run:
        print(
            f"written: {', '.join(written) or 'nothing, the series is the same'}", file=sys.stderr
        )


@app.command("refresh")
def upstream_refresh(checkout: Checkout, series: SeriesFolder = None) -> None:
    """Make the series from the marked lines of a checkout that you edited.

    Example: `dinocell upstream refresh --checkout ../dinov3`
    """
    from dinocell.upstream.rebase import refresh

    written = refresh(checkout, _series(series))
    print(f"written: {', '.join(written) or 'nothing, the series is the same'}")


@app.command("verify")
def upstream_verify(
    context: typer.Context,
    tree: Annotated[Path, typer.Option("--tree", help="Folder that holds the package dinov3.")],
    keyword: Annotated[str, typer.Option("-k", help="Only tests that match, as pytest's -k.")] = "",
) -> None:
    """Run the conformance suite on a tree: names, numbers, a training step, checkpoints, additions.

    A tree of upstream's needs torchvision for its data and training parts; without it these are
    skipped, and the table says so.  Exit code 1 if anything failed.

    Example: `dinocell upstream verify --tree ../dinov3-cells`
    """
    from dinocell.upstream.verify import verify_tree

    result = verify_tree(tree, keyword=keyword)
    print(result.text())
    if not result.passed:
        if context.obj.verbose:
            print(result.output, file=sys.stderr)
        raise typer.Exit(1)


# What `submit` and `supervise` do not know is an option of the command that they run.
_PASSES_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


def _series(folder: Path | None) -> Any:
    from dinocell.upstream.series import default_series_folder, read_series

    if folder is None:
        return read_series(default_series_folder())
    return read_series(folder, files_root=default_series_folder().parent / "dinov3_modified")
