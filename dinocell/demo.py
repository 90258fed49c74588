"""`dinocell demo`: segment the bundled sample images and score the result against their truth."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import BatchResult, segment_files
from dinocell.errors import UsageError
from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.evaluation.report import EvaluationReport
from dinocell.io import read_labels
from dinocell.pipeline import DEFAULT_MODEL
from dinocell.progress import count_text
from dinocell.results.table import align_columns

_MARKER = ".dinocell_demo"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `scores` has AP@0.5 per sample that holds cells."""

    batch: BatchResult
    evaluation: EvaluationReport

    @property
    def scores(self) -> Mapping[str, float]:
        """AP@0.5 per image; images without any cell are left out."""
        return {
            image.name: image.scores()["ap50"]
            for image in self.evaluation.images
            if not image.is_empty
        }

    def text(self) -> str:
        """The lines that `dinocell demo` prints."""
        truth = {image.name: image.num_truth for image in self.evaluation.images}
        table = [("sample", "cells", "truth", "AP@0.5")]
        for row in self.batch.rows:
            name, score = row["name"], self.scores.get(row["name"])
            shown = f"{score:.2f}" if score is not None else "-"
            table.append((name, str(row["num_cells"]), str(truth[name]), shown))
        lines = align_columns(table)
        cells = sum(row["num_cells"] for row in self.batch.rows)
        out = self.batch.out
        lines += [
            "",
            f"{count_text(cells, 'cell')} found in {count_text(len(self.batch.rows), 'image')} in "
            f"{self.batch.seconds:.1f} s",
            f"page:         {out / 'report.html'}",
            f"labels:       {out}{os.sep}*_labels.tif",
            f"measurements: {out}{os.sep}*_cells.csv, {out / 'summary.csv'}",
            f"overlays:     {out}{os.sep}*_overlay.png",
        ]
        return "\n".join(lines)


def sample_paths() -> list[tuple[Path, Path]]:
    """List (image file, file of its true labels) of the bundled samples; their README names the sources.

    Raises FileNotFoundError if the installed package lacks them.
    """
    folder = Path(__file__).parent / "samples"
    labels = sorted((folder / "labels").glob("*.png"))
    pairs = [(image, path) for path in labels for image in folder.glob(f"{path.stem}.*")]
    if not pairs:
        raise FileNotFoundError(
            f"The sample images must lie in {folder}, got none: install the package again"
        )
    return pairs


def run_demo(
    out: str | os.PathLike[str] = "demo_out",
    *,
    model: str = DEFAULT_MODEL,
    device: str = "auto",
    shown: bool = True,
) -> DemoResult:
    """Segment the samples into `out` and score them.

    Results of an earlier demo are replaced, nothing else in its folder is touched; any other folder
    with files in it is refused.

    Raises UsageError (`out` is a file, or a folder that holds something else).
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"`out` must be a folder, got the file {out}: choose another name")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise UsageError(
            f"`out` must be a new folder or that of an earlier demo, got {out} with other files in it: "
            "choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    samples = sample_paths()
    batch = segment_files(
        [image for image, _ in samples],
        out,
        SegmentOptions(model=model, device=device, report=True, overwrite=True),
        shown=shown,
    )
    evaluation = evaluate_pairs(
        (image.stem, read_labels(labels), read_labels(out / f"{image.stem}_labels.tif"))
        for image, labels in samples
    )
    return DemoResult(batch=batch, evaluation=evaluation)
