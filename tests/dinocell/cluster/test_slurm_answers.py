"""What SLURM's commands print, read as SLURM 22 and later print it."""

from __future__ import annotations

import pytest

from dinocell.cluster.slurm import (
    JobState,
    cluster_name,
    job_states,
    largest_array,
    objection,
    own_job,
    partitions,
    requeue,
    slurm_is_here,
)

# One line of `scontrol show job -o`, with blanks in values and times of days.
RUNNING = (
    "JobId=1207 JobName=ssl-run a UserId=ada(1000) GroupId=ada(1000) MCS_label=N/A Priority=4294 "
    "Nice=0 Account=lab QOS=normal JobState=RUNNING Reason=None Dependency=(null) Requeue=1 "
    "Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=1-02:03:04 TimeLimit=2-00:00:00 "
    "TimeMin=N/A SubmitTime=2026-03-01T10:00:00 EligibleTime=2026-03-01T10:02:05 "
    "StartTime=2026-03-01T10:02:05 EndTime=2026-03-03T10:02:05 Deadline=N/A "
    "PreemptEligibleTime=2026-03-01T10:02:05 PreemptTime=None SuspendTime=None "
    "Partition=gpu AllocNode:Sid=login:77 NodeList=node1 NumNodes=1 "
    "Command=/home/ada/my runs/a b.sh JobState here WorkDir=/home/ada/my runs "
    "StdErr=/home/ada/runs/a/1207_0_log.out StdIn=/dev/null StdOut=/home/ada/runs/a/1207_0_log.out "
    "Power= Comment=first try TresPerNode=gres/gpu:a100:4\n"
)  # fmt: skip


def test_a_line_of_a_running_job(slurm):
    slurm.answer("scontrol show job -o 1207", RUNNING)
    # 26 h 3 min 4 s, and two days.
    assert job_states(["1207"]) == {
        "1207": JobState(
            "1207", "RUNNING", "", 2, False, 93_784, 172_800, "/home/ada/runs/a/1207_0_log.out"
        )
    }


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("JobState=PENDING Reason=Priority", "reason", "Priority"),
        ("PreemptTime=2026-03-01T12:00:00", "preempted", True),
        ("PreemptTime=Unknown", "preempted", False),
        ("RunTime=00:00:59", "run_s", 59),
        ("RunTime=10-00:00:00", "run_s", 864_000),
        ("RunTime=INVALID", "run_s", None),
        ("TimeLimit=UNLIMITED", "limit_s", None),
        ("TimeLimit=Partition_Limit", "limit_s", None),
        ("TimeLimit=00:01:00", "limit_s", 60),
        ("Restarts=11", "restarts", 11),
        ("StdOut=", "log", ""),
        ("StdOut=/home/ada/my runs/5_0_log.out", "log", "/home/ada/my runs/5_0_log.out"),
        ("JobState=RUNNING Comment=see JobState=FAILED Restarts=7", "state", "RUNNING"),
        ("Restarts=1 Comment=see JobState=FAILED Restarts=7", "restarts", 1),
    ],
)
def test_values_of_a_line(slurm, words, field, value):
    slurm.answer("scontrol show job -o 5", f"JobId=5 JobName=a {words} Partition=gpu\n")
    assert getattr(job_states(["5"])["5"], field) == value


def test_tasks_of_an_array(slurm):
    """Each has a number of its own, and is known by that of the array; one asks once."""
    slurm.answer(
        "scontrol show job -o 40",
        "JobId=40 ArrayJobId=40 ArrayTaskId=2-7%4 JobState=PENDING Reason=JobArrayTaskLimit\n"
        "JobId=42 ArrayJobId=40 ArrayTaskId=1 JobState=RUNNING Reason=None Restarts=1\n"
        "JobId=41 ArrayJobId=40 ArrayTaskId=0 JobState=COMPLETED Reason=None\n",
    )
    states = job_states(["40_0", "40_1"])
    assert (states["40_0"].state, states["40_0"].waits_or_runs) == ("COMPLETED", False)
    assert (states["40_1"].state, states["40_1"].restarts) == ("RUNNING", 1)
    assert slurm.calls() == ["scontrol show job -o 40"]


