"""A session of corrections without a viewer."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from dinocell.cli.app import app
from dinocell.errors import UsageError
from dinocell.io import read_image, read_labels
from dinocell.napari.pixels import pixels_of
from dinocell.napari.session import Session, segment_here
from dinocell.service.stored import KINDS


@pytest.fixture
def model(tmp_path, mini_model) -> str:
    from dinocell.network.model import save_model

    save_model(tmp_path / "mini.safetensors", mini_model)
    return str(tmp_path / "mini.safetensors")


@pytest.fixture
def session(blob_data, model):
    pixels = read_image(sorted((blob_data / "images").iterdir())[0]).pixels
    found = Session(segment_here(pixels, model=model, device="cpu", name="blob"))
    assert found.num_cells > 5
    yield found
    found.result.close()


def test_thresholds_give_the_cells_of_the_command_line(session, blob_data, tmp_path, model):
    session.relabel(peak_threshold=0.6, fill_threshold=0.2, min_area_px=12)
    image = sorted((blob_data / "images").iterdir())[0]
    call = [*("segment", str(image), "-o", str(tmp_path / "out"), "--model", model)]
    call += [
        "--peak-threshold",
        "0.6",
        "--fill-threshold",
        "0.2",
        "--min-area-px",
        "12",
        "--device",
        "cpu",
    ]
    assert CliRunner().invoke(app, call).exit_code == 0
    expected = read_labels(tmp_path / "out" / f"{image.stem}_labels.tif")
    assert session.num_cells == expected.max() > 0
    np.testing.assert_array_equal(session.labels, expected)


def test_corrections_and_undo(session):
    first = session.labels.copy()
    one, other = session.numbers()[:2].tolist()
    session.correct("merge", cells=[one, other])
    assert session.selected == [one]
    assert one in session.touched
    np.testing.assert_array_equal(
        session.labels, np.where(first == other, one, first).astype(np.uint32)
    )
    session.correct("remove", cells=[one])
    assert one not in session.numbers()
    assert session.selected == []
    session.correct("undo")
    session.correct("undo")
    np.testing.assert_array_equal(session.labels, first)
    session.correct("redo")
    assert other not in session.numbers()


def test_relabel_keeps_what_was_corrected_and_is_one_step(session):
    area = np.bincount(session.labels.ravel())
    area[0] = 0
    cell = int(area.argmax())
    session.correct("remove", cells=[cell])
    gone = session.labels == 0
    session.relabel(peak_threshold=0.5)
    session.relabel(peak_threshold=0.55)
    assert session.revision.undoable == 2  # two relabels within a moment are one step
    assert session.labels[gone].max() >= 0
    session.correct("undo")
    assert (session.labels[gone] == 0).all()


def test_painted_pixels_become_a_correction(session):
    painted = session.labels.copy()
    assert not session.adopt(painted)
    new = int(painted.max()) + 1
    painted[:4, :4] = new
    session.select(int(session.numbers()[-1]))
    kept = session.selected[0]
    assert session.adopt(painted)
    assert session.revision.edited
    (cell,) = np.unique(session.labels[:4, :4])
    assert cell in session.touched
    assert session.selected in ([kept], [])
    with pytest.raises(UsageError, match="shape"):
        session.adopt(painted[:3])
    session.correct("undo")
    assert not (session.labels == cell)[:4, :4].all()


def test_doubtful_cells_come_by_their_score(session):
    numbers, columns = session.columns()
    order = numbers[np.argsort(columns["score"], kind="stable")]
    for cell in order[:3]:
        row, column = session.next_doubtful()
        assert session.selected == [cell]
        np.testing.assert_allclose(session.centres([cell])[0], (row, column))
    session.next_doubtful(-1)
    assert session.selected == [order[1]]
    assert session.score(order[0]) == min(columns["score"])
    session.correct("remove", cells=[int(order[1])])
    session.next_doubtful()
    assert session.selected == [order[2]]  # although the list is shorter now
    middle = session.centres([order[2]])[0].tolist()
    session.correct("erase", cells=[int(order[2])], points=[middle], radius_px=1)
    assert np.isnan(session.score(int(order[2])))
    for _ in range(len(order)):
        session.next_doubtful()
        assert session.selected != [order[2]]
    session.correct("remove", cells=session.numbers().tolist())
    assert session.num_cells == 0
    with pytest.raises(UsageError, match="no"):
        session.next_doubtful()


def test_selection(session):
    one, other = session.numbers()[:2].tolist()
    session.select(one)
    session.select(other, more=True)
    assert session.selected == [one, other]
    session.select(one, more=True)
    assert session.selected == [other]
    session.select(0)
    assert session.selected == []
    row, column = np.argwhere(session.labels == one)[0]
    assert session.cell_at(row + 0.9, column + 0.1) == one
    assert session.cell_at(-0.1, 0) == session.cell_at(0, 1e6) == 0


def test_every_format_is_written(session, tmp_path):
    session.correct("remove", cells=[int(session.numbers()[0])])
    for kind in KINDS:
        session.result.copy_file(kind, tmp_path / kind)
        assert (tmp_path / kind).stat().st_size > 0
    labels = np.load(tmp_path / "npy")
    assert labels.max() == session.num_cells


def test_closing_deletes_the_files_and_so_does_a_failure(session, monkeypatch, tmp_path):
    folder = session.result.folder
    assert folder.exists()
    session.result.close()
    assert not folder.exists()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UsageError, match="nothing_here"):
        segment_here(np.zeros((8, 8), np.uint8), model="nothing_here")
    assert list(tmp_path.glob("dinocell_napari_*")) == []


def test_whole_numbers_of_64_bits_are_segmented(model, blob_data):
    pixels = read_image(sorted((blob_data / "images").iterdir())[0]).pixels
    digests = set()
    for dtype in (np.uint16, np.int64):
        result = segment_here(pixels.astype(dtype), model=model, device="cpu")
        digests.add(hashlib.sha256(result.labels().tobytes()).hexdigest())
        result.close()
    assert len(digests) == 1


def layer(data, name="a", *, rgb=False, multiscale=False, units=None, scale=(1.0, 1.0)):
    return SimpleNamespace(
        data=data, name=name, rgb=rgb, multiscale=multiscale, units=units, scale=scale
    )


def test_layers_become_the_channels_of_an_image():
    one, other = np.arange(12).reshape(3, 4), np.ones((3, 4))
    found = pixels_of([layer(one, "DNA / 1"), layer(other, "AGP")])
    np.testing.assert_array_equal(found.pixels, np.stack([one, other], axis=-1))
    assert found.channel_names == ("DNA / 1", "AGP")
    assert "/" not in found.name
    alone = pixels_of([layer(one)])
    assert (alone.pixels.shape, alone.channel_names, alone.name) == ((3, 4), None, "a")


def test_the_plane_on_the_screen_is_taken():
    stack = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(pixels_of([layer(stack)], step=(1, 2, 0, 0)).pixels, stack[1, 2])
    # the viewer has one more axis than the layer
    np.testing.assert_array_equal(
        pixels_of([layer(stack[0])], step=(1, 2, 0, 0)).pixels, stack[0, 2]
    )
    np.testing.assert_array_equal(
        pixels_of([layer([stack[0, 0], stack[0, 0, ::2, ::2]], multiscale=True)]).pixels,
        stack[0, 0],
    )
    colour = np.zeros((4, 5, 4), np.uint8)
    assert pixels_of([layer(colour, rgb=True)], step=(0, 0)).pixels.shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "must be chosen"),
        ([layer(np.zeros((3, 4))), layer(np.zeros((3, 5)))], "one size"),
        ([layer(np.zeros((3, 4, 3)), rgb=True), layer(np.zeros((3, 4)))], "colour picture"),
        ([layer(np.zeros(3))], "rows and columns"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, message):
    with pytest.raises(UsageError, match=message):
        pixels_of(layers)
