"""A batch of many kinds of files on a machine that fails: killed, full, without its folder, read-only.

    python benchmarks/soak.py                   # 1,000 images of 20 kinds; root for mounts, else left out

One undisturbed run of `dinocell segment` (two workers, a small network of random weights) gives the
expected files, and its memory and open files are sampled on the way.  Then each trouble strikes runs into
another folder, at moments drawn from `--seed`, and `--resume` continues until all is done: every file must
have the SHA-256 of the undisturbed run.  Two files are compared otherwise: `images.jsonl`, whose lines are
in the order of completion, as a set, and `report.html`, which has no distance maps for images of an earlier
run, by the images it names.  A trouble must end in one sentence and an exit code.  Written to
benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "dinov3_modified")]

from benchmarks.soak_images import GOOD, KINDS, make_plate  # noqa: E402
from dinocell.batch.journal import JOURNAL_NAME, count_rows, read_journal  # noqa: E402
from dinocell.network.backbone import BACKBONE_SIZES, BackboneSize  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "soak.json"
RUN_LIMIT_S = 3600  # of one run: it hangs if it takes longer
DISK_SHARES = (0.001, 0.02, 0.1, 0.25, 0.5, 0.8)  # of the space needed; it grows after each run
# --- running and comparing ---


class Ended(NamedTuple):
    """How a run ended and what it printed."""

    code: int
    out: str
    errors: str


class Run:
    """`dinocell ARGUMENTS` in a process of its own, with a network of 4 blocks for `tiny`.

    The process is forked from a server that has imported torch and numba, which would take most of the
    time of a run.
    """

    def __init__(self, arguments: list[str], folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dinocell.batch.run", "dinocell.cli", "benchmarks.soak"])
        self._streams = [folder / "stdout", folder / "stderr"]
        self._process = context.Process(target=_dinocell, args=(arguments, self._streams))
        self._process.start()
        self.pid = self._process.pid

    def still_runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def kill(self) -> None:
        """`kill -9`, and wait for its end."""
        self._process.kill()
        self._process.join()
        assert self._process.exitcode == -9, "the batch ended before it could be killed"

    def ended(self) -> Ended:
        """Wait for its end; AssertionError if it hangs or writes a traceback."""
        self._process.join(RUN_LIMIT_S)
        out, errors = (path.read_text(errors="replace") for path in self._streams)
        assert self._process.exitcode is not None, "the batch hangs"
        assert "Traceback" not in errors, errors
        return Ended(self._process.exitcode, out, errors)


def _dinocell(arguments: list[str], streams: list[Path]) -> None:
    from dinocell.cli import main

    for number, path in enumerate(streams, 1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    small_networks()
    main(arguments)


def small_networks() -> None:
    """In this process networks of the size `tiny` have 4 blocks of width 48."""
    BACKBONE_SIZES["tiny"] = BackboneSize(embed_dim=48, depth=4, num_heads=3)


@dataclass
class Soak:
    """A plate, the command that segments it, and what is known of the runs."""

    plate: Path
    model: Path
    count: int
    workers: int = 2
    chance: random.Random = field(default_factory=random.Random)

    @property
    def num_good(self) -> int:
        """Images that can be segmented."""
        return sum(KINDS[index % len(KINDS)] in GOOD for index in range(self.count))

    def start(self, out: Path) -> Run:
        """Start the batch or resume it."""
        arguments = [
            *("segment", str(self.plate), "-m", str(self.model), "--device", "cpu", "--page", "0"),
            *("--workers", str(self.workers), "--report", "--format", "tif", "--format", "geojson"),
            *("--resume", "-o", str(out)),
        ]
        return Run(arguments, self.model.parent)

    def run(self, out: Path) -> Ended:
        """A whole run."""
        return self.start(out).ended()

    def moments(self, number: int) -> list[int]:
        """Numbers of finished images, spread over the batch with some chance."""
        step = self.num_good / (number + 1)
        return [round(step * (i + 1 + self.chance.uniform(-0.3, 0.3))) for i in range(number)]

    def wait_for(self, run: Run, journal: Path, rows: int) -> None:
        """Until so many images are done, and a little longer."""
        while count_rows(journal) < rows and run.still_runs():
            time.sleep(0.002)
        time.sleep(self.chance.uniform(0, 0.05))


def contents(folder: Path) -> dict[str, Any]:
    """What must be equal: SHA-256 by name, the rows of the journal, the images of the report."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.name == JOURNAL_NAME:
            found[path.name] = {row["name"]: row for row in read_journal(path)}
        elif path.name == "report.html":
            text = path.read_text(encoding="utf-8", errors="replace")
            found[path.name] = sorted(set(re.findall(r"well\d+", text)))
        else:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def notes_and_failures(text: str) -> list[str]:
    """The notes and failures among the lines of a run."""
    return sorted(line for line in text.splitlines() if line.startswith(("note: ", "failed: ")))


