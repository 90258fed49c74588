"""What a submission is going to run: folders, names, tables of tasks, and what is refused before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from typer.main import get_command

from dinocell.cli.app import app, main
from dinocell.cli.cluster import checked_parameters
from dinocell.cluster.plan import look_once, plan_runs, read_table, run_dir_of
from dinocell.cluster.record import JobRecord, Start, write_record
from dinocell.errors import ConfigError, DINOCellError, UsageError
from dinocell.io import write_image
from dinocell.settings import config_to_mapping, load_settings
from dinocell.training.config import TrainConfig

PRETRAINING = "train: {dataset_path: 'ImageFolder:root=pictures'}\noptim: {epochs: 3}\n"
FINE_TUNING = """
name: small
output_dir: tuned
data: {datasets: [{name: blobs, images: data/images, labels: data/labels}]}
"""


@pytest.fixture(autouse=True)
def _configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ssl.yaml").write_text(PRETRAINING)
    Path("train.yaml").write_text(FINE_TUNING)
    # Otherwise it would depend on the tests before whether `plan_runs` knows this tree.


def parsed(command: str, arguments):
    return checked_parameters(get_command(app), command, arguments)


def planned(command: str, *arguments: str, table=(), look=False):
    look_at = look_once() if look else None
    return plan_runs(command, arguments, partial(parsed, command), table=table, look=look_at)


# --- one run ---


@pytest.mark.parametrize(
    ("command", "folder", "name"),
    [
        (["pretrain", "ssl.yaml"], "runs/ssl/ssl", "ssl-ssl"),
        (["pretrain", "ssl.yaml", "-o", "runs/a"], "runs/a", "ssl-a"),
        (["pretrain", "ssl.yaml", "optim.epochs=1", "--output-dir", "b"], "b", "ssl-b"),
        (["train", "train.yaml"], "tuned", "train-tuned"),
        (["train", "train.yaml", "output_dir=runs/other"], "runs/other", "train-other"),
        (["segment", "plate", "-o", "out"], "out", "segment-out"),
    ],
)  # fmt: skip
def test_the_folder_and_name_of_a_run(command, folder, name):
    (run,) = planned(*command)
    assert run.run_dir == run_dir_of(command[0], parsed(command[0], command[1:])) == Path(folder)
    assert run.name == name
    assert run.command == tuple(command)


def test_each_evaluation_is_a_run_of_its_own():
    commands = [
        ["--pred", "p/masks", "--truth", "t"],
        ["--pred", ".", "--truth", "t"],
        ["-m", "a/best.safetensors", "--data", "d"],
        ["-m", "b/best.safetensors", "--data", "d"],
        ["-m", "a/best.safetensors", "--data", "e"],
        ["-m", "a/best.safetensors", "--data", "d", "--out", "scores/of_best.csv"],
    ]
    folders = [planned("evaluate", *command)[0].run_dir for command in commands]
    assert len(set(folders)) == len(commands)
    assert planned("evaluate", *commands[0])[0].run_dir == folders[0]
    assert folders[0].parent == Path("runs/evaluate")
    assert folders[0].name.startswith("masks-")
    assert folders[2].name.startswith("best-")
    assert folders[5].name.startswith("of_best-")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pretrain", "ssl.yaml"], r"root or index that exists, got root=pictures.*look=False"),
        (["pretrain", "ssl.yaml", "train.dataset_path=JUMPS3MultiView:index=far.arrow"],
         r"root or index that exists, got index=far\.arrow"),
        (["pretrain", "ssl.yaml", "student.pretrained_weights=far/w.pth",
          "train.dataset_path=ImageFolder:root=."], "student.pretrained_weights` must be a file"),
        (["train", "train.yaml"], "data/labels|data/images"),
    ],
)  # fmt: skip
def test_missing_files_are_refused_before_the_job(command, message):
    assert len(planned(*command)) == 1
    with pytest.raises(DINOCellError, match=message):
        planned(*command, look=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "-m", "far.safetensors", "--data", "set"], "far.safetensors"),
        (["evaluate", "-m", "dinocell-tiny", "--data", "."], "got . without images"),
        (["evaluate", "--pred", "far", "--truth", "."], "--pred must be a folder that exists, got far"),
        (["segment", "a.tif", "-o", "out", "-m", "far.safetensors"], "far.safetensors"),
    ],
)  # fmt: skip
def test_models_and_folders_are_checked(arguments, message, capsys):
    write_image("a.tif", np.zeros((8, 8), np.uint16))
    for part in ("images", "labels"):
        (Path("set") / part).mkdir(parents=True)
    code, out, err = submitted(capsys, *arguments, "--dry-run")
    assert (code, out) == (2, "")
    assert message in err
    code, out, err = submitted(capsys, *arguments, "--no-look", "--dry-run")
    assert code == 0, err
    # What an earlier job will make is not checked either.
    code, out, err = submitted(capsys, *arguments, "--dependency", "5", "--dry-run")
    assert code == 0, err
    assert "--dependency=afterok:5" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "-m", "m", "--data", "d", "--tune", "--metric", "best"], "--metric must be 'ap'"),
        (["segment", "a.tif", "-o", "out", "--device", "gpu"], "--device must be auto, cpu, cuda"),
        (["segment", "a.tif", "-o", "a.tif"], "where .*a.tif is a file"),
        (["segment", "a.tif", "-o", "a.tif/deeper"], "where .*a.tif is a file"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_before_the_job(arguments, message, capsys):
    write_image("a.tif", np.zeros((8, 8), np.uint16))
    code, out, err = submitted(capsys, *arguments, "--no-look", "--dry-run")
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


def test_what_is_finished_is_refused_before(capsys):
    write_image("a.tif", np.zeros((8, 8), np.uint16))
    Path("out").mkdir()
    Path("out/a_labels.tif").touch()
    command = ["segment", "a.tif", "-o", "out"]
    code, _, err = submitted(capsys, *command, "--dry-run")
    assert code == 2
    assert "must not hold results of these images, got 1" in err
    for more in ("--resume", "--overwrite", "--no-look"):
        assert submitted(capsys, *command, more, "--dry-run")[0] == 0
    # What the same command has started before it was cancelled continues; another command is refused.
    start = Start("7", 0, 0, 0.0, "node")
    write_record("out", JobRecord(command, "cancelled", "", [start]))
    assert submitted(capsys, *command, "--dry-run")[0] == 0
    assert submitted(capsys, *command, "--workers", "2", "--dry-run")[0] == 2
    for state in ("done", "refused"):
        write_record("out", JobRecord(command, state, "", [start]))
        assert submitted(capsys, *command, "--dry-run")[0] == 2


def test_rows_are_looked_at_too(capsys):
    write_image("a.tif", np.zeros((8, 8), np.uint16))
    Path("out/done").mkdir(parents=True)
    Path("out/done/a_labels.tif").touch()
    rows = [{"name": "new", "peak-threshold": "0.5"}, {"name": "done", "peak-threshold": "0.6"}]
    with pytest.raises(UsageError, match=r"Row 2 of the table \(done\): .*must not hold results"):
        planned("segment", "a.tif", "-o", "out", table=rows, look=True)
    assert len(planned("segment", "a.tif", "-o", "out", table=rows[:1], look=True)) == 1


def test_an_index_may_be_in_its_root():
    dataset = "JUMPCellPaintingMultiView:root=far:index=fields.csv"
    command = ["pretrain", "ssl.yaml", f"train.dataset_path={dataset}"]
    Path("far").mkdir()
    with pytest.raises(UsageError, match=r"got index=fields\.csv"):
        planned(*command, look=True)
    Path("far/fields.csv").touch()
    assert len(planned(*command, look=True)) == 1


def test_variables_of_the_site_name_data(blob_data, capsys, monkeypatch):
    monkeypatch.delenv("BLOBS", raising=False)
    Path("train.yaml").write_text(re.sub(r"data/(\w+)", r"'${BLOBS}/\1'", FINE_TUNING))
    command = ["train", "train.yaml", "--dry-run"]
    assert submitted(capsys, *command)[0] == 2
    code, _, err = submitted(capsys, *command, "--set", f"environment.BLOBS={blob_data}")
    assert code == 0, err
    assert "BLOBS" not in os.environ


def test_another_configuration_in_the_folder_of_a_run_is_refused(blob_data):
    Path("train.yaml").write_text(FINE_TUNING.replace("data/", f"{blob_data}/"))
    (run,) = planned("train", "train.yaml", look=True)
    run.run_dir.mkdir()
    settings = config_to_mapping(load_settings(TrainConfig, "train.yaml", []))
    (run.run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    assert len(planned("train", "train.yaml", look=True)) == 1
    with pytest.raises(ConfigError, match=r"other values of optimizer\.lr"):
        planned("train", "train.yaml", "optimizer.lr=1e-5", look=True)


def test_another_configuration_of_a_pretraining_is_refused(tmp_path):
    Path("pictures").mkdir()
    from dinov3.configs import get_cfg_from_args

    settings = get_cfg_from_args(
        SimpleNamespace(config_file="ssl.yaml", output_dir="a", opts=[]), strict=True
    )
    (Path("a/ckpt") / "7").mkdir(parents=True)
    for name in (".metadata", "checkpoint.json"):
        (Path("a/ckpt/7") / name).write_text("{}")
    OmegaConf.save(settings, "a/config.yaml")
    assert len(planned("pretrain", "ssl.yaml", "-o", "a", look=True)) == 1
    changed = ["pretrain", "ssl.yaml", "optim.lr=0.5", "-o", "a"]
    with pytest.raises(UsageError, match=r"must keep its configuration, got 1 changes .*optim\.lr"):
        planned(*changed, look=True)
    assert len(planned(*changed, "--no-resume", look=True)) == 1
    assert Path("a/ckpt/7").is_dir()  # it only looked


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["pretrain", "absent.yaml"], "The configuration must be a file, got absent.yaml"),
        (["pretrain", "ssl.yaml", "optim.learning_rate=1"], "optim.learning_rate"),
        (["pretrain", "ssl.yaml", "optim.epochs=many"], "optim.epochs"),
        (["pretrain", "ssl.yaml", "train.dataset_path=Images:root=."], "name in a dataset string"),
        (["pretrain", "ssl.yaml", "train.dataset_path=ImageFolder:rot=."], "got 'rot'"),
        (["train", "absent.yaml"], "The configuration must be a readable file"),
        (["train", "train.yaml", "optimizer.rate=1"], "optimizer.rate"),
        (["train", "train.yaml", "schedule.steps=0"], "schedule.steps` must be at least 1"),
    ],
)
def test_a_wrong_configuration_is_refused_before_the_job(command, sentence):
    with pytest.raises(UsageError) as caught:
        planned(*command)
    assert sentence in str(caught.value)


@pytest.mark.slow
def test_a_new_process_refuses_a_wrong_pretraining():
    command = [sys.executable, "-m", "dinocell", "submit", "pretrain", "ssl.yaml", "--no-look",
               "--dry-run"]  # fmt: skip
    right = subprocess.run(command, capture_output=True, text=True, check=False)
    assert right.returncode == 0, right.stderr
    wrong = [*command, "optim.learning_rate=1"]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "optim.learning_rate" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "plate"],  # without -o
        ["segment", "plate", "-o", "out", "--no-such-option", "1"],
        ["pretrain"],
        ["evaluate", "--iou", "high"],
        ["measure", "x"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_before_the_job(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["submit", *arguments, "--dry-run"])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "#SBATCH" not in shown.out
    assert "Traceback" not in shown.err


# --- a table ---


def test_rows_of_a_pretraining():
    rows = [
        {"name": "low", "optim.lr": "1e-4", "train.seed": "0"},
        {"name": "", "optim.lr": "1e-3", "train.seed": ""},
    ]
    low, second = planned("pretrain", "ssl.yaml", "optim.epochs=1", "-o", "sweep", table=rows)
    assert low.command == (
        "pretrain", "ssl.yaml", "optim.epochs=1", "-o", "sweep",
        "optim.lr=1e-4", "train.seed=0", "--output-dir", "sweep/low",
    )  # fmt: skip
    assert (low.run_dir, low.name) == (Path("sweep/low"), "sweep-low")
    # Without a name its place; without a value the configuration's own.
    assert second.command[5:] == ("optim.lr=1e-3", "--output-dir", "sweep/001")
    assert (second.run_dir, second.name) == (Path("sweep/001"), "sweep-001")


def test_rows_of_a_fine_tuning():
    (run,) = planned("train", "train.yaml", table=[{"optimizer.lr": "5e-4"}])
    assert run.command == ("train", "train.yaml", "optimizer.lr=5e-4", "output_dir=tuned/000")
    assert run.run_dir == Path("tuned/000")


def test_rows_of_a_segmentation():
    rows = [{"name": "strict", "peak_threshold": "0.7", "min-area-px": "9"}, {"channels": "0,1"}]
    strict, second = planned("segment", "plate", "-o", "out", table=rows)
    assert strict.command == (
        "segment", "plate", "-o", "out",
        "--peak-threshold", "0.7", "--min-area-px", "9", "--out", "out/strict",
    )  # fmt: skip
    assert second.command[4:] == ("--channels", "0,1", "--out", "out/001")
    assert second.run_dir == Path("out/001")


def test_rows_of_an_evaluation():
    rows = [{"name": "a", "pred": "masks_a"}, {"name": "b", "pred": "masks_b"}]
    first, second = planned("evaluate", "--truth", "t", "--out", "all.csv", table=rows)
    base = first.run_dir.parent
    assert base.name.startswith("all-")
    assert first.command == (
        "evaluate", "--truth", "t", "--out", "all.csv",
        "--pred", "masks_a", "--overwrite", "--out", f"{base}/a/scores.csv",
    )  # fmt: skip
    assert second.run_dir == base / "b"
    (alone,) = planned("evaluate", "--truth", "t", table=[{"pred": "masks"}])
    assert alone.command[-1] == f"{alone.run_dir}/scores.json"


def test_a_row_may_give_what_the_command_lacks(capsys):
    Path("sweep.csv").write_text("name,model\na,far_a.safetensors\nb,far_b.safetensors\n")
    command = ["evaluate", "--data", "d", "--array", "sweep.csv", "--no-look", "--dry-run"]
    code, out, err = submitted(capsys, *command)
    assert code == 0, err
    assert "#SBATCH --array=0-1" in out
    assert "--model far_b.safetensors" in err


def test_on_and_off_in_a_table():
    rows = [
        {"name": "a", "overlay": "false", "allow-mask": "true"},
        {"name": "b", "overlay": "true", "allow_mask": "false"},
    ]
    first, second = planned("segment", "plate", "-o", "out", table=rows)
    for run, overlay in ((first, False), (second, True)):
        parameters = parsed("segment", run.command[1:])
        assert (parameters["overlay"], parameters["allow_mask"]) == (overlay, not overlay)


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (["pretrain", "ssl.yaml", "-o", "s"], [{"name": "a", "optim.lr": "1e-4"}]),
        (["train", "train.yaml"], [{"name": "a", "optimizer.lr": "1e-4"}]),
        (["segment", "plate", "-o", "o"], [{"name": "a", "tile-px": "64", "tta": "true"}]),
        (["evaluate", "--truth", "t"], [{"name": "a", "pred": "p", "boundary_tolerance_px": "3"}]),
    ],
    ids=lambda item: item[0] if isinstance(item[0], str) else "",
)
def test_the_command_of_a_row_reads_as_the_row_says(command, rows):
    """Parsed again, the last of an option that is given twice counts: the row's."""
    (run,) = planned(*command, table=rows)
    parameters = parsed(run.command[0], run.command[1:])
    if command[0] == "evaluate":
        assert parameters["out"] == run.run_dir / "scores.json"
        assert (parameters["pred"], parameters["boundary_tolerance_px"]) == (Path("p"), 3.0)
        return
    assert run_dir_of(command[0], parameters) == run.run_dir
    if command[0] == "segment":
        assert (parameters["tile_px"], parameters["tta"]) == (64, True)
    else:
        assert any(item.endswith("lr=1e-4") for item in parameters["overrides"])


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        (["pretrain", "ssl.yaml", "-o", "sweep"], "optim.rate", "1"),
        (["train", "train.yaml"], "optimizer.rate", "1"),
        (["train", "train.yaml"], "schedule.steps", "0"),
    ],
)
def test_a_wrong_row_is_named(command, key, value):
    rows = [{"name": "right", key: ""}, {"name": "wrong", key: value}]
    with pytest.raises(UsageError, match=r"Row 2 of the table \(wrong\)") as caught:
        planned(*command, table=rows)
    assert key in str(caught.value)


