"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Test processes share the cores, and numbers that are compared bit for bit want equal threads in this
# process and in those that tests start.  Before numpy and torch, which read it when they load.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images; skips where it is not there."""
    folder = Path(os.environ.get("DINOCELL_DATA", ROOT / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real images are not at {folder}: set DINOCELL_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable], Path]:
    """Makes a folder once for all processes of a test run: the first one fills it, the others wait.

    Tests must only read it.
    """
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder = base / "made_once" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.with_suffix(".done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                folder.with_suffix(".done").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def blob_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set a network learns in seconds: bright discs with noise; 6 images and labels."""
    from dinocell.io import write_image, write_labels

    folder = tmp_path_factory.mktemp("blobs")
    rng = np.random.default_rng(7)
    rows, columns = np.mgrid[:64, :80]
    for index in range(6):
        labels = np.zeros((64, 80), np.uint16)
        for cell, (row, column) in enumerate([(14, 15), (18, 55), (46, 24), (44, 62)], start=1):
            jitter = rng.integers(-4, 5, size=2)
            radius = rng.uniform(7, 11)
            inside = np.hypot(rows - row - jitter[0], columns - column - jitter[1]) < radius
            labels[inside & (labels == 0)] = cell
        image = 200 + 1500 * (labels > 0) + rng.normal(0, 60, labels.shape)
        write_image(folder / "images" / f"blob{index}.tif", image.clip(0).astype(np.uint16))
        write_labels(folder / "labels" / f"blob{index}.png", labels)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small RGB pictures of noise, for pretraining."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    for index in range(20):
        picture = rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def mini_networks() -> Iterator[None]:
    """In this module and this process, networks of the size `tiny` have 4 blocks of width 48.

    For tests of what is done with a network, whatever it is: such a one trains, is written and is
    read in a twentieth of the time.
    """
    with _tiny_networks(embed_dim=48, depth=4):
        yield


@pytest.fixture
def true_networks() -> Iterator[None]:
    """For one test of a module of mini networks, `tiny` is what it is outside of tests."""
    with _tiny_networks(embed_dim=192, depth=12):
        yield


@pytest.fixture(scope="module")
def mini_model(mini_networks):  # type: ignore[no-untyped-def]
    """As `small_model`, in a module of mini networks."""
    return random_model()


@pytest.fixture(scope="session")
def knowing_model(small_model):  # type: ignore[no-untyped-def]
    """`small_model` with statistics of ten noisy fields, which are far from a smooth gradient."""
    from dinocell.network.familiarity import Appearance, KnownKinds, fit_statistics
    from dinocell.network.model import with_config
    from dinocell.segmentation.inference import predict_distance_map

    seen = [Appearance() for _ in range(10)]
    for seed, appearance in enumerate(seen):
        rng = np.random.default_rng(seed)
        field = rng.integers(100, 120, (40, 40)) + 200 * (rng.random((40, 40)) < 0.1)
        predict_distance_map(small_model, field.astype(np.uint16), appearance=appearance)
    model = with_config(small_model)
    model.statistics = KnownKinds((fit_statistics(seen),))
    model.card = {"name": "knowing"}
    return model


@pytest.fixture(scope="session")
def small_model():  # type: ignore[no-untyped-def]
    """A network of random weights, small and quick, in eval mode."""
    with _tiny_networks(embed_dim=192, depth=12):  # whatever module asks for it first
        return random_model()


@contextlib.contextmanager
def _tiny_networks(embed_dim: int, depth: int) -> Iterator[None]:
    from dinocell.network.backbone import BACKBONE_SIZES, BackboneSize

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONE_SIZES, "tiny", BackboneSize(embed_dim, depth, num_heads=3))  # type: ignore[arg-type]
        yield


def random_model():  # type: ignore[no-untyped-def]
    import torch

    from dinocell.network.model import create_dinocell_model

    torch.manual_seed(0)
    model = create_dinocell_model(
        "tiny", patch_size=16, image_channels=4, window_px=32, overlap_px=8, layerscale_init=0.5
    )
    model.eval()
    with torch.no_grad():  # a map with structure, so that thresholds have something to cut
        image = torch.randn(4, 3, 32, 32)
        logits = torch.logit(model(image))
        model.decoder.head.weight.mul_(2.0 / logits.std())
        model.decoder.head.bias.zero_()
        model.decoder.head.bias.sub_(torch.logit(model(image)).mean())
    return model


@pytest.fixture
def read_history() -> Callable[[Path], list[dict]]:
    """Reader of wandb's offline files."""
    return _read_history


def _read_history(path: Path) -> list[dict]:
    """Rows of a .wandb file: a log of LevelDB's form, blocks of 32 KiB, protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    offset, whole, rows = 7, b"", []
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        body = data[offset + 7 : offset + 7 + length]
        if len(body) < length or kind not in (1, 2, 3, 4):
            break
        assert checksum == zlib.crc32(body, zlib.crc32(bytes([kind])))
        offset += 7 + length
        whole = body if kind in (1, 2) else whole + body
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(whole)
            if record.HasField("history"):
                rows.append(
                    {
                        item.key or ".".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
    return rows
