"""The processes of a training run: their numbers and devices, and what they exchange.

`torchrun` or `srun` starts them; each holds the whole model.  One process needs no group, and every
method here then answers at once without one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dinocell.errors import ConfigError, DINOCellError
from dinocell.network.model import resolve_device

# Process 0 tunes thresholds while the others wait in a collective.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)

Value = TypeVar("Value")


class Processes:
    """Number, count and device of this process, and the exchanges of a run.

    Every method but the constructor is a collective: all processes call it, in the same order.  Process
    0 writes the files.  `ends_together` says that all processes meet the error under way alike.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.ends_together = False

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """Mean over processes; not finite as soon as one value is not."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.world_size == 1:
            return flag
        highest = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return bool(highest)

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Result of `work`, done by process 0 while the others wait.

        An error of it is raised in all processes, so that each ends with the same sentence.
        """
        if self.world_size == 1:
            return work()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                answer[0] = work()
            except Exception as error:
                failure = error
                # Other errors may not survive the journey as objects.
                known = isinstance(error, DINOCellError)
                answer[1] = error if known else RuntimeError(f"Process 0 failed: {error}")
        dist.broadcast_object_list(answer, src=0)
        if failure is not None or answer[1] is not None:
            self.ends_together = True
            raise failure or answer[1]
        return answer[0]

    def gather(self, own: Sequence[Value], total: int) -> list[Value] | None:
        """Put items together that were dealt out like cards: item i lies in process i mod count.

        Process 0 returns all `total` items in order, the others None.
        """
        if self.world_size == 1:
            return list(own)
        collected: list[Any] = []
        # One item of each process at a time: distance maps of all images at once may be too much.
        for position in range(-(-total // self.world_size)):
            item = own[position] if position < len(own) else None
            received: list[Any] | None = [None] * self.world_size if self.is_main else None
            dist.gather_object(item, received, dst=0)
            collected += received or []
        return collected[:total] if self.is_main else None

    def average_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by its mean over processes."""
        if self.world_size > 1:
            from dinov3.cells.strategy import average_gradients

            average_gradients(module)

    def share_weights(self, module: nn.Module) -> None:
        """Parameters and buffers of process 0 for all."""
        if self.world_size > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0)


def is_main_process() -> bool:
    """Whether this process is the only one or the first of those started together."""
    from dinov3.distributed import TorchDistributedEnvironment

    return int(TorchDistributedEnvironment().rank) == 0


@contextmanager
def processes_of_run(device: str) -> Iterator[Processes]:
    """Make the process group of a run, and take it down after it; nothing of it for one process.

    A group that the caller made before is used and left in place.  `device` is that of
    `TrainConfig`: with several processes `auto` and `cuda` are the GPU of this process's number on
    its machine, `auto` the CPU where there is none.  Raises ConfigError (several processes shall
    run on one GPU, or on a kind of device that cannot exchange); UsageError (as `resolve_device`).
    """
    from dinov3 import distributed

    if distributed.is_enabled():
        world_size = distributed.get_world_size()
        local_rank = torch.cuda.current_device() if torch.cuda.is_available() else 0
        own = _device_of_process(device, local_rank, world_size)
        yield Processes(distributed.get_rank(), world_size, own)
        return
    environment = distributed.TorchDistributedEnvironment()
    if environment.world_size == 1:
        yield Processes(0, 1, resolve_device(device))
        return
    chosen = _device_of_process(device, environment.local_rank, environment.world_size)
    if chosen.type == "cpu" and torch.cuda.is_available():
        # `enable` takes NCCL wherever there is a GPU, and NCCL moves nothing that lies on the CPU.
        environment.export()
        dist.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT)
    else:
        distributed.enable(restrict_print_to_main_process=False, timeout=_COLLECTIVE_TIMEOUT)
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), chosen)
    try:
        yield processes
    except BaseException:
        group = distributed.get_default_process_group()
        if chosen.type == "cuda" and not processes.ends_together and group is not None:
            # NCCL's orderly end waits for the others, who wait for this process: break it off.
            group.abort()
        raise
    finally:
        distributed.disable()


def _device_of_process(device: str, local_rank: int, world_size: int) -> torch.device:
    if world_size == 1:
        return resolve_device(device)
    count = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"The device of {world_size} processes must be auto, cuda or cpu, got {device}: leave "
            "it out, then each takes a GPU of its own"
        )
    if device == "cpu":
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(
            f"Every process of a machine must have a GPU of its own, got process {local_rank} of a "
            f"machine that shows it {count}: start fewer processes, or show each all GPUs"
        )
    return torch.device("cuda", local_rank)
