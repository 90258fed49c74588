"""Tiles of large images: from the service, and on the page."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from page_hands import Pointer, fitted, hover
from service_doubles import add_finished, upload
from test_service_page import STATIC, address, browser  # noqa: F401  two of them are fixtures

from dinocell.errors import UsageError
from dinocell.service.stored import KINDS
from dinocell.service.tiles import tile_of

PATIENT = 180_000  # ms, for machines with much other work


def npy(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


def test_tiles_cover_the_image_at_every_scale():
    image = np.arange(1100 * 700).reshape(1100, 700)
    for level in (0, 1, 2):
        step = 2**level
        rows = range(-(-1100 // (512 * step)))
        columns = range(-(-700 // (512 * step)))
        tiles = [[tile_of(image, level, row, column) for column in columns] for row in rows]
        assert max(tile.size for line in tiles for tile in line) <= 512 * 512
        np.testing.assert_array_equal(np.block(tiles), image[::step, ::step])
    colours = np.zeros((600, 20, 3), np.uint8)
    assert tile_of(colours, 1, 0, 0).shape == (300, 10, 3)
    with pytest.raises(UsageError, match="inside the image"):
        tile_of(image, 0, 3, 0)


def test_tiles_of_a_job_and_of_its_corrections(client, picture):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    place = {"level": 0, "row": 0, "column": 0}
    image = npy(client.get(f"{base}/image"))
    np.testing.assert_array_equal(npy(client.get(f"{base}/image/tile", params=place)), image)
    labels = npy(client.get(f"{base}/labels/npy"))
    answer = client.get(f"{base}/labels/tile", params=place)
    np.testing.assert_array_equal(npy(answer), labels)
    assert answer.headers["etag"] == '"0"'
    cell = int(labels.max())
    body = {"kind": "remove", "cells": [cell]}
    change = client.post(f"{base}/corrections?revision=0&pixels=false", json=body).json()
    assert change["labels"] == ""
    assert (labels == cell).any(axis=1).sum() == change["height"]
    relabelled = {**place, "level": 1}
    expected = np.where(labels == cell, 0, labels)[::2, ::2]
    answer = client.get(f"{base}/labels/tile", params=relabelled)
    np.testing.assert_array_equal(npy(answer), expected)
    assert answer.headers["etag"] == '"1"'
    answer = client.get(f"{base}/labels/tile", params={**place, "row": 1})
    assert (answer.status_code, "inside the image" in answer.json()["detail"]) == (422, True)
    answer = client.post(f"{base}/relabel?pixels=false", json={"peak_threshold": 0.6})
    assert answer.json()["labels"] == ""


def test_the_page_offers_every_format_of_the_service():
    text = (STATIC / "result.js").read_text(encoding="utf-8")
    table = re.search(r"const KINDS = \{(.*?)\n\};", text, flags=re.S)[1]
    assert set(re.findall(r'"?([a-z0-9-]+)"?: "', table)) == set(KINDS)


@pytest.mark.slow
def test_a_large_image_is_shown_and_corrected(browser, address):  # noqa: F811
    from playwright.sync_api import expect

    labels = add_finished(address.service, side=6000, spacing=200)
    page = browser.new_page()
    page.set_default_timeout(PATIENT)
    page.set_viewport_size({"width": 1440, "height": 900})
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: m.type == "error" and faults.append(m.text))
    page.goto(address)
    page.locator("#undo").wait_for()
    expect(page.locator("#status")).to_have_text("", timeout=PATIENT)
    expect(page.locator("#count")).to_contain_text("900 cells", timeout=PATIENT)
    box = fitted(page)
    at = box["x"] + box["width"] / 2 + 7, box["y"] + box["height"] / 2 + 7
    page.mouse.move(*at)
    for _ in range(8):
        page.mouse.wheel(0, -300)
        page.wait_for_timeout(50)
    at = at[0] + 1, at[1]
    hover(page, at, r"row \d+, column \d+: \d+, cell \d+")  # the tiles of the full scale have come
    text = page.locator("#pixel").inner_text()
    row, column, value, cell = map(int, re.findall(r"\d+", text))
    assert labels[row, column] == cell  # numbers have no gaps yet
    assert value == 1000 + column % 256
    page.mouse.click(*at)
    expect(page.locator("#selection")).to_contain_text("area", timeout=PATIENT)
    page.keyboard.press("Delete")
    expect(page.locator("#count")).to_contain_text("899 cells", timeout=PATIENT)
    page.mouse.move(at[0] - 1, at[1])
    expect(page.locator("#pixel")).not_to_contain_text("cell", timeout=PATIENT)
    page.keyboard.press("Control+z")
    expect(page.locator("#count")).to_contain_text("900 cells", timeout=PATIENT)
    page.locator("#canvas").screenshot()
    assert faults == []


@pytest.mark.slow
def test_two_users_of_a_large_image_never_act_on_an_outdated_picture(browser, address):  # noqa: F811
    from playwright.sync_api import expect

    labels = add_finished(address.service, side=1200, spacing=100)
    (job,) = address.service.queue.newest(1)
    result = address.service.result(job)

    def remove(cell):
        result.correct("remove", {"cells": [cell], "points": [], "radius_px": 3}, revision=None)

    page = browser.new_page()
    text = (STATIC / "result.js").read_text(encoding="utf-8")
    smaller = text.replace("TILED = 32e6", "TILED = 1e6")
    assert smaller != text
    kind = "text/javascript"
    page.route("**/result.js", lambda route: route.fulfill(body=smaller, content_type=kind))
    shown = []
    page.on("response", lambda answer: "labels/tile" in answer.url and shown.append(answer.url))
    held = []
    page.route("**/cells", lambda route: held.append(route), times=1)
    page.goto(address)
    while not (shown and held):
        page.wait_for_timeout(50)
    at = Pointer(page, labels.shape).at(525, 925)  # inside cell 70
    hover(page, at, "cell")
    remove(70)  # by somebody else, while the cells are being measured
    held[0].continue_()
    expect(page.locator("#count")).to_contain_text("143 cells", timeout=30_000)
    expect(page.locator("#status")).to_have_text("", timeout=30_000)
    page.mouse.move(at[0] + 1, at[1])
    expect(page.locator("#pixel")).not_to_contain_text("cell")

    def correct():
        with page.expect_response(lambda r: "/corrections" in r.url, timeout=30_000) as answer:
            page.keyboard.press("Delete")
        return answer.value

    page.keyboard.press("q")
    expect(page.locator("#selection")).to_contain_text("area")
    remove(71)
    assert correct().status == 409
    expect(page.locator("#status")).to_contain_text("Somebody else")
    expect(page.locator("#count")).to_contain_text("142 cells", timeout=30_000)
    page.keyboard.press("q")
    expect(page.locator("#selection")).to_contain_text("area")
    assert correct().status == 200
    expect(page.locator("#count")).to_contain_text("141 cells", timeout=30_000)
    assert result.revision().number == 3
