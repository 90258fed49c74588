"""`dinocell evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dinocell.cli.options import App, Device
from dinocell.errors import UsageError

__all__ = ["app", "check_evaluation"]

app = App()


@app.command()
def evaluate(
    pred: Annotated[Path | None, typer.Option(help="Folder of predicted label images.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Folder of true label images.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to run, in place of --pred.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with images/ and labels/, for --model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the tables here (.csv or .json).")
    ] = None,
    iou: Annotated[
        list[float] | None,
        typer.Option(
            help="IoU thresholds of AP, F1 and PQ; repeat for several.  [default: 0.5, 0.75, 0.9]"
        ),
    ] = None,
    boundary_tolerance_px: Annotated[
        float, typer.Option(min=0, help="Tolerance of the boundary F score in px.")
    ] = 2.0,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Count a missing prediction as no cells.")
    ] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First find the best thresholds for --model on --data."),
    ] = False,
    metric: Annotated[
        str, typer.Option(help="What --tune maximises: ap (mean over IoU), apNN, seg, det, op_csb.")
    ] = "ap",
    save_model: Annotated[
        Path | None, typer.Option(help="With --tune: write the model with these thresholds.")
    ] = None,
    device: Device = "auto",
    per_image: Annotated[bool, typer.Option(help="Also print a row per image.")] = False,
) -> None:
    """Score label images against the truth: SEG, DET, OP_CSB, AP, PQ, F1, AJI, boundary F.

    Scores are given pooled over all images and as the mean over images; both are labelled.
    `--tune` runs the network once per image and searches the thresholds on its maps: use
    validation data, never the test set.

    Example: `dinocell evaluate --pred out --truth data/test/labels`
    """
    from dinocell.evaluation.evaluate import DEFAULT_IOU_THRESHOLDS, evaluate_folders
    from dinocell.evaluation.model_evaluation import evaluate_model

    check_evaluation(dict(locals()))
    thresholds = tuple(iou) if iou else DEFAULT_IOU_THRESHOLDS
    if pred is not None and truth is not None:
        scores = evaluate_folders(
            pred,
            truth,
            allow_missing_predictions=allow_missing,
            iou_thresholds=thresholds,
            boundary_tolerance_px=boundary_tolerance_px,
        )
    else:
        assert model is not None
        assert data is not None
        result = evaluate_model(
            model,
            data,
            device=device,
            tune=tune,
            metric=metric,
            save_to=save_model,
            iou_thresholds=thresholds,
            boundary_tolerance_px=boundary_tolerance_px,
        )
        print(result.text())
        scores = result.report
    print("\n".join(scores.table(per_image=per_image)))
    if out is not None:
        write = scores.to_csv if out.suffix == ".csv" else scores.to_json
        write(out)
        print(f"written: {out}")


def check_evaluation(given: Mapping[str, Any]) -> None:
    """Which options of `evaluate` go together."""
    pred, truth, model, data = (given[name] for name in ("pred", "truth", "model", "data"))
    tune, save_model, out = (given[name] for name in ("tune", "save_model", "out"))
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
    if model is None and (tune or save_model):
        raise UsageError("--tune must have --model and --data, got --pred: give a model to tune")
    if save_model is not None and not tune:
        raise UsageError("--save-model must come with --tune, got it alone: add --tune")
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UsageError(f"--out must end in .csv or .json, got {out}: choose one of the two")
    if not all(0 < value <= 1 for value in given["iou"] or []):
        raise UsageError(f"--iou must be above 0 and at most 1, got {given['iou']}: 0.5 is usual")
