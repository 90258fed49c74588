"""`dinocell data`: public data sets to folders of images and labels."""

from dataclasses import dataclass
from pathlib import Path

import typer

from dinocell.cli.options import App, argument, in_options, option

app = App(
    name="data",
    help="Download public data sets, and prepare them and files of other programs for training and evaluation.",
    no_args_is_help=True,
)


@app.command("list")
def data_list() -> None:
    """List the data sets that `pull` and `prepare` know, with their files, licence and address.

    Example: `dinocell data list`
    """
    from dinocell.datasets import describe_layouts

    print(describe_layouts())


@app.command("pull")
def data_pull(
    name: str = argument(
        "Data set; `dinocell data list` shows which can be pulled.", metavar="NAME"
    ),
    out: Path = option("Write the files to this new folder.", ..., names="--out -o"),
    accept: str | None = option(
        "Accept this licence, word by word as `dinocell data list` shows it. Data sets whose licence "
        "forbids commercial use need this.",
        metavar="LICENCE",
    ),
    source: str | None = option(
        "Copy or download from here in place of the publisher: a folder, or the URL of a mirror.",
        names="--from",
    ),
    offline: bool = option(
        "Open no network connection. The environment variable DINOCELL_OFFLINE=1 does the same.",
        False,
    ),
) -> None:
    """Download a public data set and unpack it, for `dinocell data prepare`.

    The checksum (SHA-256) of each file is compared where one is known, else it is printed and marked as
    not verified. `download.json` in the folder keeps licence, addresses and checksums.

    After an interruption run the same command again: it continues where it stopped. Until everything is
    done, the folder has the ending `.part`.

    Example: `dinocell data pull s-bsst265 -o downloads/s-bsst265`
    """
    from dinocell.datasets import pull, terms

    print(terms(name, accept))
    print(pull(name, out, accept=accept, source=source, offline=offline).text())


@dataclass(frozen=True)
class Division:
    """How the images are divided, named as the fields of `SplitOptions`."""

    val_fraction: float = option(
        "Draw this share of the images (0 to 1) for validation, if the publishers have not chosen images "
        "for it.",
        0.1,
    )
    test_fraction: float = option(
        "Draw this share of the images (0 to 1) for the final test, if the publishers have not divided "
        "the images.",
        0.1,
    )
    resplit: bool = option(
        "Ignore how the publishers have divided the images, and draw a new division.", False
    )
    max_images: int | None = option(
        "Use at most this many images, drawn at random.  [default: all]", min=1
    )
    seed: int = option("Use this random seed to draw images.", 0, min=0)


@dataclass(frozen=True)
class Known:
    """What the user knows about the source, named as the fields of `Facts`."""

    licence: str | None = option(
        "Record this licence in place of the one that `dinocell data list` shows.", metavar="TEXT"
    )
    pixel_size_um: float | None = option(
        "Use this pixel size in µm for images whose files do not state it."
    )


@app.command("prepare")
def data_prepare(
    *,
    name: str = argument(
        "Data set, or kind of labels for images of your own; `dinocell data list` shows all names.",
        metavar="NAME",
    ),
    source: Path = argument(
        "Folder with the unpacked download; for coco and tissuenet, a single file is possible, too.",
        metavar="SOURCE",
    ),
    out: Path = option("Write the images and labels to this new folder.", ..., names="--out -o"),
    division: Division,
    known: Known,
    context: typer.Context,
) -> None:
    """Turn a downloaded data set into folders of images and labels that `train` and `evaluate` read.

    The output folder has the subfolders train, val (validation) and test, each with images and labels.
    `manifest.json` states source, licence, channels and options; `manifest.csv` has one row for each
    image. Nothing is downloaded, and the source does not change. docs/data.md explains the rest.

    After an interruption run the same command again: it continues where it stopped. Until everything is
    done, the folder has the ending `.part`.

    Example: `dinocell data prepare livecell LIVECell_dataset_2021/ -o data/livecell`
    """
    from dinocell.datasets import Facts, SplitOptions, prepare

    splits, facts = SplitOptions(**vars(division)), Facts(**vars(known))
    text = prepare(name, source, out, splits=splits, facts=facts).text()
    print(in_options(text, context))
