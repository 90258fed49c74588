"""The panel in napari: on Qt without a screen, and in a window where there is a screen."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from dinocell.io import read_image, read_labels

pytest.importorskip("napari", reason="napari is not installed: make test-napari brings it")
qtpy = pytest.importorskip("qtpy", reason="qtpy is not installed: make test-napari brings it")
pytest.importorskip("PyQt6", reason="Qt is not installed: make test-napari brings it")


@pytest.fixture(scope="module")
def application():
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    from qtpy.QtWidgets import QApplication

    return QApplication.instance() or QApplication([])


@pytest.fixture
def panel(application, blob_data, tmp_path, mini_model):
    """The panel with one image and a small network."""
    from napari.components import ViewerModel

    from dinocell.napari.widget import CellsWidget
    from dinocell.network.model import save_model

    save_model(tmp_path / "mini.safetensors", mini_model)
    viewer = ViewerModel()
    panel = CellsWidget(viewer)
    viewer.add_image(read_image(sorted((blob_data / "images").iterdir())[0]).pixels, name="blob")
    panel.model_file.value = tmp_path / "mini.safetensors"
    panel.application = application
    yield panel
    if panel.editor is not None:
        panel.editor.close()


def wait_until(panel, there) -> None:
    """Run the events of Qt until something has happened; pytest's own time limit is the last guard."""
    while not there():
        panel.application.processEvents()
        time.sleep(0.01)


def segmented(panel):
    panel.run.changed.emit(True)
    assert not panel.run.enabled
    wait_until(panel, lambda: panel.run.enabled)
    assert panel.editor is not None, panel.says.value
    return panel.editor


def test_segment_move_thresholds_and_save(panel, tmp_path):
    assert not panel.save.enabled
    editor = segmented(panel)
    before = editor.session.num_cells
    assert before > 5
    assert f"{before} cells" in panel.says.value
    assert panel.peak.value == pytest.approx(editor.session.revision.thresholds.peak_threshold)
    panel.peak.value = 0.7
    assert editor.session.revision.thresholds.peak_threshold == 0.7
    assert editor.session.num_cells < before
    panel.fill.value = 0.8  # pushes the other
    assert editor.session.revision.thresholds.peak_threshold == 0.81
    assert panel.peak.value == 0.81
    panel.peak.value, panel.area.value = 0.5, 30
    assert np.bincount(editor.layer.data.ravel())[1:].min() >= 30
    panel.doubtful.changed.emit(True)
    assert len(editor.session.selected) == 1
    panel.kind.value, panel.target.value = "tif", tmp_path / "cells.tif"
    panel.save.changed.emit(True)
    assert read_labels(tmp_path / "cells.tif").max() == editor.session.num_cells
    assert "Saved" in panel.says.value


def test_errors_are_sentences(panel, tmp_path):
    panel.model_file.value = tmp_path / "missing.safetensors"
    panel.run.changed.emit(True)
    wait_until(panel, lambda: panel.run.enabled)
    assert "missing.safetensors" in panel.says.value
    assert panel.editor is None
    panel.url.value = "http://127.0.0.1:9"
    panel.run.changed.emit(True)
    wait_until(panel, lambda: panel.run.enabled)
    assert "does not answer" in panel.says.value
    panel.viewer.layers.clear()
    panel.run.changed.emit(True)
    assert "must be chosen" in panel.says.value


def test_layers_come_and_go(panel):
    assert panel.images.choices == (panel.viewer.layers["blob"],)
    editor = segmented(panel)
    folder = editor.session.result.folder
    assert folder.exists()
    panel.viewer.layers.remove(editor.layer)
    assert panel.editor is None
    assert not folder.exists()
    assert not panel.peak.enabled
    segmented(panel)
    segmented(panel)  # a second time replaces the first layers
    assert sum("cells of" in layer.name for layer in panel.viewer.layers) == 1


def test_a_pixel_is_saved_only_where_a_file_is_chosen(panel):
    segmented(panel)
    panel.save.changed.emit(True)
    assert "must be chosen" in panel.says.value


@pytest.mark.skipif(
    "DISPLAY" not in os.environ,
    reason="there is no screen: make test-napari starts a virtual one if xvfb-run is installed",
)
def test_in_a_window(application, blob_data, tmp_path, mini_model):
    """The manifest leads to the panel, and the canvas shows the cells."""
    from napari import Viewer

    from dinocell.network.model import save_model

    save_model(tmp_path / "mini.safetensors", mini_model)
    viewer = Viewer()
    try:
        viewer.open(sorted((blob_data / "images").iterdir())[0], plugin="dinocell-segmentation")
        _, panel = viewer.window.add_plugin_dock_widget("dinocell-segmentation", "Cells")
        panel.model_file.value, panel.application = tmp_path / "mini.safetensors", application
        layer = segmented(panel).layer
        shown = viewer.screenshot(flash=False)
        layer.visible = False
        assert (viewer.screenshot(flash=False) != shown).any()
    finally:
        viewer.close()
