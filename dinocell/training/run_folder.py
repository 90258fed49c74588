"""The files of a training run: configuration, metrics, checkpoints and models."""

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from dinocell.errors import CheckpointError, ConfigError, MissingExtraError
from dinocell.files import atomic_path, write_text_atomically
from dinocell.settings import config_from_mapping, config_to_mapping
from dinocell.training.config import TrainConfig

# Keys that may differ between a run and its continuation: they change where and how fast, not what.
_FREE_KEYS = (
    *("device", "wandb", "output_dir", "description", "licence"),
    *("data.num_workers", "data.cache_bytes"),
    *("schedule.log_every", "schedule.keep_checkpoints", "schedule.checkpoint_every"),
)
_CHECKPOINT = re.compile(r"step_(\d+)\.pt")


class RunFolder:
    """Names and small files of a run; only process 0 writes here."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.path = Path(config.output_dir)
        self.checkpoints = self.path / "checkpoints"  # `step_NNNNNNNN.pt` each
        self.metrics = self.path / "metrics.jsonl"  # one JSON object per line with its `step`
        self.best = self.path / "best.safetensors"  # the best model so far
        self.model = self.path / "model.safetensors"
        self.curves = self.path / "curves.png"  # picture of the metrics
        self._wandb: Any = None

    def claim(self) -> None:
        """Make the folder; ConfigError if it holds a run of another configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_other_run(self.config)

    def write_config(self) -> None:
        """Write `config.yaml`, the resolved configuration."""
        text = yaml.safe_dump(config_to_mapping(self.config), sort_keys=False)
        write_text_atomically(self.path / "config.yaml", text)

    def log(self, row: dict[str, Any]) -> None:
        """Append the metrics of a step to `metrics.jsonl` and send them to Weights & Biases."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log(row, step=row["step"])

    def drop_metrics(self, step: int, *, unvalidated: bool) -> None:
        """Drop lines of steps after `step`, and its own validation if that will be repeated."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                again = step if unvalidated and "val_seconds" in row else step + 1
                if row["step"] < again:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # a line cut by a crash
        write_text_atomically(self.metrics, "".join(line + "\n" for line in kept))

    @contextmanager
    def wandb(self, *, is_main: bool) -> Iterator[None]:
        """Send what is logged inside to Weights & Biases too, if the configuration asks for it.

        Raises MissingExtraError (the package is not installed; in all processes, so that all end
        alike).
        """
        settings = self.config.wandb
        if settings.enabled and importlib.util.find_spec("wandb") is None:
            raise MissingExtraError(
                "`wandb.enabled` needs the package wandb, which is not installed: run "
                "pip install '.[wandb]' in the clone of DINOCell"
            )
        if not (settings.enabled and is_main):
            yield
            return
        from omegaconf import OmegaConf

        from dinov3.cells.hooks import sections
        from dinov3.logging.wandb_logger import WandbLogger

        earlier, identity = self.path / "wandb_id", self.path / "wandb_run_id.txt"
        if earlier.exists() and not identity.exists():  # of a run that an earlier version began
            write_text_atomically(identity, earlier.read_text(encoding="utf-8"))
        name = settings.name or self.config.name
        mapping = config_to_mapping(self.config) | {
            "wandb": {"enabled": True, "project": settings.project, "name": name},
            "train": {"output_dir": str(self.path)},
        }
        self._wandb = WandbLogger(sections(OmegaConf.create(mapping)))
        exit_code = 1
        try:
            yield
            exit_code = 0
        finally:
            self._wandb.finish(exit_code)
            self._wandb = None


def refuse_other_run(config: TrainConfig) -> None:
    """Raise ConfigError if `config.output_dir` holds a run of another configuration."""
    path = Path(config.output_dir) / "config.yaml"
    if not path.exists():
        return
    try:
        earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        earlier = None
    differing = _differing_keys(earlier, config_to_mapping(config))
    if differing:
        raise ConfigError(
            f"A run must continue with its own configuration, got other values of "
            f"{', '.join(differing[:5])} than {path}: choose another output_dir"
        )


def _differing_keys(earlier: Any, now: dict[str, Any]) -> list[str]:
    if not isinstance(earlier, dict):
        return ["config.yaml (unreadable)"]
    if isinstance(optimizer := earlier.get("optimizer"), dict):
        # Runs of earlier versions had one process, where it changes nothing.
        optimizer.setdefault("scaling_rule", now["optimizer"]["scaling_rule"])
    # A key that an earlier version did not know had its default.
    with contextlib.suppress(ConfigError):
        earlier = config_to_mapping(config_from_mapping(TrainConfig, earlier))
    differing = []

    def compare(left: Any, right: Any, path: str) -> None:
        if path in _FREE_KEYS:
            return
        if isinstance(left, dict) and isinstance(right, dict):
            for key in sorted(left.keys() | right.keys()):
                compare(left.get(key), right.get(key), f"{path}.{key}" if path else key)
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            for index, pair in enumerate(zip(left, right, strict=True)):
                compare(*pair, f"{path}.{index}")
        elif left != right:
            differing.append(path)

    compare(earlier, now, "")
    return differing


def find_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in `folder`, oldest first; empty when there is none."""
    paths = Path(folder).glob("step_*.pt")
    named = ((_CHECKPOINT.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in named if match)


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `step_NNNNNNNN.pt` under a temporary name, rename, then drop all but the newest `keep`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
    for _, old in find_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary that `save_checkpoint` was given, tensors on the CPU.

    Raises CheckpointError (truncated, or with objects other than tensors, numbers, text, lists and
    dicts).
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"A training checkpoint must be complete, got {path} ({reason}): delete it to "
            "continue from the one before"
        ) from error
