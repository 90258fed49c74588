"""Results on S3: the files of each image are written here first, and uploaded when the image is finished.

A temporary folder stands for the one on S3.  An object that S3 has is an empty file in it, so that a batch finds
what is done; settings, journal and summary have their content.  So `resume`, and the refusal to replace results, work
as in a folder of this machine.  The journal is uploaded every few seconds and at the end: a process that is
killed repeats at most the images of the last seconds.
"""

import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from dinocell.batch.claims import CLAIM_NAME, Claimant, in_use
from dinocell.batch.folder import SETTINGS_NAME
from dinocell.batch.journal import JOURNAL_NAME
from dinocell.batch.options import SegmentOptions, check_call
from dinocell.batch.run import WHOLE_BATCH, BatchResult, segment_files
from dinocell.batch.units import Unit
from dinocell.batch.watcher import Watcher
from dinocell.errors import DINOCellError, UsageError
from dinocell.io.s3 import S3Error, S3Path, place_of
from dinocell.pipeline import DINOCellPipeline, LoadedImage
from dinocell.results.formats import EXPORT_FORMATS

_KEPT = (SETTINGS_NAME, JOURNAL_NAME, "summary.csv")
_OF_THE_BATCH = (*_KEPT, "wells.csv", "wells.parquet", "report.html")
_FOLDERS = tuple(one.suffix for one in EXPORT_FORMATS.values() if not one.media_type)
_JOURNAL_EVERY_S = 10.0


def segment_anywhere(
    paths: Sequence[Path | Unit],
    out: Path,
    options: SegmentOptions,
    *,
    claimant: Claimant = Claimant(),  # noqa: B008
    watcher: Watcher = Watcher(),  # noqa: B008
    **how: Any,
) -> BatchResult:
    """`segment_files`, whose folder of results may be an address on S3 (``s3://BUCKET/NAME``).

    An image whose results cannot be uploaded fails with a sentence; the others continue.

    Raises as `segment_files` does, and S3Error (S3 does not answer before the first image, or refuses).
    """
    place: Any = place_of(out)
    if not isinstance(place, S3Path):
        return segment_files(paths, out, options, claimant=claimant, watcher=watcher, **how)
    check_call(paths, options)
    with _claimed(place, claimant), tempfile.TemporaryDirectory(prefix="dinocell-s3-") as folder:
        here = Path(folder, "results")
        mirror = _Mirror(place, here, watcher)
        mirror.fetch(whole=options.report)
        try:
            result = segment_files(paths, here, options, watcher=mirror, **how)
        except BaseException as error:
            with contextlib.suppress(S3Error):
                mirror.upload_batch()
            if isinstance(error, DINOCellError):
                raise type(error)(str(error).replace(str(here), str(place))) from error
            raise
        failures = list(result.failures)
        try:
            mirror.upload_batch()
        except S3Error as error:  # what has failed before must still be listed
            failures.append((cast(Path, place), f"journal and summary: {error}"))
    return replace(result, out=cast(Path, place), failures=failures)


def refuse_s3(out: Path) -> None:
    """Refuse a folder on S3 for work that several processes share.

    Raises UsageError.
    """
    place: Any = place_of(out)
    if isinstance(place, S3Path):
        raise UsageError(
            f"`out` must be a folder that all processes share, got '{place}': write to such a folder and "
            "copy it to S3 afterwards (for example with `aws s3 sync`), or run one process"
        )


@contextlib.contextmanager
def _claimed(place: S3Path, claimant: Claimant) -> Iterator[None]:
    """Hold the claim of a folder on S3.

    Raises DINOCellError (another process holds it); S3Error.
    """
    path = place / CLAIM_NAME
    mine, other = claimant.claim(), _read_claim(path)
    if other and claimant.finds_running(other):
        raise in_use(place, other, WHOLE_BATCH)
    # A server that does not know the condition of `put` lets the last one win, so all read it again.
    path.put(json.dumps(mine).encode(), new=not other)
    if (owner := _read_claim(path)) != mine:
        raise in_use(place, owner, WHOLE_BATCH)
    try:
        yield
    finally:
        with contextlib.suppress(S3Error):
            if _read_claim(path) == mine:
                path.remove()


def _read_claim(path: S3Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Mirror(Watcher):
    """The folder on S3, and the one here that stands for it; tells another watcher what it hears."""

    def __init__(self, place: S3Path, here: Path, watcher: Watcher) -> None:
        self.place, self.here, self.watcher = place, here, watcher
        self.lock = threading.Lock()
        self.uploaded_s = float("-inf")

    def fetch(self, *, whole: bool) -> None:
        """Settings, journal and summary, and a file for every other object: empty, unless the `whole` is wanted."""
        self.here.mkdir()
        prefix = f"{self.place.key}/" if self.place.key else ""
        for one in self.place.objects():
            name = one["path"].removeprefix(prefix)
            folder, is_inside = _result_folder(name)
            if is_inside:
                (self.here / folder).mkdir(parents=True, exist_ok=True)
                continue
            path = self.here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = (self.place / name).read_bytes() if whole or name in _KEPT else b""
            if name != CLAIM_NAME:
                path.write_bytes(content)

    def loaded(self, image: LoadedImage) -> None:
        self.watcher.loaded(image)

    def progressed(self, done: int, total: int) -> None:
        self.watcher.progressed(done, total)

    def predicted(
        self, pipeline: DINOCellPipeline, image: LoadedImage, distance_map: NDArray
    ) -> None:
        self.watcher.predicted(pipeline, image, distance_map)

    def written(self, files: Iterable[Path]) -> None:
        """Upload the files of an image, and empty them here."""
        for path in files:
            target = self.place / path.relative_to(self.here).as_posix()
            if not path.is_dir():
                target.put(path)
                path.write_bytes(b"")
                continue
            target.remove()  # chunks of an earlier result
            inner = [file for file in path.rglob("*") if file.is_file()]
            for file in sorted(inner, key=lambda file: (file.parent == path, file)):
                (target / file.relative_to(path).as_posix()).put(
                    file
                )  # what describes it comes last
            shutil.rmtree(path)
            path.mkdir()
        with self.lock:
            if time.monotonic() - self.uploaded_s > _JOURNAL_EVERY_S:
                self.upload_batch()

    def upload_batch(self) -> None:
        """Upload the files of the whole batch, as far as they exist."""
        for name in _OF_THE_BATCH:
            path = self.here / name
            # Others that are empty stand for what S3 has; a journal is empty when `overwrite` begins.
            if path.is_file() and (name in _KEPT or path.stat().st_size):
                (self.place / name).put(path.read_bytes())
        self.uploaded_s = time.monotonic()


def _result_folder(name: str) -> tuple[str, bool]:
    """The folder that is one result, of a key below it, and whether there is one."""
    parts = name.split("/")
    for number, part in enumerate(parts[:-1], start=1):
        if part.endswith(_FOLDERS):
            return "/".join(parts[:number]), True
    return name, False
