"""One process of a job: what it makes of signals, failures and SLURM's answers, with real children.

The supervisor runs in the process of the test, and its clock is a fake one: five seconds pass with each
look at it, and waiting takes no time.  A child sends the signals itself as soon as it is ready for them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import wait_until

from dinocell.batch import journal
from dinocell.cluster import ending, processes, supervisor
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
def tell(name): os.kill(os.getppid(), getattr(signal, name))
def hang(): time.sleep(600)
exec(Path("behaviour.py").read_text())
"""
SAVES = """
def note(number, frame):
    Path("ckpt").mkdir(exist_ok=True)
    with open("got", "a") as file:
        file.write(signal.Signals(number).name + " ")
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, note)
"""


class Clock:
    """Stands in for the module `time`: `on_look` and `on_sleep` are what happens meanwhile."""

    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.now = 0.0
        self.on_look = self.on_sleep = lambda: None
        self.stands = lambda: False  # while it is true: the child may need any time to start

    def monotonic(self) -> float:
        self.now += 0 if self.stands() else 5
        self.on_look()
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (supervisor, ending, processes):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def job(tmp_path, monkeypatch, clock, capsys):
    """Runs a supervisor over a child of the given behaviour; its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("child.py").write_text(CHILD)
    monkeypatch.setattr(
        supervisor._Supervisor,
        "_child_command",
        lambda self: [sys.executable, "-u", "child.py", *self._command()],
    )

    def run(behaviour: str, command: str = "pretrain c.yaml", *, options=None, **environment):
        Path("behaviour.py").write_text(behaviour)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            made = supervisor.SupervisedJob(tuple(command.split()), "run", **(options or {}))
            code = supervisor.supervise(made)
        return code, "".join(capsys.readouterr())

    return run


def saves(name: str) -> str:
    """Behaviour of a child that gets a signal when it listens, and saves itself."""
    return f"{SAVES}tell({name!r}); hang()"


def the_record() -> JobRecord:
    record = read_record("run")
    assert record is not None
    return record


def test_done(job):
    code, output = job("print('hello')")
    assert code == 0
    assert "hello" in output
    assert Path("child").read_text() == "pretrain c.yaml"
    assert (the_record().state, the_record().reason) == ("done", "")


@pytest.mark.parametrize(
    ("behaviour", "code", "state", "reason"),
    [
        ("sys.exit('dinocell: error: The file must exist')", 1, "failed", "The file must exist"),
        ("print('dinocell: error: no such option', file=sys.stderr); sys.exit(2)", 2, "refused",
         "no such option"),
        ("raise ValueError('odd')", 1, "failed", "ValueError: odd"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "out_of_memory", "raise mem, or lower batch size"),
        ("os.kill(os.getpid(), signal.SIGBUS)", 135, "failed", "is /dev/shm full?"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "failed", "ended by SIGSEGV"),
    ],
)  # fmt: skip
def test_ends_by_itself(job, slurm, behaviour, code, state, reason):
    """Whatever it was, it is reported and not requeued."""
    slurm.job("5")
    found, output = job(behaviour, SLURM_JOB_ID="5")
    assert found == code, output
    assert the_record().state == state
    assert reason in the_record().reason
    assert not requests(slurm)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_signal_without_slurm(job, name):
    code, _ = job(saves(name))
    assert code == 75
    assert Path("got").read_text().split() == [name]
    assert the_record().state == "stopped"
    assert "run the same command to continue" in the_record().reason


def requeues(slurm, number: str = "5") -> None:
    """SLURM ends a job that it was asked to requeue."""
    slurm.script(f"scontrol requeue {number}", "kill -TERM $PPID")


def requests(slurm) -> list[str]:
    return [call for call in slurm.calls() if "requeue" in call]


def test_signal_before_the_child_listens_is_not_lost(job, slurm):
    slurm.job("5")
    requeues(slurm)
    assert job("tell('SIGUSR2'); hang()", SLURM_JOB_ID="5")[0] == 0
    assert the_record().state == "requeued"


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
def test_what_slurm_says_decides(job, slurm, clock, shown, state, code, asks):
    slurm.job("5", **shown)
    requeues(slurm)
    if not asks:  # SLURM ends the job while the supervisor waits for that
        clock.on_sleep = lambda: os.kill(os.getpid(), signal.SIGTERM)
    found, output = job(saves("SIGTERM"), SLURM_JOB_ID="5")
    assert found == code, output
    assert the_record().state == state
    assert ("scontrol requeue 5" in slurm.calls()) == asks


def test_tasks_of_an_array_are_requeued_by_their_own_number(job, slurm):
    slurm.answer("scontrol show job -o 5", "JobId=8 ArrayJobId=5 ArrayTaskId=3 JobState=RUNNING\n")
    requeues(slurm, "5_3")
    of_array = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert job(saves("SIGUSR2"), **of_array)[0] == 0
    assert slurm.calls()[-1] == "scontrol requeue 5_3"


def test_a_refused_requeue_is_reported(job, slurm):
    slurm.job("5")
    slurm.answer("scontrol requeue 5", error="Requested operation is disabled", code=1)
    assert job(saves("SIGUSR2"), SLURM_JOB_ID="5")[0] == 75
    assert the_record().state == "stopped"
    assert "(Requested operation is disabled): submit it again" in the_record().reason


def earlier(*progress: int, job: str = "5", state: str = "requeued") -> None:
    starts = [Start(job, index, saved, 0.0, "node") for index, saved in enumerate(progress)]
    write_record("run", JobRecord(["pretrain", "c.yaml"], state, "", starts))


def test_starts_without_progress_are_bounded(job, slurm):
    slurm.job("5", Restarts=2)
    earlier(0, 0)
    code, _ = job("Path('ran').touch()", options={"max_stalled_starts": 2}, SLURM_JOB_ID="5",
                      SLURM_RESTART_COUNT="2")  # fmt: skip
    assert code == 1
    assert not Path("ran").exists()
    assert the_record().state == "stalled"
    assert "got 2 starts of job 5 without a new checkpoint" in the_record().reason
    assert len(the_record().starts) == 2
    # Another submission starts to count from zero.
    slurm.job("6")
    code, _ = job("Path('ran').touch()", options={"max_stalled_starts": 2}, SLURM_JOB_ID="6")
    assert code == 0
    assert Path("ran").exists()


def test_no_requeue_after_a_standstill(job, slurm):
    slurm.job("5", Restarts=1)
    earlier(0)
    two = {"max_stalled_starts": 2}
    assert job(saves("SIGUSR2"), options=two, SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")[0] == 1
    assert the_record().state == "stalled"
    assert not requests(slurm)


def test_a_folder_in_which_another_job_runs_is_refused(job, slurm):
    slurm.job("4")
    slurm.job("5")
    earlier(3, job="4", state="running")
    code, output = job("Path('ran').touch()", SLURM_JOB_ID="5")
    assert code == 1
    assert "where job 4 is running" in output
    assert [start.job for start in the_record().starts] == ["4"]
    slurm.job("4", JobState="COMPLETED")  # killed before it could write its end
    assert job("Path('ran').touch()", SLURM_JOB_ID="5")[0] == 0


def test_a_child_that_does_not_save_in_time_is_ended(job, slurm, clock):
    slurm.job("5")
    requeues(slurm)
    behaviour = "signal.signal(signal.SIGUSR2, signal.SIG_IGN); tell('SIGUSR2'); hang()"
    code, output = job(behaviour, options={"signal_ahead_s": 60}, SLURM_JOB_ID="5")
    assert code == 0, output
    assert clock.now > 45, "it may save itself until fifteen seconds before the end"
    assert "its last checkpoint counts" in output
    assert the_record().state == "requeued"


WITH_WORKER = """
worker = subprocess.Popen([sys.executable, "-c",
    "import signal, time; from pathlib import Path\\n"
    "for n in (signal.SIGTERM, signal.SIGUSR2): signal.signal(n, lambda *a: Path('worker_got').touch())\\n"
    "Path('worker').write_text('x'); time.sleep(600)"])
