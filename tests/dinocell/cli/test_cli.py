"""The command line: exit codes, messages, files; every wrong call is one sentence."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell import __version__
from dinocell.cli import main
from dinocell.io import find_images, read_image, read_labels, write_image, write_labels
from dinocell.network.model import load_model, save_model
from dinocell.pipeline import segment
from dinocell.training.trainer import TrainResult

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def two(blob_data, tmp_path_factory):
    """Two images with their labels: as many as it takes to have several."""
    folder = tmp_path_factory.mktemp("two")
    for part in ("images", "labels"):
        (folder / part).mkdir()
        for path in find_images([blob_data / part])[:2]:
            (folder / part / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def model_path(mini_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(path, mini_model)
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


def test_version(capsys):
    assert call(capsys, "--version")[:2] == (0, f"dinocell {__version__}\n")


def test_wrong_calls_end_with_2(capsys):
    for line in (
        "no-such-command",
        "segment",
        "segment x.tif",
        "segment x.tif -o out --no-such-option",
        "segment x.tif -o out --batch-size many",
        "segment x.tif -o out --batch-size 0",
        "train",
        "weights info",
    ):
        code, _, err = call(capsys, *line.split())
        assert code == 2, line
        assert err
        assert "Traceback" not in err


class TestSegment:
    def test_a_folder_resumed_and_overwritten(self, capsys, two, model_path, tmp_path):
        out = tmp_path / "out"
        arguments = ["segment", two / "images", "-o", out, "-m", model_path, "--device", "cpu"]
        code, text, _ = call(capsys, *arguments, "--report")
        assert code == 0
        assert re.search(r"\d+ cells in 2 images", text)
        assert len(list(out.glob("*_labels.tif"))) == 2
        assert (out / "report.html").exists()
        code, _, err = call(capsys, *arguments)
        assert code == 2
        assert "--resume" in err
        assert "--overwrite" in err
        code, text, _ = call(capsys, *arguments, "--resume")
        assert code == 0
        assert "2 done before" in text
        code, text, _ = call(capsys, *arguments, "--overwrite")
        assert code == 0
        assert "before" not in text

    def test_the_other_model_is_named_where_none_was_chosen(
        self, capsys, two, model_path, tmp_path
    ):
        image = two / "images" / "blob0.tif"
        call_alone = ["segment", image, "--device", "cpu", "--no-overlay", "-o"]
        code, text, _ = call(capsys, *call_alone, tmp_path / "a")
        assert code == 0
        assert "`-m dinocell-nuclei` draws fluorescent nuclei" in text
        for model in ("dinocell-cells", model_path):
            _, text, _ = call(capsys, *call_alone, tmp_path / Path(model).stem, "-m", model)
            assert "dinocell-nuclei" not in text
        _, text, _ = call(capsys, *call_alone, tmp_path / "a", "--resume")
        assert "dinocell-nuclei" not in text

    def test_pattern_formats_and_thresholds(self, capsys, blob_data, model_path, tmp_path):
        out = tmp_path / "out"
        code, _, _ = call(
            capsys, "segment", str(blob_data / "images" / "blob[01].tif"), "-o", out, "-m", model_path,
            "-f", "png", "-f", "coco", "--no-overlay", "--peak-threshold", "0.97",
            "--fill-threshold", "0.9", "--min-prominence", "0.2", "--min-area-px", "4",
            "--batch-size", "3", "--tile-px", "40", "--precision", "bf16", "--workers", "2",
            "--pixel-size-um", "0.5", "--min-score", "0.01",
        )  # fmt: skip
        assert code == 0
        names = {path.name for path in out.iterdir()}
        assert {"blob0_labels.png", "blob0_coco.json", "blob1_cells.csv"} <= names
        assert not any(name.endswith("_overlay.png") for name in names)
        settings = json.loads((out / "settings.json").read_text())
        assert settings["peak_threshold"] == 0.97
        assert settings["min_area_px"] == 4
        assert settings["min_score"] == 0.01
        with (out / "summary.csv").open() as file:
            assert next(csv.DictReader(file))["pixel_size_um"] == "0.5"

    def test_flips_reach_the_files(self, capsys, two, model_path, tmp_path):
        path = sorted((two / "images").iterdir())[0]
        base = ["segment", path, "-m", model_path, "--device", "cpu", "--no-overlay"]
        for name, options in (("plain", ()), ("flipped", ("--tta",))):
            assert call(capsys, *base, "-o", tmp_path / name, *options)[0] == 0
            result = segment(path, model=model_path, tta=bool(options))
            labels = read_labels(tmp_path / name / f"{path.stem}_labels.tif")
            np.testing.assert_array_equal(labels, result.labels)
            settings = json.loads((tmp_path / name / "settings.json").read_text())
            assert settings["tta"] is bool(options)
        plain, flipped = (
            (tmp_path / name / f"{path.stem}_cells.csv").read_text()
            for name in ("plain", "flipped")
        )
        assert plain != flipped
        code, _, err = call(capsys, *base, "-o", tmp_path / "plain", "--tta", "--resume")
        assert code == 2
        assert "other values of tta" in err

    def test_scale_reaches_the_files(self, capsys, two, model_path, tmp_path):
        path = sorted((two / "images").iterdir())[0]
        base = ["segment", path, "-m", model_path, "--device", "cpu", "--no-overlay"]
        assert call(capsys, *base, "-o", tmp_path / "out", "--rescale", "1.5")[0] == 0
        result = segment(path, model=model_path, rescale=1.5)
        labels = read_labels(tmp_path / "out" / f"{path.stem}_labels.tif")
        np.testing.assert_array_equal(labels, result.labels)
        assert json.loads((tmp_path / "out" / "settings.json").read_text())["rescale"] == 1.5
        with (tmp_path / "out" / "summary.csv").open() as file:
            row = next(csv.DictReader(file))
        assert row["rescale"] == "1.5"
        assert "enlarged 1.5 times" in row["warnings"]
        for wrong, sentence in (
            (("--rescale", "much"), "--rescale must be auto, off or a number"),
            (("--diameter", "9", "--rescale", "2"), "--diameter must come without --rescale"),
            (("--diameter", "9"), "--diameter needs a model that knows"),
        ):
            code, _, err = call(capsys, *base, "-o", tmp_path / "not", *wrong)
            assert code == 2
            assert sentence in err

    def test_wrong_thresholds_name_their_options(self, capsys, two, model_path, tmp_path):
        path = sorted((two / "images").iterdir())[0]
        base = ["segment", path, "-m", model_path, "--device", "cpu", "-o", tmp_path / "out"]
        both = "0 <= --fill-threshold < --peak-threshold < 1"
        for name, value, sentence in (
            ("--peak-threshold", "2", both),
            ("--fill-threshold", "-1", both),
            ("--min-prominence", "nan", "--min-prominence must be in [0, 1], got nan"),
            ("--min-prominence", "2", "--min-prominence must be in [0, 1], got 2.0"),
            ("--min-area-px", "-3", "--min-area-px must be at least 0, got -3"),
        ):
            code, _, err = call(capsys, *base, name, value)
            assert code == 2
            assert sentence in err
            assert "`" not in err
        assert not (tmp_path / "out").exists()

    def test_channels_and_page(self, capsys, model_path, tmp_path):
        rng = np.random.default_rng(0)
        path = tmp_path / "rgb.png"
        write_image(path, rng.integers(0, 255, (40, 50, 3)).astype(np.uint8))
        base = ["segment", path, "-m", model_path]
        code, out, _ = call(capsys, *base, "-o", tmp_path / "a")
        assert code == 0
        assert "a colour picture: the mean of red, green and blue" in out
        assert "choose it with --channels" in out
        everything = call(capsys, *base, "-o", tmp_path / "b", "--channels", "red,green,blue")
        assert everything[0] == 0
        assert "colour picture" not in everything[1]
        means, chosen = (read_labels(tmp_path / name / "rgb_labels.tif") for name in "ab")
        np.testing.assert_array_equal(means, chosen)
        for index, channels in enumerate(["0", "0,2", "green"]):
            assert call(capsys, *base, "-o", tmp_path / str(index), "--channels", channels)[0] == 0
        labels = [read_labels(tmp_path / str(i) / "rgb_labels.tif") for i in range(3)]
        assert not np.array_equal(labels[0], labels[1])
        assert not np.array_equal(labels[0], labels[2])
        waves = tmp_path / "waves.tif"
        write_image(waves, read_image(path).pixels, channel_names=("405", "0488", "561"))
        base = ["segment", waves, "-m", model_path]
        for channels, same in (
            ("405", 0),
            ("0", 0),
            ("0488", 2),
            ("1", 2),
        ):  # names before positions
            out = tmp_path / f"w{channels}"
            assert call(capsys, *base, "-o", out, "--channels", channels)[0] == 0
            assert np.array_equal(read_labels(out / "waves_labels.tif"), labels[same])

    def test_what_was_left_out_and_noted_is_shown(self, capsys, model_path, two, tmp_path):
        import tifffile

        pixels = read_image(find_images([two / "images"])[0]).pixels
        sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.7}
        tifffile.imwrite(tmp_path / "a.tif", pixels, ome=True, metadata={"axes": "YX", **sizes})
        write_labels(tmp_path / "a_labels.tif", np.ones((3, 4), int))
        out = tmp_path / os.fsdecode(b"\xe9")  # shown although it is no UTF-8
        code, text, err = call(capsys, "segment", tmp_path, "-o", out, "-m", model_path)
        assert code == 0
        assert err == ""
        assert re.search(r"^note: a: Pixels must be square .*: set --pixel-size-um$", text, re.M)
        assert re.search(r"^note: 1 file was left out.* \(a_labels.tif\)", text, re.M)
        with (out / "summary.csv").open() as file:
            assert "Pixels must be square" in next(csv.DictReader(file))["warnings"]

    def test_stack_and_page(self, capsys, model_path, tmp_path):
        import tifffile

        rng = np.random.default_rng(0)
        path = tmp_path / "stack.tif"
        stack = rng.integers(0, 900, (3, 40, 50)).astype(np.uint16)
        tifffile.imwrite(path, stack, photometric="minisblack", metadata={"axes": "TYX"})
        code, out, _ = call(capsys, "segment", path, "-o", tmp_path / "a", "-m", model_path)
        assert code == 1
        assert "holds T 3: choose with --time" in out
        tables = {}
        for choice in ("--page 1", "--time 1", "--time 2", "--time 1 --scene 0 --z 0"):
            out = tmp_path / choice
            arguments = ["segment", path, "-o", out, "-m", model_path, *choice.split()]
            assert call(capsys, *arguments)[0] == 0
            tables[choice] = (out / "stack_cells.csv").read_text()
        assert tables["--page 1"] == tables["--time 1"] == tables["--time 1 --scene 0 --z 0"]
        assert tables["--time 2"] != tables["--time 1"]
        for wrong in ("--z min", "--time -1", "--page 0 --z max"):
            arguments = ["segment", path, "-o", tmp_path / "c", "-m", model_path, *wrong.split()]
            code, _, err = call(capsys, *arguments)
            assert code == 2, wrong
            assert f"error: {wrong.split()[0]} must" in err

    def test_a_choice_belongs_to_its_image(self, capsys, model_path, tmp_path):
        """It may differ between images of a folder, but not for one image; Zarr folders count as images."""
        zarr = pytest.importorskip("zarr")
        pixels = np.random.default_rng(0).integers(0, 900, (3, 40, 50)).astype(np.uint16)
        for name in ("a", "b"):
            group = zarr.open_group(str(tmp_path / "plate" / f"{name}.zarr"), mode="w")
            group.create_array("0", data=pixels)
            axes = [{"name": axis, "type": "space"} for axis in "zyx"]
            group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
        base = ["-o", tmp_path / "out", "-m", model_path]
        code, out, _ = call(capsys, "segment", tmp_path / "plate", *base, "--z", "max")
        assert (code, "2 images" in out) == (0, True)
        again = ["segment", tmp_path / "plate", *base, "--resume"]
        code, _, err = call(capsys, *again, "--z", "mean")
        assert code == 2
        assert "z mean for 'a', which was segmented with max" in err
        code, out, _ = call(capsys, *again, "--z", "max")
        assert (code, "segmented again" in out) == (0, False)
        zarr.open_array(str(tmp_path / "plate" / "b.zarr" / "0"), mode="r+")[2, :5] = 60_000
        code, out, _ = call(capsys, *again, "--z", "max")
        assert "files have changed: b" in out

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

    def test_wrong_options(self, capsys, two, model_path, tmp_path):
        images, out = two / "images", tmp_path / "out"
        for arguments, message in (
            (["no_such_file.tif"], "no_such_file"),
            ([images, "--device", "gpu"], "auto, cpu, cuda"),
            ([images, "--format", "svg"], "tif, png"),
            ([images, "--precision", "fp8"], "one of auto, fp32, bf16"),
            ([images, "--percentiles", "99"], "--percentiles must be two numbers with a comma"),
            ([images, "--percentiles", "99,1"], "must hold 0 <= low < high <= 100"),
            ([images, "--model", "dinocell-huge"], "bundled name"),
            ([images, "--peak-threshold", "0.01", "--fill-threshold", "0.5"], "< 1, got fill 0.5"),
            ([images, "--resume", "--overwrite"], "--resume and --overwrite"),
            ([images, "--channels", " ,"], "--channels must name a channel"),
        ):
            model = [] if "--model" in arguments else ["--model", model_path]
            code, _, err = call(capsys, "segment", *arguments, *model, "-o", out)
            assert code == 2, message
            assert message in err
            assert err.startswith("dinocell: error: ")
            assert len(err.strip().splitlines()) == 1
            assert not out.exists()

    def test_an_interruption_says_what_was_kept(
        self, capsys, monkeypatch, blob_data, model_path, tmp_path
    ):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("dinocell.batch.remote.segment_anywhere", interrupted)
        images, out = blob_data / "images", tmp_path / "out"
        again = "run the same command again"
        for where, given, advice in (
            (out, [], f"{again} with --resume"),
            (out, ["--resume"], again),
            (out, ["--overwrite"], f"{again} with --resume in place of --overwrite"),
            ("s3://bucket/out", [], f"{again} with --resume"),
        ):
            call_line = ["segment", images, "-o", where, "--model", model_path, *given]
            code, _, err = call(capsys, *call_line)
            assert code == 130
            assert err == (
                f"Images that were finished are kept in {where}: {advice}\ndinocell: stopped\n"
            )

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
        again = [
            "evaluate",
            "--pred",
            pred,
            "--truth",
            truth,
            "--iou",
            "0.6",
            "-o",
            tmp_path / "s.json",
        ]
        code, _, err = call(capsys, *again)
        assert (code, json.loads((tmp_path / "s.json").read_text())) == (2, saved)
        assert "s.json, which exists: choose another name, or set --overwrite" in err
        assert call(capsys, *again, "--overwrite")[0] == 0
        assert json.loads((tmp_path / "s.json").read_text()) != saved

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

    def test_wrong_calls(self, capsys):
        for line, message in (
            ("", "neither"),
            ("--pred x", "half a pair"),
            ("--model x", "half a pair"),
            ("--pred x --truth x --model m --data d", "both"),
            ("--pred x --truth x --tune", "--tune must"),
            ("--model m --data d --save-model x", "--tune"),
            ("--pred x --truth x -o x.xls", ".csv or .json"),
            ("--pred x --truth x --iou 2", "at most 1"),
            ("--pred x --truth x --page 0", "--scene, --precision and --tta must"),
            ("--pred x --truth x --precision bf16", "no network runs"),
            ("--pred x --truth x --tta", "no network runs"),
            ("--model m --data d --precision fp8", "auto, fp32, bf16"),
            ("--pred x --truth x --metric seg", "--metric must come with --tune"),
            ("--model m --data d --allow-missing", "--allow-missing must have --pred"),
            ("--pred no --truth no", "no"),
        ):
            code, _, err = call(capsys, "evaluate", *line.split())
            assert code == 2, line
            assert message in err

    def test_model_and_tuning(self, capsys, two, model_path, tmp_path):
        base = ["evaluate", "--model", model_path, "--data", two, "--device", "cpu"]
        code, out, _ = call(capsys, *base)
        assert code == 0
        assert "thresholds (of the model)" in out
        tuned_path = tmp_path / "tuned.safetensors"
        code, out, _ = call(capsys, *base, "--tune", "--metric", "ap50", "--save-model", tuned_path)
        assert code == 0
        assert "tuned here on ap50_pooled" in out
        tuned, before = load_model(tuned_path).config, load_model(model_path).config
        assert tuned.peak_threshold != before.peak_threshold
        code, _, err = call(capsys, *base, "--tune", "--save-model", tuned_path)
        assert code == 2
        assert "tuned.safetensors, which exists" in err
        code, _, err = call(capsys, *base, "--tune", "--metric", "accuracy")
        assert code == 2
        assert "ap50" in err
        code, _, err = call(capsys, *base, "--tune", "--save-model", model_path)
        assert code == 2
        assert "another file than the model" in err
        code, _, err = call(capsys, *base, "--tune", "--save-model", tmp_path / "m.pt")
        assert code == 2
        assert ".safetensors" in err

    def test_channel_plane_and_precision_of_the_images(self, capsys, two, model_path, tmp_path):
        for part in ("images", "labels"):
            (tmp_path / part).mkdir()
        for path in (two / "images").iterdir():
            image = read_image(path).pixels
            stack = np.stack([np.zeros_like(image), image])
            tifffile.imwrite(
                tmp_path / "images" / f"{path.stem}.tif",
                stack,
                imagej=True,
                metadata={"axes": "CYX"},
            )
        for path in (two / "labels").iterdir():
            shutil.copy(path, tmp_path / "labels")
        base = ["evaluate", "--model", model_path, "--device", "cpu", "--data"]
        _, plain, _ = call(capsys, *base, two)
        code, _, err = call(capsys, *base, tmp_path)
        assert code
        assert "2 channels" in err
        assert call(capsys, *base, tmp_path, "--channels", "1")[1] == plain
        assert call(capsys, *base, tmp_path, "--channels", "0")[1] != plain
        exact, rounded = (
            call(capsys, *base, two, "--precision", precision) for precision in ("fp32", "bf16")
        )
        assert exact[0] == rounded[0] == 0
        assert exact[1] != rounded[1]
        flipped = call(capsys, *base, two, "--tta")
        assert flipped[0] == 0
        assert flipped[1] != plain
        for path in (tmp_path / "images").iterdir():
            image = read_image(path, channels=[1]).pixels
            stack = np.stack([image[::-1], image])
            tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "ZYX"})
        for choice in (["--page", "1"], ["--z", "1"], ["--z", "1", "--time", "0", "--scene", "0"]):
            assert call(capsys, *base, tmp_path, *choice)[1] == plain
        for choice in (["--z", "max"], ["--z", "mean"]):
            code, scores, _ = call(capsys, *base, tmp_path, *choice)
            assert (code, scores != plain) == (0, True)

    def test_notes_on_images_are_shown(self, capsys, two, model_path, tmp_path):
        data = shutil.copytree(two, tmp_path / "data")
        marked = sorted((data / "images").iterdir())[1]
        image = read_image(marked).pixels
        image[60:63, 5:60] = 65_535
        write_image(marked, image)
        base = ["evaluate", "--model", model_path, "--device", "cpu", "--data", data]
        _, out, _ = call(capsys, *base, "-o", tmp_path / "s.json")
        (note,) = re.findall(rf"^note: {marked.stem}: (.*hold no signal.*)$", out, re.MULTILINE)
        rows = json.loads((tmp_path / "s.json").read_text())["images"]
        assert [row["warnings"] for row in rows] == ["", note]

    def test_data_folder_without_labels(self, capsys, model_path, tmp_path):
        code, _, err = call(capsys, "evaluate", "--model", model_path, "--data", tmp_path)
        assert code == 2
        assert "without images" in err


class TestTrain:
    def test_the_configuration_with_its_changes_is_trained(self, capsys, monkeypatch, tmp_path):
        trained = []

        def train(config):
            trained.append(config)
            return TrainResult(tmp_path / "model.safetensors", 3, 0.5, {"peak": 0.25}, True)

        monkeypatch.setattr("dinocell.training.trainer.train", train)
        path = tmp_path / "c.yaml"
        path.write_text(
            "schedule: {steps: 2}\ndata: {datasets: [{name: a, images: i, labels: l}]}\n"
        )
        code, out, _ = call(capsys, "train", path, "device=cpu", "schedule.steps=3")
        assert code == 0
        assert out == (
            f"model: {tmp_path / 'model.safetensors'} (step 3, stopped early)\n"
            "validation AP@0.5 (pooled): 0.5000; peak 0.25\n"
        )
        assert (trained[0].device, trained[0].schedule.steps) == ("cpu", 3)

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
    def test_info_of_a_file_and_of_an_architecture(self, capsys, model_path, monkeypatch):
        code, out, _ = call(capsys, "weights", "info", model_path, "--image-px", "64")
        assert code == 0
        assert "thresholds: peak" in out
        assert re.search(r"GMAC.*64×64|64×64.*GMAC", out, flags=re.S)
        asked = []
        monkeypatch.setattr(
            "dinocell.network.info.describe_model", lambda *a, **k: asked.append((a, k)) or "text"
        )
        command = "weights info tiny/16 --decoder linear --image-px 64"
        assert call(capsys, *command.split())[:2] == (0, "text\n")
        assert asked == [(("tiny/16",), {"decoder": "linear", "image_px": 64})]

    def test_info_of_convolutions_with_each_decoder(self, capsys):
        found = [
            call(capsys, "weights", "info", "conv/32", "--decoder", name, "--image-px", "64")
            for name in ("detail", "fpn")
        ]
        assert [code for code, _, _ in found] == [0, 0]
        assert "parameters: 1.93 M" in found[0][1]
        assert "parameters: 1.26 M" in found[1][1]

    def test_wrong_names(self, capsys):
        for line in ("giant/8", "conv/8", "tiny/7", "tiny/0", "nothing", "tiny/16 --image-px 3"):
            assert call(capsys, "weights", "info", *line.split())[0] == 2, line

    def test_list(self, capsys):
        code, out, _ = call(capsys, "weights", "list")
        assert code == 0
        assert "dinocell-tiny" in out


def in_a_process(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A call of Python that finds this clone."""
    path = f"{ROOT}:{ROOT / 'dinov3_modified'}"
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", **variables},
    )


