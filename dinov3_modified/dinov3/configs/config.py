"""Reading, checking and writing a run's configuration (matches `dinov3.configs.config`)."""

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

import dinov3.distributed as distributed
from dinov3.cells.files import atomic_path
from dinov3.cells.ranges import RANGES
from dinov3.cells.validation import check_keys, warn_of_ignored_keys

logger = logging.getLogger("dinov3")

# Keys whose values may start with "~", the home folder; data set strings expand their own.
_PATHS = (
    "student.pretrained_weights", "student.resume_from_teacher_chkpt", "gram.ckpt",
    "distillation.checkpoint_path", "distillation.full_cfg_path", "streaming.store",
    "streaming.pool_folder", "streaming.disk_cache", "ssl_evaluation.data",
)  # fmt: skip


@dataclass
class DinoV3SetupArgs:
    """What `setup_config` reads, for callers without a command line."""

    config_file: str  # YAML with the keys to change, or ""
    # pretrained_weights, shard_unsharded_model: for `build_model_for_eval`
    pretrained_weights: str | None = None
    shard_unsharded_model: bool = False
    output_dir: str = ""  # folder of the run
    opts: list[Any] = field(default_factory=list)  # `key=value` changes, which come last


def get_default_config() -> DictConfig:
    """The contents of `ssl_default_config.yaml` and of `dinocell.yaml`."""
    folder = Path(__file__).parent
    cfg = OmegaConf.merge(
        OmegaConf.load(folder / "ssl_default_config.yaml"),
        OmegaConf.load(folder.parent / "cells" / "dinocell.yaml"),
    )
    assert isinstance(cfg, DictConfig)
    return cfg


def get_cfg_from_args(
    args: Any, multidistillation: bool = False, strict: bool = True
) -> DictConfig:
    """Defaults, then the file, then `key=value` changes.

    `args`: with `config_file`, `output_dir` and `opts`; `multidistillation`: not in this tree;
    `strict`: refuse unknown keys and wrong types.  Raises FileNotFoundError (no such file);
    ValueError (not YAML of keys, unknown keys, wrong types, a change without "=").
    """
    if multidistillation:
        setup_multidistillation(args)
    default = get_default_config()
    parts: list[tuple[str, DictConfig]] = []
    if args.config_file:
        parts.append((str(args.config_file), _read(Path(args.config_file))))
    opts = list(args.opts or [])
    output_dir = os.path.abspath(os.path.expanduser(args.output_dir or "."))
    for item in opts:
        if not isinstance(item, str) or "=" not in item:
            raise ValueError(f"Changes must be key=value, got {item!r}: such as optim.lr=0.0005")
    try:
        parts.append(("the command line", OmegaConf.from_dotlist(opts)))
    except Exception as error:
        raise ValueError(
            f"Changes must be key=value, got {opts} ({error}): correct this change"
        ) from error
    parts.append(("--output-dir", OmegaConf.create({"train": {"output_dir": output_dir}})))
    merged = default
    for source, part in parts:
        if strict:
            check_keys(part, default, source)
        merged = OmegaConf.merge(merged, part)  # type: ignore[assignment]
    OmegaConf.resolve(merged)
    for key, allowed in RANGES.items():
        if allowed.whole:
            OmegaConf.update(merged, key, _whole(OmegaConf.select(merged, key)))
    for key in _PATHS:
        if str(value := OmegaConf.select(merged, key)).startswith("~"):
            OmegaConf.update(merged, key, os.path.expanduser(value))
    return merged


def _whole(value: Any) -> Any:
    """2.0 as 2, also in a list, for the functions that take nothing else."""
    if isinstance(value, ListConfig):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"--config-file must be a file, got {path}: check the path")
    try:
        cfg = OmegaConf.load(path)
    except Exception as error:
        raise ValueError(
            f"{path} must be YAML, got an error {_place(path, error)}: correct this line"
        ) from error
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"{path} must hold keys, got {type(cfg).__name__}: see configs/ssl")
    return cfg


def _place(path: Path, error: Exception) -> str:
    """Line, key and reason of an error in a YAML file."""
    reason = str(error).splitlines()[0]
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"({reason})"
    number = error.problem_mark.line + 1
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[:number]
    keys = [found[1] for line in lines if (found := re.match(r"\s*([\w.]+)\s*:", line))]
    near = f", at or after the key {keys[-1]}" if keys else ""
    return f"in line {number}{near} ({error.problem or reason})"


