"""The panel of napari: choose layers and a model, segment, move thresholds, save.  Needs Qt."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from magicgui.widgets import (
    ComboBox,
    Container,
    FileEdit,
    FloatSlider,
    Label,
    LineEdit,
    PushButton,
    Select,
    Slider,
)
from napari.layers import Image
from napari.qt.threading import create_worker
from napari.viewer import Viewer

from dinocell.errors import DINOCellError, UsageError
from dinocell.napari.editor import KEYS, Editor
from dinocell.napari.pixels import pixels_of
from dinocell.napari.remote import segment_there
from dinocell.napari.session import Result, Session, segment_here
from dinocell.network.model import bundled_models
from dinocell.pipeline import DEFAULT_MODEL
from dinocell.service.stored import KINDS

_LIVE_PX = 4e6  # a relabel of a larger image waits until the slider is released


class CellsWidget(Container):
    """Segment layers of the viewer and correct the cells."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer, self._quiet = viewer, False
        self.editor: Editor | None = None
        self._worker: Any = None
        self.images = Select(
            label="channels",
            choices=self._image_layers,
            tooltip="Several layers are normalised one by one and averaged",
        )
        self.model = ComboBox(label="model", choices=bundled_models(), value=DEFAULT_MODEL)
        self.model_file = FileEdit(
            label="or file", filter="*.safetensors *.onnx", tooltip="A model that you have trained"
        )
        self.url = LineEdit(
            label="on server",
            tooltip="The address of a dinocell serve, as http://127.0.0.1:8000, which computes then with "
            "its own model; empty: this computer computes",
        )
        self.token = LineEdit(label="token", tooltip="Of that server, if it asks for one")
        self.run = PushButton(text="Segment")
        self.peak = FloatSlider(label="peak", min=0.01, max=0.99, step=0.01)
        self.fill = FloatSlider(label="fill", min=0.0, max=0.98, step=0.01)
        self.area = Slider(label="smallest area (px)", min=0, max=2000)
        self.doubtful = PushButton(text="Next doubtful cell (Q)")
        self.kind = ComboBox(label="format", choices=KINDS)
        self.target = FileEdit(label="save as", mode="w")
        self.save = PushButton(text="Save")
        self.says = Label(value="")
        self.keys = Label(value="\n".join(f"{key.upper()}: {text}" for key, _, text in KEYS))
        super().__init__(
            widgets=[
                *(self.images, self.model, self.model_file, self.url, self.token, self.run),
                *(self.peak, self.fill, self.area, self.doubtful),
                *(self.kind, self.target, self.save, self.says, self.keys),
            ]
        )
        self.images.max_height = 90
        self._enable(False)
        for slider in (self.peak, self.fill, self.area):
            slider.changed.connect(partial(self._moved, slider))
        self.run.changed.connect(self.segment)
        self.doubtful.changed.connect(self._jump)
        self.save.changed.connect(self._save)
        for event in (viewer.layers.events.inserted, viewer.layers.events.removed):
            event.connect(self._layers_changed)

    def _image_layers(self, widget: Any = None) -> list[tuple[str, Image]]:
        layers = [layer for layer in self.viewer.layers if isinstance(layer, Image)]
        return [(layer.name, layer) for layer in layers]

    def _layers_changed(self, event: Any = None) -> None:
        self.images.reset_choices()
        if self.editor is not None and self.editor.layer not in self.viewer.layers:
            self.editor.close()
            self.editor = None
            self._enable(False)

    def _enable(self, on: bool) -> None:
        for widget in (self.peak, self.fill, self.area, self.doubtful, self.save):
            widget.enabled = on

    def _say(self, text: str) -> None:
        self.says.value = text
        if text:
            self.viewer.status = text

    def _layers(self) -> list[Image]:
        chosen = list(self.images.value)
        if not chosen and len(self._image_layers()) == 1:
            chosen = [self._image_layers()[0][1]]
        return chosen

    def segment(self) -> None:
        """Segment the chosen layers in the background; `Editor` takes over when it is done."""
        try:
            layers = self._layers()
            pixels = pixels_of(layers, self.viewer.dims.current_step)
        except DINOCellError as error:
            self._say(str(error))
            return
        work: Callable[..., Result] = segment_here
        options: dict[str, Any] = {"model": self.model.value}
        if str(self.model_file.value) not in ("", "."):
            options = {"model": str(self.model_file.value)}
        if self.url.value:
            work, options = segment_there, {"url": self.url.value, "token": self.token.value}
        self.run.enabled = False
        self._say("The network runs")
        self._worker = create_worker(_without_traceback, work, pixels._asdict(), options)
        self._worker.returned.connect(partial(self._segmented, layers))
        self._worker.errored.connect(self._failed)
        self._worker.start()

    def _failed(self, error: Exception) -> None:
        self.run.enabled = True
        self._say(f"{type(error).__name__}: {error}")

    def _segmented(self, layers: Sequence[Image], found: Result | str) -> None:
        self.run.enabled = True
        if isinstance(found, str):
            self._say(found)
            return
        if self.editor is not None:
            editor, self.editor = self.editor, None
            editor.close()
        session = Session(found)
        self.editor = Editor(
            self.viewer, session, layers[0], say=self._say, changed=self._show_thresholds
        )
        live = session.labels.size <= _LIVE_PX
        for slider in (self.peak, self.fill, self.area):
            slider.tracking = live
        self._enable(True)
        self._show_thresholds()
        self._say("; ".join((f"{session.num_cells} cells", *found.notes())))

    def _show_thresholds(self) -> None:
        if self.editor is None:  # it is being made
            return
        thresholds = self.editor.session.revision.thresholds
        self._quiet = True
        self.peak.value = thresholds.peak_threshold
        self.fill.value = thresholds.fill_threshold
        self.area.max = max(self.area.max, thresholds.min_area_px)
        self.area.value = thresholds.min_area_px
        self._quiet = False

    def _moved(self, slider: Any, value: float) -> None:
        if self._quiet or self.editor is None:
            return
        peak, fill = self.peak.value, self.fill.value
        if fill >= peak:  # the one that was moved pushes the other
            peak, fill = (peak, peak - 0.01) if slider is self.peak else (fill + 0.01, fill)
        self.editor.relabel(
            peak_threshold=round(peak, 4),
            fill_threshold=round(fill, 4),
            min_area_px=self.area.value,
        )

    def _jump(self) -> None:
        if self.editor is not None:
            self.editor.doubtful()

    def _save(self) -> None:
        if self.editor is None:
            return
        target = Path(self.target.value)
        try:
            if target.name == "" or target.is_dir():
                raise UsageError("A file must be chosen, got none: choose its name above")
            self.editor.export(self.kind.value, target)
        except (DINOCellError, OSError) as error:
            self._say(str(error))
        else:
            self._say(f"Saved {target}")


def _without_traceback(
    work: Callable[..., Result], pixels: dict[str, Any], options: dict[str, Any]
) -> Result | str:
    """The result, or the sentence that says why there is none."""
    try:
        return work(**pixels, **options)
    except (DINOCellError, ValueError, TypeError, OSError, MemoryError) as error:
        return str(error) or type(error).__name__
