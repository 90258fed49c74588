"""The tensors of one network from any file or folder, under the names that they have there.

Nothing is unpickled but tensors, and the table of contents of a DCP folder by a reader that knows
its few classes only.
"""

import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from dinov3.cells.weights.architecture import KERNEL
from dinov3.cells.weights.fit import State, WeightsError, refuse_zeros
from dinov3.cells.weights.foreign import HF_KERNEL, hf_facts

HEADER = "dinov3_backbone"

# The kernel of the patch embedding in Meta's and timm's files, and in Hugging Face's.
_ANCHORS = (KERNEL, HF_KERNEL)

# A file may hold several networks: part of the entries' names → network.
_NETWORK_OF = {"teacher": "teacher", "student": "student", "gram_teacher": "gram"}
_NETWORK_OF |= dict.fromkeys(("model_ema", "ema", "averaged"), "ema")

# The networks that answer a request, best first.  None: the file holds one network.
NETWORKS: dict[str, tuple[str | None, ...]] = {
    "teacher": ("teacher", "ema", None),
    "student": ("student", None),
}

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class FoundNetwork:
    """The tensors of one network under the names of the file, and facts from beside them."""

    state: State
    format: str
    which: str | None = None
    heads: int | None = None
    rope_base: float | None = None


def read_network(path: Path, which: str) -> FoundNetwork:
    """The backbone of a file or folder; `which` is a key of `NETWORKS`.  WeightsError: it has none."""
    if path.is_dir():
        return _read_folder(path, which)
    if path.suffix.lower() == ".onnx":
        raise _no_backbone(path, "an exported graph")
    with path.open("rb") as stream:
        start = stream.read(64)
    page = start.lstrip()[:1] == b"<" or start.startswith(b"version https://git-lfs")
    named = path.suffix == ".safetensors" and start and start[:2] != b"PK"
    kind = "meta"
    if not page and (named or start[8:9] == b"{"):
        tensors, metadata = _open_safetensors(path)
        if HEADER in metadata or "dinocell" in metadata:
            kind = "dinocell"
        if "dinocell" in metadata:  # a whole model, whose decoder is not looked at below
            refuse_zeros(tensors, path, whole=True)
            if not any(name.endswith(KERNEL) for name in tensors):
                raise _no_backbone(path, "a model of convolutions")
        return _network(tensors, which, path, kind)
    content = read_pickled(path)
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"Weights must be a state dict, got {path} with a {type(content).__name__}: save the "
            "state dict alone"
        )
    found = _network(dict(_flat(content)), which, path, kind)
    return found if found.which is None else replace(found, format="checkpoint")


def _no_backbone(path: Path, kind: str) -> WeightsError:
    return WeightsError(
        f"Weights must hold a DINOv3 ViT backbone, got {path}, {kind}: give a backbone file, a teacher "
        "file, or a model with a transformer"
    )


def _network(tensors: Mapping[str, Tensor], which: str, path: Path, kind: str) -> FoundNetwork:
    """The requested network among the tensors of a file, or of a folder of Hugging Face."""
    prefix, network = _network_prefix(tensors, which, path)
    config = (path if path.is_dir() else path.parent) / "config.json"
    return FoundNetwork(_under(tensors, prefix), kind, network, *hf_facts(config))


def read_teacher(path: Path) -> State:
    """The backbone and heads of a teacher: `teacher_checkpoint.pth`, a DCP folder of it or of a run.

    Raises:
        FileNotFoundError, WeightsError: there is none; the content is damaged, or holds no teacher.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"A teacher must be a file or a DCP folder, got {path}: check the path"
        )
    if path.is_file():
        content = read_pickled(path)
        if not isinstance(content, Mapping) or not isinstance(content.get("teacher"), Mapping):
            raise WeightsError(
                f'A teacher file must have the entry "teacher", got {path} without: a backbone alone '
                "goes to student.pretrained_weights"
            )
        return {k: v for k, v in content["teacher"].items() if isinstance(v, Tensor)}
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(f"A DCP folder must have .metadata, got {path}: check the path")
    with _complete(path):
        reader, entries = _dcp_entries(path)
        for prefix in ("model.teacher.", "model.model_ema.", "model."):
            if any(key.startswith(f"{prefix}backbone.") for key in entries):
                break
        else:
            raise WeightsError(
                f"{path} must hold a teacher, got entries such as {next(iter(entries), None)}: give "
                "OUT/eval/training_N/sharded_teacher_checkpoint or a checkpoint of a run"
            )
        state = _load_dcp(reader, {k: e for k, e in entries.items() if k.startswith(prefix)})
    return {key.removeprefix(prefix): value for key, value in state.items()}


def read_pickled(path: Path) -> Any:
    """The content of a file of `torch.save` with tensors and plain containers alone.

    Anything else, such as a damaged file or one with other objects, raises WeightsError.
    """
    with path.open("rb") as stream:
        start = stream.read(64)
    problem, advice = None, "fetch it again"
    if not start:
        problem = "an empty file"
    elif start.lstrip()[:1] == b"<":
        problem = "a web page or an error message, not the file itself"
    elif start.startswith(b"version https://git-lfs"):
        problem = "a pointer of git LFS, not the file itself"
    elif start[:2] != b"PK" and start[:1] != b"\x80":
        problem = "neither a PyTorch archive nor a .safetensors"
    if problem is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "weights only" in problem.lower() or "weights_only" in problem:
                problem = "with other objects, which are not unpickled"
                advice = "save its state dict alone, with the program that made it"
            else:
                problem = f"cut short or damaged: {problem}"
    raise WeightsError(
        f"Weights must be a complete file of tensors alone, got {path} ({problem}): {advice}"
    )


def _flat(content: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by their dotted names."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{before}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")


def _plain_name(name: str) -> str:
    """Without the parts that torch.compile, activation checkpointing and FSDP add."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _under(tensors: Mapping[str, Tensor], prefix: str) -> State:
    """The entries below a prefix, by their names without it."""
    plain = {_plain_name(name): value for name, value in tensors.items()}
    return {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}


