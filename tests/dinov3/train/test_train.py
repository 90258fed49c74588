"""The training program as a user runs it: whole runs, in processes of their own where signals matter."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from held_run import held_python
from omegaconf import OmegaConf
from PIL import Image

from dinov3.cells import run_data
from dinov3.cells.hooks import watched
from dinov3.cells.resumption import set_earlier_run_aside
from dinov3.cells.strategy import allow_tf32
from dinov3.models import vision_transformer
from dinov3.train import train as program
from dinov3.train.train import (
    NonFiniteLossError,
    Stopped,
    build_schedulers,
    build_schedulers_v2,
    main,
    seed_step,
)

ROOT = Path(__file__).parents[3]
BY_NAME = r"pattern=(?P<field>f\d)_(?P<channel>\w+)\.tif"  # of the files of `fields`
SMALL = [
    "student.arch=vit_tiny",
    "student.patch_size=8",
    "student.drop_path_rate=0.3",
    "student.layerscale=0.1",
    "student.n_storage_tokens=1",
    "dino.head_n_prototypes=32",
    "dino.head_hidden_dim=16",
    "dino.head_bottleneck_dim=8",
    "ibot.head_n_prototypes=32",
    "ibot.head_hidden_dim=16",
    "ibot.head_bottleneck_dim=8",
    "compute_precision.param_dtype=fp32",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=2",
    "train.batch_size_per_gpu=3",
    "train.num_workers=0",
    "train.OFFICIAL_EPOCH_LENGTH=3",
    "optim.epochs=2",
    "optim.warmup_epochs=1",
    "optim.freeze_last_layer_epochs=0",
    "teacher.warmup_teacher_temp_epochs=1",
    "checkpointing.period=2",
    "accelerator.device=cpu",
    "monitor.period_iterations=2",
    "monitor.visuals_period_iterations=3",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Ten small RGB pictures."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(3)
    for index in range(10):
        picture = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> Path:
    """Six fields of three 16-bit channels, named by a pattern."""
    import tifffile

    folder = tmp_path_factory.mktemp("fields")
    rng = np.random.default_rng(4)
    for field in range(6):
        for channel in ("dna", "er", "agp"):
            plane = rng.integers(100, 4000, (72, 80)).astype(np.uint16)
            tifffile.imwrite(folder / f"f{field}_{channel}.tif", plane)
    return folder


def arguments(data: str, out: Path, *changes: str) -> list[str]:
    return ["--output-dir", str(out), *SMALL, f"train.dataset_path={data}", *changes]


def run(images: Path, out: Path, *changes: str) -> None:
    """A run in this process."""
    main(arguments(f"ImageFolder:root={images}", out, *changes))


def start(
    data: str,
    out: Path,
    *changes: str,
    command: Sequence[str] = ("dinov3.train.train",),
    go: Path | None = None,
) -> subprocess.Popen:
    """A run in a process of its own; `command` is a module and its first arguments.

    With `go` it waits in iteration 2 until that file exists.
    """
    python = held_python(go) if go else [sys.executable, "-u", "-m"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'dinov3_modified'}"
    return subprocess.Popen(
        [*python, *command, *arguments(data, out, *changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def wait_for(process: subprocess.Popen, text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"no {text!r} in:\n{seen}")


def teacher(out: Path, iteration: int = 5) -> dict[str, torch.Tensor]:
    path = out / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    return torch.load(path, weights_only=True)["teacher"]


def losses(out: Path) -> dict[int, float]:
    lines = (out / "training_metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["iteration"]: r["total_loss"] for r in records if "total_loss" in r}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def vit_of_processes() -> None:
    """For tests that compare with processes of their own, where `vit_tiny` is the true one."""


@pytest.fixture(autouse=True)
def mini_vit(request, monkeypatch, small_architecture) -> None:
    """Runs in this process train `vit_test`."""
    if "vit_of_processes" not in request.fixturenames:
        monkeypatch.setattr(vision_transformer, "vit_tiny", vision_transformer.vit_test)


@pytest.fixture
def whole_run(images, made_once, request) -> Path:
    """An uninterrupted run, to compare with."""
    true_network = "vit_of_processes" in request.fixturenames
    return made_once(
        "whole_run_of_vit_tiny" if true_network else "whole_run", lambda out: run(images, out)
    )


@pytest.fixture
def copied_run(whole_run, tmp_path) -> Path:
    """A run of one's own: other processes of the test run read `whole_run` at the same time."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def test_what_a_run_leaves(whole_run):
    assert (whole_run / "config.yaml").is_file()
    assert (whole_run / "logs" / "log.txt").is_file()
    assert sorted(p.name for p in (whole_run / "ckpt").iterdir()) == ["1", "3", "5"]
    assert (whole_run / "visuals" / "attention_0000003.png").is_file()
    assert sorted(losses(whole_run)) == [0, 5]
    assert "monitor/cls_effective_rank" in (whole_run / "monitor_metrics.json").read_text()
    rows = (whole_run / "training_metrics.json").read_text().splitlines()
    assert [json.loads(row)["lr"] >= 0 for row in rows] == [True, True]
    names = teacher(whole_run)
    assert {name.split(".")[0] for name in names} == {"backbone", "dino_head", "ibot_head"}
    assert OmegaConf.load(whole_run / "config.yaml").optim.lr == 0.001, "before scaling"


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit(vit_of_processes, images, whole_run, tmp_path):
    """kill -9 at some moment after a checkpoint; the number of workers changes nothing either."""
    data = f"ImageFolder:root={images}"
    process = start(data, tmp_path, "train.num_workers=2", go=tmp_path / "never")
    wait_for(process, "Checkpoint of iteration 1 saved")
    process.kill()
    process.communicate()
    assert not (tmp_path / "eval").exists()
    run(images, tmp_path)
    assert "continuing with iteration" in (tmp_path / "logs" / "log.txt").read_text()
    assert same(teacher(tmp_path), teacher(whole_run))
    assert losses(tmp_path)[5] == pytest.approx(losses(whole_run)[5], rel=0.5)


