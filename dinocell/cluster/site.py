"""Settings of a cluster for all its jobs: partition, account, GPUs, time, set-up; one YAML file a site."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dinocell.cluster.slurm import seconds_of
from dinocell.errors import ConfigError
from dinocell.files import home_folder
from dinocell.settings import config_from_mapping, read_settings

_GPU = re.compile(r"gpu(?::(?P<type>[\w.-]*[A-Za-z_.-][\w.-]*|\d+(?=:)))?(?::(?P<count>\d+))?")
# Options of sbatch that the profile's keys or the submission itself decide.
_OWNED = {
    "account", "array", "comment", "constraint", "cpus_per_gpu", "cpus_per_task", "dependency", "error",
    "exclude", "gpus", "gpus_per_node", "gpus_per_task", "gres", "job_name", "mail_type", "mail_user", "mem",
    "nice", "no_requeue", "nodes", "ntasks", "ntasks_per_node", "open_mode", "output", "partition",
    "qos", "requeue", "reservation", "signal", "time", "wrap",
}  # fmt: skip
_FOLDERS_VARIABLE = "DINOCELL_SITES"
_DEFAULT_VARIABLE = "DINOCELL_SITE"


@dataclass(frozen=True)
class SiteProfile:
    """What jobs of a site ask SLURM for; null leaves the cluster's own default."""

    # partition, account, qos, constraint, exclude, reservation: as sbatch's options
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    # as sbatch's option; a GPU job has `gpu:TYPE:COUNT`, per node.  One task a GPU is started (of
    # `segment` and `evaluate`, which are one process, one for one GPU)
    gres: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    nodes: int = 1  # number of nodes
    tasks_per_node: int | None = None  # null is one a GPU, or one
    # limit of a run, such as 24:00:00, 2-00:00:00 or minutes.  Work that takes longer is requeued
    # and continues
    time: str = "24:00:00"
    mem: str | None = None  # memory of a node, such as 64G; 0 is all of it
    cpus_per_gpu: int = 8  # CPU cores of a task (there is one a GPU)
    # mail_user, mail_type: whom to write to and when (`FAIL`, `END`, ...)
    mail_user: str | None = None
    mail_type: str | None = None
    # shell commands before the work (`module load cuda`, `source .venv/bin/activate`)
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)  # variables of the work
    # command that runs the rest inside a container: `apptainer exec --nv dinocell.sif`
    container: str | None = None
    # interpreter; null is the one that submits, or python3 in a container
    python: str | None = None
    # seconds before the time limit at which the work gets the signal to save itself
    signal_ahead_s: int = 120
    max_stalled_starts: int = 5  # starts of one job without any progress after which it is given up
    array_parallelism: int = 16  # tasks of an array that run at once
    # nice, comment: as sbatch's options
    nice: int | None = None
    comment: str | None = None
    # further options of sbatch, by name without dashes
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise ConfigError(fault)

    def _faults(self) -> Iterator[str]:
        counts = "nodes cpus_per_gpu max_stalled_starts array_parallelism tasks_per_node"
        for name in counts.split():
            if (value := getattr(self, name)) is not None and value < 1:
                yield f"`{name}` must be at least 1, got {value}: give a larger number"
        ahead = self.signal_ahead_s
        if ahead < 10:
            yield f"`signal_ahead_s` must be at least 10, got {ahead}: give the time that saving takes"
        if minutes_of(self.time) * 60 <= ahead:
            yield f"`time` must be longer than `signal_ahead_s` ({ahead} s), got {self.time}: give more time"
        for part in (self.gres or "").split(","):
            if part.split(":")[0] == "gpu" and _GPU.fullmatch(part) is None:
                yield f"`gres` must look like gpu:a100:1, got {self.gres!r}: write type and count per node"
        if self.mem is not None and not re.fullmatch(r"\d+[KMGT]?", self.mem):
            yield f"`mem` must be a number with K, M, G or T, got {self.mem!r}: write 64G, for example"
        texts = {**dataclasses.asdict(self), **{f"extra.{k}": v for k, v in self.extra.items()}}
        for name, value in texts.items():
            if isinstance(value, str) and not value.isprintable():
                yield f"`{name}` must be one line, got {value!r}: join its lines"
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                yield f"`environment` must have names of variables, got {name!r}: use letters, digits, _"
        per_cpu = [name for name in self.extra if name.replace("_", "-").startswith("mem-per-")]
        if self.mem is not None and per_cpu:
            yield f"Memory must be given once, got `mem` and {per_cpu[0]}: take one of them"
        for name in self.extra:
            if name.replace("-", "_") in _OWNED:
                yield f"`extra` must have options that no key of the site sets, got {name!r}: use that key"
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                yield f"`extra` must have names such as licenses, got {name!r}: write them without dashes in front"

    def _gpu(self) -> re.Match[str] | None:
        found = map(_GPU.fullmatch, (self.gres or "").split(","))
        return next((match for match in found if match is not None), None)

    @property
    def gpus_per_node(self) -> int:
        """0 without a GPU in `gres`."""
        match = self._gpu()
        return 0 if match is None else int(match["count"] or 1)

    @property
    def tasks(self) -> int:
        """Processes of a job on all nodes."""
        return self.nodes * (self.tasks_per_node or max(self.gpus_per_node, 1))

    def with_gpus(self, count: int) -> Self:
        """The same with another number of GPUs per node; 0 is none, a negative one a ConfigError."""
        if count < 0:
            raise ConfigError(f"The number of GPUs must be at least 0, got {count}: 0 is none")
        match = self._gpu()
        kind = "" if match is None or match["type"] is None else f":{match['type']}"
        parts = [] if self.gres is None else self.gres.split(",")
        others = [part for part in parts if match is None or part != match[0]]
        gpus = [f"gpu{kind}:{count}"] if count else []
        return dataclasses.replace(self, gres=",".join([*gpus, *others]) or None)

    def for_merging(self) -> Self:
        """The same for a job that reads and writes tables: one core, little memory, no GPU."""
        longest = "2:00:00" if minutes_of(self.time) > 120 else self.time
        # Options about processors, GPUs and memory are meant for the work itself.
        of_work = ("mem", "cpu", "gpu", "core", "ntasks", "exclusive", "tres")
        extra = {name: value for name, value in self.extra.items() if not name.startswith(of_work)}
        one: dict[str, Any] = {"nodes": 1, "tasks_per_node": 1, "cpus_per_gpu": 1, "mem": "4G"}
        none = self.with_gpus(0)
        return dataclasses.replace(none, extra=extra, time=longest, constraint=None, **one)

    def for_one_process(self) -> Self:
        """The same for work that is one process: one node and at most one GPU."""
        one = self.with_gpus(1) if self.gpus_per_node > 1 else self
        return dataclasses.replace(one, nodes=1, tasks_per_node=1)


