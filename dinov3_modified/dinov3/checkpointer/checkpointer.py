"""Checkpoints that are whole or absent (matches `dinov3.checkpointer.checkpointer`).

A checkpoint is a folder OUT/ckpt/ITERATION of `torch.distributed.checkpoint` with the entries
`iteration`, `model.*` and `optimizer.*`, as upstream writes and reads it.  It is written beside its
place, with a list of its files and their checksums, and renamed when complete.
"""

import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dinov3.cells.files import move_into_place, write_text_atomically
from dinov3.distributed import is_enabled, is_main_process

logger = logging.getLogger("dinov3")

_MANIFEST = "COMPLETE.json"
_METADATA = ".metadata"


class CheckpointRetentionPolicy(Enum):
    """Which checkpoints stay after a run."""

    ALL = "all"
    BEST = "best"
    LAST = "last"
    LAST_AND_BEST = "last_and_best"
    NONE = "none"

    @property
    def keep_filters(self) -> set[str]:
        """Parts of names that stay."""
        return {
            CheckpointRetentionPolicy.LAST: {"final"},
            CheckpointRetentionPolicy.BEST: {"best"},
            CheckpointRetentionPolicy.LAST_AND_BEST: {"final", "best"},
        }.get(self, set())

    @property
    def max_to_keep(self) -> int | None:
        """How many are kept during a run; None: all."""
        return None if self is CheckpointRetentionPolicy.ALL else 1


# --- saving ---


def save_checkpoint(
    ckpt_dir: str | Path,
    *,
    iteration: int | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    overwrite: bool = True,
    process_group: dist.ProcessGroup | None = None,
    **others: Any,
) -> None:
    """Write a checkpoint; all processes of the group take part.

    `ckpt_dir`: the checkpoint's own folder; `iteration`: the last one that is done, counted from 0;
    `overwrite`: replace an existing checkpoint; `**others`: further entries.  Raises
    FileExistsError (it exists, and `overwrite` is false); OSError (it could not be written; an
    earlier checkpoint is as it was).
    """
    target = Path(ckpt_dir)
    main_process = is_main_process(process_group)
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"A checkpoint must not exist already, got {target}: set `overwrite`, or remove it"
        )
    part = target.with_name(f".{target.name}.part")
    if main_process:
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
    _barrier(process_group)
    state: dict[str, Any] = {"iteration": iteration, **others, "model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    try:
        with _quiet():
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(part, sync_files=True),
                process_group=process_group,
                no_dist=not is_enabled(),
            )
        if main_process:
            facts = [(p.name, p.stat().st_size, _crc32(p)) for p in sorted(part.iterdir())]
            files = {name: {"bytes": size, "crc32": crc} for name, size, crc in facts}
            write_text_atomically(part / _MANIFEST, json.dumps({"files": files}, indent=1))
            _replace_folder(part, target)
    except BaseException as error:
        if main_process:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, (OSError, dcp.api.CheckpointException, RuntimeError)):
            raise OSError(
                f"The checkpoint of iteration {iteration} could not be written to {target.parent} "
                f"({_reason(error)}); earlier checkpoints are intact; make room on the disk, then run "
                "the same command to resume"
            ) from error
        raise
    _barrier(process_group)
    logger.info("Checkpoint of iteration %s saved to %s", iteration, target)


def _replace_folder(part: Path, target: Path) -> None:
    """Put `part` at `target`; an existing folder moves aside until then."""
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        move_into_place(target, aside, flush=False)
    move_into_place(part, target)
    shutil.rmtree(aside, ignore_errors=True)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- loading ---


def load_checkpoint(
    ckpt_dir: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    strict_loading: bool = True,
    process_group: dist.ProcessGroup | None = None,
    **others: Any,
) -> Any:
    """Load a checkpoint into `model` and `optimizer`.

    Args:
        ckpt_dir: the checkpoint's own folder.
        strict_loading: every entry that the model has must be in the checkpoint.
        **others: further entries, loaded in place where they are tensors.

    Returns the iteration it was saved after.  Raises ValueError (it is no checkpoint, or does not
    fit).
    """
    folder = Path(ckpt_dir)
    if not (folder / _METADATA).is_file():
        raise ValueError(f"A checkpoint must hold {_METADATA}, got {folder}: check the path")
    state: dict[str, Any] = {"iteration": None, **others, "model": get_model_state_dict(model)}
    if optimizer is not None:
        # torch makes the entries to load into only where there are no gradients.
        optimizer.zero_grad(set_to_none=True)
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=not strict_loading)
    try:
        with _quiet():
            dcp.load(
                state,
                storage_reader=dcp.FileSystemReader(folder),
                planner=planner,
                process_group=process_group,
                no_dist=not is_enabled(),
            )
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"Checkpoint {folder} must fit this configuration, got an error ({_reason(error)}): use "
            "the configuration that it was made with"
        ) from error
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=strict_loading))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return state["iteration"]


def register_dont_save_hooks(module: nn.Module, dont_save: Sequence[str]) -> None:
    """Leave entries out of the module's state dict, and load it without them.

    `dont_save`: full names in the state dict.
    """
    names = set(dont_save)

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in names:
            state.pop(prefix + name, None)

    def do_not_miss(module: nn.Module, incompatible: Any) -> None:
        found = [key for key in incompatible.missing_keys if key not in names]
        incompatible.missing_keys[:] = found

    module._register_state_dict_hook(leave_out)
    module.register_load_state_dict_post_hook(do_not_miss)


