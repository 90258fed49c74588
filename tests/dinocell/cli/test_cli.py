"""The command line: exit codes, messages, files; every wrong call is one sentence."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dinocell import __version__
from dinocell.cli import main
from dinocell.io import find_images, read_labels, write_image, write_labels
from dinocell.network.model import load_model, save_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model_path(small_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(path, small_model)
    return path


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of a call in this process."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def commands() -> list[list[str]]:
    return [
        [],
        ["demo"],
        ["segment"],
        ["train"],
        ["pretrain"],
        ["evaluate"],
        ["inspect"],
        ["weights"],
        ["weights", "list"],
        ["weights", "info"],
        ["weights", "convert"],
        ["weights", "fetch"],
    ]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_teaches(capsys, command):
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0
    assert "Usage: dinocell" in out
    if command and command != ["weights"]:
        assert "Example:" in out


def test_version(capsys):
    assert call(capsys, "--version")[:2] == (0, f"dinocell {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["segment"],
        ["segment", "x.tif"],
        ["segment", "x.tif", "-o", "out", "--no-such-option"],
        ["segment", "x.tif", "-o", "out", "--batch-size", "many"],
        ["segment", "x.tif", "-o", "out", "--batch-size", "0"],
        ["train"],
        ["weights", "info"],
    ],
    ids=" ".join,
)
def test_wrong_calls_end_with_2(capsys, arguments):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err
    assert "Traceback" not in err


class TestSegment:
    def test_folder(self, capsys, blob_data, model_path, tmp_path):
        out = tmp_path / "out"
        code, text, _ = call(
            capsys, "segment", blob_data / "images", "-o", out, "-m", model_path, "--report",
            "--device", "cpu",
        )  # fmt: skip
        assert code == 0
        assert re.search(r"\d+ cells in 6 images", text)
        assert len(list(out.glob("*_labels.tif"))) == 6
        assert (out / "report.html").exists()

    def test_pattern_formats_and_thresholds(self, capsys, blob_data, model_path, tmp_path):
        out = tmp_path / "out"
        code, _, _ = call(
            capsys, "segment", str(blob_data / "images" / "blob[01].tif"), "-o", out, "-m", model_path,
            "-f", "png", "-f", "coco", "--no-overlay", "--peak-threshold", "0.97",
            "--fill-threshold", "0.9", "--min-prominence", "0.2", "--min-area-px", "4",
            "--batch-size", "3", "--tile-px", "40", "--precision", "bf16", "--workers", "2",
            "--pixel-size-um", "0.5",
        )  # fmt: skip
        assert code == 0
        names = {path.name for path in out.iterdir()}
        assert {"blob0_labels.png", "blob0_coco.json", "blob1_cells.csv"} <= names
        assert not any(name.endswith("_overlay.png") for name in names)
        settings = json.loads((out / "settings.json").read_text())
        assert settings["peak_threshold"] == 0.97
        assert settings["min_area_px"] == 4
        with (out / "summary.csv").open() as file:
            assert next(csv.DictReader(file))["pixel_size_um"] == "0.5"

    def test_resume_and_overwrite(self, capsys, blob_data, model_path, tmp_path):
        arguments = ["segment", blob_data / "images", "-o", tmp_path / "out", "-m", model_path]
        assert call(capsys, *arguments)[0] == 0
        code, _, err = call(capsys, *arguments)
        assert code == 2
        assert "--resume" in err
        code, text, _ = call(capsys, *arguments, "--resume")
        assert code == 0
        assert "6 done before" in text
        assert call(capsys, *arguments, "--overwrite")[0] == 0

    def test_channels_and_page(self, capsys, model_path, tmp_path):
        rng = np.random.default_rng(0)
        path = tmp_path / "rgb.png"
        write_image(path, rng.integers(0, 255, (40, 50, 3)).astype(np.uint8))
        base = ["segment", path, "-m", model_path]
        code, out, _ = call(capsys, *base, "-o", tmp_path / "a")
        assert code == 1
        assert "must be gray" in out
        for index, channels in enumerate(["0", "0,2", "green"]):
            assert call(capsys, *base, "-o", tmp_path / str(index), "--channels", channels)[0] == 0
        labels = [read_labels(tmp_path / str(i) / "rgb_labels.tif") for i in range(3)]
        assert not np.array_equal(labels[0], labels[1])
        assert not np.array_equal(labels[0], labels[2])
        code, _, err = call(capsys, *base, "-o", tmp_path / "b", "--channels", " ,")
        assert code == 2
        assert "--channels must name a channel" in err

    def test_stack_and_page(self, capsys, model_path, tmp_path):
        import tifffile

        rng = np.random.default_rng(0)
        path = tmp_path / "stack.tif"
        stack = rng.integers(0, 900, (3, 40, 50)).astype(np.uint16)
        tifffile.imwrite(path, stack, photometric="minisblack", metadata={"axes": "TYX"})
        code, out, _ = call(capsys, "segment", path, "-o", tmp_path / "a", "-m", model_path)
        assert code == 1
        assert "page" in out
        code, _, _ = call(
            capsys, "segment", path, "-o", tmp_path / "b", "-m", model_path, "--page", "1"
        )
        assert code == 0

    def test_mask_instead_of_image(self, capsys, blob_data, model_path, tmp_path):
        mask = blob_data / "labels" / "blob0.png"
        code, out, _ = call(capsys, "segment", mask, "-o", tmp_path / "a", "-m", model_path)
        assert code == 1
        assert "mask or label image" in out
        arguments = ["segment", mask, "-o", tmp_path / "b", "-m", model_path, "--allow-mask"]
        assert call(capsys, *arguments)[0] == 0

    def test_bad_files(self, capsys, blob_data, model_path, tmp_path):
        good = find_images([blob_data / "images"])[0]
        (tmp_path / "cut.tif").write_bytes(good.read_bytes()[:500])
        (tmp_path / "text.png").write_text("not a picture")
        (tmp_path / "none.tif").write_bytes(b"")
        write_image(tmp_path / "nan.npy", np.full((40, 40), np.nan, np.float32))
        write_image(tmp_path / "tiny.png", np.array([[1, 90], [200, 7]], np.uint8))
        out = tmp_path / "out"
        code, text, _ = call(capsys, "segment", tmp_path, good, "-o", out, "-m", model_path)
        assert code == 1
        failed = set(re.findall(r"^failed: \S*?([a-z]+)\.\w+: ", text, flags=re.M))
        assert failed == {"cut", "text", "none", "nan"}
        assert (out / f"{good.stem}_labels.tif").exists()
        assert read_labels(out / "tiny_labels.tif").shape == (2, 2)
        assert not list(out.glob("*.tmp*"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["no_such_file.tif"], "no_such_file"),
            (["IMAGES", "--device", "gpu"], "auto, cpu, cuda"),
            (["IMAGES", "--format", "svg"], "tif, png"),
            (["IMAGES", "--precision", "fp8"], "fp32 or bf16"),
            (["IMAGES", "--model", "dinocell-huge"], "bundled name"),
            (["IMAGES", "--peak-threshold", "0.01", "--fill-threshold", "0.5"], "fill_threshold <"),
            (["IMAGES", "--resume", "--overwrite"], "exclude each other"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_wrong_options(self, capsys, blob_data, model_path, tmp_path, arguments, message):
        filled = [str(blob_data / "images") if a == "IMAGES" else a for a in arguments]
        if "--model" not in filled:
            filled += ["--model", str(model_path)]
        code, _, err = call(capsys, "segment", *filled, "-o", tmp_path / "out")
        assert code == 2
        assert message in err
        assert err.startswith("dinocell: error: ")
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()

    def test_wrong_model_file(self, capsys, blob_data, tmp_path):
        (tmp_path / "m.pth").write_bytes(b"PK\x03\x04rest of a zip")
        code, _, err = call(
            capsys,
            "segment",
            blob_data / "images",
            "-o",
            tmp_path / "out",
            "-m",
            tmp_path / "m.pth",
        )
        assert code == 1
        assert "pickled" in err

    def test_empty_folder(self, capsys, model_path, tmp_path):
        (tmp_path / "in").mkdir()
        code, _, err = call(
            capsys, "segment", tmp_path / "in", "-o", tmp_path / "o", "-m", model_path
        )
        assert code == 2
        assert ".tif" in err

    def test_verbose_shows_the_traceback(self, capsys, tmp_path):
        code, _, err = call(capsys, "-v", "segment", "none.tif", "-o", tmp_path / "out")
        assert code == 2
        assert "Traceback" in err


class TestEvaluate:
    @pytest.fixture
    def folders(self, blob_data, tmp_path):
        truth = blob_data / "labels"
        for path in find_images([truth]):
            labels = read_labels(path)
            labels[labels == 1] = 0
            write_labels(tmp_path / "pred" / f"{path.stem}_labels.tif", labels)
        return tmp_path / "pred", truth

    def test_folders(self, capsys, folders, tmp_path):
        pred, truth = folders
        code, out, _ = call(
            capsys, "evaluate", "--pred", pred, "--truth", truth, "-o", tmp_path / "s.json"
        )
        assert code == 0
        assert "mean over images" in out
        assert "pooled" in out
        for name in ("seg", "det", "op_csb", "ap50", "pq50", "f1_50", "aji", "boundary_f"):
            assert name in out.lower(), name
        saved = json.loads((tmp_path / "s.json").read_text())
        assert saved["pooled"]["ap50_pooled"] == 0.75

    def test_options(self, capsys, folders, tmp_path):
        pred, truth = folders
        _, plain, _ = call(capsys, "evaluate", "--pred", pred, "--truth", truth)
        _, other, _ = call(
            capsys, "evaluate", "--pred", pred, "--truth", truth, "--iou", "0.6", "--per-image",
            "--boundary-tolerance-px", "5", "-o", tmp_path / "s.csv",
        )  # fmt: skip
        assert "ap60" in other
        assert "ap60" not in plain
        assert "blob3" in other
        assert len((tmp_path / "s.csv").read_text().splitlines()) >= 7

    def test_missing_predictions(self, capsys, folders):
        pred, truth = folders
        (pred / "blob2_labels.tif").unlink()
        code, _, err = call(capsys, "evaluate", "--pred", pred, "--truth", truth)
        assert code == 2
        assert "blob2" in err
        assert call(capsys, "evaluate", "--pred", pred, "--truth", truth, "--allow-missing")[0] == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "neither"),
            (["--pred", "x"], "half a pair"),
            (["--model", "x"], "half a pair"),
            (["--pred", "x", "--truth", "x", "--model", "m", "--data", "d"], "both"),
            (["--pred", "x", "--truth", "x", "--tune"], "--tune must"),
            (["--model", "m", "--data", "d", "--save-model", "x"], "--tune"),
            (["--pred", "x", "--truth", "x", "-o", "x.xls"], ".csv or .json"),
            (["--pred", "x", "--truth", "x", "--iou", "2"], "at most 1"),
            (["--pred", "no", "--truth", "no"], "no"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_wrong_calls(self, capsys, arguments, message):
        code, _, err = call(capsys, "evaluate", *arguments)
        assert code == 2
        assert message in err

    def test_model_and_tuning(self, capsys, blob_data, model_path, tmp_path):
        base = ["evaluate", "--model", model_path, "--data", blob_data, "--device", "cpu"]
        code, out, _ = call(capsys, *base)
        assert code == 0
        assert "thresholds (of the model)" in out
        tuned_path = tmp_path / "tuned.safetensors"
        code, out, _ = call(capsys, *base, "--tune", "--metric", "ap50", "--save-model", tuned_path)
        assert code == 0
        assert "tuned here on ap50_pooled" in out
        tuned, before = load_model(tuned_path).config, load_model(model_path).config
        assert tuned.peak_threshold != before.peak_threshold
        code, _, err = call(capsys, *base, "--tune", "--metric", "accuracy")
        assert code == 2
        assert "ap50" in err
        code, _, err = call(capsys, *base, "--tune", "--save-model", model_path)
        assert code == 2
        assert "another file than the model" in err
        code, _, err = call(capsys, *base, "--tune", "--save-model", tmp_path / "m.pt")
        assert code == 2
        assert ".safetensors" in err

    def test_data_folder_without_labels(self, capsys, model_path, tmp_path):
        code, _, err = call(capsys, "evaluate", "--model", model_path, "--data", tmp_path)
        assert code == 2
        assert "without images" in err


class TestTrain:
    def test_a_run_from_the_command_line(self, capsys, blob_data, tmp_path):
        config = {
            "output_dir": str(tmp_path / "run"),
            "model": {"size": "tiny", "patch_size": 16, "window_px": 32, "overlap_px": 8},
            "data": {
                "datasets": [
                    {
                        "name": "blobs",
                        "images": str(blob_data / "images"),
                        "labels": str(blob_data / "labels"),
                    }
                ]
            },
            "schedule": {"steps": 2, "batch_size": 1, "eval_every": 2, "precision": "fp32"},
        }
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(config))
        code, out, _ = call(capsys, "train", path, "device=cpu", "schedule.steps=3")
        assert code == 0
        assert "step 3" in out
        assert "validation AP@0.5 (pooled)" in out
        assert (tmp_path / "run" / "model.safetensors").exists()

    def test_wrong_configurations(self, capsys, tmp_path):
        assert call(capsys, "train", tmp_path / "none.yaml")[0] == 2
        path = tmp_path / "c.yaml"
        path.write_text("optimiser: {lr: 1}")
        code, _, err = call(capsys, "train", path)
        assert code == 2
        assert "did you mean optimizer" in err
        path.write_text(
            "data: {datasets: [{name: a, images: nowhere, labels: nowhere}]}\n"
            f"output_dir: {tmp_path / 'run'}\n"
        )
        code, _, err = call(capsys, "train", path)
        assert code == 2
        assert "must be a folder" in err


class TestWeights:
    def test_info_of_a_file_and_of_an_architecture(self, capsys, model_path):
        code, out, _ = call(capsys, "weights", "info", model_path)
        assert code == 0
        assert "thresholds: peak" in out
        assert "GMAC" in out
        code, out, _ = call(
            capsys, "weights", "info", "tiny/16", "--decoder", "linear", "--image-px", "64"
        )
        assert code == 0
        assert "64×64" in out
        assert "linear" in out

    def test_wrong_names(self, capsys):
        assert call(capsys, "weights", "info", "giant/8")[0] == 2
        assert call(capsys, "weights", "info", "tiny/7")[0] == 2
        assert call(capsys, "weights", "info", "tiny/0")[0] == 2
        assert call(capsys, "weights", "info", "nothing")[0] == 2
        assert call(capsys, "weights", "info", "tiny/16", "--image-px", "3")[0] == 2

    def test_list(self, capsys):
        code, out, _ = call(capsys, "weights", "list")
        assert code == 0
        assert "dinocell-tiny" in out


def test_a_process_of_its_own_and_light_import():
    code = (
        "import sys, dinocell\n"
        "heavy = [m for m in ('torch', 'numba', 'skimage', 'cv2', 'matplotlib', 'wandb', 'boto3')"
        " if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "from dinocell.cli import main\n"
        "main(['--version'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'dinov3_modified'}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"dinocell {__version__}\n"