def hook(monkeypatch, call) -> list[str]:
    """`call(iteration)` as the evaluation after every step."""
    module = types.ModuleType("a_hook")
    module.make = lambda cfg: lambda backbone, iteration, folder: call(iteration) or {}
    monkeypatch.setitem(sys.modules, "a_hook", module)
    return ["ssl_evaluation.hook=a_hook:make", "ssl_evaluation.period_iterations=1"]


def test_signal_saves_and_stops(images, whole_run, tmp_path, monkeypatch):
    """The evaluation changes the generators too, which must not change the run."""

    def scored(iteration: int) -> None:
        torch.manual_seed(99)
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def noted(metric_logger, cfg, resume):
        resumed.append(resume)
        return watched(metric_logger, cfg, resume)

    resumed: list[bool] = []
    monkeypatch.setattr("dinov3.train.train.watched", noted)
    changes = ["checkpointing.period=1000", *hook(monkeypatch, scored)]
    with pytest.raises(Stopped, match="stopped by SIGTERM after iteration 2"):
        run(images, tmp_path, *changes)
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["2"]
    run(images, tmp_path, "checkpointing.period=1000")
    assert "continuing with iteration 3" in (tmp_path / "logs" / "log.txt").read_text()
    assert same(teacher(tmp_path), teacher(whole_run))
    assert resumed == [True, True], "both halves are one run of wandb"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "program", "expected"),
    [
        (signal.SIGUSR2, "dinov3.train.train", 1),
        (signal.SIGINT, "dinov3.train.train", 1),
        (signal.SIGUSR2, "dinocell", 75),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_signal_ends_a_process_with_one_sentence(
    vit_of_processes, images, whole_run, tmp_path, number, program, expected
):
    """Upstream's entry ends with 1, `dinocell pretrain` with the code that asks for another start."""
    data, out = f"ImageFolder:root={images}", tmp_path / "out"
    changes = ["checkpointing.period=1000"]
    command = [program]
    if program == "dinocell":
        (tmp_path / "empty.yaml").write_text("{}\n")
        command += ["pretrain", str(tmp_path / "empty.yaml")]
    process = start(data, out, *changes, command=command, go=tmp_path / "go")
    seen = wait_for(process, "Training [0/6]")
    process.send_signal(number)
    (tmp_path / "go").touch()
    code, output = finish(process)
    assert code == expected, output
    assert f"stopped by {number.name} after iteration" in output
    assert "Traceback" not in seen + output
    saved = int(next((out / "ckpt").iterdir()).name)
    assert saved < 5
    code, output = finish(start(data, out, *changes, command=command))
    assert code == 0, output
    assert f"continuing with iteration {saved + 1}" in output
    assert same(teacher(out), teacher(whole_run))


@pytest.mark.slow
def test_wandb_has_the_lines_of_both_halves(images, tmp_path, read_history, monkeypatch):
    """Offline, in one wandb run over an interruption, each step once and in order."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    data, out = f"ImageFolder:root={images}", tmp_path / "out"
    changes = ["wandb.enabled=true", "monitor.visuals_period_iterations=4"]
    process = start(data, out, *changes, go=tmp_path / "go")
    wait_for(process, "Training [0/6]")
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    code, _ = finish(process)
    assert code == 1
    code, output = finish(start(data, out, *changes))
    assert code == 0, output
    run_id = (out / "wandb_run_id.txt").read_text().strip()
    files = sorted((out / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    rows = [row for file in files for row in read_history(file)]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    lines = [
        json.loads(line)
        for name in ("training_metrics.json", "monitor_metrics.json")
        for line in (out / name).read_text().splitlines()
    ]
    expected: dict[int, dict[str, float]] = {}
    for line in lines:
        expected.setdefault(line["iteration"], {}).update(line)
    assert set(steps) == set(expected)
    for row in rows:
        for name, value in expected[row["_step"]].items():
            if name != "iteration":
                assert row[name] == pytest.approx(value, nan_ok=True), (row["_step"], name)
    assert any("monitor/cls_effective_rank" in row for row in rows)
    assert any(name.startswith("visuals/pca") for row in rows for name in row)


def test_damaged_checkpoint_is_skipped(images, whole_run, tmp_path, caplog):
    shutil.copytree(whole_run, tmp_path / "run")
    out = tmp_path / "run"
    shutil.rmtree(out / "eval")
    shard = next((out / "ckpt" / "5").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with caplog.at_level("WARNING"):
        run(images, out)
    text = (out / "logs" / "log.txt").read_text()
    assert "ckpt/5 is skipped" in text
    assert "continuing with iteration 4" in text
    assert same(teacher(out), teacher(whole_run))


def test_only_damaged_checkpoints_stop_the_run(images, copied_run):
    for path in (copied_run / "ckpt").iterdir():
        shard = next(path.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-100])
    names = sorted(path.name for path in (copied_run / "ckpt").iterdir())
    with pytest.raises(
        ValueError, match=r"must be intact to continue, got damaged ones only \(5: "
    ):
        run(images, copied_run)
    assert sorted(path.name for path in (copied_run / "ckpt").iterdir()) == names
    (copied_run / "eval" / "training_5").rename(copied_run / "eval" / "training_9")
    main(["--no-resume", *arguments(f"ImageFolder:root={images}", copied_run)])
    assert (copied_run / "ckpt_1").is_dir()
    assert (copied_run / "eval_1" / "training_9").is_dir(), "no teacher of the run that starts"
    assert [path.name for path in (copied_run / "eval").iterdir()] == ["training_5"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_starts_has_nothing_of_an_earlier_one(tmp_path, resume):
    """Also without `--no-resume`, where no checkpoint was written yet."""
    files = ["eval/training_9/teacher_checkpoint.pth", "visuals/images.pt", "evaluation.jsonl"]
    for name in [*files, "lost.jsonl", "eval_1/kept", "config.yaml"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ckpt" / ".3.part").mkdir(parents=True)
    set_earlier_run_aside(tmp_path, resume)
    expected = ["ckpt", "config.yaml", "eval_1", "eval_2", "evaluation_2.jsonl", "lost_2.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*expected, "visuals_2"]
    (tmp_path / "ckpt" / "3").mkdir()
    (tmp_path / "lost.jsonl").touch()
    set_earlier_run_aside(tmp_path, resume)
    assert (tmp_path / "lost.jsonl").exists() == resume, "a run that continues reads it"
    assert (tmp_path / "ckpt_3").exists() != resume


@pytest.mark.parametrize("change", ["removed", "renamed"])
def test_files_that_went_between_stop_and_resumption_are_named(
    images, copied_run, tmp_path, change
):
    shutil.rmtree(copied_run / "ckpt" / "5")
    saved = OmegaConf.load(copied_run / "config.yaml")
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    saved.train.dataset_path = f"ImageFolder:root={folder}"
    OmegaConf.save(saved, copied_run / "config.yaml")
    (folder / "3.png").rename(folder / "3a.png") if change == "renamed" else (
        folder / "3.png"
    ).unlink()
    what = "9 instead of 10 samples" if change == "removed" else "others of the same number"
    with pytest.raises(ValueError, match=f"samples that it started with, got {what}"):
        run(folder, copied_run)
    run(folder, copied_run, "accelerator.allow_changed_config=true")
    assert f"samples are {what}" in (copied_run / "logs" / "log.txt").read_text()


def test_channels_that_went_between_stop_and_resumption_are_noticed(fields, tmp_path):
    """Of a field that keeps its name; a run of an earlier version recorded names alone."""
    folder = Path(shutil.copytree(fields, tmp_path / "fields"))
    data = rf"JUMPCellPaintingMultiView:root={folder}:missing=allow:{BY_NAME}"
    out = tmp_path / "out"

    def whole_run_of_fields(*changes: str) -> dict:
        main(arguments(data, out, "multiview.strategy=multiview", *changes))
        shutil.rmtree(out / "ckpt" / "5")
        return json.loads((out / "start.json").read_text())

    record = whole_run_of_fields()
    assert record["samples"].keys() == {"count", "names", "channels"}
    (folder / "f3_er.tif").unlink()
    message = "that it started with, got the same fields with other channels: restore or remove"
    with pytest.raises(ValueError, match=message):
        whole_run_of_fields()
    del record["samples"]["channels"]
    (out / "start.json").write_text(json.dumps(record))
    found = whole_run_of_fields()
    assert "samples are" not in (out / "logs" / "log.txt").read_text()
    assert found["samples"].keys() == {"count", "names", "channels"}, "compared from now on"
    (folder / "f3_agp.tif").unlink()
    with pytest.raises(ValueError, match=message):
        whole_run_of_fields()
    whole_run_of_fields("accelerator.allow_changed_config=true")
    text = (out / "logs" / "log.txt").read_text()
    assert "samples are the same fields with other channels since the start" in text


def test_views_by_channel_belong_to_fields(images, fields, tmp_path):
    with pytest.raises(
        ValueError, match="strategy` must be '' for a data set of pictures, got 'sin"
    ):
        run(images, tmp_path, "multiview.strategy=single")
    data = f"JUMPCellPaintingMultiView:root={fields}:pattern=(?P<field>f.)_(?P<channel>.*)[.]tif"
    with pytest.raises(ValueError, match="strategy` must be set for a data set of fields, got ''"):
        main(arguments(data, tmp_path))


def test_a_second_run_in_a_folder_is_refused(images, tmp_path, monkeypatch):
    """From inside the first one: the lock belongs to the opened file, not to the process."""
    refused: list[str] = []

    def second(iteration: int) -> None:
        if iteration == 1:
            with pytest.raises(ValueError, match="one run at a time") as error:
                run(images, tmp_path)
            refused.append(str(error.value))

    run(images, tmp_path, *hook(monkeypatch, second))
    assert f"process {os.getpid()} on " in refused[0]
    run(images, tmp_path)  # it ended: the folder is free


@pytest.mark.parametrize(("iteration", "kept"), [(1, "no checkpoint"), (3, "after iteration 1")])
def test_a_second_interrupt_says_what_was_saved(images, tmp_path, monkeypatch, iteration, kept):
    def interrupted(self, done, batches):
        if done == iteration:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, done, batches)

    step = program._Run.step
    monkeypatch.setattr(program._Run, "step", interrupted)
    with pytest.raises(Stopped, match=kept) as error:
        run(images, tmp_path)
    assert "before its state was saved" in str(error.value)
    assert "run the same command" in str(error.value)
    monkeypatch.setattr(program._Run, "step", step)
    run(images, tmp_path)


def test_finished_run_does_nothing(images, copied_run):
    before = (copied_run / "training_metrics.json").read_text()
    run(images, copied_run)
    assert (copied_run / "training_metrics.json").read_text() == before


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_finished_run_leaves_its_teacher_as_it_is(images, copied_run, sharded):
    def written() -> dict[str, tuple[int, int]]:
        found = {path.name: path.stat() for path in (copied_run / "eval/training_5").iterdir()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}

    run(images, copied_run, f"train.sharded_eval_checkpoint={sharded}")
    before = written()
    assert ("sharded_teacher_checkpoint" in before) == (sharded == "true")
    run(images, copied_run, f"train.sharded_eval_checkpoint={sharded}")
    assert written() == before


def test_a_teacher_that_is_missing_is_written(images, whole_run, copied_run):
    """As after a kill, or on a full disk, between the last checkpoint and the teacher's file."""
    shutil.rmtree(copied_run / "eval")
    run(images, copied_run)
    assert same(teacher(copied_run), teacher(whole_run))
    shutil.rmtree(copied_run / "ckpt" / "5")
    run(images, copied_run, "evaluation.eval_period_iterations=4")
    assert sorted(path.name for path in (copied_run / "eval").iterdir()) == [
        "training_3",
        "training_5",
    ]


def test_changed_configuration_is_refused(images, copied_run):
    with pytest.raises(ValueError, match=r"1 changes .*optim.lr: 0.001 → 0.5"):
        run(images, copied_run, "optim.lr=0.5")
    with pytest.raises(ValueError, match=r"accelerator.seed: 0 → 4"):
        run(images, copied_run, "accelerator.seed=4")


@pytest.mark.slow
def test_changes_that_are_allowed(images, copied_run):
    run(images, copied_run, "train.num_workers=1", "checkpointing.period=3")
    run(images, copied_run, "optim.lr=0.5", "accelerator.allow_changed_config=true")


def test_changed_number_of_processes_is_refused(images, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "start.json").read_text())
    (tmp_path / "run" / "start.json").write_text(json.dumps({**record, "world_size": 4}))
    with pytest.raises(ValueError, match="the 4 processes that it started with, got 1"):
        run(images, tmp_path / "run")


