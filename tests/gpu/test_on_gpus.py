"""What only a GPU can show: `make test-gpu` on a machine with one CUDA device, better with two.

Configurations are those of the tests on the CPU; what is compared with the CPU is compared loosely.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PRETRAINING = [
    "student.arch=vit_tiny", "student.patch_size=8", "student.drop_path_rate=0.0",
    "student.layerscale=0.1", "student.n_storage_tokens=1", "dino.head_n_prototypes=256",
    "dino.head_hidden_dim=64", "dino.head_bottleneck_dim=32", "ibot.head_n_prototypes=256",
    "ibot.head_hidden_dim=64", "ibot.head_bottleneck_dim=32", "crops.global_crops_size=64",
    "crops.local_crops_size=32", "crops.local_crops_number=2", "train.num_workers=2",
    "train.OFFICIAL_EPOCH_LENGTH=20", "train.compile=false", "optim.epochs=2",
    "optim.warmup_epochs=1", "optim.freeze_last_layer_epochs=0",
    "teacher.warmup_teacher_temp_epochs=1", "checkpointing.period=10",
]  # fmt: skip

FINE_TUNING = """
name: small
output_dir: OUT
device: DEVICE
model:
  {size: tiny, patch_size: 16, image_channels: 4, window_px: 32, overlap_px: 8, layerscale_init: 0.3}
data:
  datasets: [{name: blobs, images: DATA/images, labels: DATA/labels}]
  val_fraction: 0.34
optimizer: {lr: 2.0e-3, warmup_steps: 2, scaling_rule: none}
schedule:
  {steps: 20, batch_size: BATCH, precision: fp32, eval_every: 20, checkpoint_every: 10, log_every: 1}
"""


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, got {torch.cuda.device_count()}")


def command(*arguments: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "dinocell", "-v", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'dinov3_modified'}"}


def run(*arguments: str, processes: int = 1) -> str:
    done = subprocess.run(
        command(*arguments, processes=processes), env=environment(), capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def pretrain(pictures: Path, out: Path, *changes: str) -> list[str]:
    config = out.parent / "empty.yaml"
    config.write_text("{}")
    return ["pretrain", str(config), "-o", str(out), *PRETRAINING,
            f"train.dataset_path=ImageFolder:root={pictures}", *changes]  # fmt: skip


def losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "training_metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in rows if "total_loss" in row]


def tune(folder: Path, data: Path, name: str, *, device: str, batch: int) -> Path:
    text = FINE_TUNING.replace("DATA", str(data)).replace("OUT", str(folder / name))
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("DEVICE", device).replace("BATCH", str(batch)))
    return path


def tuned_losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_crops_are_copied_ahead_and_arrive_whole():
    from dinov3.cells.run_data import crops_ahead

    crops = [torch.randn(64, 3, 64, 64).pin_memory() for _ in range(4)]
    batches = [{"collated_global_crops": x, "upperbound": n} for n, x in enumerate(crops)]
    for number, batch in enumerate(crops_ahead(batches, torch.device("cuda"))):
        x = batch["collated_global_crops"]
        assert x.is_cuda
        assert batch["upperbound"] == number
        torch.testing.assert_close((2 * x).cpu(), 2 * crops[number])


def test_compiled_losses_equal_the_plain_ones():
    from dinov3.cells.patch_cross_entropy import prototype_cross_entropy
    from dinov3.cells.sinkhorn import sinkhorn_knopp

    x = torch.randn(300, 64, device="cuda")
    w = torch.randn(4096, 64, device="cuda")
    found = []
    for compiled in (False, True):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        logits = (x @ w.T).to(torch.bfloat16)
        assignment = sinkhorn_knopp(logits / 8, 0.07, compiled=compiled)
        weights = torch.ones(300, device="cuda")
        loss = prototype_cross_entropy(
            a, b, assignment, weights, student_temp=0.1, compiled=compiled
        )
        loss.backward()
        found.append((loss.detach(), a.grad, b.grad))
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["varlen", "xformers"])
def test_packed_attention_equals_a_call_for_each_size(name):
    from dinov3.cells.packed_attention import find_kernel, use_packed_attention
    from dinov3.layers.attention import SelfAttention

    if name == "xformers":
        pytest.importorskip("xformers")
    layer = SelfAttention(128, num_heads=2, device="cuda").to(torch.bfloat16)
    crops = [torch.randn(4, n, 128, device="cuda", dtype=torch.bfloat16) for n in (785, 145)]
    plain = layer.forward_list(crops)
    use_packed_attention(layer, find_kernel(name, torch.device("cuda"), torch.bfloat16))
    for ours, expected in zip(layer.forward_list(crops), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_segment_as_on_the_cpu(blob_data, tmp_path):
    from dinocell.io import read_labels

    for device in ("cpu", "cuda"):
        run("segment", str(blob_data / "images"), "-o", str(tmp_path / device), "--device", device)
    for path in (tmp_path / "cpu").glob("*_labels.tif"):
        one, other = read_labels(path), read_labels(tmp_path / "cuda" / path.name)
        assert np.mean((one > 0) == (other > 0)) > 0.999
        assert abs(int(one.max()) - int(other.max())) <= 1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_pretraining_under_fsdp_stops_and_continues(pictures, tmp_path, precision):
    arguments = pretrain(
        pictures, tmp_path / "run", "train.batch_size_per_gpu=16",
        f"compute_precision.param_dtype={precision}", "train.OFFICIAL_EPOCH_LENGTH=100",
    )  # fmt: skip
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (tmp_path / "run" / "ckpt" / "19").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors.decode()[-3000:]
    text = run(*arguments)
    assert "continuing with iteration" in text
    assert (tmp_path / "run" / "eval" / "training_199" / "teacher_checkpoint.pth").is_file()
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_pretraining_on_two_gpus(two_gpus, pictures, tmp_path):
    """NCCL, replicas and FSDP2: the first loss is that of the CPU, and it falls alike."""
    shared = ["compute_precision.param_dtype=fp32", "ibot.mask_sample_probability=0.0",
              "dino.koleo_loss_distributed=true"]  # fmt: skip
    found = {}
    for strategy in ("ddp", "fsdp"):
        out = tmp_path / strategy
        run(
            *pretrain(pictures, out, f"accelerator.strategy={strategy}",
                      "train.batch_size_per_gpu=8", *shared),
            processes=2,
        )  # fmt: skip
        found[strategy] = losses(out)
    run(*pretrain(pictures, tmp_path / "one", "train.batch_size_per_gpu=16", *shared))
    for values in found.values():
        assert values == pytest.approx(losses(tmp_path / "one"), rel=1e-2)


def test_fine_tuning_as_on_the_cpu(blob_data, tmp_path):
    for device in ("cpu", "cuda"):
        run("train", str(tune(tmp_path, blob_data, device, device=device, batch=4)))
    assert tuned_losses(tmp_path / "cuda") == pytest.approx(
        tuned_losses(tmp_path / "cpu"), rel=0.05
    )


def test_fine_tuning_on_two_gpus(two_gpus, blob_data, tmp_path):
    """NCCL and torch's SyncBatchNorm: the losses of one GPU with the whole batch."""
    run("train", str(tune(tmp_path, blob_data, "two", device="auto", batch=2)), processes=2)
    run("train", str(tune(tmp_path, blob_data, "one", device="cuda", batch=4)))
    assert tuned_losses(tmp_path / "two") == pytest.approx(tuned_losses(tmp_path / "one"), rel=0.02)
