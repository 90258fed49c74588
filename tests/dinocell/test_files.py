"""What is written appears whole or not at all, and is flushed before it gets its name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dinocell.errors import DINOCellError
from dinocell.files import (
    atomic_folder,
    atomic_path,
    kept_folder,
    move_into_place,
    remove_temporary_files,
    write_text_atomically,
)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a.tif"
    path.write_bytes(b"old")
    with pytest.raises(failure), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise failure
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_kept_folder_is_not_made_again(tmp_path, replaced):
    out, away = tmp_path / "out", tmp_path / "away"
    write_text_atomically(out / "marker", "")
    with kept_folder(out / "marker"):
        write_text_atomically(out / "in" / "a.txt", "a")
        out.rename(away)
        if replaced:
            out.mkdir()  # as a mount point exists without its mount
        with pytest.raises(
            OSError, match="the folder is gone or another one has its name"
        ) as caught:
            write_text_atomically(out / "in" / "b.txt", "b")
        assert caught.value.errno == errno.ESTALE
        assert [*tmp_path.glob("out/*")] == []
        write_text_atomically(tmp_path / "elsewhere" / "c.txt", "c")
    write_text_atomically(out / "d.txt", "d")


def test_the_temporary_file_is_hidden_beside_and_keeps_the_suffix(tmp_path):
    endings = {"a.tif": ".tif", "b.ome.tif": ".ome.tif", "c 1.2.png": ".png", "LICENSE": ""}
    for name, suffix in endings.items():
        with atomic_path(tmp_path / name) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(".")
            assert "".join(temporary.suffixes) == suffix
            assert not (tmp_path / name).exists()
            temporary.write_text(name)
        assert (tmp_path / name).read_text() == name


def test_missing_folders_are_made_and_links_are_followed(tmp_path):
    target, link = tmp_path / "new" / "deep" / "a.csv", tmp_path / "link.csv"
    write_text_atomically(target, "1")
    link.symlink_to(target)
    write_text_atomically(link, "2\r\nµ")
    assert link.is_symlink()
    assert target.read_bytes() == "2\r\nµ".encode()


def test_folders_and_blocks_that_write_nothing_are_refused(tmp_path):
    with pytest.raises(DINOCellError, match="is a folder"), atomic_path(tmp_path):
        pass
    with pytest.raises(RuntimeError, match="no such file"), atomic_path(tmp_path / "a.tif"):
        pass
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with atomic_path(tmp_path / "a.txt") as one, atomic_path(tmp_path / "a.txt") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a.txt").read_text() == "one"


@pytest.mark.parametrize("write", [write_text_atomically, None])
def test_content_then_name_then_folder_are_flushed(tmp_path, monkeypatch, write):
    """A power cut between any two of these steps leaves the old file or the new one."""
    steps = []
    flush, rename = os.fsync, os.replace

    def noted_flush(handle):
        steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        flush(handle)

    def noted_rename(source, target):
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_flush)
    monkeypatch.setattr(os, "replace", noted_rename)
    if write is None:
        (tmp_path / "part").write_text("x")
        move_into_place(tmp_path / "part", tmp_path / "a.txt")
    else:
        write(tmp_path / "a.txt", "x")
    content, renamed, folder = steps
    assert content == "part" or content.startswith(".tmp-")
    assert (renamed, folder) == ("rename", tmp_path.name)


def test_a_folder_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    flush = os.fsync

    def refuse_folders(handle):
        if os.path.isdir(os.readlink(f"/proc/self/fd/{handle}")):
            raise OSError(22, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_text_atomically(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_keeps_the_output(tmp_path, monkeypatch, code):
    """Some FUSE and SMB mounts."""

    def refuse(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    write_text_atomically(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_seen_at_the_flush_leaves_the_old_file(tmp_path, monkeypatch, code):
    (tmp_path / "a.txt").write_text("old")

    def full(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_text_atomically(tmp_path / "a.txt", "new")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(ValueError, match="stop"), atomic_folder(out) as temporary:  # noqa: PT012
        (temporary / "a").write_text("1")
        raise ValueError("stop")
    assert os.listdir(tmp_path / "new") == []
    out.mkdir()  # an empty folder may be there
    with atomic_folder(out) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("1")
        assert os.listdir(out) == []
    assert (out / "deep" / "a").read_text() == "1"
    with pytest.raises(OSError, match="not empty"), atomic_folder(out):
        pass
    assert os.listdir(tmp_path / "new") == ["out"]


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    """Old ones of ours only."""
    names = [".tmp-0123456789abcdef.tif", ".tmp-0123456789abcdee", ".tmp-mine.tif", "a_labels.tif"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    (tmp_path / ".tmp-fedcba9876543210.csv").touch()  # another process is writing it
    remove_temporary_files(tmp_path, before=2000)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".tmp-fedcba9876543210.csv", ".tmp-mine.tif", "a_labels.tif"]


def test_folders_of_killed_processes_are_removed(tmp_path):
    """A folder is as young as the youngest file in it."""
    killed, used = tmp_path / ".tmp-0123456789abcdef", tmp_path / ".tmp-fedcba9876543210"
    for folder in (killed, used):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a").touch()
        for path in (folder / "deep" / "a", folder / "deep", folder):
            os.utime(path, (1000, 1000))
    os.utime(used / "deep" / "a", (3000, 3000))
    remove_temporary_files(tmp_path, before=2000)
    assert list(tmp_path.iterdir()) == [used]


def test_leftovers_that_another_process_removed_first_are_no_failure(tmp_path, monkeypatch):
    gone = tmp_path / ".tmp-0123456789abcdef.tif"
    monkeypatch.setattr(Path, "glob", lambda *_: iter([gone]))
    remove_temporary_files(tmp_path, before=2000)


def test_a_cache_is_renamed_without_a_flush_and_folders_are_moved(tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    move_into_place(tmp_path / "part", tmp_path / "whole")
    monkeypatch.setattr(os, "fsync", None)  # a call would fail
    (tmp_path / "entry.part").write_text("x")
    move_into_place(tmp_path / "entry.part", tmp_path / "entry", flush=False)
    assert sorted(os.listdir(tmp_path)) == ["entry", "whole"]
