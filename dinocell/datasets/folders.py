"""Data sets that are folders of image files with label files beside them or in other folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocell.datasets.sample import (
    MANIFESTS,
    PROGRESS,
    Content,
    Sample,
    Unlabelled,
    name_below,
    split_of,
    split_of_path,
)
from dinocell.errors import DataSetError, some
from dinocell.io import Image, natural_key, read_image, read_label_file, read_labels
from dinocell.io.names import walk_folders
from dinocell.io.polygons import CellMask, paint_cells
from dinocell.pairs import (
    IMAGE_SUFFIXES,
    LABEL_NAME_ENDINGS,
    LABEL_SUFFIXES,
    OUTPUT_ENDINGS,
    ROI_ENDINGS,
    SEG_NPY,
    composed,
)

LabelReader = Callable[[Path, tuple[int, int]], NDArray]

_RGB = ("red", "green", "blue")

_NO_IMAGES = (*LABEL_NAME_ENDINGS, *OUTPUT_ENDINGS, "_flows", "_outlines")
"""Endings of what lies beside images but is none: labels, and what DINOCell and Cellpose write."""


def files_below(
    source: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES, ending: str = ""
) -> list[Path]:
    """Files below a folder whose names end in `ending` and one of `suffixes`, in natural order."""
    wanted = tuple(suffixes)
    found = [
        path
        for _, files in _source_folders(source)
        for path in files
        if path.name.lower().endswith(wanted) and path.stem.endswith(ending) and path.is_file()
    ]
    return sorted(found, key=natural_key)


def folders_below(source: Path) -> list[Path]:
    """Folders below a folder, but for hidden ones, in natural order."""
    return sorted((one for one, _ in _source_folders(source) if one != source), key=natural_key)


def _source_folders(source: Path) -> Iterator[tuple[Path, list[Path]]]:
    """`walk_folders` without what `prepare` itself has written below the source, finished or not."""
    made: set[Path] = set()
    for folder, files in walk_folders(source) if source.is_dir() else ():
        names = {path.name for path in files}
        ours = any(names.issuperset(own) for own in (MANIFESTS, PROGRESS)) and folder != source
        if ours or folder.parent in made:
            made.add(folder)
        else:
            yield folder, files


class Images:
    """The images below a folder, found by their folder and their name before the suffix."""

    def __init__(self, source: Path) -> None:
        self.paths = [path for path in files_below(source) if not path.name.endswith(SEG_NPY)]
        self._known: dict[tuple[Path, str], Path] = {}
        for suffix in IMAGE_SUFFIXES:  # of two images of one name, the first of these
            for path in self.paths:
                if path.suffix.lower() == suffix:
                    self._known.setdefault((path.parent, composed(path.stem)), path)
        for (folder, stem), path in list(self._known.items()):
            if stem.lower().endswith(".ome"):
                self._known.setdefault((folder, stem[: -len(".ome")]), path)

    def find(self, folder: Path, names: Iterable[str]) -> Path | None:
        """The image in a folder with the first of some names that exists."""
        places = ((folder, composed(name)) for name in names)
        return next((self._known[place] for place in places if place in self._known), None)

    def beside(self, folder: Path) -> list[Path]:
        """The images in a folder itself."""
        return [path for path in self.paths if path.parent == folder]

    def without_labels(
        self, taken: Container[Path | None], ending: str = ""
    ) -> Iterator[Unlabelled]:
        """The images that no file of labels has taken, of those whose names have this ending."""
        for path in self.paths:
            is_image = path.stem.endswith(ending) and not path.stem.endswith(_NO_IMAGES)
            if is_image and path not in taken:
                yield Unlabelled(path)


def read_files(
    image_path: Path, labels_path: Path, read: LabelReader | None = None, *, colour: bool = False
) -> Content:
    """A sample of two files, the labels by `read_label_file` or `read`; with `colour`, gray pictures that are stored as colours stay colours."""
    image: Image = read_image(image_path)
    pixels = image.pixels
    if colour and pixels.ndim == 2 and _is_stored_as_colour(image_path):
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    names = _RGB if colour and pixels.ndim == 3 and pixels.shape[2] == 3 else image.channel_names
    shape = pixels.shape[0], pixels.shape[1]
    notes = image.notes
    if read is None:
        file = read_label_file(labels_path, shape=shape)
        labels: NDArray = file.pixels
        notes += tuple(f"labels: {note}" for note in file.notes)
    else:
        labels = read(labels_path, shape)
    return Content(pixels, labels, image.pixel_size_um, names, notes)


def _is_stored_as_colour(path: Path) -> bool:
    if path.suffix.lower() != ".png":
        return False
    from PIL import Image as Picture

    with Picture.open(path) as picture:
        return picture.mode in ("RGB", "RGBA")


def beside_masks(
    source: Path, notes: list[str], *, colour: bool = False
) -> Iterator[Sample | Unlabelled]:
    """`a_masks.png` beside `a_img.png` or `a.png`, in folders train and test: Cellpose, Omnipose."""
    images, taken = Images(source), set()
    for path in files_below(source, LABEL_SUFFIXES, "_masks"):
        stem = path.stem.removesuffix("_masks").removesuffix("_cp")
        image = images.find(path.parent, (f"{stem}_img", stem))
        taken.add(image)
        yield _sample(source, path, image, stem, partial(read_files, colour=colour))
    yield from images.without_labels(taken)


def beside_files(
    source: Path, notes: list[str], *, suffix: str, endings: tuple[str, ...]
) -> Iterator[Sample | Unlabelled]:
    """A file of another program beside each image: `a_seg.npy`, `a_RoiSet.zip`, `a.geojson`."""
    images, taken = Images(source), set()
    for path in files_below(source, (suffix,)):
        stem = path.name[: -len(suffix)]
        ending = next((end for end in endings if stem.endswith(end)), "")
        stem = stem.removesuffix(ending)
        # QuPath names the file of a.tif either a.geojson or a.tif.geojson
        image = images.find(path.parent, (stem, Path(stem).stem, f"{stem}_img"))
        name = image.stem if image else stem
        taken.add(image)
        yield _sample(source, path, image, name, read_files)
    yield from images.without_labels(taken)


seg_npy = partial(beside_files, suffix=SEG_NPY, endings=())
imagej_rois = partial(beside_files, suffix=".zip", endings=ROI_ENDINGS)


def _sample(
    source: Path, path: Path, image: Path | None, stem: str, read: Callable[[Path, Path], Content]
) -> Sample:
    if image is None:
        raise DataSetError(
            f"Every file of labels must have its image beside it, '{path}' has none of the name "
            f"'{stem}': copy the image there"
        )
    name = name_below(path, source, stem)
    return Sample(name, image, partial(read, image, path), split_of_path(path, source))


def one_mask_per_cell(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`ID/images/ID.png` and one binary picture per cell in `ID/masks`: Data Science Bowl 2018."""
    folders = folders_below(source)
    with_masks = {folder.parent for folder in folders if folder.name == "masks"}
    for folder in folders:
        home = folder.parent
        if folder.name == "images" and home not in with_masks:
            yield from map(Unlabelled, files_below(folder))
        if folder.name != "masks":
            continue
        pictures = files_below(home / "images") if (home / "images").is_dir() else []
        if len(pictures) != 1:
            raise DataSetError(
                f"Every image must be a folder with one file in its folder images, '{home}' has "
                f"{len(pictures)}: download the data again"
            )
        read = partial(read_files, pictures[0], folder, _merged_masks)
        yield Sample(home.name, pictures[0], read, split_of_path(home, source.parent))


