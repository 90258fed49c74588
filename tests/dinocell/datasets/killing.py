"""Kill a call before each of its steps that gives or removes a name on the disk, and repeat it."""

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STEPS = ("replace", "unlink", "rmdir")


def kills_of(script: str) -> int:
    """Run a script that calls `kill_everywhere` in a process of its own: forks want one without threads."""
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", f"from killing import kill_everywhere\n{script}"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def kill_everywhere(call: Callable[[Path], object], folder: Path) -> None:
    """Compare what `call(out)` writes after each kill with what it writes in one go; print the kills."""
    whole, out = folder / "whole", folder / "killed" / "out"
    call(whole)
    kills = 0
    while True:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        pid = os.fork()
        if pid == 0:
            try:
                _dies_before_step(kills)
                call(out)
                os._exit(0)
            finally:  # the call has raised: the loop is the parent's
                traceback.print_exc()
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the call failed where nothing killed it"
            break
        kills += 1
        if out.exists():
            assert _contents(whole).keys() <= _contents(out).keys(), f"half after kill {kills}"
        call(out)
        assert [path.name for path in out.parent.iterdir()] == ["out"], f"after kill {kills}"
        assert _contents(out) == _contents(whole), f"after kill {kills}"
    print(kills)


def _dies_before_step(number: int) -> None:
    left = number

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*arguments, **options)

        return step

    for name in _STEPS:
        setattr(os, name, counting(getattr(os, name)))


def _contents(folder: Path) -> dict[str, bytes]:
    names = {path: str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    own = str(folder).encode()
    return {name: path.read_bytes().replace(own, b"OUT") for path, name in names.items()}
