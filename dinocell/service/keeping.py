"""What a job keeps beside the results of the batch, so that its labels can change without the network.

`dinocell.service.stored` lists the files.
"""

import json
from dataclasses import asdict
from pathlib import Path

from numpy.typing import NDArray

from dinocell.files import write_text_atomically
from dinocell.pipeline import DINOCellPipeline, Judgement, LoadedImage
from dinocell.service.channels import Original
from dinocell.service.history import write_array

RESULT, STEM = "result", "image"
"""Folder of what the batch writes, in the folder of a job, and how its files begin, as does the upload."""


def keep_prediction(
    folder: Path,
    pipeline: DINOCellPipeline,
    image: LoadedImage,
    distance_map: NDArray,
    original: Original | None = None,
) -> None:
    """Write what `StoredResult` needs into the folder of a job; OSError if the disk refuses.

    The channels of `original` can be shown.
    """
    keep_arrays(folder, plane=image.plane, channels=image.channels, map=distance_map)
    judged = pipeline.judge(image)
    judged = judged._replace(notes=(*image.warnings, *judged.notes))
    keep_about(folder, image, pipeline, judged, original)


def keep_arrays(folder: Path, **arrays: NDArray | None) -> None:
    """Write NAME.npy of each array."""
    for name, array in arrays.items():
        if array is not None:
            write_array(folder / f"{name}.npy", array)


def keep_about(
    folder: Path,
    image: LoadedImage,
    pipeline: DINOCellPipeline,
    judged: Judgement,
    original: Original | None,
) -> None:
    """Write `about.json`, with all notes on the image; the last file that a finished job needs."""
    about = {
        "pixel_size_um": image.pixel_size_um,
        "channel_names": list(image.channel_names),
        "channels": [] if original is None else original.channels(),
        "warnings": judged.notes,
        "unfamiliar": judged.unfamiliar,
        "kind": judged.kind,
        "rescale": image.rescale,
        "grown": image.around is not None,
        "target": pipeline.model.config.target,
        "min_score": pipeline.min_score,
        **asdict(judged.thresholds),
    }
    write_text_atomically(folder / "about.json", json.dumps(about, indent=1))
