"""Checkpoints of a run, and weights from files (matches `dinov3.checkpointer`)."""

from dinov3.checkpointer.checkpointer import (
    CheckpointRetentionPolicy,
    cleanup_checkpoint,
    find_all_checkpoints,
    find_latest_checkpoint,
    find_latest_valid_checkpoint,
    init_fsdp_model_from_checkpoint,
    init_model_from_checkpoint_for_evals,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    load_checkpoint,
    register_dont_save_hooks,
    save_checkpoint,
)

__all__ = [
    "CheckpointRetentionPolicy", "cleanup_checkpoint", "find_all_checkpoints",
    "find_latest_checkpoint", "find_latest_valid_checkpoint", "init_fsdp_model_from_checkpoint",
    "init_model_from_checkpoint_for_evals", "keep_checkpoint_copy", "keep_last_n_checkpoints",
    "load_checkpoint", "register_dont_save_hooks", "save_checkpoint",
]  # fmt: skip
