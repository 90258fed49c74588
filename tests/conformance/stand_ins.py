"""Stand-ins that let upstream's tree run on a CPU and without torchvision.

Upstream's programs name CUDA devices whatever the machine has: here these names do what a CPU can do.
Upstream's data part imports torchvision for its own augmentations, which the tests replace by ours: here
the names exist, so that every test runs whether torchvision is installed or not.  Nothing in this file is
part of DINOCell.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
from typing import Any

_kept: list[Any] = []


def _here(device: Any) -> Any:
    return "cpu" if device is not None and str(device).startswith("cuda") else device


class _Transform:
    """A transform of torchvision by name: it takes any settings and returns its input."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, image: Any) -> Any:
        return image


class _InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class _Transforms(types.ModuleType):
    """`torchvision.transforms.v2`: every capitalised name is a transform."""

    InterpolationMode = _InterpolationMode

    def __getattr__(self, name: str) -> type:
        if not name[0].isupper():
            raise AttributeError(name)
        made = type(name, (_Transform,), {})
        setattr(self, name, made)
        return made


class _VisionDataset:
    """`torchvision.datasets.VisionDataset`: its attributes, and a pair transform of both transforms."""

    def __init__(
        self,
        root: Any = None,
        transforms: Any = None,
        transform: Any = None,
        target_transform: Any = None,
    ) -> None:
        self.root = root
        self.transform = transform
        self.target_transform = target_transform
        if transforms is None and (transform is not None or target_transform is not None):
            transforms = _StandardTransform(transform, target_transform)
        self.transforms = transforms


class _StandardTransform:
    def __init__(self, transform: Any, target_transform: Any) -> None:
        self.transform = transform
        self.target_transform = target_transform

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


def provide_torchvision() -> None:
    """Make `import torchvision` work where it is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        declare_torchvision_operators()
        return
    package, transforms, datasets = (
        types.ModuleType(f"torchvision{end}") for end in ("", ".transforms", ".datasets")
    )
    v2 = _Transforms("torchvision.transforms.v2")
    package.transforms, package.datasets, transforms.v2 = transforms, datasets, v2  # type: ignore[attr-defined]
    datasets.VisionDataset = _VisionDataset  # type: ignore[attr-defined]
    sys.modules |= {module.__name__: module for module in (package, transforms, v2, datasets)}


def declare_torchvision_operators() -> None:
    """torchvision of PyPI is linked against CUDA; beside a CPU build of torch its names suffice."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
        for operator in (name, f"_{name}_backward"):
            library.define(f"{operator}(Tensor a) -> Tensor")
    library.define("deform_conv2d(Tensor a) -> Tensor")
    library.define("_deform_conv2d_backward(Tensor a) -> Tensor")
    _kept.append(library)  # the operators exist as long as the library


def use_the_cpu() -> None:
    """Devices, meshes and reductions of CUDA and NCCL, on a CPU with gloo."""
    import torch
    import torch.distributed as dist
    import torch.distributed.device_mesh as meshes
    import torch.utils._device as devices

    devices._device_constructors()  # made now, so that `torch.device("meta")` still finds them
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    def moved(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if "device" in options:
                options["device"] = _here(options["device"])
            return function(*arguments, **options)

        return call

    for name in ("full_like", "tensor"):
        setattr(torch, name, moved(getattr(torch, name)))
    to_empty = torch.nn.Module.to_empty
    torch.nn.Module.to_empty = (  # type: ignore[method-assign]
        lambda self, *, device, recurse=True: to_empty(self, device=_here(device), recurse=recurse)
    )
    from_group, init_mesh = meshes.DeviceMesh.from_group, meshes.init_device_mesh
    meshes.DeviceMesh.from_group = staticmethod(  # type: ignore[method-assign]
        lambda group, kind, *a, **k: from_group(group, _here(kind), *a, **k)
    )
    meshes.init_device_mesh = lambda kind, *a, **k: init_mesh(_here(kind), *a, **k)
    init_group = dist.init_process_group
    dist.init_process_group = lambda backend=None, **k: init_group(backend="gloo", **k)
    reduce_all, gather = dist.all_reduce, dist.all_gather_into_tensor

    def mean_too(
        tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op == dist.ReduceOp.AVG:  # gloo has none
            reduce_all(tensor, op=dist.ReduceOp.SUM, group=group)
            tensor.div_(dist.get_world_size(group))
            return None
        return reduce_all(tensor, op=op, group=group, async_op=async_op)

    dist.all_reduce = mean_too
    dist.all_gather_into_tensor = lambda out, tensor, group=None, async_op=False: gather(
        out, tensor.reshape(-1) if tensor.ndim == 0 else tensor, group=group, async_op=async_op
    )
