"""Collectives on tensors of unequal size and on dictionaries (matches `dinov3.distributed`)."""

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.distributed.torch_distributed_wrapper import get_world_size, is_enabled


def gather_all_tensors(result: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The tensors of all processes, in rank order; their sizes may differ, not their rank.

    `result`: of any shape, a number too.
    """
    if not is_enabled():
        return [result]
    result = result.contiguous()
    world = get_world_size(group)
    scalar = result.ndim == 0
    own = result.reshape(1) if scalar else result
    size = torch.tensor(own.shape, device=own.device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size, group=group)
    largest = torch.stack(sizes).amax(dim=0).tolist()
    padded = own.new_zeros(largest)
    padded[tuple(slice(length) for length in own.shape)] = own
    gathered = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    cut = [
        tensor[tuple(slice(length) for length in shape.tolist())]
        for tensor, shape in zip(gathered, sizes, strict=True)
    ]
    return [tensor[0] for tensor in cut] if scalar else cut


def reduce_dict(input_dict: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Sum or mean of each value over processes, all in one call.

    `input_dict`: tensors of one shape and type; all processes have the same keys.
    """
    world = get_world_size()
    if world < 2 or not input_dict:
        return input_dict
    names = sorted(input_dict)
    values = torch.stack([input_dict[name] for name in names])
    dist.all_reduce(values)
    if average:
        values = values / world  # also of whole numbers
    return dict(zip(names, values, strict=True))
