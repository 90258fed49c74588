"""One process of a job: what it makes of signals, failures and SLURM's answers, with real children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinocell.batch import journal
from dinocell.cluster.record import (
    JobRecord,
    Start,
    failures_folder,
    first_failure,
    read_record,
    write_record,
)

ROOT = Path(__file__).parents[3]

# What the supervisor starts in place of `dinocell`: it does what the test has written down.
CHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path
Path("child").write_text(" ".join(sys.argv[1:]))
def after(name): Path(name).write_text(str(os.getpid()))
exec(Path("behaviour.py").read_text())
"""
START = """
import itertools, os, sys
from dinocell.cluster import supervisor
class Stand_in(supervisor._Supervisor):
    def _child_command(self):
        return [sys.executable, "-u", "child.py", *self._command()]
supervisor._Supervisor = Stand_in
if "GROWING_COUNT" in os.environ:
    supervisor.oom_kills = itertools.count().__next__
supervisor._SURVIVES_S = 0.0
job = supervisor.SupervisedJob(tuple(sys.argv[1].split()), "run", **eval(sys.argv[2]))
sys.exit(supervisor.supervise(job))
"""
SAVES = """
def note(number, frame):
    Path("ckpt").mkdir(exist_ok=True)
    with open("got", "a") as file:
        file.write(signal.Signals(number).name + " ")
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, note)
after("ready")
time.sleep(600)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Starts a supervisor over a child of the given behaviour."""
    monkeypatch.chdir(tmp_path)
    Path("child.py").write_text(CHILD)
    Path("start.py").write_text(START)
    started = []

    def begin(behaviour: str, command: str = "pretrain c.yaml", *, options=None, **environment):
        Path("behaviour.py").write_text(behaviour)
        process = subprocess.Popen(
            [sys.executable, "start.py", command, repr(options or {})],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition, within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


def end(process) -> tuple[int, str]:
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def the_record() -> JobRecord:
    record = read_record("run")
    assert record is not None
    return record


def test_done(job):
    code, output = end(job("print('hello')"))
    assert code == 0
    assert "hello" in output
    assert Path("child").read_text() == "pretrain c.yaml"
    assert (the_record().state, the_record().reason) == ("done", "")


@pytest.mark.parametrize(
    ("behaviour", "code", "state", "reason"),
    [
        ("sys.exit('dinocell: error: the file must exist')", 1, "failed", "the file must exist"),
        ("print('dinocell: error: no such option', file=sys.stderr); sys.exit(2)", 2, "refused",
         "no such option"),
        ("raise ValueError('odd')", 1, "failed", "ValueError: odd"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "out_of_memory", "raise mem, or lower batch size"),
        ("os.kill(os.getpid(), signal.SIGBUS)", 135, "failed", "is /dev/shm full?"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "failed", "ended by SIGSEGV"),
    ],
)  # fmt: skip
def test_ends_by_itself(job, slurm, behaviour, code, state, reason):
    """Whatever it was, it is told and not requeued."""
    slurm.job("5")
    found, output = end(job(behaviour, SLURM_JOB_ID="5"))
    assert found == code, output
    assert the_record().state == state
    assert reason in the_record().reason
    assert not [call for call in slurm.calls() if "requeue" in call]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_signal_without_slurm(job, number):
    process = job(SAVES)
    wait_until(Path("ready").exists)
    process.send_signal(number)
    code, _ = end(process)
    assert code == 75
    assert Path("got").read_text().split() == [number.name]
    assert the_record().state == "stopped"
    assert "run the same command to continue" in the_record().reason


def test_signal_before_the_child_listens_is_not_lost(job, slurm):
    slurm.job("5")
    slurm.script("scontrol requeue 5", f"kill -TERM $(cat {Path.cwd()}/supervisor)")
    process = job("after('loading'); time.sleep(600)", SLURM_JOB_ID="5")
    Path("supervisor").write_text(str(process.pid))
    wait_until(Path("loading").exists)
    process.send_signal(signal.SIGUSR2)
    assert end(process)[0] == 0
    assert the_record().state == "requeued"


def requeued(slurm, process) -> None:
    """SLURM ends a job that it was asked to requeue."""
    Path("supervisor").write_text(str(process.pid))
    slurm.script("scontrol requeue 5", f"kill -TERM $(cat {Path.cwd()}/supervisor)")


@pytest.mark.parametrize(
    ("shown", "state", "code", "asks"),
    [
        ({}, "requeued", 0, True),
        ({"PreemptTime": "2026-01-01T00:00:00"}, "requeued", 0, True),
        ({"JobState": "COMPLETING"}, "cancelled", 143, False),
        ({"JobState": "COMPLETING", "RunTime": "01:00:00", "TimeLimit": "01:00:00"}, "requeued", 0, True),
        ({"JobState": "COMPLETING", "Restarts": 1}, "requeued", 0, False),
        ({"JobState": "COMPLETING", "PreemptTime": "2026-01-01T00:00:00"}, "requeued", 0, True),
    ],
    ids=["request", "preemption", "scancel", "time is over", "requeued already", "no grace"],
)  # fmt: skip
def test_what_slurm_says_decides(job, slurm, shown, state, code, asks):
    slurm.job("5", **shown)
    process = job(SAVES, SLURM_JOB_ID="5")
    requeued(slurm, process)
    wait_until(Path("ready").exists)
    process.send_signal(signal.SIGTERM)
    if state == "requeued" and not asks:
        wait_until(lambda: the_record().state == "requeued")
        process.send_signal(signal.SIGTERM)
    found, output = end(process)
    assert found == code, output
    assert the_record().state == state
    assert ("scontrol requeue 5" in slurm.calls()) == asks


def test_tasks_of_an_array_are_requeued_by_their_own_number(job, slurm):
    slurm.answer("scontrol show job -o 5", "JobId=8 ArrayJobId=5 ArrayTaskId=3 JobState=RUNNING\n")
    process = job(SAVES, SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    Path("supervisor").write_text(str(process.pid))
    slurm.script("scontrol requeue 5_3", f"kill -TERM $(cat {Path.cwd()}/supervisor)")
    wait_until(Path("ready").exists)
    process.send_signal(signal.SIGUSR2)
    assert end(process)[0] == 0
    assert slurm.calls()[-1] == "scontrol requeue 5_3"


def test_requeueing_that_is_refused_is_told(job, slurm):
    slurm.job("5")
    slurm.answer("scontrol requeue 5", error="Requested operation is disabled", code=1)
    process = job(SAVES, SLURM_JOB_ID="5")
    wait_until(Path("ready").exists)
    process.send_signal(signal.SIGUSR2)
    assert end(process)[0] == 75
    assert the_record().state == "stopped"
    assert "(Requested operation is disabled): submit it again" in the_record().reason


def earlier(*progress: int, job: str = "5", state: str = "requeued") -> None:
    starts = [Start(job, index, saved, 0.0, "node") for index, saved in enumerate(progress)]
    write_record("run", JobRecord(["pretrain", "c.yaml"], state, "", starts))


def test_starts_without_progress_are_bounded(job, slurm):
    slurm.job("5", Restarts=2)
    earlier(0, 0)
    code, _ = end(job("after('ran')", options={"max_stalled_starts": 2}, SLURM_JOB_ID="5",
                      SLURM_RESTART_COUNT="2"))  # fmt: skip
    assert code == 1
    assert not Path("ran").exists()
    assert the_record().state == "stalled"
    assert "got 2 starts of job 5 without a new checkpoint" in the_record().reason
    assert len(the_record().starts) == 2
    # Another submission begins to count anew.
    slurm.job("6")
    code, _ = end(job("after('ran')", options={"max_stalled_starts": 2}, SLURM_JOB_ID="6"))
    assert code == 0
    assert Path("ran").exists()


def test_no_requeue_after_a_standstill(job, slurm):
    slurm.job("5", Restarts=1)
    earlier(0)
    process = job(
        SAVES, options={"max_stalled_starts": 2}, SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1"
    )
    wait_until(Path("ready").exists)
    process.send_signal(signal.SIGUSR2)
    assert end(process)[0] == 1
    assert the_record().state == "stalled"
    assert not [call for call in slurm.calls() if "requeue" in call]


def test_a_folder_in_which_another_job_runs_is_refused(job, slurm):
    slurm.job("4")
    slurm.job("5")
    earlier(3, job="4", state="running")
    code, output = end(job("after('ran')", SLURM_JOB_ID="5"))
    assert code == 1
    assert "where job 4 is running" in output
    assert [start.job for start in the_record().starts] == ["4"]
    slurm.job("4", JobState="COMPLETED")  # killed before it could write its end
    assert end(job("after('ran')", SLURM_JOB_ID="5"))[0] == 0


def test_a_child_that_does_not_save_in_time_is_ended(job, slurm):
    slurm.job("5")
    behaviour = "signal.signal(signal.SIGUSR2, signal.SIG_IGN); after('ready'); time.sleep(600)"
    process = job(behaviour, options={"signal_ahead_s": 10}, SLURM_JOB_ID="5")
    requeued(slurm, process)
    wait_until(Path("ready").exists)
    begun = time.monotonic()
    process.send_signal(signal.SIGUSR2)
    code, output = end(process)
    assert code == 0, output
    assert time.monotonic() - begun > 4
    assert "its last checkpoint counts" in output
    assert the_record().state == "requeued"


WITH_WORKER = """
worker = subprocess.Popen([sys.executable, "-c",
    "import signal, time; from pathlib import Path\\n"
    "for n in (signal.SIGTERM, signal.SIGUSR2): signal.signal(n, lambda *a: Path('worker_got').touch())\\n"
    "Path('worker').write_text('x'); time.sleep(20)"])
while not Path("worker").exists():
    time.sleep(0.05)
def note(number, frame):
    worker.kill()
    sys.exit(75)
signal.signal(signal.SIGUSR2, note)
after("ready")
time.sleep(600)
"""


def test_workers_of_the_child_get_no_signal(job):
    """SLURM signals whole process groups."""
    process = job(WITH_WORKER)
    wait_until(Path("ready").exists)
    group = os.getpgid(process.pid)
    child = int(Path("ready").read_text())
    assert os.getpgid(child) != group
    process.send_signal(signal.SIGUSR2)
    assert end(process)[0] == 75
    assert not Path("worker_got").exists()


def test_nothing_outlives_a_killed_supervisor(job):
    process = job("after('ready'); time.sleep(600)")
    wait_until(lambda: Path("ready").exists() and Path("ready").read_text())
    child = int(Path("ready").read_text())
    process.kill()

    def gone() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{child}/stat").read_text().split(") ")[1][0] == "Z"
        return True

    wait_until(gone)


# --- several processes ---


def of(rank: int, world: int = 2) -> dict[str, str]:
    return {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank),
            "SLURM_STEP_NUM_TASKS": str(world)}  # fmt: skip


