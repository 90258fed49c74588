"""Plates: what the names of image files say of well, site, channel, z and time.

Microscopes for plates write one file for each plane and put its place into the name.  Numbers stay as the
names have them (most count from 1).
"""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinocell.errors import UsageError

PLACE_NAMES = ("plate", "well", "site", "channel", "z", "time")
"""Columns of a place, in their order."""

_WELL = r"(?P<well>[A-Z]{1,2}\d{1,2})"
LAYOUTS: dict[str, str] = {
    "operetta": r"(?:(?P<plate>[^/]+)/)?(?:Images/)?r(?P<row>\d+)c(?P<column>\d+)f(?P<site>\d+)p(?P<z>\d+)"
    r"-ch(?P<channel>\d+)(?:sk(?P<time>\d+))?(?:fk\d+)?(?:fl\d+)?\.[^/]+$",
    "cellvoyager": rf"(?:(?P<plate>[^/]+)_)?{_WELL}_T(?P<time>\d+)F(?P<site>\d+)L\d+A\d+Z(?P<z>\d+)"
    r"C(?P<channel>\d+)\.[^/]+$",
    "imagexpress": r"(?:TimePoint_(?P<time>\d+)/)?(?:ZStep_(?P<z>\d+)/)?(?P<plate>[^/]+)_"
    rf"{_WELL}(?:_s(?P<site>\d+))?_w(?P<channel>\d(?:_thumb)?)(?:[0-9A-F]{{8}}-[0-9A-F-]{{27}})?\.[^/]+$",
    "incucyte": rf"(?P<plate>[^/]+)_{_WELL}_(?P<site>\d+)_(?P<time>\d+y\d+m\d+d_\d+h\d+m|\d+d\d+h\d+m)\.[^/]+$",
    "opera": r"(?:(?P<plate>[^/]+)/)?(?P<row>\d{3})(?P<column>\d{3})(?P<site>\d{3})\.[^/]+$",
}
"""Names of files by the software that writes them: Harmony (Operetta, Opera Phenix), CellVoyager,
MetaXpress (ImageXpress), Incucyte, and the first Opera."""

_AUTO = ("operetta", "cellvoyager", "imagexpress", "incucyte")  # `opera` might be any nine digits
_WHOLE = ("site", "z", "time")
_GROUPS = (*PLACE_NAMES, "row", "column")

Place = dict[str, Any]


def places_of(paths: Sequence[Path], plate: str = "auto") -> list[Place]:
    """Place of each file: some of `PLACE_NAMES`, empty where its name says nothing.

    Parameters
    ----------
    plate : `auto` (the layout of `LAYOUTS` that fits the names of all files, if one does), `off`, the name
        of a layout, a regular expression with named groups (`PLACE_NAMES`, or row and column in place of
        the well) that is searched in the path, or a CSV file with the column `image` (a name or the end of
        a path) and some of `PLACE_NAMES`

    Wells are a letter and two digits (`C03`), numbers are numbers; a channel has the name that Harmony's
    `Index.idx.xml` gives it, where it lies beside the images.

    Raises UsageError (`plate` is none of these, or the CSV file cannot be used).
    """
    if plate == "off" or not paths:
        return [{} for _ in paths]
    if plate == "auto":
        for layout in _AUTO:
            found = [_matched(re.compile(LAYOUTS[layout]), path) for path in paths]
            if all(found):
                return _named_channels(found, paths) if layout == "operetta" else found
        return [{} for _ in paths]
    if plate in LAYOUTS:
        found = [_matched(re.compile(LAYOUTS[plate]), path) for path in paths]
        return _named_channels(found, paths) if plate == "operetta" else found
    if plate.lower().endswith(".csv"):
        listed = _listed(Path(plate))
        return [listed(path) for path in paths]
    return [_matched(_compiled(plate), path) for path in paths]


def unread_plate(paths: Sequence[Path]) -> str:
    """A sentence where names of a plate with a file for each channel lie among others; else empty.

    `auto` reads no place from such names, because not all of them fit.
    """
    paths = list(dict.fromkeys(paths))  # a file may give several planes
    for layout in _AUTO:
        found = {path: _matched(re.compile(LAYOUTS[layout]), path) for path in paths}
        channels: dict[Any, set[str]] = {}
        for place in filter(None, found.values()):
            field = tuple((name, value) for name, value in place.items() if name != "channel")
            channels.setdefault(field, set()).add(place.get("channel", ""))
        most = max(channels.values(), key=len, default=set())
        others = [path for path, place in found.items() if not place]
        if len(most) > 1 and others:
            return (
                f"{len(paths) - len(others)} of {len(paths)} names are those of {layout}, with a file for each "
                f"of the channels {', '.join(sorted(most))}, and each file was segmented alone, because others "
                f"such as {others[0].name} do not fit: set `plate` to {layout} and name `channels`"
            )
    return ""