def kill_and_resume(soak: Soak, out: Path, kills: int) -> Ended:
    """Kill runs at random moments; the last one comes to its end."""
    for rows in soak.moments(kills):
        run = soak.start(out)
        soak.wait_for(run, out / JOURNAL_NAME, rows)
        run.kill()
    return soak.run(out)


# --- what is found on the way ---


def sampled(run: Run, journal: Path) -> Iterator[dict[str, int]]:
    """Rows of the journal, resident memory and open files, as often as a row was added."""
    rows = -1
    while run.still_runs():
        if (now := count_rows(journal)) > rows:
            rows = now
            with contextlib.suppress(OSError, ValueError):  # the process has just ended
                status = Path(f"/proc/{run.pid}/status").read_text()
                memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
                files = len(os.listdir(f"/proc/{run.pid}/fd"))
                yield {"rows": rows, "rss_kb": memory, "open_files": files}
        time.sleep(0.02)


def at_images(samples: list[dict[str, int]], soak: Soak, points: int = 9) -> list[dict[str, int]]:
    """Medians of memory and least open files (writers hold some for a moment) around image 200, 300, …"""
    found = []
    for place in range(points):
        image = soak.count * (place + 2) // (points + 1)
        rows, near = image * soak.num_good / soak.count, soak.num_good / 25
        window = [s for s in samples if rows - near <= s["rows"] <= rows + near]
        rss = int(np.median([s["rss_kb"] for s in window]))
        found.append(
            {"image": image, "rss_kb": rss, "open_files": min(s["open_files"] for s in window)}
        )
    return found


def undisturbed(soak: Soak, out: Path) -> tuple[str, list[dict[str, int]]]:
    """What a run without trouble writes to stdout, and the samples of memory and open files."""
    run = soak.start(out)
    samples = list(sampled(run, out / JOURNAL_NAME))
    code, text, errors = run.ended()
    assert (code, "arning" in errors) == (1, False), errors  # 1: some images cannot be read
    assert text.count("\nfailed: ") == soak.count - soak.num_good, text
    return text, samples


# --- the troubles ---


def mounting() -> str:
    """Why file systems cannot be mounted here, "" if they can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root can mount"
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
            return "the system refuses to mount"
        subprocess.run(["umount", folder], check=True)
    return ""


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    """`mount arguments folder`."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def sentence_of(run: Ended) -> str:
    """The last line of a run that was stopped; it must be one of ours."""
    code, _, errors = run
    last = (errors.strip().splitlines() or [""])[-1]
    assert code == 1, run
    assert last.startswith("dinocell: error: "), run
    assert "[Errno" not in last.split(" (")[0], last
    return last.removeprefix("dinocell: error: ")


def full_disk(soak: Soak, out: Path) -> list[str]:
    """Resume on a disk that fills up again and again; at last it is large enough."""
    whole = sum(path.stat().st_size + 4096 for path in (soak.model.parent / "whole").iterdir())
    heard = []
    with mounted(out, "-t", "tmpfs", "-o", f"size={round(DISK_SHARES[0] * whole)}", "none"):
        for share in (*DISK_SHARES[1:], 3):
            heard.append(sentence_of(soak.run(out / "on_disk")))
            size = f"remount,size={round(share * whole)}"
            subprocess.run(["mount", "-o", size, out], check=True)
        assert soak.run(out / "on_disk").code == 1
        shutil.copytree(out / "on_disk", out.with_name("copied"))
    out.rmdir()
    out.with_name("copied").rename(out)
    return heard


def lost(soak: Soak, out: Path, lose: Callable[[], object], restore: Callable[[], object]) -> list:
    """Take the folder away in the middle of three runs, bring it back after each, then resume."""
    heard = []
    for rows in soak.moments(3):
        run = soak.start(out)
        soak.wait_for(run, out / JOURNAL_NAME, rows)
        lose()
        try:
            heard.append(sentence_of(run.ended()))
        finally:
            restore()
    assert soak.run(out).code == 1
    return heard


def network_folder_lost(soak: Soak, out: Path) -> list[str]:
    """A mount that goes away while it is used; the empty folder below it stays."""
    store, share = out.with_name(f"{out.name}_store"), out.with_name(f"{out.name}_share")
    share.mkdir()
    store.mkdir()

    def mount() -> None:
        assert list(share.iterdir()) == [], "results were written below the mount"
        subprocess.run(["mount", "--bind", store, share], check=True)

    def unmount() -> None:
        subprocess.run(["umount", "-l", share], check=True)

    mount()
    try:
        heard = lost(soak, share / "out", unmount, mount)
    finally:
        subprocess.run(["umount", "-l", share], check=False)
    (store / "out").rename(out)
    return heard


def folder_renamed(soak: Soak, out: Path) -> list[str]:
    """The output folder gets another name while it is used, and its old one afterwards."""
    away = out.with_name(f"{out.name}_away")

    def restore() -> None:
        assert not out.exists(), "a folder was made in place of the one that is gone"
        away.rename(out)

    return lost(soak, out, lambda: out.rename(away), restore)


