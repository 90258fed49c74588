"""The channels of the file of an image, which the page shows in colours beside the gray plane.

Their names and colours are noted when the image is read; their pixels are read when somebody looks at
them, and kept in the folder of the job as `channel_N.npy` (H, W).

A service decodes no upload itself.  It starts `python -m dinocell.service.channels`, which a damaged file
may end, or fill with pixels, without harm to the service.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DINOCellError
from dinocell.files import temporary_folder
from dinocell.io import describe_image, read_image
from dinocell.io.channel_files import ChannelFiles
from dinocell.io.planes import PlaneChoice, Selection, channel_of, channel_positions
from dinocell.io.s3 import keep_copies_in, place_of
from dinocell.io.stacks import choose
from dinocell.service.history import write_array

_MOST_SHOWN = 4  # channels at first: where more overlap, colours are hard to distinguish
_LONGEST_S = 120.0
_USUAL = ("#0000ff", "#00ff00", "#ff0000", "#ff00ff", "#00ffff", "#ffff00")
_GRAY = "#ffffff"
_TRANSMITTED = r"bright ?field|\bbf\b|phase|\bdic\b|transmi|\btrans\b|\bgr[ae]y"
_COLOUR_OF_NAME = {
    _TRANSMITTED: _GRAY,
    r"dapi|hoechst|\bdna\b|nucle|bfp\b|\b405\b|\bblue\b": "#0000ff",
    r"gfp\b|fitc|\b488\b|\bgreen\b": "#00ff00",
    r"rfp\b|cherry|tomato|tritc|texas|\bcy3\b|\b5(55|61|68|94)\b|\bred\b": "#ff0000",
    r"\bcy5\b|far red|\b6(40|47)\b|magenta": "#ff00ff",
    r"cfp\b|cyan": "#00ffff",
    r"yfp\b|yellow": "#ffff00",
}
"""What the name of a channel says of its usual colour; the first that fits counts."""


@dataclass(frozen=True)
class Original:
    """The file of an image, and which plane of it was segmented.

    Attributes
    ----------
    image : the file, or one file for each channel
    choice : as for `read_image`; its `channels` are those that were segmented
    """

    image: Path | ChannelFiles
    choice: Mapping[str, Any]

    @classmethod
    def of(cls, image: Path | ChannelFiles, options: Mapping[str, Any]) -> "Original":
        """`options` has fields of `SegmentOptions`."""
        names = (*PlaneChoice.__annotations__, "max_pixels")
        choice = {name: options[name] for name in names if options.get(name) is not None}
        if options.get("nuclei") is not None:
            choice["channels"] = [channel_of(str(options["nuclei"]))]
        return cls(image, choice)

    def channels(self) -> list[dict[str, Any]]:
        """Name, colour (#rrggbb) and whether it is `shown` at first, of each channel; empty for one.

        A channel without a name has its position.  Shown are those that were segmented, then others up to
        four, without transmitted light.

        Raises UsageError and ImageFileError as `read_image` does.
        """
        names, given, segmented = self._described()
        if len(names) < 2:
            return []
        colours = colours_of(names, given)
        others = [p for p, name in enumerate(names) if not _says(_TRANSMITTED, name)]
        shown = [*dict.fromkeys((*segmented, *others))][:_MOST_SHOWN]
        return [
            {"name": name, "colour": colour, "shown": place in shown}
            for place, (name, colour) in enumerate(zip(names, colours, strict=True))
        ]

    def _described(self) -> tuple[Sequence[str], Sequence[str] | None, Sequence[int]]:
        """Names of the channels, their colours in the file, and which of them were segmented."""
        chosen = self.choice.get("channels")
        if isinstance(self.image, ChannelFiles):
            names = [name for name, _ in self.image.files]
            segmented = channel_positions(len(names), names, chosen) if chosen else ()
            return names, None, segmented
        series = describe_image(self.image).series
        choice = choose(self.image, series, Selection(**self.choice))
        one, known = choice.series, choice.series.channel_names
        count = one.sizes.get("C", 1)
        if "S" in one.axes:  # opacity is no channel, and three equal colours are one
            picture = read_image(self.image, **{**self.choice, "channels": None})
            known = picture.channel_names
            count = picture.pixels.shape[2] if picture.pixels.ndim == 3 else 1
        return (
            known or [str(position) for position in range(count)],
            one.channel_colours,
            choice.positions or (),
        )

    def read(self, names: Sequence[str], position: int) -> NDArray[Any]:
        """(H, W) pixels of a channel; `names` are those of all.

        Raises UsageError and ImageFileError as `read_image` does.
        """
        planes = {name: value for name, value in self.choice.items() if name != "channels"}
        if isinstance(self.image, ChannelFiles):
            return read_image(self.image.paths[position], **planes).pixels
        name = names[position]
        same = [one for one in names if one.casefold() == name.casefold()]
        channel = name if len(same) == 1 else position
        return read_image(self.image, channels=[channel], **planes).pixels


def colours_of(names: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """A colour (#rrggbb) for each channel.

    Those of the file (`given`), unless they are all the same or one is black; else what the names say; else
    blue, green, red, magenta, cyan and yellow, as far as they are free.
    """
    if given and len(set(given)) > 1 and "#000000" not in given:
        return list(given)
    by_name = [
        next((colour for words, colour in _COLOUR_OF_NAME.items() if _says(words, name)), None)
        for name in names
    ]
    free = [colour for colour in _USUAL if colour not in by_name] or list(_USUAL)
    rest = [place for place, colour in enumerate(by_name) if colour is None]
    by_order = {place: free[turn % len(free)] for turn, place in enumerate(rest)}
    return [colour or by_order[place] for place, colour in enumerate(by_name)]


def _says(words: str, name: str) -> bool:
    return re.search(words, re.sub(r"[\W_]+", " ", name.casefold())) is not None


def channel_path(folder: Path, position: int) -> Path:
    """Where the pixels of a channel are kept."""
    return folder / f"channel_{position}.npy"


def keep_channels(
    folder: Path, original: Original, names: Sequence[str], positions: Sequence[int]
) -> None:
    """Read channels and write them into the folder of a job.

    Raises DINOCellError (the file cannot be read, or has another size than it had); OSError (the disk
    refuses, or the folder is gone).
    """
    shape = np.load(folder / "plane.npy", mmap_mode="r").shape
    for position in positions:
        pixels = original.read(names, position)
        if pixels.shape != shape:
            raise DINOCellError(
                f"The channel {names[position]} must have the size of the plane that was segmented {shape}, "
                f"got {pixels.shape}: segment the image again"
            )
        write_array(channel_path(folder, position), pixels)


def keep_channels_apart(
    folder: Path, original: Original, names: Sequence[str], positions: Sequence[int]
) -> None:
    """`keep_channels` in a process of its own; `original` is one file.

    Raises as `keep_channels`; DINOCellError (the process has died, or takes too long).
    """
    request = {
        "folder": str(folder),
        "image": str(original.image),
        "choice": original.choice,
        "names": names,
        "positions": positions,
    }
    try:
        with temporary_folder(folder) as copies:
            ended = subprocess.run(
                [sys.executable, "-m", "dinocell.service.channels"],
                input=json.dumps(request | {"copies": str(copies)}),
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                timeout=_LONGEST_S,
                start_new_session=True,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise DINOCellError(
            f"Channels must be read within {_LONGEST_S:g} s, and these take longer: crop the image"
        ) from error
    if ended.returncode < 0 or not ended.stdout:
        raise DINOCellError(
            f"The channels cannot be read, because the process that does it ended with code {ended.returncode}: "
            "the image may need too much memory; crop it"
        )
    answer = json.loads(ended.stdout.splitlines()[-1])  # libraries may print before it
    if answer.get("errno") is not None:
        raise OSError(answer["errno"], answer["error"])
    if "error" in answer:
        sentence = answer["error"].replace(str(original.image), Path(str(original.image)).name)
        raise DINOCellError(sentence.replace(str(folder), "").replace("'/", "'"))


def _main() -> None:
    given = json.loads(sys.stdin.read())
    original = Original(place_of(given["image"]), given["choice"])
    answer: dict[str, Any] = {}
    keep_copies_in(Path(given["copies"]))
    try:
        keep_channels(Path(given["folder"]), original, given["names"], given["positions"])
    except (DINOCellError, OSError) as error:
        answer = {"error": str(error), "errno": getattr(error, "errno", None)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
