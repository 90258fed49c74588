"""Does consistency across channels help?  Arms of pretraining × seeds, and what their features can do.

    python benchmarks/ssl_proof/run.py                 # train what is missing, score it, write the table
    python benchmarks/ssl_proof/run.py --only dense    # one arm
    python benchmarks/ssl_proof/run.py --report        # the table alone
    python benchmarks/ssl_proof/run.py --start dinocell-tiny   # continued from trained weights
    python benchmarks/ssl_proof/run.py --generated 2400   # with more fields

Resumable: a training continues from its checkpoint, and a finished score is kept.  Runs stay in
`--folder`, results in benchmarks/results/ssl_proof_STEPS.json (ssl_proof_START_STEPS.json,
ssl_proof_fieldsNUMBER_STEPS.json); what such a file has is not run again.  Where a file lacks a read-out
that was added later, the network is trained again, if its folder is gone, and that read-out alone is made
(`added` has its commit).  Seconds of an interrupted training are those of its last part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import data
import readouts
import report
import torch

from dinocell.files import write_text_atomically

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent))  # for measure.py
DATA = Path(os.environ.get("DINOCELL_DATA", ROOT / ".." / "shared" / "data")).resolve()
RESULTS = ROOT / "benchmarks" / "results"

# All arms have the same windows, turns and photometrics; the channels of the two views differ, and in `cls`
# and `average_cls` the loss: the others also ask for agreement at every patch, as `dense` does.  The local
# crop is the mean or a channel in `cls`, `dense` and `shuffled`, the mean in `average` and `average_cls`, a
# channel elsewhere.  With a start, `random` is the start as it is.
ARMS: dict[str, tuple[str, ...]] = {
    "random": (),  # no training
    "single": ("multiview.strategy=single",),
    "average": ("multiview.strategy=average",),
    "average_cls": ("multiview.strategy=average", "multiview.dense_weight=0"),  # control of `cls`
    "cls": ("multiview.dense_weight=0",),
    "dense": (),
    "others": ("multiview.strategy=others",),
    "shuffled": (),  # as `dense`, with channels of different places: a control that must not help
}


def vit_proof(patch_size: int = 8, **kwargs: Any) -> Any:
    """`student.arch: vit_proof`: 96 wide, 4 blocks, 4 heads."""
    from dinov3.models.vision_transformer import DinoVisionTransformer

    return DinoVisionTransformer(
        patch_size=patch_size, embed_dim=96, depth=4, num_heads=4, ffn_ratio=4, **kwargs
    )


# A trained ViT-Ti is changed at a quarter of the rate that suits random weights of a smaller network.
START = (
    "student.arch=vit_tiny",
    "student.n_storage_tokens=4",
    "student.mask_k_bias=true",
    "optim.lr=1.4e-4",
)


def train(arm: str, seed: int, steps: int, folder: Path, start: str | None = None) -> Path | str:
    """The teacher file of an arm; for `random` the weights that all arms of this seed begin with."""
    from dinocell.pretraining.run import pretrain
    from dinov3.models import vision_transformer

    vision_transformer.vit_proof = vit_proof
    out = folder / f"{arm}_{seed}"
    if arm == "random":
        return start or _start(seed, out)
    index = folder / "fields" / ("shuffled.csv" if arm == "shuffled" else "fields.csv")
    changes = [
        f"train.dataset_path=JUMPCellPaintingMultiView:root={index.parent}:index={index}:missing=allow:cache_mb=6000",
        f"optim.epochs={steps // 100}",
        f"train.seed={seed}",
        *ARMS[arm],
        *((*START, f"student.pretrained_weights={start}") if start else ()),
    ]
    return pretrain(HERE / "proof.yaml", changes, output_dir=out, seed=seed)


def _start(seed: int, out: Path) -> Path:
    """Weights before the first step, in a file that reads as a teacher's."""
    from dinov3.configs import config
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    path = out / "start.pth"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        args = config.DinoV3SetupArgs(str(HERE / "proof.yaml"), output_dir=str(out), opts=[])
        torch.manual_seed(seed)
        model = SSLMetaArch(config.get_cfg_from_args(args))
        model.prepare_for_distributed_training()
        model.init_weights()
        torch.save(model.student.backbone.state_dict(), path)
    return path


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        help="runs/ssl_proof, or runs/ssl_proof_fieldsNUMBER for other fields",
    )
    parser.add_argument("--steps", type=int, default=400, help="a multiple of 100")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, default=3, help="the seeds 0, 1, ...")
    which.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument(
        "--generated", type=int, default=data.GENERATED, help="fields, beside the real ones"
    )
    parser.add_argument("--only", choices=ARMS, action="append", help="these arms; repeatable")
    parser.add_argument(
        "--start",
        help="a bundled ViT-Ti/8 in place of random weights: dinocell-tiny; no decoder is trained on its "
        "features, which would take longer than the pretraining",
    )
    parser.add_argument("--report", action="store_true", help="only the table of finished runs")
    args = parser.parse_args()
    fields = "" if args.generated == data.GENERATED else f"fields{args.generated}_"
    folder: Path = (args.folder or Path(f"runs/ssl_proof_{fields}".rstrip("_"))).resolve()
    name = f"ssl_proof_{args.start}_" if args.start else "ssl_proof_"
    found = _finished(folder, args.steps, name, args.generated)
    if not args.report:
        data.write_training_fields(DATA, folder / "fields", args.generated)
        for seed in range(args.seeds) if args.seed is None else (args.seed,):
            for arm in args.only or ARMS:
                row = found.get((arm, seed))
                if row is None or not readouts.is_complete(row, more=args.start is None):
                    _run(arm, seed, args, folder, row)
        found = _finished(folder, args.steps, name, args.generated)
    rows = [found[key] for key in sorted(found) if args.seed is not None or key[1] < args.seeds]
    if not rows:
        raise SystemExit(f"No run of {args.steps} steps is finished in {folder}")
    result = report.summary(rows, args.steps, args.start, args.generated)
    path = RESULTS / f"{name}{fields}{args.steps}.json"
    write_text_atomically(path, json.dumps(result, indent=1) + "\n")
    print(*report.table(result), f"written: {path}", sep="\n")