@pytest.mark.parametrize("command", [["demo"], ["info", "x.png"], ["doctor"]])
def test_a_library_of_the_system_that_is_missing_is_named(tmp_path, command):
    sentence = "libGL.so.1: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({sentence!r})")
    path = f"{tmp_path}:{ROOT}:{ROOT / 'dinov3_modified'}"
    done = in_a_process("-m", "dinocell", *command, PYTHONPATH=path, HOME=str(tmp_path))
    assert done.returncode == 1
    assert sentence in done.stdout + done.stderr
    assert "apt install libgl1" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if command != ["doctor"]:
        shown = in_a_process("-m", "dinocell", "-v", *command, PYTHONPATH=path, HOME=str(tmp_path))
        assert "Traceback" in shown.stderr
        assert "cv2.py" in shown.stderr


def test_the_module_is_the_command():
    done = in_a_process("-m", "dinocell", "--version")
    assert (done.returncode, done.stdout) == (0, f"dinocell {__version__}\n"), done.stderr


@pytest.mark.slow
def test_a_tree_without_our_part_segments_and_says_what_it_lacks(small_model, two, tmp_path):
    """As upstream's tree, which Meta releases; but for the checks that our mirrored modules import."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "dinov3_modified", tree)
    shutil.rmtree(tree / "dinov3" / "cells" / "weights")
    save_model(tmp_path / "m.safetensors", small_model)
    command = ("-m", "dinocell", "segment", two / "images", "-o", tmp_path / "out", "--model")
    done = in_a_process(*command, tmp_path / "m.safetensors", DINOCELL_DINOV3=str(tree))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*_labels.tif"))) == 2
    (tmp_path / "b.pth").write_bytes(b"weights")
    done = in_a_process(
        "-m", "dinocell", "weights", "info", tmp_path / "b.pth", DINOCELL_DINOV3=str(tree)
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dinocell: error: The package dinov3 must be DINOCell's or a ")
    assert f"got {tree / 'dinov3' / '__init__.py'} (cannot import name 'weights'" in done.stderr


def test_a_process_of_its_own_and_light_import():
    code = (
        "import sys, dinocell\n"
        "heavy = [m for m in ('torch', 'numba', 'skimage', 'cv2', 'matplotlib', 'wandb', 'boto3')"
        " if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "import dinocell.evaluation, dinocell.cli.evaluate, dinocell.network.precision\n"
        "assert 'torch' not in sys.modules\n"
        "from dinocell.cli import main\n"
        "main(['--version'])\n"
    )
    done = in_a_process("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"dinocell {__version__}\n"


def test_data_is_listed_and_prepared(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    labels = np.zeros((12, 12), np.uint16)
    labels[2:8, 2:8] = 3
    write_image(source / "a.tif", np.arange(144, dtype=np.uint8).reshape(12, 12))
    np.save(source / "a_seg.npy", {"masks": labels})
    code, out, _ = call(capsys, "data", "list")
    assert (code, "livecell: phase contrast" in out) == (0, True)
    code, out, err = call(capsys, "data", "prepare", "seg_npy", source, "-o", tmp_path / "unknown")
    assert (code, "and set --licence\n" in out) == (0, True), err
    command = ("data", "prepare", "seg_npy", source, "-o", tmp_path / "out")
    code, out, err = call(capsys, *command, "--licence", "mine", "--test-fraction", "0")
    assert code == 0, err
    assert "train 1, val 0, test 0 images, 1 cell\n" in out
    assert '"licence": "mine"' in (tmp_path / "out" / "manifest.json").read_text()
    code, _, err = call(capsys, *command)
    assert (code, "--out must be a new or empty folder" in err) == (2, True)
    code, _, err = call(capsys, *command[:3], tmp_path / "no", "-o", tmp_path / "other")
    assert (code, "SOURCE must be a file or folder" in err) == (2, True)
