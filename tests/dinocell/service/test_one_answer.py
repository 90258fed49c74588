"""Command line, Python, HTTP, the page and napari give the same cells, to the last bit."""

from __future__ import annotations

import hashlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
from service_doubles import noise, upload
from typer.testing import CliRunner

from dinocell import DINOCellPipeline
from dinocell.cli.app import app
from dinocell.io import read_labels, write_image
from dinocell.napari.files import read_layers
from dinocell.napari.pixels import pixels_of
from dinocell.napari.remote import segment_there
from dinocell.napari.session import Session, segment_here
from dinocell.network.model import save_model


@pytest.fixture
def images(tmp_path, picture):
    """Six images: gray of 8 and 16 bits and as floats, colour, constant, and one with cells."""
    rng = np.random.default_rng(7)
    made = {
        "float.tif": rng.random((33, 57)).astype(np.float32),
        "bytes.png": rng.integers(0, 255, (48, 40)).astype(np.uint8),
        "colour.png": rng.integers(0, 255, (40, 48, 3)).astype(np.uint8),
        "constant.tif": np.full((32, 32), 9, np.uint16),
    }
    for name, pixels in made.items():
        write_image(tmp_path / name, pixels)
    return [*(tmp_path / name for name in made), noise(tmp_path / "noise.tif", 3), picture]


def digest(labels) -> str:
    return hashlib.sha256(np.ascontiguousarray(labels, np.uint32).tobytes()).hexdigest()


def in_napari(path, tmp_path, **where):
    """Digest of the labels, and the table, of the layers that napari shows of a file."""
    layers = [
        SimpleNamespace(
            data=data,
            name=about["name"],
            rgb=about.get("rgb", False),
            multiscale=False,
            units=None,
            scale=(1.0, 1.0),
        )
        for data, about, _ in read_layers(str(path))
    ]
    segment = segment_there if "url" in where else segment_here
    session = Session(segment(**pixels_of(layers)._asdict(), **where))
    session.result.copy_file("csv", tmp_path / "napari.csv")
    labels = session.labels
    session.result.close()
    return digest(labels), (tmp_path / "napari.csv").read_text()


def test_every_door_gives_the_same_answer(client, address, images, tmp_path, mini_model):
    model = tmp_path / "mini.safetensors"
    save_model(model, mini_model)
    options = ["-o", str(tmp_path / "out"), "--model", str(model), "--device", "cpu"]
    call = ["segment", *map(str, images), *options, "--no-overlay"]
    assert CliRunner().invoke(app, call).exit_code == 0
    pipeline, cells = DINOCellPipeline(str(model)), 0
    for path in images:
        found = pipeline.run(path)
        found.measure().to_csv(tmp_path / "python.csv")
        python = digest(found.labels), (tmp_path / "python.csv").read_text()
        command = (
            digest(read_labels(tmp_path / "out" / f"{path.stem}_labels.tif")),
            (tmp_path / "out" / f"{path.stem}_cells.csv").read_text(),
        )
        base = f"/api/v1/jobs/{upload(client, path).json()['job']}"
        labels = np.load(io.BytesIO(client.get(f"{base}/result/npy").content))
        assert python == command == (digest(labels), client.get(f"{base}/result/csv").text)
        page = np.load(io.BytesIO(client.get(f"{base}/labels/npy").content))
        assert digest(page) == python[0]
        assert in_napari(path, tmp_path, model=str(model), device="cpu") == python
        assert in_napari(path, tmp_path, url=address) == python
        columns = client.get(f"{base}/cells").json()["columns"]
        assert columns == found.measure().to_dict()
        cells += found.num_cells
    assert cells > 50
