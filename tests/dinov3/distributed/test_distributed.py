"""`dinov3.distributed` between real processes: edges of the collectives, subgroups, SLURM."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dinov3.distributed import TorchDistributedEnvironment

ROOT = Path(__file__).parents[3]

COLLECTIVES = """
import sys
from datetime import timedelta
from pathlib import Path

import torch

from dinov3 import distributed as d

out = Path(sys.argv[1])
d.enable(
    overwrite=True,
    nccl_async_error_handling=True,  # nothing to Gloo
    restrict_print_to_main_process=False,
    timeout=timedelta(seconds=77),
)
rank = d.get_rank()
print(f"unrestricted {rank}")
backend = d.get_default_process_group()._get_backend(torch.device("cpu"))
assert backend.options._timeout == timedelta(seconds=77)


def same(found, expected):
    assert len(found) == len(expected), found
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype, (a, b)
        assert torch.equal(a, b), (a, b)


# One process without rows; other types than float; memory that is not contiguous.
same(
    d.gather_all_tensors(torch.arange(4 * rank).reshape(-1, 2)),
    [torch.zeros(0, 2, dtype=torch.int64), torch.tensor([[0, 1], [2, 3]])],
)
same(d.gather_all_tensors(torch.zeros(0)), [torch.zeros(0)] * 2)
same(
    d.gather_all_tensors(torch.tensor([True, False][: rank + 1])),
    [torch.tensor([True]), torch.tensor([True, False])],
)
table = torch.arange(6.0).reshape(2, 3)
same(d.gather_all_tensors((table + rank).T), [table.T, table.T + 1])
own = torch.full((2,), float(rank), requires_grad=True)
same([t.detach() for t in d.gather_all_tensors(own)], [torch.zeros(2), torch.ones(2)])

# Keys in another order on each process; whole numbers; vectors; what was given stays.
names = ["b", "a"] if rank else ["a", "b"]
given = {name: torch.tensor([{"a": 1, "b": 3}[name], 10 * rank]) for name in names}
total = d.reduce_dict(given, average=False)
same([total["a"], total["b"]], [torch.tensor([2, 10]), torch.tensor([6, 10])])
mean = d.reduce_dict({name: value[1] + rank for name, value in given.items()})
same([mean["a"], mean["b"]], [torch.tensor(5.5), torch.tensor(5.5)])
assert int(given["a"][1]) == 10 * rank
assert d.reduce_dict({}) == {}

# Subgroups: refused ones leave no trace, those of one process see themselves alone.
for wrong in ([[0]], [[0, 1], [1]], [[0, 2]], []):
    try:
        d.new_subgroups(wrong)
    except ValueError as error:
        assert "each of 2 ranks once" in str(error)
    else:
        raise AssertionError(wrong)
assert d.get_process_subgroup() is d.get_default_process_group()
d.new_subgroups([[1], [0]])
alone = d.get_process_subgroup()
assert (d.get_world_size(alone), d.get_rank(alone), d.is_main_process(alone)) == (1, 0, True)
same(d.gather_all_tensors(own.detach(), group=alone), [own.detach()])
assert d.is_main_process() == (rank == 0), "subgroups do not change the ranks of all"

# The last division counts; in one of both processes only the first of them saves.
d.new_subgroups([[0, 1]])
assert (d.get_subgroup_rank(), d.get_subgroup_size()) == (rank, 2)
assert d.is_subgroup_main_process() == (rank == 0)
d.save_in_main_process({"rank": rank}, out / f"saved_by_{rank}.pth")

# The end of the group is the end of its subgroups.
d.disable()
assert (d.get_rank(), d.get_subgroup_rank(), d.get_subgroup_size()) == (0, 0, 1)
assert not d.is_enabled()
"""

SLURM_TASK = """
import torch
from dinov3 import distributed

distributed.enable()
(total,) = distributed.reduce_dict({"x": torch.tensor(distributed.get_rank() + 1.0)}, average=False).values()
print(distributed.get_rank(), distributed.get_world_size(), float(total), force=True)
distributed.disable()
"""


def clean_environment(**added: str) -> dict[str, str]:
    """This environment without what a launcher would set."""
    names = ("MASTER_", "SLURM_", "TORCHELASTIC_")
    plain = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names) and k not in plain}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'dinov3_modified'}",
        **added,
    }


@pytest.mark.slow
def test_edges_of_collectives_and_subgroups(tmp_path):
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(tmp_path)],
        capture_output=True, text=True, env=clean_environment(), timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # The two may write into one another's lines.
    assert done.stdout.count("unrestricted 0") == done.stdout.count("unrestricted 1") == 1
    assert [path.name for path in tmp_path.glob("*.pth")] == ["saved_by_0.pth"]


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_tasks_of_a_slurm_job_find_each_other(monkeypatch):
    """Two processes that know SLURM's variables alone; the port comes from the job's number."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_ID", "0")

    def port(job: int) -> int:
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        return TorchDistributedEnvironment().master_port

    job = next(number for number in range(os.getpid(), os.getpid() + 100) if _is_free(port(number)))
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", SLURM_TASK],
            env=clean_environment(
                SLURM_JOB_ID=str(job), SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
                SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="1",
                SLURM_NTASKS="4", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="localhost,other",
                SLURM_STEP_NODELIST="localhost",
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        ends = [task.communicate(timeout=600) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], ends
    assert [output.split() for output, _ in ends] == [["0", "2", "3.0"], ["1", "2", "3.0"]]


@pytest.mark.parametrize("place", [{}, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}])
def test_a_shell_within_a_job_is_one_process(monkeypatch, place):
    """It has the job's number, that of a batch script even a SLURM_PROCID, but is no task of srun's."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    found = TorchDistributedEnvironment()
    assert (found.rank, found.world_size, found.local_world_size) == (0, 1, 1)
    assert found.master_addr == "127.0.0.1"


@pytest.mark.parametrize(("tasks", "nodes", "local"), [("8", "2", 4), ("1", "1", 1), ("2", "4", 1)])
def test_tasks_on_a_node_are_those_of_the_job_over_its_nodes(monkeypatch, tasks, nodes, local):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    given = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": tasks,
             "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": "n1"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert TorchDistributedEnvironment().local_world_size == local
