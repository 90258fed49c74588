"""The model of a service, adapted to the images that its users have corrected.

Images whose labels were corrected by hand are the truth.  The one that was corrected last judges the
result and is not learned from; the others go to `dinocell.training.adapt` in a process of its own.  The
new model is used when somebody says so.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinocell.errors import UsageError
from dinocell.files import ensure_folder, move_into_place
from dinocell.io import write_labels
from dinocell.service.stored import StoredResult

LEAST_IMAGES = 2
"""One to learn from and one to judge."""


class Learning:
    """At most one adaptation at a time.

    Parameters
    ----------
    folder : for what is learned; `models` in it has what was kept
    device : where to compute
    minutes : about how long it may take

    Attributes
    ----------
    program : what Python runs
    """

    program: tuple[str, ...] = ("-m", "dinocell.service.learner")

    def __init__(self, folder: Path, device: str, minutes: float) -> None:
        self.folder, self.device, self.minutes = folder, device, minutes
        self.state, self.note, self.error = "idle", "", ""
        self.done, self.total = 0, 0
        self.held_out = ""
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    @property
    def work(self) -> Path:
        """Folder of the adaptation that runs or waits for a decision."""
        return self.folder / "work"

    def status(self) -> dict[str, Any]:
        """What the page shows; `before` and `after` only when it is done."""
        values: dict[str, Any] = {
            "state": self.state,
            "note": self.note,
            "done": self.done,
            "total": self.total,
            "error": self.error or None,
            "held_out": self.held_out or None,
        }
        if self.state == "done":
            values |= json.loads((self.work / "result.json").read_text(encoding="utf-8"))
        return values

    def start(self, corrected: list[StoredResult], model: str) -> None:
        """Begin to adapt `model` to corrected images, the last of which judges.

        Raises UsageError (it runs already, or there are too few images).
        """
        with self._lock:
            if self.state == "running":
                raise UsageError("One adaptation can run at a time, and one does: wait, or stop it")
            if len(corrected) < LEAST_IMAGES:
                raise UsageError(
                    f"Learning needs {LEAST_IMAGES} corrected images or more, got {len(corrected)}: "
                    "correct all cells of another image"
                )
            self.state, self.note, self.error = "idle", "", ""  # if what follows fails
            shutil.rmtree(self.work, ignore_errors=True)
            *learned, judge = corrected
            for number, result in enumerate(learned):
                names = f"images/{number}.npy", f"labels/{number}.tif", f"about/{number}.json"
                self._copy(result, *names)
            self._copy(judge, "held_out/image.npy", "held_out/labels.tif", "held_out/about.json")
            options = {"start": model, "device": self.device, "minutes": self.minutes}
            self._process = subprocess.Popen(
                [sys.executable, *self.program, str(self.work), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            self.state, self.note, self.error = "running", "Starting", ""
            self.done = self.total = 0
            self.held_out = judge.name
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def _copy(self, result: StoredResult, image: str, labels: str, about: str) -> None:
        for name in (image, labels, about):
            ensure_folder((self.work / name).parent)
        shutil.copyfile(result.folder / "plane.npy", self.work / image)
        shutil.copyfile(result.folder / "about.json", self.work / about)
        write_labels(self.work / labels, result.labels())

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                if counted := re.search(r"^adapting (\d+)/(\d+)", line):
                    self.done, self.total = (int(number) for number in counted.groups())
                self.note = line.strip() or self.note
        code = process.wait()
        _close(process)
        with self._lock:
            if self._process is not process:
                return  # stopped
            if code == 0 and (self.work / "result.json").exists():
                self.state = "done"
            else:
                self.state, self.error = "failed", self.note or "The process was killed"

    def discard(self) -> None:
        """Stop what runs, or forget what was learned."""
        with self._lock:
            process, self._process = self._process, None
            self.state, self.note, self.error = "idle", "", ""
            if process is not None:
                _close(process)
                process.wait()
            # no other adaptation may have begun in this folder
            shutil.rmtree(self.work, ignore_errors=True)

    def keep(self, use: Callable[[Path], None]) -> Path:
        """Move the new model to the others and `use` it; returns its path.

        Raises UsageError (nothing was learned).
        """
        with self._lock:
            if self.state != "done":
                raise UsageError("There must be a model that was learned, got none: start learning")
            path = self.folder / "models" / f"learned_{time.strftime('%Y%m%d_%H%M%S')}.safetensors"
            ensure_folder(path.parent)
            move_into_place(self.work / "model.safetensors", path)
            self.state, self.note = "idle", f"The model {path.name} is used"
        use(path)
        return path

    def picture(self, name: str) -> Path:
        """A picture of the image that was held out."""
        return self.work / f"{name}.png"


def _close(process: "subprocess.Popen[str]") -> None:
    """Close its standard input, which ends it."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.close()
