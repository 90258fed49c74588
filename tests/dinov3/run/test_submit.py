"""Submitting a script as a job, and what a job sets up and takes down."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from dinov3.logging import cleanup_logging
from dinov3.run.init import job_context
from dinov3.run.submit import (
    CheckpointableSubmitter,
    get_shared_folder,
    main,
)
from dinov3.utils.cluster import get_slurm_executor_parameters

SCRIPT = """
import json, pathlib, sys

def main(arguments):
    folder = arguments[0].removeprefix("--output-dir=")
    pathlib.Path(folder, "seen.json").write_text(json.dumps(arguments))
    return len(arguments)

def other(arguments):
    return "other"
"""


@pytest.fixture(autouse=True)
def own_log():
    yield
    cleanup_logging()


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def asked(monkeypatch):
    """What an executor is asked for, in place of a cluster."""
    seen = SimpleNamespace(parameters={}, submitted=None, made=None)

    class Executor:
        def __init__(self, **how):
            seen.made = how

        def update_parameters(self, **parameters):
            seen.parameters = parameters

        def submit(self, job):
            seen.submitted = job
            return SimpleNamespace(job_id="12")

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    for name in ("PARTITION", "QOS", "ACCOUNT"):
        monkeypatch.delenv(f"DINOV3_SLURM_{name}", raising=False)
    monkeypatch.delenv("DINOV3_CHECKPOINT_DIR", raising=False)
    return seen


def submit(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["submit", *map(str, arguments)])
    main()


def test_job_of_the_command_line(asked, monkeypatch, script, tmp_path):
    submit(
        monkeypatch, "--nodes", 2, "--ngpus", 4, "--timeout", 90, "--slurm-partition", "gpu",
        "--slurm-qos", "high", "--slurm-account", "lab", "--comment", "why", "--exclude", "n1",
        "--slurm-nice", 7, "--slurm-array-parallelism", 3, "--output-dir", tmp_path / "logs",
        script, "--config-file", "F", "optim.lr=1",
    )  # fmt: skip
    assert asked.parameters == {
        "name": "script", "mem_gb": 0, "nodes": 2, "gpus_per_node": 4, "tasks_per_node": 4,
        "cpus_per_task": 16, "timeout_min": 90, "slurm_partition": "gpu", "slurm_qos": "high",
        "slurm_account": "lab", "slurm_comment": "why", "slurm_exclude": "n1",
        "slurm_signal_delay_s": 120, "slurm_array_parallelism": 3,
        "slurm_additional_parameters": {"nice": 7},
    }  # fmt: skip
    assert asked.made["folder"] == str(tmp_path / "logs")
    assert asked.submitted.args == ["--config-file", "F", "optim.lr=1"]


def test_defaults_come_from_the_environment(asked, monkeypatch, script, tmp_path):
    monkeypatch.setenv("DINOV3_SLURM_PARTITION", "p")
    monkeypatch.setenv("DINOV3_SLURM_QOS", "q")
    monkeypatch.setenv("DINOV3_SLURM_ACCOUNT", "a")
    monkeypatch.setenv("DINOV3_CHECKPOINT_DIR", str(tmp_path))
    monkeypatch.setenv("USER", "me")
    submit(monkeypatch, script)
    found = [asked.parameters[f"slurm_{name}"] for name in ("partition", "qos", "account")]
    assert found == ["p", "q", "a"]
    assert asked.made["folder"] == str(tmp_path / "me" / "experiments" / "%j")
    assert "slurm_partition" in get_slurm_executor_parameters(1, 8)
    assert get_slurm_executor_parameters(1, 8, mem_gb=5)["mem_gb"] == 5


def test_without_settings_the_cluster_decides(asked, monkeypatch, script, tmp_path):
    submit(monkeypatch, "--output-dir", tmp_path, script)
    assert not {"slurm_partition", "slurm_qos", "slurm_account"} & set(asked.parameters)


def test_wrong_calls_are_one_sentence(asked, monkeypatch, script, tmp_path):
    with pytest.raises(SystemExit, match=r"must be a file, got nothing\.py"):
        submit(monkeypatch, "nothing.py")
    with pytest.raises(SystemExit, match="neither --output-dir nor DINOV3_CHECKPOINT_DIR"):
        submit(monkeypatch, script)
    with pytest.raises(RuntimeError):
        get_shared_folder()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match="needs the package submitit"):
        submit(monkeypatch, "--output-dir", tmp_path, script)


def test_on_the_node(monkeypatch, script, tmp_path):
    """The function gets the folder with the job's number; requeued, it is called alike."""
    requeued = []
    monkeypatch.setitem(
        sys.modules,
        "submitit",
        SimpleNamespace(
            JobEnvironment=lambda: SimpleNamespace(job_id=34),
            helpers=SimpleNamespace(DelayedSubmission=requeued.append),
        ),
    )
    (tmp_path / "34").mkdir()
    submitter = CheckpointableSubmitter(str(script), "main", ["a=1"], tmp_path / "%j")
    assert submitter() == 2
    assert (tmp_path / "34" / "seen.json").read_text() == f'["--output-dir={tmp_path}/34", "a=1"]'
    own = CheckpointableSubmitter(str(script), "main", [f"--output-dir={tmp_path}"], "elsewhere")
    assert own() == 1, "the script's own folder is kept"
    assert CheckpointableSubmitter(str(script), "other", [], tmp_path)() == "other"
    submitter.checkpoint()
    assert vars(requeued[0]) == vars(submitter)


def test_context_of_a_job(tmp_path):
    before = list(logging.getLogger("dinov3").handlers)
    drawn = []

    def fail() -> None:
        with job_context(output_dir=str(tmp_path / "o"), distributed_enabled=False, seed=4):
            drawn.append(torch.rand(1))
            logging.getLogger("dinov3").info("noted")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert logging.getLogger("dinov3").handlers == before
    assert "noted" in (tmp_path / "o" / "logs" / "log.txt").read_text()
    with job_context(distributed_enabled=False, logging_enabled=False, seed=4):
        assert torch.equal(torch.rand(1), drawn[0])
    with job_context(distributed_enabled=False, logging_enabled=False, seed=5):
        assert not torch.equal(torch.rand(1), drawn[0])
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        with (
            pytest.raises(ValueError, match="output folder must be one that can be made"),
            job_context(output_dir=str(place), distributed_enabled=False),
        ):
            pass
