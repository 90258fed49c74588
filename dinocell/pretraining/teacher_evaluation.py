"""Evaluation during self-supervised training: how well do the teacher's features segment cells?

The training calls `make_evaluation`, which `ssl_evaluation.hook` names, once at its start, and what it
returns every `ssl_evaluation.period_iterations`.  Each call trains a small decoder on frozen features of
the teacher for a labelled set and scores it on held-out images; the scores go to the run's log and to
`evaluation.jsonl`.

The decoder and its order of windows start from the same seed every time, so that two evaluations
differ by their features only.
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from dinocell.errors import ConfigError, DataSetError
from dinocell.files import write_text_atomically
from dinocell.pairs import find_pairs
from dinocell.probing.decoder_probe import ProbeConfig, ProbeResult, probe_features
from dinocell.probing.labelled_windows import LabelledWindow, read_windows

RESULTS_NAME = "evaluation.jsonl"
"""In the output folder of the run: one line per evaluation."""

_PREFIX = "eval/"
_PARTS = ("train", "val")

logger = logging.getLogger("dinov3")


@dataclass(eq=False)
class Evaluation:
    """Callable that scores a backbone; `make_evaluation` makes it.

    The windows are read once, at the start of the run.  Results with another `fingerprint`, which is
    that of the config and the windows, or of other weights are not reused.
    """

    config: ProbeConfig
    train: list[LabelledWindow]
    val: list[LabelledWindow]

    def __post_init__(self) -> None:
        self.fingerprint = _fingerprint(self.config, self.train, self.val)

    def __call__(self, backbone: nn.Module, iteration: int, output_dir: Path) -> dict[str, float]:
        """Score the backbone as it is now.

        Parameters
        ----------
        backbone : DinoVisionTransformer
            The teacher's, with whole (not sharded) weights.  A copy is evaluated: weights, mode and
            random generators of the training stay as they are.
        output_dir : of the run; holds `evaluation.jsonl`

        Returns dict of float: ``eval/op_csb``, ``eval/seg``, ``eval/det``, ``eval/ap50``,
        ``eval/ap75``, ``eval/f1_50``, ``eval/mse``, ``eval/train_loss``, ``eval/steps``,
        ``eval/seconds``. Read from `evaluation.jsonl` if these weights were evaluated at this
        iteration before.
        """
        path = Path(output_dir) / RESULTS_NAME
        rows = _read_rows(path)
        # An earlier run of the folder may have had the same iteration with other weights.
        key = {
            "iteration": iteration,
            "fingerprint": self.fingerprint,
            "weights": _digest(backbone.state_dict()),
        }
        for row in rows:
            if {name: row.get(name) for name in key} == key:
                logger.info("The scores of iteration %d are read from %s", iteration, path)
                return {str(key): float(value) for key, value in row["metrics"].items()}
        frozen = copy.deepcopy(backbone).float().eval().requires_grad_(False)
        result = probe_features(frozen, self.train, self.val, self.config)
        if result.steps < self.config.steps:
            logger.warning(
                "The evaluation at iteration %d trained its decoder for %d of %d steps within "
                "ssl_evaluation.max_seconds = %g: do not compare its scores with those of full trainings",
                iteration, result.steps, self.config.steps, self.config.max_seconds,
            )  # fmt: skip
        metrics = _metrics(result)
        rows = [row for row in rows if row.get("iteration") != iteration]
        rows.append({**key, "metrics": metrics})
        rows.sort(key=lambda row: int(row["iteration"]))
        write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        text = ", ".join(f"{key.removeprefix(_PREFIX)} {v:.4g}" for key, v in metrics.items())
        logger.info("Evaluation at iteration %d: %s", iteration, text)
        return metrics


def make_evaluation(cfg: Any) -> Evaluation:
    """The evaluation that the section `ssl_evaluation` of a training configuration describes.

    Reads and checks the labelled images at once, so that a wrong folder stops the run at its start.

    Parameters
    ----------
    cfg : OmegaConf config or nested mapping
        Sections `ssl_evaluation` and `student`.

    Raises ConfigError (a value is missing or out of range, or the window does not fit
    `student.patch_size`); DataSetError, ImageFileError (the folder does not hold `train` and `val`,
    each with `images` and `labels` that are paired by name and hold cells).
    """
    section = cfg["ssl_evaluation"]
    config = _probe_config(section)
    patch = int(cfg["student"]["patch_size"])
    if config.window_px % patch:
        raise ConfigError(
            f"`ssl_evaluation.window_px` must be a multiple of student.patch_size {patch}, got "
            f"{config.window_px}: {max(1, round(config.window_px / patch)) * patch} is next"
        )
    for part in _PARTS:
        count = section[f"{part}_images"]
        if not isinstance(count, int) or count < 1:
            raise ConfigError(
                f"`ssl_evaluation.{part}_images` must be at least 1, got {count}: give a larger number"
            )
    data = Path(section["data"] or "nothing")
    if not section["data"] or not data.is_dir():
        raise DataSetError(
            f"`ssl_evaluation.data` must be a folder with train and val, got {data}: name a labelled set, "
            "or switch the evaluation off with ssl_evaluation.period_iterations=0"
        )
    windows: dict[str, list[LabelledWindow]] = {}
    for part in _PARTS:
        folder = data / part
        pairs = find_pairs(folder / "images", folder / "labels", f"{data.name}/{part}")
        windows[part] = read_windows(
            pairs,
            window_px=config.window_px,
            windows_per_image=config.windows_per_image,
            max_images=section[f"{part}_images"],
        )
    return Evaluation(config, windows["train"], windows["val"])


def _probe_config(section: Any) -> ProbeConfig:
    """The keys of the section that describe the decoder, with checked types and ranges."""
    names = [item.name for item in fields(ProbeConfig)]
    wanted = (*names, "data", "train_images", "val_images")
    if missing := [name for name in wanted if name not in section]:
        raise ConfigError(
            f"`ssl_evaluation` must have the key {missing[0]}, got {', '.join(section)}: copy it from "
            "dinocell.yaml"
        )
    given = {name: section[name] for name in names}
    try:
        values = OmegaConf.merge(OmegaConf.structured(ProbeConfig), given)
        return cast(ProbeConfig, OmegaConf.to_object(values))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"`ssl_evaluation.{error.full_key}` must be of type "
            f"{ProbeConfig.__dataclass_fields__[str(error.full_key)].type}, got "
            f"{section[error.full_key]!r}: correct it"
        ) from error
    except ValueError as error:
        raise ConfigError(f"In ssl_evaluation, {error}") from error


def _metrics(result: ProbeResult) -> dict[str, float]:
    metrics = dict(result.scores) | {
        "train_loss": result.train_loss,
        "steps": float(result.steps),
        "seconds": result.seconds,
    }
    # JSON has no NaN, and a logger cannot draw one.
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


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a line that a crash cut short is dropped, and its evaluation is repeated."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("A damaged line of %s was dropped; its evaluation is repeated", path)
            continue
        if isinstance(row, dict) and isinstance(row.get("metrics"), dict):
            rows.append(row)
    return rows
