"""Whole training runs on streamed fields."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from held_run import held_python

from dinov3.train.train import main

ROOT = Path(__file__).parents[4]
SMALL = [
    "student.arch=vit_tiny", "student.patch_size=8", "student.drop_path_rate=0.0",
    "student.layerscale=0.1", "dino.head_n_prototypes=16", "dino.head_hidden_dim=16",
    "dino.head_bottleneck_dim=8", "ibot.head_n_prototypes=16", "ibot.head_hidden_dim=16",
    "ibot.head_bottleneck_dim=8", "compute_precision.param_dtype=fp32",
    "crops.global_crops_size=32", "crops.local_crops_size=16", "crops.local_crops_number=2",
    "train.batch_size_per_gpu=4", "train.OFFICIAL_EPOCH_LENGTH=6", "optim.epochs=1",
    "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0",
    "teacher.warmup_teacher_temp_epochs=1", "checkpointing.period=2", "accelerator.device=cpu",
    "monitor.enabled=false", "multiview.strategy=multiview", "multiview.zoom=[0.8,1.2]",
    "streaming.timeout_s=60", "streaming.backoff_max_s=0.05",
]  # fmt: skip


def arguments(index: Path, out: Path, *changes: str) -> list[str]:
    data = f"train.dataset_path=JUMPS3MultiView:index={index}:visits=2:spread=4"
    return ["--output-dir", str(out), *SMALL, data, *changes]


def teacher(out: Path) -> dict[str, torch.Tensor]:
    path = out / "eval" / "training_5" / "teacher_checkpoint.pth"
    return torch.load(path, weights_only=True)["teacher"]


def same(a: Path, b: Path) -> bool:
    one, two = teacher(a), teacher(b)
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def local_run(bucket, index_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local")
    main(arguments(index_file, out, f"streaming.store={bucket[0]}", "train.num_workers=0"))
    return out


@pytest.mark.slow
def test_a_run_over_a_faulty_network_is_that_from_a_folder(proxy, index_file, local_run, tmp_path):
    proxy.share = 0.1
    network = [f"streaming.endpoint={proxy.url}", "train.num_workers=2"]
    # Silent answers need a time limit; on a busy machine honest ones are late, too, and again.
    network += ["streaming.timeout_s=1.5", "streaming.retries=10000"]
    main(arguments(index_file, tmp_path, *network))
    assert same(tmp_path, local_run)
    assert sum(n for kind, n in proxy.counts.items() if kind != "requests") > 0
    lines = [json.loads(x) for x in (tmp_path / "monitor_metrics.json").read_text().splitlines()]
    assert any("stream/requests" in line for line in lines)


@pytest.mark.slow
def test_a_run_that_began_over_the_network_continues_from_a_copy(
    rclone, bucket, index_file, local_run, tmp_path
):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'dinov3_modified'}"
    process = subprocess.Popen(
        [*held_python(tmp_path / "go"), "dinov3.train.train",
         *arguments(index_file, tmp_path, f"streaming.endpoint={rclone}", "train.num_workers=0")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "Training [0/6]" in line:
            process.send_signal(signal.SIGTERM)
            (tmp_path / "go").touch()
            break
    output, _ = process.communicate(timeout=900)
    assert "stopped by SIGTERM" in output
    main(arguments(index_file, tmp_path, f"streaming.store={bucket[0]}", "train.num_workers=0"))
    assert same(tmp_path, local_run)


@pytest.mark.slow
def test_lost_fields_end_a_run_in_one_sentence(index_file, tmp_path):
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dinov3.train.train",
         *arguments(index_file, tmp_path / "o", f"streaming.store={tmp_path / 'empty'}",
                    "train.num_workers=1")],
        capture_output=True, text=True, timeout=900, check=False,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT / 'dinov3_modified'}"),
    )  # fmt: skip
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: At most 2.0% of the fields may be lost, got 10")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "o" / "lost.jsonl").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("streaming.threads=0", "streaming.threads` must be at least 1"),
        ("streaming.transport=curl", "one of obstore, boto3"),
        ("streaming.thread=3", "streaming.thread"),
    ],
)
def test_wrong_settings(index_file, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        main(arguments(index_file, tmp_path, change))
