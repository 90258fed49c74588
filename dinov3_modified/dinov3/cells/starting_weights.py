"""Starting values of the student: random, or from files that the configuration names (ours)."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from dinov3.cells.weights import LoadReport, load_backbone

logger = logging.getLogger("dinov3")


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
        logger.info("student.%s: %s", key, report)
        if key == "resume_from_teacher_chkpt":
            _load_heads(student, path)
        else:
            logger.info("The heads start at random values: only the backbone of %s is read.", path)
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
