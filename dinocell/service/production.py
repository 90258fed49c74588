"""The figures of `/metrics` at Weights & Biases, as `production/...`.

A process of its own records them, `python -m dinocell.service.production FOLDER PROJECT`, which gets one
JSON object in each line of its standard input: a wandb that fails, hangs or freezes costs records, never
the service.  The run continues when the service starts again: its id and last step are kept in the folder
of jobs, and so are the records where wandb is offline.
"""

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

_LONGEST_END_S = 20.0


class Production:
    """Records figures until `stop`.

    Parameters
    ----------
    folder : for the run
    project : its name at Weights & Biases
    interval_s : seconds between two records
    figures : gives the figures now, by their names there

    Attributes
    ----------
    program : what Python runs
    """

    program: tuple[str, ...] = ("-m", "dinocell.service.production")

    def __init__(
        self,
        folder: Path,
        project: str,
        interval_s: float,
        figures: Callable[[], Mapping[str, float]],
    ) -> None:
        self.folder, self.project, self.interval_s = folder, project, interval_s
        self.figures = figures
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin; the first record follows as soon as wandb is ready."""
        self._process = subprocess.Popen(
            [sys.executable, *self.program, str(self.folder), self.project],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl + C is for the service, which then ends the process
        )
        self._thread.start()

    def stop(self) -> None:
        """Make a last record, and wait a while until wandb has it."""
        self._stopped.set()
        self._thread.join(_LONGEST_END_S / 2)
        try:
            self._process.wait(_LONGEST_END_S / 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()

    def _run(self) -> None:
        """Hand figures over; an input that nobody reads may keep this thread waiting."""
        try:
            with self._process.stdin as lines:  # type: ignore[union-attr]
                while True:
                    print(json.dumps(self.figures()), file=lines, flush=True)
                    if self._stopped.is_set():
                        return
                    self._stopped.wait(self.interval_s)
        except (OSError, sqlite3.Error) as error:
            print(f"dinocell: warning: wandb gets no more records: {error}", file=sys.stderr)


def record(lines: Iterable[str], folder: Path, project: str) -> None:
    """Record figures, a JSON object in each line, in a run that continues."""
    from omegaconf import OmegaConf

    from dinov3.cells.hooks import sections
    from dinov3.logging.wandb_logger import WandbLogger

    settings = {"enabled": True, "project": project, "name": "production"}
    settings |= {"finish_timeout_s": _LONGEST_END_S / 4}
    config = {"wandb": settings, "train": {"output_dir": str(folder)}}
    log = WandbLogger(sections(OmegaConf.create(config)))
    for line in lines:
        log.log(json.loads(line), step=log.last_step + 1)
    log.finish()


if __name__ == "__main__":
    record(sys.stdin, Path(sys.argv[1]), sys.argv[2])
