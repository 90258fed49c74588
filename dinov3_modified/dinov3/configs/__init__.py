"""Configuration of a run (matches `dinov3.configs`)."""

from dinov3.cells.validation import IGNORED_KEYS, Difference, compare_configs
from dinov3.configs.config import (
    DinoV3SetupArgs,
    apply_scaling_rules_to_cfg,
    exit_job,
    get_cfg_from_args,
    get_default_config,
    setup_config,
    setup_job,
    setup_multidistillation,
    write_config,
)

__all__ = [
    "IGNORED_KEYS", "Difference", "DinoV3SetupArgs", "apply_scaling_rules_to_cfg",
    "compare_configs", "exit_job", "get_cfg_from_args", "get_default_config", "setup_config",
    "setup_job", "setup_multidistillation", "write_config",
]  # fmt: skip
