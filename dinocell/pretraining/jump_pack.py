"""Fields of an index copied to local files: shards to train on, and labelled images to evaluate on."""

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.errors import DataSetError, DINOCellError, UsageError
from dinocell.files import atomic_folder
from dinocell.pretraining.jump_fields import THREADS, fields_of_index, streaming_errors, try_field
from dinocell.progress import progress

if TYPE_CHECKING:
    from dinov3.cells.streaming.shards import PackOptions
    from dinov3.data.datasets.jump_s3 import JUMPS3Dataset, StreamOptions

_LabelledField = tuple[str, str, Any, Any]


def pack_index(
    index: str | Path,
    out: str | Path,
    options: "PackOptions | None" = None,
    *,
    store: "StreamOptions | None" = None,
    channels: str | None = None,
    split: str = "ALL",
    limit: int | None = None,
    max_lost_share: float = 0.02,
) -> str:
    """Copy fields of an index into local shards, which train like the index itself.

    Parameters
    ----------
    out : folder that does not exist
    options : how the shards store a field: bits, crop, scale, fields per file, compression
    store, channels, split
        As `fields_of_index`.
    limit : copy at most the first `limit` fields
    max_lost_share : unreadable fields are left out and listed; above this share the copy fails

    Returns what was written, and which fields were left out.

    Raises UsageError, DINOCellError, DataSetError (an option is wrong, or `out` exists; the store
    does not answer; too many fields are unreadable).
    """
    from dinov3.cells.streaming import shards

    if split not in ("ALL", "TRAIN", "VAL"):
        raise UsageError(f"`split` must be ALL, TRAIN or VAL, got {split!r}: choose one of these")
    dataset = fields_of_index(index, store, channels=channels, split=split)
    total = len(dataset.rows) if limit is None else min(limit, len(dataset.rows))
    lost: dict[str, str] = {}
    fields = _readable_fields(dataset, total, lost, max_lost_share)
    options = options or shards.PackOptions()
    with streaming_errors(), progress("fields", total) as bar:
        count = shards.pack_fields(fields, out, options, lambda name: bar.advance(note=name))
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file()) / 1e6
    lines = [f"{out}: {count} fields, {size:.1f} MB; train with index={Path(out) / 'fields.arrow'}"]
    if dataset.left_out:
        names = ", ".join(dataset.channels)
        lines += [
            f"left out: {dataset.left_out} fields without {names}; name others with `channels`"
        ]
    return "\n".join([*lines, *(f"left out: {name}: {why}" for name, why in lost.items())])


def _readable_fields(
    dataset: "JUMPS3Dataset", total: int, lost: dict[str, str], max_lost_share: float
) -> Iterator[tuple[Any, Any]]:
    """(record, field) of the first `total` fields; those that cannot be read are noted in `lost`."""
    with ThreadPoolExecutor(THREADS) as pool:
        # A few at a time, because fields that wait to be written fill the memory.
        for begin in range(0, total, 4 * THREADS):
            numbers = range(begin, min(begin + 4 * THREADS, total))
            for record, made, reason in pool.map(partial(try_field, dataset), numbers):
                if made is not None:
                    yield record, made
                    continue
                lost[record.name] = reason
                if len(lost) > max(max_lost_share * total, 0):
                    raise DataSetError(
                        f"At most {max_lost_share:.1%} of {total} fields may be unreadable, got "
                        f"{len(lost)} (last: {reason}): repair the store, or raise `max_lost_share`"
                    )


def export_masks(
    index: str | Path,
    out: str | Path,
    *,
    store: "StreamOptions | None" = None,
    kind: str = "nuclei",
    channel: str = "DNA",
    fields: int = 48,
    masks: str | None = None,
    seed: int = 0,
) -> str:
    """Write fields and the labels that the gallery has for them as a data set for `ssl_evaluation`.

    Cellpose made these labels for JUMP-Lite.  They are pseudo-truth: good enough to follow a
    pretraining with (`ssl_evaluation.data`), not to report.  Sites of cpg0016 have the same names
    everywhere, so that an index of the original images works too.  Returns what was written.

    Parameters
    ----------
    out : folder that does not exist; it gets `train` and `val`, each with `images` and `labels`.  A
        third of the plates goes to `val`; of a single plate, a third of the fields.
    store : as `fields_of_index`
    kind : nuclei or cell
    channel : channel that the images show
    fields : number of labelled fields; fields without labels are passed over
    masks : folder of the label arrays in the store, with `{kind}` for nuclei or cell
    seed : random seed of the choice of fields

    Raises UsageError, DINOCellError (an option is wrong, or `out` exists; fewer than two fields
    have labels, no store answers).
    """
    from dinov3.cells.streaming.discovery import JUMP_LITE

    out = Path(out)
    if kind not in ("nuclei", "cell"):
        raise UsageError(f"`kind` must be nuclei or cell, got {kind!r}: choose one of these")
    if fields < 2:
        raise UsageError(f"`fields` must be at least 2, got {fields}: give a larger number")
    if out.exists():
        raise UsageError(f"OUT must not exist, got {out}: name another folder, or remove it")
    dataset = fields_of_index(index, store, channels=channel, split="ALL")
    folder = (masks or JUMP_LITE["masks"]).format(kind=kind)
    numbers = list(range(len(dataset.rows)))
    random.Random(seed).shuffle(numbers)
    with streaming_errors():
        found, without = _labelled_fields(dataset, folder, numbers, fields)
    if len(found) < 2:
        raise DINOCellError(
            f"At least 2 fields must have {kind} labels in {folder}, got {len(found)} of "
            f"{len(found) + without}: use an index of JUMP-Lite or cpg0016"
        )
    with atomic_folder(out) as temporary:
        sides = _write_masks(temporary, found)
    return (
        f"{out}: {sides['train']} + {sides['val']} fields with {kind} labels (Cellpose's: "
        f"pseudo-truth), {without} without; train with ssl_evaluation.data={out}"
    )


def _labelled_fields(
    dataset: "JUMPS3Dataset", folder: str, numbers: list[int], count: int
) -> tuple[list[_LabelledField], int]:
    """(plate, site, image, labels) of the first `count` that have labels; how many before have none.

    Gives up after 20 · `count` fields without any labels.
    """
    found: list[_LabelledField] = []
    without = 0
    with progress("fields", min(count, len(numbers))) as bar:
        for number in numbers:
            if len(found) == count or (without > 20 * count and not found):
                break
            record = dataset.record(number)
            site = "__".join((*record.plate.split("/")[1:], record.well, record.site))
            image: Any = None
            with contextlib.suppress(*dataset.LOSSES):
                labels = dataset.read_array(f"{folder}/{site}")[0]
                image = dataset.read_field(number).planes[0]
            if image is None or labels.shape != image.shape:
                without += 1
                continue
            found.append((record.plate, site, image, labels))
            bar.advance(note=site)
    return found, without


def _write_masks(folder: Path, found: list[_LabelledField]) -> Counter[str]:
    """Write the fields of every third plate for validation, the others for training."""
    import tifffile

    plates = sorted({plate for plate, *_ in found})
    third = set(plates[::3]) if len(plates) > 1 else set()
    sides: Counter[str] = Counter()
    for place, (plate, site, image, labels) in enumerate(found):
        val = plate in third if third else place % 3 == 0
        side = folder / ("val" if val else "train")
        for name, array in (("images", image), ("labels", labels)):
            (side / name).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(side / name / f"{site}.tif", array, compression="deflate")
        sides[side.name] += 1
    return sides
