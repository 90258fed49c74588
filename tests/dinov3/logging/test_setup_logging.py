"""Log files of a run."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from dinov3.logging import cleanup_logging, setup_logging


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    cleanup_logging()


def test_messages_go_to_stdout_and_to_the_file(tmp_path, capsys):
    setup_logging(str(tmp_path), name="a_run", level=logging.INFO)
    logging.getLogger("a_run").info("hello")
    logging.getLogger("a_run").debug("too quiet")
    text = (tmp_path / "logs" / "log.txt").read_text()
    assert "hello" in text
    assert "a_run" in text
    assert "too quiet" not in text
    assert "hello" in capsys.readouterr().out


def test_level_shows_more(tmp_path):
    setup_logging(str(tmp_path / "out.log"), name="a_run", level=logging.DEBUG)
    logging.getLogger("a_run").debug("quiet")
    assert "quiet" in (tmp_path / "out.log").read_text()


def test_second_call_replaces_the_first(tmp_path, capsys):
    setup_logging(str(tmp_path), name="a_run")
    setup_logging(str(tmp_path), name="a_run")
    logging.getLogger("a_run").info("once")
    assert (tmp_path / "logs" / "log.txt").read_text().count("once") == 1
    assert capsys.readouterr().out.count("once") == 1


def test_named_logger_does_not_repeat_at_the_root(tmp_path, capsys):
    setup_logging(str(tmp_path))
    setup_logging(str(tmp_path), name="a_run")
    logging.getLogger("a_run").warning("once")
    assert capsys.readouterr().out.count("once") == 1


@pytest.mark.parametrize("only_main", [True, False])
def test_other_processes_write_to_their_own_file(tmp_path, capsys, monkeypatch, only_main):
    # The process group does not exist yet when a run sets up its log.
    for name, value in {
        "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    setup_logging(str(tmp_path), name="a_run", log_to_stdout_only_in_main_process=only_main)
    logging.getLogger("a_run").info("from two")
    assert "from two" in (tmp_path / "logs" / "log.txt.rank2").read_text()
    assert not (tmp_path / "logs" / "log.txt").exists()
    assert ("from two" in capsys.readouterr().out) == (not only_main)


@pytest.mark.parametrize("color", [True, False])
def test_color_marks_warnings_on_a_terminal(capsys, monkeypatch, color):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    setup_logging(name="a_run", color=color)
    logging.getLogger("a_run").warning("careful")
    assert ("\x1b[33m" in capsys.readouterr().out) == color


@pytest.mark.parametrize("name", [None, "a_run"])
def test_capture_warnings(tmp_path, name):
    setup_logging(str(tmp_path), name=name)
    # pytest records warnings by hooks of its own, so that the logger is asked directly.
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging._showwarning("deprecated thing", UserWarning, "file.py", 1)  # type: ignore[attr-defined]
    assert (tmp_path / "logs" / "log.txt").read_text().count("deprecated thing") == 1


def test_capture_warnings_can_be_off(tmp_path):
    before = warnings.showwarning
    setup_logging(str(tmp_path), capture_warnings=True)
    assert warnings.showwarning is not before
    setup_logging(str(tmp_path), capture_warnings=False)
    assert warnings.showwarning is before


def test_cleanup_restores_every_logger(tmp_path):
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    setup_logging(str(tmp_path))
    setup_logging(str(tmp_path), name="a_run")
    cleanup_logging()
    log = logging.getLogger("a_run")
    assert (root.level, root.handlers) == before
    assert (log.level, log.propagate, log.handlers) == (logging.NOTSET, True, [])


def test_cleanup_of_one_name_leaves_the_others(tmp_path):
    setup_logging(str(tmp_path / "a.log"), name="a_run")
    setup_logging(str(tmp_path / "b.log"), name="b_run")
    cleanup_logging(name="a_run")
    logging.getLogger("b_run").info("still here")
    assert logging.getLogger("a_run").handlers == []
    assert "still here" in (tmp_path / "b.log").read_text()


def test_warnings_are_not_written_twice_with_root_and_name(tmp_path):
    for names in ([None, "a_run"], ["a_run", None]):
        path = tmp_path / f"{names[0]}.log"
        for name in names:
            setup_logging(str(path), name=name)
        logging._showwarning("deprecated thing", UserWarning, "file.py", 1)  # type: ignore[attr-defined]
        logging.getLogger("a_run").info("still written")
        cleanup_logging()
        assert path.read_text().count("deprecated thing") == 1
        assert "still written" in path.read_text()
