"""Meters and JSON lines."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov3.logging import MetricLogger, SmoothedValue

ROOT = Path(__file__).parents[3]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(logger: MetricLogger, start: int, stop: int, *, n: int, freq: int = 10) -> None:
    """Iterations start to stop - 1 of n; the metric `loss` is the iteration's number."""
    for iteration, _ in enumerate(
        logger.log_every(range(1000), freq, "Training", n_iterations=n, start_iteration=start),
        start,
    ):
        logger.update(loss=torch.tensor(float(iteration)))
        if iteration + 1 == stop < n:
            break


# --- SmoothedValue ---


@pytest.mark.parametrize("as_tensor", [False, True])
def test_smoothed_value_against_numpy(as_tensor):
    values = np.random.default_rng(0).normal(size=51)
    meter = SmoothedValue(window_size=7)
    for value in values:
        meter.update(torch.tensor(value) if as_tensor else float(value))
    window = values[-7:]
    assert meter.median == pytest.approx(np.median(window))
    assert meter.avg == pytest.approx(window.mean())
    assert meter.global_avg == pytest.approx(values.mean())
    assert meter.max == pytest.approx(window.max())
    assert meter.value == pytest.approx(values[-1])
    assert meter.count == 51


def test_median_of_an_even_window_is_the_lower_one():
    meter = SmoothedValue(window_size=4)
    for value in (4.0, 1.0, 3.0, 2.0):
        meter.update(value)
    assert meter.median == 2.0


def test_num_weighs_the_mean_of_all():
    meter = SmoothedValue()
    meter.update(1.0, num=3)
    meter.update(torch.tensor(5.0), num=1)
    assert meter.global_avg == 2.0


def test_empty_meter_and_nan():
    meter = SmoothedValue()
    assert all(
        math.isnan(v) for v in (meter.median, meter.avg, meter.global_avg, meter.max, meter.value)
    )
    for value in (1.0, float("nan"), 3.0):
        meter.update(value)
    assert math.isnan(meter.median)


def test_fmt_chooses_what_is_shown():
    meter = SmoothedValue(fmt="{value:.1f} of {max:.1f}")
    meter.update(3.0)
    meter.update(2.0)
    assert str(meter) == "2.0 of 3.0"
    assert str(SmoothedValue()) == "nan (nan)"


# --- MetricLogger ---


def test_values_are_kept_as_tensors_and_copied_together(monkeypatch):
    """Between two printed lines nothing is copied to the host; then all in one go."""
    copies = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(1) or real(self))
    for name in ("item", "__float__", "cpu", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waited for the device"))
    logger = MetricLogger()
    for step in range(10):
        loss = torch.tensor(float(step))
        logger.update(loss=loss, lr=0.5, other=torch.tensor([2.0 * step]))
        loss.fill_(-1.0)  # what was logged must not change with it
    assert copies == []
    assert logger.loss.max == 9.0
    assert logger.other.median == 8.0
    assert logger.lr.value == 0.5
    assert len(copies) == 1


def test_bad_metrics_are_refused():
    logger = MetricLogger()
    with pytest.raises(ValueError, match=r"loss must have one element, got \(2,\)"):
        logger.update(loss=torch.zeros(2))
    with pytest.raises(AttributeError, match="No meter loss: there are none"):
        _ = logger.loss


def test_add_meter_and_delimiter():
    logger = MetricLogger(delimiter=" | ")
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.3f}"))
    logger.update(lr=1.0, wd=2.0)
    logger.update(lr=3.0, wd=2.0)
    assert str(logger) == "lr: 3.000 | wd: 2.0000 (2.0000)"


def test_json_line_every_ten_iterations_and_at_the_last(tmp_path):
    path = tmp_path / "training_metrics.json"
    run(MetricLogger(output_file=str(path)), 0, 34, n=34)
    rows = lines(path)
    assert [row["iteration"] for row in rows] == [0, 10, 20, 30, 33]
    # Lower medians of the last 20 values.
    assert [row["loss"] for row in rows] == [0.0, 5.0, 10.0, 20.0, 23.0]
    assert all(0 <= row["data_time"] <= row["iter_time"] for row in rows)
    assert all(0 <= row["data_wait_share"] <= 1 for row in rows)