def _finished(
    folder: Path, steps: int, name: str, generated: int = data.GENERATED
) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of finished runs of so many steps, by arm and seed: those in files of results, then the folder's.

    `name` is how the files begin, before the number of fields and steps.  Random weights have had no step,
    so that their rows count for every number.
    """
    rows = []
    for kind in ("[0-9]", "fields"):
        for path in sorted(RESULTS.glob(f"{name}{kind}*.json")):
            rows += json.loads(path.read_text())["runs"]
    rows += [json.loads(path.read_text()) for path in sorted(folder.glob("*/score.json"))]
    rows.sort(key=readouts.is_complete)  # of two rows the last counts
    chosen = (
        row
        for row in rows
        if row["arm"] == "random"
        or (row["steps"], row.get("generated", data.GENERATED)) == (steps, generated)
    )
    return {(row["arm"], row["seed"]): row for row in chosen}


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _run(
    arm: str, seed: int, args: argparse.Namespace, folder: Path, known: dict[str, Any] | None = None
) -> None:
    """Train and score; of a row that is `known` only what it lacks is made."""
    steps, more = args.steps, args.start is None
    path = folder / f"{arm}_{seed}" / "score.json"
    if path.is_file():
        known = json.loads(path.read_text())
        if (known["steps"], known.get("generated", data.GENERATED)) != (steps, args.generated):
            raise SystemExit(
                f"{path.parent} holds a run of another number of steps or fields: give --folder"
            )
        if readouts.is_complete(known, more=more):
            return
    started = time.process_time()
    teacher = train(arm, seed, steps, folder, args.start)
    trained = time.process_time()
    scores = readouts.score(teacher, DATA, more=more, known=known)
    seconds = {"train_s": trained - started, "score_s": time.process_time() - trained}
    row: dict[str, Any] = {"arm": arm, "seed": seed, "steps": steps, "commit": _commit()}
    added = {**seconds, "commit": row["commit"]}
    row |= {**known, "added": added} if known else {"generated": args.generated, **seconds}
    write_text_atomically(path, json.dumps(row | scores) + "\n")
    print(f"{arm} seed {seed}: {seconds}", flush=True)


if __name__ == "__main__":
    main()
