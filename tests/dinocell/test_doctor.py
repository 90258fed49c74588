"""`dinocell doctor` sees what is wrong with an installation, and says how to repair it."""

import sys

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from dinocell import doctor
from dinocell.cli.app import app


def finding(name: str) -> doctor.Finding:
    (found,) = [item for item in doctor.examine() if item.name == name]
    return found


def test_this_installation_is_described():
    done = CliRunner().invoke(app, ["doctor"])
    for name in ("dinocell ", "torch ", "precision ", "compiled functions ", "dinocell-cells "):
        assert f"\n{name}" in f"\n{done.output}"
    wrong = [item for item in doctor.examine() if item.cure]
    assert done.exit_code == bool(wrong)
    assert all(f"to repair: {item.name}: {item.cure}" in done.output for item in wrong)


@pytest.mark.parametrize("text", ["numpy>=99", "no-such-package>=1"])
def test_a_package_that_is_missing_or_too_old(monkeypatch, text):
    requirement = Requirement(text)
    monkeypatch.setattr(doctor, "_requirements", lambda extra: [] if extra else [requirement])
    assert f"pip install '{requirement}'" in finding(requirement.name).cure
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert f"to repair: {requirement.name}: " in done.output


def test_a_package_of_another_name_with_the_same_modules(monkeypatch):
    def version(name: str) -> str:
        if name == "opencv-python":
            raise doctor.metadata.PackageNotFoundError
        return "5.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert doctor._package(Requirement("opencv-python>=4.10")) == doctor.Finding(
        "opencv-python-headless", "5.0"
    )


def test_an_extra_that_is_not_installed_is_named_and_not_wrong(monkeypatch):
    real = doctor._requirements
    absent = [Requirement("no-such-package")]
    monkeypatch.setattr(doctor, "_requirements", lambda e: absent if e == "serve" else real(e))
    assert "missing no-such-package (pip install " in finding("extra serve").value
    assert not finding("extra serve").cure


def test_folders_that_cannot_be_used(monkeypatch):
    monkeypatch.setattr(doctor, "cache_folder", lambda: None)
    monkeypatch.setattr(doctor, "_LEAST_FREE_GB", 1e9)
    assert "NUMBA_CACHE_DIR" in finding("compiled functions").cure
    assert "TMPDIR" in finding("temporary files").cure


def test_a_damaged_model(monkeypatch, tmp_path):
    (tmp_path / "dinocell-broken.safetensors").write_bytes(b"{}")
    monkeypatch.setattr("dinocell.network.model._BUNDLED_FOLDER", tmp_path)
    assert "again" in finding("dinocell-broken").cure


def test_another_dinocell_on_the_path(monkeypatch, tmp_path):
    assert not [item for item in doctor.examine() if item.name == "another dinocell"]
    (tmp_path / "dinocell").mkdir()
    (tmp_path / "dinocell" / "__init__.py").touch()
    # a name that is too long fails as an unreadable folder does, also for root
    monkeypatch.setattr(sys, "path", [*sys.path, "x" * 300, str(tmp_path)])
    assert finding("another dinocell").value == str(tmp_path)


def test_a_tree_that_is_none(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "dinov3"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("DINOCELL_DINOV3", str(tmp_path))
    assert "DINOCELL_DINOV3" in finding("dinov3").cure
