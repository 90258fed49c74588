"""The `dinocell` command: arguments and messages only, no image work.

Exit codes: 0 done, 1 the work failed (for some files, perhaps), 2 the call was wrong, 75 stopped by
a signal with everything saved (run the same command again).
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dinocell import __version__
from dinocell.errors import DINOCellError, StoppedError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="dinocell",
    help="Segment cells in microscopy images; train and evaluate the networks that do it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(help="Model files: what is there, what is in them.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")
jump_app = typer.Typer(
    help="Cell Painting fields of a public bucket: index, check, local shards, arithmetic.",
    no_args_is_help=True,
)
app.add_typer(jump_app, name="jump")
upstream_app = typer.Typer(
    help="Our additions on a checkout of Meta's DINOv3: apply, undo, rebase, verify.",
    no_args_is_help=True,
)
app.add_typer(upstream_app, name="upstream")
shards_app = typer.Typer(
    help="One batch of images in parts for many processes: plan, run, status, merge.",
    no_args_is_help=True,
)
app.add_typer(shards_app, name="shards")

_verbose = False

Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
]
IndexFile = Annotated[Path, typer.Argument(metavar="INDEX", help="File that `jump index` made.")]
Store = Annotated[
    str,
    typer.Option(
        "--store", help="s3://bucket or a folder.  [default: the public bucket, or the index's]"
    ),
]
Endpoint = Annotated[str, typer.Option(help="URL of another server of the S3 protocol.")]
Region = Annotated[str, typer.Option(help="Of the bucket.")]
Signed = Annotated[
    bool, typer.Option("--signed", help="Sign requests with the credentials of the environment.")
]
Transport = Annotated[str, typer.Option(help="obstore or boto3.")]
Checkout = Annotated[Path, typer.Option("--checkout", help="A git checkout of DINOv3.")]
SeriesFolder = Annotated[
    Path | None,
    typer.Option("--series", help="Folder of patches.  [default: patches of this clone]"),
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A model file, or the name of a bundled model.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    try:
        app(args=arguments, prog_name="dinocell")
    except StoppedError as error:
        print(f"dinocell: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except DINOCellError as error:
        _fail(error, error.exit_code)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        print("dinocell: stopped", file=sys.stderr)
        sys.exit(1)


def _fail(error: BaseException, exit_code: int) -> None:
    in_job = os.environ.get("DINOCELL_TRACEBACKS") == "failures"
    if _verbose or (in_job and exit_code != UsageError.exit_code):
        import traceback

        traceback.print_exception(error)
    text = str(error) or type(error).__name__
    print(f"dinocell: error: {text}", file=sys.stderr)
    sys.exit(exit_code)


def _show_version(value: bool) -> None:
    if value:
        print(f"dinocell {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show a traceback when something fails.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    global _verbose
    _verbose = verbose


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path(
        "demo_out"
    ),
    device: Device = "auto",
    model: ModelOption = "dinocell-tiny",
) -> None:
    """Segment the bundled sample images with the bundled model.

    Leaves label images, measurements (CSV), overlays and one HTML page, and scores the result
    against the samples' truth.

    Example: `dinocell demo -o demo_out`
    """
    from dinocell.demo import run_demo

    result = run_demo(out, model=model, device=device)
    print(result.text())


@app.command()
def segment(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE|DIR|GLOB...", help="Images, folders, patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")],
    model: ModelOption = "dinocell-tiny",
    device: Device = "auto",
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="Label files to write: tif, png, geojson, roi, coco. Repeat for several.  "
            "[default: tif]",
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="Channels to use of a multi-channel image: index or name, several with commas "
            "(normalised one by one and averaged)."
        ),
    ] = None,
    page: Annotated[int | None, typer.Option(help="Plane of a stack, from 0.")] = None,
    pixel_size_um: Annotated[
        float | None, typer.Option(help="Pixel size in µm, in place of the file's.")
    ] = None,
    peak_threshold: Annotated[
        float | None, typer.Option(help="A cell's deepest pixel must exceed this.")
    ] = None,
    fill_threshold: Annotated[
        float | None, typer.Option(help="Pixels above this belong to cells.")
    ] = None,
    min_prominence: Annotated[
        float | None, typer.Option(help="Peaks closer than this to their saddle are one cell.")
    ] = None,
    min_area_px: Annotated[int | None, typer.Option(help="Drop cells with fewer pixels.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per network call.")] = 8,
    tile_px: Annotated[
        int | None,
        typer.Option(help="Visit windows region by region of this size; same result."),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (faster).")] = "fp32",
    workers: Annotated[
        int, typer.Option(min=0, help="Threads that finish images behind the network.")
    ] = 1,
    recursive: Annotated[bool, typer.Option(help="Look into subfolders.")] = False,
    overlay: Annotated[bool, typer.Option(help="Write NAME_overlay.png.")] = True,
    report: Annotated[bool, typer.Option("--report", help="Write report.html.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip images that are already done in OUT.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results already in OUT.")
    ] = False,
    allow_mask: Annotated[
        bool, typer.Option("--allow-mask", help="Accept images that look like masks.")
    ] = False,
) -> None:
    """Find the cells of images; write labels, measurements and overlays.

    Per image: `NAME_labels.tif` (0 background, 1..n; 16 bit, 32 bit above 65,535 cells),
    `NAME_cells.csv`, `NAME_overlay.png`; for all: `summary.csv`.  An image that cannot be read is
    listed at the end and does not stop the others (exit code 1).

    Example: `dinocell segment images/ -o out --report`
    """
    given = dict(locals())
    from dinocell.batch.run import segment_files
    from dinocell.io.images import find_images

    paths = find_images(images, recursive=recursive)
    result = segment_files(paths, out, _segment_options(given))
    print(result.text())
    if result.failures:
        raise typer.Exit(1)


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML configuration, see configs/ssl.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace keys of the configuration."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Folder of the run.  [default: runs/ssl/NAME]"),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start anew; earlier checkpoints step aside.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Of start values and dropout; train.seed is the data's.")
    ] = 0,
) -> None:
    """Train a backbone on images without labels (DINO, iBOT, KoLeo), or continue a stopped run.

    Run the same command again after an interruption: it continues from the last checkpoint, bit
    for bit on a CPU.  The last line names the teacher's file, which `dinocell train` starts from
    with `backbone.weights=FILE`.

    Example: `dinocell pretrain configs/ssl/cells_tiny.yaml optim.epochs=2`
    """
    from dinocell.pretraining.run import pretrain as run

    result = run(config, overrides or [], output_dir=output_dir, resume=not no_resume, seed=seed)
    print(f"teacher: {result}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration, see configs/finetune.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace keys of the configuration."),
    ] = None,
) -> None:
    """Train a model on folders of images and label images, or continue a stopped run.

    Run the same command again after an interruption: it continues from the last checkpoint.

    Example: `dinocell train configs/finetune/dsb2018_tiny.yaml optimizer.lr=5e-4`

    On 2 GPUs: `torchrun --nproc-per-node=2 -m dinocell train configs/finetune/dsb2018_tiny.yaml`
    """
    from dinocell.settings import load_config
    from dinocell.training.processes import is_main_process
    from dinocell.training.trainer import train as run_training

    result = run_training(load_config(config, overrides or []))
    if not is_main_process():
        return
    settings = ", ".join(f"{name} {value:g}" for name, value in result.thresholds.items())
    print(
        f"model: {result.model_path} (step {result.step}"
        f"{', stopped early' if result.stopped_early else ''})\n"
        f"validation AP@0.5 (pooled): {result.val_ap50:.4f}; {settings}"
    )


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

    _check_evaluation(dict(locals()))
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


@app.command()
def inspect(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Backbone files, training checkpoints or models; several are compared.",
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder of multi-channel fields.")],
    index: Annotated[
        Path | None,
        typer.Option(help="CSV that says which file is which channel of which field."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Names of the files instead: harmony, cellvoyager, imagexpress, or a regular "
            "expression with the group (?P<channel>...)."
        ),
    ] = None,
    channels_table: Annotated[
        Path | None,
        typer.Option(help="With --pattern: CSV that gives channel numbers their names."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write inspect.json and inspect.png here.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="Use these channels only: names with commas.")
    ] = None,
    windows_per_field: Annotated[int, typer.Option(help="Windows of each field.")] = 4,
    window_px: Annotated[int, typer.Option(help="Edge of a window in px.")] = 224,
    max_fields: Annotated[
        int | None, typer.Option(help="At most so many fields, spread over the names.")
    ] = None,
    which: Annotated[
        str, typer.Option(help="Of a training checkpoint: teacher or student.")
    ] = "teacher",
    patch_size: Annotated[
        int | None, typer.Option(help="Adapt weights of another patch size to this one.")
    ] = None,
    attention: Annotated[bool, typer.Option(help="Compare the attention maps too.")] = True,
    per_channel_data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled channels: train a small decoder on each and report the spread."
        ),
    ] = None,
    per_channel_labels: Annotated[
        str, typer.Option(help="Name of the label image of a field in --per-channel-data.")
    ] = "labels",
    per_channel_steps: Annotated[
        int, typer.Option(min=1, help="Steps of each of these decoders.")
    ] = 200,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(help="Views per network call.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the intervals, the folds and the decoders.")] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print the JSON in place of the table.")
    ] = False,
) -> None:
    """Score how consistent the features of a backbone are across channels, honestly.

    Cosine within and between fields, retrieval of a place through another channel, effective rank,
    attention agreement, and how well the channel can still be decoded: to be read together, because
    collapsed features score a perfect cosine.

    Example: `dinocell inspect dinocell-tiny --data fields -o out`
    """
    from dinocell.probing.decoder_probe import ProbeConfig
    from dinocell.probing.inspection import inspect_checkpoints

    names = None
    if channels is not None:
        names = [part.strip() for part in channels.split(",") if part.strip()]
        if not names:
            raise UsageError("--channels must name a channel, got nothing: for example DNA,ER")
    report = inspect_checkpoints(
        checkpoints,
        data,
        index=index,
        pattern=pattern,
        channels_table=channels_table,
        channels=names,
        windows_per_field=windows_per_field,
        window_px=window_px,
        max_fields=max_fields,
        which=which,
        patch_size=patch_size,
        attention=attention,
        per_channel_data=per_channel_data,
        per_channel_labels=per_channel_labels,
        probe=ProbeConfig(steps=per_channel_steps, seed=seed),
        device=device,
        batch_size=batch_size,
        seed=seed,
    )
    print(report.json_text() if json else "\n".join(report.table()))
    if out is not None:
        for path in report.write(out):
            print(f"written: {path}", file=sys.stderr)


@weights_app.command("list")
def weights_list() -> None:
    """List the bundled models with their score, and the released backbones.

    Example: `dinocell weights list`
    """
    from dinocell.network.info import describe_bundled
    from dinocell.network.weights import list_weights

    print(describe_bundled())
    print(list_weights())


@weights_app.command("info")
def weights_info(
    model: Annotated[
        str,
        typer.Argument(
            help="Model file, bundled name, SIZE/PATCH such as small/8, or any backbone file or "
            "checkpoint folder."
        ),
    ],
    decoder: Annotated[
        str, typer.Option(help="Decoder for SIZE/PATCH: unet, unet_wide or linear.")
    ] = "unet",
    image_px: Annotated[
        int, typer.Option(min=1, help="Edge of the image the cost is counted for.")
    ] = 256,
    which: Annotated[str, typer.Option(help="Of a checkpoint: teacher or student.")] = "teacher",
) -> None:
    """Describe a model (architecture, cost, training, thresholds) or a backbone file.

    Example: `dinocell weights info dinocell-tiny`
    """
    from dinocell.network.info import describe_model
    from dinocell.network.weights import describe_weights, find_weights, is_backbone_file

    if is_backbone_file(find_weights(model)):
        print(describe_weights(model, which=which))
    else:
        print(describe_model(model, decoder=decoder, image_px=image_px))


@weights_app.command("convert")
def weights_convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="Backbone file, checkpoint folder, model file, or a fetched name."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help=".pth, .safetensors, or a folder (hf).")
    ],
    to: Annotated[
        str | None,
        typer.Option(help="meta, hf, timm or dinocell.  [default: by the ending of OUT]"),
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Adapt the patch embedding, for example 16 → 8.")
    ] = None,
    patch_method: Annotated[
        str, typer.Option(help="nearest (exact), bilinear, pseudo_inverse or bicubic.")
    ] = "nearest",
    which: Annotated[str, typer.Option(help="Of a checkpoint: teacher or student.")] = "teacher",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write the backbone of any DINOv3 file in another format, or for another patch size.

    IN may be Meta's `.pth`, a teacher file or checkpoint folder of a training run, Hugging Face's
    folder or `.safetensors`, timm's file, or a DINOCell model.

    Example: `dinocell weights convert runs/ssl/a/ckpt/999 backbone.pth --patch-size 8`
    """
    from dinocell.network.weights import convert_weights

    print(
        convert_weights(
            source,
            target,
            to=to,
            patch_size=patch_size,
            patch_method=patch_method,
            which=which,
            overwrite=overwrite,
        )
    )