def test_a_wrong_row_of_a_fine_tuning_stays_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match=r"Row 1 of the table \(000\)"):
        planned("train", "train.yaml", table=[{"optimiser.lr": "1"}])


@pytest.mark.parametrize(
    ("command", "row"),
    [
        (["segment", "plate", "-o", "out"], {"peak_treshold": "0.5"}),
        (["segment", "plate", "-o", "out"], {"batch_size": "many"}),
        (["evaluate", "--truth", "t"], {"boundary_tolerance": "2"}),
    ],
)
def test_a_wrong_option_in_a_row_is_named(command, row):
    with pytest.raises(UsageError, match="wrong"):
        planned(*command, table=[{"name": "wrong", **row}])


def test_a_name_may_have_an_equals_sign():
    rows = [{"name": "lr=1e-4", "optim.lr": "1e-4"}]
    (run,) = planned("pretrain", "ssl.yaml", "-o", "sweep", table=rows)
    assert run.run_dir == Path("sweep/lr=1e-4")


def test_names_must_differ():
    with pytest.raises(UsageError, match="must differ in name, got a twice"):
        planned("segment", "p", "-o", "out", table=[{"name": "a"}, {"name": "b"}, {"name": "a"}])
    with pytest.raises(UsageError, match="001 twice"):  # one is named, one has this place
        planned("segment", "p", "-o", "out", table=[{"name": "001"}, {"name": ""}])


