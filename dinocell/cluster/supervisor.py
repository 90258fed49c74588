"""One process of a job: runs a `dinocell` command, hands signals on, and decides what comes next.

The command runs in a process of its own.  So a signal that arrives while it is still loading is not
lost, a child that the kernel kills for its memory still leaves a sentence, and all rules about
requeueing are in one place, for submitit's jobs, plain sbatch scripts and `--local` alike:

- told to stop (USR2 ahead of the time limit or a preemption, TERM): the child saves itself and ends;
  the job is requeued, unless it was cancelled, or has made no progress in several starts;
- ended by itself: done, or failed; neither is requeued.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

from dinocell.batch.journal import MAX_KILLS, suspect_unfinished_images
from dinocell.cluster.record import (
    BEGINS_ANEW,
    JobRecord,
    Start,
    Submission,
    failures_folder,
    first_failure,
    goes_on,
    note_submission,
    read_record,
    read_submissions,
    run_progress,
    saved_progress,
    work_mark,
    write_record,
)
from dinocell.cluster.slurm import cluster_name, job_states, own_job, requeue
from dinocell.errors import StoppedError, UsageError
from dinocell.files import atomic_path, write_text_atomically

__all__ = ["REQUEUE_WISH", "SupervisedJob", "supervise"]

REQUEUE_WISH = "requeue_"
"""Beginning of the name of the file that asks a job's script to requeue it, before its number."""

_STOPPED = StoppedError.exit_code
_HANDED_ON = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_WAIT_FOR_END_S = 90.0  # for SLURM to end a job that it has requeued
_LINES_KEPT = 200
_FRUITLESS_KILLS = 2 * MAX_KILLS  # in a row, with no image done: the memory suits none of them
_SURVIVES_S = 1.0  # whoever ends a task whole ends this process by then, and no image is blamed
_OTHERS_TELL_S = 3.0  # for the process that failed first to write down why
_FAR_OTHERS_TELL_S = 10.0  # the same, where a network folder may show its note late
_LEFT_ALONE_S = 10.0  # for a process to end by itself when another of its job has failed
_OF_MANY_PROCESSES = ("pretrain", "train")


@dataclass(frozen=True)
class SupervisedJob:
    """A `dinocell` command as a job; calling it runs the command in this process's place.

    Attributes
    ----------
    command : arguments of `dinocell`, such as ("pretrain", "config.yaml", "-o", "runs/a")
    run_dir : folder of the run; gets `job.json`
    signal_ahead_s : seconds between the signal and the end; a child that is not done saving by then
        is ended, and its last checkpoint counts
    max_stalled_starts : see `SiteProfile`
    processes : of one machine, started here through torchrun; under SLURM srun starts them
    """

    command: tuple[str, ...]
    run_dir: str
    signal_ahead_s: int = 120
    max_stalled_starts: int = 5
    processes: int = 1

    def __call__(self) -> None:
        code = supervise(self)
        if code:
            sys.exit(code)

    def checkpoint(self) -> Any:
        """For a signal that arrives before `__call__`: submitit requeues the job as it is."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def supervise(
    job: SupervisedJob,
    *,
    log: str | Path | None = None,
    in_slurm: bool = True,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a job's command and deal with its end.

    Parameters
    ----------
    job : SupervisedJob
    log : file, optional
        Also gets what the command prints; otherwise SLURM keeps it.
    in_slurm : bool
        Whether the SLURM job around this process, if there is one, is this job's own.  A run that is
        started by hand in somebody's interactive job must not requeue that.
    environment : mapping, optional
        Variables of the command beyond those of this process.

    Returns
    -------
    int
        Exit code of this process: 0 done, 75 stopped, otherwise the command's own.
    """
    return _Supervisor(job, log, in_slurm, environment or {}).run()


