"""Zips of stored entries: those of `zipfile`, byte for byte."""

from __future__ import annotations

import io
import zipfile

import pytest

from dinocell.results import stored_zip
from dinocell.results.stored_zip import write_stored_zip


def written(entries: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    write_stored_zip(file, entries)
    return file.getvalue()


def by_zipfile(entries: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), content)
    return file.getvalue()


@pytest.mark.parametrize("count", [0, 1, 3, 65_534, 65_535, 65_536])
def test_the_bytes_are_those_of_zipfile(count: int) -> None:
    """Above 65,535 entries, and at that many, the count needs Zip64."""
    entries = [(f"{number}.roi", bytes([number % 256]) * (number % 7)) for number in range(count)]
    assert written(entries) == by_zipfile(entries)


def test_places_beyond_2_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit lowered in both, so that the fields of 64 bits are needed early."""
    entries = [(f"{number}.roi", bytes([number])) for number in range(9)]
    plain = written(entries)
    monkeypatch.setattr(stored_zip, "_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    assert len(written(entries)) > len(plain)
    assert written(entries) == by_zipfile(entries)