def minutes_of(text: str) -> float:
    """Minutes of a SLURM time, as `seconds_of` reads it; ConfigError if it is none."""
    seconds = seconds_of(text)
    if seconds is None:
        raise ConfigError(f"`time` must be like 24:00:00, 2-00:00:00 or minutes, got {text!r}")
    return seconds / 60


def find_site(name: str | None) -> Path | None:
    """The file of a site: a path, or a name in the folders DINOCELL_SITES, slurm/sites below the working
    folder, and dinocell/sites in the user's configuration; None without a name (and DINOCELL_SITE).

    In a clone its own slurm/sites come last; an installed package has none.

    Raises ConfigError (the file does not exist; the message names those that do).
    """
    name = name or os.environ.get(_DEFAULT_VARIABLE)
    if not name:
        return None
    direct = Path(name)
    if direct.suffix in (".yaml", ".yml") and direct.is_file():
        return direct
    given = os.environ.get(_FOLDERS_VARIABLE)
    home, config = home_folder(), os.environ.get("XDG_CONFIG_HOME")
    configs = [Path(config)] if config else [home / ".config"] if home else []
    clone = Path(__file__).parents[2]
    folders = [Path(given)] if given else []
    folders += [Path("slurm/sites"), *(path / "dinocell" / "sites" for path in configs)]
    folders.append(clone / "slurm" / "sites")
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    choice = f"one of {', '.join(known)}" if known else "a name (but no site was found)"
    example = "copy slurm/sites/example.yaml and name its path"
    if not (folders[-1] / "example.yaml").is_file():
        example = "write one as docs/cluster.md shows (the examples in slurm/sites need a clone)"
    raise ConfigError(f"`site` must be a YAML file or {choice}, got {name!r}: {example}")


def load_site(name: str | None, overrides: Sequence[str] = ()) -> SiteProfile:
    """Read a site's file (see `find_site`; without a name the cluster's defaults), apply overrides.

    Overrides are `partition=long`, `environment.OMP_NUM_THREADS=8`, `gres=` (nothing: null).  Raises
    ConfigError (no such file, not YAML, an unknown key or a wrong value; the message lists the keys).
    """
    path = find_site(name)
    try:
        # Null is the default; a variable or option is its text (`true` too), or empty without a value.
        given = {
            key: {
                name: "" if item is None else str(item) if isinstance(item, str) else item
                for name, item in value.items()
            }
            if isinstance(value, dict)
            else value
            for key, value in read_settings(path, overrides).items()
            if value is not None
        }
        return config_from_mapping(SiteProfile, given)
    except ConfigError as error:
        raise ConfigError(f"{f'Site {path}' if path else 'Site'}: {error}") from error
