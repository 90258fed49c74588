"""Public data sets, as their publishers store them → folders of images and labels."""

from dinocell.datasets.layouts import LAYOUTS
from dinocell.datasets.preparation import Facts, Prepared, prepare
from dinocell.datasets.pulling import Pulled, pull, terms
from dinocell.datasets.remote import REMOTES, describe_layouts
from dinocell.datasets.splits import SplitOptions

__all__ = [
    "LAYOUTS",
    "REMOTES",
    "Facts",
    "Prepared",
    "Pulled",
    "SplitOptions",
    "describe_layouts",
    "prepare",
    "pull",
    "terms",
]
