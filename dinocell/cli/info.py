"""`dinocell info`."""

from dataclasses import dataclass
from json import dumps
from typing import Any

import typer

from dinocell.cli.options import App, argument, in_options, option, plane_choice
from dinocell.errors import DINOCellError, ImageFileError

app = App()


@dataclass(frozen=True)
class PlaneFlags:
    """Which plane is looked at: options of `segment`."""

    channels: str | None = option(
        "Show the intensities of these channels only (see `dinocell segment --help`)."
    )
    page: int | None = option("Show the intensities of this plane, counted through all of a file.")
    z: str | None = option("Show the intensities of this plane along z, or of max or mean.")
    time: int | None = option("Show the intensities of this point in time, counted from 0.")
    scene: int | None = option("Show the intensities of this scene, counted from 0.")


@app.command()
def info(
    context: typer.Context,
    *,
    images: list[str] = argument(
        "Image files, folders of images, or patterns such as 'plate/*.czi'.",
        metavar="IMAGE|DIR|GLOB...",
    ),
    plane: PlaneFlags,
    recursive: bool = option(
        "Search subfolders for images, too.", False, "--recursive/--no-recursive"
    ),
    json: bool = option("Print the list as JSON.", False),
) -> None:
    """Show what image files hold, and what `dinocell segment` would do with them.

    For each file: format, axes and their sizes, channels, pixel size, data type, time of acquisition,
    lowest and highest intensity of the chosen plane, and either that it is ready to be segmented or
    which option it needs. The exit code is 1 if a file cannot be opened.

    Example: `dinocell info image.czi`
    """
    from dinocell.batch.options import SegmentOptions
    from dinocell.batch.units import units_of
    from dinocell.io import search_images
    from dinocell.progress import count_text
    from dinocell.segmentation.overview import inspect_image

    choice = plane_choice(plane)
    segment = context.find_root().command.commands["segment"]  # type: ignore[attr-defined]
    context = segment.make_context("segment", [], resilient_parsing=True)  # spells its options
    found: list[dict[str, Any]] = []
    for path in search_images(images, recursive=recursive).paths:
        try:
            first, *others = units_of([path], SegmentOptions(plate="off"))
            if first.error:
                raise ImageFileError(first.error)
            overview = inspect_image(first.path, **choice)
            rows, about = overview.rows(), overview.as_dict()
            if first.place:  # of a plate in OME-Zarr, all fields of which are segmented
                fields = len(others) + 1
                text = f"{count_text(fields, 'field')}; below is the first of them, {first.path}"
                rows.insert(0, ("plate", text))
                about |= {"path": str(path), "fields": fields, "field": str(first.path)}
            found.append({**about, "rows": rows})
        except DINOCellError as error:
            found.append({"path": str(path), "error": str(error), "rows": [("error", str(error))]})
    for one in found:
        rows = one.pop("rows")
        for key in one.keys() & {"segment", "error"}:
            one[key] = in_options(one[key], context)
        if not json:
            width = max(len(name) for name, _ in rows)
            lines = [f"  {name:{width}}  {in_options(text, context)}" for name, text in rows]
            print("\n".join([one["path"], *lines]))
    if json:
        print(dumps(found, indent=1, ensure_ascii=False))
    if any("error" in one for one in found):
        raise typer.Exit(1)
