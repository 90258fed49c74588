"""What a run starts from, and whether a folder's run may continue with a configuration (ours)."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import dinov3.distributed as distributed
from dinov3.cells.checks import listed
from dinov3.cells.files import move_into_place, write_text_atomically
from dinov3.cells.validation import compare_configs
from dinov3.cells.weights import LoadReport, load_backbone
from dinov3.checkpointer import find_latest_checkpoint
from dinov3.configs import get_default_config
from dinov3.data import CombinedDataLoader

logger = logging.getLogger("dinov3")

_START_FILE = "start.json"
_LOCK_FILE = "run.lock"
_NAMES_COMPARED = 20_000
# What a run has in its folder for each iteration, or reads again when it continues.
_RESULTS = ("ckpt", "eval", "visuals", "nan_logs", "evaluation.jsonl", "lost.jsonl")


@contextlib.contextmanager
def sole_run(output_dir: Path) -> Iterator[None]:
    """Keep a second run out of an output folder; the end of the process, however it comes, frees it.

    The first process holds the lock for all processes of its run.  Where a file system has no locks,
    a warning says so.  Raises ValueError (a run is using the folder).
    """
    if distributed.TorchDistributedEnvironment().rank != 0:
        yield
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        stream = (output_dir / _LOCK_FILE).open("a+", encoding="utf-8")
    except OSError:  # `setup_job` says what is wrong with the folder
        yield
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                logger.warning(
                    "Nothing keeps a second run out of %s (%s)", output_dir, error.strerror
                )
            else:
                stream.seek(0)
                holder = stream.read().strip() or "unknown"
                raise ValueError(
                    f"An output folder must have one run at a time, got {output_dir}, which a run is "
                    f"using ({holder}): wait for its end, or choose another folder"
                ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def check_samples(cfg: DictConfig, loader: Any, output_dir: Path, *, fresh: bool) -> None:
    """Refuse to continue a run when files of its data set have come or gone since its start.

    The order of the samples is drawn from their number: with other files it is another order, and with
    other channels of a field its views are others.  Keeps the number and digests of names and channels
    in OUT/start.json; a run of an earlier version has those of the names alone.

    `loader`: of the batches; `fresh`: the run starts.  Raises ValueError (other samples).
    """
    path = output_dir / _START_FILE
    if not path.is_file():
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    found = _samples(loader)
    known = None if fresh else record.get("samples")
    if known is not None and any(known[key] != found.get(key, known[key]) for key in known):
        if found["count"] != known["count"]:
            what = f"{found['count']} instead of {known['count']} samples"
        elif found["names"] != known["names"]:
            what = "others of the same number"
        else:
            what = "the same fields with other channels"
        if not cfg.accelerator.allow_changed_config:
            raise ValueError(
                f"A resumed run must have the samples that it started with, got {what}: restore or "
                f"remove files of {cfg.train.dataset_path}, or set "
                "accelerator.allow_changed_config=true (the order of the samples changes)"
            )
        logger.warning("The samples are %s since the start of the run", what)
    if known != found and distributed.is_main_process():
        write_text_atomically(path, json.dumps(record | {"samples": found}, indent=1))


def _samples(loader: Any) -> dict[str, Any]:
    """Number of samples and digests of their names and channels, evenly spread ones of many."""
    if isinstance(loader, CombinedDataLoader):  # all resolutions read the same data set
        loader = loader.loaders[0]
    data = loader.dataset
    names, channels = (hashlib.blake2b(digest_size=16) for _ in range(2))
    for index in range(0, len(data), -(-len(data) // _NAMES_COMPARED)):
        names.update(data.get_sample_name(index).encode("utf-8", "surrogateescape") + b"\n")
        own = "\t".join(data.get_sample_channels(index))
        channels.update(own.encode("utf-8", "surrogateescape") + b"\n")
    return {"count": len(data), "names": names.hexdigest(), "channels": channels.hexdigest()}


def check_resumption(cfg: DictConfig, output_dir: Path, resume: bool) -> None:
    """Before anything is written: may this configuration continue the run of the folder?

    Without `resume` or a checkpoint any may.  Raises ValueError (a key that makes it another run has
    changed).
    """
    if not resume or find_latest_checkpoint(output_dir / "ckpt") is None:
        return
    path = output_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"A folder with checkpoints must have the config.yaml of its run, got {output_dir} without: "
            "use another output folder, or start over (`--no-resume`)"
        )
    old = OmegaConf.load(path)
    assert isinstance(old, DictConfig)
    differences = compare_configs(old, cfg, get_default_config())
    if differences and not cfg.accelerator.allow_changed_config:
        raise ValueError(
            f"A resumed run must keep its configuration, got {len(differences)} changes in {output_dir} "
            f"({listed(differences, 10, '; ')}): undo them, use another output folder, or set "
            "accelerator.allow_changed_config=true"
        )


def set_earlier_run_aside(output_dir: Path, resume: bool) -> None:
    """Unless a run continues, keep what an earlier one left in its folder as ckpt_1, eval_1, ...

    Otherwise its teachers, pictures, scores and lost fields would pass for those of the run that starts.
    """
    if distributed.TorchDistributedEnvironment().rank != 0:
        return
    if resume and find_latest_checkpoint(output_dir / "ckpt") is not None:
        return
    left = [path for path in map(output_dir.joinpath, _RESULTS) if path.exists()]
    left = [path for path in left if path.is_file() or any(path.glob("[!.]*"))]

    def numbered(path: Path, number: int) -> Path:
        return path.with_name(f"{path.stem}_{number}{path.suffix}")

    number = 1
    while any(numbered(output_dir / name, number).exists() for name in _RESULTS):
        number += 1
    for path in left:
        move_into_place(path, numbered(path, number))


def start_record(cfg: DictConfig, model: Any, output_dir: Path, *, fresh: bool) -> dict[str, Any]:
    """Fill the networks with initial values, and keep what the run started from in OUT/start.json.

    A resumed run reads the record: the patch embedding keeps its learning rate, and the number of
    processes, which sets the order of the samples, must be the same.

    `model`: the `SSLMetaArch`; `fresh`: there is no checkpoint to resume from.  Raises ValueError
    (another number of processes).
    """
    path = output_dir / _START_FILE
    world = distributed.get_world_size()
    if not fresh and path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["world_size"] != world and not cfg.accelerator.allow_changed_config:
            raise ValueError(
                f"A resumed run must have the {record['world_size']} processes that it started with, "
                f"got {world}: start as many, or set accelerator.allow_changed_config=true (the "
                "order of the samples changes)"
            )
        model.init_weights(from_files=False)
        return record
    model.init_weights()
    report = model.load_report
    adapted = report is not None and report.patch_size_before != cfg.student.patch_size
    multiplier = cfg.patch_adaptation.lr_mult
    record = {
        "world_size": world,
        "seed": cfg.accelerator.seed,
        "pretrained": None if report is None else str(report),
        "from_patch_size": report.patch_size_before if report else None,
        "patch_embed_lr_mult": float(
            multiplier if adapted and multiplier is not None else cfg.optim.patch_embed_lr_mult
        ),
    }
    if distributed.is_main_process():
        write_text_atomically(path, json.dumps(record, indent=1))
    return record


def apply_start_record(cfg: DictConfig, record: dict[str, Any]) -> None:
    """Set the learning rate of a patch embedding that was adapted at the start."""
    if record["patch_embed_lr_mult"] == cfg.optim.patch_embed_lr_mult:
        return
    logger.info(
        "`optim.patch_embed_lr_mult`: %s instead of %s, since the patch embedding was adapted "
        "from patch size %s to %s (patch_adaptation.lr_mult)",
        record["patch_embed_lr_mult"], cfg.optim.patch_embed_lr_mult, record["from_patch_size"],
        cfg.student.patch_size,
    )  # fmt: skip
    cfg.optim.patch_embed_lr_mult = record["patch_embed_lr_mult"]


def fill_student(student: nn.ModuleDict, cfg: DictConfig, *, from_files: bool) -> LoadReport | None:
    """Give a student without storage its starting values, on the CPU.

    `student`: `backbone`, `dino_head` and `ibot_head` on the meta device; changed in place.
    `from_files`: whether to read `student.pretrained_weights` (backbone) and
    `student.resume_from_teacher_chkpt` (backbone and the heads that the file has) after the random
    values were drawn.  Returns what the last file filled; None without a file.  Raises ValueError
    (a head of the file has another shape).
    """
    student.to_empty(device="cpu")
    for module in student.values():
        module.init_weights()  # type: ignore[operator]
    report = None
    for key in ("pretrained_weights", "resume_from_teacher_chkpt"):
        path = cfg.student[key]
        if not path or not from_files:
            continue
        report = load_backbone(student["backbone"], path, patch_method=cfg.patch_adaptation.method)
        logger.info("`student.%s`: %s", key, report)
        if key == "resume_from_teacher_chkpt":
            _load_heads(student, path)
        else:
            logger.info("The heads start at random values: only the backbone of %s is read", path)
    return report


def _load_heads(student: nn.ModuleDict, path: str) -> None:
    """Heads of a teacher file, where it has them; refuses those of another shape."""
    state: dict[str, Any] = {}
    if Path(path).is_file() and Path(path).suffix != ".safetensors":
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("teacher", {}) if isinstance(content, dict) else {}
    for name in ("dino_head", "ibot_head"):
        part = {
            key.removeprefix(f"{name}."): value
            for key, value in state.items()
            if key.startswith(f"{name}.")
        }
        if not part:
            logger.warning("%s starts at random: %s does not have it", name, path)
            continue
        try:
            student[name].load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(
                f"{name} of {path} must fit this configuration, got another shape ({error}): set "
                "the head's sizes to those of the file, or give the file to student.pretrained_weights"
            ) from error
