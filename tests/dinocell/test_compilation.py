"""numba's cache is a help and never a condition: without a home, on a full disk, after damage."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from numba.core import caching

from dinocell import compilation
from dinocell.compilation import njit
from dinocell.io import read_labels, write_image

ROOT = Path(__file__).parents[2]
STRANGER = 54321  # a user without an entry in the list of users, as in a container


def double(value):
    return 2 * value


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch):
    """The folder that is used where neither the source's folder nor the home can be written."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compilation._warn_of_compiling_again.cache_clear()
    return tmp_path / f"dinocell-numba-{os.getuid()}"


def test_a_private_folder_is_the_next_place(temporary_folder, caplog):
    assert njit(double)(3) == 6
    assert stat.S_IMODE(temporary_folder.stat().st_mode) == 0o700
    again = njit(double)
    assert again(3) == 6
    assert sum(again.stats.cache_hits.values()) == 1
    assert caplog.messages == []
    assert caching.config.CACHE_DIR == ""


def test_no_folder_is_named_after_a_missing_home(temporary_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown user number
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        caching.CacheImpl,
        "_locator_classes",
        [caching.UserProvidedCacheLocator, caching.UserWideCacheLocator],
    )
    assert njit(double)(3) == 6
    assert list(tmp_path.iterdir()) == [temporary_folder]


@pytest.mark.parametrize("fault", ["others may write", "a link", "another user's", "no folder"])
def test_what_others_can_write_is_not_run(temporary_folder, monkeypatch, caplog, fault):
    if fault == "others may write":
        temporary_folder.mkdir()
        temporary_folder.chmod(0o777)
    elif fault == "a link":
        (temporary_folder.parent / "elsewhere").mkdir()
        temporary_folder.symlink_to("elsewhere")
    elif fault == "another user's":
        temporary_folder.mkdir(mode=0o700)
        temporary_folder.rename(temporary_folder.parent / "dinocell-numba-99")
        monkeypatch.setattr("os.getuid", lambda: 99)
    else:
        temporary_folder.touch()
    compiled = [njit(double), njit(double)]
    assert [function(3) for function in compiled] == [6, 6]
    assert list(temporary_folder.parent.rglob("*.nb*")) == []
    (message,) = caplog.messages
    assert "set NUMBA_CACHE_DIR" in message


def test_a_full_disk_and_damaged_files_cost_time_only(temporary_folder, monkeypatch):
    njit(double)(3)
    for damaged in temporary_folder.rglob("*.nb*"):
        damaged.write_bytes(damaged.read_bytes()[:20])
    assert njit(double)(3) == 6

    def full(*_):
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", full)
    assert njit(double)(3.0) == 6.0


@pytest.fixture(scope="module")
def stranger():
    """Runs Python as a user without a home, on a copy of the program that this user cannot write."""
    folder = Path(tempfile.mkdtemp())  # the folders of pytest are closed to other users
    folder.chmod(0o755)
    for name in ("dinocell", "dinov3_modified"):
        shutil.copytree(
            ROOT / name, folder / "program" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for place in ("tmp", "out"):
        (folder / place).mkdir()
    prefix: list[str] = []
    if os.getuid() == 0:
        may_read = "+dac_read_search"  # Python itself may lie in a closed folder
        prefix = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
        prefix += ["--inh-caps", may_read, "--ambient-caps", may_read]
        if not shutil.which("setpriv") or subprocess.run([*prefix, "true"]).returncode:
            pytest.skip("no setpriv that gives a process to another user")
        for place in ("tmp", "out"):
            os.chown(folder / place, STRANGER, STRANGER)
    closed = [folder / "program", *(folder / "program").rglob("*")]
    for path in closed:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        paths = [folder / "program", folder / "program" / "dinov3_modified"]
        return subprocess.run(
            [*prefix, sys.executable, *arguments],
            cwd="/",
            env={
                "HOME": "/nonexistent",
                "PATH": os.defpath,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "TMPDIR": str(folder / "tmp"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
        )

    yield folder, run
    for path in closed:
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_kernels_run_for_a_user_without_a_home(stranger):
    folder, run = stranger
    done = run(
        "-c",
        "import numpy as np\n"
        "from dinocell.results.convex_hull import _half_steps\n"
        "levels = np.zeros(3, int)\n"
        "_half_steps(np.array([4]), levels)\n"
        "print(levels)",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[8 7 8]\n", "")
    assert len(list((folder / "tmp").glob("dinocell-numba-*/results_*/*.nbc"))) == 1


@pytest.mark.slow
def test_segment_runs_for_a_user_without_a_home(stranger):
    folder, run = stranger
    rows, cols = np.mgrid[:64, :64]
    image = (np.hypot(rows - 30, cols - 30) < 9) * 3000 + rows
    write_image(folder / "a.tif", image.astype(np.uint16))
    done = run(
        "-m", "dinocell", "segment", str(folder / "a.tif"), "-o", str(folder / "out"), "--report"
    )
    assert done.returncode == 0, done.stderr
    assert read_labels(folder / "out" / "a_labels.tif").max() == 1
    assert [line for line in done.stderr.splitlines() if "arning" in line] == []
    assert {path.name.split("_")[0] for path in (folder / "tmp").glob("dinocell-numba-*/*")} == {
        "segmentation", "results",
    }  # fmt: skip
