"""Keys with a click, two fingers, and a slow network, on the page in headless Chromium."""

from __future__ import annotations

import re

import numpy as np
import pytest
from service_doubles import noise
from test_service_page import Pointer, address, browser, corrected, count, labels_of, opened  # noqa: F401  fixtures

pytestmark = pytest.mark.slow


def inside(labels, label) -> tuple[int, int]:
    rows, columns = np.nonzero(labels == label)
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return int(rows[middle]), int(columns[middle])


def test_a_key_with_a_click_merges_removes_and_gives_seeds(browser, address, tmp_path):  # noqa: F811
    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    cells, labels = count(page), labels_of(page, address)
    pointer = Pointer(page, labels.shape)
    pointer.click(*inside(labels, 2))
    page.keyboard.down("Alt")
    with corrected(page) as answer:
        pointer.click(*inside(labels, 3))
    page.keyboard.up("Alt")
    assert answer.value.json()["num_cells"] == cells - 1
    merged = labels_of(page, address)
    assert len(np.unique(merged[(labels == 2) | (labels == 3)])) == 1

    page.keyboard.press("s")
    pointer.click(*inside(labels, 2))
    with corrected(page) as answer:
        pointer.click(*inside(labels, 3))
    assert answer.value.json()["num_cells"] == cells
    split = labels_of(page, address)
    assert split[inside(labels, 2)] != split[inside(labels, 3)]

    page.keyboard.down("Control")
    with corrected(page) as answer:
        pointer.click(*inside(labels, 4))
    page.keyboard.up("Control")
    assert answer.value.json()["num_cells"] == cells - 1
    assert labels_of(page, address)[inside(labels, 4)] == 0
    assert page.faults == []


def test_two_fingers_zoom(browser, address, tmp_path):  # noqa: F811
    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    box = page.locator("#canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    place = middle[0], middle[1] + 100

    def row() -> int:
        page.mouse.move(place[0] + 1, place[1])
        page.mouse.move(*place)
        return int(re.search(r"row (\d+)", page.locator("#pixel").inner_text())[1])

    first = row()
    fingers = page.context.new_cdp_session(page)

    def touch(kind: str, *apart: int) -> None:
        points = [
            {"x": middle[0] + side * apart[0], "y": middle[1], "id": side}
            for side in (-1, 1)
            if apart
        ]
        points = [{**point, "id": index} for index, point in enumerate(points)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 40)
    for apart in range(50, 130, 10):
        touch("touchMove", apart)
    touch("touchEnd")
    half = labels_of(page, address).shape[0] / 2
    assert abs(row() - half) < 0.6 * abs(first - half)  # three times as large
    assert page.faults == []


def test_corrections_on_a_slow_network_are_all_kept(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    cells, labels = count(page), labels_of(page, address)
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    slow = {"latency": 400, "downloadThroughput": 50_000, "uploadThroughput": 50_000}
    network.send("Network.emulateNetworkConditions", {"offline": False, **slow})
    pointer = Pointer(page, labels.shape)
    for label in (2, 3, 4):  # faster than the answers come
        pointer.click(*inside(labels, label))
        page.keyboard.press("Delete")
    expect(page.locator("#count")).to_contain_text(f"{cells - 3} cells", timeout=30_000)
    after = labels_of(page, address)
    assert all(after[inside(labels, label)] == 0 for label in (2, 3, 4))
    page.keyboard.press("Control+z")
    expect(page.locator("#count")).to_contain_text(f"{cells - 2} cells", timeout=30_000)
    page.reload()
    expect(page.locator("#count")).to_contain_text(f"{cells - 2} cells", timeout=30_000)
    assert page.faults == []
