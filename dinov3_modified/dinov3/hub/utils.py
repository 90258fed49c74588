"""Where released weights are kept."""

__all__ = ["DINOV3_BASE_URL"]

DINOV3_BASE_URL = "https://dl.fbaipublicfiles.com/dinov3"
