"""Self-supervised training (matches `dinov3.train`, one student).

Names are imported on first use, so that `python -m dinov3.train.train` loads its module once.
"""

from typing import Any

__all__ = ["SSLMetaArch", "get_args_parser", "main"]


def __getattr__(name: str) -> Any:
    if name == "SSLMetaArch":
        from dinov3.train.ssl_meta_arch import SSLMetaArch

        return SSLMetaArch
    if name in ("get_args_parser", "main"):
        from dinov3.train import train

        return getattr(train, name)
    raise AttributeError(f"Module {__name__} has no {name}: it has {', '.join(__all__)}")
