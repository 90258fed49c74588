"""Hands and eyes on the page: the mouse at pixels of the image, and waiting for what the page shows."""

from __future__ import annotations

import contextlib
import re


@contextlib.contextmanager
def corrected(page):
    """Waits until a correction is answered and, unless it was refused, shown."""
    with page.expect_response(lambda r: r.url.partition("?")[0].endswith("/corrections")) as answer:
        yield answer
    if answer.value.ok:
        page.evaluate(_SHARED)
        page.wait_for_function(
            "revision => shared.open.revision >= revision", arg=answer.value.json()["revision"]
        )


_SHARED = 'async () => { window.shared = (await import("/static/state.js")).page; }'
_FITTED = """() => {
  const canvas = document.getElementById("canvas"), { width, height } = canvas.getBoundingClientRect();
  return canvas.width === Math.round(width * devicePixelRatio) && canvas.height === Math.round(height * devicePixelRatio);
}"""


def fitted(page) -> dict:
    """The box of the canvas, when the picture fits into it: a frame or more after the panel appears."""
    page.wait_for_function(_FITTED)
    return page.locator("#canvas").bounding_box()


def hover(page, place, text) -> None:
    """Move the mouse about a place until the line below the picture has a text: pixels may be on their way."""
    while True:
        page.mouse.move(place[0] + 1, place[1])
        page.mouse.move(*place)
        if re.search(text, page.locator("#pixel").inner_text()):
            return
        page.wait_for_timeout(20)


def until(page, condition) -> None:
    """As `wait_until`, while the page and the handlers of its requests go on."""
    while not condition():
        page.wait_for_timeout(20)


class Pointer:
    """The mouse at pixels of the image, which the canvas shows whole."""

    def __init__(self, page, shape) -> None:
        self.mouse, self.box = page.mouse, fitted(page)
        height, width = self.shape = shape
        self.scale = min(self.box["width"] / width, self.box["height"] / height) * 0.98

    def at(self, row, column) -> tuple[float, float]:
        height, width = self.shape
        return (
            self.box["x"] + self.box["width"] / 2 + (column + 0.5 - width / 2) * self.scale,
            self.box["y"] + self.box["height"] / 2 + (row + 0.5 - height / 2) * self.scale,
        )

    def drag(self, *places) -> None:
        self.mouse.move(*self.at(*places[0]))
        self.mouse.down()
        for place in places[1:]:
            self.mouse.move(*self.at(*place), steps=4)
        self.mouse.up()

    def click(self, row, column) -> None:
        self.mouse.click(*self.at(row, column))