@weights_app.command("fetch")
def weights_fetch(
    name: Annotated[str, typer.Argument(help="Released backbone (see list), or a file's name.")],
    source: Annotated[
        str | None,
        typer.Option("--from", help="Folder, mirror URL, or the whole URL from Meta's e-mail."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Open no connection (also DINOCELL_OFFLINE=1).")
    ] = False,
    sha256: Annotated[str | None, typer.Option(help="Expected checksum, or its beginning.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder in place of the cache.")
    ] = None,
) -> None:
    """Bring a backbone file into the cache; an interrupted download goes on where it stopped.

    Example: `dinocell weights fetch dinov3_vits16 --from /data/dinov3`
    """
    from dinocell.network.weights import fetch_weights

    print(fetch_weights(name, source=source, offline=offline, sha256=sha256, out=out))


@jump_app.command("index")
def jump_index(
    selection: Annotated[
        str,
        typer.Argument(
            metavar="PROJECT/SOURCE/BATCH/PLATE",
            help="Which plates; * and ? in any part, later parts may be left out.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The index file.")],
    store: Store = "",
    endpoint: Endpoint = "",
    region: Region = "us-east-1",
    signed: Signed = False,
    transport: Transport = "obstore",
    source: Annotated[
        str,
        typer.Option(
            "--from", help="tables (load_data), listing, auto: what there is; or jump-lite."
        ),
    ] = "auto",
    channels_table: Annotated[
        Path | None,
        typer.Option(help="For listings: CSV with number, channel and perhaps source."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="JUMP-Lite's list of sites, else fetched from the store.")
    ] = None,
    codec: Annotated[
        str, typer.Option(help="Of JUMP-Lite: zstd, or jpegxl_lossy_hq, _mq or _d20.")
    ] = "zstd",
    threads: Annotated[int, typer.Option(min=1, help="Plates at once.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """List the fields of a selection of plates in one file, which training opens at once.

    Stopped, it goes on with the plates that are missing when the same command is run again.

    Example: `dinocell jump index 'cpg0000-jump-pilot/source_4/*/BR0011*' -o pilot.arrow`
    """
    from dinocell.pretraining.jump import StoreChoice, index_plates

    print(
        index_plates(
            selection,
            out,
            store=StoreChoice(store, endpoint, region, signed, transport),
            source=source,
            channels_table=channels_table,
            table=table,
            codec=codec,
            threads=threads,
            overwrite=overwrite,
        )
    )


@jump_app.command("stats")
def jump_stats(
    index: IndexFile,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also draw it into this PNG.")
    ] = None,
) -> None:
    """Count plates, fields and channels of an index.

    Example: `dinocell jump stats pilot.arrow -o pilot.png`
    """
    from dinocell.pretraining.jump import draw_stats, index_stats

    stats = index_stats(index)
    print(stats.text())
    if out is not None:
        draw_stats(stats, out)
        print(f"written: {out}", file=sys.stderr)


@jump_app.command("verify")
def jump_verify(
    index: IndexFile,
    fields: Annotated[int, typer.Option(help="So many fields, drawn by --seed.")] = 32,
    store: Store = "",
    endpoint: Endpoint = "",
    region: Region = "us-east-1",
    signed: Signed = False,
    transport: Transport = "obstore",
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read a sample of fields whole and look at them; exit code 1 if one is bad.

    Example: `dinocell jump verify pilot.arrow --fields 100`
    """
    from dinocell.pretraining.jump import StoreChoice, verify_index

    choice = StoreChoice(store, endpoint, region, signed, transport)
    report = verify_index(index, count=fields, store=choice, seed=seed)
    print(report.json_text() if json else report.text())
    if report.bad:
        raise typer.Exit(1)


@jump_app.command("pack")
def jump_pack(
    index: IndexFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that does not exist yet.")],
    store: Store = "",
    endpoint: Endpoint = "",
    region: Region = "us-east-1",
    signed: Signed = False,
    transport: Transport = "obstore",
    channels: Annotated[
        str | None, typer.Option(help="Names joined by +; default those that most fields have.")
    ] = None,
    split: Annotated[str, typer.Option(help="ALL, TRAIN or VAL, by plate.")] = "ALL",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many fields.")] = None,
    bits: Annotated[int, typer.Option(help="16, or 8 (scaled to each field's range).")] = 16,
    crop: Annotated[int, typer.Option(help="Keep so many px of the centre; 0: all.")] = 0,
    scale: Annotated[float, typer.Option(help="Shrink by this factor.")] = 1.0,
    per_file: Annotated[int, typer.Option(help="Fields of a file.")] = 64,
    level: Annotated[int, typer.Option(help="Of the compression, 1 to 22.")] = 5,
    max_lost_share: Annotated[
        float, typer.Option(help="Stop when more of the fields cannot be read.")
    ] = 0.02,
) -> None:
    """Copy fields into local shards (Zarr), which are trained on through their own index.

    Example: `dinocell jump pack pilot.arrow shards --limit 5000 --bits 8`
    """
    from dinocell.pretraining.jump import StoreChoice, pack_index

    print(
        pack_index(
            index,
            out,
            store=StoreChoice(store, endpoint, region, signed, transport),
            channels=channels,
            split=split,
            limit=limit,
            bits=bits,
            crop_px=crop,
            scale=scale,
            per_file=per_file,
            level=level,
            max_lost_share=max_lost_share,
        )
    )


@jump_app.command("masks")
def jump_masks(
    index: IndexFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that does not exist yet.")],
    store: Store = "",
    endpoint: Endpoint = "",
    region: Region = "us-east-1",
    signed: Signed = False,
    transport: Transport = "obstore",
    kind: Annotated[str, typer.Option(help="nuclei or cell.")] = "nuclei",
    channel: Annotated[str, typer.Option(help="What the images show.")] = "DNA",
    fields: Annotated[int, typer.Option(help="So many fields that have labels.")] = 48,
    masks: Annotated[
        str | None, typer.Option(help="Folder of the label arrays, {kind} for nuclei or cell.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Fetch fields with Cellpose's labels (JUMP-Lite's) as pseudo-truth for `ssl_evaluation.data`.

    Example: `dinocell jump masks lite.arrow pseudo --fields 48`
    """
    from dinocell.pretraining.jump import StoreChoice, export_masks

    print(
        export_masks(
            index,
            out,
            store=StoreChoice(store, endpoint, region, signed, transport),
            kind=kind,
            channel=channel,
            count=fields,
            masks=masks,
            seed=seed,
        )
    )


@jump_app.command("plan")
def jump_plan(
    step_seconds: Annotated[float, typer.Option(help="Of a training step.")] = 0.7,
    batch: Annotated[int, typer.Option(help="Samples of a step on this node, all GPUs.")] = 64,
    cores: Annotated[float, typer.Option(help="CPU cores for data.")] = 8,
    mbps: Annotated[float, typer.Option(help="Line to the store, megabytes per second.")] = 200,
    field_mb: Annotated[float, typer.Option(help="Megabytes of a field's files.")] = 12.35,
    decode_ms: Annotated[float, typer.Option(help="CPU time to decode a field.")] = 30.0,
    augment_ms: Annotated[
        float,
        typer.Option(help="CPU time to cut the crops of a sample (2.1 with photometrics=device)."),
    ] = 16.1,
) -> None:
    """Tell what a training step needs of line and cores, name the bottleneck, recommend visits.

    Example: `dinocell jump plan --step-seconds 0.12 --batch 64 --cores 14 --mbps 1000`
    """
    from dinocell.pretraining.jump import describe_plan

    print(
        describe_plan(
            step_seconds=step_seconds,
            batch=batch,
            cores=cores,
            megabytes_per_s=mbps,
            field_megabytes=field_mb,
            decode_ms=decode_ms,
            augment_ms=augment_ms,
        )
    )


@upstream_app.command("status")
def upstream_status(checkout: Checkout, series: SeriesFolder = None) -> None:
    """Tell which release a checkout is, which patches apply to it, and what is in place.

    Exit code 1 if a patch does not apply.

    Example: `dinocell upstream status --checkout ../dinov3`
    """
    from dinocell.upstream.overlay import status_of
    from dinocell.upstream.report import status_text

    status = status_of(checkout, _series(series))
    print(status_text(status))
    if not all(outcome.applies for outcome in status.outcomes):
        raise typer.Exit(1)


@upstream_app.command("apply")
def upstream_apply(
    checkout: Checkout,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Make a new folder; the checkout is left alone."),
    ] = None,
    series: SeriesFolder = None,
) -> None:
    """Put our files and patches into a checkout without changes, all of them or none.

    Example: `dinocell upstream apply --checkout ../dinov3 --out ../dinov3-cells`
    """
    from dinocell.upstream.overlay import apply_series
    from dinocell.upstream.report import merged_text

    merged, tree = apply_series(checkout, _series(series), out=out)
    print(merged_text(merged))
    print(f"written: {tree}", file=sys.stderr)
    print(f"use it: DINOCELL_DINOV3={tree} dinocell ...", file=sys.stderr)


@upstream_app.command("undo")
def upstream_undo(checkout: Checkout, series: SeriesFolder = None) -> None:
    """Take our lines and files out of a checkout again; nothing else is touched.

    Example: `dinocell upstream undo --checkout ../dinov3`
    """
    from dinocell.upstream.overlay import undo

    changed = undo(checkout, _series(series))
    print(f"{len(changed)} files are upstream's again" if changed else "nothing of ours was there")


@upstream_app.command("rebase")
def upstream_rebase(
    checkout: Checkout,
    onto: Annotated[str, typer.Option("--onto", help="Commit, tag or branch of the checkout.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would become of each patch.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Run the conformance suite before the series is written."
        ),
    ] = True,
    series: SeriesFolder = None,
) -> None:
    """Move the series onto another commit; it is written only if everything passes.

    The checkout is not touched.  Exit code 1 and both sides of each place after a conflict.

    Example: `dinocell upstream rebase --checkout ../dinov3 --onto origin/main`
    """
    from dinocell.upstream.rebase import rebase
    from dinocell.upstream.report import merged_text
    from dinocell.upstream.verify import verify_tree

    def check(tree: Path) -> bool:
        print("running the conformance suite ...", file=sys.stderr)
        result = verify_tree(tree)
        print(result.text())
        return result.passed

    merged, written = rebase(
        checkout, onto, _series(series), check=check if verify else None, dry_run=dry_run
    )
    print(merged_text(merged))
    if not merged.applies:
        raise typer.Exit(1)
    if not dry_run:
        print(
            f"written: {', '.join(written) or 'nothing, the series is the same'}", file=sys.stderr
        )


@upstream_app.command("refresh")
def upstream_refresh(checkout: Checkout, series: SeriesFolder = None) -> None:
    """Make the series from the marked lines of a checkout that you edited.

    Example: `dinocell upstream refresh --checkout ../dinov3`
    """
    from dinocell.upstream.rebase import refresh

    written = refresh(checkout, _series(series))
    print(f"written: {', '.join(written) or 'nothing, the series is the same'}")


@upstream_app.command("verify")
def upstream_verify(
    tree: Annotated[Path, typer.Option("--tree", help="Folder that holds the package dinov3.")],
    keyword: Annotated[str, typer.Option("-k", help="Only tests that match, as pytest's -k.")] = "",
) -> None:
    """Run the conformance suite on a tree: names, numbers, a training step, checkpoints, additions.

    A tree of upstream's needs torchvision for its data and training parts; without it these are
    skipped, and the table says so.  Exit code 1 if anything failed.

    Example: `dinocell upstream verify --tree ../dinov3-cells`
    """
    from dinocell.upstream.verify import verify_tree

    result = verify_tree(tree, keyword=keyword)
    print(result.text())
    if not result.passed:
        if _verbose:
            print(result.output, file=sys.stderr)
        raise typer.Exit(1)


# What `submit` and `supervise` do not know is an option of the command that they run.
_PASSES_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command(context_settings=_PASSES_ON)
def submit(
    context: typer.Context,
    command: Annotated[
        str,
        typer.Argument(
            metavar="pretrain|train|segment|evaluate ...",
            help="The command as it would be typed here, with its own options.",
        ),
    ],
    site: Annotated[
        str | None,
        typer.Option(
            help="Site file, or its name in slurm/sites.  [default: DINOCELL_SITE, else the "
            "cluster's defaults]"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the site; repeat."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each; one process a GPU.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one run, such as 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="In place of the site's.")] = None,
    array: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE", help="CSV with a header; one task a line, columns are keys to change."
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="segment: so many parts as an array, then one merged table."),
    ] = None,
    dependency: Annotated[
        str | None, typer.Option(help="Wait for a job: its number, or afterany:123 and the like.")
    ] = None,
    logs: Annotated[
        Path | None, typer.Option(help="Folder of log files.  [default: slurm in the run's folder]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch file; submit nothing.")
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Run it here in the same way, without a cluster.")
    ] = False,
    look: Annotated[
        bool,
        typer.Option(
            "--look/--no-look",
            help="Look for models, weights and data before submitting; not for what a job that is "
            "waited for (--dependency) will make.",
        ),
    ] = True,
) -> None:
    """Run a command on a SLURM cluster; it is requeued and goes on until it is done.

    What is wrong with the call is told here, not by a job that has waited for hours.  See
    `dinocell jobs` for what became of it, and docs/cluster.md.

    Example: `dinocell submit pretrain configs/ssl/jump_s3_multiview.yaml --site a100 --gpus 4`
    """
    from dinocell.cluster.plan import COMMANDS, plan_runs, plan_shard_runs, read_table
    from dinocell.cluster.site import load_site
    from dinocell.cluster.submission import parse_dependency

    if command not in COMMANDS:
        raise UsageError(
            f"submit must get one of {', '.join(COMMANDS)}, got {command!r}: write for example "
            "dinocell submit pretrain CONFIG"
        )
    changes = {"nodes": nodes, "time": time, "partition": partition}
    overrides = [f"{key}={value}" for key, value in changes.items() if value is not None]
    profile = load_site(site, [*(set_ or []), *overrides])
    if gpus is not None:
        profile = profile.with_gpus(gpus)
    if dependency is not None:
        dependency = parse_dependency(dependency)
    if local and (dry_run or dependency is not None):
        raise UsageError(
            f"--local must be without {'--dry-run' if dry_run else '--dependency'}, got both: choose one"
        )
    if command in ("segment", "evaluate"):
        if (gpus or 1) > 1 or (nodes or 1) > 1:
            raise UsageError(
                f"{command} must have one process, got --gpus or --nodes above 1: divide images with "
                "--shards, which run at once"
            )
        profile = profile.for_one_process()
    look_at = _look_once() if look and dependency is None else None

    def parse(given: Sequence[str]) -> dict[str, Any]:
        return _checked(command, given)

    with _environment(profile.environment):  # configurations name data by variables
        if shards is not None:
            if command != "segment" or array is not None:
                raise UsageError(
                    "--shards must come with segment and without --array, got it elsewhere: leave it out"
                )
            parameters = parse(context.args)
            if look_at is not None:
                look_at(command, parameters)
            plan = _planned_shards(parameters, shards, dependency, write=not dry_run)
            runs, merging = plan_shard_runs(plan)
            if not runs:
                print("every shard is complete; merging", file=sys.stderr)
        else:
            rows = [] if array is None else read_table(array)
            runs = plan_runs(command, context.args, parse, table=rows, look=look_at)
            merging = None
    _hand_over(runs, merging, profile, dependency, logs, dry_run=dry_run, local=local, look=look)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables as the job will have them."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _planned_shards(
    parameters: Mapping[str, Any], count: int, dependency: str | None = None, *, write: bool = True
) -> Any:
    """The plan of a batch in parts; none that a job waits with changes under it."""
    from dinocell.batch.parts import has_begun, plan_shards
    from dinocell.cluster.submission import refuse_busy
    from dinocell.io.images import find_images

    options = _segment_options(parameters)
    paths = find_images(parameters["images"], recursive=parameters["recursive"])
    if write:
        fixed = not options.overwrite and has_begun(parameters["out"])
        folder = Path(parameters["out"]) / "shards"
        refuse_busy([folder], dependency, below=True, may_wait=fixed)
    return plan_shards(paths, parameters["out"], options, count, write=write)


def _hand_over(
    runs: Sequence[Any],
    merging: Any,
    profile: Any,
    dependency: str | None,
    logs: Path | None,
    *,
    dry_run: bool,
    local: bool,
    look: bool,
) -> None:
    from dinocell.cluster.submission import run_here, sbatch_text
    from dinocell.cluster.submission import submit as hand_in

    alone = profile.for_merging()
    if dry_run:
        for run in runs:
            print(f"{run.run_dir}: dinocell {shlex.join(run.command)}", file=sys.stderr)
        if runs:
            print(sbatch_text(runs, profile, dependency=dependency, log_dir=logs))
        if merging is not None:
            after = "afterany:JOB_ABOVE" if runs else None
            print(sbatch_text([merging], alone, dependency=after, log_dir=logs))
        return
    if local:
        code = run_here(runs, profile, log_dir=logs) if runs else 0
        if merging is not None and code != StoppedError.exit_code:
            code = max(code, run_here([merging], alone, log_dir=logs))
        if code:
            raise typer.Exit(code)
        return
    after = dependency
    together: list[str] = []
    if runs:
        accepted = hand_in(runs, profile, dependency=dependency, log_dir=logs, look=look)
        print(accepted.text(cancel=None if merging is None else []))
        together = [accepted.job]
        after = f"afterany:{accepted.job}"
    if merging is not None:
        print("then, when all of them have ended, the merged table:")
        try:
            last = hand_in(
                [merging], alone, dependency=after, behind=dependency, log_dir=logs, look=look
            )
            print(last.text(cancel=[*together, last.job]))
        except UsageError as error:
            raise UsageError(
                f"{error}; the images are in work all the same: when their tasks have ended, run "
                f"dinocell {shlex.join(merging.command)}"
            ) from error


@app.command()
def jobs(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="Only runs in this folder or below it."),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also jobs submitted more than a week ago, and those whose runs later ones have taken on.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List jobs that were submitted from this account: state, progress, reasons.

    `left` is the time that the work itself needs, at its last known speed, not that of the job's limit.

    Example: `dinocell jobs`
    """
    from dinocell.cluster.jobs import jobs_text, list_jobs

    rows = list_jobs(folder=folder, everything=everything)
    if json:
        import dataclasses
        from json import dumps

        print(dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    print(jobs_text(rows))


@app.command(context_settings=_PASSES_ON)
def supervise(
    context: typer.Context,
    command: Annotated[
        str,
        typer.Argument(
            metavar="pretrain|train|segment|evaluate|shards ...",
            help="The command as it would be typed here, with its own options.",
        ),
    ],
    signal_ahead: Annotated[
        int, typer.Option(min=10, help="Seconds between the signal and the end, as in --signal.")
    ] = 120,
    max_stalled_starts: Annotated[
        int, typer.Option(min=1, help="Starts without progress after which the job is given up.")
    ] = 5,
) -> None:
    """Run a command inside a SLURM job of your own: it is saved and requeued when it must stop.

    For scripts that are submitted with sbatch (see slurm/); `dinocell submit` does this by itself.

    Example: `srun dinocell supervise pretrain configs/ssl/jump_s3_multiview.yaml`
    """
    from dinocell.cluster.plan import COMMANDS, run_dir_of
    from dinocell.cluster.record import merging_folder, shard_folder
    from dinocell.cluster.supervisor import SupervisedJob
    from dinocell.cluster.supervisor import supervise as run

    arguments = context.args
    if command == "shards" and len(arguments) == 3 and arguments[0] == "run":
        index = (
            arguments[2] if arguments[2].isdigit() else "0"
        )  # a wrong one is told by the command
        run_dir = shard_folder(arguments[1], int(index))
    elif command == "shards" and len(arguments) == 2 and arguments[0] == "merge":
        run_dir = merging_folder(arguments[1])
    elif command in COMMANDS:
        run_dir = run_dir_of(command, _parsed(command, arguments))
    else:
        raise UsageError(
            f"supervise must get one of {', '.join(COMMANDS)} or shards run OUT PART, shards merge OUT, got "
            f"{' '.join([command, *arguments])!r}: write for example dinocell supervise pretrain CONFIG"
        )
    job = SupervisedJob((command, *arguments), str(run_dir), signal_ahead, max_stalled_starts)
    code = run(job)
    if code:
        raise typer.Exit(code)


ResultsFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results.")]


@shards_app.command("plan", context_settings=_PASSES_ON)
def shards_plan(
    context: typer.Context,
    count: Annotated[int, typer.Argument(metavar="COUNT", help="Number of parts.")],
) -> None:
    """Divide images into parts of about as many bytes; what follows is as of `dinocell segment`.

    Nothing is segmented yet: each part is done by `dinocell shards run OUT PART`, anywhere.

    Example: `dinocell shards plan 16 plate/ -o out --model model.safetensors`
    """
    plan = _planned_shards(_parsed("segment", context.args), count)
    print(
        f"{plan.images} images, {plan.total_bytes / 1e9:.3f} GB in {plan.count} shards: "
        f"{plan.out / 'shards'}"
    )


@shards_app.command("run")
def shards_run(
    out: ResultsFolder,
    shard: Annotated[int, typer.Argument(metavar="PART", help="From 0.")],
) -> None:
    """Segment the images of one part; run again, it goes on with those that are missing.

    Images that fail are listed at the end and by `merge`; they stop nothing.

    Example: `dinocell shards run out 3`
    """
    from dinocell.batch.parts import run_shard

    print(run_shard(out, shard).text())


@shards_app.command("status")
def shards_status(out: ResultsFolder) -> None:
    """Tell how far each part is.

    Example: `dinocell shards status out`
    """
    from dinocell.batch.parts import read_plan, shard_states

    for state in shard_states(read_plan(out)):
        failed = f", {state.failed} failed" if state.failed else ""
        print(f"shard {state.index}: {state.done} of {state.images} images done{failed}")


@shards_app.command("merge")
def shards_merge(out: ResultsFolder) -> None:
    """Make `summary.csv` and `cells.csv` of all parts; exit code 1 if parts are not complete.

    Images that failed are listed, and have their reason in the last column of `summary.csv`.

    Example: `dinocell shards merge out`
    """
    from dinocell.batch.parts import merge_shards

    merged = merge_shards(out)
    print(merged.text())
    if merged.missing:
        raise DINOCellError(merged.missing_sentence())


def _parsed(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Parameters of a command from its arguments; what is wrong with them is told as by itself."""
    from typer.main import get_command

    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    try:
        with command.make_context(f"dinocell {name}", list(arguments)) as context:
            return dict(context.params)
    except Exception as error:
        told = getattr(error, "format_message", None)  # of every error about a command line
        if told is None:
            raise
        raise UsageError(f"dinocell {name}: {told()} (see dinocell {name} --help)") from error


def _check_evaluation(given: Mapping[str, Any]) -> None:
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


def _checked(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`_parsed`, and what the command itself would refuse at once, whatever its files."""
    parameters = _parsed(name, arguments)
    if name == "segment":
        from dinocell.batch.run import check_options

        check_options(_segment_options(parameters))
    elif name == "evaluate":
        _check_evaluation(parameters)
        if parameters["tune"]:
            from dinocell.evaluation.thresholds import check_metric

            try:
                check_metric(parameters["metric"])
            except ValueError as error:
                raise UsageError(str(error)) from error
    return parameters


def _look_once() -> Callable[[str, Mapping[str, Any]], None]:
    """`_look_for_inputs`, once for all rows of a table with the same inputs."""
    seen = set()

    def look(name: str, parameters: Mapping[str, Any]) -> None:
        inputs = ("images", "recursive", "model", "pred", "truth", "data")
        key = tuple(str(parameters.get(option)) for option in inputs)
        if key not in seen:
            seen.add(key)
            _look_for_inputs(name, parameters)

    return look


def _look_for_inputs(name: str, parameters: Mapping[str, Any]) -> None:
    """Whether what `segment` and `evaluate` read is there."""
    if name == "segment":
        from dinocell.batch.run import check_call
        from dinocell.io.images import find_images

        paths = find_images(parameters["images"], recursive=parameters["recursive"])
        check_call(paths, _segment_options(parameters))
    elif name == "evaluate":
        for option in ("pred", "truth", "data"):
            folder = parameters[option]
            if folder is not None and not folder.is_dir():
                raise UsageError(
                    f"--{option} must be a folder that exists, got {folder}: mend the path, or add "
                    "--no-look if it is on the nodes only"
                )
        if parameters["data"] is not None:
            from dinocell.evaluation.model_evaluation import check_data_folder

            check_data_folder(parameters["data"])
    if name in ("segment", "evaluate") and parameters["model"] is not None:
        from dinocell.network.model import read_model_header

        read_model_header(parameters["model"])


def _segment_options(given: Mapping[str, Any]) -> Any:
    """The parameters of `segment` as its options."""
    import dataclasses

    from dinocell.batch.run import SegmentOptions

    names = {item.name for item in dataclasses.fields(SegmentOptions)} - {"formats", "channels"}
    return SegmentOptions(
        **{name: given[name] for name in names},
        formats=tuple(given["format"] or ["tif"]),
        channels=_channel_list(given["channels"]),
    )


def _series(folder: Path | None) -> Any:
    from dinocell.upstream.series import default_series_folder, read_series

    if folder is None:
        return read_series(default_series_folder())
    return read_series(folder, files_root=default_series_folder().parent / "dinov3_modified")


def _channel_list(text: str | None) -> tuple[int | str, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError("--channels must name a channel, got nothing: for example --channels 0")
    return tuple(int(part) if part.isdigit() else part for part in parts)


if __name__ == "__main__":
    main()
