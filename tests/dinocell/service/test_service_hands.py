"""Keys with a click, two fingers, and a slow network, on the page in headless Chromium."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tifffile
from page_hands import Pointer, corrected, fitted, until
from service_doubles import noise
from test_service_page import address, browser, count, labels_of, opened  # noqa: F401  fixtures

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
    box = fitted(page)
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


def test_what_is_selected_while_a_correction_is_on_its_way_stays_selected(
    browser,  # noqa: F811
    address,  # noqa: F811
    tmp_path,
):
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    cells, labels = count(page), labels_of(page, address)
    pointer, held = Pointer(page, labels.shape), []
    page.route("**/corrections?*", lambda route: held.append(route), times=1)
    pointer.click(*inside(labels, 2))
    page.keyboard.press("Delete")
    until(page, lambda: held)
    pointer.click(*inside(labels, 3))
    with corrected(page):
        held[0].continue_()
    expect(page.locator("#count")).to_contain_text(f"{cells - 1} cells")
    with corrected(page):
        page.keyboard.press("Delete")
    after = labels_of(page, address)
    assert [after[inside(labels, label)] for label in (2, 3)] == [0, 0]
    pointer.click(*inside(labels, 4))
    with corrected(page):
        page.keyboard.press("Control+z")
    expect(page.locator("#remove")).to_be_disabled()  # the number may be that of another cell


def test_a_cell_that_is_removed_before_an_earlier_answer_is_not_selected(
    browser,  # noqa: F811
    address,  # noqa: F811
    tmp_path,
):
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    pointer, held = Pointer(page, labels_of(page, address).shape), []
    page.keyboard.press("r")
    pointer.drag((0, 0), (39, 47))
    with corrected(page):
        page.keyboard.press("Delete")
    page.keyboard.press("b")
    with corrected(page):
        pointer.drag((20, 5), (20, 15))
    expect(page.locator("#count")).to_contain_text(re.compile(r"^1 cell\b"))
    page.route("**/corrections?*", lambda route: held.append(route), times=1)
    pointer.drag((20, 15), (20, 40))  # more of the same cell
    page.keyboard.press("b")
    page.keyboard.press("Delete")
    until(page, lambda: held)
    held[0].continue_()
    expect(page.locator("#count")).to_contain_text(re.compile(r"^0 cells\b"))
    expect(page.locator("#remove")).to_be_disabled()
    assert page.faults == []


def test_a_reason_stays_while_the_page_still_starts(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    page, held = browser.new_page(), []
    page.route("**/api/v1/models", lambda route: held.append(route), times=1)
    page.goto(address)
    until(page, lambda: held)
    page.get_by_text("Planes of a stack").click()
    page.locator("[name=z]").fill("first")
    page.set_input_files("#files", str(noise(tmp_path / "refused.tif", 1)))
    expect(page.locator("#status")).to_contain_text("the fields are below Choose images")
    held[0].continue_()
    expect(page.locator("#model")).to_contain_text("mini")
    expect(page.locator("#status")).to_contain_text("the fields are below Choose images")


def test_doubtful_cells_follow_a_removal_and_strokes_apart_are_cells(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    cells, status = count(page), page.locator("#status")
    page.keyboard.press("Delete")
    expect(status).to_contain_text("No cell is selected")
    page.keyboard.press("j")
    expect(status).to_contain_text("Two cells or more must be selected")
    page.keyboard.press("s")
    page.keyboard.press("s")
    expect(status).to_contain_text("One cell must be selected")
    for removed in range(3):
        page.keyboard.press("q")
        expect(status).to_contain_text(f"1 of {cells - removed} by doubt")
        page.keyboard.press("Delete")
        expect(page.locator("#table tbody tr")).to_have_count(cells - removed - 1)
    page.keyboard.press("q")
    page.keyboard.press("q")
    expect(status).to_contain_text(f"2 of {cells - 3} by doubt")
    page.keyboard.press("Shift+Q")
    expect(status).to_contain_text(f"1 of {cells - 3} by doubt")
    page.keyboard.press("Shift+Q")
    expect(status).to_contain_text(f"{cells - 3} of {cells - 3} by doubt")

    page.keyboard.press("0")
    page.keyboard.press("r")
    pointer = Pointer(page, labels_of(page, address).shape)
    pointer.drag((0, 0), (39, 47))
    with corrected(page):
        page.keyboard.press("Delete")
    page.keyboard.press("b")
    strokes = [((5, 5), (5, 15)), ((20, 5), (20, 15)), ((35, 5), (35, 15))]
    for number, stroke in enumerate(strokes, 1):
        with corrected(page):
            pointer.drag(*stroke)
        expect(page.locator("#count")).to_contain_text(re.compile(rf"^{number} cells?\b"))
        expect(page.locator("#table tbody tr")).to_have_count(number)  # which have no scores
    with corrected(page):
        pointer.drag((35, 15), (35, 40))  # from the selected cell on
    expect(page.locator("#count")).to_contain_text("3 cells")
    page.keyboard.press("Escape")
    page.keyboard.press("q")
    expect(status).to_have_text("No cell has a score")  # no network has seen them
    assert page.faults == []


def test_files_that_fail_stay_in_the_list_with_their_reason(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    stack = np.full((2, 3, 40, 48), 100, np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", stack, imagej=True, metadata={"axes": "TZYX"})
    (tmp_path / "broken.tif").write_bytes(b"no image")
    page = browser.new_page()
    page.set_viewport_size({"width": 420, "height": 900})
    page.goto(address)
    lines, status = page.locator("#job-list li"), page.locator("#status")
    page.get_by_text("Planes of a stack").click()
    page.locator("[name=z]").fill("first")  # is refused at once
    page.set_input_files("#files", str(noise(tmp_path / "refused.tif", 1)))
    expect(lines).to_have_text(re.compile("refused.tif.*`z`"))
    expect(status).to_contain_text("the fields are below Choose images")
    page.locator("[name=z]").fill("")
    page.locator("[name=channels]").fill("DNA")
    files = [tmp_path / "broken.tif", noise(tmp_path / "small field.tif", 1)]
    page.set_input_files("#files", [str(path) for path in files])
    expect(status).to_contain_text("small field: `channels`", timeout=30_000)
    expect(status).to_contain_text("the fields are below Choose images")
    expect(lines).to_have_count(3)
    page.locator("[name=channels]").fill("")
    page.set_input_files("#files", str(tmp_path / "stack.tif"))
    expect(page.locator("#job-list .failed")).to_have_count(4, timeout=30_000)
    assert max(line.bounding_box()["height"] for line in lines.all()) < 90
    expect(status).to_contain_text("stack")  # the last reason, after which none comes by itself
    broken = lines.filter(has_text="broken")
    broken.get_by_role("button").first.click()
    expect(status).to_have_text(re.compile("^broken.*: .{20}"))
    assert (
        status.evaluate("element => getComputedStyle(element, '::first-letter').textTransform")
        == "none"
    )
    expect(lines).to_have_count(4)
    for name in ("refused.tif", "broken", "small field", "stack"):
        page.get_by_role("button", name=re.compile(f"Remove {name}")).press("Enter")
        expect(lines.filter(has_text=name)).to_have_count(0)
    jobs = page.request.get(f"{address}/api/v1/jobs").json()
    assert [job["state"] for job in jobs] == ["deleted"] * 3


def test_a_folder_is_dropped_pressed_while_it_runs_and_reloaded(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    folder = tmp_path / "plate" / "inner"
    folder.mkdir(parents=True)
    for number in range(8):  # more than a browser has connections
        noise(folder / f"f{number}.tif", number)
    (tmp_path / "plate" / "notes.txt").write_text("none")
    page = opened(
        browser, address, [noise(tmp_path / "first.tif", 1), noise(tmp_path / "second.tif", 2)]
    )
    lines = page.locator("#job-list li")
    expect(page.locator("#job-list .quiet", has_text="cell")).to_have_count(2)
    address.service.worker.hold()
    transfer = {"items": [], "files": [str(tmp_path / "plate")], "dragOperationsMask": 1}
    hand = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        hand.send("Input.dispatchDragEvent", {"type": kind, "x": 600, "y": 500, "data": transfer})
    expect(lines).to_have_count(10)
    expect(lines.first).to_contain_text("f7")
    shown = page.locator("#title").inner_text()
    other = "second" if shown == "first" else "first"
    lines.filter(has_text=other).hover()
    page.mouse.down()
    address.service.worker.release()
    expect(page.locator("#job-list .quiet", has_text="cell")).to_have_count(10, timeout=30_000)
    page.mouse.up()
    expect(page.locator("#title")).to_have_text(other)
    page.reload()
    expect(page.locator("#title")).to_have_text(other)
    assert page.faults == []


def test_a_folder_is_chosen_without_results_and_hidden_files(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    folder = tmp_path / "plate"
    (folder / ".cache").mkdir(parents=True)
    for name in ("a.tif", "a_overlay.png", "a_labels_v2.tif", "b_labels.tif", ".cache/c.tif"):
        noise(folder / "plain.tif", 1).rename(folder / name)
    (folder / "a_cells.csv").write_text("label\n")
    page = browser.new_page()
    page.goto(address)
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Choose a folder").click()
    chosen.value.set_files(str(folder))
    lines = page.locator("#job-list li .name")
    expect(lines).to_have_text(["b_labels", "a"])  # of b no table says that it is a result
    page.locator("#panel:not([hidden]) #count").wait_for()


def test_an_image_is_deleted_by_the_second_press(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    page = browser.new_page()
    page.goto(address)
    page.locator("[name=channels]").fill("mean")
    page.set_input_files("#files", str(noise(tmp_path / "field.tif", 1, (40, 48, 3))))
    expect(page.locator("#segmented-as")).to_have_text("channels mean")
    cells, note = count(page), page.locator("#filter-note")
    page.locator("summary", has_text="Table").click()
    job = page.request.get(f"{address}/api/v1/jobs").json()[0]["id"]
    at_border = page.request.get(f"{address}/api/v1/jobs/{job}/cells").json()["columns"][
        "touches_border"
    ]
    assert 0 < sum(at_border) < cells
    for text in (
        "touches_border = yes",
        "touches_border = 1 and area < 1e6",
        "touches_border = TRUE, area > -1",
    ):
        page.locator("#filter").fill(text)
        expect(note).to_have_text(f"{sum(at_border)} of {cells} cells")
    page.locator("#filter").fill("touches_border = no")
    expect(note).to_have_text(f"{cells - sum(at_border)} of {cells} cells")
    page.locator("#filter").fill("area > large")
    expect(note).to_have_text(re.compile("must be a column.*a number, yes or no"))
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()

    # The page takes its question back after 6 s, which a busy machine may need between two presses.
    page.clock.install(time=0)
    page.clock.pause_at(60)
    button = page.locator("#delete-job")
    button.dblclick()
    expect(button).to_have_text(f"Press again to delete {cells} cells and their corrections")
    page.locator("#title").click()  # leaves the button
    expect(button).to_have_text("Delete this image from the service")
    button.press("Enter")
    button.press("Enter")
    expect(page.locator("#panel")).to_be_hidden()
    expect(page.locator("#job-list li")).to_have_count(0)


def test_thresholds_follow_other_labels_and_a_service_that_was_away(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    other = browser.new_page()
    other.goto(address)
    other.locator("#panel:not([hidden]) #count").wait_for()
    page.keyboard.press("q")
    with corrected(page):
        page.keyboard.press("Delete")
    with other.expect_response(lambda r: "/relabel" in r.url and r.ok):
        other.locator("#area").fill("12")
    expect(other.locator("#area-value")).to_have_text("12 px²")
    expect(other.locator("#status")).to_contain_text("The thresholds are applied to theirs")
    assert np.bincount(labels_of(page, address).ravel())[1:].min() >= 12

    page.route("**/events", lambda route: route.abort())
    page.set_input_files("#files", str(noise(tmp_path / "late.tif", 2)))
    expect(page.locator("#status")).to_have_text(
        "The service does not answer. late continues when it does"
    )
    page.unroute("**/events")
    expect(page.locator("#status")).to_have_text("The cells of late are found")


def test_the_page_asks_for_a_token_in_its_own_words(browser, address):  # noqa: F811
    from playwright.sync_api import expect

    def with_token(route):
        right = route.request.headers.get("authorization") == "Bearer right"
        answer = {"detail": "send it as `Authorization: Bearer TOKEN`"}
        route.continue_() if right else route.fulfill(status=401, json=answer)

    page = browser.new_page()
    page.route("**/api/v1/**", with_token)
    page.goto(address)
    status, field = page.locator("#status"), page.locator("#token")
    expect(status).to_have_text("This service needs a token: write it into the field at the top")
    field.fill("wrong")
    field.press("Enter")
    expect(status).to_contain_text("another token than the one given")
    field.fill("right")
    field.press("Enter")
    expect(field).to_be_hidden()
    expect(status).to_have_text("")
