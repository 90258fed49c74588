"""Small functions that several rooms share, at upstream's path."""

from dinov3.utils.utils import (
    cat_keep_shapes,
    count_parameters,
    named_apply,
    named_replace,
    uncat_with_shapes,
)

__all__ = [
    "cat_keep_shapes",
    "count_parameters",
    "named_apply",
    "named_replace",
    "uncat_with_shapes",
]
