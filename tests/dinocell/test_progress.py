"""Progress: plain lines where there is no terminal, nothing where nobody asked."""

from __future__ import annotations

import pytest

from dinocell import progress as progress_module
from dinocell.progress import progress


def test_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "_LINE_EVERY_S", 0.0)
    with progress("counting", 4, done=1) as bar:
        bar.advance(note="first")
        bar.advance(2)
        bar.write("a remark")
    assert bar.done == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("counting 2/4, ")
    assert lines[0].endswith("first")
    assert lines[1].startswith("counting 4/4, 0:00:00 left")
    assert lines[2] == "a remark"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_total_may_turn_out_to_be_another(capsys, monkeypatch, terminal):
    monkeypatch.setattr(progress_module, "_LINE_EVERY_S", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    with progress("counting", 4) as bar:
        bar.expect(7)
        bar.advance()
    assert "1/7" in capsys.readouterr().err


def test_quiet(capsys):
    with progress("counting", 2, shown=False) as bar:
        bar.advance(2)
        bar.write("a remark")
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("counting", 2) as bar:
        bar.advance(note="first")
        bar.write("a remark")
    assert bar.done == 1
    text = capsys.readouterr().err
    assert "counting" in text
    assert "a remark" in text


def test_the_bar_is_closed_after_a_failure():
    with pytest.raises(RuntimeError, match="inside"), progress("counting", 2, shown=False) as bar:
        raise RuntimeError("inside")
    assert bar._bar is None
