"""Exported graphs give the maps of the model, and refuse what they cannot do."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from typer.testing import CliRunner

import dinocell
from dinocell.cli.app import app
from dinocell.errors import CheckpointError, UsageError
from dinocell.export import Graph, export_model
from dinocell.network.model import create_dinocell_model, load_model, read_model_header, save_model
from dinocell.pipeline import DINOCellPipeline
from dinocell.training.adapt import adapt

pytestmark = pytest.mark.slow  # torch takes a while for each export
ROOT = Path(dinocell.__file__).parents[1]
SAMPLES = Path(dinocell.__file__).parent / "samples"
SHAPES = ((1, 48, 64), (3, 32, 80))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model = create_dinocell_model(
        "conv",
        patch_size=16,
        decoder="detail",
        intensities="compressed",
        window_px=64,
        overlap_px=16,
    )
    for module in model.modules():  # statistics of its own, or int8 would have nothing to round
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    model.card = {"licence": "CC0", "name": "small"}
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(path, model.eval())
    return path


@pytest.fixture(scope="module")
def graphs(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        np.save(
            folder / "images" / f"{number}.npy", rng.integers(0, 255, (70, 80)).astype(np.uint8)
        )
    export_model(model, folder / "fp32.onnx")
    export_model(model, folder / "fp16.onnx", precision="fp16")
    export_model(model, folder / "int8.onnx", precision="int8", images=folder / "images")
    export_model(model, folder / "program.pt2", to="torch")
    export_model(model, folder / "package.zip", to="bioimageio")
    return folder


def windows(shape) -> torch.Tensor:
    batch, height, width = shape
    return torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "most"), [("fp32", 1e-5), ("fp16", 0.02), ("int8", 0.2)])
def test_maps_and_features_of_any_size(model, graphs, name, most):
    graph = Graph(load_model(model)).eval()
    session = onnxruntime.InferenceSession(
        graphs / f"{name}.onnx", providers=["CPUExecutionProvider"]
    )
    for shape in SHAPES:
        with torch.inference_mode():
            expected = graph(windows(shape))
        found = session.run(None, {"gray": windows(shape).numpy()})
        for given, wanted in zip(found, expected, strict=True):
            difference = np.abs(given - wanted.numpy()).max() / max(1.0, float(wanted.abs().max()))
            assert (0 if name == "fp32" else 1e-6) < difference + 1e-12 <= most


def test_int8_does_not_pass_on_advice_to_developers(model, graphs, tmp_path, caplog):
    export_model(model, tmp_path / "a.onnx", precision="int8", images=graphs / "images")
    assert [record.getMessage() for record in caplog.records if record.name == "root"] == []


def test_int8_and_fp16_are_smaller(graphs):
    sizes = {name: (graphs / f"{name}.onnx").stat().st_size for name in ("fp32", "fp16", "int8")}
    assert sizes["fp16"] < 0.7 * sizes["fp32"]
    assert sizes["int8"] < 0.45 * sizes["fp32"]


def test_the_program_of_torch_needs_no_dinocell(model, graphs):
    program = torch.export.load(graphs / "program.pt2").module()
    for shape in SHAPES:
        with torch.inference_mode():
            expected = Graph(load_model(model)).eval()(windows(shape))[0]
            assert torch.allclose(program(windows(shape))[0], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of a zip that bioimageio.core leaves open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_programs_of_the_model_zoo_open_the_package(model, tmp_path, monkeypatch):
    monkeypatch.setenv("BIOIMAGEIO_CACHE_PATH", str(tmp_path / "cache"))  # before its import
    monkeypatch.setenv("LOGURU_AUTOINIT", "False")
    export_model(model, tmp_path / "m.zip", to="bioimageio")
    from bioimageio.core import test_description

    found = test_description(tmp_path / "m.zip")
    assert found.status == "passed", found.format()
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        described = yaml.safe_load(archive.read("rdf.yaml"))
    assert described["license"] == "CC0-1.0"
    assert described["config"]["dinocell"]["model"] == read_model_header(model)["model"]


def test_segment_runs_the_graph(model, graphs):
    image = np.random.default_rng(3).integers(0, 255, (100, 90)).astype(np.uint8)
    with torch.inference_mode():
        ours = DINOCellPipeline(model, precision="fp32").run(image)
    given = DINOCellPipeline(graphs / "fp32.onnx").run(image)
    assert np.abs(given.distance_map - ours.distance_map).max() < 1e-5
    assert (given.labels == ours.labels).mean() > 0.999


@pytest.mark.parametrize("name", ["fp32.onnx", "int8.onnx", "program.pt2", "package.zip"])
def test_the_header_travels(model, graphs, name):
    header = read_model_header(graphs / name)
    assert header["card"]["licence"] == "CC0"
    assert header["card"]["name"] == Path(name).stem
    assert header["card"]["exported_from"] == "small"
    assert header["model"] == read_model_header(model)["model"]
    assert header["source_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    digest, file = (graphs / f"{name}.sha256").read_text().split()
    assert (file, digest) == (name, hashlib.sha256((graphs / name).read_bytes()).hexdigest())
    done = CliRunner().invoke(app, ["weights", "info", str(graphs / name)])
    assert done.exit_code == 0
    assert "licence: CC0" in done.output


@pytest.mark.parametrize("name", ["program.pt2", "package.zip"])
def test_files_for_other_programs_are_no_model(graphs, tmp_path, name):
    with pytest.raises(UsageError, match="which is for other programs"):
        load_model(graphs / name)
    half = tmp_path / name
    half.write_bytes((graphs / name).read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=f"A {half.suffix} file must be complete"):
        read_model_header(half)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("rdf.yaml", "name: another model")
    with pytest.raises(CheckpointError, match=r"A \.zip file must be complete"):
        read_model_header(tmp_path / "other.zip")


def test_opencv_reads_the_graph(model, graphs):
    """QuPath runs ONNX files with OpenCV's module `dnn`."""
    import cv2

    net = cv2.dnn.readNetFromONNX(str(graphs / "fp32.onnx"))
    for shape in SHAPES:
        gray = windows(shape)
        net.setInput(gray.numpy())
        with torch.inference_mode():
            expected = Graph(load_model(model)).eval()(gray)[0]
        assert np.abs(net.forward("map") - expected.numpy()).max() < 1e-4


