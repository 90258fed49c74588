"""What a cluster must know of a command that it runs: the folder of a run, its progress, its restart.

Each room that has such a command describes it by one subclass of `SubmittedCommand` in its file
`submitted.py`; `dinocell.cluster.commands` lists them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dinocell.errors import UsageError

_ON_BY_DEFAULT = ("overlay",)


@dataclass(frozen=True)
class RunProgress:
    """How far a run is: `done` of `total`, and the seconds that are left at the last known speed."""

    done: int
    total: int | None = None
    unit: str = ""
    eta_s: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.done} {self.unit}".strip()
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        note = f" {self.note}" if self.note else ""
        return f"{self.done}/{self.total}{share}{note}"


class SubmittedCommand:
    """A command of `dinocell` that can run as a job; the methods know the files of its runs.

    Attributes
    ----------
    name : of the command
    many_processes : whether it uses one process for each GPU
    start_over_flag : option that replaces what is in the folder; a requeued job drops it; "" if none
    resume_flag : option that a requeued job needs to continue; "" if it continues by itself
    replaced_name : file or folder of a run that starting over replaces; "" if none
    has_pace : whether the time that is left can be estimated from the progress since the last start
    """

    name = ""
    many_processes = False
    start_over_flag = ""
    resume_flag = ""
    replaced_name = ""
    has_pace = False

    def read(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parsed parameters, and what the command reads from files first."""
        return dict(parameters)

    def run_dir(self, parameters: Mapping[str, Any]) -> Path:
        """Folder of a run, from what `read` returns."""
        raise NotImplementedError

    def options_of_row(self, values: Mapping[str, str]) -> list[str]:
        """A row of a table of tasks as options of the command."""
        options: list[str] = []
        for key, value in values.items():
            option = key.replace("_", "-")
            if value.lower() == "true":
                options.append(f"--{option}")
            elif value.lower() != "false":
                options += [f"--{option}", value]
            elif option in _ON_BY_DEFAULT:
                options.append(f"--no-{option}")
        return options

    def options_of_folder(self, run_dir: Path, parameters: Mapping[str, Any]) -> list[str]:
        """Options that make the command write its results to `run_dir`."""
        raise NotImplementedError

    def check_inputs(self, parameters: Mapping[str, Any]) -> None:
        """Refuse files of the command line that do not exist or cannot be used."""

    def check(
        self, parameters: Mapping[str, Any], run_dir: Path, *, look: bool, continues: bool
    ) -> None:
        """Refuse what the job would refuse.

        `look` says whether the files that the configuration names must exist, `continues` whether the
        run was started by this very command and is not finished.
        """

    def saved(self, run_dir: Path) -> int:
        """Steps, iterations or images that a new start would not repeat."""
        return 0

    def progress(self, run_dir: Path) -> RunProgress | None:
        """Progress from the run's own files; None before they exist."""
        return None


def require_weights_file(key: str, path: Path | None) -> None:
    """Raise UsageError for weights that are named by `key` of a configuration and do not exist."""
    if path is not None and not path.exists():
        raise UsageError(
            f"`{key}` must be a file that exists, got {path}: correct the path, or use `look=False` if it "
            "exists only on the nodes"
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, {} if it cannot be read."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def last_line_with(path: Path, key: str) -> dict[str, Any] | None:
    """The last JSON line that has `key`, read from the end of a file that may be long; None if none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65_536))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut: the first of the piece, or one that is being written
        if isinstance(values, dict) and key in values:
            return values
    return None
