"""The queue of jobs on disk: one SQLite file that the server and the worker share.

A job is a row; its files are the folder `jobs/ID` beside the database.  States: `queued` → `running` →
`done`, `failed` or `cancelled`; the files of a finished job go when it is `deleted` or `expired`, its row
later.  Every step is one transaction, so that a killed process leaves each job before or after it.
A job that was running when its process died is queued again by `recover`, at most `MAX_KILLS` times.
"""

import contextlib
import json
import math
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinocell.batch.journal import MAX_KILLS
from dinocell.errors import DINOCellError, UsageError
from dinocell.files import remove_temporary_files

FINAL = ("done", "failed", "cancelled", "deleted", "expired")
"""States that a job does not leave to be worked on again."""

_ROWS_KEPT_S = 30 * 86_400.0  # of jobs whose files are gone, so that their ids still get an answer
_GIVEN_UP = (
    f"The image must fit into the memory, got a worker killed {MAX_KILLS} times while it worked on it: "
    "crop the image, or use a larger machine"
)
_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, name TEXT NOT NULL,
    file TEXT NOT NULL, state TEXT NOT NULL, options TEXT NOT NULL, created REAL NOT NULL,
    started REAL, finished REAL, kills INTEGER NOT NULL DEFAULT 0, stop INTEGER NOT NULL DEFAULT 0,
    error TEXT, summary TEXT, bytes INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, seq);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value REAL NOT NULL);
