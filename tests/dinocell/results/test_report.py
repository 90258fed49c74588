"""The page: well-formed, self-contained, safe, complete, and sensible with no cell or many images."""

from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dinocell.errors import DINOCellError
from dinocell.labels import cell_borders
from dinocell.results.colors import color_labels
from dinocell.results.measure import measure_labels, summarize
from dinocell.results.pictures import CONTOUR_COLOR
from dinocell.results.report import ReportEntry, make_entry, write_report

VOID = {"meta", "img", "input", "br", "hr", "link"}


class Page(HTMLParser):
    """Parses a page, checks that tags nest, and keeps what tests ask for."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert self.stack == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> without a start"
        assert self.stack.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if data.strip() and self.stack:
            self.texts.append((self.stack[-1], data.strip()))

    def all(self, name, **attrs):
        """Attributes of every tag of this name that has these attributes."""
        wanted = {key.rstrip("_"): value for key, value in attrs.items()}
        return [a for tag, a in self.tags if tag == name and wanted.items() <= a.items()]

    def text(self, *tags):
        """Text inside these tags (all when none is named), one line each."""
        return "\n".join(text for tag, text in self.texts if not tags or tag in tags)

    def visible_text(self):
        return "\n".join(text for tag, text in self.texts if tag not in ("style", "script"))


def cells(num_cells=6, shape=(40, 60), seed=0):
    """An image with `num_cells` squares, its labels and a map."""
    labels = np.zeros(shape, np.uint32)
    for index in range(num_cells):
        row, col = divmod(index, 6)
        labels[2 + 10 * row : 8 + 10 * row + index % 2, 2 + 10 * col : 9 + 10 * col] = index + 1
    rng = np.random.default_rng(seed)
    image = (100 + 400 * (labels > 0) + rng.integers(0, 50, shape)).astype(np.uint16)
    return image, labels, (labels > 0).astype(np.float32)


ARRAYS = ("image", "labels", "distance_map")


def entry(name="a.tif", num_cells=6, pixel_size_um=None, **changes):
    image, labels, distance_map = cells(num_cells)
    table = measure_labels(labels, image, pixel_size_um=pixel_size_um)
    given = {"image": image, "labels": labels, "distance_map": distance_map, "columns": table.data}
    given |= {"summary": summarize(labels, table), "files": {}} | changes
    return make_entry(name, tuple(given.pop(kind) for kind in ARRAYS), **given)


def entry_of_table(columns, **files):
    return make_entry("a", (None, None, None), columns, {}, files)


def page(tmp_path, entries, **options):
    write_report(tmp_path / "report.html", entries, **options)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def pictures(parsed):
    """Embedded pictures by (class, alt)."""
    found = {}
    for attrs in parsed.all("img"):
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", attrs["src"]).groups()
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert picture.format == kind.upper()
        found[attrs.get("class") or "", attrs["alt"]] = picture
    return found


def test_one_image_end_to_end(tmp_path):
    parsed = page(tmp_path, [entry()], title="A run", summary={"model": "tiny"}, notes=["Note."])
    assert parsed.text("title").splitlines()[0] == "A run"
    assert parsed.text("h1") == "A run"
    text = parsed.visible_text()
    for expected in ("6 cells", "tiny", "Note.", "confluency 11.38 %", "All 6 cells."):
        assert expected in text
    found = pictures(parsed)
    assert {kind for kind, _ in found} == {"", "layer contours", "layer colors"}
    assert len(found) == 4
    assert [name for name, _ in parsed.tags].count("svg") == 1
    header = [t for tag, t in parsed.texts if tag == "th"]
    assert "area" in header
    assert "eccentricity" in header


def test_layers_show_the_labels(tmp_path):
    _, labels, _ = cells()
    found = pictures(page(tmp_path, [entry()]))
    layers = {kind: np.asarray(p.convert("RGBA")) for (kind, _), p in found.items() if kind}
    border = cell_borders(labels)
    outlines = layers["layer contours"]
    assert np.array_equal(outlines[..., 3] == 255, border)
    assert (outlines[border][:, :3] == CONTOUR_COLOR).all()
    colors = layers["layer colors"]
    inside = labels > 0
    assert np.array_equal(colors[..., 3] == 255, inside)
    assert np.array_equal(colors[inside][:, :3], color_labels(labels)[inside])
    photo = np.asarray(found["", "Image a.tif"].convert("L")).astype(int)
    assert photo[inside].mean() > photo[~inside].mean() + 150


def test_page_is_self_contained(tmp_path):
    files = {
        "csv": tmp_path / "a_cells.csv",
        "overlay": tmp_path / "sub" / "a overlay#1.png",
        "coco": tmp_path / "a_coco.json",
        "tif": tmp_path / "a_labels.tif",
    }
    parsed = page(tmp_path, [entry(files=files)])
    assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]", parsed.source, re.IGNORECASE)
    assert "url(" not in parsed.source
    assert "@import" not in parsed.source
    links = []
    for name, attrs in parsed.tags:
        assert name not in ("link", "iframe", "object", "embed")
        assert name != "script" or "src" not in attrs
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            value = attrs.get(key)
            if value and key == "href":
                links.append(value)
            elif value:
                assert value.startswith("data:image/")
    files = ["sub/a%20overlay%231.png", "a_cells.csv", "a_labels.tif", "a_coco.json"]
    assert sorted(set(links) - set(files)) == ["#image-1"]
    assert set(files) <= set(links)
    assert parsed.text("a").splitlines()[-4:] == [
        "overlay in full size",
        "all measurements (CSV)",
        "labels (a_coco.json)",
        "labels (a_labels.tif)",
    ]


def test_names_are_escaped_everywhere(tmp_path):
    evil = "\"><script>alert('1')</script>&amp;<img src=x onerror=y>.tif"
    good = {"num_cells": 2, "<i>key": "<b>value"}
    items = [
        entry(
            evil, files={"csv": tmp_path / f"{evil.replace('/', '_')}.csv"}, warnings=["<u>careful"]
        ),
        entry("b", summary=good, columns={"<q>": np.array(["<p>x"])}),
        ReportEntry(evil, error="<b>broken</b>"),
    ]
    parsed = page(tmp_path, items, title=evil, notes=[evil], summary={evil: evil})
    assert len(parsed.all("script")) == 1
    for tag in ("b", "i", "u", "q"):
        expected = {"b": 5}.get(tag, 0)  # the five numbers at the top
        assert len(parsed.all(tag)) == expected
    assert all(set(attrs) & {"onerror", "onclick", "onload"} == set() for _, attrs in parsed.tags)
    text = parsed.visible_text()
    for expected in (
        evil,
        "<u>careful",
        "<i>key",
        "<b>value",
        "<q>",
        "<p>x",
        "<b>broken</b>",
    ):
        assert expected in text


def test_pictures_are_counted(tmp_path):
    items = [
        entry("full"),
        entry("no map", distance_map=None),
        entry("image alone", labels=None, distance_map=None, columns={}, summary={}),
        entry("labels alone", image=None, distance_map=None),
        ReportEntry("failed", error="It broke."),
    ]
    assert len(page(tmp_path, items).all("img")) == 4 + 3 + 1 + 2 + 0


def test_no_cells(tmp_path):
    parsed = page(tmp_path, [entry(num_cells=0), entry("b.tif", num_cells=0)])
    text = parsed.visible_text()
    assert "0 cells" in text
    assert "No cell was found." in text
    assert "No cell, so no histogram of areas." in text
    assert parsed.all("svg") == []
    header = [t for tag, t in parsed.texts if tag == "th"]
    assert header.count("area") == 2, "an empty table has its columns"
    layers = [p for (kind, _), p in pictures(parsed).items() if kind]
    assert all(np.asarray(p.convert("RGBA"))[..., 3].max() == 0 for p in layers)


def test_no_images(tmp_path):
    parsed = page(tmp_path, [])
    assert "No image was given" in parsed.visible_text()
    assert parsed.all("article") == []


def test_failures_and_warnings_are_listed_and_linked(tmp_path):
    items = [
        entry("good"),
        ReportEntry("bad", error="The file is truncated."),
        entry("odd", warnings=("It is constant.", "It is small.")),
    ]
    parsed = page(tmp_path, items)
    listed = parsed.text("li")
    assert ": The file is truncated." in listed
    assert ": It is constant." in listed
    assert ": It is small." in listed
    anchors = {attrs["href"] for attrs in parsed.all("a") if attrs["href"].startswith("#")}
    assert anchors == {f"#{attrs['id']}" for attrs in parsed.all("article")}
    states = [t for tag, t in parsed.texts if tag == "td" and t in ("done", "failed", "warning")]
    assert states == ["done", "failed", "warning"]
    assert "Failed: The file is truncated." in parsed.visible_text()
    clean = page(tmp_path, [entry("good")])
    assert "Failures and warnings" not in clean.visible_text()


def test_accessible(tmp_path):
    parsed = page(tmp_path, [entry("a"), entry("b")])
    assert parsed.all("html")[0]["lang"] == "en"
    assert all(attrs.get("alt") for attrs in parsed.all("img"))
    assert all("scope" in attrs for attrs in parsed.all("th"))
    assert all(attrs.get("aria-label") for attrs in parsed.all("svg", role="img"))
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    inputs = [attrs["id"] for attrs in parsed.all("input")]
    assert inputs == [attrs["for"] for attrs in parsed.all("label")]
    assert "prefers-color-scheme: dark" in parsed.source
    assert "color-scheme: light dark" in parsed.source


def histogram_counts(parsed):
    """Cells per bar, from the bars' titles."""
    bars = [t for tag, t in parsed.texts if tag == "title" and " to " in t]
    return [int(re.search(r": ([\d,]+) cells?$", bar)[1].replace(",", "")) for bar in bars]


