"""Self-supervised training (matches `dinov3.train`, one student)."""

from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.train import get_args_parser, main

__all__ = ["SSLMetaArch", "get_args_parser", "main"]