def test_the_first_process_tells_why_another_failed(job, slurm):
    slurm.job("5")
    code, _ = end(job("sys.exit('dinocell: error: the disk is full')", **of(1)))
    assert code == 1
    assert not (Path("run") / "job.json").exists()  # of the first process only
    code, _ = end(job("sys.exit('RuntimeError: Connection closed by peer')", **of(0)))
    assert the_record().reason == "process 1 of 2: the disk is full"


def test_lost_connections_are_consequences(slurm, tmp_path):
    folder = failures_folder(tmp_path, "5", 0, 1)
    folder.mkdir(parents=True)
    for name, reason in (("1", "gloo: Connection reset by peer"), ("2", "the disk is full")):
        (folder / f"{name}.json").write_text(json.dumps({"state": "failed", "reason": reason}))
    assert first_failure(tmp_path, "5", 0) == ("failed", "the disk is full")
    (folder / "2.json").unlink()
    assert first_failure(tmp_path, "5", 0)[1].startswith("gloo")
    assert first_failure(tmp_path, "5", 1) == ("", "")
    # Another srun of the same allocation begins with none.
    assert first_failure(tmp_path, "5", 0, 1)[0] == "failed"
    assert first_failure(tmp_path, "5", 0, 2) == ("", "")


def test_a_process_that_hangs_after_another_failed_is_ended(job, slurm):
    """srun sends TERM; a process in an exchange with the one that is gone does not react."""
    slurm.job("5")
    end(job("sys.exit('dinocell: error: the disk is full')", **of(1)))
    behaviour = "signal.signal(signal.SIGTERM, signal.SIG_IGN); after('ready'); time.sleep(600)"
    process = job(behaviour, **of(0))
    wait_until(Path("ready").exists)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: the_record().state == "stopping", 10)  # should SLURM end it now
    assert "the disk is full" in the_record().reason
    assert end(process)[0] == 1
    assert the_record().state == "failed"
    assert not [call for call in slurm.calls() if "requeue" in call]


