"""`dinocell demo` and `dinocell segment`."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dinocell.cli.options import (
    App,
    Device,
    ModelOption,
    OutFolder,
    argument,
    in_options,
    option,
    plane_choice,
)
from dinocell.errors import UsageError

if TYPE_CHECKING:
    from dinocell.batch.options import SegmentOptions

app = App()


@dataclass(frozen=True)
class SegmentFlags:
    """Options of `segment`, named as the fields of `SegmentOptions`."""

    model: ModelOption = "dinocell-cells"
    device: Device = "auto"
    formats: list[str] | None = option(
        "Write results in this format: tif, png, ome-tiff, ome-zarr, geojson (QuPath), roi (ImageJ), coco, "
        "cellpose (_seg.npy), ctc (Cell Tracking Challenge), parquet or h5ad (AnnData). Repeat the option "
        "for several formats.  [default: tif]",
        names="--format -f",
    )
    channels: str | None = option(
        "Use this channel of multi-channel images: its name or, if no channel has that name, its index, "
        "counted from 0. If you name several, separated by commas, each is normalised, and then their "
        "average is segmented. The word mean or all stands for all channels."
    )
    nuclei: str | None = option(
        "Find nuclei in this channel (name, or index from 0) and, with --cells, the cell around each of them."
    )
    cells: str | None = option(
        "Take the cell around each nucleus: in these channels (for example AGP or mean), or by a ring of this "
        "width (ring:5um, ring:12px). Nucleus and cell have one number; the table has columns for nucleus, "
        "cytoplasm and cell."
    )
    page: int | None = option(
        "Use this plane of image stacks, counted from 0 through all scenes, times and z (in place of "
        "--z, --time and --scene)."
    )
    z: str | None = option(
        "Use this plane along z, counted from 0, or the largest value (max) or the mean (mean) of each "
        "pixel along z. The word each stands for every plane: NAME_z000, NAME_z001 and so on have results "
        "of their own."
    )
    time: str | None = option("Use this point in time, counted from 0, or each of them.")
    scene: str | None = option(
        "Use this scene (position, series) of files with several, counted from 0, or each of them."
    )
    plate: str = option(
        "Read well, site, channel, z and time from the file names as this microscope writes them: operetta "
        "(also Opera Phenix), imagexpress, cellvoyager, incucyte or opera; or by a regular expression with "
        "named groups, or from a CSV file with the columns image, well and so on. The value auto takes one "
        "of the first four if all names fit it, off none.",
        "auto",
    )
    pixel_size_um: float | None = option(
        "Use this pixel size in µm in place of the one that the file states."
    )
    peak_threshold: float | None = option(
        "Accept a cell only if the distance map (0 to 1) exceeds this value at the cell's peak.  "
        "[default: the model's]"
    )
    fill_threshold: float | None = option(
        "Count a pixel as part of a cell if the distance map exceeds this value there.  [default: the "
        "model's]"
    )
    min_prominence: float | None = option(
        "Merge two peaks of the distance map into one cell if the lower peak rises less than this (0 to 1) "
        "above the lowest point between them.  [default: the model's]"
    )
    min_area_px: int | None = option(
        "Remove cells that have fewer pixels than this.  [default: the model's]"
    )
    min_score: float = option(
        "Remove cells whose score is lower than this, for example 0.5. The score (0 to 1) says how well "
        "the distance map supports a cell; it is the column `score` of NAME_cells.csv.",
        0.0,
    )
    batch_size: int = option("Run the network on this many image windows at once.", 8, min=1)
    tile_px: int | None = option(
        "Keep an image in temporary files, to save memory, if it has more pixels than a square with this "
        "edge length in px. The files lie in the folder that the environment variable TMPDIR names, else "
        "in that of the system. The result does not change.  [default: 4096]"
    )
    max_pixels: int = option(
        "Refuse images with more pixels than this, before they are read.", 2_000_000_000
    )
    precision: str = option(
        "Compute with numbers of 32 bits (fp32) or 16 bits (bf16: faster on some processors, differs in "
        "the third digit). The value auto takes bf16 on processors that are fast with it, else fp32.",
        "auto",
    )
    tta: bool = option(
        "Use the mean of four predictions of each image window: as it is, flipped left-right, up-down, and "
        "both (test-time augmentation). Scores then count how far these agree. Takes four times as long.",
        False,
    )
    rescale: str = option(
        "Scale each side of an image by this factor for the network, for example 0.5. The value auto scales "
        "it to the pixel size of the model's training images where the image and the model state theirs; "
        "off leaves it as it is. Results are in pixels of the file.",
        "auto",
    )
    diameter_px: float | None = option(
        "Give the typical diameter of a cell in px of the image; the image is rescaled so that it has that "
        "of the model's training images (in place of --rescale).",
        names="--diameter",
    )
    percentiles: str | None = option(
        "Scale intensities so that these two percentiles of the image become black and white, for example "
        "1,99. Borders, scale bars and hot pixels are ignored.  [default: the model's]"
    )
    workers: int = option(
        "Use this many threads to measure cells and write results while the network processes the next "
        "image.",
        1,
        min=0,
    )
    overlay: bool = option(
        "Write NAME_overlay.png: image, outlines, coloured labels and distance map.", True
    )
    report: bool = option("Write report.html, a page that shows the results of all images.", False)
    resume: bool = option(
        "Skip images that have not changed and whose results are in the output folder.", False
    )
    overwrite: bool = option("Replace the results in the output folder.", False)
    allow_mask: bool = option("Accept images that look like masks or label images.", False)

    def for_batch(self) -> "SegmentOptions":
        """The options with the types that `segment_files` needs."""
        from dinocell.batch.options import SegmentOptions

        converted = {
            "formats": tuple(self.formats or ["tif"]),
            **plane_choice(self),
            "rescale": _scale(self.rescale),
            "percentiles": self.percentiles and _two_numbers(self.percentiles),
        }
        return SegmentOptions(**vars(self) | converted)


def _scale(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _two_numbers(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise UsageError(
            f"`percentiles` must be two numbers with a comma between, got {text!r}: write for example 1,99.8"
        ) from error
    return low, high


def segment_options(parameters: Mapping[str, Any]) -> "SegmentOptions":
    """The options of `segment` from its parsed parameters."""
    return SegmentFlags(**{f.name: parameters[f.name] for f in fields(SegmentFlags)}).for_batch()


_OTHER_MODEL = (
    "dinocell-cells knows several kinds of cells; `-m dinocell-nuclei` draws fluorescent nuclei more exactly "
    "and finds more of them beside micronuclei"
)


@app.command()
def demo(
    out: OutFolder = Path("demo_out"),
    device: Device = "auto",
    model: ModelOption = "dinocell-cells",
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
    *,
    images: list[str] = argument(
        "Image files, folders of images, or patterns such as 'plate/*.tif'; also addresses of an image or "
        "a folder on S3 (s3://bucket/plate.zarr).",
        metavar="IMAGE|DIR|GLOB...",
    ),
    out: Path = option(
        "Write the results to this folder, or to this one on S3 (s3://bucket/name).",
        ...,
        names="--out -o",
    ),
    options: SegmentFlags,
    recursive: bool = option(
        "Search subfolders for images, too.", False, "--recursive/--no-recursive"
    ),
) -> None:
    """Find the cells in images; write label images, measurements and outlines.

    Each image gives `NAME_labels.tif` (0 is background, 1 to n are the cells; 16 bit, or 32 bit for
    more than 65,535 cells), `NAME_cells.csv` (one row for each cell) and `NAME_overlay.png`. `summary.csv` has one row for
    each image; its column `quality` is the mean score of the cells.

    If an image cannot be read, the others are still segmented; the failed images are listed at the
    end and the exit code is 1.

    Example: `dinocell segment images/ -o out --report`
    """
    from dinocell.batch.remote import segment_anywhere
    from dinocell.batch.run import how_to_continue
    from dinocell.cluster.slurm import claimant
    from dinocell.io import search_images
    from dinocell.io.s3 import place_of

    found = search_images(images, recursive=recursive)
    wanted = options.for_batch()
    try:
        result = segment_anywhere(found.paths, out, wanted, claimant=claimant())
    except KeyboardInterrupt:
        kept = f"Images that were finished are kept in {place_of(out)}: {how_to_continue(wanted)}"
        print(in_options(kept, context), file=sys.stderr)
        raise
    notes = list(found.notes)
    source = context.get_parameter_source("model")
    whole = not result.skipped and not result.failures
    if whole and source is not None and source.name == "DEFAULT":
        notes.append(_OTHER_MODEL)
    print(in_options(result.text() + "".join(f"\nnote: {note}" for note in notes), context))
    if result.failures:
        raise typer.Exit(1)
