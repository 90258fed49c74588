"""The page in headless Chromium: upload, contrast, thresholds, corrections, downloads, sizes."""

from __future__ import annotations

import datetime
import io
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from page_hands import Pointer, corrected, until
from service_doubles import WorkerThread, noise

import dinocell.service
from dinocell.service.app import create_app
from dinocell.service.options import ServiceOptions
from dinocell.service.queue import Queue
from dinocell.service.serve import shared_options
from dinocell.service.service import Service
from dinocell.service.worker import warm_up

STATIC = Path(dinocell.service.__file__).parent / "static"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def test_the_page_is_small_and_loads_nothing_from_elsewhere():
    files = [path for path in STATIC.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 150_000
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(src|href|url\(|import|fetch\()[^\n]{0,20}https?://", text), (
            path.name
        )
        assert not re.search(r"innerHTML|\beval\(|document\.write| on[a-z]+=\"|style=\"", text), (
            path.name
        )


def test_the_page_is_served_under_a_strict_policy(client):
    page = client.get("/")
    assert page.status_code == 200
    for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
        answer = client.get(name)
        assert answer.status_code == 200
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    modules = {
        name
        for path in STATIC.glob("*.js")
        for name in re.findall(r'(?:from|import) "\./(\w+\.js)"', path.read_text())
    }
    assert modules | {"main.js"} == {path.name for path in STATIC.glob("*.js")}
    preloaded = set(re.findall(r'rel="modulepreload" href="/static/([^"]+)"', page.text))
    assert preloaded == modules  # else each module waits for those that import it
    assert client.get("/static/../queue.py").status_code == 404


class Address(str):
    """Where `service` answers."""

    service: Service


@pytest.fixture
def address(tmp_path, mini_model):
    """A real server with a small network, in a thread."""
    options = ServiceOptions(jobs=tmp_path / "jobs", device="cpu")
    service = Service(options, Queue(options.jobs))
    warm_up(mini_model, shared_options(options))  # as the worker does before it is ready
    service.worker = WorkerThread(service, mini_model)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(service), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        found = Address(f"http://127.0.0.1:{listening.getsockname()[1]}")
        found.service = service
        yield found
        server.should_exit = True
        thread.join()


@pytest.fixture
def browser():
    from playwright.sync_api import expect, sync_playwright

    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    expect.set_options(timeout=30_000)  # ms, as all else waits; of 5 s a busy computer needs more
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, address, images, width=1440, height=900):
    """The page with the first of the images open; its errors fail the test at the end."""
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda m: m.type == "error" and page.faults.append(m.text))
    page.goto(address)
    page.set_input_files("#files", [str(path) for path in images])
    page.locator("#panel:not([hidden]) #count").wait_for()
    return page


def count(page) -> int:
    return int(page.locator("#count").inner_text().split()[0])


def labels_of(page, address) -> np.ndarray:
    (job, *_) = page.request.get(f"{address}/api/v1/jobs").json()
    body = page.request.get(f"{address}/api/v1/jobs/{job['id']}/result/npy").body()
    return np.load(io.BytesIO(body))


@pytest.mark.slow
def test_a_picture_is_segmented_corrected_and_downloaded(browser, address, tmp_path):
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    expect(page.locator("#title")).to_have_text("field")
    cells = count(page)
    assert cells == labels_of(page, address).max() > 3

    page.keyboard.press("q")
    expect(page.locator("#status")).to_contain_text(f"1 of {cells} by doubt")
    expect(page.locator("#selection td").first).to_have_text("label")
    with corrected(page) as answer:
        page.keyboard.press("Delete")
    assert answer.value.json()["num_cells"] == cells - 1
    expect(page.locator("#count")).to_contain_text(f"{cells - 1} cells")
    with corrected(page):
        page.keyboard.press("Control+z")
    expect(page.locator("#count")).to_contain_text(f"{cells} cells")
    with corrected(page):
        page.keyboard.press("Control+y")
    expect(page.locator("#count")).to_contain_text(f"{cells - 1} cells")

    page.clock.set_fixed_time(datetime.datetime.now())  # one movement, however slow the test is
    with page.expect_response(lambda r: "/relabel" in r.url) as answer:
        page.locator("#area").fill("12")
    expect(page.locator("#area-value")).to_have_text("12 px²")
    expect(page.locator("#count")).to_contain_text(f"{answer.value.json()['num_cells']} cells")
    assert np.bincount(labels_of(page, address).ravel())[1:].min() >= 12

    with page.expect_response(lambda r: "/relabel" in r.url):
        page.locator("#area").fill("30")  # the same movement, as far as undoing is concerned
    expect(page.locator("#redo")).to_be_disabled()
    with corrected(page) as answer:
        page.locator("#undo").click()
    expect(page.locator("#area-value")).to_have_text("0 px²")
    assert answer.value.json()["num_cells"] == cells - 1

    with page.expect_download() as download:
        page.get_by_role("button", name="Table (CSV)").click()
    assert download.value.suggested_filename == "field_cells.csv"
    assert page.faults == []


