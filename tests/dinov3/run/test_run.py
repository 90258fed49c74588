"""Submission with the real submitit, a site's defaults, and a job's context over processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov3 import distributed
from dinov3.logging import cleanup_logging
from dinov3.run.init import job_context
from dinov3.run.submit import (
    CheckpointableSubmitter,
    get_run_parser,
    get_shared_folder,
    get_submitit_parser,
    load_custom_callable,
    main,
    submit_jobs,
)
from dinov3.utils.cluster import (
    get_checkpoint_path,
    get_slurm_account,
    get_slurm_executor_parameters,
    get_slurm_partition,
    get_slurm_qos,
    get_user_checkpoint_path,
)

ROOT = Path(__file__).parents[3]
SITE = ("DINOV3_SLURM_PARTITION", "DINOV3_SLURM_QOS", "DINOV3_SLURM_ACCOUNT", "DINOV3_CHECKPOINT_DIR")  # fmt: skip


@pytest.fixture(autouse=True)
def no_site(monkeypatch):
    for name in SITE:
        monkeypatch.delenv(name, raising=False)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # fmt: skip
        # Set first, so that what a job exports is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    yield
    cleanup_logging()


@pytest.fixture
def script(tmp_path):
    """A program whose jobs leave what they were called with, and fail with `fail`."""
    path = tmp_path / "a_script.py"
    path.write_text(
        "import json, pathlib, sys\n"
        "def main(arguments):\n"
        "    options = dict(a.removeprefix('--').split('=') for a in arguments if a.startswith('--'))\n"
        "    folder = pathlib.Path(options['output-dir'])\n"
        "    folder.mkdir(parents=True, exist_ok=True)\n"
        "    (folder / 'seen.json').write_text(json.dumps(arguments))\n"
        "    if 'fail' in arguments:\n"
        "        raise RuntimeError('on purpose')\n"
        "    return len(arguments)\n"
    )
    return path


# --- the defaults of a site ---


def test_site_is_what_the_environment_says(monkeypatch):
    getters = (get_slurm_partition, get_slurm_qos, get_slurm_account, get_checkpoint_path)
    assert [get() for get in getters] == [None] * 4
    assert get_user_checkpoint_path() is None
    for name, value in zip(SITE, ("p", "q", "a", "/shared"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("USER", "me")
    assert [get() for get in getters] == ["p", "q", "a", Path("/shared")]
    assert get_user_checkpoint_path() == Path("/shared/me")
    assert get_shared_folder() == Path("/shared/me/experiments")
    monkeypatch.delenv("USER")
    assert get_user_checkpoint_path() == Path("/shared")


def test_empty_settings_are_no_settings(monkeypatch):
    """As a template that is not filled in leaves them; sbatch would refuse an empty partition."""
    for name in SITE:
        monkeypatch.setenv(name, "")
    assert get_slurm_partition() is get_slurm_qos() is get_slurm_account() is None
    assert get_checkpoint_path() is None
    assert get_slurm_executor_parameters(1, 8)["slurm_partition"] is None


@pytest.mark.parametrize(("gpus", "tasks"), [(8, 8), (1, 1), (0, 1)])
def test_one_task_for_each_gpu_and_one_without(gpus, tasks):
    found = get_slurm_executor_parameters(3, gpus, slurm_nice=1)
    assert found == {
        "nodes": 3, "gpus_per_node": gpus, "tasks_per_node": tasks, "cpus_per_task": 16,
        "mem_gb": 0, "slurm_partition": None, "slurm_nice": 1,
    }  # fmt: skip


# --- the command line ---


def test_options_of_upstream_and_their_defaults():
    options = vars(get_run_parser().parse_args(["script.py"]))
    assert options == {
        "ngpus": 8, "nodes": 1, "timeout": 2800, "slurm_partition": None, "slurm_qos": None,
        "slurm_array_parallelism": 256, "slurm_nice": 0, "slurm_account": None, "comment": "",
        "exclude": "", "output_dir": None, "module_path": "script.py", "callable_name": "main",
    }  # fmt: skip
    for spelling in ("--gpus", "--gpus-per-node"):
        assert get_submitit_parser().parse_args([spelling, "2"]).ngpus == 2


def test_what_is_not_of_the_job_goes_to_the_script():
    """Also options that begin like one of the job; those of the job may stand behind the script."""
    args, rest = get_run_parser().parse_known_args(
        ["--nodes", "2", "s.py", "--config-file", "F", "--no-resume", "--time", "3", "--out=x",
         "--output-dir", "D", "optim.lr=1"]
    )  # fmt: skip
    assert (args.nodes, args.timeout, args.output_dir) == (2, 2800, "D")
    assert rest == ["--config-file", "F", "--no-resume", "--time", "3", "--out=x", "optim.lr=1"]


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["submit", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    named = {option for action in get_run_parser()._actions for option in action.option_strings}
    assert named <= set(re.findall(r"(?<!\S)-{1,2}[a-z-]+", text.replace(",", " ")))
    assert "%j is the job" in text


def test_script_is_found_by_its_path_and_imports_from_its_folder(tmp_path, monkeypatch, script):
    (tmp_path / "a_neighbour.py").write_text("VALUE = 3\n")
    (tmp_path / "b_script.py").write_text("from a_neighbour import VALUE\nmain = lambda _: VALUE\n")
    path = list(sys.path)
    assert load_custom_callable(tmp_path / "b_script.py", "main")([]) == 3
    assert sys.path == path
    monkeypatch.delitem(sys.modules, "a_neighbour")
    with pytest.raises(AttributeError, match="must have the function run, got none"):
        load_custom_callable(script, "run")
    with pytest.raises(FileNotFoundError, match=r"got nothing\.py"):
        load_custom_callable("nothing.py", "main")
    monkeypatch.chdir(tmp_path)
    relative = CheckpointableSubmitter("a_script.py", "main", ["--output-dir=o"], "unused")
    monkeypatch.chdir("/")
    assert relative.module_path == str(script), "the job begins in another folder"


# --- with the real package ---


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit", reason="the extra slurm is not installed")


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """SLURM's commands: sbatch keeps the file that it is given and answers like the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/sh\ncp "$1" "{tmp_path}/kept.sh"\necho "Submitted batch job 4711"\n'
    )
    (folder / "srun").write_text("#!/bin/sh\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return tmp_path / "kept.sh"


def test_file_for_sbatch(submitit, sbatch, monkeypatch, script, tmp_path):
    command = [
        "submit", "--nodes", 2, "--ngpus", 4, "--timeout", 90, "--slurm-partition", "gpu",
        "--slurm-qos", "high", "--slurm-account", "lab", "--comment", "why", "--exclude", "n1",
        "--slurm-nice", 7, "--output-dir", tmp_path / "logs", script, "a=1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    main()
    text = sbatch.read_text()
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    asked = dict(line.split("=", 1) for line in lines if "=" in line)
    assert {name: shlex.split(asked[name])[0] for name in (
        "nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "mem", "time", "partition",
        "qos", "account", "comment", "exclude", "nice", "job-name", "signal",
    )} == {
        "nodes": "2", "gpus-per-node": "4", "ntasks-per-node": "4", "cpus-per-task": "16",
        "mem": "0GB", "time": "90", "partition": "gpu", "qos": "high", "account": "lab",
        "comment": "why", "exclude": "n1", "nice": "7", "job-name": "a_script",
        "signal": "USR2@120",
    }  # fmt: skip
    assert "open-mode=append" in lines, "a requeued job continues in the same log"
    assert "submitit" in text.splitlines()[-1]
    assert list((tmp_path / "logs").glob("*4711*submitted.pkl"))


def test_file_for_sbatch_leaves_out_what_the_cluster_decides(
    submitit, sbatch, monkeypatch, script, tmp_path
):
    monkeypatch.setattr(sys, "argv", ["submit", "--output-dir", str(tmp_path / "o"), str(script)])
    main()
    for name in ("partition", "qos", "account", "comment", "exclude"):
        assert f"--{name}=" not in sbatch.read_text()


def _submit_here(submitit, monkeypatch, script, folder, *arguments):
    """Submit to processes of this machine, which have no GPUs to ask for."""
    automatic = submitit.AutoExecutor
    monkeypatch.setattr(
        submitit, "AutoExecutor", lambda folder, **_: automatic(folder=folder, cluster="local")
    )
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'dinov3_modified'}", os.pathsep)
    args = get_run_parser().parse_args(["--ngpus", "0", "--timeout", "5", str(script)])
    job = CheckpointableSubmitter(str(script), "main", list(arguments), folder)
    return submit_jobs(job, folder, args)


def test_job_in_a_process_of_its_own(submitit, monkeypatch, script, tmp_path):
    job = _submit_here(submitit, monkeypatch, script, tmp_path / "jobs" / "%j", "a=1")
    assert job.result() == 2
    folder = tmp_path / "jobs" / str(job.job_id)
    seen = json.loads((folder / "seen.json").read_text())
    assert seen == [f"--output-dir={folder}", "a=1"]
    assert list(folder.glob("*.out")), "its log is beside it"


@pytest.mark.slow
def test_failure_of_a_job_is_reported(submitit, monkeypatch, script, tmp_path):
    job = _submit_here(submitit, monkeypatch, script, tmp_path / "%j", "fail")
    with pytest.raises(submitit.core.utils.FailedJobError, match="on purpose"):
        job.result()


# --- the context of a job ---


def test_group_of_a_job_ends_with_it(tmp_path):
    def fail() -> None:
        with job_context(output_dir=str(tmp_path), seed=None):
            assert distributed.is_enabled()
            assert distributed.get_world_size() == 1
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fail()
    assert not distributed.is_enabled()


def test_no_seed_leaves_the_generators():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with job_context(distributed_enabled=False, logging_enabled=False, seed=None):
        assert torch.equal(torch.get_rng_state(), before)
    with job_context(distributed_enabled=False, logging_enabled=False):
        assert torch.initial_seed() == 0


TWO = """
import logging
import sys
from datetime import timedelta

import torch

from dinov3 import distributed
from dinov3.run.init import job_context

with job_context(sys.argv[1], seed=40, distributed_timeout=timedelta(seconds=77)):
    print(f"seed {torch.initial_seed()}", force=True)
    print("main only")
    logging.getLogger("dinov3").info("noted by %d", distributed.get_rank())
    backend = distributed.get_default_process_group()._get_backend(torch.device("cpu"))
    print(f"limit {backend.options._timeout.seconds}")
print(f"enabled {distributed.is_enabled()}")
"""


@pytest.mark.slow
def test_job_of_two_processes(tmp_path):
    """Each has its own seed and log file; one prints."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'dinov3_modified'}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # The two may write into one another's lines.
    for text, times in (
        ("seed 40", 1), ("seed 41", 1), ("main only", 1), ("limit 77", 1), ("enabled False", 2),
    ):  # fmt: skip
        assert done.stdout.count(text) == times, done.stdout
    logs = sorted((tmp_path / "out" / "logs").iterdir())
    assert len(logs) == 2
    assert ["noted by 0" in log.read_text() for log in logs] == [True, False]
    assert ["noted by 1" in log.read_text() for log in logs] == [False, True]
