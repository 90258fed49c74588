"""The plugin in napari: keys and mouse on a `ViewerModel`, files; without Qt and without a screen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dinocell.demo import sample_paths
from dinocell.errors import DINOCellError
from dinocell.io import read_image, read_labels, write_image, write_labels
from dinocell.napari.editor import KEYS, Editor
from dinocell.napari.files import get_reader, sample, write_labels_layer
from dinocell.napari.pixels import pixels_of
from dinocell.napari.session import Session, segment_here
from dinocell.service.history import ChangedError

pytest.importorskip("napari", reason="napari is not installed: make test-napari brings it")


@pytest.fixture
def viewer():
    from napari.components import ViewerModel

    return ViewerModel()


@pytest.fixture
def messages():
    return []


@pytest.fixture
def editor(viewer, blob_data, tmp_path, mini_model, messages):
    from dinocell.network.model import save_model

    save_model(tmp_path / "mini.safetensors", mini_model)
    pixels = read_image(sorted((blob_data / "images").iterdir())[0]).pixels
    image = viewer.add_image(pixels, name="blob", scale=(0.5, 0.5), units=("um", "um"))
    found = pixels_of([image], viewer.dims.current_step)
    assert found.pixel_size_um == 0.5
    session = Session(
        segment_here(**found._asdict(), model=str(tmp_path / "mini.safetensors"), device="cpu")
    )
    editor = Editor(viewer, session, image, say=messages.append)
    yield editor
    editor.close()


def press(editor, key: str) -> None:
    """As the key on the layer of labels."""
    from app_model.types import KeyBinding

    found = {str(bound): action for bound, action in editor.layer.keymap.items()}
    found[str(KeyBinding.validate(key.replace("Control", "Ctrl").replace("-", "+")))](editor.layer)


def drag(editor, places, modifiers=()) -> None:
    """As the mouse from the first to the last of (row, column), pixels of the image at their corners."""
    layer = editor.layer
    event = SimpleNamespace(type="mouse_press", modifiers=modifiers)
    event.position = layer.data_to_world(np.subtract(places[0], 0.5))
    movements = [callback(layer, event) for callback in layer.mouse_drag_callbacks]
    movements = [movement for movement in movements if movement is not None]
    for movement in movements:
        next(movement)
    for place in places[1:]:
        event.type, event.position = "mouse_move", layer.data_to_world(np.subtract(place, 0.5))
        for movement in movements:
            next(movement)
    event.type = "mouse_release"
    for movement in movements:
        next(movement, None)


def middle(labels, cell) -> tuple[float, float]:
    """A pixel deep in a cell."""
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(np.pad(labels == cell, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return row + 0.5, column + 0.5


def largest(labels) -> int:
    area = np.bincount(labels.ravel())
    area[0] = 0
    return int(area.argmax())


def test_labels_lie_on_the_image(editor, viewer):
    np.testing.assert_array_equal(editor.layer.data, editor.session.labels)
    assert viewer.layers.selection.active is editor.layer
    assert tuple(editor.layer.scale) == (0.5, 0.5)
    assert editor.layer.data.max() > 5


def test_a_click_selects_and_keys_correct(editor):
    labels = editor.session.labels.copy()
    one, other = editor.session.numbers()[:2].tolist()
    drag(editor, [middle(labels, one)])
    assert editor.session.selected == [one]
    assert len(editor.mark.data) == 1
    drag(editor, [middle(labels, other)], modifiers=("Shift",))
    assert editor.session.selected == [one, other]
    press(editor, "j")
    np.testing.assert_array_equal(editor.layer.data, np.where(labels == other, one, labels))
    press(editor, "Delete")
    assert one not in editor.layer.data
    press(editor, "Control-Z")
    press(editor, "Control-Z")
    np.testing.assert_array_equal(editor.layer.data, labels)
    press(editor, "Control-Y")
    press(editor, "Control-Shift-Z")
    assert one not in editor.layer.data


def test_modifiers_of_a_click(editor):
    labels = editor.session.labels.copy()
    one, other = editor.session.numbers()[:2].tolist()
    drag(editor, [middle(labels, one)])
    drag(editor, [middle(labels, other)], modifiers=("Alt",))
    assert other not in editor.layer.data
    drag(editor, [middle(labels, one)], modifiers=("Control",))
    assert one not in editor.layer.data


def test_a_line_splits_a_cell(editor):
    labels = editor.session.labels.copy()
    cell = largest(labels)
    columns = np.nonzero(labels == cell)[1]
    row = middle(labels, cell)[0]
    press(editor, "s")
    assert not editor.layer.mouse_pan
    drag(editor, [(row, c) for c in range(columns.min() - 3, columns.max() + 4)])
    assert len(np.unique(editor.layer.data[labels == cell])) == 2
    assert editor.layer.mouse_pan
    assert len(editor.session.selected) >= 2


def test_two_points_split_a_cell_and_escape_ends(editor):
    labels = editor.session.labels.copy()
    cell = largest(labels)
    rows, columns = np.nonzero(labels == cell)
    ends = [(rows[i] + 0.5, columns[i] + 0.5) for i in (0, -1)]
    press(editor, "s")
    drag(editor, ends[:1])
    press(editor, "Escape")
    drag(editor, ends[1:])
    np.testing.assert_array_equal(editor.layer.data, labels)
    press(editor, "s")
    for end in ends:
        drag(editor, [end])
    assert len(np.unique(editor.layer.data[labels == cell])) == 2


def test_s_twice_splits_the_selected_cell_or_says_why_not(editor, messages):
    labels = editor.session.labels.copy()
    cell = largest(labels)
    drag(editor, [middle(labels, cell)])
    press(editor, "s")
    press(editor, "s")
    split = len(np.unique(editor.layer.data[labels == cell])) == 2
    assert split or "two peaks" in messages[-1]


def test_a_missed_cell_grows_where_the_mouse_is(editor):
    labels = editor.session.labels.copy()
    cell = largest(labels)
    drag(editor, [middle(labels, cell)])
    press(editor, "Delete")
    event = SimpleNamespace(
        position=editor.layer.data_to_world(np.subtract(middle(labels, cell), 0.5))
    )
    for callback in editor.layer.mouse_move_callbacks:
        callback(editor.layer, event)
    press(editor, "n")
    grown = editor.layer.data == editor.session.selected[0]
    assert (grown & (labels == cell)).sum() > 0.5 * grown.sum()
    press(editor, "Control-Z")
    for callback in editor.layer.mouse_double_click_callbacks:
        callback(editor.layer, event)
    assert len(editor.session.selected) == 1


def test_painting_is_taken_over_with_the_next_action(editor):
    press(editor, "b")
    assert editor.layer.mode == "paint"
    new = editor.layer.selected_label
    assert new not in editor.session.labels
    editor.layer.paint((2, 2), new)
    press(editor, "b")
    assert editor.layer.mode == "pan_zoom"
    assert editor.session.revision.edited
    press(editor, "e")
    assert editor.layer.mode == "erase"
    press(editor, "Control-Z")
    assert not editor.session.revision.edited


def test_doubtful_cells_and_outlines(editor, viewer, messages):
    numbers, columns = editor.session.columns()
    order = numbers[np.argsort(columns["score"], kind="stable")]
    press(editor, "q")
    assert editor.session.selected == [order[0]]
    assert str(order[0]) in messages[-1]
    centre = np.subtract(np.asarray(viewer.camera.center)[-2:], 0)
    np.testing.assert_allclose(
        editor.layer.world_to_data(centre), editor.session.centres(order[:1])[0]
    )
    press(editor, "q")
    press(editor, "Shift-Q")
    assert editor.session.selected == [order[0]]
    press(editor, "z")
    assert editor.layer.contour == 0


def test_what_cannot_be_done_is_reported(editor, messages):
    labels = editor.session.labels.copy()
    press(editor, "j")
    assert "name 2 cells or more" in messages[-1]
    press(editor, "Control-Z")
    assert "change to undo" in messages[-1]
    np.testing.assert_array_equal(editor.layer.data, labels)


def test_thresholds_move_the_layer(editor):
    before = editor.session.num_cells
    editor.relabel(peak_threshold=0.7)
    assert editor.session.num_cells < before
    np.testing.assert_array_equal(editor.layer.data, editor.session.labels)


def test_export_has_what_is_on_the_screen(editor, tmp_path):
    editor.layer.paint((2, 2), int(editor.layer.data.max()) + 1)
    editor.export("tif", tmp_path / "cells.tif")
    np.testing.assert_array_equal(read_labels(tmp_path / "cells.tif") > 0, editor.layer.data > 0)
    assert read_labels(tmp_path / "cells.tif")[2, 2]


def test_what_was_painted_stays_while_it_cannot_be_stored(editor, messages, monkeypatch):
    def away(*given, **options):
        raise DINOCellError("The service does not answer: is it running?")

    new = editor.session.labels.max() + 1
    editor.layer.paint((2, 2), int(new))
    with monkeypatch.context() as patched:
        patched.setattr(editor.session.result, "replace_labels", away)
        press(editor, "Escape")
    assert "does not answer" in messages[-1]
    assert editor.layer.data[2, 2] == new
    press(editor, "Escape")
    assert messages[-1] == ""
    assert editor.session.labels[2, 2]


def test_saving_does_not_replace_what_somebody_else_has_changed(editor, tmp_path):
    other = Session(editor.session.result)
    other.correct("remove", cells=[largest(other.labels)])
    editor.layer.paint((2, 2), int(editor.layer.data.max()) + 1)
    with pytest.raises(ChangedError):
        editor.export("tif", tmp_path / "cells.tif")
    np.testing.assert_array_equal(editor.layer.data, other.labels)
    press(editor, "Escape")
    np.testing.assert_array_equal(editor.session.labels, other.labels)


def test_every_key_has_a_method_of_the_editor():
    assert all(callable(getattr(Editor, method)) for _, method, _ in KEYS)


def test_images_open_with_their_axes(viewer, tmp_path):
    import tifffile

    stack = np.random.default_rng(0).integers(0, 999, (4, 2, 20, 30)).astype(np.uint16)
    path = tmp_path / "stack.ome.tif"
    tifffile.imwrite(
        *(path, stack),
        metadata={
            "axes": "ZCYX",
            "Channel": {"Name": ["DNA", "AGP"]},
            "PhysicalSizeX": 0.5,
            "PhysicalSizeY": 0.5,
            "PhysicalSizeZ": 2.0,
        },
    )
    layers = get_reader(str(path))(str(path))
    assert [meta["name"] for _, meta, _ in layers] == ["DNA", "AGP"]
    for channel, (data, meta, kind) in enumerate(layers):
        np.testing.assert_array_equal(data, stack[:, channel])
        assert (kind, meta["scale"]) == ("image", [2.0, 0.5, 0.5])
        viewer.add_image(data, **meta)
    found = pixels_of(list(viewer.layers), (1, 0, 0))
    np.testing.assert_array_equal(found.pixels, np.moveaxis(stack[1], 0, -1))
    assert found.pixel_size_um == 0.5


def test_a_large_stack_is_read_when_it_is_shown(tmp_path, monkeypatch):
    import tifffile

    monkeypatch.setattr("dinocell.napari.files._EAGER_BYTES", 100)
    stack = np.random.default_rng(0).integers(0, 999, (3, 20, 30)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "planes.tif", stack, photometric="minisblack")
    ((data, _, _),) = get_reader(str(tmp_path / "planes.tif"))(str(tmp_path / "planes.tif"))
    assert not isinstance(data, np.ndarray)
    np.testing.assert_array_equal(np.asarray(data), stack)


def test_a_stack_that_is_turned_opens_upright(tmp_path, monkeypatch):
    import tifffile

    path = str(tmp_path / "turned.tif")
    stack = np.random.default_rng(0).integers(0, 999, (3, 20, 30)).astype(np.uint16)
    turned = {"photometric": "minisblack", "extratags": [(274, "H", 1, 6, False)]}
    tifffile.imwrite(path, stack, metadata=None, **turned)
    for limit in (10**9, 100):
        monkeypatch.setattr("dinocell.napari.files._EAGER_BYTES", limit)
        ((data, _, _),) = get_reader(path)(path)
        np.testing.assert_array_equal(np.asarray(data), np.rot90(stack, -1, (1, 2)))


def test_colours_labels_and_samples_open(viewer, tmp_path):
    colour = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    write_image(tmp_path / "colour.png", colour)
    ((data, meta, kind),) = get_reader(str(tmp_path / "colour.png"))(str(tmp_path / "colour.png"))
    np.testing.assert_array_equal(data, colour)
    assert (meta["rgb"], kind) == (True, "image")
    labels = np.tile(np.arange(5, dtype=np.uint16), (4, 1))
    write_labels(tmp_path / "a_labels.tif", labels)
    read = get_reader([str(tmp_path / "a_labels.tif")])([str(tmp_path / "a_labels.tif")])
    assert read[0][2] == "labels"
    np.testing.assert_array_equal(read[0][0], labels)
    assert get_reader("notes.txt") is None
    for name in ("nuclei", "tissue", "phase_contrast"):
        image, truth = sample(name)
        assert image[2] == "image"
        path = {p.stem: found for p, found in sample_paths()}[name]
        np.testing.assert_array_equal(truth[0], read_labels(path))


@pytest.mark.parametrize("ending", [".tif", ".png", ".geojson", ".zip", "_coco.json", ".zarr"])
def test_a_layer_of_labels_is_saved(ending, tmp_path):
    labels = np.zeros((20, 30), np.int32)
    labels[2:8, 3:9], labels[10:15, 10:20] = 1, 2
    path = str(tmp_path / f"cells{ending}")
    assert write_labels_layer(path, labels, {}) == [path]
    from dinocell.io import read_label_file

    np.testing.assert_array_equal(read_label_file(path, shape=labels.shape).pixels, labels)


def test_the_manifest_names_what_exists():
    from pathlib import Path

    import npe2

    import dinocell.napari

    manifest = npe2.PluginManifest.from_file(Path(dinocell.napari.__file__).parent / "napari.yaml")
    commands = {command.id: command for command in manifest.contributions.commands}
    for kind in ("widgets", "readers", "writers", "sample_data"):
        for item in getattr(manifest.contributions, kind):
            assert item.command in commands
    for command in commands.values():
        module, _, name = command.python_name.partition(":")
        if module != "dinocell.napari.widget":  # which needs Qt
            assert callable(getattr(__import__(module, fromlist=[name]), name))
