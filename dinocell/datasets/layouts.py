"""The data sets that `prepare` knows: how their files are laid out, and under which licence."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dinocell.datasets import annotations, archives, folders
from dinocell.datasets.sample import Sample, Unlabelled
from dinocell.errors import UsageError

Reader = Callable[[Path, list[str]], Iterator[Sample | Unlabelled]]


@dataclass(frozen=True)
class Layout:
    """One data set, or one way in which any data set may be stored.

    Attributes
    ----------
    holds : what the images show, in a few words
        Empty for a layout of any source.
    files : the layout that `read` expects, in words
    read : (source, notes) → samples, and images without labels
        Appends sentences on what else was left out to the notes.
    licence : as its publishers state it, None if it is not known here
    address : where it is published
    pixel_size_um : edge of a pixel in µm where it is published and the files do not say it
    note : what a user should know before training on it
    """

    holds: str
    files: str
    read: Reader
    licence: str | None = None
    address: str = ""
    pixel_size_um: float | None = None
    note: str = ""


_TISSUENET = Layout(
    "tissue, fluorescence, nuclei and membrane: whole cells",
    "tissuenet_v1.1_{train,val,test}.npz",
    partial(archives.tissuenet, labels=0),
    "non-commercial (modified Apache 2.0 of DeepCell)",
    "https://datasets.deepcell.org",
    0.5,
)

LAYOUTS: dict[str, Layout] = {
    "livecell": Layout(
        "phase contrast, eight cell lines: whole cells",
        "livecell_coco_{train,val,test}.json and the images below one folder",
        annotations.livecell,
        "CC BY-NC 4.0",
        "https://sartorius-research.github.io/LIVECell",
        1.24,
    ),
    "cellpose": Layout(
        "many kinds of cells, in colour: whole cells",
        "train/000_img.png and train/000_masks.png, test/...",
        partial(folders.beside_masks, colour=True),
        "non-commercial (terms of the Cellpose data)",
        "https://www.cellpose.org/dataset",
        note="the green channel (position 1) shows the cytoplasm, the red one (0) the nuclei",
    ),
    "omnipose": Layout(
        "bacteria, phase contrast and fluorescence: whole cells",
        "train/.../a.tif and a_masks.tif, test/...",
        folders.beside_masks,
        "non-commercial (CC BY-NC 3.0)",
        "https://github.com/kevinjohncutler/omnipose",
    ),
    "tissuenet": _TISSUENET,
    "tissuenet-nuclei": Layout(
        "the images of tissuenet: nuclei",
        _TISSUENET.files,
        partial(archives.tissuenet, labels=1),
        _TISSUENET.licence,
        _TISSUENET.address,
        _TISSUENET.pixel_size_um,
    ),
    "dsb2018": Layout(
        "nuclei, mostly fluorescence, some stained tissue (BBBC038)",
        "stage1_train/ID/images/ID.png and stage1_train/ID/masks/*.png",
        folders.one_mask_per_cell,
        "CC0 1.0",
        "https://bbbc.broadinstitute.org/BBBC038",
        note="many images are neighbouring parts of one field: a random split puts some on both sides",
    ),
    "nuinsseg": Layout(
        "stained tissue of 31 organs: nuclei",
        "human liver/tissue images/*.png and human liver/label masks modify/*.tif",
        folders.nuinsseg,
        "CC BY 4.0",
        "https://github.com/masih4/NuInsSeg",
    ),
    "tnbc": Layout(
        "stained tissue (H&E) of breast cancer: nuclei",
        "Slide_01/01_1.png and GT_01/01_1.png, ...",
        folders.tnbc,
        "CC BY 4.0",
        "https://zenodo.org/records/2579118",
        note="patients 1 to 6 train, 7 and 8 validate, 9 to 11 test; nuclei that touch are one",
    ),
    "lynsec": Layout(
        "stained tissue (H&E and IHC) of lymphoma: nuclei",
        "lynsec 1/0_l1.npy, lynsec 2/..., lynsec 3/...",
        archives.lynsec,
        "CC BY 4.0",
        "https://zenodo.org/records/8065174",
        note="the files do not name the patient: a random split puts some on both sides",
    ),
    "vicar": Layout(
        "quantitative phase, five adherent cell lines: whole cells",
        "labelled/A2058/a_img.tif and a_mask.png, ...",
        folders.vicar,
        "CC BY 4.0",
        "https://zenodo.org/records/5153251",
    ),
    "yeastsam": Layout(
        "budding yeast, differential interference contrast: whole cells",
        "DIC/*.tif and DIC_mask/*.tif",
        folders.yeastsam,
        None,
        "https://zenodo.org/records/17204942",
        note="a mother cell and its bud are one cell",
    ),
    "s-bsst265": Layout(
        "fluorescence, tissue sections, cytospins and cell lines: nuclei",
        "rawimages/*.tif and groundtruth/*.tif",
        folders.s_bsst265,
        "CC0 1.0",
        "https://www.ebi.ac.uk/biostudies/studies/S-BSST265",
    ),
    "bbbc039": Layout(
        "fluorescence, U2OS: nuclei",
        "images/*.tif, masks/*.png and metadata/{training,validation,test}.txt",
        folders.bbbc039,
        "CC0 1.0",
        "https://bbbc.broadinstitute.org/BBBC039",
        note="some fields are also in dsb2018: leave them out where one of the two tests the other",
    ),
    "bbbc006": Layout(
        "fluorescence, U2OS, in focus: nuclei",
        "BBBC006_v1_images_z_16/*_w1*.tif and BBBC006_v1_labels/*.png",
        folders.bbbc006,
        "CC0 1.0",
        "https://bbbc.broadinstitute.org/BBBC006",
        0.645,
        note="a program (CellProfiler) made the labels",
    ),
    "ctc": Layout(
        "films of the Cell Tracking Challenge",
        "NAME/01/t000.tif with NAME/01_ST/SEG/man_seg000.tif, or 01_GT/SEG",
        folders.challenge,
        "terms of the Cell Tracking Challenge; not to be passed on",
        "https://celltrackingchallenge.net/2d-datasets",
    ),
    "coco": Layout(
        "", "*.json of COCO with polygons or run lengths, and the images", annotations.coco
    ),
    "seg_npy": Layout("", "a_seg.npy of Cellpose beside the image a", folders.seg_npy),
    "imagej-roi": Layout(
        "", "a.zip, a_RoiSet.zip or a_rois.zip of ImageJ beside the image a", folders.imagej_rois
    ),
    "geojson": Layout("", "a.geojson of QuPath beside the image a", annotations.geojson),
}
"""Name → layout, those of one data set first."""


def find_layout(name: str) -> Layout:
    """The layout of a name.  Raises UsageError, which lists the known names."""
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name.lower(), LAYOUTS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see `dinocell data list`"
        raise UsageError(f"`name` must be one of {', '.join(LAYOUTS)}, got {name!r}: {hint}")
    return LAYOUTS[name]
