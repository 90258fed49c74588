"""The process that runs a job's command: its output, its signals, and the memory that it lacked."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

_LINES_KEPT = 200


class Child:
    """A command in a process of its own, whose output is passed on line by line, also to `log_path`.

    `environment` holds all its variables.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log_path: Path | None
    ) -> None:
        self.tail: deque[str] = deque(maxlen=_LINES_KEPT)
        # A session of its own: SLURM signals whole process groups, and the loader's workers of a
        # training must not get what is meant for the training.
        self.process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )
        self._log: IO[bytes] | None = None
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_path.open("ab")
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self._readers = [
            threading.Thread(target=self._pass_on, args=pair, daemon=True) for pair in streams
        ]
        for reader in self._readers:
            reader.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process still exists."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def wait(self, timeout_s: float) -> int | None:
        """Exit code, negative for a signal, when the process has ended and its output is read; else None."""
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None
        for reader in self._readers:
            reader.join(timeout=5)
        if self._log is not None:
            self._log.close()
        return code

    def last_sentence(self) -> str:
        """The command's own error message, else its last line."""
        mark = "dinocell: error: "
        for line in reversed(self.tail):
            if line.startswith(mark):
                return line.removeprefix(mark)
        return next((line.strip() for line in reversed(self.tail) if line.strip()), "")

    def lacked_memory(self, kills: bool) -> bool:
        """Whether one of the kernel's `kills` for memory was of this command.

        The control group may be shared with others, so that the command's own words count too.
        """
        return kills and re.search("(?i)kill|memory", self.last_sentence()) is not None

    def _pass_on(self, source: IO[bytes] | None, target: Any) -> None:
        assert source is not None
        with source:
            for line in iter(source.readline, b""):
                text = line.decode("utf-8", "replace")
                self.tail.append(text.rstrip("\n"))
                with contextlib.suppress(OSError, ValueError):  # a closed terminal stops no work
                    target.write(text)
                    target.flush()
                if self._log is not None:
                    self._log.write(line)
                    self._log.flush()


def _die_with_parent(parent: int) -> None:
    """In the child: be killed when the parent is, which has its own session (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before that
            os.kill(os.getpid(), signal.SIGKILL)


def oom_kills() -> int:
    """Processes that the kernel has killed for memory in this job's control group, 0 if unknown."""
    groups = ""
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = ("", "memory.events") if controllers == "" else ("memory", "memory.oom_control")
        with contextlib.suppress(OSError, ValueError):
            text = Path("/sys/fs/cgroup", top, path.lstrip("/"), name).read_text(encoding="utf-8")
            if found := re.search(r"^oom_kill (\d+)", text, re.MULTILINE):
                return int(found[1])
    return 0