@pytest.mark.slow
def test_no_resume_sets_the_old_run_aside(images, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    main(["--no-resume", *arguments(f"ImageFolder:root={images}", tmp_path / "run")])
    assert sorted(p.name for p in (tmp_path / "run" / "ckpt_1").iterdir()) == ["1", "3", "5"]
    assert same(teacher(tmp_path / "run"), teacher(whole_run))


def test_eval_only_writes_the_teacher(images, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    main(["--eval-only", *arguments(f"ImageFolder:root={images}", tmp_path / "run")])
    path = tmp_path / "run" / "eval" / "manual_5" / "teacher_checkpoint.pth"
    assert same(torch.load(path, weights_only=True)["teacher"], teacher(whole_run))
    other = tmp_path / "none" / "eval" / "training_5"
    other.mkdir(parents=True)
    with pytest.raises(ValueError, match="must find a checkpoint"):
        main(["--eval-only", *arguments(f"ImageFolder:root={images}", tmp_path / "none")])
    assert other.is_dir()


@pytest.mark.slow
def test_seed_and_data_seed_change_the_run(images, whole_run, tmp_path):
    main(["--seed", "1", *arguments(f"ImageFolder:root={images}", tmp_path / "a")])
    run(images, tmp_path / "b", "train.seed=1")
    assert not same(teacher(tmp_path / "a"), teacher(whole_run))
    assert not same(teacher(tmp_path / "b"), teacher(whole_run))


def test_nan_stops_with_names_and_state(images, tmp_path):
    """The named samples are those of the iteration in the data order."""
    from dinov3.data.samplers import InfiniteSampler

    with pytest.raises(
        NonFiniteLossError, match=r"in iteration \d with the samples \d.png"
    ) as caught:
        run(images, tmp_path, "optim.lr=1e30", "optim.clip_grad=1e30", "optim.warmup_epochs=0")
    iteration = int(str(caught.value).split("iteration ")[1].split()[0])
    folder = tmp_path / "nan_logs" / f"iteration_{iteration}"
    batch = torch.load(folder / "batch.pth", weights_only=True)[0]
    assert batch["collated_global_crops"].shape == (6, 3, 32, 32)
    assert (folder / "state" / "COMPLETE.json").is_file()
    order = iter(InfiniteSampler(sample_count=10, shuffle=True, seed=1))
    indices = [next(order) for _ in range(3 * (iteration + 1))][-3:]
    names = json.loads((folder / "samples.json").read_text())
    assert names == [f"{index}.png" for index in indices]


@pytest.mark.slow
def test_multi_resolution_run_resumes(images, tmp_path):
    changes = [
        "monitor.enabled=false",
        "crops.global_crops_size=[32,48]",
        "crops.local_crops_size=[16,24]",
        "crops.global_local_crop_pairs_ratios=[0.5,0.5]",
        "crops.gram_teacher_crops_size=[null,null]",
        "checkpointing.max_to_keep=10",
        "checkpointing.period=1",
    ]
    run(images, tmp_path / "a", *changes)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for iteration in (3, 4, 5):
        shutil.rmtree(tmp_path / "b" / "ckpt" / str(iteration))
    shutil.rmtree(tmp_path / "b" / "eval")
    run(images, tmp_path / "b", *changes)
    assert same(teacher(tmp_path / "a"), teacher(tmp_path / "b"))


def test_accumulation_sees_other_samples(images, tmp_path):
    run(images, tmp_path, "accelerator.accumulation_steps=2", "optim.epochs=1")
    line = json.loads((tmp_path / "training_metrics.json").read_text().splitlines()[-1])
    assert line["global_batch_size"] == 6
    assert line["local_batch_size"] == 3
    config = OmegaConf.load(tmp_path / "config.yaml")
    assert config.optim.lr == 0.001
    peak = 0.001 * 4 * (6 / 1024) ** 0.5
    assert line["lr"] == pytest.approx(peak / 2, rel=0.01), "the median of 0, half and peak"


@pytest.mark.parametrize("photometrics", ["worker", pytest.param("device", marks=pytest.mark.slow)])
def test_multiview_run(fields, tmp_path, photometrics):
    data = f"JUMPCellPaintingMultiView:root={fields}:{BY_NAME}"
    main(
        arguments(
            data,
            tmp_path,
            "multiview.strategy=multiview",
            f"multiview.photometrics={photometrics}",
            "optim.epochs=1",
        )
    )
    assert np.isfinite(list(losses(tmp_path).values())).all()


def test_dense_loss_resumes_bit_for_bit(fields, tmp_path):
    """With softmax centring, whose running centre is part of the state."""
    data = f"JUMPCellPaintingMultiView:root={fields}:{BY_NAME}"
    aligned = ("strategy=multiview", "window=same", "turn_together=true")
    changes = [*(f"multiview.{change}" for change in aligned), "train.centering=auto"]

    def train(name: str, weight: float) -> Path:
        out = tmp_path / name
        main(arguments(data, out, *changes, f"multiview.dense_weight={weight}"))
        return out

    whole = train("a", 1.0)
    assert "`train.centering`: softmax" in (whole / "logs" / "log.txt").read_text()
    copied = Path(shutil.copytree(whole, tmp_path / "b"))
    for part in ("ckpt/3", "ckpt/5", "eval"):
        shutil.rmtree(copied / part)
    assert same(teacher(train("b", 1.0)), teacher(whole))
    assert "continuing with iteration 2" in (copied / "logs" / "log.txt").read_text()
    assert not same(teacher(train("c", 0.0)), teacher(whole))


@pytest.mark.slow
def test_evaluation_hook_and_its_failure(images, tmp_path, monkeypatch):
    calls = []

    def make(cfg):
        def evaluate(backbone, iteration, output_dir):
            calls.append((iteration, next(backbone.parameters()).requires_grad))
            if iteration > 1:
                raise RuntimeError("no room")
            return {"eval/ap50": 0.25}

        return evaluate

    module = types.ModuleType("a_hook")
    module.make = make
    monkeypatch.setitem(sys.modules, "a_hook", module)
    run(images, tmp_path, "ssl_evaluation.hook=a_hook:make", "ssl_evaluation.period_iterations=2",
        "optim.epochs=2")  # fmt: skip
    assert [iteration for iteration, _ in calls] == [1, 3, 5]
    assert '"eval/ap50": 0.25' in (tmp_path / "monitor_metrics.json").read_text()
    assert "The evaluation of iteration 3 failed" in (tmp_path / "logs" / "log.txt").read_text()
    with pytest.raises(ValueError, match=r"package.module:function, got 'nothing:x'"):
        run(images, tmp_path / "b", "ssl_evaluation.hook=nothing:x",
            "ssl_evaluation.period_iterations=1")  # fmt: skip


@pytest.mark.slow
def test_start_from_a_patch_16_file_is_remembered(images, tmp_path, whole_run):
    """The multiplier of the adapted patch embedding holds after a resumption without the file."""
    from dinov3.models.vision_transformer import vit_tiny

    torch.manual_seed(0)
    options = {"layerscale_init": 0.1, "n_storage_tokens": 1}
    vit = vit_tiny(patch_size=16, **options)
    vit.init_weights()
    torch.save(vit.state_dict(), tmp_path / "b.pth")
    changes = [f"student.pretrained_weights={tmp_path / 'b.pth'}", "checkpointing.max_to_keep=9"]
    run(images, tmp_path / "a", *changes)
    record = json.loads((tmp_path / "a" / "start.json").read_text())
    assert record["from_patch_size"] == 16
    assert record["patch_embed_lr_mult"] == 1.0
    log = (tmp_path / "a" / "logs" / "log.txt").read_text()
    assert "patch size 16 → 8 (nearest)" in log
    assert "`optim.patch_embed_lr_mult`: 1.0 instead of 0.2" in log
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "ckpt" / "5")
    shutil.rmtree(tmp_path / "b" / "eval")
    (tmp_path / "b.pth").unlink()
    run(images, tmp_path / "b", *changes)
    assert same(teacher(tmp_path / "a"), teacher(tmp_path / "b"))
    assert not same(teacher(tmp_path / "a"), teacher(whole_run))


def on_two(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in two processes; it may fail."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'dinov3_modified'}"
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), *arguments],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip


