"""`dinocell demo` and `dinocell segment`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocell.cli.options import App, Device, ModelOption, OutFolder, in_options
from dinocell.errors import UsageError

if TYPE_CHECKING:
    from dinocell.batch.options import SegmentOptions

__all__ = ["SegmentFlags", "app", "segment_options"]

app = App()


@dataclass(frozen=True)
class SegmentFlags:
    """Options of `segment`, named as the fields of `SegmentOptions`."""

    model: ModelOption = "dinocell-tiny"
    device: Device = "auto"
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="Write label files in this format: tif, png, geojson, roi or coco. Repeat the option "
            "for several formats.  [default: tif]",
        ),
    ] = None
    channels: Annotated[
        str | None,
        typer.Option(
            help="Use this channel of multi-channel images: its index, counted from 0, or its name. "
            "Several, separated by commas, are normalised one by one and then averaged."
        ),
    ] = None
    page: Annotated[
        int | None, typer.Option(help="Use this plane of image stacks, counted from 0.")
    ] = None
    pixel_size_um: Annotated[
        float | None,
        typer.Option(help="Use this pixel size in µm in place of the one that the file states."),
    ] = None
    peak_threshold: Annotated[
        float | None,
        typer.Option(
            help="Accept a cell only if the distance map (0 to 1) exceeds this value at the cell's peak."
            "  [default: the model's]"
        ),
    ] = None
    fill_threshold: Annotated[
        float | None,
        typer.Option(
            help="Count a pixel as part of a cell if the distance map exceeds this value there.  "
            "[default: the model's]"
        ),
    ] = None
    min_prominence: Annotated[
        float | None,
        typer.Option(
            help="Merge a peak of the distance map with a higher one if it rises less than this (0 to 1) "
            "above the saddle between them.  [default: the model's]"
        ),
    ] = None
    min_area_px: Annotated[
        int | None,
        typer.Option(help="Remove cells that have fewer pixels than this.  [default: the model's]"),
    ] = None
    batch_size: Annotated[
        int, typer.Option(min=1, help="Run the network on this many image windows at once.")
    ] = 8
    tile_px: Annotated[
        int | None,
        typer.Option(
            help="Process large images in regions with this edge length in px. The result is the same."
        ),
    ] = None
    precision: Annotated[
        str, typer.Option(help="Compute in fp32, or in bf16, which is faster and less exact.")
    ] = "fp32"
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Use this many threads to write results while the network processes the next image.",
        ),
    ] = 1
    overlay: Annotated[
        bool, typer.Option(help="Write NAME_overlay.png, the image with outlines of the cells.")
    ] = True
    report: Annotated[
        bool,
        typer.Option("--report", help="Write report.html, a page that shows the results."),
    ] = False
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Skip images whose results the output folder already has."),
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that the output folder has.")
    ] = False
    allow_mask: Annotated[
        bool,
        typer.Option("--allow-mask", help="Accept images that look like masks or label images."),
    ] = False

    def for_batch(self) -> SegmentOptions:
        """The options with the types that `segment_files` needs."""
        from dinocell.batch.options import SegmentOptions

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return SegmentOptions(
            **given
            | {"formats": tuple(self.formats or ["tif"]), "channels": _channel_list(self.channels)}
        )


def segment_options(parameters: Mapping[str, Any]) -> SegmentOptions:
    """The options of `segment` from its parsed parameters."""
    return SegmentFlags(
        **{field.name: parameters[field.name] for field in fields(SegmentFlags)}
    ).for_batch()


def _channel_list(text: str | None) -> tuple[int | str, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(
            "`channels` must name a channel, got nothing: give for example 0 or DNA,ER"
        )
    return tuple(int(part) if part.isdigit() else part for part in parts)


@app.command()
def demo(
    out: OutFolder = Path("demo_out"), device: Device = "auto", model: ModelOption = "dinocell-tiny"
) -> None:
    """Segment the bundled sample images and compare the result with their true cells.

    The output folder receives label images, measurements (CSV), images with outlines and one HTML
    page.

    Example: `dinocell demo -o demo_out`
    """
    from dinocell.demo import run_demo

    print(run_demo(out, model=model, device=device).text())


@app.command()
def segment(
    context: typer.Context,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|DIR|GLOB...",
            help="Image files, folders of images, or patterns such as 'plate/*.tif'.",
        ),
    ],
    out: OutFolder,
    options: SegmentFlags,
    recursive: Annotated[bool, typer.Option(help="Search subfolders for images, too.")] = False,
) -> None:
    """Find the cells in images; write label images, measurements and outlines.

    Each image gives `NAME_labels.tif` (0 is background, 1 to n are the cells; 16 bit, or 32 bit for
    more than 65,535 cells), `NAME_cells.csv` and `NAME_overlay.png`. `summary.csv` has one line for
    each image.

    If an image cannot be read, the others are still segmented; the failed images are listed at the
    end and the exit code is 1.

    Example: `dinocell segment images/ -o out --report`
    """
    from dinocell.batch.run import segment_files
    from dinocell.io import find_images

    paths = find_images(images, recursive=recursive)
    result = segment_files(paths, out, options.for_batch())
    print(in_options(result.text(), context))
    if result.failures:
        raise typer.Exit(1)
