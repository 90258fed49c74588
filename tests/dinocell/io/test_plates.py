"""Places that file names, a regular expression or a CSV file give."""

import os
from pathlib import Path

import pytest

from dinocell.errors import UsageError
from dinocell.io.plates import place_notes, places_of, row_letters, unread_plate


@pytest.mark.parametrize(
    ("layout", "name", "place"),
    [
        (
            "operetta",
            "BR7/Images/r03c12f05p01-ch2sk1fk1fl1.tiff",
            {"plate": "BR7", "well": "C12", "site": 5, "channel": "2", "z": 1, "time": 1},
        ),
        (
            "operetta",
            "BR7/r27c02f01p03-ch10sk2fk1fl1.tiff",
            {"plate": "BR7", "well": "AA02", "site": 1, "channel": "10", "z": 3, "time": 2},
        ),
        (
            "imagexpress",
            "x/IXMtest_A02_s1_w1051DAA7C-7042-435F-99F0-1E847D9B42CB.tif",
            {"plate": "IXMtest", "well": "A02", "site": 1, "channel": "1"},
        ),
        (  # a thumbnail, which is never segmented unasked: it is a channel of its own
            "imagexpress",
            "IXMtest_A02_s1_w1_thumb051DAA7C-7042-435F-99F0-1E847D9B42CB.tif",
            {"plate": "IXMtest", "well": "A02", "site": 1, "channel": "1_thumb"},
        ),
        (
            "imagexpress",
            "TimePoint_2/ZStep_4/P_7_h11_w3.TIF".replace("h11", "H11"),
            {"plate": "P_7", "well": "H11", "channel": "3", "z": 4, "time": 2},
        ),
        (
            "cellvoyager",
            "AssayPlate_1_B03_T0001F002L01A01Z04C01.png",
            {"plate": "AssayPlate_1", "well": "B03", "site": 2, "channel": "1", "z": 4, "time": 1},
        ),
        (
            "incucyte",
            "scan_7_B10_2_2020y03m01d_12h30m.tif",
            {"plate": "scan_7", "well": "B10", "site": 2, "time": "2020y03m01d_12h30m"},
        ),
        ("opera", "P1/002011003.tif", {"plate": "P1", "well": "B11", "site": 3}),
        (r"(?P<well>[A-H]\d)-(?P<site>\d)", "a3/C5-2.tif", {"well": "C05", "site": 2}),
        (
            r"r(?P<row>\w)c(?P<column>\d)_(?P<channel>\w+)\.",
            "rBc7_DNA.tif",
            {"well": "B07", "channel": "DNA"},
        ),
    ],
)
def test_names(layout, name, place):
    path = Path("/data") / name
    assert places_of([path], layout) == [place]
    if layout not in ("opera",) and "?P" not in layout:
        assert places_of([path]) == [place]
        assert places_of([path, Path("/data/other.tif")]) == [{}, {}]
    assert places_of([path], "off") == [{}]
    assert places_of([Path("/data/other.tif")], layout) == [{}]


def test_names_of_other_images_are_no_plate():
    names = ("000000001.tif", "cell_01.tif", "A01.tif", "img_s1.tif", "x_labels.tif", "t000.tif")
    for name in names:
        assert places_of([Path("/data") / name]) == [{}]


def test_rows():
    assert [row_letters(row) for row in (1, 26, 27, 32)] == ["A", "Z", "AA", "AF"]


def test_channels_have_the_names_of_the_index(tmp_path):
    images = tmp_path / "P" / "Images"
    images.mkdir(parents=True)
    (images / "Index.idx.xml").write_text(
        "<Images><Image><ChannelID>1</ChannelID><State>Ok</State><ChannelName>HOECHST 33342</ChannelName></Image>"
        "<Image><ChannelID>2</ChannelID><ChannelName>Alexa 488</ChannelName></Image></Images>"
    )
    paths = [images / f"r01c01f01p01-ch{number}sk1fk1fl1.tiff" for number in (1, 2, 3)]
    assert [place["channel"] for place in places_of(paths)] == ["HOECHST 33342", "Alexa 488", "3"]


@pytest.mark.skipif("DINOCELL_DATA" not in os.environ, reason="the data folder is not here")
def test_a_real_index():
    folder = Path(os.environ["DINOCELL_DATA"], "formats", "operetta_plate", "Images")
    (place,) = places_of(sorted(folder.glob("*.tiff")))
    assert place == {
        "plate": "operetta_plate",
        "well": "C03",
        "site": 1,
        "channel": "Fluorescein (FITC)",
        "z": 1,
        "time": 1,
    }


def test_csv(tmp_path):
    table = tmp_path / "layout.csv"
    table.write_text("image,plate,well,site\nb/1.tif,P,a1,4\na/1.tif,P,A2,\n2.tif,,B12,1\n")
    paths = [tmp_path / name for name in ("a/1.tif", "b/1.tif", "2.tif", "3.tif")]
    assert places_of(paths, str(table)) == [
        {"plate": "P", "well": "A02"},
        {"plate": "P", "well": "A01", "site": 4},
        {"well": "B12", "site": 1},
        {},
    ]
    table.write_text("image,well\n1.tif,A1\n1.tif,A2\n")
    with pytest.raises(UsageError, match="must list each image once, got 2 lines"):
        places_of(paths, str(table))
    table.write_text("file,well\n1.tif,A1\n")
    with pytest.raises(UsageError, match="with the column image"):
        places_of(paths, str(table))
    with pytest.raises(UsageError, match="that can be read"):
        places_of(paths, str(tmp_path / "no.csv"))


@pytest.mark.parametrize("text", ["operettas", "(?P<wells>A)", "(?P<well>["])
def test_wrong_layouts(text):
    with pytest.raises(UsageError, match="`plate` must be"):
        places_of([Path("a.tif")], text)


def test_a_plate_among_other_files_is_noted():
    plate = [Path(f"r01c01f0{f}p01-ch{c}sk1fk1fl1.tiff") for f in (1, 2) for c in (1, 2)]
    note = unread_plate([*plate, Path("overview.tif")])
    assert note == (
        "4 of 5 names are those of operetta, with a file for each of the channels 1, 2, and each file was "
        "segmented alone, because others such as overview.tif do not fit: set `plate` to operetta and name "
        "`channels`"
    )
    assert unread_plate(3 * [*plate, Path("overview.tif")]) == note  # of three planes each
    assert unread_plate([plate[0], plate[2], Path("overview.tif")]) == ""  # one channel
    assert unread_plate(plate) == ""  # which `auto` reads
    assert unread_plate([Path("a.tif"), Path("b.tif")]) == ""


def test_notes_on_doubles_holes_and_strangers():
    places = [{"well": "A01", "site": 1}, {"well": "A01", "site": 2}, {"well": "B02", "site": 1}]
    assert place_notes(places, ["a", "b", "c"]) == [
        "The plate has holes in 1 of 2 wells: B02 without site 2"
    ]
    assert place_notes([*places[:2], places[0], {}], ["a", "b", "c", "d"]) == [
        "Two images have the same place (well A01, site 1), a and c: both count",
        "No well is known for 1 of 4 images, such as d",
    ]
    assert place_notes([{}, {}], ["a", "b"]) == []
