"""`dinocell export` before it writes: options that do not fit, and the windows of int8."""

import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from dinocell.cli.app import app
from dinocell.errors import MissingExtraError, UsageError
from dinocell.export import calibration_windows, export_model
from dinocell.io import write_image
from dinocell.network.config import IMAGENET_MEAN, IMAGENET_STD
from dinocell.network.info import describe_bundled
from dinocell.network.model import load_model, with_config
from dinocell.pipeline import DINOCellPipeline


def test_without_the_extra_the_fast_model_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[onnx\]'"):
        load_model("dinocell-fast")
    lines = describe_bundled().splitlines()
    assert [line for line in lines if line.startswith("dinocell-fast  ONNX files need the package")]
    assert [line for line in lines if line.startswith("dinocell-cells  convolutions")]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.pt2", {}, "ends in .onnx"),
        ("a.onnx", {"to": "torch"}, "ends in .pt2"),
        ("a.onnx", {"to": "tensorflow"}, "`to` must be"),
        ("a.onnx", {"precision": "int4"}, "`precision` must be"),
        ("a.pt2", {"to": "torch", "precision": "int8"}, "`precision` must be one of fp32, fp16"),
        ("a.onnx", {"to": "bioimageio"}, "ends in .zip"),
        ("a.zip", {"to": "bioimageio", "precision": "fp16"}, "must be one of fp32 for bioimageio"),
        ("a.onnx", {"precision": "int8"}, "`images` must be given"),
        ("a.onnx", {"images": "."}, "only there"),
        ("a.onnx", {"channels": ["DNA"]}, "must come with `images`"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, options, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        export_model("dinocell-cells", tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pixel_size_um", [0.5, 0.25])
def test_int8_is_calibrated_with_what_the_network_sees(
    small_model, tmp_path, monkeypatch, pixel_size_um
):
    model = with_config(small_model, pixel_size_um=0.5)
    side = round(model.config.window_px * 0.5 / pixel_size_um)
    image = np.random.default_rng(0).integers(0, 1000, (side, side)).astype(np.uint16)
    write_image(tmp_path / "a.tif", image, pixel_size_um=pixel_size_um)
    seen, ask = [], model.map_and_features

    def looks(batch):
        seen.append(batch)
        return ask(batch)

    monkeypatch.setattr(model, "map_and_features", looks)
    DINOCellPipeline(model).run(tmp_path / "a.tif")
    (expected,) = seen  # one window
    gray = expected[:, :1].numpy() * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    for window in calibration_windows(model, tmp_path):
        np.testing.assert_allclose(window, gray, atol=1e-6)


def test_a_channel_is_chosen_for_the_ranges_of_int8(small_model, tmp_path):
    rng = np.random.default_rng(0)
    side = small_model.config.window_px
    image = rng.integers(0, 1000, (side, side, 5)).astype(np.uint16)
    names = ["DNA", "ER", "RNA", "AGP", "Mito"]
    write_image(tmp_path / "a.tif", image, channel_names=names)
    with pytest.raises(UsageError, match="choose one with `channels`"):
        list(calibration_windows(small_model, tmp_path))
    loaded = DINOCellPipeline(small_model).load(image[..., 3])
    for window in calibration_windows(small_model, tmp_path, ["AGP"]):
        np.testing.assert_allclose(window[0, 0], loaded.intensity.apply(loaded.plane), atol=1e-6)


def test_channels_of_the_command_line_reach_the_export(monkeypatch):
    seen = []
    monkeypatch.setattr("dinocell.export.export_model", lambda *_, **given: seen.append(given))
    words = ["export", "dinocell-cells", "--images", "a", "--channels", "0, DNA", "-o", "a.onnx"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (seen[0]["channels"], str(seen[0]["images"])) == ((0, "DNA"), "a")
