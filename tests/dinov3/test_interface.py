"""Public names and signatures, compared with those recorded from upstream.

`golden/api_*.json` map a dotted name to its kind and parameters ("name:KIND:default"; classes
and functions used as defaults are recorded by type only).  It was taken from an import of
facebookresearch/dinov3 @ 6876159; renew it by importing a checkout of the wanted commit and writing
`inspect.signature` of the same names in the same form.
"""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).parents[2] / "dinov3_modified" / "dinov3"
FOLDER = Path(__file__).parent / "golden"
GOLDEN = {
    name: recorded
    for file in ("api_vit.json", "api_data.json", "api_ssl.json")
    for name, recorded in json.loads((FOLDER / file).read_text()).items()
}


def described(thing) -> list[str]:
    rows = []
    for parameter in inspect.signature(thing).parameters.values():
        default = parameter.default
        if default is inspect.Parameter.empty:
            text = "-"
        elif isinstance(default, (bool, int, float, str, tuple, type(None))):
            text = str(default)
        else:
            text = type(default).__name__
        rows.append(f"{parameter.name}:{parameter.kind.name}:{text}")
    return rows


def test_signatures():
    found = {}
    for name in GOLDEN:
        module_name, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module_name), attribute, None)
        kind = "class" if inspect.isclass(thing) else "function"
        found[name] = [kind, described(thing) if callable(thing) else "missing"]
    assert found == GOLDEN


def test_import_needs_no_extra_package():
    code = (
        "import sys; import dinov3.hub.backbones, dinov3.models; "
        "print([m for m in ('torchvision', 'xformers', 'omegaconf', 'dinocell') if m in sys.modules]); "
        "import dinov3.data, dinov3.data.loaders, dinov3.data.datasets; "
        "absent = ('torchvision', 'cv2', 'boto3', 'wandb', 'submitit', 'dinocell', 'matplotlib'); "
        "print([m for m in absent if m in sys.modules])"
    )
    tree = str(Path(__file__).parents[2] / "dinov3_modified")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": tree, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "[]"]
