"""The units of a batch: one plane of one file each, with the name of its results.

Mostly a file is one unit.  With the word `each` for `scene`, `time` or `z` every plane of a file along that
axis is one.  A batch keeps, resumes, divides and reports units.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from os.path import commonpath
from pathlib import Path, PurePosixPath
from typing import Any

from dinocell.batch.journal import JOURNAL_NAME, read_journal
from dinocell.batch.options import EACH, EACH_OPTIONS, SegmentOptions
from dinocell.errors import DINOCellError, UsageError
from dinocell.io import describe_image
from dinocell.io.channel_files import ChannelFiles
from dinocell.io.ome_zarr import fields_of_plate
from dinocell.io.planes import Selection, channel_positions, takes_all
from dinocell.io.plates import place_notes, places_of, unread_plate
from dinocell.io.s3 import S3Path, place_of
from dinocell.io.stacks import choose
from dinocell.pairs import is_zarr
from dinocell.segmentation.compartments import CellChoice

_DIGITS = 3  # of a place in a name, at least


@dataclass(frozen=True)
class Unit:
    """One plane to segment.

    Attributes
    ----------
    path : the file
    name : of its results, below the output folder, without an ending; may hold folders
    choice : options that replace those of the batch for this plane, such as `z`
    place : columns that every table of the plane gets, such as `z`
    files : channel → its file, where each channel of the image is a file of its own; `path` is the first
    error : why the planes of the file cannot be listed; then it fails with this sentence
    """

    path: Path
    name: str
    choice: Mapping[str, Any] = field(default_factory=dict)
    place: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def image(self) -> Path | ChannelFiles:
        """What is read: the file, or the files of the channels."""
        if not self.files:
            return self.path
        return ChannelFiles.of({name: place_of(path) for name, path in self.files.items()})

    def options(self, options: SegmentOptions) -> SegmentOptions:
        """The options of the batch, for this plane."""
        return replace(options, **self.choice)

    def described(self, sentence: str) -> str:
        """A sentence on this unit, which says the plane where the file has several units."""
        places = [f"{name} {self.choice[name]}" for name in EACH_OPTIONS if name in self.choice]
        return f"{', '.join(places)}: {sentence}" if places else sentence

    def to_text(self) -> str:
        """All but the file, as JSON."""
        values = {
            name: getattr(self, name) for name in ("name", "choice", "place", "files", "error")
        }
        return json.dumps({name: value for name, value in values.items() if value})

    @classmethod
    def of_text(cls, path: Path, text: str | None) -> "Unit":
        """What `to_text` has written; None (a plan of an earlier version) is the whole file."""
        return cls(path, **(json.loads(text) if text else {"name": path.stem}))


def units_of(inputs: Sequence[Path | Unit], options: SegmentOptions) -> list[Unit]:
    """The units of files; those given stay as they are.

    Results are named after the file, without its suffix.  Where files of several folders have the same
    name, all results mirror the folders, below the deepest one that holds all files; but see
    `named_as_before`.

    Of a plate with one file for each channel, one channel chooses the files; with several, and with nuclei and
    cells, the files of a field are one image; each field of a plate in
    OME-Zarr is a unit.

    Raises UsageError (two files of one folder have one name, or `plate` or the channel does not exist).
    """
    found = [one for one in inputs if isinstance(one, Unit)]
    files = []
    for one in inputs:
        if not isinstance(one, Unit):
            fields = list(_fields(one))
            files += [] if fields else [one]
            found += [unit for field in fields for unit in _planes(field, options)]
    places = dict(zip(files, places_of(files, options.plate), strict=True))
    chosen = _joined(places, options) or _of_channel(places, options)
    for unit, name in zip(chosen, _names([unit.path for unit in chosen]), strict=True):
        found += _planes(replace(unit, name=name), options)
    _refuse_same_names(found)
    return found


def _refuse_same_names(units: Sequence[Unit]) -> None:
    seen: dict[str, Path] = {}
    for unit in units:
        if unit.name in seen:
            raise UsageError(
                f"Inputs must differ in name without suffix, because outputs are named so, got {unit.path} "
                f"and {seen[unit.name]}: segment them into two folders"
            )
        seen[unit.name] = unit.path


def named_as_before(units: Sequence[Unit], out: Path) -> list[Unit]:
    """The units, each with the name that its result already has in a folder of results.

    Which folders a name holds depends on the other inputs of a call: `a` is `x/a` beside `y/a`.  With
    the new name `resume` would not find the result, and the summary would count the image twice.  The
    summary of the run before counts, too: `overwrite` takes images from the journal at its start, and if
    it is stopped, they are in the summary alone.

    Raises UsageError (an earlier name is also that of another unit).
    """
    journal = read_journal(out / JOURNAL_NAME)
    names = _names_by_source(journal)
    taken = {row["name"] for row in journal}
    summary = [row for row in _rows_of_summary(out) if row["name"] not in taken]
    names = _names_by_source(summary) | names
    if not names:
        return list(units)
    renamed = []
    for unit in units:
        known = names.get(_source_of(str(unit.path.resolve()), unit.name), [unit.name])
        renamed.append(unit if unit.name in known else replace(unit, name=known[-1]))
    _refuse_same_names(renamed)
    return renamed


def _source_of(file: str, name: str) -> tuple[str, str]:
    """What tells a unit from others, whatever folders its name holds."""
    return file, PurePosixPath(name).name


def _names_by_source(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        names.setdefault(_source_of(str(row.get("source")), row["name"]), []).append(row["name"])
    return names


def _rows_of_summary(out: Path) -> list[dict[str, str]]:
    """Rows of the images that were done; none where no summary can be read."""
    try:
        with (out / "summary.csv").open(encoding="utf-8", errors="replace", newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("name") and not row.get("error")]
    except (OSError, csv.Error):
        return []


def _fields(path: Path) -> Iterator[Unit]:
    """The fields of a plate in OME-Zarr, named after plate, well and site; none of other files."""
    place: Any = path
    try:
        if not (place.is_zarr() if isinstance(place, S3Path) else is_zarr(path)):
            return
        for image, where in fields_of_plate(path):
            yield Unit(image, f"{path.stem}_{where['well']}_s{where['site']}", {}, where)
    except (DINOCellError, KeyError, TypeError, AttributeError) as error:
        wrong = error if isinstance(error, DINOCellError) else "its list of wells is damaged"
        yield Unit(path, path.stem, error=f"'{path}' must be an image or a plate ({wrong})")
    except (OSError, ValueError):
        return  # who reads it says why it cannot be read


def _joined(places: Mapping[Path, Mapping[str, Any]], options: SegmentOptions) -> list[Unit]:
    """The fields of a plate with a file for each channel, where several channels are wanted; else none.

    A field without one of them has an error.  Raises UsageError (two files are one channel of one field, or
    a channel does not exist).
    """
    known, nuclei = _channels_of(places), options.nuclei
    wanted = list(options.channels or ())
    if nuclei is not None:
        wanted = [nuclei, *CellChoice.of(options.cells or "ring:1px").channels]
    elif len(known) < 2 or (len(wanted) < 2 and not takes_all(wanted)):
        return []
    if not known:
        return []
    whole = takes_all(wanted[nuclei is not None :])
    named = [channel for channel in wanted if not takes_all([channel])]
    positions = {channel_positions(len(known), known, [channel])[0]: None for channel in named}
    needed = known if whole else [known[position] for position in positions]
    fields: dict[tuple[Any, ...], dict[str, Path]] = {}
    units = []
    for path, place in places.items():
        if "channel" not in place:
            units.append(Unit(path, "", {}, place))
            continue
        key = tuple((name, value) for name, value in place.items() if name != "channel")
        files = fields.setdefault(key, {})
        if (channel := str(place["channel"])) in files:
            raise UsageError(
                f"Channels of a field must differ, got '{files[channel]}' and '{path}', which both are channel "
                f"{channel} of one place: let `plate` tell the two apart, or segment them one after the other"
            )
        files[channel] = path
    for key, files in fields.items():
        ordered = {channel: files[channel] for channel in needed if channel in files}
        lacking = [channel for channel in needed if channel not in files]
        path = next(iter((ordered or files).values()))
        error = (
            f"A field must have the channels {', '.join(needed)}, that of '{path}' lacks "
            f"{', '.join(lacking)}: copy or export it again"
        )
        texts = {channel: str(file) for channel, file in ordered.items()}
        units.append(Unit(path, "", {}, dict(key), texts, error if lacking else ""))
    return units


def _channels_of(places: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    return list(
        dict.fromkeys(str(place["channel"]) for place in places.values() if "channel" in place)
    )


def _of_channel(places: Mapping[Path, Mapping[str, Any]], options: SegmentOptions) -> list[Unit]:
    """The files of a batch; those of the wanted channel of a plate with a file for each."""
    known = _channels_of(places)
    wanted = [str(channel).casefold() for channel in options.channels or ()]
    found = [channel for channel in known if channel.casefold() in wanted]
    if not known or (len(known) == 1 and not found):
        return [Unit(path, "", {}, place) for path, place in places.items()]
    if len(wanted) != 1 or not found:
        given = ", ".join(map(str, options.channels or ())) or "none"
        raise UsageError(
            f"`channels` must name channels of a plate that has a file for each of {', '.join(sorted(known))}, "
            f"got {given}: choose one or several of them, or set `plate` to off"
        )
    return [
        Unit(path, "", {"channels": None}, place)
        for path, place in places.items()
        if place.get("channel", found[0]) == found[0]
    ]


def _names(files: Sequence[Path]) -> list[str]:
    if len({path.stem for path in files}) == len(files):
        return [path.stem for path in files]
    folders = [path.absolute().parent for path in files]
    try:
        top = commonpath(folders)
    except ValueError:  # some on S3, some here: their names must differ
        return [path.stem for path in files]
    return [
        (folder.relative_to(top) / path.stem).as_posix()
        for folder, path in zip(folders, files, strict=True)
    ]


def _planes(unit: Unit, options: SegmentOptions) -> Iterator[Unit]:
    """The planes of a file along the axes of which every place is wanted."""
    each = [name for name in EACH_OPTIONS if getattr(options, name) == EACH]
    if not each or unit.error:
        yield unit
        return
    options = unit.options(options)
    given: dict[str, Any] = {
        name: 0 if name in each else getattr(options, name) for name in EACH_OPTIONS
    }
    try:
        series = describe_image(unit.path).series
        scenes = range(len(series)) if "scene" in each else [options.scene]
        for scene in scenes:
            wanted = Selection(options.channels, **given | {"scene": scene})
            sizes = choose(unit.path, series, wanted).series.sizes
            counts = {"scene": len(series), "time": sizes.get("T", 1), "z": sizes.get("Z", 1)}
            along = [[scene] if name == "scene" else range(counts[name]) for name in each]
            for places in product(*along):
                chosen = dict(zip(each, places, strict=True))
                ending = "".join(
                    f"_{name[0]}{place:0{max(_DIGITS, len(str(counts[name] - 1)))}d}"
                    for name, place in chosen.items()
                    if counts[name] > 1
                )
                yield replace(
                    unit,
                    name=unit.name + ending,
                    choice={**unit.choice, **chosen},
                    place={**unit.place, **chosen},
                )
    except DINOCellError as error:
        yield replace(unit, error=str(error))


def plate_notes(units: Sequence[Unit], plate: str) -> list[str]:
    """What a careful user should know of the plates of a batch, see `dinocell.io.plates`; `plate` is the option."""
    if plate == "auto" and not any("well" in unit.place for unit in units):
        return list(filter(None, [unread_plate([unit.path for unit in units])]))
    if plate not in ("auto", "off") and not any(unit.place for unit in units):
        return [
            f"`plate` {plate!r} fits none of the images, such as {units[0].path.name}: no place is known, "
            "and there is no table of wells"
        ]
    return place_notes([dict(unit.place) for unit in units], [unit.name for unit in units])
