"""Processes of a run (matches `dinov3.distributed`)."""

from dinov3.distributed.torch_distributed_primitives import gather_all_tensors, reduce_dict
from dinov3.distributed.torch_distributed_wrapper import (
    TorchDistributedEnvironment,
    disable,
    enable,
    get_default_process_group,
    get_process_subgroup,
    get_rank,
    get_subgroup_rank,
    get_subgroup_size,
    get_world_size,
    is_enabled,
    is_main_process,
    is_subgroup_main_process,
    new_subgroups,
    save_in_main_process,
)

__all__ = [
    "TorchDistributedEnvironment", "disable", "enable", "gather_all_tensors",
    "get_default_process_group", "get_process_subgroup", "get_rank", "get_subgroup_rank",
    "get_subgroup_size", "get_world_size", "is_enabled", "is_main_process",
    "is_subgroup_main_process", "new_subgroups", "reduce_dict", "save_in_main_process",
]  # fmt: skip