AS_ONE = """
import sys

import numpy as np
import torch

from dinov3.cells import run_data
from dinov3.train import train


class SameMask:
    # Masks are drawn for a batch: the same for all images, the halves of a batch have those of the whole.
    def __init__(self, input_size, **rest):
        self.shape = input_size

    def __call__(self, count):
        mask = np.zeros(self.shape, bool)
        mask.flat[:count] = True
        return mask


run_data.MaskingGenerator = SameMask
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_train_as_one(vit_of_processes, images, tmp_path, monkeypatch):
    """Replicas and FSDP2, each with half of the batch: losses and files of one process with all of it."""
    script = tmp_path / "as_one.py"
    script.write_text(AS_ONE)

    def options(strategy: str, batch: int) -> list[str]:
        return [
            *arguments(f"ImageFolder:root={images}", tmp_path / strategy),
            *(f"accelerator.strategy={strategy}", f"train.batch_size_per_gpu={batch}"),
            *("student.drop_path_rate=0.0", "dino.koleo_loss_distributed=true"),
            *("ibot.mask_sample_probability=1.0", "ibot.mask_ratio_min_max=[0.25,0.25]"),
            *("train.OFFICIAL_EPOCH_LENGTH=6", "checkpointing.period=6"),
            *("monitor.period_iterations=6", "monitor.visuals_period_iterations=12"),
        ]

    def lines(out: Path) -> list[dict]:
        text = (out / "training_metrics.json").read_text()
        return [row for row in map(json.loads, text.splitlines()) if "total_loss" in row]

    names = ("global_batch_size", "total_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss", "lr",
             "backbone_grad_norm")  # fmt: skip
    monkeypatch.setattr(run_data, "MaskingGenerator", run_data.MaskingGenerator)
    monkeypatch.setattr(sys, "argv", [str(script), *options("none", batch=4)])
    runpy.run_path(str(script), run_name="__main__")
    expected = lines(tmp_path / "none")
    assert {row["global_batch_size"] for row in expected} == {4}
    assert [row["iteration"] for row in expected] == [0, 10, 11]
    assert abs(expected[-1]["total_loss"] - expected[0]["total_loss"]) > 0.1  # it has learnt
    for strategy in ("ddp", "fsdp"):
        done = on_two(script, *options(strategy, batch=2))
        assert done.returncode == 0, done.stderr[-3000:]
        for row, wanted in zip(lines(tmp_path / strategy), expected, strict=True):
            for name in names:
                assert row[name] == pytest.approx(wanted[name], rel=2e-4), (strategy, name)
        assert sorted(p.name for p in (tmp_path / strategy / "ckpt").iterdir()) == ["11", "5"]
    one, other = teacher(tmp_path / "ddp", 11), teacher(tmp_path / "fsdp", 11)
    assert one.keys() == other.keys()
    for name, value in one.items():  # equal up to rounding
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=2e-5)


SLOW = """
import signal
import sys
import time

