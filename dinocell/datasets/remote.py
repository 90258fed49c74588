"""Where the files of public data sets are published, and on which terms."""

import difflib
import urllib.parse
from dataclasses import dataclass

from dinocell.datasets.layouts import LAYOUTS, find_layout
from dinocell.errors import UsageError


@dataclass(frozen=True)
class RemoteFile:
    """One published file; an archive (`.zip`) is unpacked into `folder` of the download."""

    url: str
    folder: str = ""
    sha256: str | None = None  # None: not known
    md5: str | None = None  # of files whose SHA-256 is not known

    @property
    def name(self) -> str:
        return urllib.parse.urlsplit(self.url).path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Remote:
    """The files of one data set; layout, licence and address stand in `LAYOUTS`.

    `is_free`: anyone may use the data for any purpose, as far as we know.
    `is_checked`: somebody has downloaded these files with this program, and the checksums agreed.
    """

    files: tuple[RemoteFile, ...]
    is_free: bool = True
    is_checked: bool = False


_BBBC = "https://data.broadinstitute.org/bbbc"
_LIVECELL = "https://livecell-dataset.s3.eu-central-1.amazonaws.com/LIVECell_dataset_2021"

_ZENODO = "https://zenodo.org/records"

REMOTES: dict[str, Remote] = {
    "dsb2018": Remote(
        (
            RemoteFile(
                f"{_BBBC}/BBBC038/stage1_train.zip",
                "stage1_train",
                "dcb6edc2690f137406638b2309581a71522c4dff19157d118453b448dcddcb68",
            ),
        )
    ),
    "bbbc039": Remote(
        tuple(
            RemoteFile(f"{_BBBC}/BBBC039/{name}.zip", sha256=sha256)
            for name, sha256 in (
                ("images", "6f30a5d4fe38c928ded972704f085975f8dc0d65d9aa366df00e5a9d449fddd7"),
                ("masks", "f9e6043d8ca56344a4886f96a700d804d6ee982f31e2b2cd3194af2a053c2710"),
                ("metadata", "a2c1f900bed9ba92a99553efd4c2ae98598433691c7401d818653ab61110deb2"),
            )
        )
    ),
    "bbbc006": Remote(
        (
            RemoteFile(f"{_BBBC}/BBBC006/BBBC006_v1_images_z_16.zip"),
            RemoteFile(
                f"{_BBBC}/BBBC006/BBBC006_v1_labels.zip",
                "BBBC006_v1_labels",
                "2d3ec4e5a3ec0bb94820c9bcd6f102821862f526df2552ff9065a75b1c5e33ac",
            ),
        )
    ),
    "s-bsst265": Remote(
        (
            RemoteFile(
                "https://www.ebi.ac.uk/biostudies/files/S-BSST265/dataset.zip",
                sha256="8285987ed4d57c46a46a55a33c1c085875ea41f429b59cde31d249741aa07ad1",
            ),
        )
    ),
    "nuinsseg": Remote((RemoteFile(f"{_ZENODO}/10518968/files/NuInsSeg.zip"),)),
    "tnbc": Remote(
        (
            RemoteFile(
                f"{_ZENODO}/2579118/files/TNBC_NucleiSegmentation.zip",
                md5="1605712a752b201b57eacc8f866adb4f",
            ),
        )
    ),
    "lynsec": Remote(
        (
            RemoteFile(
                f"{_ZENODO}/8065174/files/lynsec.zip",
                sha256="14b9b5a9c39cb41afc7f31de5a995cefff0947c215e14ab9c7a463f32fbbf4b6",
            ),
        )
    ),
    "vicar": Remote(
        (
            RemoteFile(
                f"{_ZENODO}/5153251/files/labelled.zip",
                "labelled",
                "e4b6fc8ad3955c4e0fe0e95a9be03d4333b6d9029f675ae9652084cefc4aaab6",
            ),
        )
    ),
    "livecell": Remote(
        (
            RemoteFile(f"{_LIVECELL}/images.zip"),
            *(
                RemoteFile(f"{_LIVECELL}/annotations/LIVECell/livecell_coco_{split}.json")
                for split in ("train", "val", "test")
            ),
        ),
        is_free=False,
    ),
}
"""Name → files.  Addresses and checksums come from public programs that download the same files
(docs/data.md names them); this project has no connection to try them, so that `is_checked` is False
everywhere."""


def find_remote(name: str) -> Remote:
    """The files of a name.  Raises UsageError, which says what can be pulled instead."""
    if name in REMOTES:
        return REMOTES[name]
    if name in LAYOUTS and LAYOUTS[name].address:
        layout = find_layout(name)
        if layout.licence is None:
            advice = f"read its licence at {layout.address} and download it there if you may"
        else:
            advice = f"download it from {layout.address}, whose publishers may ask for a form or an account"
        raise UsageError(
            f"`name` must be one of {', '.join(REMOTES)}, got {name!r} (licence: "
            f"{layout.licence or 'unknown'}): {advice}"
        )
    near = difflib.get_close_matches(name.lower(), REMOTES, n=1)
    hint = f"did you mean {near[0]}?" if near else "see `dinocell data list`"
    raise UsageError(f"`name` must be one of {', '.join(REMOTES)}, got {name!r}: {hint}")


def describe_layouts() -> str:
    """One block of lines for each name of `LAYOUTS`."""
    lines = []
    for name, layout in LAYOUTS.items():
        licence = layout.licence or "licence unknown"
        lines.append(f"{name}: {layout.holds or 'images of your own, or of any data set'}")
        lines.append(f"    files    {layout.files}")
        if layout.holds:
            lines.append(f"    licence  {licence}; {layout.address}")
        if name in REMOTES:
            lines.append(f"    pull     {_describe_remote(REMOTES[name])}")
        if layout.note:
            lines.append(f"    note     {layout.note}")
    return "\n".join(lines)


def _describe_remote(remote: Remote) -> str:
    count = len(remote.files)
    known = sum(bool(file.sha256 or file.md5) for file in remote.files)
    sums = f"{known} of {count} checksums known" if known else "no checksum known"
    checked = "checked" if remote.is_checked else "address and checksums not checked"
    limit = (
        "" if remote.is_free else "; the licence forbids commercial use: name it to pull the files"
    )
    return f"{count} file{'s' * (count > 1)}, {sums} ({checked}){limit}"