while not Path("worker").exists():
    time.sleep(0.01)
def note(number, frame):
    worker.kill()
    sys.exit(75)
signal.signal(signal.SIGUSR2, note)
Path("group").write_text(str(os.getpgid(0)))
tell("SIGUSR2")
hang()
"""


def test_workers_of_the_child_get_no_signal(job):
    """SLURM signals whole process groups."""
    assert job(WITH_WORKER)[0] == 75
    assert int(Path("group").read_text()) != os.getpgid(0)
    assert not Path("worker_got").exists()


START = """
import os, sys
from dinocell.cluster import supervisor
wait = "from pathlib import Path; import os, time; Path('ready').write_text(str(os.getpid())); time.sleep(600)"
supervisor._Supervisor._child_command = lambda self: [sys.executable, "-c", wait]
supervisor.supervise(supervisor.SupervisedJob(("pretrain", "c.yaml"), "run"))
"""


def test_nothing_outlives_a_killed_supervisor(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", START], env=environment, cwd=tmp_path)
    ready = tmp_path / "ready"
    wait_until(lambda: process.poll() is not None or (ready.exists() and ready.read_text()))
    child = int(ready.read_text())
    process.kill()
    process.wait()

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
    code, _ = job("sys.exit('dinocell: error: the disk is full')", **of(1))
    assert code == 1
    assert not (Path("run") / "job.json").exists()  # of the first process only
    code, _ = job("sys.exit('RuntimeError: Connection closed by peer')", **of(0))
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


def seen(clock) -> list[tuple[str, str]]:
    """State and reason of the record, whenever the supervisor looks at the clock."""
    states: list[tuple[str, str]] = []
    clock.on_look = lambda: states.append((the_record().state, the_record().reason))
    return states


def test_a_process_that_hangs_after_another_failed_is_ended(job, slurm, clock):
    """srun sends TERM; a process in an exchange with the one that is gone does not react."""
    slurm.job("5")
    job("sys.exit('dinocell: error: the disk is full')", **of(1))
    states = seen(clock)
    clock.stands = lambda: not Path("sent").exists()
    behaviour = "signal.signal(signal.SIGTERM, signal.SIG_IGN); tell('SIGTERM'); Path('sent').touch(); hang()"
    assert job(behaviour, **of(0))[0] == 1
    assert ("stopping", "process 1 of 2: the disk is full") in states  # should SLURM end it then
    assert the_record().state == "failed"
    assert not requests(slurm)


def test_a_process_that_waits_for_one_that_failed_is_ended(job, slurm):
    """Also where nothing ends it: a script whose srun does not kill on a bad exit."""
    slurm.job("5")
    note = {"state": "failed", "reason": "process 1 of 2: the disk is full"}
    folder = failures_folder("run", "5", 0, 0)
    fails = f"os.makedirs({str(folder)!r}); Path({str(folder / '1.json')!r}).write_text({json.dumps(note)!r})"
    assert job(f"{fails}; hang()", **of(0))[0] == 137
    assert the_record().reason == "process 1 of 2: the disk is full"
    assert the_record().state == "failed"


def test_work_of_one_process_runs_once(job, slurm):
    slurm.job("5")
    assert job("Path('ran').touch()", "segment x -o out", **of(1))[0] == 0
    assert not Path("ran").exists()
    assert job("Path('ran').touch()", "segment x -o out", **of(0))[0] == 0
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
def test_what_starts_over_does_so_once(job, slurm, command, flag, name, later, there):
    """Also if a job is cut before it came to that."""
    if there:
        settle(name)
    for restart in (0, 1):
        slurm.job("5", Restarts=restart)
        job("", f"{command} {flag}", SLURM_JOB_ID="5", SLURM_RESTART_COUNT=str(restart))
        assert Path("child").read_text() == f"{command} {flag}"
    for restart in (2, 3):
        settle(name)  # written again by every start
        job("", f"{command} {flag}", SLURM_JOB_ID="5", SLURM_RESTART_COUNT=str(restart))
        assert Path("child").read_text() == later
    slurm.job("6")
    job("", f"{command} {flag}", SLURM_JOB_ID="6")
    assert Path("child").read_text() == f"{command} {flag}"


def test_what_is_left_aside_is_no_progress(job, slurm):
    """An earlier run of 900 iterations; this one starts over and gets on with each start."""
    put_aside = "import shutil; shutil.rmtree('run/ckpt'); Path('run/ckpt').mkdir()"
    for restart, (saved, behaviour) in enumerate([(899, put_aside), (9, ""), (19, "")]):
        (Path("run/ckpt") / str(saved)).mkdir(parents=True)
        slurm.job("5", Restarts=restart)
        code, output = job(
            behaviour, "pretrain c.yaml --no-resume", options={"max_stalled_starts": 2},
            SLURM_JOB_ID="5", SLURM_RESTART_COUNT=str(restart),
        )  # fmt: skip
        assert code == 0, output
    assert [start.progress for start in the_record().starts] == [0, 10, 20]


def test_later_starts_of_a_segmentation_continue(job, slurm):
    slurm.job("5", Restarts=1)
    earlier(0)
    settle("settings.json")
    job("", "segment x -o out --overwrite", SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
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
def test_the_same_submission_continues_after_a_cancellation(job, slurm, command, state, expected):
    """Only the very same; what was finished is not touched."""
    before = command if "y" not in command.split() else "segment x -o out"
    starts = [Start("4", 0, 0, 0.0, "node")]
    write_record("run", JobRecord(before.split(), state, "", starts))
    slurm.job("4", JobState="CANCELLED")
    slurm.job("5")
    job("", command, SLURM_JOB_ID="5")
    assert Path("child").read_text() == expected


def test_the_end_of_each_job_is_kept(job, slurm):
    slurm.job("5")
    slurm.job("6")
    job("sys.exit('dinocell: error: an accident')", SLURM_JOB_ID="5")
    job("", SLURM_JOB_ID="6")
    assert the_record().ends == {"5": ("failed", "an accident", ""), "6": ("done", "", "")}
    assert the_record().end_of("5") == ("failed", "an accident", "")


def test_a_job_that_runs_again_has_no_end(job, slurm, clock):
    slurm.job("5")
    job("sys.exit('dinocell: error: an accident')", SLURM_JOB_ID="5")
    slurm.job("5", Restarts=1)
    ends: list = []
    wait = "while not Path('go').exists(): time.sleep(0.01)"
    clock.on_look = lambda: (ends.append(the_record().end_of("5")), Path("go").touch())
    job(wait, SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
    assert set(ends) == {None}


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
    job(saves("SIGTERM"), command, SLURM_JOB_ID="5")
    assert the_record().state == "cancelled"
    assert the_record().reason.endswith(advice)


def test_a_sentence_is_printed_once(job):
    _, output = job("sys.exit('dinocell: error: an accident')")
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
    code, output = job(HUNGRY, "shards run out 0", SLURM_JOB_ID="5")
    assert code == 0, output
    assert output.count("with 1 unfinished images") == 2
    assert journal.kills(Path("run")) == {"big": 2}
    assert the_record().state == "done"
    assert not requests(slurm)


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
    code, _ = job(behaviour, "shards run out 0", SLURM_JOB_ID="5")
    assert code == 137
    assert len(Path("starts").read_text()) == 2 * journal.MAX_KILLS
    assert the_record().state == "out_of_memory"
    assert "raise mem" in the_record().reason


def test_a_part_that_is_killed_without_an_image_ends(job, slurm):
    slurm.job("5")
    code, _ = job("os.kill(os.getpid(), signal.SIGKILL)", "shards run out 0", SLURM_JOB_ID="5")
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
def test_ends_for_memory_of_others_are_not_ours(job, slurm, monkeypatch, behaviour, state):
    """The count of the control group grows; the work itself says something else, or the same."""
    monkeypatch.setattr(supervisor, "oom_kills", itertools.count().__next__)
    slurm.job("5")
    job(behaviour, SLURM_JOB_ID="5")
    assert the_record().state == state


# --- what ends several processes ---


def test_srun_ends_the_first_when_another_ends_without_a_word(job, slurm):
    """TERM, and SLURM knows of nothing: such a job is not run again."""
    slurm.job("5")
    assert job(saves("SIGTERM"), **of(0))[0] == 1
    assert the_record().state == "failed"
    assert "see the logs of all" in the_record().reason
    assert not requests(slurm)


def test_a_note_may_be_seen_late(job, slurm, clock):
    slurm.job("5")
    folder = failures_folder("run", "5", 0, 0)
    note = json.dumps({"state": "failed", "reason": "process 1 of 2: the disk is full"})

    def others_write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "1.json").write_text(note)

    clock.on_sleep = others_write
    assert job(saves("SIGTERM"), **of(0))[0] == 1
    assert the_record().reason == "process 1 of 2: the disk is full"


def test_an_end_by_our_own_hand_is_not_for_memory(job, slurm):
    """The other one has lost its connection, which is no cause; this one hangs and is killed."""
    slurm.job("5")
    job("sys.exit('dinocell: error: NCCL error: unhandled system error')", **of(1))
    code, _ = job("hang()", **of(0))
    assert code == 137
    assert the_record().state == "failed"
    assert "NCCL error" in the_record().reason


def test_another_srun_of_an_allocation_is_not_blamed(job, slurm, clock):
    slurm.job("5")
    job("sys.exit('dinocell: error: the disk is full')", **of(1))
    looks = itertools.count(1)
    clock.on_look = lambda: Path("go").touch() if next(looks) > 5 else None
    wait = "while not Path('go').exists(): time.sleep(0.01)"
    code, output = job(wait, **{**of(0), "SLURM_STEP_ID": "1"})
    assert code == 0, output


def test_in_a_container_no_process_waits(job, clock, monkeypatch):
    """The job's script requeues, once all of them have ended."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    clock.on_sleep = lambda: pytest.fail("a process waited")
    folder = Path("submitit")
    folder.mkdir()
    for rank in (1, 0):
        assert job(saves("SIGUSR2"), **of(rank), SUBMITIT_FOLDER=str(folder))[0] == 0
    assert [path.name for path in folder.iterdir()] == ["requeue_5"]