import torch

from dinov3.train import ssl_meta_arch, train

honest = ssl_meta_arch.SSLMetaArch.forward_backward


def stuck(self, data, *, iteration=0, **rest):
    if iteration == 2 and torch.distributed.get_rank() == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun gives others half a minute
        time.sleep(100)
    return honest(self, data, iteration=iteration, **rest)


ssl_meta_arch.SSLMetaArch.forward_backward = stuck
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_waiting_for_a_stuck_process_ends(images, tmp_path):
    """accelerator.timeout_s: a job with a process that hangs ends with an error, not with its time."""
    script = tmp_path / "stuck.py"
    script.write_text(SLOW)
    data = f"ImageFolder:root={images}"
    done = on_two(script, *arguments(data, tmp_path / "out", "accelerator.timeout_s=8"))
    assert done.returncode != 0
    assert "Timed out waiting 8000ms" in done.stderr


GUARD = """
import sys

import torch

from dinov3.train import ssl_meta_arch, train

honest = ssl_meta_arch.SSLMetaArch.forward_backward


def broken(self, data, *, iteration=0, **rest):
    loss, metrics = honest(self, data, iteration=iteration, **rest)
    if iteration == 2 and torch.distributed.get_rank() == 1:
        loss = loss * float("nan")
    return loss, metrics


ssl_meta_arch.SSLMetaArch.forward_backward = broken
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_nan_of_one_process_stops_all(images, tmp_path):
    """The process whose loss is a number does not wait for ever for the other."""
    script = tmp_path / "broken.py"
    script.write_text(GUARD)
    done = on_two(script, *arguments(f"ImageFolder:root={images}", tmp_path / "out"))
    assert done.returncode != 0
    assert "in iteration 2" in done.stderr
    assert (tmp_path / "out" / "nan_logs" / "iteration_2").is_dir()


# --- wrong input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.dataset_path=Nope:root=x"], "must be one of ImageFolder, JUMP"),
        (["train.dataset_path=ImageFolder:root=/nowhere"], "must be a folder, got /nowhere"),
        (["train.dataset_path=ImageFolder:colour=red"], "Keys of ImageFolder must be among"),
        (["optim.lrr=1"], "got optim.lrr in the command line; near it: optim.lr"),
        (["optim.lr=fast"], "optim.lr` must be a number, got 'fast'"),
        (["optim.lr"], "Changes must be key=value, got 'optim.lr'"),
        (["crops.global_crops_size=36"], "must be multiples of the patch size 8"),
        (["optim.warmup_epochs=50"], "at least as long as its warm-up"),
        (
            ["student.pretrained_weights=/nowhere.pth"],
            "must be a file or a folder, got /nowhere.pth",
        ),
        (["wandb.mode=loud"], "wandb.mode` must be one of"),
        (["accelerator.timeout_s=0"], "accelerator.timeout_s` must be above 0, got 0"),
        (["multiview.strategy=sideways"], "strategy` must be one of multiview"),
    ],
)
def test_wrong_input_is_one_sentence(images, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(images, tmp_path, *changes)


def test_empty_folder(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="must hold images"):
        run(tmp_path / "images", tmp_path / "out")


def test_unreadable_image_is_named(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    for index in range(10):
        (tmp_path / "images" / f"{index}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"got 10 of 10 .*0.png .*, 9.png "):
        run(tmp_path / "images", tmp_path / "out")


def test_options_without_effect_warn(images, tmp_path):
    main(["--profiling", *arguments(f"ImageFolder:root={images}", tmp_path, "optim.epochs=0",
                                    "optim.warmup_epochs=0", "MODEL.DTYPE=bf16",
                                    "teacher.warmup_teacher_temp_epochs=0")])  # fmt: skip
    log = (tmp_path / "logs" / "log.txt").read_text()
    assert "--profiling has no effect" in log
    assert "MODEL.DTYPE='bf16' has no effect" in log
    with pytest.raises(NotImplementedError, match="trains one student"):
        main(["--multi-distillation"])


@pytest.mark.parametrize(("workers", "ready"), [(2, 5), (0, None)])
def test_each_worker_keeps_batches_ready(images, make_cfg, workers, ready):
    cfg = make_cfg(
        f"train.dataset_path=ImageFolder:root={images}", f"train.num_workers={workers}",
        "accelerator.prefetch_factor=5",
    )  # fmt: skip
    model = types.SimpleNamespace(
        param_dtype=torch.float32, build_data_augmentation_dino=lambda cfg: None
    )
    assert run_data.data_loader(cfg, model, 0, 1).prefetch_factor == ready


def test_without_a_gpu_batches_pass_unchanged():
    batches = [{"collated_global_crops": torch.zeros(1), "upperbound": 3}, {}]
    found = list(run_data.crops_ahead(batches, torch.device("cpu")))
    assert all(a is b for a, b in zip(found, batches, strict=True))


def test_tf32_is_for_gpus_and_follows_its_key(make_cfg):
    before = torch.get_float32_matmul_precision()
    try:
        for device, key, expected in (
            ("cpu", "true", before), ("cuda", "true", "high"), ("cuda", "false", "highest"),
        ):  # fmt: skip
            allow_tf32(make_cfg(f"accelerator.tf32={key}"), torch.device(device))
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_stopped_says_how_to_go_on():
    assert "run the same command to continue" in str(Stopped("SIGTERM", 7))


# --- schedules of a configuration ---


def test_schedules_of_both_forms(make_cfg):
    cfg = make_cfg("optim.lr=1.0", "optim.min_lr=0.1", "optim.freeze_last_layer_epochs=1",
                   "optim.scaling_rule=none")  # fmt: skip
    lr, wd, momentum, temp, last = build_schedulers(cfg)
    np.testing.assert_allclose([lr[i] for i in range(4)], np.linspace(0, 1, 4))
    assert [last[i] for i in range(4)] == [0, 0, 0, 0]
    assert last[5] == lr[5]
    assert wd[0] == pytest.approx(cfg.optim.weight_decay)
    assert momentum[0] == pytest.approx(cfg.teacher.momentum_teacher)
    assert temp[0] == cfg.teacher.warmup_teacher_temp
    assert temp[100] == cfg.teacher.teacher_temp
    section = "{start: 0.0, peak: 2.0, end: 1.0, warmup_epochs: 1}"
    cfg = make_cfg(
        *(f"schedules.{n}={section}" for n in ("weight_decay", "momentum", "teacher_temp")),
        "schedules.lr={start: 0.0, peak: 2.0, end: 1.0, warmup_epochs: 1, freeze_last_layer_epochs: 1}",
        "optim.scaling_rule=linear_wrt_256",
    )
    lr, wd, momentum, temp, last = build_schedulers_v2(cfg)
    assert lr[4] == pytest.approx(2.0 * 3 / 256), "scaled by the batch"
    assert wd[4] == momentum[4] == temp[4] == 2.0
    assert last[3] == 0
    assert last[4] == lr[4]


def test_seeds_of_steps_differ():
    seeds = {seed_step(s, r, i, m) for s in (0, 1) for r in (0, 1) for i in (0, 1) for m in (0, 1)}
    assert len(seeds) == 16
    assert seed_step(3, 0, 7) == torch.initial_seed()