def _merged_masks(folder: Path, shape: tuple[int, int]) -> NDArray:
    masks = []
    for path in files_below(folder):
        mask = read_labels(path)
        if mask.shape != shape:
            raise DataSetError(
                f"Each mask must be as large as its image, {shape[0]} × {shape[1]} px, got "
                f"{mask.shape[0]} × {mask.shape[1]} in '{path}': download the data again"
            )
        rows, cols = np.nonzero(mask)
        if len(rows):
            box = slice(rows.min(), rows.max() + 1), slice(cols.min(), cols.max() + 1)
            masks.append(CellMask(int(rows.min()), int(cols.min()), mask[box] > 0))
    return paint_cells(masks, shape)[0]


def in_two_folders(
    source: Path,
    notes: list[str],
    *,
    images: str,
    labels: tuple[str, ...],
    read: LabelReader | None = None,
    stratum: Callable[[Path], str] = lambda path: "",
) -> Iterator[Sample | Unlabelled]:
    """Images in folders of one name and labels of the same names in folders of another beside them.

    `labels` are names of the labels' folders, the better first.
    """
    lone: list[Path] = []
    second: list[Path] = []
    for parent in dict.fromkeys(
        folder.parent for folder in folders_below(source) if folder.name in (images, *labels)
    ):
        homes = [parent / name for name in labels if (parent / name).is_dir()]
        known = {home: Images(home) for home in homes}
        stems = set()
        for image in files_below(parent / images):
            stems.add(_stem(image))
            found = (known[home].find(home, (image.stem,)) for home in homes)
            path = next((one for one in found if one is not None), None)
            if path is None:
                yield Unlabelled(image)
                continue
            if path.parent != homes[0]:
                second.append(path)
            how = partial(read_files, image, path, read)
            yield Sample(image.stem, image, how, None, stratum(image))
        alone = {_stem(path): path for home in homes[::-1] for path in known[home].beside(home)}
        lone += [path for stem, path in alone.items() if stem not in stems]
    if second:
        names = some([path.name for path in second])
        notes.append(
            f"Images took labels of '{second[0].parent.name}', because '{labels[0]}' has none for them: "
            f"{len(second)} ({names})"
        )
    notes += _lone_labels(lone)


