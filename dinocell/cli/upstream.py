"""`dinocell upstream`: our additions to a checkout of Meta's DINOv3."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dinocell.cli.options import App, option

app = App(
    name="upstream",
    help="Put DINOCell's additions on a git checkout of Meta's DINOv3; test, move and remove them.",
    no_args_is_help=True,
)

Checkout = Annotated[
    Path, typer.Option("--checkout", help="Use this git checkout of Meta's DINOv3.")
]
SeriesFolder = Annotated[
    Path | None,
    typer.Option(
        "--series",
        help="Read the patches from this folder.  [default: the folder patches of this clone]",
    ),
]


@app.command("status")
def upstream_status(checkout: Checkout, series: SeriesFolder = None) -> None:
    """Show the commit of a checkout, which patches can be applied and which are applied.

    The exit code is 1 if a patch cannot be applied.

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
    out: Path | None = option(
        "Write a patched copy to this new folder and leave the checkout unchanged.",
        names="--out -o",
    ),
    series: SeriesFolder = None,
) -> None:
    """Add DINOCell's files and patches to a checkout without changes; add all of them or none.

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
    """Remove DINOCell's lines and files from a checkout; change nothing else.

    Example: `dinocell upstream undo --checkout ../dinov3`
    """
    from dinocell.upstream.overlay import undo

    changed = undo(checkout, _series(series))
    print(f"{len(changed)} files are upstream's again" if changed else "nothing of ours was there")


@app.command("rebase")
def upstream_rebase(
    checkout: Checkout,
    onto: str = option("Move the patches to this commit, tag or branch of the checkout.", ...),
    dry_run: bool = option("Show what would happen to each patch; write nothing.", False),
    verify: bool = option(
        "Run the tests of `dinocell upstream verify` before the new patches are written.", True
    ),
    series: SeriesFolder = None,
) -> None:
    """Change the patches so that they fit another commit of Meta's repository.

    The patches are written only if every check passes; the checkout does not change. If lines cannot
    be placed (a conflict), the exit code is 1 and both versions of each place are printed;
    docs/upstream.md says what to do then.

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
    """Write the patches again from the marked lines of a checkout that you edited by hand.

    Example: `dinocell upstream refresh --checkout ../dinov3`
    """
    from dinocell.upstream.rebase import refresh

    written = refresh(checkout, _series(series))
    print(f"written: {', '.join(written) or 'nothing, the series is the same'}")


@app.command("verify")
def upstream_verify(
    context: typer.Context,
    tree: Path = option(
        "Test the package dinov3 in this folder, for example the one that apply wrote.", ...
    ),
    keyword: str = option(
        "Run only tests that match this expression, as with pytest -k.", "", "-k"
    ),
) -> None:
    """Test a DINOv3 tree: names, numbers, a training step, checkpoints and DINOCell's additions.

    If torchvision is not installed, small replacements of its functions are used. The exit code is 1
    if a test failed or did not run.

    Example: `dinocell upstream verify --tree ../dinov3-cells`
    """
    from dinocell.upstream.verify import verify_tree

    result = verify_tree(tree, keyword=keyword)
    print(result.text())
    if not result.passed:
        if context.obj.verbose:
            print(result.output, file=sys.stderr)
        raise typer.Exit(1)


def _series(folder: Path | None) -> Any:
    from dinocell.upstream.series import default_series_folder, read_series

    if folder is None:
        return read_series(default_series_folder())
    return read_series(folder, files_root=default_series_folder().parent / "dinov3_modified")
