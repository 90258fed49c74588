"""Clusters, and configurations of seconds."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, started_cluster, uninterrupted

# A pretraining of seconds: 90 iterations of 3 small pictures.
PRETRAINING = """
student: {arch: vit_tiny, patch_size: 8, drop_path_rate: 0.3, layerscale: 0.1, n_storage_tokens: 1}
dino: {head_n_prototypes: 32, head_hidden_dim: 16, head_bottleneck_dim: 8}
ibot: {head_n_prototypes: 32, head_hidden_dim: 16, head_bottleneck_dim: 8}
compute_precision: {param_dtype: fp32}
crops: {global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}
train:
  dataset_path: ImageFolder:root=IMAGES
  batch_size_per_gpu: 3
  num_workers: 0
  OFFICIAL_EPOCH_LENGTH: 30
optim: {epochs: 3, warmup_epochs: 1, freeze_last_layer_epochs: 0}
teacher: {warmup_teacher_temp_epochs: 1}
checkpointing: {period: 1000}
accelerator: {device: cpu}
monitor: {enabled: false}
"""

FINE_TUNING = """
name: small
output_dir: OUT
device: cpu
model:
  {size: tiny, patch_size: 16, image_channels: 4, window_px: 32, overlap_px: 8,
   layerscale_init: 0.3, drop_path_rate: 0.2}
data:
  datasets: [{name: blobs, images: DATA/images, labels: DATA/labels}]
  val_fraction: 0.34
optimizer: {lr: 2.0e-3, warmup_steps: 2}
schedule:
  {steps: 120, batch_size: 2, precision: fp32, eval_every: 120, checkpoint_every: 1000, log_every: 1}
"""


@contextlib.contextmanager
def _started(tmp_path_factory, **settings: str) -> Iterator[Cluster]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("the SLURM sandbox needs Linux and root: run these tests in a container")
    lock = tmp_path_factory.getbasetemp().parent / "slurm.lock"
    with started_cluster(tmp_path_factory.mktemp("state"), lock, **settings) as it:
        yield it


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster that sends preempted jobs the signal that they asked for."""
    with _started(tmp_path_factory) as it:
        yield it


@pytest.fixture(scope="session")
def term_cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster that sends SIGTERM only."""
    with _started(tmp_path_factory, SLURM_SANDBOX_PREEMPT_SIGNAL="term") as it:
        yield it


@pytest.fixture
def accounting_cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster with slurmdbd, and so with sacct."""
    with _started(tmp_path_factory, SLURM_SANDBOX_ACCT="1") as it:
        yield it


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster of two nodes, both on this machine."""
    settings = {"SLURM_SANDBOX_NODES": "2", "SLURM_SANDBOX_CPUS": "2", "SLURM_SANDBOX_GRES": ""}
    with _started(tmp_path_factory, **settings) as it:
        yield it


@pytest.fixture(autouse=True)
def _no_job_is_left(request) -> Iterator[None]:
    """Jobs of a test that fails would take the cores of the next tests."""
    yield
    for name in ("cluster", "term_cluster", "two_nodes"):
        if name in request.fixturenames:
            request.getfixturevalue(name).run("scancel", "-u", "root")


@pytest.fixture
def pretraining(tmp_path, pictures) -> Path:
    """A configuration of `dinocell pretrain`."""
    path = tmp_path / "ssl.yaml"
    path.write_text(PRETRAINING.replace("IMAGES", str(pictures)))
    return path


@pytest.fixture
def fine_tuning(tmp_path, blob_data) -> Path:
    """A configuration of `dinocell train` that writes to `tuned`."""
    path = tmp_path / "train.yaml"
    path.write_text(FINE_TUNING.replace("DATA", str(blob_data)).replace("OUT", "tuned"))
    return path


@pytest.fixture
def whole(cluster, pretraining, tmp_path) -> Path:
    """The same pretraining without interruption."""
    return uninterrupted(cluster, pretraining, tmp_path / "whole")
