"""Files, folders and patterns that stand for images."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dinocell.errors import ImageFileError, UsageError
from dinocell.io import find_images, read_image, read_labels, search_images


@pytest.fixture
def folder(tmp_path):
    for name in (
        "img10.tif",
        "img2.tif",
        "IMG1.PNG",
        "a_labels.tif",
        "a_overlay.png",
        "a_distance_map.tif",
        "a_cells.csv",
        ".hidden.png",
        "notes.txt",
        "sub/deep.jpg",
        ".git/x.png",
        "data.zarr/0.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_folder_in_natural_order_without_hidden_files_and_outputs(folder):
    assert names(find_images([folder]), folder) == [
        "data.zarr",
        "IMG1.PNG",
        "img2.tif",
        "img10.tif",
    ]


def test_recursive_goes_into_folders_but_not_into_zarr(folder):
    found = names(find_images([folder], recursive=True), folder)
    assert found == ["data.zarr", "IMG1.PNG", "img2.tif", "img10.tif", "sub/deep.jpg"]


def test_images_in_folders_inside_are_noted(folder):
    notes = [
        f"Images in folders inside '{folder}' were left out, such as those in 'sub': set `recursive` to "
        "segment them, too"
    ]
    assert search_images([folder]).notes == (*notes,)
    assert search_images([folder], recursive=True).notes == ()
    assert search_images([folder, folder / "sub"]).notes == ()
    assert search_images([folder / "*.tif"]).notes == ()
    (folder / "sub" / "deep.jpg").rename(folder / "sub" / "deep_masks.jpg")  # are labels
    assert search_images([folder]).notes == ()
    (folder / "sub" / "deep_masks.jpg").unlink()
    (folder / "sub" / "notes.txt").write_text("no image")
    (folder / "sub" / "far").mkdir()
    (folder / "sub" / "far" / "a.tif").write_bytes(b"x")
    out = folder / "out"  # of an earlier run
    out.mkdir()
    for name in ("a_labels.tif", "a_overlay.png", "a_cells.csv", "a_labels_v2.tif"):
        (out / name).write_bytes(b"x")
    assert search_images([folder]).notes == ()


def test_outputs_on_request(folder):
    found = names(find_images([folder], include_outputs=True), folder)
    assert {"a_labels.tif", "a_overlay.png", "a_distance_map.tif"} <= set(found)


def test_files_come_first_come_first_listed_and_once(folder):
    found = find_images([folder / "img10.tif", folder, str(folder / "img10.tif")])
    assert names(found, folder) == ["img10.tif", "data.zarr", "IMG1.PNG", "img2.tif"]
    assert find_images([folder / "a_labels.tif"]) == [folder / "a_labels.tif"]
    assert find_images([folder / "notes.txt"]) == [folder / "notes.txt"]
    assert find_images([folder / "data.zarr"]) == [folder / "data.zarr"]


def test_patterns(folder):
    assert names(find_images([str(folder / "*.tif")]), folder) == ["img2.tif", "img10.tif"]
    assert names(find_images([str(folder / "**" / "*")]), folder) == [
        "data.zarr",
        "IMG1.PNG",
        "img2.tif",
        "img10.tif",
        "sub/deep.jpg",
    ]
    assert names(find_images([str(folder / "su?")], recursive=True), folder) == ["sub/deep.jpg"]
    (folder / "odd[1].tif").write_bytes(b"x")
    assert names(find_images([folder / "odd[1].tif"]), folder) == ["odd[1].tif"]


def test_nothing_found_is_a_wrong_call(folder):
    with pytest.raises(UsageError, match="There is no file or folder"):
        find_images([folder / "nowhere"])
    (folder / "empty").mkdir()
    (folder / "empty" / "a.oib").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"\.tif, \.tiff, \.png.*\.oib files cannot be read yet"):
        find_images([folder / "empty"])
    with pytest.raises(UsageError, match="holds none"):
        find_images([str(folder / "*.bmp")])
    with pytest.raises(UsageError, match="empty list"):
        find_images([])
    with pytest.raises(TypeError, match="list"):
        find_images(str(folder))


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"x")


def test_own_images_with_names_of_results_are_taken(tmp_path):
    files(tmp_path, "dapi_labels.tif", "merge_overlay.tif", "a.tif", "sub/_labels.tif")
    found = search_images([tmp_path], recursive=True)
    expected = ["a.tif", "dapi_labels.tif", "merge_overlay.tif", "sub/_labels.tif"]
    assert names(found.paths, tmp_path) == expected
    assert found.notes == ()
    # Their results are results as well.
    files(tmp_path, "dapi_labels_labels.tif", "dapi_labels_cells.csv")
    assert names(find_images([tmp_path]), tmp_path) == expected[:3]


def test_labels_of_other_images_are_left_out_with_a_note(tmp_path):
    files(tmp_path, "images/a.tif", "labels/a_labels.png", "labels/b_labels.png")
    found = search_images([tmp_path], recursive=True)
    assert names(found.paths, tmp_path) == ["images/a.tif", "labels/b_labels.png"]
    (note,) = found.notes
    assert note.startswith("1 file was left out")
    assert "(a_labels.png)" in note
    given = search_images([tmp_path / "images", tmp_path / "labels" / "a_labels.png"])
    assert names(given.paths, tmp_path) == ["images/a.tif", "labels/a_labels.png"]
    assert given.notes == ()


@pytest.mark.parametrize("pattern", [None, "**/*.tif", "**"])
def test_links_that_lead_back_are_followed_once(tmp_path, pattern):
    """Links among twelve folders make 12! ways to walk."""
    folders = [tmp_path / f"f{index}" for index in range(12)]
    for folder in folders:
        files(folder, f"{folder.name}.tif")
        for other in (*folders, tmp_path):
            (folder / f"to_{other.name}").symlink_to(other)
    (tmp_path / "loop").symlink_to("loop")
    given = tmp_path if pattern is None else str(tmp_path / pattern)
    found = search_images([given], recursive=pattern is None)
    assert names(found.paths, tmp_path) == [f"{f.name}/{f.name}.tif" for f in folders]


def test_a_folder_behind_a_link_is_searched(tmp_path):
    files(tmp_path, "elsewhere/a.tif", "plate/b.tif")
    (tmp_path / "plate" / "more").symlink_to(tmp_path / "elsewhere")
    found = find_images([tmp_path / "plate"], recursive=True)
    assert names(found, tmp_path) == ["plate/b.tif", "plate/more/a.tif"]


def test_a_pattern_may_have_stars_in_several_places(tmp_path, monkeypatch):
    files(tmp_path, "p1/w/a.tif", "p1/b.tif", "p2/x/y/c.tif", "p2/.h/d.tif", "q/e.tif")
    expected = {
        "p*/**/*.tif": ["p1/b.tif", "p1/w/a.tif", "p2/x/y/c.tif"],
        "**/w/**": ["p1/w/a.tif"],
        "**/x/**/*.tif": ["p2/x/y/c.tif"],
        "./p?/*/[a-b].tif": ["p1/w/a.tif"],
        "p2/.*/*.tif": ["p2/.h/d.tif"],
    }
    monkeypatch.chdir(tmp_path)
    for pattern, found in expected.items():
        assert [path.as_posix() for path in find_images([pattern])] == found
        assert names(find_images([str(tmp_path / pattern)]), tmp_path) == found


@pytest.mark.parametrize("given", ["", "*", "*/*.tif", "**/*.tif"])
def test_a_closed_folder_stops_nothing_and_is_named(tmp_path, monkeypatch, given):
    files(tmp_path, "open/a.tif", "closed/b.tif")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = search_images([os.path.join(tmp_path, given)], recursive=True)
    assert names(found.paths, tmp_path) == ["open/a.tif"]
    (note,) = found.notes
    assert "closed' was left out: it cannot be opened (Permission denied)" in note
    with pytest.raises(UsageError, match=r"holds none.*closed' was left out"):
        find_images([tmp_path / "closed"])


@pytest.mark.timeout(60)
def test_pipes_and_sockets_are_no_images(tmp_path, monkeypatch):
    files(tmp_path, "a.tif")
    os.mkfifo(tmp_path / "pipe.tif")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket.png")
        (tmp_path / "gone.tif").symlink_to("nowhere.tif")
        found = search_images([tmp_path])
        assert names(found.paths, tmp_path) == ["a.tif"]
        assert len(found.notes) == 3
        for path in (tmp_path / "pipe.tif", tmp_path / "socket.png", Path("/dev/null")):
            assert find_images([path]) == [path]  # given by name: fails like every bad file
            for read in (read_image, read_labels):
                with pytest.raises(ImageFileError, match="pipe, a socket or a device"):
                    read(path)


def test_paths_that_the_system_refuses_end_in_a_sentence(tmp_path):
    long = tmp_path / ("x" * 300 + ".tif")
    (tmp_path / "loop.tif").symlink_to("loop.tif")
    for path in (long, tmp_path / "loop.tif"):
        with pytest.raises(UsageError, match=r"cannot be opened \("):
            find_images([path])
        with pytest.raises(ImageFileError, match=r"cannot be opened \("):
            read_image(path)
    with pytest.raises(UsageError, match="There is no file"):
        read_image("a\0.tif")


def test_results_of_all_formats_are_left_out(tmp_path):
    for name in ("a.tif", "a_cells.csv", "a_labels.ome.tif", "a_seg.npy", "b_seg.npy"):
        (tmp_path / name).touch()
    (tmp_path / "a_labels.zarr").mkdir()
    (tmp_path / "a_RES").mkdir()
    (tmp_path / "a_RES" / "mask000.tif").touch()
    (tmp_path / "a_RES" / "res_track.txt").touch()
    found = search_images([tmp_path], recursive=True)
    assert [path.name for path in found.paths] == ["a.tif"]