def _compiled(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UsageError(
            f"`plate` must be a regular expression, got {text!r} ({error}): correct it"
        ) from error
    groups = set(pattern.groupindex)
    if not groups or groups - set(_GROUPS):
        wrong = ", ".join(sorted(groups - set(_GROUPS))) or "none"
        raise UsageError(
            f"`plate` must be auto, off, {', '.join(LAYOUTS)}, a CSV file, or a regular expression with groups "
            f"of the names {', '.join(_GROUPS)}, got the groups {wrong} in {text!r}: write for example "
            r"(?P<well>[A-H]\d\d)_s(?P<site>\d)"
        )
    return pattern


def _matched(pattern: re.Pattern[str], path: Path) -> Place:
    match = pattern.search(path.absolute().as_posix())
    return {} if match is None else _place(match.groupdict())


def _place(values: Mapping[str, str | None]) -> Place:
    known = {name: value.strip() for name, value in values.items() if value and value.strip()}
    if "row" in known and "column" in known:
        row = known["row"]
        letters = row_letters(int(row)) if row.isdecimal() else row
        known["well"] = f"{letters}{known['column']}"
    place: Place = {}
    for name in PLACE_NAMES:
        value = known.get(name)
        if value is None:
            continue
        if name == "well" and (parts := re.fullmatch(r"([A-Za-z]{1,2})0*(\d+)", value)):
            place[name] = f"{parts[1].upper()}{int(parts[2]):02d}"
        elif value.isdecimal() and name != "plate":
            place[name] = int(value) if name in _WHOLE else str(int(value))
        else:
            place[name] = value
    return place


def row_letters(row: int) -> str:
    """Letters of a row of a plate, counted from 1: A to Z, AA to AF."""
    return chr(64 + row) if row <= 26 else chr(64 + (row - 1) // 26) + chr(65 + (row - 1) % 26)


def _named_channels(found: list[Place], paths: Sequence[Path]) -> list[Place]:
    names = {folder: _channel_names(folder) for folder in {path.parent for path in paths}}
    for place, path in zip(found, paths, strict=True):
        if place:
            place["channel"] = names[path.parent].get(place["channel"], place["channel"])
    return found


def _channel_names(folder: Path) -> dict[str, str]:
    """Number → name of the channels, from the start of Harmony's index; empty where it has none."""
    for name in ("Index.idx.xml", "Index.xml"):
        try:
            with (folder / name).open(encoding="utf-8", errors="replace") as file:
                text = file.read(2**24)
        except OSError:
            continue
        pairs = re.findall(r"Channel: (\d+), ChannelName: ([^,}]+)", text)
        pairs += re.findall(
            r"<ChannelID>(\d+)</ChannelID>(?:(?!</?Image\b).)*?<ChannelName>([^<]+)<", text, re.S
        )
        return {number: name.strip() for number, name in pairs}
    return {}


def _listed(file: Path) -> Callable[[Path], Place]:
    """What finds the place of a path in a CSV file."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UsageError(
            f"`plate` must be a CSV file that can be read, got '{file}' ({error}): check it"
        ) from error
    columns = set(rows[0]) if rows else set()
    if "image" not in columns or not columns & set(_GROUPS):
        raise UsageError(
            f"`plate` must be a CSV file with the column image and some of {', '.join(_GROUPS)}, got the "
            f"columns {', '.join(map(str, columns)) or 'none'} in '{file}': name the columns so"
        )
    by_name: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_name.setdefault(Path(row["image"] or "").name, []).append(row)

    def place(path: Path) -> Place:
        whole = "/" + path.absolute().as_posix().lstrip("/")
        fitting = [
            row
            for row in by_name.get(path.name, ())
            if whole.endswith("/" + Path(row["image"]).as_posix().lstrip("./"))
        ]
        if len(fitting) > 1:
            raise UsageError(
                f"`plate` must list each image once, got {len(fitting)} lines for '{path}' in '{file}': remove "
                "the others, or give more of the path"
            )
        return _place({name: fitting[0].get(name) for name in _GROUPS}) if fitting else {}

    return place


def place_notes(places: Sequence[Place], names: Sequence[str]) -> list[str]:
    """Sentences on wells that are named twice, on holes, and on images without a well."""
    wells = [(place.get("plate"), place["well"]) for place in places if "well" in place]
    if not wells:
        return []
    notes = []
    first: dict[tuple[Any, ...], str] = {}
    for place, name in zip(places, names, strict=True):
        if "well" not in place:
            continue
        key = tuple(place.items())
        if key in first:
            described = ", ".join(f"{k} {v}" for k, v in place.items())
            notes.append(
                f"Two images have the same place ({described}), {first[key]} and {name}: both count"
            )
        first.setdefault(key, name)
    without = [name for place, name in zip(places, names, strict=True) if "well" not in place]
    if without:
        notes.append(
            f"No well is known for {len(without)} of {len(places)} images, such as {without[0]}"
        )
    notes += _holes(places)
    return notes


def _holes(places: Sequence[Place]) -> list[str]:
    """Sites that some wells of a plate have and others lack."""
    sites: dict[Any, dict[str, set[Any]]] = {}
    for place in places:
        if "well" in place and "site" in place:
            sites.setdefault(place.get("plate"), {}).setdefault(place["well"], set()).add(
                place["site"]
            )
    notes = []
    for plate, wells in sites.items():
        every = set().union(*wells.values())
        lacking = {well: every - there for well, there in sorted(wells.items()) if every - there}
        if lacking:
            shown = "; ".join(
                f"{well} without site {', '.join(map(str, sorted(gone)[:5]))}{', ...' * (len(gone) > 5)}"
                for well, gone in list(lacking.items())[:5]
            )
            more = "; ..." if len(lacking) > 5 else ""
            named = f"Plate {plate}" if plate else "The plate"
            notes.append(
                f"{named} has holes in {len(lacking)} of {len(wells)} wells: {shown}{more}"
            )
    return notes