class _Supervisor:
    def __init__(
        self,
        job: SupervisedJob,
        log: str | Path | None,
        in_slurm: bool,
        environment: Mapping[str, str],
    ) -> None:
        self.job = job
        # Logs have tracebacks of what fails, not of wrong calls.
        self.environment = {**os.environ, "DINOCELL_TRACEBACKS": "failures", **environment}
        if not in_slurm:
            # What runs beside a job of SLURM's is no task of it.
            self.environment.pop("SLURM_STEP_ID", None)
        self.log_path = None if log is None else Path(log)
        in_step = in_slurm and "SLURM_STEP_ID" in os.environ
        self.rank = int(os.environ.get("SLURM_PROCID", 0)) if in_step else 0
        self.world = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if in_step else 1
        self.number = (own_job() or "") if in_slurm else ""
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.step = int(os.environ["SLURM_STEP_ID"]) if in_step else 0
        self.received: signal.Signals | None = None
        self.told_to_end = False
        self.killed_it = False
        self.fruitless = 0
        self.images_done = saved_progress(job.command, job.run_dir)
        self.child: subprocess.Popen[bytes] | None = None
        self.tail: deque[str] = deque(maxlen=_LINES_KEPT)
        self.record = read_record(job.run_dir) or JobRecord(list(job.command))
        # The same submission after a cancellation goes on, as that one has promised.
        self.goes_on = goes_on(job.command, job.run_dir)
        self.record.command = list(job.command)
        self.earlier = self._earlier_starts()
        mark = self._mark()
        self.first_mark = self.earlier[0].mark if self.earlier else mark

    def _earlier_starts(self) -> list[Start]:
        """Starts of this submission before the present one; an allocation may have had others."""
        found: list[Start] = []
        limit = self.restart
        for start in reversed(self.record.starts):
            if not self.number or start.job != self.number or start.restart > limit:
                break
            if start.restart < limit:
                found.insert(0, start)
                limit = start.restart
            elif found:
                break
        return found

    def _mark(self) -> str:
        return work_mark(self.job.command, self.job.run_dir)

    def _begins_anew(self) -> bool:
        """Whether the command shall leave aside what is there, and no start has come to that yet."""
        flag = BEGINS_ANEW.get(self.job.command[0])
        return flag in self.job.command and self._mark() == self.first_mark

    def _saved(self) -> int:
        """What a new start would not do again."""
        if self._begins_anew():
            return 0
        return saved_progress(self.job.command, self.job.run_dir)

    # --- the course of a job ---

    def run(self) -> int:
        if self.world > 1 and self.job.command[0] not in _OF_MANY_PROCESSES:
            if self.rank:
                return 0
            _say(
                f"{self.job.command[0]} is one process: the other {self.world - 1} have nothing to do"
            )
            self.world = 1
        before: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._note) for number in _HANDED_ON
        }
        before[signal.SIGCONT] = signal.signal(signal.SIGCONT, _ignore)  # comes with every TERM
        try:
            # The first process decides for all: srun ends the others when it leaves.
            if self.rank == 0 and (self._is_in_other_hands() or self._gives_up_at_once()):
                return 1
            self._begin()
            while True:
                oom_before = _oom_kills()
                code = self._run_child()
                memory_ran_out = _oom_kills() > oom_before
                if not self._goes_on_without_suspects(code, memory_ran_out):
                    return self._end(code, memory_ran_out)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _goes_on_without_suspects(self, code: int, memory_ran_out: bool) -> bool:
        """Of many images, one that needs too much memory must not cost the others.

        It ends: an image is given up after `journal.MAX_KILLS` times, and all of them when some such
        ends in a row have brought none to its end.
        """
        killed = code == -signal.SIGKILL or (code != 0 and self._for_memory(memory_ran_out))
        told = self.received is not None or self.told_to_end or self.killed_it
        if self.job.command[:2] != ("shards", "run") or not killed or told:
            return False
        time.sleep(_SURVIVES_S)
        done = saved_progress(self.job.command, self.job.run_dir)
        self.fruitless = self.fruitless + 1 if done == self.images_done else 0
        self.images_done = done
        if self.fruitless >= _FRUITLESS_KILLS:
            return False
        count = suspect_unfinished_images(Path(self.job.run_dir))
        if count:
            _say(
                f"killed, probably for its memory, with {count} images in work: the others come first, "
                "then these one at a time"
            )
            self.child = None  # signals are for the next one
        return count > 0

    def _is_in_other_hands(self) -> bool:
        """Whether another job works in this folder; its record is left alone."""
        last = self.record.starts[-1] if self.record.starts else None
        if last is None or not last.job or last.job == self.number:
            return False
        if self.record.state not in ("running", "stopping"):
            return False
        state = job_states([last.job]).get(last.job)
        if state is None or state.state not in ("RUNNING", "SUSPENDED"):
            return False
        _say(
            f"a run must be in the hands of one job, got {self.job.run_dir}, which job {last.job} has: "
            "wait for it, or cancel it"
        )
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.child is not None and self.child.poll() is not None:
            self.told_to_end = True  # SLURM ends what it has requeued
            return
        self.received = self.received or signal.Signals(number)
        if self.child is not None:
            self._hand_on(self.child, signal.Signals(number))

    def _hand_on(self, child: subprocess.Popen[bytes], number: signal.Signals) -> None:
        if self.job.processes > 1:
            number = signal.SIGTERM  # the only one that torchrun hands on
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    def _gives_up_at_once(self) -> bool:
        """After requeues that SLURM made itself (a node died) there was no decision yet."""
        if not self._is_stalled(self._saved()):
            return False
        self._close("stalled", self._stalled_sentence())
        return True

    def _is_stalled(self, progress: int) -> bool:
        count = self.record.stalled_starts(self.number, progress)
        return bool(self.number) and count >= self.job.max_stalled_starts

    def _stalled_sentence(self) -> str:
        return (
            f"a requeued job must get on between its starts, got {self.job.max_stalled_starts} starts "
            f"of job {self.number} without a new checkpoint: lengthen the time limit, save more often, "
            f"or look at its log, and {self._again()}"
        )

    def _again(self) -> str:
        flag = BEGINS_ANEW.get(self.job.command[0])
        without = f" without {flag}" if flag in self.job.command else ""
        return f"submit it again{without} to go on"

    def _begin(self) -> None:
        if self.rank:
            return
        self.record.starts.append(
            Start(
                self.number, self.restart, self._saved(), time.time(), socket.gethostname(),
                self._mark(),
            )
        )  # fmt: skip
        self.record.state, self.record.reason = "running", ""
        self.record.ends.pop(self.number, None)
        write_record(self.job.run_dir, self.record)
        if self.number and not self.restart:
            self._enlist()
        again = f", requeued {self.restart} times" if self.restart else ""
        _say(
            f"start {len(self.record.starts)} of {' '.join(self.job.command)}"
            + (f" (job {self.number}{again})" if self.number else "")
        )

    def _enlist(self) -> None:
        """For `dinocell jobs`: a script that was handed to sbatch by itself is not in its list."""
        cluster = cluster_name()
        if any((item.cluster, item.job) == (cluster, self.number) for item in read_submissions()):
            return
        state = job_states([self.number]).get(self.number)
        run_dir = Path(self.job.run_dir).resolve()
        item = Submission(
            self.number,
            os.environ.get("SLURM_JOB_NAME", run_dir.name),
            list(self.job.command),
            str(run_dir),
            "" if state is None else state.log,
            time.time(),
            cluster,
        )
        with contextlib.suppress(OSError):  # a home that nodes cannot write to
            note_submission([item])

    def _run_child(self) -> int:
        """The command's exit code, negative for a signal."""
        # A session of its own: SLURM signals whole process groups, and the loader's workers of a
        # training must not get what is meant for the training.
        self.child = subprocess.Popen(
            self._child_command(),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )
        if self.received is not None:  # between the handlers and the child
            self._hand_on(self.child, self.received)
        log = None if self.log_path is None else _opened(self.log_path)
        readers = [
            threading.Thread(target=self._pass_on, args=(source, target, log), daemon=True)
            for source, target in (
                (self.child.stdout, sys.stdout),
                (self.child.stderr, sys.stderr),
            )
        ]
        for reader in readers:
            reader.start()
        code = self._wait(self.child)
        for reader in readers:
            reader.join(timeout=5)
        if log is not None:
            log.close()
        return code

    def _child_command(self) -> list[str]:
        return [*self._python(), "-m", "dinocell", *self._command()]

    def _command(self) -> list[str]:
        """The command; a start after the first must go on, whatever was said to the first."""
        command = list(self.job.command)
        flag = BEGINS_ANEW.get(command[0])
        again = bool(self.earlier) or (self.goes_on and flag not in command)
        if not again or self._begins_anew():
            return command
        command = [item for item in command if item not in (flag, "--resume")]
        return [*command, "--resume"] if command[0] == "segment" else command

    def _python(self) -> list[str]:
        python = [sys.executable, "-u"]
        if self.job.processes == 1:
            return python
        count = f"--nproc-per-node={self.job.processes}"
        return [*python, "-m", "torch.distributed.run", "--standalone", count]

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        deadline = math.inf
        signalled = killed = False
        next_look = 0.0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=0.2)
            now = time.monotonic()
            if self.received is not None and self.number and not signalled:
                signalled = True
                deadline = now + max(self.job.signal_ahead_s - 15, 5)
                self._remember_signal()
            if self.world > 1 and now >= next_look:
                next_look = now + 1
                if deadline > now + _LEFT_ALONE_S and self._others_failed():
                    # It may hang in an exchange with the one that is gone.
                    deadline = now + _LEFT_ALONE_S
                    self._remember_signal()
            if now > deadline and not killed:
                killed = self.killed_it = True
                _say("the work did not save itself in time; its last checkpoint counts")
                child.kill()

    def _remember_signal(self) -> None:
        """Should SLURM end this process too before it has decided, the record says why."""
        if self.rank == 0:
            name = "" if self.received is None else f"{self.received.name}: saving"
            self.record.state = "stopping"
            self.record.reason = self._first_failure()[1] or name
            write_record(self.job.run_dir, self.record)

    def _pass_on(self, source: IO[bytes] | None, target: Any, log: IO[bytes] | None) -> None:
        assert source is not None
        with source:
            for line in iter(source.readline, b""):
                text = line.decode("utf-8", "replace")
                self.tail.append(text.rstrip("\n"))
                with contextlib.suppress(OSError, ValueError):  # a closed terminal stops no work
                    target.write(text)
                    target.flush()
                if log is not None:
                    log.write(line)
                    log.flush()

    # --- the end ---

    def _end(self, code: int, memory_ran_out: bool) -> int:
        if code == 0:
            if self.rank == 0:
                self._close("done", "")
            return 0
        if code == _STOPPED or (self.received is not None and code != 2):
            # With a signal on its way, an end by error is as good: the next start tells.
            return self._stopped()
        state, reason = self._failure(code, memory_ran_out)
        self._note_failure(state, reason)
        if self.rank == 0:
            if self.world > 1:
                time.sleep(_OTHERS_TELL_S)
                told = self._first_failure()
                state, reason = (state, reason) if told == ("", "") else told
            self._close(state, reason)
        else:
            _say(reason)
        return code if code > 0 else 128 - code

    def _stopped(self) -> int:
        name = self.received.name if self.received is not None else "a signal to another process"
        if not self.number:
            self._close("stopped", f"stopped by {name}: run the same command to go on")
            return _STOPPED
        if self.rank:
            if not self._script_requeues():
                self._wait_for_end()  # ending early would make srun end the one that requeues
            return 0
        if self._others_failed():
            self._close(*self._first_failure())
            return 1
        state = job_states([self.number]).get(self.number)
        if state is not None and state.restarts > self.restart:
            self._close("requeued", f"{name}: SLURM runs the job again")
            self._wait_for_end()
            return 0
        ran_out = (
            state is not None
            and state.run_s is not None
            and state.limit_s is not None
            and state.run_s >= state.limit_s
        )
        preempted = state is not None and state.preempted
        ended = state is not None and state.state in ("COMPLETING", "CANCELLED")
        if ended and not ran_out and not preempted:  # preempted without grace, it is ended too
            self._close(
                "cancelled",
                f"{name}: job {self.number} was cancelled; what it had is saved, {self._again()}",
            )
            return 128 + signal.SIGTERM
        # Without a reason of SLURM's own, srun ends this process because another one has ended.
        by_srun = self.world > 1 and self.received == signal.SIGTERM and not (preempted or ran_out)
        if by_srun and (self._others_failed(within_s=_FAR_OTHERS_TELL_S) or state is not None):
            self._close(*self._cause())
            return 1
        if self._is_stalled(self._saved()):
            self._close("stalled", self._stalled_sentence())
            return 1
        why = "preemption" if preempted else "time limit or request"
        self._close("requeued", f"{name} ({why}): the job goes on when it is its turn again")
        if self._script_requeues():
            Path(os.environ["SUBMITIT_FOLDER"], f"{REQUEUE_WISH}{self.number}").touch()
            return 0
        problem = requeue(self.number)
        if problem:
            self._close(
                "stopped",
                f"{name}: everything is saved, but SLURM does not requeue job {self.number} "
                f"({problem}): {self._again()}",
            )
            return _STOPPED
        self._wait_for_end()
        return 0

    def _script_requeues(self) -> bool:
        """In a container, which seldom has SLURM's commands, the job's script does it."""
        return shutil.which("scontrol") is None and bool(os.environ.get("SUBMITIT_FOLDER"))

    def _wait_for_end(self) -> None:
        """Leaving by itself, a job would count as finished before SLURM has requeued it."""
        deadline = time.monotonic() + _WAIT_FOR_END_S
        while not self.told_to_end and time.monotonic() < deadline:
            time.sleep(0.2)

    def _failure(self, code: int, memory_ran_out: bool) -> tuple[str, str]:
        """State and sentence of work that ended by itself."""
        whose = f"process {self.rank} of {self.world} on {socket.gethostname()}"
        if self.killed_it and not memory_ran_out:
            return "failed", (
                f"processes must end when another one has failed, got {whose} that did not and was "
                "killed: look at the logs of the others"
            )
        said = _last_sentence(self.tail)
        if code == -signal.SIGKILL or self._for_memory(memory_ran_out):
            certain = "was" if memory_ran_out else "was probably"
            return "out_of_memory", (
                f"the work must fit into the job's memory, got {whose} killed: it {certain} the memory "
                "of the node; raise mem, or lower batch size, workers and caches (not requeued: it "
                "would happen again)"
            )
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; is /dev/shm full?" if name == "SIGBUS" else ""
            return (
                "failed",
                f"the work must end by itself, got {whose} ended by {name}{hint}: see the log",
            )
        state = "refused" if code == UsageError.exit_code else "failed"
        return state, said or f"{whose} ended with exit code {code}: see the log"

    def _for_memory(self, memory_ran_out: bool) -> bool:
        """Where the control group is not the job's own, its count is of others too."""
        said = _last_sentence(self.tail)
        return memory_ran_out and re.search("kill|memory", said, re.IGNORECASE) is not None

    def _note_failure(self, state: str, reason: str) -> None:
        """For the first process, which fails next and would otherwise tell the wrong reason."""
        if self.world == 1 or self.killed_it:
            return
        folder = self._failures_folder()
        note = {"state": state, "reason": f"process {self.rank} of {self.world}: {reason}"}
        with contextlib.suppress(OSError):
            path = folder / f"{time.time():017.3f}_rank{self.rank}.json"
            write_text_atomically(path, json.dumps(note))

    def _failures_folder(self) -> Path:
        return failures_folder(self.job.run_dir, self.number, self.restart, self.step)

    def _others_failed(self, within_s: float = 0.0) -> bool:
        """Whether a note says so; notes of other machines may take a while to be seen."""
        deadline = time.monotonic() + within_s
        while self._first_failure() == ("", ""):
            if self.world == 1 or time.monotonic() >= deadline:
                return False
            with (
                contextlib.suppress(OSError),  # a change of one's own makes NFS list a folder anew
                atomic_path(self._failures_folder() / "looked") as temporary,
            ):
                temporary.touch()
            time.sleep(0.5)
        return True

    def _cause(self) -> tuple[str, str]:
        told = self._first_failure()
        if told != ("", ""):
            return told
        return "failed", (
            "the processes of a job must end together, got the end of another one than the first: see "
            "the logs of all"
        )

    def _first_failure(self) -> tuple[str, str]:
        if self.world == 1:
            return "", ""
        return first_failure(self.job.run_dir, self.number, self.restart, self.step)

    def _close(self, state: str, reason: str) -> None:
        self.record.state, self.record.reason = state, reason
        progress = run_progress(self.job.command, self.job.run_dir)
        told = "" if progress is None else str(progress)
        self.record.ends[self.number] = (state, reason, told)
        write_record(self.job.run_dir, self.record)
        said = reason == _last_sentence(self.tail)  # the work itself has printed it
        _say(state if said else reason or state)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"dinocell: {sentence}", file=sys.stderr, flush=True)


def _opened(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def _last_sentence(lines: Sequence[str]) -> str:
    """The command's own error message, else its last line."""
    mark = "dinocell: error: "
    for line in reversed(lines):
        if line.startswith(mark):
            return line.removeprefix(mark)
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _die_with_parent(parent: int) -> None:
    """In the child: be killed when the parent is, which has its own session (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before that
            os.kill(os.getpid(), signal.SIGKILL)


def _oom_kills() -> int:
    """Processes that the kernel has killed for memory in this job's control group, 0 if unknown."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            candidates = [Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events"]
        elif "memory" in controllers.split(","):
            folder = Path("/sys/fs/cgroup/memory") / path.lstrip("/")
            candidates = [folder / "memory.oom_control"]
        else:
            continue
        for candidate in candidates:
            with contextlib.suppress(OSError, ValueError):
                for entry in candidate.read_text(encoding="utf-8").splitlines():
                    if entry.startswith("oom_kill "):
                        return int(entry.split()[1])
    return 0
