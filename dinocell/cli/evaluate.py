"""`dinocell evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.cli.options import App, Device, channel_choice, option
from dinocell.errors import UsageError

if TYPE_CHECKING:
    from dinocell.evaluation.report import EvaluationReport

app = App()


@dataclass(frozen=True)
class Inputs:
    """What is compared: label images with the truth, or a model's with that of its data."""

    pred: Path | None = option("Score the label images in this folder, against --truth.")
    truth: Path | None = option("Read the true label images from this folder.")
    model: str | None = option(
        "Run this model (a file or a bundled name) on --data and score its result.",
        names="--model -m",
    )
    data: Path | None = option(
        "Run --model on this folder, which has the subfolders images and labels."
    )
    channels: str | None = option(
        "Use this channel of multi-channel images, by name or by index from 0. Several, separated by "
        "commas, are averaged."
    )
    page: int | None = option("Use this plane of image stacks, counted from 0.", min=0)
    precision: str = option("Run --model in fp32, bf16, or auto, as in `segment`.", "auto")


@dataclass(frozen=True)
class Scoring:
    """How label images are compared."""

    iou_thresholds: list[float] | None = option(
        "Compute AP, F1 and PQ at this IoU threshold (above 0, at most 1). Repeat the option for several "
        "thresholds.  [default: 0.5, 0.75, 0.9]",
        names="--iou",
    )
    boundary_tolerance_px: float = option(
        "Count boundaries as equal up to this distance in px in the boundary F score.", 2.0, min=0
    )

    def settings(self) -> dict[str, Any]:
        """The options as arguments of `evaluate_folders` and `evaluate_model`."""
        from dinocell.evaluation.scores import DEFAULT_IOU_THRESHOLDS

        return {
            "iou_thresholds": tuple(self.iou_thresholds or DEFAULT_IOU_THRESHOLDS),
            "boundary_tolerance_px": self.boundary_tolerance_px,
        }


@dataclass(frozen=True)
class Tuning:
    """The search for thresholds of a model."""

    tune: bool = option("Search the best thresholds of --model on --data first.", False)
    metric: str = option(
        "Maximise this score with --tune: ap (mean over the IoU thresholds), apNN such as ap50, seg, det "
        "or op_csb.",
        "ap",
    )
    save_to: Path | None = option(
        "Write a model file with the thresholds that --tune found.", names="--save-model"
    )


@app.command()
def evaluate(
    inputs: Inputs,
    scoring: Scoring,
    tuning: Tuning,
    out: Path | None = option("Write the scores to this file (.csv or .json).", names="--out -o"),
    allow_missing_predictions: bool = option(
        "Score an image without prediction as one without cells.", False, "--allow-missing"
    ),
    device: Device = "auto",
    per_image: bool = option(
        "Print a row for each image, too.", False, "--per-image/--no-per-image"
    ),
) -> None:
    """Compare label images with the truth: SEG, DET, OP_CSB, AP, PQ, F1, AJI and boundary F.

    Every score is printed twice: pooled over the cells of all images, and as the mean over images.

    `--tune` runs the network once on each image and then searches the thresholds. Use validation
    images for it, never the test set.

    Example: `dinocell evaluate --pred out --truth data/test/labels`
    """
    check_evaluation(vars(inputs) | vars(scoring) | vars(tuning) | {"out": out})
    scores: EvaluationReport
    if inputs.pred is not None and inputs.truth is not None:
        from dinocell.evaluation.evaluate import evaluate_folders

        how = scoring.settings() | {"allow_missing_predictions": allow_missing_predictions}
        scores = evaluate_folders(inputs.pred, inputs.truth, **how)
    elif inputs.model is not None and inputs.data is not None:
        from dinocell.evaluation.model_evaluation import Reading, evaluate_model

        channels = channel_choice(inputs.channels)
        reading = Reading(device, inputs.precision, channels, inputs.page)
        tune_metric = tuning.metric if tuning.tune else None
        how = scoring.settings() | {"tune_metric": tune_metric, "save_to": tuning.save_to}
        result = evaluate_model(inputs.model, inputs.data, reading=reading, **how)
        print(result.text())
        scores = result.report
    print("\n".join(scores.table(per_image=per_image)))
    if out is not None:
        write = scores.to_csv if out.suffix == ".csv" else scores.to_json
        write(out)
        print(f"written: {out}")


def check_evaluation(given: Mapping[str, Any]) -> None:
    """Raise UsageError if options of `evaluate`, all its parameters by name, do not go together."""
    pred, truth, model, data = (given[name] for name in ("pred", "truth", "model", "data"))
    tune, save_to, out = (given[name] for name in ("tune", "save_to", "out"))
    if (pred is None) != (truth is None) or (model is None) != (data is None):
        raise UsageError(
            "evaluate must get --pred with --truth, or --model with --data, got half a pair: add the "
            "other option"
        )
    if (pred is None) == (model is None):
        raise UsageError(
            "evaluate must get either --pred and --truth or --model and --data, got "
            f"{'neither' if pred is None else 'both'}: choose one pair"
        )
    if model is None and (tune or save_to):
        raise UsageError("--tune must have --model and --data, got --pred: give a model to tune")
    if model is None and (given["channels"] is not None or given["page"] is not None):
        raise UsageError(
            "--channels and --page must have --model and --data, got --pred: label images have one plane"
        )
    from dinocell.network.precision import PRECISIONS

    if given["precision"] not in PRECISIONS:
        raise UsageError(
            f"--precision must be one of {', '.join(PRECISIONS)}, got {given['precision']!r}: choose one"
        )
    if save_to is not None and not tune:
        raise UsageError("--save-model must come with --tune, got it alone: add --tune")
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UsageError(f"--out must end in .csv or .json, got {out}: choose one of the two")
    values = given["iou_thresholds"] or []
    if not all(0 < value <= 1 for value in values):
        raise UsageError(f"--iou must be above 0 and at most 1, got {values}: 0.5 is usual")