@pytest.mark.slow
def test_cells_are_merged_split_grown_painted_and_erased(browser, address, tmp_path):
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    cells = count(page)
    labels = labels_of(page, address)
    pointer = Pointer(page, labels.shape)

    def inside(label):
        rows, columns = np.nonzero(labels == label)
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        return int(rows[middle]), int(columns[middle])

    pointer.click(*inside(2))
    expect(page.locator("#selection tr").first).to_have_text(re.compile("label\\s*2"))
    page.keyboard.down("Shift")
    pointer.click(*inside(3))
    page.keyboard.up("Shift")
    expect(page.locator("#selection")).to_have_text("2 cells are selected")
    with corrected(page) as answer:
        page.keyboard.press("j")
    assert answer.value.json()["num_cells"] == cells - 1
    merged = labels_of(page, address)
    assert len(np.unique(merged[(labels == 2) | (labels == 3)])) == 1
    expect(page.locator("#count")).to_contain_text("1 corrected")

    largest = int(np.bincount(labels.ravel())[4:].argmax()) + 4
    row = inside(largest)[0]
    page.keyboard.press("s")
    expect(page.locator("#tool-split")).to_have_attribute("aria-pressed", "true")
    with corrected(page) as answer:
        pointer.drag((row, 0), (row, 47))
    assert answer.value.json()["num_cells"] > cells - 1
    expect(page.locator("#tool-split")).to_have_attribute("aria-pressed", "false")

    page.keyboard.press("Escape")
    page.keyboard.press("e")
    with corrected(page) as answer:
        pointer.drag((0, 0), (39, 0))
    erased = answer.value.json()
    assert (labels_of(page, address)[:, 0] == 0).all()
    page.keyboard.press("[")
    expect(page.locator("#radius-value")).to_have_text("3 px")
    page.keyboard.press("b")
    with corrected(page) as answer:
        pointer.drag((2, 0), (30, 0))
    assert answer.value.json()["num_cells"] == erased["num_cells"] + 1
    page.keyboard.press("Escape")

    page.keyboard.press("r")
    pointer.drag((0, 0), (39, 47))
    expect(page.locator("#selection")).to_contain_text("cells are selected")
    with corrected(page) as answer:
        page.keyboard.press("Delete")
    assert answer.value.json()["num_cells"] == 0
    expect(page.locator("#count")).to_have_text(re.compile(r"^0 cells"))
    with corrected(page) as answer:
        pointer.mouse.dblclick(*pointer.at(*inside(largest)))
    assert answer.value.json()["num_cells"] == 1
    for _ in range(6):
        with corrected(page):
            page.keyboard.press("Control+z")
    expect(page.locator("#undo")).to_be_disabled()
    assert (labels_of(page, address) == labels).all()
    assert page.faults == []