def test_throughput_where_the_batch_is_known(tmp_path):
    path = tmp_path / "m.json"
    logger = MetricLogger(output_file=str(path))
    for _ in logger.log_every(range(1), 1):
        logger.update(global_batch_size=64.0)
    (row,) = lines(path)
    assert row["images_per_second"] == pytest.approx(64 / row["iter_time"])


def test_print_freq_and_eta(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="dinov3"):
        run(MetricLogger(delimiter="  ", output_file=str(tmp_path / "m")), 0, 6, n=6, freq=3)
    shown = [r.getMessage() for r in caplog.records]
    assert [text.split("]")[0] for text in shown[:-1]] == [
        "Training [0/6", "Training [3/6", "Training [5/6"
    ]  # fmt: skip
    assert "eta: 0:00:00" in shown[2]
    assert "loss: 1.0000 (1.5000)" in shown[1]
    assert "total time" in shown[-1]
    assert [row["iteration"] for row in lines(tmp_path / "m")] == [0, 3, 5]


def test_stops_at_n_iterations_and_at_the_end_of_the_data():
    logger = MetricLogger()
    assert list(logger.log_every(range(100), 10, n_iterations=7, start_iteration=4)) == [0, 1, 2]
    assert list(logger.log_every(range(3), 10, n_iterations=50)) == [0, 1, 2]
    assert list(logger.log_every(range(3), 10, start_iteration=5)) == [0, 1, 2]


def test_resume_cuts_the_file_back(tmp_path):
    path = tmp_path / "training_metrics.json"
    run(MetricLogger(output_file=str(path)), 0, 38, n=60)  # killed after iteration 37
    with path.open("a") as stream:
        stream.write('{"iteration": 38, "lo')  # torn
    run(MetricLogger(output_file=str(path)), 25, 60, n=60)  # checkpoint of iteration 24
    rows = lines(path)
    assert [row["iteration"] for row in rows] == [0, 10, 20, 30, 40, 50, 59]
    assert rows[3]["loss"] == 27.0  # of the repeated iterations 25 to 30


def test_what_is_measured_at_other_intervals_has_its_own_file(tmp_path):
    """So that every line of the first file has every key; both are cut back on resumption."""
    path = tmp_path / "training_metrics.json"
    for start, stop in ((0, 25), (15, 31)):
        logger = MetricLogger(output_file=str(path))
        steps = logger.log_every(range(start, stop), 10, n_iterations=31, start_iteration=start)
        for iteration in steps:
            logger.update(lr=0.1, loss=float(iteration))
            if iteration % 6 == 0:
                logger.record(iteration, {"monitor/rank": 3.0})
    rows = lines(path)
    assert [row["iteration"] for row in rows] == [0, 10, 20, 30]
    assert len({tuple(row) for row in rows}) == 1
    assert all(row["lr"] == 0.1 for row in rows)
    measured = lines(tmp_path / "monitor_metrics.json")
    assert [row["iteration"] for row in measured] == [0, 6, 12, 18, 24, 30]
    assert all(set(row) == {"iteration", "monitor/rank"} for row in measured)


def test_torn_last_line_without_anything_to_cut(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"iteration": 0}\n{"iteration": 10}')  # whole, but its end of line is lost
    run(MetricLogger(output_file=str(path)), 20, 21, n=21)
    assert [row["iteration"] for row in lines(path)] == [0, 10, 20]


def test_new_run_in_an_old_folder_keeps_the_old_file(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"iteration": 0, "loss": 9}\n')
    run(MetricLogger(output_file=str(path)), 0, 1, n=1)
    assert lines(path)[0]["loss"] == 0.0
    assert lines(tmp_path / "m.json.previous") == [{"iteration": 0, "loss": 9}]


def test_lines_are_strict_json(tmp_path):
    path = tmp_path / "m.json"
    logger = MetricLogger(output_file=str(path))
    logger.record(3, {"a": float("nan"), "b": float("inf"), "c": 1.5})
    assert not path.exists()
    assert json.loads((tmp_path / "monitor_metrics.json").read_text(), parse_constant=pytest.fail) == {
        "iteration": 3, "a": None, "b": None, "c": 1.5
    }  # fmt: skip