# --- reading a table ---


def table(text: str, name: str = "sweep.csv") -> list[dict[str, str]]:
    Path(name).write_bytes(text.encode())
    return read_table(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sweep.csv", "name,optim.lr\na,1e-4\nb,\n"),
        ("sweep.csv", "\ufeffname,optim.lr\r\na,1e-4\r\nb,\r\n"),  # as spreadsheets write it
        ("sweep.csv", " name , optim.lr \n\n a , 1e-4 \n ,\nb,\n"),
        ("sweep.tsv", "name\toptim.lr\na\t1e-4\nb\t\n"),
        ("sweep.txt", "name\toptim.lr\na\t1e-4\nb\t\n"),
    ],
)
def test_forms_of_a_table(name, text):
    assert table(text, name) == [{"name": "a", "optim.lr": "1e-4"}, {"name": "b", "optim.lr": ""}]


def test_values_may_be_quoted():
    (row,) = table('name,crops.global_crops_scale\na,"[0.3, 1.0]"\n')
    assert row == {"name": "a", "crops.global_crops_scale": "[0.3, 1.0]"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a line for each task, got 0 lines"),
        ("name;optim.lr\na;1e-4\n", "must be divided by commas or tabs, got semicolons"),
        ("name,optim.lr\n", "a line for each task, got 1 lines"),
        ("name,name\na,b\n", "Columns of `array` must have different names, got name, name"),
        ("name,\na,b\n", "Columns of `array` must have different names"),
        ("name,optim.lr\na,1\nb,1,2\n", "must have 2 values, got 3 in line 3"),
        ("name,optim.lr\na\n", "must have 2 values, got 1 in line 2"),
        ("name\na/b\n", "must be names of folders, got 'a/b' in line 2"),
        ("name\na\n..\n", "must be names of folders, got '..' in line 3"),
    ],
)
def test_what_is_no_table(text, sentence):
    with pytest.raises(UsageError) as caught:
        table(text)
    assert sentence in str(caught.value)
    assert "sweep.csv" in str(caught.value)


