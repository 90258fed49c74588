"""Defaults of a SLURM cluster, from the environment (matches `dinov3.utils.cluster`).

Upstream has those of its own clusters; here DINOV3_SLURM_PARTITION, DINOV3_SLURM_QOS,
DINOV3_SLURM_ACCOUNT and DINOV3_CHECKPOINT_DIR say what a site uses.
"""

import os
from pathlib import Path
from typing import Any


def get_checkpoint_path(cluster_type: str | None = None) -> Path | None:
    """Folder of all experiments, None if unset."""
    value = os.environ.get("DINOV3_CHECKPOINT_DIR")
    return Path(value) if value else None


def get_user_checkpoint_path(cluster_type: str | None = None) -> Path | None:
    """This user's part of it."""
    folder = get_checkpoint_path(cluster_type)
    return None if folder is None else folder / os.environ.get("USER", "")


def get_slurm_partition(cluster_type: str | None = None) -> str | None:
    """Partition, None for the cluster's own default."""
    return os.environ.get("DINOV3_SLURM_PARTITION") or None


def get_slurm_qos(cluster_type: str | None = None) -> str | None:
    """Quality of service, None for the cluster's own default."""
    return os.environ.get("DINOV3_SLURM_QOS") or None


def get_slurm_account(cluster_type: str | None = None) -> str | None:
    """Account, None for the cluster's own default."""
    return os.environ.get("DINOV3_SLURM_ACCOUNT") or None


def get_slurm_executor_parameters(
    nodes: int, num_gpus_per_node: int, cluster_type: str | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Arguments of submitit's executor: one task a GPU (one without), 16 cores each, the node's memory.

    `**kwargs`: replace or add arguments.
    """
    return {
        "mem_gb": 0,  # all of it
        "gpus_per_node": num_gpus_per_node,
        "tasks_per_node": max(num_gpus_per_node, 1),
        "cpus_per_task": 16,
        "nodes": nodes,
        "slurm_partition": get_slurm_partition(cluster_type),
        **kwargs,
    }