def global_batch_size(cfg: DictConfig) -> int:
    """Samples of one optimiser step over all processes and accumulated batches (ours)."""
    world = distributed.get_world_size()
    return int(cfg.train.batch_size_per_gpu) * world * int(cfg.accelerator.accumulation_steps)


def lr_scale(cfg: DictConfig) -> float:
    """Factor of the rule `optim.scaling_rule` on the peak learning rate (ours)."""
    batch = global_batch_size(cfg)
    if cfg.optim.scaling_rule == "linear_wrt_256":
        return batch / 256.0
    if cfg.optim.scaling_rule == "sqrt_wrt_1024":
        return 4 * math.sqrt(batch / 1024.0)
    return 1.0


def apply_scaling_rules_to_cfg(cfg: DictConfig) -> DictConfig:
    """Scale `optim.lr` by the batch of all processes, as `optim.scaling_rule` says.

    sqrt_wrt_1024: times 4 sqrt(batch / 1024); linear_wrt_256: times batch / 256; anything else: as
    it is.  With a `schedules` section the schedules scale themselves.
    """
    if "schedules" in cfg:
        return cfg
    before, rule = cfg.optim.lr, cfg.optim.scaling_rule
    cfg.optim.lr = before * lr_scale(cfg)
    line = "optim.lr: %.4g for a batch of %d (%s, configured %.4g)"
    logger.info(line, cfg.optim.lr, global_batch_size(cfg), rule, before)
    return cfg


def write_config(cfg: DictConfig, output_dir: str, name: str = "config.yaml") -> str:
    """Write the configuration to OUT/config.yaml; returns the path."""
    path = Path(output_dir) / name
    with atomic_path(path) as temporary:
        OmegaConf.save(cfg, temporary)
    return str(path)


def setup_config(args: Any, strict_cfg: bool = True) -> DictConfig:
    """The configuration of a run: merged, checked, written to its folder, rates scaled."""
    cfg = get_cfg_from_args(args, strict=strict_cfg)
    warn_of_ignored_keys(cfg, get_default_config())
    if args.output_dir is not None and distributed.is_main_process():
        write_config(cfg, args.output_dir)
    return apply_scaling_rules_to_cfg(cfg)


def setup_job(
    output_dir: str | None = None,
    distributed_enabled: bool = True,
    logging_enabled: bool = True,
    seed: int | None = 0,
    restrict_print_to_main_process: bool = True,
    distributed_timeout: timedelta | None = None,
) -> None:
    """Folder, log, process group and seeds of a run.

    `output_dir`: made if need be; the log goes to OUT/logs.  `seed`: of Python, NumPy and torch;
    the rank is added.  None leaves them.  Raises ValueError (the folder cannot be made or written).
    """
    from dinov3.logging import setup_logging
    from dinov3.utils import fix_random_seeds

    if output_dir is not None:
        output_dir = os.path.abspath(output_dir)
        try:
            os.makedirs(output_dir, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"The output folder must be one that can be made, got {output_dir} "
                f"({error.strerror}): choose another folder"
            ) from error
        if not os.access(output_dir, os.W_OK | os.X_OK):
            raise ValueError(
                f"The output folder must be writable, got {output_dir}: name another folder"
            )
    if logging_enabled:
        setup_logging(output=output_dir, level=logging.INFO)
        setup_logging(output=output_dir, level=logging.INFO, name="dinov3")
    if distributed_enabled:
        distributed.enable(
            overwrite=True,
            nccl_async_error_handling=True,
            restrict_print_to_main_process=restrict_print_to_main_process,
            timeout=distributed_timeout,
        )
    if seed is not None:
        fix_random_seeds(seed + distributed.get_rank())


def exit_job(distributed_enabled: bool = True, logging_enabled: bool = True) -> None:
    """Undo `setup_job`."""
    from dinov3.logging import cleanup_logging

    if distributed_enabled:
        distributed.disable()
    if logging_enabled:
        cleanup_logging()


def setup_multidistillation(args: Any) -> Sequence[Any]:
    """Refuses: one student is trained here; raises NotImplementedError (always)."""
    raise NotImplementedError(
        "--multi-distillation must not be given, got it: this tree trains one student; use "
        "distillation.enabled for a frozen teacher"
    )
