"""`dinocell data`: public data sets to folders of images and labels."""

from dataclasses import dataclass
from pathlib import Path

from dinocell.cli.options import App, argument, option

app = App(
    name="data",
    help="Prepare public data sets, and files of other programs, for training and evaluation.",
    no_args_is_help=True,
)


@app.command("list")
def data_list() -> None:
    """List the data sets and layouts that `prepare` knows, with their files and licences.

    Example: `dinocell data list`
    """
    from dinocell.datasets import describe_layouts

    print(describe_layouts())


@dataclass(frozen=True)
class Division:
    """How the images are divided, named as the fields of `SplitOptions`."""

    val_fraction: float = option(
        "Use this share of the images for validation. It applies where the source has no split for "
        "validation.",
        0.1,
    )
    test_fraction: float = option(
        "Keep this share of the images for the final test. It applies where the source has no splits.",
        0.1,
    )
    resplit: bool = option("Divide all images again, also where the source has splits.", False)
    max_images: int | None = option("Take at most this number of images, drawn from all.", min=1)
    seed: int = option("Use this random seed for the draw.", 0, min=0)


@dataclass(frozen=True)
class Known:
    """What the user knows about the source, named as the fields of `Facts`."""

    licence: str | None = option(
        "Write this licence into the manifest in place of the known one.", metavar="TEXT"
    )
    pixel_size_um: float | None = option(
        "Use this pixel size in µm for images that do not state theirs."
    )


@app.command("prepare")
def data_prepare(
    *,
    name: str = argument("Data set or layout; `dinocell data list` shows all."),
    source: Path = argument(
        "Folder with the unpacked files; for coco and tissuenet also one file."
    ),
    out: Path = option("Write the results to this new folder.", ..., names="--out -o"),
    division: Division,
    known: Known,
) -> None:
    """Write a data set as OUT/{train,val,test}/images and labels, with a manifest.

    `manifest.json` states source, licence, channels and options; `manifest.csv` has one row per image
    with split, size, pixel size, number of cells, source file and checksums.

    After an interruption run the same command again: it continues where it stopped. OUT appears when
    everything is in it.

    Example: `dinocell data prepare livecell LIVECell_dataset_2021/ -o data/livecell`
    """
    from dinocell.datasets import Facts, SplitOptions, prepare

    splits, facts = SplitOptions(**vars(division)), Facts(**vars(known))
    print(prepare(name, source, out, splits=splits, facts=facts).text())