def test_a_table_must_be_a_text_file():
    for path in ("absent.csv", "."):
        with pytest.raises(UsageError, match="`array` must be a table in a text file"):
            read_table(path)
    Path("binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.csv"):
        read_table("binary.csv")


# --- from the command line ---


def submitted(capsys, *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(["submit", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_dry_run_of_a_table(capsys):
    Path("sweep.csv").write_text("name,optimizer.lr\nlow,1e-4\nhigh,1e-3\n")
    code, out, err = submitted(
        capsys, "train", "train.yaml", "--array", "sweep.csv", "--no-look", "--dry-run"
    )
    assert code == 0
    assert "#SBATCH --array=0-1%2" in out
    assert err.splitlines() == [
        f"tuned/{name}: dinocell train train.yaml optimizer.lr={rate} output_dir=tuned/{name}"
        for name, rate in (("low", "1e-4"), ("high", "1e-3"))
    ]
    assert not Path("tuned").exists()


def test_a_wrong_row_ends_the_command_line(capsys):
    Path("sweep.csv").write_text("name,optimizer.rate\nlow,1e-4\n")
    code, out, err = submitted(
        capsys, "train", "train.yaml", "--array", "sweep.csv", "--no-look", "--dry-run"
    )
    assert code == 2
    assert out == ""
    assert err.startswith("dinocell: error: Row 1 of the table (low): ")
    assert len(err.splitlines()) == 1


def test_options_of_the_submission_and_of_the_command_mix(capsys):
    code, out, err = submitted(
        capsys, "--nodes", "2", "pretrain", "ssl.yaml", "-o", "a", "--gpus", "3", "optim.epochs=1",
        "--seed", "4", "--time", "5:00:00", "--partition", "long", "--set", "qos=high", "--no-look", "--dry-run",
    )  # fmt: skip
    assert code == 0
    assert err == "a: dinocell pretrain ssl.yaml -o a optim.epochs=1 --seed 4\n"
    for line in ("nodes=2", "gres=gpu:3", "ntasks-per-node=3", "time=5:00:00", "partition=long",
                 "qos=high"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in out


def test_planning_stays_light():
    """It is done on login nodes: no network is loaded for a plan of a segmentation."""
    code = (
        "import sys; from dinocell.cluster.plan import plan_runs; "
        "plan_runs('segment', ['p'], lambda given: {'out': 'o'}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
