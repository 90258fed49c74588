"""Small functions that several rooms share, at upstream's path."""

from dinov3.utils.utils import (
    as_torch_dtype,
    cat_keep_shapes,
    count_parameters,
    fix_random_seeds,
    get_conda_env,
    get_sha,
    has_batchnorms,
    named_apply,
    named_replace,
    uncat_with_shapes,
)

__all__ = [
    "as_torch_dtype", "cat_keep_shapes", "count_parameters", "fix_random_seeds", "get_conda_env",
    "get_sha", "has_batchnorms", "named_apply", "named_replace", "uncat_with_shapes",
]  # fmt: skip
