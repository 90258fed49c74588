"""Files, folders and patterns that stand for images."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinocell.errors import UsageError
from dinocell.io import (
    find_images,
)


@pytest.fixture
def folder(tmp_path):
    for name in (
        "img10.tif",
        "img2.tif",
        "IMG1.PNG",
        "a_labels.tif",
        "a_overlay.png",
        "a_distance_map.tif",
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
    assert names(find_images([folder]), folder) == ["IMG1.PNG", "img2.tif", "img10.tif"]


def test_recursive_goes_into_folders_but_not_into_zarr(folder):
    found = names(find_images([folder], recursive=True), folder)
    assert found == ["IMG1.PNG", "img2.tif", "img10.tif", "sub/deep.jpg"]


def test_outputs_on_request(folder):
    found = names(find_images([folder], include_outputs=True), folder)
    assert {"a_labels.tif", "a_overlay.png", "a_distance_map.tif"} <= set(found)


def test_files_come_first_come_first_listed_and_once(folder):
    found = find_images([folder / "img10.tif", folder, str(folder / "img10.tif")])
    assert names(found, folder) == ["img10.tif", "IMG1.PNG", "img2.tif"]
    assert find_images([folder / "a_labels.tif"]) == [folder / "a_labels.tif"]
    assert find_images([folder / "notes.txt"]) == [folder / "notes.txt"]
    assert find_images([folder / "data.zarr"]) == [folder / "data.zarr"]


def test_patterns(folder):
    assert names(find_images([str(folder / "*.tif")]), folder) == ["img2.tif", "img10.tif"]
    assert names(find_images([str(folder / "**" / "*")]), folder) == [
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
    (folder / "empty" / "a.czi").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"\.tif, \.tiff, \.png.*\.czi files cannot be read yet"):
        find_images([folder / "empty"])
    with pytest.raises(UsageError, match="holds none"):
        find_images([str(folder / "*.bmp")])
    with pytest.raises(UsageError, match="empty list"):
        find_images([])
    with pytest.raises(TypeError, match="list"):
        find_images(str(folder))