def test_a_full_disk_gives_a_warning_and_training_continues(tmp_path, caplog):
    logger = MetricLogger(output_file=str(tmp_path / "no_folder" / "m.json"))
    logger.record(0, {"loss": 1.0})
    assert "could not be written" in caplog.text


def test_listeners_get_every_line(tmp_path):
    seen = []
    logger = MetricLogger(output_file=str(tmp_path / "m"))
    logger.add_listener(lambda iteration, values: seen.append((iteration, values)))
    run(logger, 0, 11, n=11)
    logger.record(11, {"extra": 2.0})
    assert [(it, {"iteration": it, **values}) for it, values in seen] == [
        (row["iteration"], row)
        for name in ("m", "monitor_metrics.json")
        for row in lines(tmp_path / name)
    ]


TWO_PROCESSES = """
import json, sys, warnings
import torch, torch.distributed as dist
from torch import nn
warnings.simplefilter("ignore")
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
from dinov3.logging import MetricLogger, SmoothedValue

logger = MetricLogger(output_file=f"{folder}/m.json")
for it in logger.log_every(range(21), 10, n_iterations=21):
    logger.update(loss=torch.tensor(float(it + 100 * rank)), lr=float(it))
    if rank == 0 and it == 5:
        assert logger.loss.value == 5.0  # reading between lines waits for nobody
meter = SmoothedValue()
meter.update(float(rank), num=1 + rank)
meter.synchronize_between_processes()

odd = MetricLogger(output_file=f"{folder}/odd.json")
for it in odd.log_every(range(1), 10, n_iterations=1):
    odd.update(**({"a": 1.0, "b": 2.0} if rank == 0 else {"a": 3.0}))

from torch.distributed.fsdp import fully_shard, MixedPrecisionPolicy
from dinov3.cells.monitors import module_statistics
from dinov3.models.vision_transformer import DinoVisionTransformer
torch.manual_seed(0)
def make():
    vit = DinoVisionTransformer(patch_size=8, embed_dim=16, depth=2, num_heads=2, n_storage_tokens=1)
    vit.init_weights()
    return vit
plain = make(); sharded = make(); sharded.load_state_dict(plain.state_dict())
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (2,))
for block in sharded.blocks: fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
optimizers = [torch.optim.AdamW(vit.parameters(), lr=1e-2) for vit in (plain, sharded)]
plain.eval(); sharded.eval()
image = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    sharded(image)  # a run has always made a step before it looks
    attention = (plain.get_last_selfattention(image) - sharded.get_last_selfattention(image)).abs().max()
    again = (plain(image) - sharded(image)).abs().max()
plain.train(); sharded.train()
stats = []
for vit, optimizer in zip((plain, sharded), optimizers):
    for _ in range(2):
        optimizer.zero_grad()
        vit(image).square().mean().backward()
        optimizer.step()
    found = module_statistics({"backbone": vit}, optimizer)
    stats.append({k: float(v) for k, v in found.items()})
json.dump({"count": meter.count, "total": meter.total, "attention": float(attention),
           "again": float(again), "stats": stats}, open(f"{folder}/{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Means over processes; sharded weights; metrics that one process alone has do not hang."""
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'dinov3_modified'}", "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path)],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [worker.communicate(timeout=600)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    rows = lines(tmp_path / "m.json")
    assert [row["iteration"] for row in rows] == [0, 10, 20]
    assert [row["loss"] for row in rows] == [50.0, 55.0, 60.0]
    assert [row["lr"] for row in rows] == [0.0, 5.0, 10.0]
    assert lines(tmp_path / "odd.json")[0]["a"] == 1.0
    assert "logged different ones" in errors[0]
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (result["count"], result["total"]) == (3, 2.0)
        assert result["attention"] < 1e-6
        assert result["again"] < 1e-6
        plain, sharded = result["stats"]
        assert sharded == pytest.approx(plain, rel=1e-3)
        assert any(name.startswith("update_ratio/backbone.blocks.1") for name in plain)
