"""In-training evaluation of self-supervised learning: is the teacher good for cells yet?

The `dinov3` tree loads `make_evaluation` by its name in `ssl_evaluation.hook` and calls what it
returns every `ssl_evaluation.period_iterations`.  Each time a small decoder is trained on frozen
features of the teacher for a labelled set and scored on held-out images; the numbers go to the
run's log and to `evaluation.jsonl`.

The decoder and its order of windows start from the same seed every time, so that differences come
from the features.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinocell.errors import ConfigError, DataSetError, DINOCellError
from dinocell.files import write_text_atomically
from dinocell.pairs import find_pairs
from dinocell.probing.decoder_probe import (
    LabelledWindow,
    ProbeConfig,
    ProbeResult,
    probe_features,
    read_windows,
)

__all__ = ["RESULTS_NAME", "Evaluation", "make_evaluation"]

RESULTS_NAME = "evaluation.jsonl"
"""In the output folder of the run: one line per evaluation."""

_PREFIX = "eval/"
_PARTS = ("train", "val")
_WRAPPER_PARTS = ("_orig_mod.", "_checkpoint_wrapped_module.", "module.")

logger = logging.getLogger("dinov3")


class Evaluation:
    """Callable that scores a backbone; made by `make_evaluation`.

    Attributes
    ----------
    config : ProbeConfig
    train, val : lists of LabelledWindow
        Read once, at the start of the run.
    fingerprint : str
        Of the config and the windows; results of another fingerprint are not reused.
    """

    def __init__(
        self,
        config: ProbeConfig,
        train: list[LabelledWindow],
        val: list[LabelledWindow],
        student: Any = None,
    ) -> None:
        self.config = config
        self.train = train
        self.val = val
        self.fingerprint = _fingerprint(config, train, val)
        self._student = student

    def __call__(self, backbone: nn.Module, iteration: int, output_dir: Path) -> dict[str, float]:
        """Score the backbone as it is now.

        Parameters
        ----------
        backbone : DinoVisionTransformer
            The teacher's.  A copy is evaluated: weights, mode and random generators of the training
            stay as they are.  With FSDP every process must make the call, because the weights are
            gathered; only the first evaluates.
        iteration : int
        output_dir : path
            Of the run; holds `evaluation.jsonl`.

        Returns
        -------
        dict of float
            ``eval/op_csb``, ``eval/seg``, ``eval/det``, ``eval/ap50``, ``eval/ap75``,
            ``eval/f1_50``, ``eval/mse``, ``eval/train_loss``, ``eval/steps``, ``eval/seconds``.
            Read from `evaluation.jsonl` where this iteration was done before.  Empty in processes
            other than the first, and after a failure, which is logged and never raised.
        """
        try:
            return self._evaluate(backbone, iteration, Path(output_dir) / RESULTS_NAME)
        except Exception as error:  # an evaluation never stops a training run
            # With its traceback where the fault is not a foreseen one.
            unforeseen = not isinstance(error, DINOCellError)
            logger.error(
                "evaluation at iteration %d failed, training goes on: %s",
                iteration,
                error,
                exc_info=unforeseen,
            )
            return {}

    def _evaluate(self, backbone: nn.Module, iteration: int, path: Path) -> dict[str, float]:
        first = not _is_distributed() or torch.distributed.get_rank() == 0
        sharded = any(_is_sharded(value) for value in backbone.state_dict().values())
        if not first and not sharded:
            return {}
        # Sharded weights are gathered by all processes, whatever the first one finds in its file.
        frozen = _gathered_copy(backbone, self._student) if sharded else None
        if not first:
            return {}
        rows = _read_rows(path)
        for row in rows:
            if row.get("iteration") == iteration and row.get("fingerprint") == self.fingerprint:
                logger.info("evaluation at iteration %d was done before: %s", iteration, path)
                return {str(key): float(value) for key, value in row["metrics"].items()}
        frozen = _frozen_copy(backbone) if frozen is None else frozen
        result = probe_features(frozen, self.train, self.val, self.config)
        if result.steps < self.config.steps:
            logger.warning(
                "evaluation at iteration %d: %d of %d decoder steps in ssl_evaluation.max_seconds %g; "
                "its scores do not compare with those of full trainings",
                iteration,
                result.steps,
                self.config.steps,
                self.config.max_seconds,
            )
        metrics = _metrics(result)
        rows = [row for row in rows if row.get("iteration") != iteration]
        rows.append({"iteration": iteration, "fingerprint": self.fingerprint, "metrics": metrics})
        _write_rows(path, rows)
        logger.info(
            "evaluation at iteration %d: %s",
            iteration,
            ", ".join(f"{key.removeprefix(_PREFIX)} {value:.4g}" for key, value in metrics.items()),
        )
        return metrics


def make_evaluation(cfg: Any) -> Evaluation:
    """The evaluation that the section `ssl_evaluation` of a training configuration asks for.

    Reads and checks the labelled images at once, so that a wrong folder is told before the run
    starts.

    Parameters
    ----------
    cfg : OmegaConf config or nested mapping
        Sections `ssl_evaluation` and `student`.

    Returns
    -------
    Evaluation

    Raises
    ------
    ConfigError
        A value is missing or out of range, or the window does not fit `student.patch_size`.
    DataSetError, ImageFileError
        The folder is not `train` and `val`, each with `images` and `labels`, paired by name, with
        cells.
    """
    section = _plain(cfg["ssl_evaluation"])
    student = cfg["student"]
    try:
        config = ProbeConfig(
            window_px=_whole(section, "window_px"),
            windows_per_image=_whole(section, "windows_per_image"),
            decoder=str(_value(section, "decoder")),
            steps=_whole(section, "steps"),
            batch_size=_whole(section, "batch_size"),
            lr=_number(section, "lr"),
            max_seconds=_number(section, "max_seconds"),
            seed=_whole(section, "seed"),
        )
    except ValueError as error:
        raise ConfigError(f"in ssl_evaluation, {error}") from error
    patch = int(student["patch_size"])
    if config.window_px % patch:
        raise ConfigError(
            f"ssl_evaluation.window_px must be a multiple of student.patch_size {patch}, got "
            f"{config.window_px}: {max(1, round(config.window_px / patch)) * patch} is next"
        )
    counts = {part: _whole(section, f"{part}_images") for part in _PARTS}
    for part, count in counts.items():
        if count < 1:
            raise ConfigError(
                f"ssl_evaluation.{part}_images must be at least 1, got {count}: raise it"
            )
    data = str(_value(section, "data") or "")
    if not data or not Path(data).is_dir():
        raise DataSetError(
            f"ssl_evaluation.data must be a folder with train and val, got {data or 'nothing'}: name "
            "a labelled set, or switch the evaluation off with ssl_evaluation.period_iterations=0"
        )
    windows: dict[str, list[LabelledWindow]] = {}
    for part in _PARTS:
        folder = Path(data) / part
        pairs = find_pairs(folder / "images", folder / "labels", f"{Path(data).name}/{part}")
        windows[part] = read_windows(
            pairs,
            window_px=config.window_px,
            windows_per_image=config.windows_per_image,
            max_images=counts[part],
        )
    return Evaluation(config, windows["train"], windows["val"], student)


# ------------------------------------------------------------------------------------- weights


def _frozen_copy(backbone: nn.Module) -> nn.Module:
    """A float32 copy in eval mode on the same device, without gradients."""
    frozen = copy.deepcopy(backbone).float().eval()
    return frozen.requires_grad_(False)


def _gathered_copy(backbone: nn.Module, student: Any) -> nn.Module:
    """As `_frozen_copy` for weights that are spread over processes; all must call it."""
    state = {}
    device = None
    for key, value in backbone.state_dict().items():
        if _is_sharded(value):
            value = value.full_tensor()
        device = value.device if device is None else device
        for part in _WRAPPER_PARTS:
            key = key.replace(part, "")
        state[key] = value.detach()
    from dinov3.models import build_model

    build: Any = build_model
    frozen, _ = build(student, only_teacher=True, device="meta")
    frozen.to_empty(device=device)
    frozen.init_weights()  # buffers that a state dict does not hold
    frozen.load_state_dict(state, strict=True)
    return frozen.float().eval().requires_grad_(False)


def _is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------- results


def _metrics(result: ProbeResult) -> dict[str, float]:
    metrics = dict(result.scores) | {
        "train_loss": result.train_loss,
        "steps": float(result.steps),
        "seconds": result.seconds,
    }
    # JSON has no nan, and a logger no use for one.
    return {f"{_PREFIX}{key}": float(v) for key, v in metrics.items() if math.isfinite(v)}


def _fingerprint(
    config: ProbeConfig, train: list[LabelledWindow], val: list[LabelledWindow]
) -> str:
    settings = {key: value for key, value in asdict(config).items() if key != "max_seconds"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part, windows in zip(_PARTS, (train, val), strict=True):
        for window in windows:
            digest.update(f"{part}/{window.name}".encode())
            digest.update(window.image.tobytes())
            digest.update(window.target.tobytes())
    return digest.hexdigest()[:16]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: one that a crash has cut is dropped, and its evaluation done again."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("a broken line of %s is dropped", path)
            continue
        if isinstance(row, dict) and isinstance(row.get("metrics"), dict):
            rows.append(row)
    return rows


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: int(row["iteration"]))
    write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------- configuration


def _plain(section: Any) -> dict[str, Any]:
    if isinstance(section, Mapping):
        return dict(section)
    from omegaconf import OmegaConf

    return dict(OmegaConf.to_container(section, resolve=True))  # type: ignore[arg-type]


def _value(section: dict[str, Any], key: str) -> Any:
    if key not in section:
        raise ConfigError(
            f"ssl_evaluation must have the key {key}, got {', '.join(section)}: take it from "
            "dinocell.yaml"
        )
    return section[key]


def _whole(section: dict[str, Any], key: str) -> int:
    value = _value(section, key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"ssl_evaluation.{key} must be a whole number, got {value!r}: correct it")
    return value


def _number(section: dict[str, Any], key: str) -> float:
    value = _value(section, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"ssl_evaluation.{key} must be a number, got {value!r}: correct it")
    return float(value)
