"""`dinocell demo` and `dinocell segment`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocell.cli.options import App, Device, ModelOption
from dinocell.errors import UsageError

if TYPE_CHECKING:
    from dinocell.batch.run import SegmentOptions

__all__ = ["app", "segment_options"]

app = App()


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path(
        "demo_out"
    ),
    device: Device = "auto",
    model: ModelOption = "dinocell-tiny",
) -> None:
    """Segment the bundled sample images with the bundled model.

    Leaves label images, measurements (CSV), overlays and one HTML page, and scores the result
    against the samples' truth.

    Example: `dinocell demo -o demo_out`
    """
    from dinocell.demo import run_demo

    result = run_demo(out, model=model, device=device)
    print(result.text())


@app.command()
def segment(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE|DIR|GLOB...", help="Images, folders, patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")],
    model: ModelOption = "dinocell-tiny",
    device: Device = "auto",
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="Label files to write: tif, png, geojson, roi, coco. Repeat for several.  "
            "[default: tif]",
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="Channels to use of a multi-channel image: index or name, several with commas "
            "(normalised one by one and averaged)."
        ),
    ] = None,
    page: Annotated[int | None, typer.Option(help="Plane of a stack, from 0.")] = None,
    pixel_size_um: Annotated[
        float | None, typer.Option(help="Pixel size in µm, in place of the file's.")
    ] = None,
    peak_threshold: Annotated[
        float | None, typer.Option(help="A cell's deepest pixel must exceed this.")
    ] = None,
    fill_threshold: Annotated[
        float | None, typer.Option(help="Pixels above this belong to cells.")
    ] = None,
    min_prominence: Annotated[
        float | None, typer.Option(help="Peaks closer than this to their saddle are one cell.")
    ] = None,
    min_area_px: Annotated[int | None, typer.Option(help="Drop cells with fewer pixels.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per network call.")] = 8,
    tile_px: Annotated[
        int | None,
        typer.Option(help="Visit windows region by region of this size; same result."),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (faster).")] = "fp32",
    workers: Annotated[
        int, typer.Option(min=0, help="Threads that finish images behind the network.")
    ] = 1,
    recursive: Annotated[bool, typer.Option(help="Look into subfolders.")] = False,
    overlay: Annotated[bool, typer.Option(help="Write NAME_overlay.png.")] = True,
    report: Annotated[bool, typer.Option("--report", help="Write report.html.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip images that are already done in OUT.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results already in OUT.")
    ] = False,
    allow_mask: Annotated[
        bool, typer.Option("--allow-mask", help="Accept images that look like masks.")
    ] = False,
) -> None:
    """Find the cells of images; write labels, measurements and overlays.

    Per image: `NAME_labels.tif` (0 background, 1..n; 16 bit, 32 bit above 65,535 cells),
    `NAME_cells.csv`, `NAME_overlay.png`; for all: `summary.csv`.  An image that cannot be read is
    listed at the end and does not stop the others (exit code 1).

    Example: `dinocell segment images/ -o out --report`
    """
    given = dict(locals())
    from dinocell.batch.run import segment_files
    from dinocell.io.images import find_images

    paths = find_images(images, recursive=recursive)
    result = segment_files(paths, out, segment_options(given))
    print(result.text())
    if result.failures:
        raise typer.Exit(1)


def segment_options(given: Mapping[str, Any]) -> SegmentOptions:
    """The parameters of `segment` as its options."""
    import dataclasses

    from dinocell.batch.run import SegmentOptions

    names = {item.name for item in dataclasses.fields(SegmentOptions)} - {"formats", "channels"}
    return SegmentOptions(
        **{name: given[name] for name in names},
        formats=tuple(given["format"] or ["tif"]),
        channels=_channel_list(given["channels"]),
    )


def _channel_list(text: str | None) -> tuple[int | str, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError("--channels must name a channel, got nothing: for example --channels 0")
    return tuple(int(part) if part.isdigit() else part for part in parts)
