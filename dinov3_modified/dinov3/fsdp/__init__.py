"""Checkpointing, compilation and sharding of the networks (matches `dinov3.fsdp`)."""