def test_files_do_not_say_where_they_were_made(graphs):
    for path in graphs.iterdir():
        if path.is_dir():
            continue
        content = path.read_bytes()
        if path.suffix in (".pt2", ".zip"):
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        assert str(ROOT).encode() not in content, path


def test_the_same_model_gives_the_same_bytes(model, graphs, tmp_path):
    export_model(model, tmp_path / "fp32.onnx")
    assert (tmp_path / "fp32.onnx").read_bytes() == (graphs / "fp32.onnx").read_bytes()


def test_on_the_command_line(model, tmp_path):
    out = tmp_path / "a.onnx"
    done = CliRunner().invoke(app, ["export", str(model), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert f"{out}: onnx, fp32, " in done.output
    found = CliRunner().invoke(
        app,
        ["segment", str(SAMPLES / "nuclei_small.png"), "-m", str(out), "-o", str(tmp_path / "r")],
    )
    assert found.exit_code == 0, found.output
    assert (tmp_path / "r" / "nuclei_small_labels.tif").is_file()


def test_a_finished_file_is_not_replaced(model, graphs):
    before = (graphs / "fp32.onnx").read_bytes()
    with pytest.raises(UsageError, match="new file"):
        export_model(model, graphs / "fp32.onnx")
    assert (graphs / "fp32.onnx").read_bytes() == before


def test_a_graph_is_neither_exported_nor_trained_nor_saved(graphs, tmp_path):
    with pytest.raises(UsageError, match="must have weights"):
        load_model(graphs / "fp32.onnx").save(tmp_path / "b.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="safetensors"):
        export_model(graphs / "fp32.onnx", tmp_path / "b.onnx")
    with pytest.raises(UsageError, match="onnx"):
        adapt(graphs, graphs, tmp_path / "b.safetensors", start=str(graphs / "fp32.onnx"))
    with pytest.raises(UsageError, match="for other programs: give the file"):
        load_model(graphs / "program.pt2")


def test_damaged_files(graphs, tmp_path):
    for name in ("fp32.onnx", "program.pt2"):
        (tmp_path / name).write_bytes((graphs / name).read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="export the model again"):
            load_model(tmp_path / name)
    import onnx

    proto = onnx.load(graphs / "fp32.onnx")
    onnx.helper.set_model_props(proto, {"other": json.dumps({})})
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(CheckpointError, match="header"):
        load_model(tmp_path / "foreign.onnx")


@pytest.mark.parametrize("name", ["dinocell-cells", "dinocell-tiny"])
def test_bundled_models_give_their_labels(name, tmp_path):
    export_model(name, tmp_path / "m.onnx")
    ours = DINOCellPipeline(name, precision="fp32")
    theirs = DINOCellPipeline(tmp_path / "m.onnx")
    for sample in ("nuclei.png", "nuclei_small.png", "phase_contrast.png"):
        expected, found = (pipeline.run(SAMPLES / sample) for pipeline in (ours, theirs))
        assert np.abs(found.distance_map - expected.distance_map).max() < 1e-4
        assert (found.labels != expected.labels).mean() < 1e-3
        assert found.unfamiliar == pytest.approx(expected.unfamiliar, rel=1e-3)
