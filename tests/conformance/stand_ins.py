"""Stand-ins that let a tree of upstream's run on a CPU: its CUDA names do what a CPU can do.

For tests of programs that say "cuda" whatever there is; nothing here is part of DINOCell.
"""

from __future__ import annotations

from typing import Any

_kept: list[Any] = []


def _here(device: Any) -> Any:
    return "cpu" if device is not None and str(device).startswith("cuda") else device


def declare_torchvision_operators() -> None:
    """torchvision of PyPI is linked against CUDA; beside a CPU build of torch its names suffice."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
        for operator in (name, f"_{name}_backward"):
            library.define(f"{operator}(Tensor a) -> Tensor")
    library.define("deform_conv2d(Tensor a) -> Tensor")
    library.define("_deform_conv2d_backward(Tensor a) -> Tensor")
    _kept.append(library)  # it lasts as long as the program


def use_the_cpu() -> None:
    """Devices, meshes and reductions of CUDA and NCCL, on a CPU with gloo."""
    import torch
    import torch.distributed as dist
    import torch.distributed.device_mesh as meshes
    import torch.utils._device as devices

    devices._device_constructors()  # made now, so that `torch.device("meta")` still finds them
    declare_torchvision_operators()
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