def test_histogram_holds_every_cell_once(tmp_path):
    rng = np.random.default_rng(3)
    areas = np.concatenate([rng.gamma(4.0, 100.0, 400), [1e6]])
    parsed = page(tmp_path, [entry_of_table({"label": np.arange(401), "area": areas})])
    assert sum(histogram_counts(parsed)) == 401
    caption = parsed.text("figcaption")
    assert f"median {np.median(areas):.4g} px²" in caption
    beyond = int(re.search(r"the last bar holds (\d+) larger", caption)[1])
    assert 1 <= beyond <= 4
    assert histogram_counts(parsed)[-1] >= beyond


@pytest.mark.parametrize("areas", [[5.0], [3.0, 3.0], [0.0], [1e-9, 2e-9]])
def test_histogram_of_few_or_equal_areas(tmp_path, areas):
    item = entry_of_table({"area": np.array(areas)})
    assert sum(histogram_counts(page(tmp_path, [item]))) == len(areas)


def test_areas_in_micrometres_where_all_images_have_them(tmp_path):
    both = page(tmp_path, [entry("a", pixel_size_um=0.5), entry("b", pixel_size_um=0.5)])
    assert both.text("figcaption").count("µm²") == 6
    mixed = page(tmp_path, [entry("a", pixel_size_um=0.5), entry("b")])
    captions = [t for tag, t in mixed.texts if tag == "figcaption" and "Histogram" in t]
    assert ["µm²" in text for text in captions] == [False, True, False]
    assert "12 cells in all images" in captions[0]


