"""The worker as the service sees it: started, woken, listened to, started again when it died."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinocell.errors import DINOCellError, UsageError

_MAX_PAUSE_S = 60.0


class WorkerProcess:
    """Runs `dinocell.service.worker` until `stop`.

    Parameters
    ----------
    folder : of the queue
    options : fields of `SegmentOptions` that all jobs share
    hear : is called, in another thread, with each line of the worker about a job

    Attributes
    ----------
    limit_s : a job that takes longer fails
    places : where images may be read that are no uploads
    """

    def __init__(
        self, folder: Path, options: dict[str, Any], hear: Callable[[dict[str, Any]], None]
    ) -> None:
        self.folder, self.options, self.hear = folder, options, hear
        self.limit_s = float("inf")
        self.places: tuple[Path, ...] = ()
        self.model: dict[str, Any] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._ready = False
        self._stopped = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the worker and wait until it has loaded the model.

        Raises UsageError, DINOCellError (what the worker says, for example that the model does not
        exist).
        """
        self._launch()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that the queue has grown."""
        self._write("\n")

    def stop(self) -> None:
        """End the worker; the job that it works on stays `running` in the queue."""
        self._stopped.set()
        self._close_input()
        if self._thread is not None:
            self._thread.join()
        self._close_input()  # of one that was being started

    def use(self, model: Path) -> None:
        """Start the worker again with another model; a job that it works on is repeated."""
        self.options = {**self.options, "model": str(model)}
        self._close_input()

    @property
    def pid(self) -> int | None:
        """The number of the process, if one runs."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process else None

    @property
    def alive(self) -> bool:
        """Whether it can take jobs now."""
        return self.pid is not None and self._ready

    def _close_input(self) -> None:
        with self._writing:
            if self._process is not None and self._process.stdin is not None:
                with contextlib.suppress(OSError):  # it has died
                    self._process.stdin.close()

    def _write(self, text: str) -> None:
        with self._writing:
            if self._process is None or self._process.stdin is None or self._stopped.is_set():
                return
            try:
                self._process.stdin.write(text)
                self._process.stdin.flush()
            except (OSError, ValueError):
                pass  # it has died, and looks into the queue when it starts again

    def _launch(self) -> None:
        """Start a process, and read its first line."""
        self._ready = False
        settings = {
            "folder": str(self.folder),
            "options": self.options,
            "places": [str(place) for place in self.places],
            "recover": True,
        }
        if self.limit_s < float("inf"):
            settings["limit_s"] = self.limit_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dinocell.service.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl + C is for the service, which then ends the worker
        )
        self._write(json.dumps(settings) + "\n")
        if self._stopped.is_set():  # since before the process had an input that `stop` could close
            self._close_input()
        assert self._process.stdout is not None
        first = json.loads(self._process.stdout.readline() or "{}")
        if "ready" not in first:
            code = self._end(self._process)
            text = first.get("error") or f"The worker ended with code {code} before it was ready"
            raise (UsageError if first.get("exit_code") == 2 else DINOCellError)(text)
        self.model, self._ready = first["ready"], True

    def _end(self, process: "subprocess.Popen[str]") -> int:
        """Wait for a process that has closed its output; returns its exit code."""
        self._close_input()
        if process.stdout is not None:
            process.stdout.close()
        return process.wait()

    def _keep_alive(self) -> None:
        """Pass on what the worker says; when it dies, start another after a pause that grows."""
        pause_s = 1.0
        while not self._stopped.is_set():
            process = self._process
            if process is not None and process.stdout is not None:
                for line in process.stdout:
                    pause_s = 1.0
                    self.hear(json.loads(line))
                self._end(process)
            self.hear({"worker": "died"})
            if self._stopped.wait(pause_s):
                return
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            try:
                self._launch()
            except (DINOCellError, OSError, ValueError) as error:
                print(f"dinocell: warning: {error}", file=sys.stderr)
                self._process = None
            else:
                self.hear({"worker": "started"})  # it may have given up a job, or queued it again
