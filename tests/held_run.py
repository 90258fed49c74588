"""A training program that waits for a test, so that a signal reaches it before its end."""

from __future__ import annotations

import sys
from pathlib import Path

_HELD = """
import runpy, sys, time
from pathlib import Path
from dinov3.train import ssl_meta_arch

go, module = Path(sys.argv[1]), sys.argv[2]
honest = ssl_meta_arch.SSLMetaArch.forward_backward


def held(self, data, *, iteration=0, **rest):
    while iteration == 2 and not go.exists():
        time.sleep(0.01)
    return honest(self, data, iteration=iteration, **rest)


ssl_meta_arch.SSLMetaArch.forward_backward = held
del sys.argv[1:3]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def held_python(go: Path) -> list[str]:
    """In place of `python -m` before a module: its run stays in iteration 2 until the file `go` exists."""
    return [sys.executable, "-u", "-c", _HELD, str(go)]
