"""Datasets by file (matches `dinov3.data.datasets`); evaluation-only ones are not in this tree."""

from dinov3.cells.image_folder import ImageFolder
from dinov3.data.datasets.image_net import ImageNet

__all__ = ["ImageFolder", "ImageNet"]