def test_long_tables_are_cut_with_a_note(tmp_path):
    table = {"label": np.arange(1, 121), "area": np.full(120, 7.25)}
    parsed = page(tmp_path, [entry_of_table(table, csv=tmp_path / "cells.csv")])
    assert parsed.text("td").splitlines().count("7.25") == 50
    assert "The first 50 of 120 cells; all are in" in parsed.text("caption")
    assert len(parsed.all("a", href="cells.csv")) == 2
    short = page(tmp_path, [entry_of_table(table)] * 300)
    assert short.text("td").splitlines().count("7.25") == 300 * 10
    assert "The first 10 of 120 cells; the rest is left out." in short.text("caption")


def test_numbers_read_well(tmp_path):
    table = {"v": np.array([np.nan, np.inf, 0.123456, 1234567.8, 3.0, -2.5e-7])}
    assert page(tmp_path, [entry_of_table(table)]).text("td").split("\n")[-6:] == [
        "–",
        "∞",
        "0.1235",
        "1,234,568",
        "3",
        "-2.5e-07",
    ]
    table = {"v": np.array([True, False])}
    assert page(tmp_path, [entry_of_table(table)]).text("td").endswith("yes\nno")


def test_a_page_of_many_images_stays_small(tmp_path):
    parsed = page(tmp_path, [entry(files={"csv": tmp_path / "a.csv"}, num_images=61)] * 61)
    assert len(parsed.all("article")) == 61
    collapsed = [attrs for attrs in parsed.all("details") if "open" in attrs]
    assert len(collapsed) == 12, "the first dozen is open, the overview closed"
    assert all(attrs["loading"] == "lazy" for attrs in parsed.all("img"))
    assert parsed.source.count("The first") == 0, "six rows fit even the small share"
    assert len(parsed.source) < 61 * 30_000


def test_pictures_shrink_with_the_number_of_images(tmp_path):
    labels = np.zeros((900, 1000), np.uint32)
    labels[100:400, 100:500] = 1
    widths = []
    for num_images in (1, 20, 21, 100, 101):
        arrays = (labels.astype(np.uint16), labels, labels / 2)
        item = make_entry("big", arrays, {}, {}, {}, num_images=num_images)
        sizes = {p.size for p in pictures(page(tmp_path, [item])).values()}
        assert len(sizes) == 1, "all layers have one size"
        widths.append(sizes.pop()[0])
    assert widths == [500, 500, 500, 500, 334]


def test_make_entry_of_a_large_image_is_small(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(1, 401, dtype=np.uint32).reshape(20, 20).repeat(80, 0).repeat(80, 1)
    image = rng.integers(0, 4096, labels.shape).astype(np.uint16)
    arrays = (image, labels, rng.random(labels.shape).astype(np.float32))
    table = {"label": np.arange(1, 401), "area": np.arange(400.0)}
    made = make_entry("large", arrays, table, {"num_cells": 400, "confluency_percent": 100.0}, {})
    assert len(str(made.pictures)) < 2_000_000 < arrays[2].nbytes
    assert [len(column) for column in made.columns.values()] == [50, 50]
    of_many = make_entry("large", arrays, table, {}, {}, num_images=300)
    assert (made.pictures["width"], of_many.pictures["width"]) == (534, 400)
    parsed = page(tmp_path, [made])
    assert "The first 50 of 400 cells" in parsed.text("caption")
    assert sum(histogram_counts(parsed)) == 400
    assert "400 cells" in parsed.visible_text()


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    wrong = entry(columns={"x": np.zeros(3), "y": np.zeros(2)})
    with pytest.raises(ValueError, match="shorter than argument"):
        write_report(path, [entry("good"), wrong])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]
    with pytest.raises(DINOCellError, match="is a folder"):
        write_report(tmp_path, [])
