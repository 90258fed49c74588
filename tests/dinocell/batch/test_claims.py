"""Claims: one process runs a part at a time, on whatever machine, and a dead one blocks nobody."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dinocell.batch import claims
from dinocell.batch.claims import CLAIM_NAME, Claimant, claimed, read_claim
from dinocell.errors import DINOCellError


def write_claim(folder: Path, **values) -> Path:
    mine = {"job": "", "host": socket.gethostname(), "pid": os.getpid(), "time": 0.0}
    path = folder / CLAIM_NAME
    path.write_text(json.dumps({**mine, **values}))
    return path


def hold(folder: Path, claimant: Claimant | None = None) -> bool:
    """Whether the claim is this process's own while it is held."""
    with claimed(folder, claimant or Claimant()):
        return read_claim(folder / CLAIM_NAME)["pid"] == os.getpid()


@pytest.mark.parametrize("values", [{}, {"host": "elsewhere"}, {"job": "7"}])
def test_the_part_of_a_running_process_is_refused(tmp_path, values):
    """The file alone says so: file locks of some network file systems end at the machine.

    `flock` is local on Lustre mounted with `localflock` and on BeeGFS as it is installed, so the claim of
    another machine must hold without any lock that this one could see.
    """
    path = write_claim(tmp_path, **values)
    before = path.read_text()
    with pytest.raises(DINOCellError, match="must be run by one process"):
        hold(tmp_path, Claimant(job_runs=lambda job: job == "7"))
    assert path.read_text() == before


def test_the_part_of_a_dead_process_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    claimant = Claimant("8", lambda job: False)
    # The third is an earlier start of the same job; the last a process that had the same number before.
    for values in (
        {"pid": gone.pid},
        {"job": "7"},
        {"job": "8", "host": "elsewhere"},
        {"began": "1"},
    ):
        path = write_claim(tmp_path, **values)
        assert hold(tmp_path, claimant)
        assert not path.exists()


def test_the_time_at_which_a_process_began_tells_it_from_others(tmp_path):
    write_claim(tmp_path, began=Claimant().claim()["began"])
    with pytest.raises(DINOCellError, match="must be run by one process"):
        hold(tmp_path)


def test_an_unfinished_claim_is_respected_until_it_is_old(tmp_path):
    path = tmp_path / CLAIM_NAME
    path.write_text("")
    with pytest.raises(DINOCellError, match="must be run by one process"):
        hold(tmp_path)
    os.utime(path, (1.0, 1.0))  # its writer was killed long ago
    assert hold(tmp_path)


@pytest.mark.parametrize("remains", [True, False])
def test_the_slower_of_two_that_judged_one_claim_gives_way(tmp_path, remains):
    """Meanwhile the faster one took the claim over, and is still running or already done."""
    write_claim(tmp_path, job="1")

    def meanwhile(job: str) -> bool:
        path = write_claim(tmp_path, job="2")
        if not remains:
            path.unlink()
        return False

    with pytest.raises(DINOCellError, match="got two that started"):
        hold(tmp_path, Claimant("3", meanwhile))
    left = [json.loads(path.read_text())["job"] for path in tmp_path.iterdir()]
    assert left == (["2"] if remains else [])


def test_one_of_many_takes_an_abandoned_part_over(tmp_path):
    """All judge the same claim before any of them acts."""
    count = 8
    write_claim(tmp_path, job="1")
    judged, ended = threading.Barrier(count), threading.Barrier(count)
    outcomes: list[bool] = []

    def runs(job: str) -> bool:
        judged.wait()
        return False

    def take(number: int) -> None:
        try:
            with claimed(tmp_path, Claimant(f"job{number}", runs)):
                outcomes.append(True)
                ended.wait()
        except DINOCellError:
            outcomes.append(False)
            ended.wait()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=900)
    assert sorted(outcomes) == [False] * (count - 1) + [True]
    assert list(tmp_path.iterdir()) == []


def test_claims_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / CLAIM_NAME
    claims._make_claim(path, '{"job": "2"}')
    with pytest.raises(FileExistsError):
        claims._make_claim(path, "other")
    with pytest.raises(FileExistsError):
        claims._take_away(path, {"job": "1"})
    assert path.read_text() == '{"job": "2"}'
    assert [item.name for item in tmp_path.iterdir()] == [CLAIM_NAME]
