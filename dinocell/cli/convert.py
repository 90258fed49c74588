"""`dinocell convert`."""

from pathlib import Path

import typer

from dinocell.cli.options import App, argument, in_options, option

app = App()


@app.command()
def convert(
    context: typer.Context,
    *,
    source: Path = argument(
        "Labels: a label image (TIFF, PNG, npy), OME-Zarr, GeoJSON, ImageJ ROIs (zip), COCO (json), "
        "_seg.npy, or a folder of the Cell Tracking Challenge.",
        metavar="IN",
    ),
    target: Path = argument(
        "File or folder to write. Its ending says the format: .tif, .ome.tif, .png, .zarr, .geojson, .zip "
        "(ROIs), .json (COCO), _seg.npy, none (Cell Tracking Challenge).",
        metavar="OUT",
    ),
    format: str | None = option(
        "Write this format, whatever the ending: tif, png, ome-tiff, ome-zarr, geojson, roi, coco, cellpose "
        "or ctc."
    ),
    image: Path | None = option(
        "Take size, pixel size and name from this image. Needed to read ROIs and GeoJSON, which do not say "
        "how large their image is."
    ),
    page: int | None = option("Read this plane or frame of several, counted from 0.", min=0),
    add: bool = option("Write the labels into the OME-Zarr image OUT, which exists.", False),
    overwrite: bool = option("Replace OUT, or with --add its labels of that name.", False),
) -> None:
    """Convert labels from one format to another, for example outlines corrected in QuPath.

    The numbers of the cells stay the same. If IN cannot be read, nothing is written.

    Example: `dinocell convert a.geojson a_labels.tif --image a.tif`
    """
    from dinocell.progress import count_text
    from dinocell.results.conversion import convert_labels

    done = convert_labels(
        source, target, format=format, image=image, page=page, add=add, overwrite=overwrite
    )
    notes = "".join(f"\nnote: {note}" for note in done.notes)
    text = f"{count_text(done.num_cells, 'cell')} → {done.path} ({done.format}){notes}"
    print(in_options(text, context))
