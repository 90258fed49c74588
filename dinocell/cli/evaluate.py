"""`dinocell evaluate`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.cli.options import App, Device, option, plane_choice
from dinocell.errors import UsageError

if TYPE_CHECKING:
    from dinocell.evaluation.errors import ErrorPictures
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
        "Run --model on this channel of multi-channel images: a name, or an index counted from 0. If you "
        "name several, separated by commas, their average is segmented; mean or all stands for all."
    )
    page: int | None = option(
        "Run --model on this plane of image stacks, counted from 0 through all of a file.", min=0
    )
    z: str | None = option(
        "Run --model on this plane along z, counted from 0, or on the projection max or mean along z."
    )
    time: int | None = option("Run --model on this point in time, counted from 0.", min=0)
    scene: int | None = option(
        "Run --model on this scene (position, series) of files with several, counted from 0.", min=0
    )
    precision: str = option(
        "Run --model with this precision: auto, fp32 or bf16 (see `dinocell segment --help`).",
        "auto",
    )
    tta: bool = option(
        "Run --model with test-time augmentation (see `dinocell segment --help`).", False
    )


@dataclass(frozen=True)
class Scoring:
    """How label images are compared."""

    iou_thresholds: list[float] | None = option(
        "Compute AP, F1 and PQ at this IoU threshold (above 0, at most 1). Repeat the option for several "
        "thresholds.  [default: 0.5, 0.75, 0.9]",
        names="--iou",
    )
    boundary_tolerance_px: float = option(
        "Count a boundary pixel as found within this many px of a true one, for the boundary F score.",
        2.0,
        min=0,
    )

    errors: Path | None = option(
        "Write a picture of each image into this folder, with the borders of missed, false, merged, split "
        "and inexact cells in colours, and errors.csv, the worst image first (at the first --iou).",
    )

    def settings(self) -> dict[str, Any]:
        """The options as arguments of `evaluate_folders` and `evaluate_model`."""
        from dinocell.evaluation.scores import DEFAULT_IOU_THRESHOLDS

        return {
            "iou_thresholds": tuple(self.iou_thresholds or DEFAULT_IOU_THRESHOLDS),
            "boundary_tolerance_px": self.boundary_tolerance_px,
        }

    def error_pictures(self) -> "ErrorPictures | None":
        """What draws the errors, if it was asked for."""
        from dinocell.evaluation.errors import ErrorPictures

        if self.errors is None:
            return None
        return ErrorPictures(self.errors, self.settings()["iou_thresholds"][0])


@dataclass(frozen=True)
class Tuning:
    """The search for thresholds of a model."""

    tune: bool = option(
        "Search the thresholds with which --model scores best on --data, and use them.", False
    )
    metric: str = option(
        "Maximise this score with --tune: ap (AP, mean over the IoU thresholds), apNN such as ap50 (AP at "
        "IoU 0.5), seg, det or op_csb.",
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
        "Score a missing label image in --pred as an image in which no cell was found.",
        False,
        "--allow-missing",
    ),
    overwrite: bool = option(
        "Replace files of --out, --errors and --save-model that exist.", False
    ),
    device: Device = "auto",
    per_image: bool = option(
        "Print a row for each image, too.", False, "--per-image/--no-per-image"
    ),
) -> None:
    """Compare label images with the truth: SEG, DET, OP_CSB, AP, PQ, F1, AJI and boundary F.

    Give either label images (`--pred` with `--truth`) or a model (`--model` with `--data`).

    SEG, DET and their mean OP_CSB are the scores of the Cell Tracking Challenge, AP is found /
    (found + missed + invented) cells, PQ panoptic quality, AJI the aggregated Jaccard index.
    Every score is printed twice: for the cells of all images together, and as the mean over images.

    `--tune` runs the network once on each image and then searches the thresholds. Tune on validation
    images, never on the images of a final test.

    Example: `dinocell evaluate --pred out --truth data/test/labels`
    """
    options = {"out": out, "allow_missing_predictions": allow_missing_predictions}
    check_evaluation(vars(inputs) | vars(scoring) | vars(tuning) | options)
    if not overwrite:
        _refuse_files(out, scoring.errors, tuning.save_to, inputs.model)
    scores: EvaluationReport
    pictures = scoring.error_pictures()
    settings = scoring.settings() | {"errors_to": pictures}
    if inputs.pred is not None and inputs.truth is not None:
        from dinocell.evaluation.evaluate import evaluate_folders

        how = settings | {"allow_missing_predictions": allow_missing_predictions}
        scores = evaluate_folders(inputs.pred, inputs.truth, **how)
    elif inputs.model is not None and inputs.data is not None:
        from dinocell.evaluation.model_evaluation import Reading, evaluate_model

        reading = Reading(device, inputs.precision, inputs.tta, plane_choice(inputs))
        tune_metric = tuning.metric if tuning.tune else None
        how = settings | {"tune_metric": tune_metric, "save_to": tuning.save_to}
        result = evaluate_model(inputs.model, inputs.data, reading=reading, **how)
        print(result.text())
        scores = result.report
    print("\n".join(scores.table(per_image=per_image)))
    if pictures is not None:
        print(pictures.finish())
    if out is not None:
        write = scores.to_csv if out.suffix == ".csv" else scores.to_json
        write(out)
        print(f"written: {out}")


def check_evaluation(given: Mapping[str, Any]) -> None:
    """Raise UsageError if options of `evaluate`, all its parameters by name, do not go together."""
    for fault in _faults(given):
        raise UsageError(fault)


def _refuse_files(
    out: Path | None, errors: Path | None, save_to: Path | None, model: str | None
) -> None:
    """Raise UsageError if a file of an earlier evaluation, or any picture, could be replaced."""
    if save_to is not None and model is not None and save_to.resolve() == Path(model).resolve():
        save_to = None  # refused with a sentence of its own, whatever else is given
    made = () if errors is None else (errors / "errors.csv", next(errors.rglob("*.png"), None))
    for path in (out, *made, save_to):
        if path is not None and path.exists():
            raise UsageError(
                f"An evaluation must not replace files unasked, got {path}, which exists: choose another "
                "name, or set --overwrite"
            )


def _faults(given: Mapping[str, Any]) -> Iterator[str]:
    from dinocell.network.precision import PRECISIONS

    pred, truth, model, data = (given[name] for name in ("pred", "truth", "model", "data"))
    tune, save_to, out = (given[name] for name in ("tune", "save_to", "out"))
    if (pred is None) != (truth is None) or (model is None) != (data is None):
        yield (
            "evaluate must get --pred with --truth, or --model with --data, got half a pair: add the "
            "option that is missing"
        )
    if (pred is None) == (model is None):
        both = "neither" if pred is None else "both"
        yield (
            f"evaluate must get either --pred and --truth or --model and --data, got {both}: give one of "
            "the two pairs"
        )
    if model is None and (tune or save_to):
        yield "--tune must have --model and --data, got --pred: replace --pred and --truth by them"
    precision, values = given["precision"], given["iou_thresholds"] or []
    planes = [given[name] for name in ("channels", "page", "z", "time", "scene")]
    if model is None and (planes.count(None) < 5 or (precision, given["tta"]) != ("auto", False)):
        yield (
            "--channels, --page, --z, --time, --scene, --precision and --tta must have --model and --data, got "
            "--pred: leave them out, because label images have one plane and no network runs"
        )
    if precision not in PRECISIONS:
        yield f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}: give one of these"
    if save_to is not None and not tune:
        yield "--save-model must come with --tune, got it alone: add --tune, or leave out --save-model"
    if not tune and given["metric"] != "ap":
        yield f"--metric must come with --tune, got {given['metric']} alone: add --tune, or leave it out"
    if model is not None and given["allow_missing_predictions"]:
        yield "--allow-missing must have --pred and --truth, got --model: leave it out"
    read = [folder.resolve() for folder in (pred, truth, data) if folder is not None]
    read += [folder / inner for folder in read for inner in ("images", "labels")]
    if given["errors"] is not None and given["errors"].resolve() in read:
        yield (
            f"--errors must be another folder than those of the images and labels, got {given['errors']}: "
            "choose a new one, because pictures could replace them"
        )
    if out is not None and out.suffix not in (".csv", ".json"):
        yield f"--out must end in .csv or .json, got {out}: change the ending of the file name"
    if not all(0 < value <= 1 for value in values):
        yield f"--iou must be above 0 and at most 1, got {values}: give for example 0.5"
