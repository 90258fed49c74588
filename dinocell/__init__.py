"""DINOCell: segment cells in microscopy images with a self-supervised vision transformer.

>>> from dinocell import DINOCell, segment                   # doctest: +SKIP
>>> model = DINOCell.from_pretrained("dinocell-cells")        # doctest: +SKIP
>>> result = segment("image.tif", model=model)               # doctest: +SKIP

Torch and the rest arrive when a name is first used, so that `import dinocell` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dinocell.tree import install_finder

if TYPE_CHECKING:
    from dinocell.errors import DINOCellError
    from dinocell.network.model import DINOCell, create_dinocell_model
    from dinocell.pipeline import DINOCellPipeline, Segmentation, segment

__version__ = "0.1.0"
DISTRIBUTION = "dinocell-segmentation"
"""Name on a package index, where `dinocell` is another project."""

__all__ = [
    "DISTRIBUTION",
    "DINOCell",
    "DINOCellError",
    "DINOCellPipeline",
    "Segmentation",
    "__version__",
    "create_dinocell_model",
    "segment",
]

install_finder()

_HOME = {
    "DINOCell": "dinocell.network.model",
    "DINOCellError": "dinocell.errors",
    "DINOCellPipeline": "dinocell.pipeline",
    "Segmentation": "dinocell.pipeline",
    "create_dinocell_model": "dinocell.network.model",
    "segment": "dinocell.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dinocell' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
