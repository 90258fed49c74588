"""Start and end of the process group, ranks and subgroups (matches `dinov3.distributed`).

Without a process group everything answers for one process, rank 0 of 1.
"""

import builtins
import os
import random
import re
import socket
import subprocess
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

_subgroup: dist.ProcessGroup | None = None
_device_type: str | None = None
_plain_print = builtins.print


def is_enabled() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's number, from 0."""
    return dist.get_rank(group) if is_enabled() else 0


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes."""
    return dist.get_world_size(group) if is_enabled() else 1


def is_main_process(group: dist.ProcessGroup | None = None) -> bool:
    """Whether this is rank 0."""
    return get_rank(group) == 0


def get_default_process_group() -> dist.ProcessGroup | None:
    """The group of all processes, None without one."""
    return dist.group.WORLD if is_enabled() else None


def get_process_subgroup() -> dist.ProcessGroup | None:
    """The subgroup of this process, all processes unless `new_subgroups` made some."""
    return _subgroup if _subgroup is not None else get_default_process_group()


def get_subgroup_rank() -> int:
    """This process's number within its subgroup."""
    return get_rank(get_process_subgroup())


def get_subgroup_size() -> int:
    """Number of processes of this process's subgroup."""
    return get_world_size(get_process_subgroup())


def is_subgroup_main_process() -> bool:
    """Whether this is rank 0 of its subgroup."""
    return get_subgroup_rank() == 0


def new_subgroups(all_subgroup_ranks: Sequence[Sequence[int]]) -> None:
    """Divide the processes into groups, each given by its ranks.

    Raises ValueError (a rank is missing or appears twice).
    """
    global _subgroup
    ranks = sorted(rank for group in all_subgroup_ranks for rank in group)
    if ranks != list(range(get_world_size())):
        raise ValueError(
            f"Subgroups must hold each of {get_world_size()} ranks once, got "
            f"{[list(group) for group in all_subgroup_ranks]}: list every rank in one group"
        )
    for group in all_subgroup_ranks:
        made = dist.new_group(list(group))
        if get_rank() in group:
            _subgroup = made


def save_in_main_process(*args: Any, **kwargs: Any) -> None:
    """`torch.save` on rank 0 of the subgroup only."""
    if is_subgroup_main_process():
        torch.save(*args, **kwargs)


class TorchDistributedEnvironment:
    """Addresses and ranks, from torchrun's variables, else SLURM's, else for one process."""

    def __init__(self) -> None:
        self.master_addr = "127.0.0.1"
        self.master_port = 0
        self.rank = self.local_rank = 0
        self.world_size = self.local_world_size = 1
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            self._from_torchrun()
        elif "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ:
            # Only what srun has started: the shell of a job also has a SLURM_PROCID, and would wait
            # for tasks that nobody starts.
            self._from_slurm()
        else:
            self.master_port = _free_port()

    def _from_torchrun(self) -> None:
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise RuntimeError(
                f"The variables of torchrun must be complete, got none for {', '.join(missing)}: start "
                "with torchrun, or unset RANK and WORLD_SIZE"
            )
        self.master_addr = os.environ["MASTER_ADDR"]
        self.master_port = int(os.environ["MASTER_PORT"])
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def _from_slurm(self) -> None:
        job = int(os.environ["SLURM_JOB_ID"])
        self.rank = int(os.environ.get("SLURM_PROCID", 0))
        self.local_rank = int(os.environ.get("SLURM_LOCALID", 0))
        nodes = int(_of_step("NUM_NODES", "SLURM_JOB_NUM_NODES", "1"))
        self.world_size = int(_of_step("NUM_TASKS", "SLURM_NTASKS", "1"))
        self.local_world_size = max(self.world_size // nodes, 1)
        self.master_addr = os.environ.get("MASTER_ADDR") or _first_host(
            _of_step("NODELIST", "SLURM_JOB_NODELIST", "127.0.0.1")
        )
        # All tasks of a step must choose the same port, and two jobs on a node different ones; a
        # start that found it taken is followed by one with another.  Linux gives out those above.
        step, restart = os.environ["SLURM_STEP_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
        drawn = random.Random(f"{job}.{step}.{restart}").randint(20_000, 32_000)
        self.master_port = int(os.environ.get("MASTER_PORT") or drawn)

    def export(self, *, overwrite: bool = False) -> Self:
        """Write the values into the environment, where `torch.distributed` looks for them.

        Raises RuntimeError (another value is set and `overwrite` is false).
        """
        values = {name.upper(): str(value) for name, value in vars(self).items()}
        for name, value in values.items():
            if not overwrite and os.environ.get(name, value) != value:
                raise RuntimeError(
                    f"{name} must be {value}, got {os.environ[name]}: unset this variable"
                )
        os.environ.update(values)
        return self


def compute_on(device_type: str | None) -> None:
    """Tell the next `enable` what the processes compute on (ours; its arguments are upstream's).

    `device_type`: "cpu" takes Gloo also beside a GPU; None: GPUs where there are some.
    """
    global _device_type
    _device_type = device_type


def enable(
    *,
    set_cuda_current_device: bool = True,
    overwrite: bool = False,
    nccl_async_error_handling: bool = False,
    restrict_print_to_main_process: bool = True,
    timeout: timedelta | None = None,
) -> None:
    """Make the process group: NCCL for GPUs, Gloo otherwise.

    Args:
        set_cuda_current_device: this process's GPU becomes the current one.
        overwrite: replace foreign values of the environment.
        nccl_async_error_handling: a failed collective ends the process instead of hanging.
        restrict_print_to_main_process: `print` of other ranks is silent (`force=True` prints).
        timeout: after which a collective fails.

    Raises RuntimeError (there is one already).
    """
    if is_enabled():
        raise RuntimeError(
            "A process group must be made once, got a second call of enable: call disable before"
        )
    environment = TorchDistributedEnvironment().export(overwrite=overwrite)
    use_cuda = torch.cuda.is_available() and _device_type != "cpu"
    device_id = None
    if use_cuda:
        device_id = torch.device("cuda", environment.local_rank)
        if set_cuda_current_device:
            torch.cuda.set_device(device_id)
        if nccl_async_error_handling:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    dist.init_process_group(
        backend="nccl" if use_cuda else "gloo", timeout=timeout, device_id=device_id
    )
    dist.barrier()
    if restrict_print_to_main_process:
        _restrict_print(is_main_process())


def disable() -> None:
    """Take the process group down; nothing happens without one."""
    global _subgroup
    _subgroup = None
    builtins.print = _plain_print
    if is_enabled():
        dist.destroy_process_group()


def _restrict_print(allowed: bool) -> None:
    def restricted(*args: Any, force: bool = False, **kwargs: Any) -> None:
        if allowed or force:
            _plain_print(*args, **kwargs)

    builtins.print = restricted


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _of_step(name: str, of_job: str, default: str) -> str:
    """SLURM's variable of this step, which may be smaller than its job."""
    return os.environ.get(f"SLURM_STEP_{name}", os.environ.get(of_job, default))


def _first_host(nodes: str) -> str:
    """The first name of SLURM's compressed list, such as gpu[03-04],cpu1.

    scontrol knows its grammar; a container without it gets the usual part.
    """
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
        assert entry is not None
        return re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry[0])
