"""Fields of an index that `dinocell jump index` made: open them, and check a sample of them."""

import contextlib
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.errors import DINOCellError, UsageError
from dinocell.progress import progress

if TYPE_CHECKING:
    from dinov3.data.datasets.jump_s3 import JUMPS3Dataset, StreamOptions

THREADS = 4
"""Fields that are read at once."""


@contextlib.contextmanager
def streaming_errors() -> Iterator[None]:
    """Errors of `dinov3.cells.streaming` as UsageError, those of a store as DINOCellError."""
    from dinov3.cells.streaming.store_options import StoreError

    try:
        yield
    except DINOCellError:
        raise
    except StoreError as error:
        raise DINOCellError(str(error)) from error
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise UsageError(str(error)) from error


def fields_of_index(
    index: str | Path, store: "StreamOptions | None", *, channels: str | None, split: str
) -> "JUMPS3Dataset":
    """Fields of an index, each once and in the order of the index.

    Parameters
    ----------
    store : how the store is read; by default the index names the store, without signed requests
    channels : names joined by +; by default those that most fields have
    split : ALL, TRAIN or VAL
    """
    from dinov3.data.datasets.jump_s3 import JUMPS3Dataset, StreamOptions

    with streaming_errors():
        place = str(index)
        dataset = JUMPS3Dataset(index=place, split=split, channels=channels, visits=1, spread=1)
        options = store or StreamOptions()
        options.of_store(dataset.index.store)  # a wrong option is refused before the first request
        dataset.set_options(options)
    return dataset


def try_field(dataset: "JUMPS3Dataset", number: int) -> tuple[Any, Any, str]:
    """Record and field of a number, and "", or record, None, and why the field cannot be used."""
    record = dataset.record(number)
    try:
        return record, dataset.read_field(number), ""
    except dataset.LOSSES as error:
        return record, None, str(error).strip().split("\n")[0]


@dataclass(frozen=True)
class VerifyReport:
    """Result of a check."""

    checked: int  # fields that were read
    bad: dict[str, str]  # name of a field → why it cannot be used
    megabytes: float  # that were read
    incomplete: int = 0  # fields that lack a channel that most fields have; they were not read

    def text(self) -> str:
        """One line, and one for each bad field."""
        head = f"{self.checked} fields read ({self.megabytes:.1f} MB), {len(self.bad)} bad"
        if self.incomplete:
            head += f"; {self.incomplete} more of the index lack a channel that most have: not read"
        return "\n".join([head, *(f"bad: {name}: {why}" for name, why in self.bad.items())])

    def json_text(self) -> str:
        return json.dumps(asdict(self))


def verify_index(
    index: str | Path, *, fields: int = 32, store: "StreamOptions | None" = None, seed: int = 0
) -> VerifyReport:
    """Read a random sample of fields and check length, image format, size and contrast.

    Parameters
    ----------
    fields : size of the sample; all fields if the index has fewer
    store : as `fields_of_index`
    seed : random seed of the sample
    """
    if fields < 1:
        raise UsageError(f"`fields` must be at least 1, got {fields}: give a larger number")
    dataset = fields_of_index(index, store, channels=None, split="ALL")
    total = len(dataset.rows)
    chosen = sorted(random.Random(seed).sample(range(total), min(fields, total)))
    bad: dict[str, str] = {}
    shown = progress("fields", len(chosen))
    with streaming_errors(), ThreadPoolExecutor(THREADS) as pool, shown as bar:
        for record, reason in pool.map(lambda number: try_field(dataset, number)[::2], chosen):
            if reason:
                bad[record.name] = reason
            bar.advance(note=record.name)
    return VerifyReport(len(chosen), bad, dataset.megabytes_read(), dataset.left_out)