def test_tasks_of_an_array_that_wait(slurm):
    slurm.answer(
        "scontrol show job -o 40",
        "JobId=40 ArrayJobId=40 ArrayTaskId=1,3-5%2 JobState=PENDING Reason=Priority\n"
        "JobId=41 ArrayJobId=40 ArrayTaskId=0 JobState=RUNNING Reason=None\n",
    )
    states = job_states(["40_0", "40_1", "40_4"])
    assert states["40_1"].state == states["40_4"].state == "PENDING"


@pytest.mark.parametrize("line", ["", "slurm_load_jobs error: Invalid job id specified\n", "\n\n"])
def test_answers_without_a_job(slurm, line):
    slurm.answer("scontrol show job -o 5", line)
    assert job_states(["5"]) == {}


def test_accounting_knows_what_the_controller_has_forgotten(slurm):
    slurm.answer("scontrol show job -o 1", "JobId=1 JobState=RUNNING\n")
    slurm.answer(
        "sacct -X -n -P -o JobID,State,Reason -j 2,3_0,4",
        "2|CANCELLED by 1000|None\n3_0|TIMEOUT|TimeLimit\n\n",
    )
    states = job_states(["1", "2", "3_0", "4"])
    assert set(states) == {"1", "2", "3_0"}
    assert states["2"] == JobState("2", "CANCELLED")
    assert states["3_0"] == JobState("3_0", "TIMEOUT", "TimeLimit")


def test_no_accounting(slurm):
    slurm.answer("sacct", error="sacct: error: Slurm accounting storage is disabled", code=1)
    assert job_states(["7"]) == {}


def test_without_slurm(no_slurm):
    assert not slurm_is_here()
    assert job_states(["7"]) == {}
    assert partitions() == []
    assert cluster_name() == ""
    assert "scontrol" in requeue("7")
    assert "sbatch" in objection("job.sh")


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, "12_0"),
    ],
)
def test_the_job_of_this_process(monkeypatch, environment, job):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_job() == job


def test_requeue(slurm):
    slurm.answer("scontrol requeue 12_3")
    assert requeue("12_3") == ""
    slurm.answer("scontrol requeue 5", error="Requeue is disabled\n", code=1)
    assert requeue("5") == "Requeue is disabled"
    slurm.answer("scontrol requeue 6", code=3)
    assert requeue("6") == "scontrol ended with 3"


def test_partitions_and_the_name_of_the_cluster(slurm):
    slurm.answer("sinfo -h -o %R", "train\nurgent\ntrain\n")
    assert slurm_is_here()
    assert partitions() == ["train", "urgent"]
    slurm.answer(
        "scontrol show config", "AccountingStorageHost = x\nClusterName             = blue\nA = b\n"
    )
    assert cluster_name() == "blue"
    slurm.answer("scontrol show config", code=1)
    assert cluster_name() == ""


@pytest.mark.parametrize(("shown", "expected"), [("1001", 1001), ("0", None), ("UNLIMITED", None)])
def test_the_largest_array(slurm, shown, expected):
    slurm.answer(
        "scontrol show config", f"MaxArraySize            = {shown}\nMaxBatchRequeue = 5\n"
    )
    assert largest_array() == expected


def test_objection(slurm):
    slurm.answer(
        "sbatch --test-only job.sh",
        error="sbatch: Job 5 to start at 2026-03-01T10:00:00 using 8 processors on nodes node1\n",
    )
    assert objection("job.sh") == ""
    slurm.answer(
        "sbatch --test-only job.sh",
        error="sbatch: error: Memory specification can not be satisfied\n"
        "allocation failure: Requested node configuration is not available\n",
        code=1,
    )
    assert (
        objection("job.sh") == "allocation failure: Requested node configuration is not available"
    )
