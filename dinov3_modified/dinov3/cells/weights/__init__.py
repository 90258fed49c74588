"""Backbone weights of any DINOv3 file, in and out (ours).

Read: Meta's backbone file; teacher files and checkpoints of a training run, student or teacher,
plain or sharded; Hugging Face; timm; DINOCell's models.  Written: Meta's, Hugging Face's, timm's and
a `.safetensors` with Meta's names.  Inside, a backbone is a complete state dict in Meta's names.
"""

from dinov3.cells.weights.architecture import WeightsDescription, vit_arguments
from dinov3.cells.weights.containers import CheckpointReader, read_teacher
from dinov3.cells.weights.fit import WeightsError, refuse_differences
from dinov3.cells.weights.read import (
    LoadReport,
    fit_backbone,
    load_backbone,
    read_backbone,
    sha256,
)
from dinov3.cells.weights.write import FORMATS, write_backbone

__all__ = [
    "FORMATS", "CheckpointReader", "LoadReport", "WeightsDescription", "WeightsError",
    "fit_backbone", "load_backbone", "read_backbone", "read_teacher", "refuse_differences",
    "sha256", "vit_arguments", "write_backbone",
]  # fmt: skip