def inputs_lost(soak: Soak, out: Path) -> list[str]:
    """The images are gone for a while: each fails, and a later run segments it."""
    away = soak.plate.with_name("plate_away")
    heard = []
    for rows in soak.moments(2):
        run = soak.start(out)
        soak.wait_for(run, out / JOURNAL_NAME, rows)
        soak.plate.rename(away)
        try:
            code, text, _ = run.ended()
        finally:
            away.rename(soak.plate)
        assert code == 1
        heard.append(f"{text.count('failed: ')} images failed")
    assert soak.run(out).code == 1
    return heard


def read_only_files(soak: Soak, out: Path) -> list[str]:
    """Files that cannot be replaced among the outputs: of an image, the journal, and the summary."""
    run = soak.start(out)
    soak.wait_for(run, out / JOURNAL_NAME, 1)
    run.kill()
    last = soak.count - len(KINDS)
    heard = []
    for names in (
        [f"well{last}_labels.tif", f"well{last + 1}_cells.csv"],
        [JOURNAL_NAME],
        ["summary.csv"],
    ):
        paths = [out / name for name in names]
        for path in paths:
            path.touch()
            subprocess.run(["chattr", "+i", path], check=True)
        try:
            ended = soak.run(out)
        finally:
            subprocess.run(["chattr", "-i", *paths], check=True)
        if len(names) == 2:
            assert ended.out.count("\nfailed: ") == soak.count - soak.num_good + 2, ended
            heard += [line for line in ended.out.splitlines() if any(n in line for n in names)]
        else:
            heard.append(sentence_of(ended))
    assert soak.run(out).code == 1
    return heard


TROUBLES: dict[str, Callable[[Soak, Path], list[str]]] = {
    "full disk": full_disk,
    "network folder lost": network_folder_lost,
    "output folder renamed": folder_renamed,
    "inputs lost": inputs_lost,
    "read-only files": read_only_files,
}


def write_results(path: Path, soak: Soak, found: dict[str, Any]) -> None:
    """After each part, so that an end before the last one costs one part."""
    rss = [point["rss_kb"] for point in found["memory"]]
    files = {point["open_files"] for point in found["memory"]}
    summary = {
        "command": " ".join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
        "images": soak.count,
        "kinds": [kind.__name__ for kind in KINDS],
        "rss_change_percent": round(100 * max(abs(kb / rss[0] - 1) for kb in rss), 1),
        "open_files": sorted(files),
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
    }
    others = json.loads(path.read_text()) if path.exists() else []
    others = [run for run in others if run["command"] != summary["command"]]
    path.write_text(json.dumps([*others, summary | found], indent=1) + "\n")


def main() -> None:
    """Run all, print and write what was found."""
    parser = argparse.ArgumentParser(description="Segment 1,000 files on a failing machine.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=5, help="0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=[*TROUBLES], default=[*TROUBLES])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    from dinocell.network.model import save_model
    from tests.conftest import random_model

    found: dict[str, Any] = {"troubles": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_networks()
        save_model(folder / "model.safetensors", random_model())
        make_plate(folder / "plate", args.images, args.seed)
        soak = Soak(folder / "plate", folder / "model.safetensors", args.images)
        soak.chance.seed(args.seed)
        began = time.monotonic()
        text, samples = undisturbed(soak, folder / "whole")
        found["undisturbed_s"] = round(time.monotonic() - began, 1)
        found["memory"] = at_images(samples, soak)
        print(f"undisturbed: {found['undisturbed_s']} s\n{json.dumps(found['memory'])}", flush=True)
        expected = contents(folder / "whole")
        found["files_compared"] = len(expected)
        if args.kills:
            resumed = kill_and_resume(soak, folder / "killed", args.kills)
            same = contents(folder / "killed") == expected and notes_and_failures(
                resumed.out
            ) == notes_and_failures(text)
            found["troubles"][f"{args.kills} kills"] = {"files_equal": same}
            print(f"{args.kills} kills: {same}", flush=True)
        write_results(args.out, soak, found)
        refused = mounting()
        for trouble in args.only:
            out = folder / trouble.replace(" ", "_")
            if refused and trouble in ("full disk", "network folder lost", "read-only files"):
                found["troubles"][trouble] = {"left_out": refused}
                continue
            heard = TROUBLES[trouble](soak, out)
            heard = [line.replace(str(folder), "") for line in heard]
            same = contents(out) == expected
            found["troubles"][trouble] = {"files_equal": same, "heard": heard}
            print(trouble, json.dumps(found["troubles"][trouble], indent=1), flush=True)
            write_results(args.out, soak, found)
    wrong = [name for name, what in found["troubles"].items() if what.get("files_equal") is False]
    raise SystemExit(f"not all files are equal: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
