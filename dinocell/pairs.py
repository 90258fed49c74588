"""Which label file belongs to which image: one rule for training, evaluation, tuning and probes.

A label file belongs to the image of the same name, or its name is that of the image followed by an ending
that says "labels" (`LABEL_NAME_ENDINGS`): `a.tif` goes with `a.png`, `a_labels.tif` or `a_cp_masks.png`.
In the layout of the Cell Tracking Challenge the number of the frame counts: `t007.tif` goes with
`man_seg007.tif`, `man_track007.tif` or `mask007.tif`.

Where an image has no label image, `a_seg.npy` of Cellpose or a zip of ImageJ ROIs (`a.zip`,
`a_RoiSet.zip`, `a_rois.zip`) takes its place.

Images and labels may lie in one folder: then the files with an ending are the labels, the others the
images.  In a folder of labels alone each image decides for itself: `a.tif` may lie beside `b_masks.tif`.
Two label files for one image are refused with their names, because a wrong pair trains or scores without
a sign.  When results are compared (`pair_folders`), no image is known: if some file of a folder has an
ending, those without one are taken for images, overlays or maps and left aside.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinocell.errors import DataSetError, some

IMAGE_SUFFIXES: tuple[str, ...] = (
    *(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".npy"),
    *(".czi", ".nd2", ".lif", ".zarr"),
)
"""Suffixes of the images that can be read, in lower case; see also `is_zarr`."""

LABEL_SUFFIXES: tuple[str, ...] = (".tif", ".tiff", ".png", ".bmp", ".npy")
"""Suffixes of label files: those of images without JPEG, which changes the numbers of the cells."""

LABEL_NAME_ENDINGS: tuple[str, ...] = (
    *("_labels", "_label", "_cp_masks", "_masks", "_mask", "_seg"),  # the longer ones first
)
"""Endings of a name (before the suffix) that say "labels of the image named before"."""

SEG_NPY = "_seg.npy"
"""How the name of a project of Cellpose ends, which is no plain array."""

ROI_ENDINGS: tuple[str, ...] = ("_RoiSet", "_rois")
"""Endings of the name (before `.zip`) of a zip of ImageJ ROIs."""

TRACKS_NAME = "res_track.txt"
"""The list of tracks in a folder of results of the Cell Tracking Challenge."""

OUTPUT_ENDINGS: tuple[str, ...] = ("_nuclei_labels", "_labels", "_overlay", "_distance_map")
"""Endings of the names of the images that DINOCell itself writes."""

_CHALLENGE_NAME = re.compile(r"(?:man_seg|man_track|mask|t)(\d{3,})")
_CHALLENGE_LABELS = re.compile(r"(?:man_seg|man_track|mask)\d{3,}")


def composed(name: str) -> str:
    """A name with its accents in the letters (NFC), to compare it: files from a Mac may have them apart."""
    return unicodedata.normalize("NFC", name)


def is_zarr(path: Path) -> bool:
    """Whether a path is a folder that stands for one image: in Zarr format, by its suffix or its content."""
    if not os.path.isdir(path):  # which is False, too, where the system refuses to look
        return False
    return path.suffix.lower() == ".zarr" or any(
        os.path.isfile(path / name) for name in ("zarr.json", ".zattrs")
    )


@dataclass(frozen=True)
class Pair:
    """An image file and its label file; `dataset` names the set they come from.

    `channels` are the channels of the image to read; empty for a gray image.
    """

    dataset: str
    image_path: Path
    labels_path: Path
    channels: tuple[str, ...] = ()


def find_pairs(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    dataset: str = "",
    channels: Sequence[str] = (),
) -> list[Pair]:
    """Pair the images of a folder with the label files of another, or of the same one, by name.

    Images whose name is that of a result of DINOCell (`OUTPUT_ENDINGS`) count only if a label file has
    the same name.  If both are the same folder, a name with an ending says which files are labels.  The
    pairs are sorted by the names of the images; `dataset` (named in errors) and `channels` are kept in
    them.

    Raises DataSetError (a folder is missing or empty; an image has no label file or a label file no
    image (up to five are named); two files claim to be the same image or its labels; an image is
    its own label file).
    """
    of = f" of data set {dataset!r}" if dataset else ""
    label_paths = _files_in(labels, (*LABEL_SUFFIXES, ".zip"), f"labels{of}")
    projects = [path for path in label_paths if _is_project(path)]
    label_paths = [path for path in label_paths if not _is_project(path)]
    image_paths = _files_in(images, IMAGE_SUFFIXES, f"images{of}")
    label_stems = {_stem(path) for path in label_paths}
    if os.path.samefile(images, labels):
        label_paths = [path for path in label_paths if _says_labels(path)]
        image_paths = [path for path in image_paths if not _says_labels(path)]
        label_stems = set()
    image_by_stem = _one_per_stem(
        path
        for path in image_paths
        if not path.stem.endswith(OUTPUT_ENDINGS) or _stem(path) in label_stems
    )
    found, unknown = _labels_of_images(label_paths, sorted(image_by_stem))
    for kind in (SEG_NPY, ".zip"):  # a label image comes first
        of_kind = [path for path in projects if path.name.lower().endswith(kind)]
        found = _labels_of_images(of_kind, sorted(image_by_stem))[0] | found
    alone = sorted(image_by_stem.keys() - found.keys()) + unknown
    if alone:
        raise DataSetError(
            f"Every image{of} must have one label file of its name and every label file an image, got "
            f"{len(alone)} without a partner ({some(alone)}) in '{images}' and '{labels}': rename or "
            f"remove them; the labels of a.tif may be named a.png, or a with {_ENDINGS} before the suffix"
        )
    pairs = [
        Pair(dataset, image_by_stem[stem], path, tuple(channels)) for stem, path in found.items()
    ]
    for pair in pairs:
        if os.path.samefile(pair.image_path, pair.labels_path):
            raise DataSetError(
                f"An image{of} and its labels must be two files, got '{pair.image_path}' for both: name "
                "the folder that holds the label images"
            )
    return sorted(pairs, key=lambda pair: pair.image_path.stem)


def pair_folders(
    pred_dir: str | os.PathLike[str],
    truth_dir: str | os.PathLike[str],
    *,
    allow_missing_predictions: bool = False,
) -> list[tuple[str, Path | None, Path]]:
    """Pair predicted label files with the true ones, by the names of their images.

    Parameters
    ----------
    pred_dir, truth_dir : folders with label files
        A folder without any, but with a folder ``labels`` in it, stands for that one.  Projects of
        Cellpose and ImageJ whose name the other folder does not have are left aside.
    allow_missing_predictions : keep a truth without prediction, with None in place of the path (to
        be counted as a prediction without cells).  Otherwise it is an error.

    Returns a list of (name, pred_path, truth_path), sorted by name.

    Raises DataSetError (a folder is missing or holds no label file; two files claim to be the
    labels of one image, but for a prediction that `segment` wrote in several formats
    (`a_labels.tif`, `a_labels.png`); a truth has no prediction (unless allowed) or a prediction no
    truth).
    """
    pred_paths, truth_paths = (
        _label_files(folder, what)
        for folder, what in ((pred_dir, "predictions"), (truth_dir, "true labels"))
    )
    preds = _labels_by_name(pred_paths, several_formats=True)
    truths = _labels_by_name(truth_paths)
    pred_projects, truth_projects = map(_projects_by_name, (pred_paths, truth_paths))
    names = preds.keys() | truths.keys() | (pred_projects.keys() & truth_projects.keys())
    preds |= {name: pred_projects[name] for name in names & pred_projects.keys() - preds.keys()}
    truths |= {name: truth_projects[name] for name in names & truth_projects.keys() - truths.keys()}
    missing = [] if allow_missing_predictions else sorted(truths.keys() - preds.keys())
    alone = {
        "true label images without a prediction": missing,
        "predictions without a true label image": sorted(preds.keys() - truths.keys()),
    }
    problems = [f"{what}: {len(names)} ({some(names)})" for what, names in alone.items() if names]
    lonely = {name for found in alone.values() for name in found}
    left_aside = [
        path.name
        for paths, taken in ((pred_paths, preds), (truth_paths, truths))
        for path in paths
        if _stem(path) in lonely - taken.keys() and not _is_project(path)
    ]
    if left_aside:
        problems.append(
            f"left aside, since names beside them have an ending: {len(left_aside)} "
            f"({some(left_aside)})"
        )
    if problems:
        way_out = (
            "set `allow_missing_predictions` to score a missing prediction as an image without cells"
            if missing
            else "name a folder that holds only the predictions that have a true label image"
        )
        raise DataSetError(
            f"File names of '{pred_dir}' and '{truth_dir}' must match, got {', '.join(problems)}: "
            f"give both files of a pair the same name before the suffix (the endings {_ENDINGS} do "
            f"not count), or {way_out}"
        )
    return [(name, preds.get(name), truths[name]) for name in sorted(truths)]


def _label_files(folder: str | os.PathLike[str], what: str) -> list[Path]:
    inner, suffixes = Path(folder) / "labels", (*LABEL_SUFFIXES, ".zip")
    if inner.is_dir():
        has_labels = any(
            _is_label_file(path) or _is_project(path) for path in Path(folder).iterdir()
        )
        return _files_in(folder if has_labels else inner, suffixes, what)
    return _files_in(folder, suffixes, what)


def _files_in(folder: str | os.PathLike[str], suffixes: Sequence[str], what: str) -> list[Path]:
    if not Path(folder).is_dir():
        shipped = "DINOCELL_DATA" not in os.environ and "shared/data" in str(folder)
        hint = (
            " (DINOCELL_DATA names the data folder of the shipped configurations)"
            if shipped
            else ""
        )
        raise DataSetError(f"The {what} must be a folder, got '{folder}': check the path{hint}")
    wanted = _is_image_file if suffixes == IMAGE_SUFFIXES else _is_label_file
    found = sorted(
        path
        for path in Path(folder).iterdir()
        if wanted(path) or (".zip" in suffixes and _is_project(path))
    )
    if not found:
        raise DataSetError(
            f"The folder of the {what} must hold files that end in {', '.join(suffixes)}, '{folder}' "
            "holds none: name the folder that has them"
        )
    return found


def _is_image_file(path: Path) -> bool:
    if path.name.startswith(".") or path.name.endswith(SEG_NPY):
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or is_zarr(path))


def _is_label_file(path: Path) -> bool:
    return path.suffix.lower() in LABEL_SUFFIXES and _is_image_file(path)


def _is_project(path: Path) -> bool:
    named = path.name.endswith(SEG_NPY) or path.suffix.lower() == ".zip"
    return named and not path.name.startswith(".") and path.is_file()


def _one_per_stem(paths: Iterable[Path]) -> dict[str, Path]:
    by_stem: dict[str, Path] = {}
    for path in paths:
        _refuse_second(by_stem, _stem(path), path)
        by_stem[_stem(path)] = path
    return by_stem


def _labels_of_images(
    paths: Sequence[Path], image_stems: Sequence[str]
) -> tuple[dict[str, Path], list[str]]:
    """Stem of the image → label file, and the names of the label files that belong to no image."""
    # The label file of `t007.tif` may have the name 007; a plain `007.tif` comes first.
    stem_of = {_image_name(stem): stem for stem in image_stems}
    stem_of |= {stem: stem for stem in image_stems}
    found: dict[str, Path] = {}
    unknown = []
    for path in paths:
        stem = _stem(path)  # that of a known image is a name, whatever its ending
        image = stem_of.get(stem if stem in stem_of else _image_name(stem))
        if image is None:
            unknown.append(path)
            continue
        _refuse_second(found, image, path)
        found[image] = path
    # Beside files with an ending lie overlays and maps.
    if any(_has_ending(path) and _stem(path) not in stem_of for path in paths):
        unknown = [path for path in unknown if _has_ending(path)]
    return found, sorted({_image_name(_stem(path)) for path in unknown})


def _labels_by_name(paths: Sequence[Path], *, several_formats: bool = False) -> dict[str, Path]:
    """Name of the image → label image, where no image is known."""
    by_name: dict[str, Path] = {}
    paths = [path for path in paths if not _is_project(path)]
    for path in sorted(
        filter(_has_ending, paths) if any(map(_has_ending, paths)) else paths,
        key=lambda p: (_stem(p), LABEL_SUFFIXES.index(p.suffix.lower()), p.name),
    ):
        name, stem = _image_name(_stem(path)), _stem(path)
        # `segment` writes a_labels in several formats at a time: they hold the same.
        known = by_name.get(name)
        if several_formats and known and _stem(known) == stem and stem.endswith("_labels"):
            continue
        _refuse_second(by_name, name, path)
        by_name[name] = path
    return by_name


def _projects_by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Name of the image → project of Cellpose, else zip of ROIs."""
    found: dict[str, Path] = {}
    for kind in (SEG_NPY, ".zip"):
        of_kind: dict[str, Path] = {}
        for path in paths:
            if _is_project(path) and path.name.lower().endswith(kind):
                _refuse_second(of_kind, _image_name(_stem(path)), path)
                of_kind[_image_name(_stem(path))] = path
        found = of_kind | found
    return found