def test_a_process_that_waits_for_one_that_failed_is_ended(job, slurm):
    """Also where nothing ends it: a script whose srun does not kill on a bad exit."""
    slurm.job("5")
    process = job("after('ready'); time.sleep(600)", **of(0))
    wait_until(Path("ready").exists)
    end(job("sys.exit('dinocell: error: the disk is full')", **of(1)))
    assert end(process)[0] == 137
    assert the_record().reason == "process 1 of 2: the disk is full"
    assert the_record().state == "failed"


def test_work_of_one_process_runs_once(job, slurm):
    slurm.job("5")
    assert end(job("after('ran')", "segment x -o out", **of(1)))[0] == 0
    assert not Path("ran").exists()
    assert end(job("after('ran')", "segment x -o out", **of(0)))[0] == 0
    assert Path("ran").exists()


def settle(name: str) -> None:
    """As a command that has replaced what was there."""
    path = Path("run") / name
    path.parent.mkdir(exist_ok=True)
    Path("new").mkdir() if name == "ckpt" else Path("new").write_text("{}")
    if path.exists():
        path.rename(path.with_name(f"old_{time.monotonic_ns()}"))
    Path("new").rename(path)


@pytest.mark.parametrize(
    ("command", "flag", "name", "later"),
    [
        ("segment x -o out", "--overwrite", "settings.json", "segment x -o out --resume"),
        ("pretrain c.yaml", "--no-resume", "ckpt", "pretrain c.yaml"),
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["with earlier results", "new"])
def test_what_begins_anew_does_so_once(job, slurm, command, flag, name, later, there):
    """Also if a job is cut before it came to that."""
    if there:
        settle(name)
    for restart in (0, 1):
        slurm.job("5", Restarts=restart)
        end(job("", f"{command} {flag}", SLURM_JOB_ID="5", SLURM_RESTART_COUNT=str(restart)))
        assert Path("child").read_text() == f"{command} {flag}"
    for restart in (2, 3, 4):
        settle(name)  # written anew by every start
        end(job("", f"{command} {flag}", SLURM_JOB_ID="5", SLURM_RESTART_COUNT=str(restart)))
        assert Path("child").read_text() == later
    slurm.job("6")
    end(job("", f"{command} {flag}", SLURM_JOB_ID="6"))
    assert Path("child").read_text() == f"{command} {flag}"


def test_what_is_left_aside_is_no_progress(job, slurm):
    """An earlier run of 900 iterations; this one begins anew and gets on with each start."""
    put_aside = "import shutil; shutil.rmtree('run/ckpt'); Path('run/ckpt').mkdir()"
    for restart, (saved, behaviour) in enumerate([(899, put_aside), (9, ""), (19, "")]):
        (Path("run/ckpt") / str(saved)).mkdir(parents=True)
        slurm.job("5", Restarts=restart)
        code, output = end(
            job(behaviour, "pretrain c.yaml --no-resume", options={"max_stalled_starts": 2},
                SLURM_JOB_ID="5", SLURM_RESTART_COUNT=str(restart))
        )  # fmt: skip
        assert code == 0, output
    assert [start.progress for start in the_record().starts] == [0, 10, 20]


def test_later_starts_of_a_segmentation_go_on(job, slurm):
    slurm.job("5", Restarts=1)
    earlier(0)
    settle("settings.json")
    end(job("", "segment x -o out --overwrite", SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1"))
    assert Path("child").read_text() == "segment x -o out --resume"


@pytest.mark.parametrize(
    ("command", "state", "expected"),
    [
        ("segment x -o out", "cancelled", "segment x -o out --resume"),
        ("segment x -o out", "failed", "segment x -o out --resume"),
        ("segment x -o out", "done", "segment x -o out"),
        ("segment x -o out", "refused", "segment x -o out"),
        ("segment y -o out", "cancelled", "segment y -o out"),
        ("segment x -o out --overwrite", "cancelled", "segment x -o out --overwrite"),
    ],
)
def test_the_same_submission_goes_on_after_a_cancellation(job, slurm, command, state, expected):
    """Only the very same; what was finished is not touched."""
    before = command if "y" not in command.split() else "segment x -o out"
    starts = [Start("4", 0, 0, 0.0, "node")]
    write_record("run", JobRecord(before.split(), state, "", starts))
    slurm.job("4", JobState="CANCELLED")
    slurm.job("5")
    end(job("", command, SLURM_JOB_ID="5"))
    assert Path("child").read_text() == expected


def test_the_end_of_each_job_is_kept(job, slurm):
    slurm.job("5")
    slurm.job("6")
    end(job("sys.exit('dinocell: error: an accident')", SLURM_JOB_ID="5"))
    end(job("", SLURM_JOB_ID="6"))
    assert the_record().ends == {"5": ("failed", "an accident", ""), "6": ("done", "", "")}
    assert the_record().end_of("5") == ("failed", "an accident", "")


def test_a_job_that_runs_again_has_no_end(job, slurm):
    slurm.job("5")
    end(job("sys.exit('dinocell: error: an accident')", SLURM_JOB_ID="5"))
    slurm.job("5", Restarts=1)
    job("after('ready'); time.sleep(600)", SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
    wait_until(Path("ready").exists)
    assert the_record().end_of("5") is None


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("pretrain c.yaml", "submit it again to continue"),
        ("pretrain c.yaml --no-resume", "submit it again without --no-resume to continue"),
        ("segment x -o out --overwrite", "submit it again without --overwrite to continue"),
    ],
)
def test_what_to_do_after_a_cancellation(job, slurm, command, advice):
    slurm.job("5", JobState="COMPLETING")
    process = job(SAVES, command, SLURM_JOB_ID="5")
    wait_until(Path("ready").exists)
    process.send_signal(signal.SIGTERM)
    end(process)
    assert the_record().state == "cancelled"
    assert the_record().reason.endswith(advice)


def test_a_sentence_is_said_once(job):
    _, output = end(job("sys.exit('dinocell: error: an accident')"))
    assert output.count("an accident") == 1
    assert output.endswith("dinocell: failed\n")


# --- memory ---

HUNGRY = """
from dinocell.batch.journal import note_start
Path("starts").open("a").write("x")
if len(Path("starts").read_text()) < 3:
    note_start(Path("run"), "big")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_of_many_images_one_that_takes_the_memory_costs_no_others(job, slurm):
    """The part continues by itself, and knows which images it had not finished."""
    slurm.job("5")
    Path("run").mkdir()
    code, output = end(job(HUNGRY, "shards run out 0", SLURM_JOB_ID="5"))
    assert code == 0, output
    assert output.count("with 1 unfinished images") == 2
    assert journal.kills(Path("run")) == {"big": 2}
    assert the_record().state == "done"
    assert not [call for call in slurm.calls() if "requeue" in call]


def test_memory_that_suits_no_image_ends_the_part(job, slurm):
    """A few ends in a row, none of which has brought an image to its end: not three for each."""
    slurm.job("5")
    Path("run").mkdir()
    behaviour = """
from dinocell.batch.journal import kills, note_start
Path("starts").open("a").write("x")
seen = kills(Path("run"))
note_start(Path("run"), min("abcdefghijkl", key=lambda name: seen[name]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    code, _ = end(job(behaviour, "shards run out 0", SLURM_JOB_ID="5"))
    assert code == 137
    assert len(Path("starts").read_text()) == 2 * journal.MAX_KILLS
    assert the_record().state == "out_of_memory"
    assert "raise mem" in the_record().reason


def test_a_part_that_is_killed_without_an_image_ends(job, slurm):
    slurm.job("5")
    code, _ = end(job("os.kill(os.getpid(), signal.SIGKILL)", "shards run out 0", SLURM_JOB_ID="5"))
    assert code == 137
    assert the_record().state == "out_of_memory"


@pytest.mark.parametrize(
    ("behaviour", "state"),
    [
        ("print('dinocell: error: no such option', file=sys.stderr); sys.exit(2)", "refused"),
        ("sys.exit('RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed.')",
         "out_of_memory"),
    ],
)  # fmt: skip
def test_ends_for_memory_of_others_are_not_ours(job, slurm, behaviour, state):
    """The count of the control group grows; the work itself says something else, or the same."""
    slurm.job("5")
    end(job(behaviour, SLURM_JOB_ID="5", GROWING_COUNT="1"))
    assert the_record().state == state


# --- what ends several processes ---


def test_srun_ends_the_first_when_another_ends_without_a_word(job, slurm):
    """TERM, and SLURM knows of nothing: such a job is not run again."""
    slurm.job("5")
    process = job(SAVES, **of(0))
    wait_until(Path("ready").exists)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 1
    assert the_record().state == "failed"
    assert "see the logs of all" in the_record().reason
    assert not [call for call in slurm.calls() if "requeue" in call]


def test_a_note_may_be_seen_late(job, slurm):
    slurm.job("5")
    process = job(SAVES, **of(0))
    wait_until(Path("ready").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None
    folder = failures_folder("run", "5", 0, 0)
    folder.mkdir(parents=True, exist_ok=True)
    note = json.dumps({"state": "failed", "reason": "process 1 of 2: the disk is full"})
    (folder / "1.json").write_text(note)
    assert end(process)[0] == 1
    assert the_record().reason == "process 1 of 2: the disk is full"


def test_an_end_by_our_own_hand_is_not_for_memory(job, slurm):
    """The other one has lost its connection, which is no cause; this one hangs and is killed."""
    slurm.job("5")
    end(job("sys.exit('dinocell: error: NCCL error: unhandled system error')", **of(1)))
    code, _ = end(job("after('ready'); time.sleep(600)", **of(0)))
    assert code == 137
    assert the_record().state == "failed"
    assert "NCCL error" in the_record().reason


def test_another_srun_of_an_allocation_is_not_blamed(job, slurm):
    slurm.job("5")
    end(job("sys.exit('dinocell: error: the disk is full')", **of(1)))
    begun = time.monotonic()
    code, output = end(job("time.sleep(3)", **{**of(0), "SLURM_STEP_ID": "1"}))
    assert code == 0, output
    assert time.monotonic() - begun < 20


def test_in_a_container_no_process_waits(job, slurm):
    """The job's script requeues, once all of them have ended."""
    bare = str(Path(sys.executable).parent)
    folder = Path("submitit")
    folder.mkdir()
    processes = []
    for rank in (1, 0):
        Path("ready").unlink(missing_ok=True)
        processes.append(job(SAVES, **of(rank), PATH=bare, SUBMITIT_FOLDER=str(folder)))
        wait_until(Path("ready").exists)
    begun = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGUSR2)
    for process in processes:
        assert end(process)[0] == 0
    assert time.monotonic() - begun < 30
    assert [path.name for path in folder.iterdir()] == ["requeue_5"]