"""


class QueueFullError(DINOCellError):
    """So many jobs wait that another one is refused."""


@dataclass(frozen=True)
class Job:
    """One image to segment, or segmented.

    Attributes
    ----------
    id : 32 hexadecimal digits, drawn at random
    name : name of the upload without its ending, for messages and downloads; never a path
    file : name of the upload in the folder of the job, chosen by the service; or the absolute path, or
        address on S3, of an image that is read where it is
    options : fields of `SegmentOptions`
    created, started, finished : seconds since 1970
    stop : whether somebody has cancelled the job
    summary : what the journal of a batch says of the image
    """

    id: str
    name: str
    file: str
    state: str
    options: dict[str, Any]
    created: float
    started: float | None = None
    finished: float | None = None
    kills: int = 0
    stop: bool = False
    error: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0

    @property
    def is_upload(self) -> bool:
        """Whether the image lies in the folder of the job."""
        return Path(self.file).name == self.file


class Queue:
    """The jobs of a folder; safe to use from several threads and processes.

    Parameters
    ----------
    folder : where the database and the folders of jobs are; made if missing
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(
            folder / "queue.sqlite", timeout=30, check_same_thread=False, isolation_level=None
        )
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_TABLES)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite ends it where the disk is full
                    self._database.execute("ROLLBACK")
                raise

    def job_folder(self, job_id: str) -> Path:
        """The folder of a job's files."""
        return self.folder / "jobs" / job_id

    def add(
        self,
        name: str,
        file: str,
        options: Mapping[str, Any],
        write: Callable[[Path], None],
        *,
        limit: int,
        limit_bytes: float = float("inf"),
        job_id: str = "",
    ) -> Job:
        """Queue a job; `write` gets the path where the upload is to be written.

        `job_id` is drawn at random if it is empty.

        Raises QueueFullError (`limit` jobs wait already, or together they have more than `limit_bytes`);
        UsageError (this one alone has more); what `write` raises.  Nothing remains of it.
        """
        self.refuse_if_full(limit)
        job_id = job_id or secrets.token_hex(16)
        job = Job(job_id, name, file, "queued", dict(options), time.time())
        folder = self.job_folder(job.id)
        folder.mkdir()
        try:
            write(folder / file)
            with self._transaction() as database:
                self._refuse_if_full(database, limit)
                size = size_of(folder)
                _refuse_if_large(database, size, limit_bytes)
                database.execute(
                    "INSERT INTO jobs (id, name, file, state, options, created, bytes) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(job.id, job.name, job.file, job.state, json.dumps(job.options)),
                        *(job.created, size),
                    ),
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return job

    def set_finished(
        self, jobs: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]]
    ) -> None:
        """Have exactly these finished jobs: id → name, options, summary; the files of others are deleted."""
        now = time.time()
        with self._transaction() as database:
            rows = database.execute("SELECT id FROM jobs").fetchall()
            gone = [row["id"] for row in rows if row["id"] not in jobs]
            database.executemany("DELETE FROM jobs WHERE id = ?", [(job_id,) for job_id in gone])
            database.executemany(
                "INSERT OR IGNORE INTO jobs (id, name, file, state, options, created, finished, summary) "
                "VALUES (?, ?, ?, 'done', ?, ?, ?, ?)",
                [
                    (
                        job_id,
                        name,
                        f"{name}.tif",
                        json.dumps(options),
                        now,
                        now,
                        json.dumps(summary),
                    )
                    for job_id, (name, options, summary) in reversed(list(jobs.items()))
                ],
            )
        for job_id in gone:
            shutil.rmtree(self.job_folder(job_id), ignore_errors=True)

    def refuse_if_full(self, limit: int) -> None:
        """Raise QueueFullError if `limit` jobs wait."""
        with self._lock:
            self._refuse_if_full(self._database, limit)

    def _refuse_if_full(self, database: sqlite3.Connection, limit: int) -> None:
        (waiting,) = database.execute("SELECT COUNT(*) FROM jobs WHERE state = 'queued'").fetchone()
        if waiting >= limit:
            raise QueueFullError(
                f"The queue may hold {limit} waiting jobs, and it is full: try again later"
            )

    def refuse_if_large(self, size: int, limit_bytes: float) -> None:
        """Raise QueueFullError if the uploads that wait would have more than `limit_bytes` with `size` more.

        UsageError if `size` alone is more.
        """
        with self._lock:
            _refuse_if_large(self._database, size, limit_bytes)

    def get(self, job_id: str) -> Job | None:
        """A job by its id; None if there is none."""
        if not re.fullmatch(r"[0-9a-f]{32}", job_id):
            return None
        with self._lock:
            row = self._database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else _job(row)

    def newest(self, limit: int = 100) -> list[Job]:
        """The newest jobs, newest first."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM jobs ORDER BY seq DESC LIMIT ?", (limit,))
            return [_job(row) for row in rows.fetchall()]

    def place(self, job: Job) -> int:
        """How many waiting jobs are before this one."""
        with self._lock:
            (before,) = self._database.execute(
                "SELECT COUNT(*) FROM jobs WHERE state = 'queued' AND "
                "seq < (SELECT seq FROM jobs WHERE id = ?)",
                (job.id,),
            ).fetchone()
        return int(before)

    def take(self) -> Job | None:
        """Start the oldest waiting job; None if there is none."""
        with self._transaction() as database:
            row = database.execute(
                "UPDATE jobs SET state = 'running', started = ? WHERE seq = "
                "(SELECT MIN(seq) FROM jobs WHERE state = 'queued') RETURNING *",
                (time.time(),),
            ).fetchone()
        return None if row is None else _job(row)

    def finish(
        self,
        job: Job,
        *,
        error: str | None = None,
        summary: Mapping[str, Any] | None = None,
        counts: Mapping[str, float] | None = None,
    ) -> None:
        """Note how a running job ended, and add to the counters.

        A job that somebody stopped meanwhile is cancelled, however it ended.
        """
        with self._transaction() as database:
            row = database.execute(
                "SELECT stop FROM jobs WHERE id = ? AND state = 'running'", (job.id,)
            ).fetchone()
            if row is None:
                return  # its time was over
            state = "cancelled" if row["stop"] else "failed" if error else "done"
            database.execute(
                "UPDATE jobs SET state = ?, finished = ?, error = ?, summary = ?, bytes = ? "
                "WHERE id = ? AND state = 'running'",
                (
                    *(state, time.time(), None if row["stop"] else error),
                    *(json.dumps(dict(summary or {})), size_of(self.job_folder(job.id)), job.id),
                ),
            )
            _count(database, {f'jobs_total{{state="{state}"}}': 1, **(counts or {})})
        if state == "cancelled":
            shutil.rmtree(self.job_folder(job.id), ignore_errors=True)

    def stops(self, job_id: str) -> bool:
        """Whether somebody has cancelled a job."""
        with self._lock:
            row = self._database.execute("SELECT stop FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return bool(row is None or row["stop"])

    def remove(self, job_id: str) -> None:
        """Cancel a job that waits or runs, or delete the files of a finished one."""
        with self._transaction() as database:
            row = database.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
            state = row["state"]
            if state == "queued":
                _count(database, {'jobs_total{state="cancelled"}': 1})
            new = {"queued": "cancelled", "done": "deleted", "failed": "deleted"}.get(state, state)
            database.execute(
                "UPDATE jobs SET state = ?, stop = 1, finished = COALESCE(finished, ?) WHERE id = ?",
                (new, None if state == "running" else time.time(), job_id),
            )
        if state != "running":  # else the worker deletes them when it has stopped
            shutil.rmtree(self.job_folder(job_id), ignore_errors=True)

    def recover(self, *, killed: bool = True) -> None:
        """Queue the running job again, while no worker runs.

        `killed` counts this against the job, whose image may have needed too much memory.
        """
        with self._transaction() as database:
            stopped = database.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ? WHERE state = 'running' AND stop "
                "RETURNING id",
                (time.time(),),
            ).fetchall()
            database.execute("UPDATE jobs SET kills = kills + ? WHERE state = 'running'", (killed,))
            given_up = database.execute(
                "UPDATE jobs SET state = 'failed', finished = ?, error = ? "
                "WHERE state = 'running' AND kills >= ?",
                (time.time(), _GIVEN_UP, MAX_KILLS),
            ).rowcount
            counts = {"failed": given_up, "cancelled": len(stopped)}
            _count(database, {f'jobs_total{{state="{k}"}}': n for k, n in counts.items()})
            database.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
        for row in stopped:
            shutil.rmtree(self.job_folder(row["id"]), ignore_errors=True)

    def sweep(self) -> None:
        """Delete what killed processes left, while none works: temporary files, and folders without a job."""
        with self._lock:
            rows = self._database.execute(
                "SELECT id FROM jobs WHERE state NOT IN ('cancelled', 'deleted', 'expired')"
            ).fetchall()
        known = {row["id"] for row in rows}
        for folder in (self.folder / "jobs").iterdir():
            if folder.name in known:
                # One that cannot be removed is no reason not to start.
                with contextlib.suppress(OSError):
                    remove_temporary_files(folder, before=math.inf)
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def expire(self, *, keep_s: float, keep_bytes: float, now: float | None = None) -> list[str]:
        """Delete files of finished jobs: those older than `keep_s`, then the oldest above `keep_bytes`.

        A job is as old as its last change: its end, or the last change of its labels.  The newest result
        stays, whatever its size.

        Returns the ids of the jobs.
        """
        now = time.time() if now is None else now
        folders = list((self.folder / "jobs").iterdir())
        sizes = {one.name: size_of(one) for one in folders}
        changed = {one.name: _last_change(one) for one in folders}
        with self._transaction() as database:
            rows = database.execute(
                "SELECT id, finished, seq, state FROM jobs WHERE state IN ('done', 'failed')"
            ).fetchall()
            ages = [
                (max(row["finished"], changed.get(row["id"], 0)), row["seq"], row["id"])
                for row in rows
            ]
            done = {row["id"] for row in rows if row["state"] == "done"}
            # It may need more space alone, and somebody waits for it.
            newest = max((age for age in ages if age[-1] in done), default=(0, 0, ""))[-1]
            total, expired = 0, []
            for last_s, _, job_id in sorted(ages, reverse=True):
                total += sizes.get(job_id, 0)  # corrections and channels add to what it had
                if now - last_s > keep_s or (job_id != newest and total > keep_bytes):
                    expired.append(job_id)
            database.executemany(
                "UPDATE jobs SET state = 'expired', finished = ? WHERE id = ?",
                [(now, job_id) for job_id in expired],
            )
            database.execute(
                "DELETE FROM jobs WHERE state IN ('cancelled', 'deleted', 'expired') AND finished < ?",
                (now - _ROWS_KEPT_S - keep_s,),
            )
        for job_id in expired:
            shutil.rmtree(self.job_folder(job_id), ignore_errors=True)
        return expired

    def count(self, counts: Mapping[str, float]) -> None:
        """Add to counters, which survive a restart."""
        with self._transaction() as database:
            _count(database, counts)

    def counters(self) -> dict[str, float]:
        """All counters, by name with labels, such as `jobs_total{state="done"}`."""
        with self._lock:
            rows = self._database.execute("SELECT name, value FROM counters ORDER BY name")
            return {row["name"]: row["value"] for row in rows.fetchall()}

    def depths(self) -> dict[str, int]:
        """How many jobs wait and how many run."""
        with self._lock:
            rows = self._database.execute(
                "SELECT state, COUNT(*) AS n FROM jobs WHERE state IN ('queued', 'running') "
                "GROUP BY state"
            ).fetchall()
        return {"queued": 0, "running": 0} | {row["state"]: row["n"] for row in rows}


def _refuse_if_large(database: sqlite3.Connection, size: int, limit_bytes: float) -> None:
    if size > limit_bytes:  # to wait does not help
        raise UsageError(
            f"An upload may have up to {limit_bytes / 1e9:g} GB, got {size / 1e9:g}: send a smaller file, or "
            "start the service with a larger `keep_gb`"
        )
    (waiting,) = database.execute(
        "SELECT COALESCE(SUM(bytes), 0) FROM jobs WHERE state IN ('queued', 'running')"
    ).fetchone()
    if waiting + size > limit_bytes:
        raise QueueFullError(
            f"Waiting uploads may have {limit_bytes / 1e9:g} GB together, and the disk space for them is "
            "full: try again later"
        )


def _count(database: sqlite3.Connection, counts: Mapping[str, float]) -> None:
    database.executemany(
        "INSERT INTO counters VALUES (?, ?) "
        "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        [(name, value) for name, value in counts.items() if value],
    )


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    del values["seq"]
    values["options"] = json.loads(values["options"])
    values["summary"] = json.loads(values["summary"] or "{}")
    values["stop"] = bool(values["stop"])
    return Job(**values)


def _last_change(folder: Path) -> float:
    """When the labels in the folder of a job were changed last, in seconds since 1970; 0 if never."""
    try:
        return (folder / "current.json").stat().st_mtime
    except OSError:
        return 0.0


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total
