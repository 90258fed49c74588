"""One process of a job: runs a `dinocell` command, passes signals on, and decides what comes next.

The command runs in a process of its own.  So a signal that arrives while it is still loading is not
lost, a child that the kernel kills for its memory still leaves a sentence, and all rules about
requeueing are in one place, for submitit's jobs, plain sbatch scripts and runs without a cluster alike:

- after a signal (USR2 ahead of the time limit or a preemption, TERM) the child saves itself and ends;
  the job is requeued, unless it was cancelled, or has made no progress in several starts;
- a child that ends by itself is done or has failed; neither is requeued.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from dinocell.batch.journal import MAX_KILLS, suspect_unfinished_images
from dinocell.cluster.child import Child, oom_kills
from dinocell.cluster.commands import command_of
from dinocell.cluster.ending import (
    StopCause,
    failure_of,
    request_requeue,
    script_requeues,
    wait_for_end,
)
from dinocell.cluster.processes import Processes
from dinocell.cluster.record import (
    JobRecord,
    Start,
    Submission,
    continues_run,
    note_submission,
    read_record,
    read_submissions,
    run_progress,
    work_mark,
    write_record,
)
from dinocell.cluster.slurm import cluster_name, job_states, requeue
from dinocell.errors import StoppedError, UsageError

_STOPPED = StoppedError.exit_code
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_FRUITLESS_KILLS = 2 * MAX_KILLS  # in a row, with no image done: none of them fits into the memory
_SURVIVES_S = 1.0  # what kills a whole task kills this process by then, and no image is blamed
_OTHERS_NOTE_S = 3.0  # for the process that failed first to write down why
_FAR_OTHERS_NOTE_S = 10.0  # the same, where a network folder may show its note late
_LEFT_ALONE_S = 10.0  # for a process to end by itself when another of its job has failed


@dataclass(frozen=True)
class SupervisedJob:
    """A `dinocell` command as a job; calling it runs the command in this process's place."""

    # arguments of `dinocell`, such as ("pretrain", "config.yaml", "-o", "runs/a")
    command: tuple[str, ...]
    run_dir: str  # folder of the run; gets `job.json`
    # seconds between the signal and the end; a child that is not done saving by then is killed, and
    # its last checkpoint counts
    signal_ahead_s: int = 120
    max_stalled_starts: int = 5  # see `SiteProfile`
    # of one machine, started here through torchrun; under SLURM srun starts them
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
    log: Path | None = None,
    in_slurm: bool = True,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a job's command and deal with its end; the exit code: 0 done, 75 stopped, or the command's own.

    Parameters
    ----------
    log : also gets what the command prints; otherwise SLURM keeps it
    in_slurm : whether the SLURM job around this process, if there is one, is this job's own.  A run
        that is started by hand inside an interactive job must not requeue that job
    environment : variables of the command beyond those of this process
    """
    return _Supervisor(job, log, in_slurm, environment or {}).run()


class _Supervisor:
    def __init__(
        self, job: SupervisedJob, log: Path | None, in_slurm: bool, environment: Mapping[str, str]
    ) -> None:
        self.job = job
        self.kind = command_of(job.command)
        self.me = Processes(job.run_dir, in_slurm=in_slurm)
        # Logs have tracebacks of what fails, not of wrong calls.
        self.environment = {**os.environ, "DINOCELL_TRACEBACKS": "failures", **environment}
        if not in_slurm:
            # What runs beside a job of SLURM's is no task of it.
            self.environment.pop("SLURM_STEP_ID", None)
        self.log_path = log
        self.received: signal.Signals | None = None
        self.must_end = False
        self.killed_it = False
        self.fruitless = 0
        self.images_done = self.kind.saved(Path(job.run_dir))
        self.child: Child | None = None
        self.record = read_record(job.run_dir) or JobRecord(list(job.command))
        # The same submission after a cancellation continues, as the cancelled job has promised.
        self.continues = continues_run(job.command, job.run_dir)
        self.record.command = list(job.command)
        self.earlier = self._earlier_starts()
        self.mark = partial(work_mark, job.command, job.run_dir)
        self.first_mark = self.earlier[0].mark if self.earlier else self.mark()

    # --- starts: the first may start over, later ones continue ---

    def _earlier_starts(self) -> list[Start]:
        """Starts of this submission before the present one; an allocation may have had others."""
        found: list[Start] = []
        limit = self.me.restart
        for start in reversed(self.record.starts):
            other = not self.me.job or start.job != self.me.job or start.restart > limit
            if other or (found and start.restart == limit):
                break
            if start.restart < limit:
                found.insert(0, start)
                limit = start.restart
        return found

    def _starts_over(self) -> bool:
        """Whether the command must replace what the folder has, and no start has done so yet."""
        return self.kind.start_over_flag in self.job.command and self.mark() == self.first_mark

    def _saved(self) -> int:
        """What a new start would not repeat."""
        return 0 if self._starts_over() else self.kind.saved(Path(self.job.run_dir))

    def _command(self) -> list[str]:
        """The command; a start after the first continues, whatever options the first had."""
        command, flag = list(self.job.command), self.kind.start_over_flag
        again = bool(self.earlier) or (self.continues and flag not in command)
        if not again or self._starts_over():
            return command
        resume = [self.kind.resume_flag] if self.kind.resume_flag else []
        return [item for item in command if item not in (flag, *resume)] + resume

    def _child_command(self) -> list[str]:
        python = [sys.executable, "-u"]
        if self.job.processes > 1:
            count = f"--nproc-per-node={self.job.processes}"
            python += ["-m", "torch.distributed.run", "--standalone", count]
        return [*python, "-m", "dinocell", *self._command()]

    # --- the course of a job ---

    def run(self) -> int:
        if self.me.world > 1 and not self.kind.many_processes:
            if self.me.rank:
                return 0
            idle = self.me.world - 1
            _say(f"{self.kind.name} is one process: the other {idle} have nothing to do")
            self.me.world = 1
        before: dict[signal.Signals, Any] = {k: signal.signal(k, self._receive) for k in _PASSED_ON}
        before[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda *_: None)  # with every TERM
        try:
            # The first process decides for all: srun ends the others when it ends.
            if self.me.rank == 0 and (self._is_busy() or self._gives_up()):
                return 1
            if self.me.rank == 0:
                self._begin()
            while True:
                kills_before = oom_kills()
                code = self._run_child()
                kills = oom_kills() > kills_before
                if not self._continues_without_suspects(code, kills):
                    return self._end(code, kills)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.child is not None and self.child.process.poll() is not None:
            self.must_end = True  # SLURM ends what it has requeued
            return
        self.received = self.received or signal.Signals(number)
        if self.child is not None:
            self._pass_on(self.child, signal.Signals(number))

    def _pass_on(self, child: Child, number: signal.Signals) -> None:
        # TERM is the only signal that torchrun passes on.
        child.send(signal.SIGTERM if self.job.processes > 1 else number)

    def _is_busy(self) -> bool:
        """Whether another job runs in this folder; its record stays as it is."""
        job = self.record.starts[-1].job if self.record.starts else ""
        if job in ("", self.me.job) or self.record.state not in ("running", "stopping"):
            return False
        state = job_states([job]).get(job)
        if state is None or state.state not in ("RUNNING", "SUSPENDED"):
            return False
        _say(
            f"Only one job at a time can use a folder, got {self.job.run_dir}, where job {job} is "
            "running: wait for it, or cancel it"
        )
        return True

    def _begin(self) -> None:
        me, host = self.me, socket.gethostname()
        start = Start(me.job, me.restart, self._saved(), time.time(), host, self.mark())
        self.record.starts.append(start)
        self.record.state, self.record.reason = "running", ""
        self.record.ends.pop(self.me.job, None)
        write_record(self.job.run_dir, self.record)
        if self.me.job and not self.me.restart:
            self._enlist()
        again = f", requeued {me.restart} times" if me.restart else ""
        job = f" (job {me.job}{again})" if me.job else ""
        _say(f"start {len(self.record.starts)} of {' '.join(self.job.command)}{job}")

    def _enlist(self) -> None:
        """For `dinocell jobs`: a script that was submitted with sbatch itself is not in its list."""
        cluster = cluster_name()
        if any((item.cluster, item.job) == (cluster, self.me.job) for item in read_submissions()):
            return
        job, folder = self.me.job, Path(self.job.run_dir).resolve()
        state = job_states([job]).get(job)
        log, name = state.log if state else "", os.environ.get("SLURM_JOB_NAME", folder.name)
        item = Submission(job, name, [*self.job.command], str(folder), log, time.time(), cluster)
        with contextlib.suppress(OSError, UsageError):  # a home that nodes cannot write to, or none
            note_submission([item])

    def _run_child(self) -> int:
        """The command's exit code, negative for a signal."""
        self.child = child = Child(self._child_command(), self.environment, self.log_path)
        if self.received is not None:  # between the handlers and the child
            self._pass_on(child, self.received)
        deadline, next_look, signalled = math.inf, 0.0, False
        while (code := child.wait(0.2)) is None:
            now = time.monotonic()
            if self.received is not None and self.me.job and not signalled:
                signalled = True
                deadline = now + max(self.job.signal_ahead_s - 15, 5)
                self._note_stopping()
            if self.me.world > 1 and now >= next_look:
                next_look = now + 1
                if deadline > now + _LEFT_ALONE_S and self.me.first_failure():
                    # It may hang in an exchange with the one that is gone.
                    deadline = now + _LEFT_ALONE_S
                    self._note_stopping()
            if now > deadline and not self.killed_it:
                self.killed_it = True
                _say("the work did not save itself in time; its last checkpoint counts")
                child.process.kill()
        return code

    def _note_stopping(self) -> None:
        """If SLURM ends this process too before it has decided, the record has the reason."""
        if self.me.rank == 0:
            name = "" if self.received is None else f"{self.received.name}: saving"
            failed = self.me.first_failure()
            self.record.state, self.record.reason = "stopping", failed[1] if failed else name
            write_record(self.job.run_dir, self.record)

    def _continues_without_suspects(self, code: int, kills: bool) -> bool:
        """One of many images that needs too much memory must not cost the others.

        This ends: an image is given up after `journal.MAX_KILLS` kills, and all of them when several
        kills in a row came without any image done in between.
        """
        assert self.child is not None
        killed = code == -signal.SIGKILL or (code != 0 and self.child.lacked_memory(kills))
        asked = self.received is not None or self.must_end or self.killed_it
        if self.job.command[:2] != ("shards", "run") or not killed or asked:
            return False
        time.sleep(_SURVIVES_S)
        done = self.kind.saved(Path(self.job.run_dir))
        self.fruitless = self.fruitless + 1 if done == self.images_done else 0
        self.images_done = done
        if self.fruitless >= _FRUITLESS_KILLS:
            return False
        count = suspect_unfinished_images(Path(self.job.run_dir))
        if count:
            _say(
                f"killed, probably for its memory, with {count} unfinished images: the others come "
                "first, then these one at a time"
            )
            self.child = None  # signals are for the next one
        return count > 0

    # --- jobs that make no progress ---

    def _gives_up(self) -> bool:
        """Also before a start: after requeues that SLURM made itself (a node died) nobody has decided."""
        count = self.record.stalled_starts(self.me.job, self._saved())
        if not self.me.job or count < self.job.max_stalled_starts:
            return False
        self._close(
            "stalled",
            f"A requeued job must make progress between its starts, got {self.job.max_stalled_starts} "
            f"starts of job {self.me.job} without a new checkpoint: lengthen the time limit, save more "
            f"often, or look at its log, and {self._again()}",
        )
        return True

    def _again(self) -> str:
        flag = self.kind.start_over_flag
        without = f" without {flag}" if flag in self.job.command else ""
        return f"submit it again{without} to continue"

    # --- the end ---

    def _end(self, code: int, kills: bool) -> int:
        assert self.child is not None
        if code == 0 and self.me.rank == 0:
            self._close("done", "")
        if code == 0:
            return 0
        if code == _STOPPED or (self.received is not None and code != 2):
            # After a signal, an end by error is as good: the next start shows whether it remains.
            return self._stopped()
        killed = self.killed_it
        state, reason = failure_of(code, self.child, self.me, killed_here=killed, kills=kills)
        if not self.killed_it:
            self.me.note_failure(state, reason)
        if self.me.rank == 0:
            if self.me.world > 1:
                time.sleep(_OTHERS_NOTE_S)
                state, reason = self.me.first_failure() or (state, reason)
            self._close(state, reason)
        else:
            _say(reason)
        return code if code > 0 else 128 - code

    def _stopped(self) -> int:
        name = self.received.name if self.received is not None else "a signal to another process"
        if not self.me.job:
            self._close("stopped", f"Stopped by {name}: run the same command to continue")
            return _STOPPED
        if self.me.rank:
            if not script_requeues():
                # If this process ended early, srun would end the one that requeues.
                wait_for_end(lambda: self.must_end)
            return 0
        failed = self.me.first_failure()
        if failed:
            self._close(*failed)
            return 1
        state = job_states([self.me.job]).get(self.me.job)
        cause = StopCause.of(state, self.me.restart)
        if cause.requeued:
            self._close("requeued", f"{name}: SLURM runs the job again")
            wait_for_end(lambda: self.must_end)
            return 0
        if cause.cancelled:
            what = f"job {self.me.job} was cancelled; what it had is saved, {self._again()}"
            self._close("cancelled", f"{name}: {what}")
            return 128 + signal.SIGTERM
        if self._was_ended_by_srun(cause) or self._gives_up():
            return 1
        why = "preemption" if cause.preempted else "time limit or request"
        return self._requeue(f"{name} ({why})", name)

    def _was_ended_by_srun(self, cause: StopCause) -> bool:
        """Without a reason of SLURM's own, srun ends this process because another one has ended."""
        given = cause.preempted or cause.ran_out
        if self.me.world == 1 or self.received != signal.SIGTERM or given:
            return False
        failed = self.me.wait_for_failure(_FAR_OTHERS_NOTE_S)
        if failed is None and not cause.known:
            return False
        unknown = "the processes of a job must end together, but another one has ended: see the logs of all"
        self._close(*(failed or ("failed", unknown)))
        return True

    def _requeue(self, why: str, name: str) -> int:
        self._close("requeued", f"{why}: the job continues when it is its turn again")
        if script_requeues():
            request_requeue(self.me.job)
            return 0
        if problem := requeue(self.me.job):
            what = f"everything is saved, but SLURM does not requeue job {self.me.job} ({problem})"
            self._close("stopped", f"{name}: {what}: {self._again()}")
            return _STOPPED
        wait_for_end(lambda: self.must_end)
        return 0

    def _close(self, state: str, reason: str) -> None:
        self.record.state, self.record.reason = state, reason
        progress = run_progress(self.job.command, self.job.run_dir)
        self.record.ends[self.me.job] = (state, reason, "" if progress is None else str(progress))
        write_record(self.job.run_dir, self.record)
        # The command itself may have printed the reason.
        printed = self.child is not None and reason == self.child.last_sentence()
        _say(state if printed else reason or state)


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"dinocell: {sentence}", file=sys.stderr, flush=True)
