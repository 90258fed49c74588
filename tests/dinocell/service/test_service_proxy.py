"""The page behind a proxy whose service is away, with slow or refused thresholds, and with odd tokens."""

from __future__ import annotations

import pytest
from page_hands import corrected, until
from service_doubles import noise
from test_service_page import address, browser, count, opened  # noqa: F401  fixtures

pytestmark = pytest.mark.slow


def test_what_a_proxy_answers_for_a_service_that_is_away_is_waited_for(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    def bad_gateway(route):
        route.fulfill(status=502, content_type="text/html", body="<h1>502 Bad Gateway</h1>")

    page = opened(browser, address, [noise(tmp_path / "field.tif", 1)])
    cells = count(page)
    page.route("**/corrections?*", bad_gateway)
    page.reload()  # with the route from its beginning: once a request has passed a new one
    expect(page.locator("#count")).to_contain_text(f"{cells} cells")
    page.keyboard.press("q")
    page.keyboard.press("Delete")
    expect(page.locator("#status")).to_contain_text("Your correction waits")
    with corrected(page):
        page.unroute("**/corrections?*")
        expect(page.locator("#count")).to_contain_text(f"{cells - 1} cells")

    page.route("**/events", bad_gateway)
    page.set_input_files("#files", str(noise(tmp_path / "late.tif", 2)))
    expect(page.locator("#status")).to_contain_text("late continues when it does")
    page.unroute("**/events")
    expect(page.locator("#status")).to_have_text("The cells of late are found")

    large = tmp_path / "large.tif"
    large.write_bytes((tmp_path / "field.tif").read_bytes() + bytes(17 * 2**20))
    page.route("**/uploads/*?offset=4*", bad_gateway)
    page.set_input_files("#files", str(large))
    expect(page.locator("#status")).to_contain_text("continues when the service answers")
    page.unroute("**/uploads/*?offset=4*")
    expect(page.locator("#job-list li").first).to_contain_text(f"{cells} cells")


def test_a_slider_shows_the_thresholds_of_the_labels(browser, address, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    held = []

    def hold_the_first(route):
        route.continue_() if held else held.append(route)

    page = opened(browser, address, [noise(tmp_path / f"{n}.tif", n) for n in (1, 2)])
    expect(page.locator("#job-list li").nth(1)).to_contain_text("cells")
    page.locator("#job-list .name").nth(1).click()
    expect(page.locator("#title")).to_have_text("1")
    expect(page.locator("#status")).to_have_text("")
    page.route("**/relabel?*", hold_the_first)
    page.locator("#area").fill("10")
    until(page, lambda: held)
    page.locator("#job-list .name").first.click()  # while the answer is on its way
    expect(page.locator("#title")).to_have_text("2")
    expect(page.locator("#status")).to_have_text("")
    page.locator("#area").fill("12")
    held[0].continue_()
    expect(page.locator("#undo")).to_be_enabled()

    page.route("**/relabel?*", lambda route: route.abort())
    page.locator("#area").fill("90")
    expect(page.locator("#status")).to_contain_text("does not answer")
    expect(page.locator("#area-value")).to_have_text("12 px²")
    expect(page.locator("#area")).to_have_js_property("value", "12")


def test_a_token_that_no_header_can_hold_is_another_token(browser, address):  # noqa: F811
    from playwright.sync_api import expect

    page = browser.new_page()
    page.route("**/api/v1/**", lambda route: route.fulfill(status=401, json={"detail": ""}))
    page.goto(address)
    page.locator("#token").fill("“0123456789abcdef”")  # as a mail program writes quotes
    page.locator("#token").press("Enter")
    expect(page.locator("#status")).to_contain_text("another token than the one given")
