"""Public data sets, as their publishers store them → folders of images and labels."""

from dinocell.datasets.layouts import LAYOUTS, describe_layouts
from dinocell.datasets.preparation import Facts, Prepared, prepare
from dinocell.datasets.splits import SplitOptions

__all__ = ["LAYOUTS", "Facts", "Prepared", "SplitOptions", "describe_layouts", "prepare"]