@pytest.mark.slow
def test_a_large_file_comes_in_parts_and_continues(browser, address, tmp_path):
    from playwright.sync_api import expect

    path = noise(tmp_path / "field.tif", 1)
    cells = opened(browser, address, [path]).locator("#count").inner_text()
    large = tmp_path / "large.tif"
    large.write_bytes(path.read_bytes() + bytes(17 * 2**20))
    context = browser.new_context()
    page = context.new_page()
    sent = []

    def cut(route):
        """The second part once, and the third for good."""
        sent.append(int(route.request.url.partition("offset=")[2]))
        fails = sent[-1] >= 8 * 2**20 or sent == [0, 4 * 2**20]
        route.abort() if fails else route.continue_()

    context.route("**/uploads/*?offset=*", cut)
    page.goto(address)
    page.set_input_files("#files", [str(large)])
    expect(page.locator("#job-list")).to_contain_text("uploading, 47 %", timeout=30_000)
    expect(page.locator("#status")).to_contain_text("continues when the service answers")
    assert [offset // 2**20 for offset in sent][:4] == [0, 4, 4, 8]
    page.close()
    context.unroute("**/uploads/*?offset=*")
    page, sent = context.new_page(), []
    page.on("request", lambda r: "offset=" in r.url and sent.append(r.url.partition("offset=")[2]))
    page.goto(address)
    page.set_input_files("#files", [str(large)])
    button = page.get_by_role("button", name=re.compile("large.* cells", re.S))
    button.click(timeout=30_000)
    expect(page.locator("#title")).to_have_text("large")
    expect(page.locator("#count")).to_have_text(cells)
    assert int(sent[0]) == 8 * 2**20
    assert list(address.service.uploads.folder.iterdir()) == []
    assert page.evaluate("localStorage.length") == 0


@pytest.mark.slow
def test_an_upload_is_cancelled_by_a_click(browser, address, tmp_path):
    from playwright.sync_api import expect

    large = tmp_path / "large.tif"
    large.write_bytes(bytes(17 * 2**20))
    page = browser.new_page()
    page.route("**/uploads/*?offset=4*", lambda route: route.abort())
    page.goto(address)
    page.set_input_files("#files", [str(large)])
    page.get_by_role("button", name=re.compile("uploading, 23 %")).click()
    expect(page.locator("#job-list li")).to_have_count(0)
    until(page, lambda: not list(address.service.uploads.folder.iterdir()))
    assert page.request.get(f"{address}/api/v1/jobs").json() == []


@pytest.mark.slow
def test_two_windows_do_not_overwrite_each_other(browser, address, tmp_path):
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    cells = count(page)
    other = browser.new_page()
    other.goto(address)
    other.locator("#panel:not([hidden]) #count").wait_for()
    for window in (page, other):
        window.keyboard.press("q")
    with corrected(page):
        page.keyboard.press("Delete")
    with corrected(other) as answer:
        other.keyboard.press("Delete")
    assert answer.value.status == 409
    expect(other.locator("#status")).to_contain_text("Somebody else")
    expect(other.locator("#count")).to_contain_text(f"{cells - 1} cells")
    with corrected(other) as answer:
        other.keyboard.press("Control+z")
    assert answer.value.json()["num_cells"] == cells


@pytest.mark.slow
@pytest.mark.parametrize("width", [1440, 900, 420])
def test_the_page_fits_and_works_with_the_keyboard_alone(width, browser, address, tmp_path):
    from playwright.sync_api import expect

    page = opened(
        browser, address, [noise(tmp_path / "a.tif", 1), noise(tmp_path / "b.tif", 2)], width
    )
    page.locator("#job-list .quiet", has_text="cells").nth(1).wait_for()
    for name in ("header", "#stage", "#panel"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1
    assert page.locator("#stage").bounding_box()["height"] > 300
    first = page.locator("#title").inner_text()
    page.keyboard.press("d" if first == "b" else "a")
    expect(page.locator("#title")).not_to_have_text(first)
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_contain_text("next, previous doubtful cell")
    page.keyboard.press("?")
    page.keyboard.press("z")
    expect(page.locator("#style")).to_have_value("fill")
    page.locator("summary", has_text="Table").press("Enter")
    page.locator("#table th button", has_text="score").press("Enter")
    expect(page.locator("#table th[aria-sort=ascending]")).to_contain_text("score")
    scores = [float(text) for text in page.locator("#table td:nth-child(2)").all_inner_texts()]
    assert scores == sorted(scores)
    assert page.faults == []


@pytest.mark.slow
def test_cells_without_a_score_are_not_doubtful(browser, address, tmp_path):
    from playwright.sync_api import expect

    def without_scores(route):
        answer = route.fetch()
        found = answer.json()
        found["columns"]["score"] = [None, 0.25, *(1.0 for _ in found["columns"]["score"][2:])]
        route.fulfill(response=answer, json=found)

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    job = page.request.get(f"{address}/api/v1/jobs").json()[0]
    page.route("**/cells*", without_scores)
    page.reload()
    expect(page.locator("#count")).to_contain_text("1 with a score below 0.5")
    page.keyboard.press("q")
    scored = job["summary"]["num_cells"] - 1
    expect(page.locator("#status")).to_have_text(f"Cell 2, score 0.25: 1 of {scored} by doubt")
    assert page.faults == []


@pytest.mark.slow
def test_a_filter_and_a_plot_select_cells(browser, address, tmp_path):
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    job = page.request.get(f"{address}/api/v1/jobs").json()[0]["id"]
    columns = page.request.get(f"{address}/api/v1/jobs/{job}/cells").json()["columns"]
    page.locator("summary", has_text="Table").click()
    middle = sorted(columns["area"])[len(columns["area"]) // 2]
    larger = sum(area > middle for area in columns["area"])
    assert 1 < larger < len(columns["area"])
    page.locator("#filter").fill(f"area > {middle}, score >= 0")
    expect(page.locator("#filter-note")).to_have_text(f"{larger} of {len(columns['area'])} cells")
    assert page.locator("#table tbody tr").count() == larger
    page.locator("#filter-select").click()
    expect(page.locator("#selection")).to_have_text(f"{larger} cells are selected")
    page.locator("#filter").fill("size > 3")
    expect(page.locator("#filter-note")).to_have_text("There is no column size")
    page.locator("#filter").fill("")

    page.locator("summary", has_text="Plot").click()
    page.locator("#plot").scroll_into_view_if_needed()
    page.keyboard.press("Escape")
    for kind, across in (("", "area"), ("score", "area")):
        page.locator("#plot-across").select_option(across)
        page.locator("#plot-up").select_option(kind)
        box = page.locator("#plot").bounding_box()
        left, right = box["x"] + 46, box["x"] + box["width"] - 10  # the margins of the plot
        low, high = min(columns[across]), max(columns[across])
        edge = left + (middle + 0.5 - low) / (high - low) * (right - left)
        page.mouse.move(right + 5, box["y"] + 2)
        page.mouse.down()
        page.mouse.move(edge + 2.1, box["y"] + box["height"] - 2)
        page.mouse.up()
        chosen = page.locator("#selection")
        expect(chosen).to_have_text(f"{larger} cells are selected")
        page.keyboard.press("Escape")
    assert page.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser, address, tmp_path, scheme):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(color_scheme=scheme)
    page = opened(context, address, [noise(tmp_path / "field.tif", 1)])
    page.keyboard.press("q")
    page.keyboard.press("b")
    page.keyboard.press("?")
    for part in ("Plot", "Table", "Improve"):
        page.locator("summary", has_text=part).click()
    page.locator(
        "#learn-note", has_text="Correct all cells of 2 images, then press Learn"
    ).wait_for()
    faults = [
        f"{fault['id']}: {[node['html'] for node in fault['nodes']]}"
        for fault in Axe().run(page).response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert faults == []


@pytest.mark.slow
def test_the_page_offers_no_format_that_cannot_be_written(browser, address, tmp_path, monkeypatch):
    from playwright.sync_api import expect

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    button = page.get_by_role("button", name="Table (Parquet)")
    expect(button).to_be_disabled()
    assert "pip install '.[tables]'" in button.get_attribute("title")
    expect(page.get_by_role("button", name="Table (CSV)")).to_be_enabled()


@pytest.mark.slow
def test_a_correction_waits_for_the_service_and_outlives_the_page(browser, address, tmp_path):
    from playwright.sync_api import expect

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    cells = count(page)
    page.route("**/corrections?*", lambda route: route.abort())
    page.reload()  # with the route from its beginning: once a request has passed a new one
    expect(page.locator("#count")).to_contain_text(f"{cells} cells")
    page.keyboard.press("q")
    page.keyboard.press("Delete")
    expect(page.locator("#status")).to_contain_text("Your correction waits")
    expect(page.locator("#count")).to_contain_text(f"{cells} cells")
    with corrected(page):  # the page asks again every two seconds, and may at once
        page.unroute("**/corrections?*")
        expect(page.locator("#count")).to_contain_text(f"{cells - 1} cells")
    page.reload()
    expect(page.locator("#count")).to_contain_text(f"{cells - 1} cells")
    with corrected(page):
        page.locator("#undo").click()
    expect(page.locator("#count")).to_contain_text(f"{cells} cells")
