"""What this installation is and can do, and how to repair what is wrong: `dinocell doctor`."""

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

from dinocell import DISTRIBUTION, __version__
from dinocell.compilation import cache_folder
from dinocell.errors import DINOCellError, MissingExtraError, how_to_load
from dinocell.network.model import bundled_models, load_model
from dinocell.network.precision import has_bf16_unit
from dinocell.tree import TREE_VARIABLE, tree_imports

_LEAST_FREE_GB = 2.0  # temporary files of an image of 8,000 x 8,000 px need 1.4
# packages of other names with the same modules
_SAME = {"opencv-python": ("opencv-python-headless", "opencv-contrib-python")}
_FLAGS = ("avx2", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `cure` is empty where nothing is wrong."""

    name: str
    value: str
    cure: str = ""


def examine() -> list[Finding]:
    """Look at versions, device, extras, folders, bundled models, and namesakes on the path."""
    return [
        Finding("dinocell", f"{__version__} in {Path(__file__).parent}"),
        Finding("python", f"{platform.python_version()} in {sys.prefix}"),
        Finding("system", f"{platform.platform()}, {os.cpu_count()} cores"),
        *_packages(),
        *_program(),
        *_devices(),
        *_extras(),
        *_folders(),
        *_models(),
        *_namesakes(),
    ]


def report(findings: list[Finding]) -> str:
    """The findings as aligned lines, cures last."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{finding.name:{width}}  {finding.value}" for finding in findings]
    cures = [f"to repair: {finding.name}: {finding.cure}" for finding in findings if finding.cure]
    return "\n".join([*lines, *(cures or ["nothing is wrong"])])


def _packages() -> Iterator[Finding]:
    """Versions of what every installation needs, against what is asked for."""
    for requirement in _requirements(""):
        yield _package(requirement)


def _program() -> Iterator[Finding]:
    """Whether all that `segment` imports can be loaded, which may need libraries of the system."""
    try:
        importlib.import_module("dinocell.batch.run")
    except ImportError as error:
        yield Finding("program", "cannot be loaded", how_to_load(error))
    else:
        yield Finding("program", "can be loaded")


def _package(requirement: Requirement) -> Finding:
    for name in (requirement.name, *_SAME.get(requirement.name, ())):
        with suppress(metadata.PackageNotFoundError):
            found = metadata.version(name)
            break
    else:
        return Finding(requirement.name, "missing", f"pip install '{requirement}'")
    fits = requirement.specifier.contains(found, prereleases=True)
    cure = "" if fits else f"must be {requirement.specifier}: pip install '{requirement}'"
    return Finding(name, found, cure)


def _requirements(extra: str) -> list[Requirement]:
    """What the distribution needs, of one extra or (empty) always."""
    try:
        texts = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []
    found = []
    for text in texts:
        requirement = Requirement(text)
        of_extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", text)
        if (of_extra[1] if of_extra else "") == extra and (
            requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ):
            requirement.marker = None
            found.append(requirement)
    return found


def _devices() -> Iterator[Finding]:
    import torch

    flags = torch.cpu.get_capabilities()
    names = [name for name in _FLAGS if flags.get(name)]
    yield Finding("processor", ", ".join([platform.machine(), *names]))
    yield Finding("threads", str(torch.get_num_threads()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("gpu", ", ".join(gpus))
    elif shutil.which("nvidia-smi"):
        cure = "install the build of torch for its driver: https://pytorch.org/get-started/locally"
        yield Finding("gpu", "there is one that torch cannot use", cure)
    else:
        yield Finding("gpu", "none")
    yield Finding("precision", "bfloat16" if has_bf16_unit(device) else "float32")


def _extras() -> Iterator[Finding]:
    """Which extras are installed, and what the others lack."""
    try:
        names = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        yield Finding("installation", "none: this is a checkout", "pip install -e . in its folder")
        return
    for name in sorted(set(names) - {"all", "dev", "test"}):
        packages = [_package(requirement) for requirement in _requirements(name)]
        missing = [package.name for package in packages if package.value == "missing"]
        wrong = [f"{package.name} {package.value}" for package in packages if package.cure]
        if missing:  # an extra that nobody asked for is not wrong
            text = f"missing {', '.join(missing)} (pip install '.[{name}]' in the clone)"
            yield Finding(f"extra {name}", text)
        else:
            cure = f"pip install '.[{name}]' in the clone" if wrong else ""
            yield Finding(f"extra {name}", ", ".join(wrong) or "installed", cure)


def _folders() -> Iterator[Finding]:
    folder = cache_folder()
    cure = "" if folder else "set NUMBA_CACHE_DIR to a folder that you can write"
    yield Finding("compiled functions", str(folder or "compiled again at each start"), cure)
    temporary = Path(tempfile.gettempdir())
    free = shutil.disk_usage(temporary).free / 1e9
    cure = "" if free > _LEAST_FREE_GB else "make room, or set TMPDIR to a larger folder"
    yield Finding("temporary files", f"{temporary}, {free:.1f} GB free", cure)


def _models() -> Iterator[Finding]:
    for name in bundled_models():
        try:
            load_model(name)
        except MissingExtraError as error:
            yield Finding(name, str(error))
        except DINOCellError as error:
            yield Finding(name, "damaged", f"install {DISTRIBUTION} again ({error})")
        else:
            yield Finding(name, "can be loaded")


def _namesakes() -> Iterator[Finding]:
    """Other packages named `dinocell` or `dinov3`."""
    try:
        with tree_imports():
            import dinov3
    except (DINOCellError, ImportError) as error:
        yield Finding("dinov3", "another package", str(error))
    else:
        chosen = f" ({TREE_VARIABLE} names it)" if os.environ.get(TREE_VARIABLE) else ""
        yield Finding("dinov3", f"{Path(str(dinov3.__file__)).parent}{chosen}")
    other = [path for path in sys.path if _holds_another_dinocell(Path(path or "."))]
    if other:
        cure = "remove it from the path, or uninstall the package dinocell of another project"
        yield Finding("another dinocell", ", ".join(other), cure)
    if util.find_spec("torchvision") is not None:
        yield Finding("torchvision", "installed, and not needed")


def _holds_another_dinocell(folder: Path) -> bool:
    package = folder / "dinocell"
    # `Path.is_file` raises where the folder cannot be read
    is_package = os.path.isfile(package / "__init__.py")
    return is_package and package.resolve() != Path(__file__).parent.resolve()