# --- the folder of checkpoints ---


def find_all_checkpoints(ckpt_dir: str | Path) -> list[Path]:
    """Folders named by a number, oldest first; an absent folder has none."""
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def find_latest_checkpoint(ckpt_dir: str | Path) -> Path | None:
    """The checkpoint of the highest iteration, None without."""
    found = find_all_checkpoints(ckpt_dir)
    return found[-1] if found else None


def find_latest_valid_checkpoint(ckpt_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files are whole; damaged ones are skipped with a warning.

    Rank 0 looks, all processes get its answer.  None: the folder has no checkpoint.  Raises
    ValueError (it has some, and all are damaged: starting over would replace them).
    """
    answer: list[str | None] = [None, None]  # checkpoint, or what is wrong with the newest
    if is_main_process():
        for path in reversed(find_all_checkpoints(ckpt_dir)):
            problem = _damage(path)
            if problem is None:
                answer[0] = str(path)
                break
            answer[1] = answer[1] or f"{path.name}: {problem}"
            logger.warning("Checkpoint %s is skipped: %s", path, problem)
    if is_enabled():
        dist.broadcast_object_list(answer, src=0)
    found, newest = answer
    if found is None and newest is not None:
        raise ValueError(
            f"A checkpoint of {ckpt_dir} must be intact to continue, got damaged ones only ({newest}): "
            "restore one, rename a kept copy (ITERATION_keep) to ITERATION, or start over "
            "(`--no-resume`)"
        )
    return None if found is None else Path(found)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is complete."""
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        # Upstream writes no list of files; its folder is renamed when complete, as ours.
        complete = (folder / _METADATA).is_file()
        return None if complete else f"it has neither {_MANIFEST} nor {_METADATA}"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _crc32(path) != expected["crc32"]:
                return f"{name} has another checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read ({error})"
    return None


def keep_last_n_checkpoints(ckpt_dir: str | Path, n: int | None) -> None:
    """Remove all but the newest `n` checkpoints; None keeps all."""
    if n is None:
        return
    for path in find_all_checkpoints(ckpt_dir)[: -max(n, 1)]:
        try:
            shutil.rmtree(path)
            logger.info("Old checkpoint %s removed", path)
        except OSError as error:
            logger.warning("Old checkpoint %s could not be removed: %s", path, error)


def keep_checkpoint_copy(src: str | Path) -> None:
    """Keep a checkpoint beyond `keep_last_n_checkpoints`, as SRC_keep of hard links.

    An existing copy is replaced.
    """
    source = Path(src)
    target = source.with_name(f"{source.name}_keep")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, copy_function=_link_or_copy)
    _replace_folder(part, target)
    logger.info("Checkpoint %s is kept as %s", source, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copy2(source, target)


def cleanup_checkpoint(
    ckpt_dir: str, checkpoint_retention_policy: CheckpointRetentionPolicy
) -> list[Path]:
    """Remove what the policy does not keep from a folder; returns what was removed."""
    folder = Path(ckpt_dir)
    if checkpoint_retention_policy is CheckpointRetentionPolicy.ALL or not folder.is_dir():
        return []
    filters = checkpoint_retention_policy.keep_filters
    removed = []
    for path in sorted(folder.iterdir()):
        if any(part in path.name for part in filters):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path)
    return removed


# --- weights from files ---


def init_fsdp_model_from_checkpoint(
    model: nn.Module,
    checkpoint_path: str,
    skip_load_keys: Sequence[str] | None = None,
    keys_not_sharded: Sequence[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Fill a network, sharded or not, from a teacher file or a teacher's DCP folder.

    Args:
        model: with the modules of the file, such as `backbone` and heads.
        checkpoint_path: `teacher_checkpoint.pth` ({"teacher": ...}), or a folder.
        skip_load_keys: entries with one of these parts in their name are left out.
        keys_not_sharded: without effect; what is sharded is seen from the network.

    Raises FileNotFoundError (no such file or folder); WeightsError (it is no teacher, or keys or
    shapes differ; all are listed).
    """
    from dinov3.cells.weights import read_teacher, refuse_differences

    skipped = tuple(skip_load_keys or ())

    def kept(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in entries.items() if not any(part in k for part in skipped)}

    state = kept(read_teacher(Path(checkpoint_path)))
    refuse_differences(
        state,
        {key: tuple(value.shape) for key, value in kept(model.state_dict()).items()},
        f"A teacher must fit the network, got differences in {checkpoint_path}",
        "set the configuration to that of the file",
    )
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)


def init_model_from_checkpoint_for_evals(
    model: nn.Module, pretrained_weights: str | Path, checkpoint_key: str | None = None
) -> None:
    """Fill a backbone for evaluation, from any file that `cells.weights` reads.

    `checkpoint_key`: "student" or "teacher" (the default) of a file with both.
    """
    from dinov3.cells.weights import load_backbone

    load_backbone(model, pretrained_weights, which=checkpoint_key or "teacher")


def _barrier(group: dist.ProcessGroup | None) -> None:
    if is_enabled():
        dist.barrier(group=group)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notices about saving from one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