def _stem(path: Path) -> str:
    return composed(path.stem.removesuffix(".ome"))


def _lone_labels(paths: Sequence[Path]) -> list[str]:
    """A sentence on labels without an image, if there are any."""
    if not paths:
        return []
    names = some([path.name for path in paths])
    return [f"Labels without an image were left out: {len(paths)} ({names})"]


def nuinsseg(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`human liver/tissue images/*.png` and `human liver/label masks modify/*.tif`."""
    yield from in_two_folders(
        source,
        notes,
        images="tissue images",
        labels=("label masks modify", "label masks"),
        stratum=lambda path: path.parent.parent.name,
    )


def s_bsst265(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`rawimages/*.tif` and `groundtruth/*.tif`; the name begins with the kind of tissue."""
    yield from in_two_folders(
        source,
        notes,
        images="rawimages",
        labels=("groundtruth",),
        stratum=lambda path: path.stem.split("_")[0],
    )


def yeastsam(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`DIC/*.tif` and `DIC_mask/*.tif`."""
    yield from in_two_folders(source, notes, images="DIC", labels=("DIC_mask",))


_TNBC_LAST_TRAIN, _TNBC_LAST_VAL = 6, 8


def tnbc(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`Slide_01/01_1.png` and its nuclei in black and white, `GT_01/01_1.png`: one folder per patient.

    The patients stay whole: 1 to 6 train, 7 and 8 validate, 9 to 11 test.
    """
    lone: list[Path] = []
    for folder in folders_below(source):
        kind, _, number = folder.name.partition("_")
        if not number.isdigit():
            continue
        if kind == "GT" and not folder.with_name(f"Slide_{number}").is_dir():
            lone += Images(folder).paths
        if kind != "Slide":
            continue
        home = folder.with_name(f"GT_{number}")
        labels, stems = Images(home), set()
        patient = int(number)
        split = (
            "train"
            if patient <= _TNBC_LAST_TRAIN
            else "val"
            if patient <= _TNBC_LAST_VAL
            else "test"
        )
        for image in files_below(folder):
            path = labels.find(home, (image.stem,))
            stems.add(_stem(image))
            if path is None:
                yield Unlabelled(image)
                continue
            read = partial(read_files, image, path, _connected_colours, colour=True)
            yield Sample(image.stem, image, read, split)
        lone += [path for path in labels.beside(home) if _stem(path) not in stems]
    notes += _lone_labels(lone)


def vicar(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`A2058/a_img.tif` and `A2058/a_mask.png`; the folder is the cell line.

    Whether the masks number the cells or only show them is not documented: connected regions of one
    value are cells either way.
    """
    images, taken = Images(source), set()
    for path in files_below(source, LABEL_SUFFIXES, "_mask"):
        stem = path.stem.removesuffix("_mask")
        image = images.find(path.parent, (f"{stem}_img",))
        taken.add(image)
        found = _sample(source, path, image, stem, _read_connected)
        yield replace(found, stratum=path.parent.name)
    yield from images.without_labels(taken, "_img")


def bbbc039(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`images/*.tif`, `masks/*.png`, and the lists of the splits in `metadata/{training,...}.txt`."""
    splits: dict[str, str] = {}
    for path in files_below(source, (".txt",)):
        split = split_of(path.stem)
        if split is not None:
            names = path.read_text(encoding="utf-8", errors="replace").split()
            splits |= {Path(name).stem: split for name in names}
    found = in_two_folders(
        source, notes, images="images", labels=("masks",), read=_connected_colours
    )
    left_out = 0
    for sample in found:
        if isinstance(sample, Unlabelled):
            yield sample
        elif splits and sample.name not in splits:
            left_out += 1
        else:
            yield replace(sample, split=splits.get(sample.name))
    if left_out:
        notes.append(f"Images that no list of the splits has were left out: {left_out}")


def _connected_colours(path: Path, shape: tuple[int, int]) -> NDArray:
    """Connected regions of one value of the first channel: BBBC039, masks in black and white."""
    from skimage.measure import label

    picture = read_image(path).pixels
    return label(picture if picture.ndim == 2 else picture[..., 0], background=0)


_read_connected = partial(read_files, read=_connected_colours)


_BBBC006_NAME = re.compile(r"(.+_[a-p]\d\d_s\d+)_w1.*", re.IGNORECASE)


def bbbc006(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`BBBC006_v1_images_z_16/*_w1*.tif` (nuclei, in focus) and `BBBC006_v1_labels/*.png`."""
    labels = {
        path.stem.lower(): path
        for path in files_below(source)
        if "label" in path.parent.name.lower()
    }
    focused = [path for path in files_below(source) if path.parent.name.endswith("z_16")]
    taken = set()
    for image in focused:
        found = _BBBC006_NAME.fullmatch(image.stem)
        if found is None:
            continue  # w2 is phalloidin, which the labels do not show
        path = labels.get(found[1].lower())
        taken.add(path)
        if path is None:
            yield Unlabelled(image)
            continue
        yield Sample(found[1], image, partial(read_files, image, path))
    notes += _lone_labels([path for path in labels.values() if path not in taken])


def challenge(source: Path, notes: list[str]) -> Iterator[Sample | Unlabelled]:
    """`01/t000.tif` with `01_ST/SEG/man_seg000.tif`, else `01_GT/SEG`: Cell Tracking Challenge.

    A film stays whole, because its frames resemble one another: the last one is for validation.
    """
    films = []
    for path in folders_below(source):
        if not re.fullmatch(r"\d\d", path.name):
            continue
        if _truth_of(path) is not None:
            films.append(path)
        else:
            yield from _frames_without_labels(Images(path), ())
    if len(films) == 1:
        notes.append(
            "There is one film: all of it is in train, because its frames resemble each other"
        )
    for film in films:
        images, truth = Images(film), _truth_of(film)
        assert truth is not None
        split = "val" if film == films[-1] and len(films) > 1 else "train"
        if truth.parent.name.endswith("_GT"):
            notes.append(
                f"Film {film.name} has no silver truth (ST): the gold truth is used, in which cells of a "
                "frame may be missing"
            )
        taken = set()
        for path in files_below(truth, (".tif", ".tiff")):
            frame = re.fullmatch(r"man_seg_?(\d+)", path.stem)
            image = frame and images.find(film, (f"t{frame[1]}",))
            if not frame or image is None:
                raise DataSetError(
                    f"Every file of SEG must be man_segNNN.tif with an image tNNN.tif, got '{path}' "
                    "without one: planes of 3-D films are not read"
                )
            taken.add(image)
            name = name_below(image, source.parent, image.stem)
            yield Sample(name, image, partial(read_files, image, path), split)
        yield from _frames_without_labels(images, taken)


def _frames_without_labels(film: Images, taken: Container[Path | None]) -> Iterator[Unlabelled]:
    for one in film.without_labels(taken):
        if re.fullmatch(r"t\d{3,}", one.source_file.stem):
            yield one


def _truth_of(film: Path) -> Path | None:
    homes = [film.with_name(f"{film.name}_{kind}") / "SEG" for kind in ("ST", "GT")]
    return next((home for home in homes if any(home.glob("man_seg*"))), None)
