"""Keys and mouse on a layer of labels: what `dinocell.napari.session` does, in napari's words.

Only names of napari's public interface are used, and no Qt: everything works on a `ViewerModel`.
Positions in napari have their origin in the middle of the first pixel, those of a session at its corner.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinocell.errors import DINOCellError
from dinocell.napari.session import Session
from dinocell.service.history import ChangedError

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image

CELLS, MARK = "cells", "selected cells"
_DRAG_PX = 3.0
"""A movement of fewer pixels of the image is a click."""
_NO_STEP_PX = 0.5
_HINT = (
    "Draw a line through a cell, or click two points in it; S once more splits the selected cell by "
    "itself, Escape ends"
)

KEYS: tuple[tuple[str, str, str], ...] = (
    ("q", "doubtful", "next doubtful cell"),
    ("Shift-Q", "doubtful_before", "previous doubtful cell"),
    ("Delete", "remove", "remove the selected cells"),
    ("Backspace", "remove", "remove the selected cells"),
    ("j", "merge", "merge the selected cells"),
    ("s", "split", "split a cell by a line or two points; twice: the selected one by itself"),
    ("n", "grow", "find a missed cell under the mouse"),
    ("b", "brush", "paint a new cell, or more of the selected one"),
    ("e", "eraser", "erase"),
    ("Control-Z", "undo", "undo"),
    ("Control-Y", "redo", "redo"),
    ("Control-Shift-Z", "redo", "redo"),
    ("z", "outlines", "outlines or filled cells"),
    ("Escape", "nothing", "select nothing, end a tool"),
)
"""Key, method of `Editor`, and what it does; the keys of the page."""


class Editor:
    """A session on the screen.

    Parameters
    ----------
    viewer : gets a layer of labels, and one that marks selected cells
    session : the labels
    image : the layer that was segmented; the labels lie on it
    say : is called with one sentence for the user
    changed : is called after each change of the labels
    """

    def __init__(
        self,
        viewer: "ViewerModel",
        session: Session,
        image: "Image",
        *,
        say: Callable[[str], None] = lambda text: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.viewer, self.session, self.say, self.changed = viewer, session, say, changed
        self.splitting, self.seeds = False, list[tuple[float, float]]()
        self.at: tuple[float, float] | None = None
        place = {name: getattr(image, name)[-2:] for name in ("scale", "translate", "units")}
        name = f"{CELLS} of {image.name}"
        self.layer = viewer.add_labels(session.labels.copy(), name=name, **place)
        self.layer.contour = 1
        self.mark = viewer.add_points(
            np.zeros((0, 2)),
            name=MARK,
            size=6,
            face_color="transparent",
            border_color="white",
            **place,
        )
        viewer.layers.selection.active = self.layer
        for key, method, _ in KEYS:
            self.layer.bind_key(key, self._key(method), overwrite=True)
        self.layer.mouse_drag_callbacks.append(self._dragged)
        self.layer.mouse_move_callbacks.append(self._moved)
        self.layer.mouse_double_click_callbacks.append(self._double_clicked)

    def close(self) -> None:
        """Take the layers away and forget the result."""
        for layer in (self.layer, self.mark):
            if layer in self.viewer.layers:
                self.viewer.layers.remove(layer)
        self.session.result.close()

    def _key(self, method: str) -> Callable[[Any], None]:
        return lambda layer: getattr(self, method)()

    def _tried(self, work: Callable[[], object]) -> None:
        """Do something with the labels as they are on the screen, painted pixels included."""
        try:
            self._adopt()
        except DINOCellError as error:
            self.say(str(error))
            return
        try:
            work()
        except DINOCellError as error:
            self.say(str(error))
        else:
            self.say("")
        self.show()

    def _adopt(self) -> None:
        """Keep what was painted.

        Raises ChangedError (somebody else has changed the labels, which are shown now); DINOCellError (the
        pixels could not be stored, and stay on the screen for the next action).
        """
        try:
            self.session.adopt(self.layer.data)
        except ChangedError:
            self.show()
            raise

    def show(self) -> None:
        """Bring the screen to the state of the session."""
        session = self.session
        if not np.array_equal(self.layer.data, session.labels):
            self.layer.data = session.labels.copy()
        self.mark.data = session.centres(session.selected)
        self.mark.selected_data = set()
        if session.selected:
            self.layer.selected_label = session.selected[-1]
        self.changed()

    def relabel(self, **thresholds: Any) -> None:
        """Other thresholds, see `Session.relabel`."""
        self._tried(lambda: self.session.relabel(**thresholds))

    def _correct(self, kind: str, **values: Any) -> None:
        self._tried(lambda: self.session.correct(kind, **values))

    def remove(self) -> None:
        """Remove the selected cells."""
        self._correct("remove", cells=self.session.selected)

    def merge(self) -> None:
        """Merge the selected cells."""
        self._correct("merge", cells=self.session.selected)

    def split(self) -> None:
        """Start to split by a line or two points; the second time split the selected cell by itself."""
        if self.splitting and len(self.session.selected) == 1:
            self._end_split()
            self._correct("split", cells=self.session.selected)
        elif self.splitting:
            self._end_split()
        else:
            self.splitting = True
            self.layer.mode, self.layer.mouse_pan = "pan_zoom", False
            self.say(_HINT)

    def _end_split(self) -> None:
        self.splitting, self.seeds = False, []
        self.layer.mouse_pan = True

    def grow(self) -> None:
        """Find a missed cell under the mouse."""
        if self.at is not None:
            self._correct("grow", points=[self.at])

    def undo(self) -> None:
        """Undo the last change."""
        self._correct("undo")

    def redo(self) -> None:
        """Redo what was undone."""
        self._correct("redo")

    def brush(self) -> None:
        """Paint with the selected cell's number, or a new one; again: stop."""
        if self.layer.mode == "paint":
            self.nothing()
            return
        if not self.session.selected:
            self.layer.selected_label = int(self.layer.data.max(initial=0)) + 1
        self.layer.mode = "paint"

    def eraser(self) -> None:
        """Erase; again: stop."""
        self.layer.mode = "pan_zoom" if self.layer.mode == "erase" else "erase"

    def outlines(self) -> None:
        """Outlines or filled cells."""
        self.layer.contour = 0 if self.layer.contour else 1

    def nothing(self) -> None:
        """Select nothing, and end a tool."""
        self._end_split()
        self.layer.mode = "pan_zoom"
        self.session.select(0)
        self._tried(lambda: None)

    def export(self, kind: str, target: Path) -> None:
        """Write the labels on the screen in a format of `dinocell.service.stored.KINDS`.

        Raises DINOCellError (the format cannot hold them, or the disk refuses).
        """
        self._adopt()
        self.show()
        self.session.result.copy_file(kind, target)

    def doubtful(self, step: int = 1) -> None:
        """Go to the cell of the next lowest score."""

        def jump() -> None:
            centre = self.session.next_doubtful(step)
            self.viewer.camera.center = self.layer.data_to_world(centre)
            self.viewer.camera.zoom = max(
                self.viewer.camera.zoom, 3.0 / float(self.layer.scale[-1])
            )

        self._tried(jump)
        if self.session.selected:
            score = self.session.score(self.session.selected[0])
            self.say(f"Cell {self.session.selected[0]}, score {score:.2f}")

    def doubtful_before(self) -> None:
        """Go back to the cell of the next higher doubt."""
        self.doubtful(-1)

    def _place(self, event: Any) -> tuple[float, float]:
        row, column = self.layer.world_to_data(event.position)[-2:]
        return float(row) + 0.5, float(column) + 0.5

    def _moved(self, layer: Any, event: Any) -> None:
        self.at = self._place(event)

    def _double_clicked(self, layer: Any, event: Any) -> None:
        self.at = self._place(event)
        if self.layer.mode == "pan_zoom" and not self.session.cell_at(*self.at):
            self.grow()

    def _dragged(self, layer: Any, event: Any) -> Iterator[None]:
        """From the press of a button to its release."""
        start = self._place(event)
        line, modifiers = [start], {str(getattr(key, "name", key)) for key in event.modifiers}
        painting = self.layer.mode != "pan_zoom"
        yield
        while event.type == "mouse_move":
            place = self._place(event)
            if np.hypot(place[0] - line[-1][0], place[1] - line[-1][1]) > _NO_STEP_PX:
                line.append(place)
            yield
        if painting:
            return  # napari paints; the next action takes it over
        is_line = any(np.hypot(p[0] - start[0], p[1] - start[1]) > _DRAG_PX for p in line)
        if self.splitting:
            self._draw(line, is_line)
        elif not is_line:
            self._click(start, modifiers)

    def _draw(self, line: list[tuple[float, float]], is_line: bool) -> None:
        if is_line:
            self._end_split()
            self._correct("cut", points=line)
            return
        cell = self.session.cell_at(*line[0])
        if not cell:
            return
        if self.seeds and self.session.cell_at(*self.seeds[0]) != cell:
            self.seeds = []
        self.seeds.append(line[0])
        if len(self.seeds) == 2:
            seeds = self.seeds
            self._end_split()
            self._correct("split", cells=[cell], points=seeds)

    def _click(self, place: tuple[float, float], modifiers: set[str]) -> None:
        session = self.session

        def act() -> None:
            cell, chosen = session.cell_at(*place), session.selected
            if "Alt" in modifiers and cell and chosen:
                session.correct("merge", cells=dict.fromkeys([*chosen, cell]))
            elif "Control" in modifiers and cell:
                session.correct("remove", cells=[cell])
            else:
                session.select(cell, more="Shift" in modifiers)

        self._tried(act)
