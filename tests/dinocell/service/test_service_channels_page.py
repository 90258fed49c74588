"""The channels of a file on the page, in headless Chromium: what is drawn, pixel by pixel."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from page_hands import Pointer, hover
from service_doubles import add_finished
from test_service_page import address, browser, opened  # noqa: F401  fixtures

from dinocell.io import read_image, write_image
from dinocell.network.model import with_config

pytestmark = pytest.mark.slow
SHAPE = (40, 48)
DNA, ER, BACK = (10, 10), (25, 25), (2, 40)
BLACK, BLUE, GREEN, WHITE = (0, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255)
NOISE = np.random.default_rng(0).integers(0, 50, (8, 48)).astype(np.uint16)
_COLOUR = """([x, y, wanted, tolerance]) => {
  const canvas = document.getElementById("canvas"), box = canvas.getBoundingClientRect();
  const pixel = canvas.getContext("2d").getImageData(Math.floor(x - box.x), Math.floor(y - box.y), 1, 1).data;
  return wanted.every((value, k) => Math.abs(value - pixel[k]) <= tolerance);
}"""


def two_channels(path, brightest: int = 4000, names=("DNA", "ER", "Bright field")):
    """A square of 1000 in DNA and one of 2000 in ER, on 100 and noise; ER has one brighter pixel."""
    pixels = np.full((*SHAPE, 3), 100, np.uint16)
    pixels[32:] += NOISE[..., None]
    pixels[5:15, 5:15, 0], pixels[20:30, 20:30, 1], pixels[38, 1, 1] = 1000, 2000, brightest
    write_image(path, pixels, channel_names=list(names))
    return path


def without_labels(browser, address, images, channels="DNA"):  # noqa: F811
    """The page with images of several channels, of which no labels are drawn."""
    page = browser.new_page()
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(address)
    page.locator("[name=channels]").fill(channels)
    page.set_input_files("#files", [str(path) for path in images])
    page.locator("#panel:not([hidden]) #count").wait_for()
    hide_labels(page)
    return page


def hide_labels(page) -> None:
    page.locator("#style").select_option("none")
    let_go(page)


def all_segmented(page, number: int) -> None:
    """Waits for the cells of all images, and until the page writes no more about them by itself.

    Its message that cells are found comes some time after the list shows them, over any other one;
    after a reload it follows no image that is done.
    """
    page.locator("#job-list .quiet", has_text="cells").nth(number - 1).wait_for()
    page.reload()
    page.locator("#panel:not([hidden]) #count").wait_for()


def let_go(page) -> None:
    """Leave a field, in which keys would be typed."""
    page.evaluate("document.activeElement.blur()")


def sees(page, colour, place, shape=SHAPE, tolerance: int = 1) -> None:
    """Waits until a pixel of the image has a colour on the canvas, which shows the whole image."""
    x, y = Pointer(page, shape).at(*place)
    page.wait_for_function(_COLOUR, arg=[x, y, list(colour), tolerance], timeout=30_000)


def test_channels_have_colours_windows_and_keys(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    page = without_labels(browser, address, [two_channels(tmp_path / "a.tif")])
    expect(page.locator("[name=channels]")).to_have_value("")  # the next image may be gray
    for place, colour in ((DNA, BLUE), (ER, GREEN), (BACK, BLACK)):
        sees(page, colour, place)
    page.mouse.move(*Pointer(page, SHAPE).at(*ER))
    expect(page.locator("#pixel")).to_contain_text("row 25, column 25: DNA 100, ER 2000")

    page.keyboard.press("2")
    sees(page, BLACK, ER)
    sees(page, BLUE, DNA)
    expect(page.locator("#status")).to_have_text("ER is hidden")
    expect(page.get_by_label("Show ER")).not_to_be_checked()
    page.get_by_label("Show ER").check()
    sees(page, GREEN, ER)
    page.get_by_label("Colour of ER").fill("#ff8000")
    sees(page, (255, 128, 0), ER)

    page.get_by_label("Contrast of ER").check()
    expect(page.get_by_label("White of ER", exact=True)).to_have_value("2000")
    page.get_by_label("White of ER, exact").fill("3900")
    page.keyboard.press("Enter")
    sees(page, (128, 64, 0), ER)
    sees(page, BLUE, DNA)
    page.get_by_label("Black of ER", exact=True).fill("1000")
    sees(page, (88, 44, 0), ER)
    page.keyboard.press("w")
    sees(page, (255, 128, 0), ER)
    page.locator("#percentiles").select_option("0 100")
    sees(page, (124, 62, 0), ER)
    sees(page, BLUE, DNA)

    let_go(page)
    page.keyboard.press("g")
    expect(page.locator("#contrast")).to_have_text("Contrast of the gray picture")
    sees(page, WHITE, DNA)
    sees(page, BLACK, ER)
    page.get_by_label("gray, as the network saw it").uncheck()
    sees(page, BLUE, DNA)
    page.get_by_label("Contrast of all channels").check()
    page.locator("#low-value").fill("1500")
    let_go(page)
    sees(page, BLACK, DNA)
    page.keyboard.press("Shift+W")
    sees(page, BLUE, DNA)
    page.keyboard.press("3")  # constant, and gray
    sees(page, (0, 0, 255), DNA)


def test_a_stack_is_segmented_at_the_planes_that_are_written(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    stack = np.full((2, 3, *SHAPE), 100, np.uint16)
    stack[..., 32:, :] += NOISE
    for time in range(2):
        for z in range(3):
            stack[time, z, 30, 10 + 10 * time + z] = 5000
    tifffile.imwrite(tmp_path / "stack.tif", stack, imagej=True, metadata={"axes": "TZYX"})
    page = browser.new_page()
    page.goto(address)
    page.set_input_files("#files", str(tmp_path / "stack.tif"))
    expect(page.locator("#job-list .failed")).to_contain_text("time")
    page.get_by_text("Planes of a stack").click()
    page.locator("[name=z]").fill("2")
    page.locator("[name=time]").fill(" 1")
    page.set_input_files("#files", str(tmp_path / "stack.tif"))
    page.locator("#panel:not([hidden]) #count").wait_for()
    expect(page.locator("[name=z]")).to_have_value("")
    page.mouse.move(*Pointer(page, SHAPE).at(30, 22))
    expect(page.locator("#pixel")).to_contain_text("row 30, column 22: 5000")

    page.locator("[name=z]").fill("first")
    page.set_input_files("#files", str(tmp_path / "stack.tif"))
    expect(page.locator("#status")).to_contain_text("z")
    expect(page.locator("[name=z]")).to_have_value("first")  # to be corrected


def test_an_image_like_labels_is_taken_with_the_sizes_that_are_written(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    labels = np.kron([[0, 1], [2, 0]], np.ones((32, 32))).astype(np.uint8)
    write_image(tmp_path / "a.png", labels)
    worker = address.service.worker.worker
    worker.model = with_config(worker.model, diameter_px=15.0)
    page = browser.new_page()
    page.goto(address)
    page.set_input_files("#files", str(tmp_path / "a.png"))
    expect(page.locator("#job-list .failed")).to_contain_text("allow_mask")
    page.get_by_text("Sizes, images like labels").click()
    page.get_by_label("take an image that looks like labels").check()
    page.get_by_label("cell in px").fill("many")
    page.set_input_files("#files", str(tmp_path / "a.png"))
    expect(page.locator("#job-list .failed")).to_have_count(2)
    expect(page.locator("#status")).to_contain_text("below Choose images")
    expect(page.get_by_label("cell in px")).to_have_value("many")  # to be corrected
    page.get_by_label("cell in px").fill("30")
    page.get_by_label("pixel in µm").fill("0.5")
    page.set_input_files("#files", str(tmp_path / "a.png"))
    page.locator("#panel:not([hidden]) #count").wait_for()
    expect(page.locator("#segmented-as")).to_have_text(
        "cells of 30 px · pixels of 0.5 µm · even if it looks like labels"
    )
    expect(page.get_by_label("cell in px")).to_have_value("")
    expect(page.get_by_label("take an image that looks like labels")).not_to_be_checked()


def test_channels_of_an_image_that_was_left_are_not_fetched(browser, address, tmp_path):  # noqa: F811
    images = [two_channels(tmp_path / f"{name}.tif") for name in "ab"]
    page = without_labels(browser, address, images)
    all_segmented(page, 2)
    shown = page.locator("#title").inner_text()
    other = {"a": "b", "b": "a"}[shown]
    left = page.locator("#job-list button", has_text=other).get_attribute("data-id")
    asked, held, failed = [], [], []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.on("request", lambda request: asked.append(request.url))
    page.route(f"**/{left}/image?channel=0", lambda route: held.append(route))  # no answer comes
    page.locator("#job-list button", has_text=other).click()
    while not held:
        page.wait_for_timeout(20)
    page.locator("#job-list button", has_text=shown).click()
    while not failed:
        page.wait_for_timeout(20)
    page.locator("#panel #title", has_text=shown).wait_for()
    page.locator("#status:empty").wait_for(state="attached")  # "Loading" since the click
    assert not [url for url in asked if url.endswith(f"{left}/image?channel=1")]


def test_an_image_that_stays_because_another_fails_can_show_more_channels(
    browser,  # noqa: F811
    address,  # noqa: F811
    tmp_path,
):
    images = [two_channels(tmp_path / f"{name}.tif") for name in "ab"]
    page = without_labels(browser, address, images)
    all_segmented(page, 2)
    other = {"a": "b", "b": "a"}[page.locator("#title").inner_text()]
    left = page.locator("#job-list button", has_text=other).get_attribute("data-id")
    page.route(f"**/{left}/labels", lambda route: route.fulfill(status=410, body="gone"))
    page.locator("#job-list button", has_text=other).click()
    page.locator("#status", has_text="Gone").wait_for()
    page.get_by_label("Show Bright field").check()
    page.locator("#status", has_text="Bright field is shown").wait_for()


def test_choices_stay_from_image_to_image(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    images = [two_channels(tmp_path / f"{name}.tif") for name in "ab"]
    page = without_labels(browser, address, images)
    page.locator("#job-list .quiet", has_text="cells").nth(1).wait_for()
    title = page.locator("#title").inner_text()
    page.keyboard.press("1")
    page.get_by_label("Colour of ER").fill("#ff00ff")
    page.get_by_label("Contrast of ER").check()
    page.locator("#high-value").fill("3900")
    let_go(page)
    for key in ("d" if title == "b" else "a", ""):
        if key:
            page.keyboard.press(key)
            expect(page.locator("#title")).not_to_have_text(title)
        else:
            page.reload()
            page.locator("#panel:not([hidden]) #count").wait_for()
        expect(page.get_by_label("Show DNA")).not_to_be_checked()
        expect(page.get_by_label("Contrast of ER")).to_be_checked()
        hide_labels(page)
        sees(page, (128, 0, 128), ER)
        sees(page, BLACK, DNA)


def test_choices_are_kept_whatever_a_channel_is_called(browser, address, tmp_path):  # noqa: F811
    path = two_channels(tmp_path / "a.tif", names=("__proto__", "constructor", "ER"))
    page = without_labels(browser, address, [path], "0")
    for layer in (1, 2):
        page.locator(f"#channel-list > div:nth-of-type({layer}) input[type=color]").fill("#00ff00")
    page.locator("#channel-list > div:nth-of-type(2) input[type=color]").fill("#ff8000")
    page.reload()
    page.locator("#panel:not([hidden]) #count").wait_for()
    hide_labels(page)
    sees(page, GREEN, DNA)
    sees(page, (255, 128, 0), ER)


def test_a_real_hyperstack_has_the_colours_of_its_file(browser, address, data_dir):  # noqa: F811
    path = data_dir / "formats" / "imagej_hyperstack_2channel.tif"
    pixels = read_image(path).pixels.astype(float)
    page = without_labels(browser, address, [path], "0")
    low, high = np.percentile(pixels, [0.5, 99.8], axis=(0, 1), method="lower")
    levels = 255 * np.clip((pixels - low) / (high - low), 0, 1)
    rng = np.random.default_rng(0)
    bright = np.argwhere(levels.max(2) > 100)
    for row, column in rng.choice(bright, 12):
        green, blue = levels[row, column]
        sees(page, (0, green, blue), (row, column), pixels.shape[:2], tolerance=3)


def test_a_colour_picture_is_shown_as_it_is(browser, address, data_dir, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    tissue = read_image(data_dir / "formats" / "HE_example.ome.tif").pixels[:256, :256]
    write_image(tmp_path / "tissue.png", tissue)
    page = without_labels(browser, address, [tmp_path / "tissue.png"], "")
    for row, column in np.random.default_rng(0).integers(0, 256, (12, 2)):
        sees(page, tissue[row, column].tolist(), (row, column), (256, 256))
    expect(page.get_by_label("Contrast of all channels")).to_be_checked()
    page.keyboard.press("1")
    row, column = 100, 100
    sees(page, (0, *tissue[row, column, 1:].tolist()), (row, column), (256, 256))
    page.locator("#percentiles").select_option("2 98")
    low, high = np.percentile(tissue, [2, 98], axis=(0, 1), method="lower")
    level = 255 * np.clip((tissue[row, column] - low.min()) / (high.max() - low.min()), 0, 1)
    sees(page, (0, level[1], level[2]), (row, column), (256, 256))


def add_large(address, second_shown):  # noqa: F811
    """A finished job of a large image with two channels: what is in a cell, and what is in none."""
    side = 6000
    labels = add_finished(address.service, side=side, spacing=400)
    (job,) = address.service.queue.newest(1)
    folder = address.service.queue.job_folder(job.id)
    for channel, part in enumerate((labels > 0, labels == 0)):
        np.save(folder / f"channel_{channel}.npy", np.where(part, 1000, 0).astype(np.uint16))
    about = json.loads((folder / "about.json").read_text())
    about["channels"] = [
        {"name": "cells", "colour": "#ff0000", "shown": True},
        {"name": "gaps", "colour": "#00ff00", "shown": second_shown},
    ]
    (folder / "about.json").write_text(json.dumps(about))
    return labels


def test_channels_of_a_large_image_come_in_one_request_for_a_tile(browser, address):  # noqa: F811
    labels = add_large(address, second_shown=True)
    page = browser.new_page()
    page.set_viewport_size({"width": 1440, "height": 900})
    asked = []
    page.on("request", lambda request: "/image/tile" in request.url and asked.append(request.url))
    page.goto(address)
    page.locator("#panel:not([hidden])").wait_for()
    hide_labels(page)
    sees(page, (255, 0, 0), (5700, 5700), labels.shape)
    sees(page, GREEN, (5900, 5900), labels.shape)
    assert asked
    assert all(url.endswith("&channel=0&channel=1") for url in asked)
    assert len(asked) == len(set(asked))


def test_channels_of_a_large_image_come_in_tiles(browser, address):  # noqa: F811
    from playwright.sync_api import expect

    labels = add_large(address, second_shown=False)
    page = browser.new_page()
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(address)
    page.locator("#panel:not([hidden])").wait_for()
    hide_labels(page)
    cell, gap = (5700, 5700), (5900, 5900)
    sees(page, (255, 0, 0), cell, labels.shape)
    sees(page, BLACK, gap, labels.shape)
    page.keyboard.press("2")  # read now
    sees(page, GREEN, gap, labels.shape)
    expect(page.get_by_label("Contrast of gaps")).to_be_visible()
    page.keyboard.press("1")
    sees(page, BLACK, cell, labels.shape)
    at = Pointer(page, labels.shape).at(*gap)
    page.mouse.move(*at)
    for _ in range(12):
        page.mouse.wheel(0, -400)
    page.wait_for_function(_COLOUR, arg=[*at, list(GREEN), 1], timeout=30_000)
    hover(page, at, "gaps")  # the tile of the full scale has come
    expect(page.locator("#pixel")).to_contain_text("gaps 1000")
    expect(page.locator("#pixel")).not_to_contain_text("cells 0")


def test_the_page_says_why_channels_are_not_shown(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    whole = two_channels(tmp_path / "a.tif").read_bytes()
    page = browser.new_page()
    image = {"name": "a.tif", "mimeType": "image/tiff", "buffer": whole}
    form = {"image": image, "channels": "DNA"}
    assert page.request.post(f"{address}/api/v1/segment", multipart=form).ok
    (job,) = address.service.queue.newest(1)
    file = address.service.queue.job_folder(job.id) / "image.tif"
    file.write_bytes(whole[:100])
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(address)
    page.locator("#panel:not([hidden]) #count").wait_for()
    hide_labels(page)
    expect(page.locator("#channels-note")).to_contain_text("The channels cannot be shown.")
    expect(page.locator("#channels-note")).to_contain_text("must be a whole image file")
    sees(page, WHITE, DNA)
    page.keyboard.press("g")
    expect(page.locator("#status")).to_contain_text("must be a whole image file", timeout=30_000)
    sees(page, BLUE, DNA)  # which was segmented: the service keeps its pixels
    expect(page.locator("#status")).to_contain_text("must be a whole image file")
    file.write_bytes(whole)
    page.keyboard.press("g")
    sees(page, WHITE, DNA)
    page.keyboard.press("g")
    sees(page, GREEN, ER)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_in_channels(browser, address, tmp_path, scheme):  # noqa: F811
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(color_scheme=scheme)
    page = without_labels(context, address, [two_channels(tmp_path / "a.tif")])
    for key in ("", "g"):
        if key:
            page.keyboard.press(key)
            page.get_by_label("gray, as the network saw it").wait_for()
        faults = [
            f"{fault['id']}: {[node['html'] for node in fault['nodes']]}"
            for fault in Axe().run(page).response["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
        assert faults == []


@pytest.mark.parametrize("width", [900, 420])
def test_channels_fit_and_work_with_the_keyboard_alone(browser, address, tmp_path, width):  # noqa: F811
    from playwright.sync_api import expect

    page = without_labels(browser, address, [two_channels(tmp_path / "a.tif")])
    page.set_viewport_size({"width": width, "height": 900})
    for name in ("#channels", "#low-value", "#percentiles"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1
    page.get_by_label("Show DNA").focus()
    page.keyboard.press("Space")
    expect(page.get_by_label("Show DNA")).not_to_be_checked()
    expect(page.get_by_label("Show DNA")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("Contrast of ER")).to_be_checked()
    expect(page.locator("#contrast")).to_have_text("Contrast of ER")


def test_an_image_of_one_channel_has_no_choice(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    pixels = np.full(SHAPE, 100, np.uint16)
    pixels[5:15, 5:15], pixels[32:] = 1000, 100 + NOISE
    write_image(tmp_path / "a.tif", pixels)
    page = opened(browser, address, [tmp_path / "a.tif"])
    hide_labels(page)
    expect(page.locator("#channels")).to_be_hidden()
    expect(page.locator("#contrast")).to_have_text("")
    sees(page, WHITE, DNA)
    page.keyboard.press("g")
    page.keyboard.press("1")
    page.locator("#high-value").fill("1900")
    page.keyboard.press("Enter")
    sees(page, (127, 127, 127), DNA)
    assert page.faults == []


def test_the_sum_of_many_channels_ends_at_white(browser, address, tmp_path):  # noqa: F811
    pixels = np.full((*SHAPE, 6), 100, np.uint16)
    pixels[32:] += NOISE[..., None]
    pixels[5:15, 5:15], pixels[20:30, 20:30], pixels[20:30, 5:15] = 1000, 200, 710
    names = [f"phase {letter}" for letter in "abcdef"]  # white, and hidden but for the first
    write_image(tmp_path / "a.tif", pixels, channel_names=names)
    page = without_labels(browser, address, [tmp_path / "a.tif"], "0")
    sees(page, (28, 28, 28), ER)
    for key in "23456":
        page.keyboard.press(key)
    sees(page, (170, 170, 170), ER, tolerance=3)
    sees(page, WHITE, (25, 10))  # six times 173, which ten bits do not hold
    sees(page, WHITE, DNA)
