"""A small pretraining on real fields: `multiview` against `average`, with the anti-collapse figures.

    python benchmarks/ssl_small_run.py index              # list of the images, runs/ssl/cells_index.csv
    python benchmarks/ssl_small_run.py train multiview    # or average, single, pairwise
    python benchmarks/ssl_small_run.py report             # benchmarks/results/ssl_small_run.json
    python benchmarks/ssl_small_run.py random             # benchmarks/results/ssl_random_weights.json

Each training leaves its checkpoints, metrics and pictures in runs/ssl/cells_STRATEGY and its start
in runs/ssl/cells_start.pth.  Fields of two plates (val) are never trained on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("DINOCELL_DATA", ROOT / ".." / "shared" / "data")).resolve()
FOLDER = Path("runs/ssl")
INDEX = FOLDER / "cells_index.csv"
CONFIG = ROOT / "configs" / "ssl" / "cells_tiny.yaml"
RESULT = ROOT / "benchmarks" / "results" / "ssl_small_run.json"
RANDOM_RESULT = RESULT.with_name("ssl_random_weights.json")
VAL = ("pediatric_BR00143976", "nf1_F7")
# Fields with several channels are few: listed so often, they are about half of what is seen.
REPEATS = 60
SKIPPED = ("mask", "brightfield")
WINDOW_PX, WINDOWS = 96, 16  # of the report
EVALUATION = (
    "ssl_evaluation.hook=dinocell.pretraining.teacher_evaluation:make_evaluation",
    "ssl_evaluation.period_iterations=150",
    f"ssl_evaluation.data={DATA / 'dsb2018'}",
    "ssl_evaluation.max_seconds=100000",  # every score from the same number of steps
)
SEEDS = (0, 1)  # of the networks with random weights


def write_index() -> None:
    """One row a channel file: multi-channel fields, then single-channel images of the train splits."""
    rows = []
    with (DATA / "cellpainting" / "channels.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["channel"].lower() in SKIPPED:
                continue
            path = DATA / "cellpainting" / row["file"]
            # Five fields of one channel share a folder, and so a name, in this table.
            name = f"bbbc022/{path.stem}" if row["field"] == "bbbc022_dna" else row["field"]
            several = row["field"] != "bbbc022_dna"
            for number in range(REPEATS if several and name not in VAL else 1):
                rows.append(
                    (f"{name}@{number}", path, row["channel"], "val" if name in VAL else "train")
                )
    for source in ("dsb2018", "bbbc039"):
        for path in sorted((DATA / source / "train" / "images").iterdir()):
            rows.append((f"{source}/{path.stem}", path, "DNA", "train"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with INDEX.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["field", "file", "channel", "split"])
        writer.writerows(rows)
    print(f"{INDEX}: {len({row[0] for row in rows})} fields, {len(rows)} images")


def train(strategy: str, overrides: list[str]) -> None:
    """Pretrain, and write the weights it started from."""
    import torch

    from dinocell.pretraining.run import pretrain

    start = FOLDER / "cells_start.pth"
    if not start.is_file():
        torch.save(start_network(0)[0].student.backbone.state_dict(), start)
    changes = [f"multiview.strategy={strategy}", *EVALUATION, *overrides]
    print(pretrain(CONFIG, changes, output_dir=FOLDER / f"cells_{strategy}"))


def start_network(seed: int) -> tuple[Any, Any]:
    """The networks of a run before its first step, and their configuration."""
    import torch

    from dinov3.configs import config
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    args = config.DinoV3SetupArgs(
        str(CONFIG), output_dir=str(FOLDER / "start"), opts=list(EVALUATION)
    )
    cfg = config.get_cfg_from_args(args)
    torch.manual_seed(seed)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    model.init_weights()
    return model, cfg


def score_random_weights() -> None:
    """The decoder's scores on frozen random features: what a pretraining has to beat."""
    from dinocell.pretraining.teacher_evaluation import make_evaluation

    scores = []
    for seed in SEEDS:
        model, cfg = start_network(seed)
        out = FOLDER / f"random_{seed}"
        out.mkdir(parents=True, exist_ok=True)
        found = make_evaluation(cfg)(model.student.backbone, 0, out)
        scores.append({"seed": seed, **found})
        print(scores[-1], flush=True)
    result = {"command": "python benchmarks/ssl_small_run.py random", "scores": scores}
    RANDOM_RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RANDOM_RESULT}")


def report() -> None:
    """Consistency of each run's teacher and of the common start, on trained and on held-out fields."""
    from dinocell.probing.fields import FieldOptions
    from dinocell.probing.inspection import InspectOptions, inspect_checkpoints

    checkpoints = {"start": FOLDER / "cells_start.pth"}
    for folder in sorted(FOLDER.glob("cells_*/eval")):
        newest = max(folder.glob("training_*"), key=lambda p: int(p.name.split("_")[1]))
        checkpoints[folder.parent.name] = newest / "teacher_checkpoint.pth"
    with INDEX.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["field"].endswith("@0")]
    result: dict[str, object] = {"command": "python benchmarks/ssl_small_run.py report"}
    for split in ("train", "val"):
        index = FOLDER / f"inspect_{split}.csv"
        with index.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["field", "file", "channel"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if row["split"] == split)
        found = inspect_checkpoints(
            list(checkpoints.values()),
            FOLDER,
            InspectOptions(windows_per_field=WINDOWS, window_px=WINDOW_PX),
            reading=FieldOptions(index=index),
        )
        print(f"\n{split}", *found.table(), sep="\n")
        result[split] = found.to_mapping()
    curves, evaluations = {}, {}
    for name in checkpoints:
        path = FOLDER / name / "evaluation.jsonl"
        if path.is_file():
            evaluations[name] = [json.loads(line) for line in path.read_text().splitlines()]
        files = [FOLDER / name / f"{kind}_metrics.json" for kind in ("training", "monitor")]
        if files[0].is_file():
            texts = [path.read_text() for path in files if path.is_file()]
            lines = [json.loads(line) for text in texts for line in text.splitlines()]
            # Norms of every block are in the run's own file.
            curves[name] = [{k: v for k, v in line.items() if k.count("/") < 2} for line in lines]
    result["evaluations"] = evaluations
    result["curves"] = curves
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULT}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("index", "train", "report", "random"))
    parser.add_argument("strategy", nargs="?", default="multiview")
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_args()
    if args.step == "index":
        write_index()
    elif args.step == "train":
        train(args.strategy, args.overrides)
    elif args.step == "random":
        score_random_weights()
    else:
        report()


if __name__ == "__main__":
    main()