def _has_ending(path: Path) -> bool:
    return _stem(path).endswith(LABEL_NAME_ENDINGS)


def _says_labels(path: Path) -> bool:
    return _has_ending(path) or _CHALLENGE_LABELS.fullmatch(_stem(path)) is not None


def _refuse_second(by_name: dict[str, Path], name: str, path: Path) -> None:
    if name in by_name:
        raise DataSetError(
            f"'{path.parent}' must hold one file for each image, got '{by_name[name].name}' and "
            f"'{path.name}' for '{name}': remove one of them"
        )


def _stem(path: Path) -> str:
    stem = composed(path.stem)
    if path.suffix.lower() == ".zip":
        return stem.removesuffix(next((end for end in ROI_ENDINGS if stem.endswith(end)), ""))
    return stem[: -len(".ome")] if stem.lower().endswith(".ome") else stem


def _image_name(stem: str) -> str:
    """The stem without endings that say "labels" and without the prefix of a challenge's frame."""
    name = stem
    while ending := next((end for end in LABEL_NAME_ENDINGS if name.endswith(end)), ""):
        if name == ending:
            break
        name = name[: -len(ending)].removesuffix(".ome")
    frame = _CHALLENGE_NAME.fullmatch(name)
    return frame[1] if frame else name


_ENDINGS = ", ".join(LABEL_NAME_ENDINGS)
