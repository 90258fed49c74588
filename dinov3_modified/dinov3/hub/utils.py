"""Where released weights are kept."""

DINOV3_BASE_URL = "https://dl.fbaipublicfiles.com/dinov3"