def _network_prefix(names: Iterable[str], which: str, path: Path) -> tuple[str, str | None]:
    """The prefix of the requested network's backbone, and which network it is."""
    plain = [_plain_name(name) for name in names]
    found: dict[str | None, list[str]] = {}
    for name in plain:
        for anchor in _ANCHORS:
            if name == anchor or name.endswith(f".{anchor}"):
                prefix = name.removesuffix(anchor)
                parts = [_NETWORK_OF[part] for part in prefix.split(".") if part in _NETWORK_OF]
                found.setdefault(parts[0] if parts else None, []).append(prefix)
    for network in NETWORKS[which]:
        if network in found:
            return min(found[network], key=lambda prefix: (len(prefix), prefix)), network
    if found:
        others = ", ".join(str(network) for network in found)
        raise WeightsError(
            f"Weights must hold the {which}'s backbone, got {path} with that of the {others} only: "
            "choose the other network"
        )
    shown = f"entries such as {', '.join(plain[:5])}" if plain else "no tensor"
    raise WeightsError(
        f"Weights must hold a DINOv3 ViT backbone, got {path} with {shown}: give a backbone file, a "
        "teacher file or a checkpoint folder"
    )


def _open_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise WeightsError(
            f"Weights must be a complete .safetensors, got {path} ({error}): fetch it again"
        ) from error


def _read_folder(path: Path, which: str) -> FoundNetwork:
    if (path / ".metadata").is_file():
        return _read_dcp(path, which)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            "A folder must be a checkpoint (.metadata) or Hugging Face's (*.safetensors), "
            f"got {path}: {_folder_hint(path)}"
        )
    tensors: State = {}
    for file in files:
        tensors |= _open_safetensors(file)[0]
    return _network(tensors, which, path, "meta")


def _folder_hint(path: Path) -> str:
    """Which part of a run's folder was probably meant."""
    numbers = [p for p in path.iterdir() if p.name.isdecimal() and (p / ".metadata").is_file()]
    if numbers:
        return f"give one of its checkpoints, such as {max(numbers, key=lambda p: int(p.name))}"
    for name in ("sharded_teacher_checkpoint", "teacher_checkpoint.pth", "ckpt"):
        if (path / name).exists():
            return f"give {path / name}" + (" or rather a folder in it" if name == "ckpt" else "")
    return "check the path"


_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the few classes of a DCP table of contents, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            value = getattr(torch, name, None)
            if value is torch.Size or isinstance(value, (torch.dtype, torch.layout)):
                return value
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")


class CheckpointReader(dcp.FileSystemReader):
    """torch's reader of DCP folders, which unpickles the table of contents without foreign code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents; pickle.UnpicklingError if it holds other objects."""
        with Path(self._get_metadata_path(kwargs.get("rank"))).open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("The table of contents is no DCP metadata")
        storage = getattr(metadata, "storage_meta", None) or StorageMeta()
        storage.load_id = self.load_id
        metadata.storage_meta = storage
        return metadata


def _read_dcp(path: Path, which: str) -> FoundNetwork:
    """Only the requested network's tensors are read, whatever the number of shards."""
    with _complete(path):
        reader, entries = _dcp_entries(path)
        prefix, network = _network_prefix(entries, which, path)
        chosen = {k: e for k, e in entries.items() if _plain_name(k).startswith(prefix)}
        state = _load_dcp(reader, chosen)
    return FoundNetwork(_under(state, prefix), "checkpoint", network)


def _dcp_entries(path: Path) -> tuple[CheckpointReader, dict[str, TensorStorageMetadata]]:
    reader = CheckpointReader(path)
    entries = reader.read_metadata().state_dict_metadata
    return reader, {k: e for k, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def _load_dcp(reader: CheckpointReader, entries: Mapping[str, TensorStorageMetadata]) -> State:
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch notes that one process reads
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Whatever fails while a checkpoint is read is an error of the checkpoint."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        reason: BaseException = error
        if isinstance(error, dcp.api.CheckpointException) and error.failures:
            reason = next(iter(error.failures.values()))[0]
        text = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        raise WeightsError(
            f"A checkpoint must be complete, got {path} ({text}): use an earlier checkpoint"
        ) from error
