"""What sbatch would get, what is refused before, and the same on this machine."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dinocell.cli import main
from dinocell.cluster.commands import command_of
from dinocell.cluster.plan import PlannedRun, run_dir_of
from dinocell.cluster.record import Start, Submission, note_submission, read_record
from dinocell.cluster.site import SiteProfile
from dinocell.cluster.submission import parse_dependency, run_here, sbatch_text, submit
from dinocell.errors import UsageError
from dinocell.io import write_image, write_labels

RUN = PlannedRun("ssl-a", ("pretrain", "c.yaml"), Path("runs/a"))


def text(site: SiteProfile | None = None, *runs: PlannedRun, dependency=None, log_dir=None) -> str:
    return sbatch_text(runs or [RUN], site or SiteProfile(), dependency, log_dir)


def options_of(script: str) -> set[str]:
    return {line for line in script.splitlines() if line.startswith("#SBATCH")}


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"partition": "long"}, ["--partition=long"]),
        ({"account": "lab"}, ["--account=lab"]),
        ({"qos": "high"}, ["--qos=high"]),
        ({"gres": "gpu:a100:2"}, ["--gres=gpu:a100:2", "--ntasks-per-node=2"]),
        ({"constraint": "a100&nvlink"}, ["--constraint='a100&nvlink'"]),
        ({"exclude": "n[1-3]"}, ["--exclude='n[1-3]'"]),
        ({"reservation": "course"}, ["--reservation=course"]),
        ({"nodes": 3}, ["--nodes=3"]),
        ({"tasks_per_node": 4}, ["--ntasks-per-node=4"]),
        ({"time": "2-00:00:00"}, ["--time=2-00:00:00"]),
        ({"mem": "96G"}, ["--mem=96G"]),
        ({"cpus_per_gpu": 12}, ["--cpus-per-task=12"]),
        ({"mail_user": "ada@lab"}, ["--mail-user=ada@lab"]),
        ({"mail_type": "FAIL,END"}, ["--mail-type=FAIL,END"]),
        ({"signal_ahead_s": 300}, ["--signal=USR2@300"]),
        ({"nice": 100}, ["--nice=100"]),
        ({"comment": "a b"}, ["--comment='a b'"]),
        ({"extra": {"licenses": "matlab", "exclusive": ""}}, ["--licenses=matlab", "--exclusive"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_key_makes_its_line(change, lines):
    before, after = options_of(text()), options_of(text(SiteProfile(**change)))
    assert {f"#SBATCH {line}" for line in lines} <= after - before


def test_the_rest_of_the_file():
    script = text()
    assert {
        "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --job-name=ssl-a",
        "#SBATCH --time=24:00:00", "#SBATCH --signal=USR2@120",
        f"#SBATCH --output={Path.cwd()}/runs/a/slurm/%j_0_log.out",
    } <= options_of(script)  # fmt: skip
    assert "wckey" not in script
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert '--kill-on-bad-exit=1 --cpus-per-task=8 bash -c \'trap "" USR2 TERM;' in srun
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_environment_and_setup_come_before_the_work():
    site = SiteProfile(
        environment={"A": "x y", "B": "$HOME"},
        setup=("module load cuda", "source venv/bin/activate"),
    )
    lines = text(site).splitlines()
    wanted = ["export A='x y'", "export B='$HOME'", "module load cuda", "source venv/bin/activate"]
    places = [lines.index(line) for line in wanted]
    srun = next(place for place, line in enumerate(lines) if line.startswith("srun"))
    assert places == sorted(places)
    assert places[-1] < srun


def test_container_and_python():
    (srun,) = [x for x in text(SiteProfile(container="apptainer exec --nv d.sif")).splitlines()
               if x.startswith("srun")]  # fmt: skip
    assert "dinocell apptainer exec --nv d.sif python3 -u -m submitit" in srun
    script = text(SiteProfile(container="box run", python="/opt/py"))
    assert "dinocell box run /opt/py -u" in script
    assert 'scontrol requeue "$job"' in script  # a container seldom has it
    assert "scontrol" not in text(SiteProfile(python="/opt/my python"))
    assert "dinocell '/opt/my python' -u" in text(SiteProfile(python="/opt/my python"))


def test_array_dependency_and_logs(tmp_path):
    runs = [PlannedRun("s", ("pretrain",), tmp_path / name) for name in ("a", "b", "c")]
    script = text(SiteProfile(array_parallelism=2), *runs, dependency="afterok:5")
    assert {"#SBATCH --array=0-2%2", "#SBATCH --dependency=afterok:5"} <= options_of(script)
    assert f"#SBATCH --output={tmp_path}/slurm/%A_%a_0_log.out" in options_of(script)
    assert f"{tmp_path}/logs/%j_0_log.out" in text(log_dir=tmp_path / "logs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("12", "afterok:12"),
        ("12_3", "afterok:12_3"),
        ("afterany:12:13", "afterany:12:13"),
        ("afterok:1,afterany:2", "afterok:1,afterany:2"),
        ("singleton", "singleton"),
        ("after:12+5", "after:12+5"),
    ],
)
def test_dependency(given, expected):
    assert parse_dependency(given) == expected


@pytest.mark.parametrize("given", ["", "later:12", "afterok:x", "afterok", "12,13"])
def test_wrong_dependency(given):
    with pytest.raises(UsageError, match="must be a job's number or like afterany:123"):
        parse_dependency(given)


def test_without_slurm_the_message_names_the_alternatives(no_slurm, tmp_path):
    with pytest.raises(UsageError, match="set `local` or `dry_run`"):
        submit([PlannedRun("a", ("pretrain",), tmp_path / "a")], SiteProfile())
    assert not (tmp_path / "a").exists()


def test_refusal_of_slurm_is_one_sentence(slurm, tmp_path):
    slurm.answer("sbatch", error="sbatch: error: Invalid account or account/partition\n", code=1)
    slurm.answer("sinfo -h -o %R", "cpu\ngpu\n")
    with pytest.raises(UsageError, match=r"Invalid account or account/partition.*are cpu, gpu"):
        submit([PlannedRun("a", ("pretrain",), tmp_path / "a")], SiteProfile(account="nobody"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_that_a_job_has_is_refused(slurm, tmp_path):
    run = PlannedRun("a", ("pretrain",), tmp_path / "a")
    folder = str(run.run_dir.resolve())
    note_submission([Submission("7", "a", ["pretrain"], folder, "log", 0.0, "north")])
    slurm.job("7", JobState="PENDING")
    with pytest.raises(UsageError, match=r"which job 7 uses \(pending\).*afterany:7"):
        submit([run], SiteProfile())
    slurm.job("7", JobState="COMPLETED")
    slurm.answer("sbatch", "Submitted batch job 8\n")
    assert submit([run], SiteProfile()).job == "8"


def test_a_run_may_wait_for_its_own_job_only(slurm, tmp_path):
    run = PlannedRun("a", ("pretrain",), tmp_path / "a")
    folder = str(run.run_dir.resolve())
    note_submission([Submission("7_2", "a", ["pretrain"], folder, "log", 0.0, "north")])
    slurm.answer("scontrol show job -o 7", "JobId=9 ArrayJobId=7 ArrayTaskId=2 JobState=RUNNING\n")
    slurm.answer("sbatch", "Submitted batch job 8\n")
    slurm.job("6", JobState="COMPLETED")
    with pytest.raises(UsageError, match="which job 7_2 uses"):
        submit([run], SiteProfile(), dependency="afterok:6+7")
    assert submit([run], SiteProfile(), dependency="afterany:7").job == "8"


def test_a_dependency_that_nobody_knows_is_refused(slurm, tmp_path):
    """SLURM would take it for a job that has ended, and start at once."""
    run = PlannedRun("a", ("pretrain",), tmp_path / "a")
    slurm.answer("sbatch", "Submitted batch job 8\n")
    slurm.answer("sacct", "")
    slurm.job("6", JobState="PENDING")
    note_submission([Submission("5", "b", ["pretrain"], "elsewhere", "log", 0.0, "north")])
    for given in ("99", "afterok:6:99", "afterany:6_3,afterok:99+5"):
        with pytest.raises(UsageError, match="jobs that SLURM knows, got 99: leave out"):
            submit([run], SiteProfile(), dependency=given)
    for given in ("6", "afterany:5", "singleton"):  # ours may be forgotten by SLURM
        assert submit([run], SiteProfile(), dependency=given).job == "8"
    assert submit([run], SiteProfile(), dependency="99", look=False).job == "8"
    note_submission([Submission("98", "b", ["pretrain"], "elsewhere", "log", 0.0, "south")])
    with pytest.raises(UsageError, match="got 98: leave out"):
        submit([run], SiteProfile(), dependency="98")


def test_sbatch_says_nothing_beside_the_sentence(slurm, tmp_path, capfd):
    slurm.answer("sbatch", error="sbatch: error: invalid partition specified: far\n", code=1)
    slurm.answer("sinfo -h -o %R", "cpu\n")
    with pytest.raises(UsageError, match="invalid partition specified: far"):
        submit([PlannedRun("a", ("pretrain",), tmp_path / "a")], SiteProfile(partition="far"))
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


def test_a_folder_that_cannot_be_made(slurm, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"must be one that can be made, got .*file"):
        submit([PlannedRun("a", ("pretrain",), tmp_path / "file")], SiteProfile())
    assert not any(call.startswith("sbatch") for call in slurm.calls())


def test_jobs_that_belong_together_are_cancelled_together(slurm, masks, capsys):
    slurm.script("sbatch", "n=$(cat FOLDER/n 2>/dev/null || echo 7); echo $((n + 1)) > FOLDER/n; "
                 "echo Submitted batch job $n".replace("FOLDER", str(slurm.folder)))  # fmt: skip
    command = ["submit", "segment", "pred", "-o", "out", "--allow-mask", "--shards", "1"]
    assert exit_code(*command) == 0
    shown = capsys.readouterr().out
    assert shown.count("cancel:") == 1
    numbers = re.findall(r"^job (\d+)", shown, re.MULTILINE)
    assert len(numbers) == 2
    assert f"cancel: scancel {' '.join(numbers)}\n" in shown


def test_a_waiting_array_keeps_its_plan(slurm, masks, capsys):
    """A second submission is refused before it writes anything."""
    slurm.answer("sbatch", "Submitted batch job 7\n")
    command = ["submit", "segment", "pred", "-o", "out", "--allow-mask", "--shards"]
    assert exit_code(*command, "1") == 0
    plan = Path("out/shards/plan.json").read_text()
    slurm.job("7", JobState="PENDING")
    for more in (["1", "--peak-threshold", "0.9"], ["1", "--overwrite", "--dependency", "7"],
                 ["1", "--local", "--peak-threshold", "0.9"]):  # fmt: skip
        assert exit_code(*command, *more) == 2
        assert "which job 7 uses (pending)" in capsys.readouterr().err
        assert Path("out/shards/plan.json").read_text() == plan
    assert exit_code("shards", "plan", "2", "pred", "-o", "out", "--allow-mask") == 2
    assert "or cancel it (scancel 7)" in capsys.readouterr().err
    assert Path("out/shards/plan.json").read_text() == plan


def test_a_batch_may_wait_for_itself(slurm, masks, capsys):
    """Behind its array and the merging of that: both are named, and then accepted."""
    slurm.script("sbatch", "n=$(cat FOLDER/n 2>/dev/null || echo 7); echo $((n + 1)) > FOLDER/n; "
                 "echo Submitted batch job $n".replace("FOLDER", str(slurm.folder)))  # fmt: skip
    command = ["submit", "segment", "pred", "-o", "out", "--allow-mask", "--shards", "1"]
    assert exit_code(*command) == 0
    array, merging = re.findall(r"^job (\d+)", capsys.readouterr().out, re.MULTILINE)
    (Path("out/shards/0000") / "images.jsonl").touch()  # begun
    slurm.job(array, JobState="RUNNING")
    slurm.job(merging, JobState="PENDING")
    assert exit_code(*command) == 2
    wanted = f"afterany:{array}:{merging}"
    assert wanted in capsys.readouterr().err
    assert exit_code(*command, "--dependency", wanted) == 0
    assert capsys.readouterr().out.count("cancel:") == 1


def test_a_folder_that_slurm_would_rename_is_refused(slurm, tmp_path):
    with pytest.raises(UsageError, match="must be without %"):
        submit([PlannedRun("a", ("pretrain",), tmp_path / "100%j")], SiteProfile())


def test_an_array_that_is_too_large_is_refused(slurm, tmp_path):
    runs = [PlannedRun("a", ("pretrain",), tmp_path / str(index)) for index in range(3)]
    slurm.answer("scontrol show config", "ClusterName = north\nMaxArraySize = 2\n")
    with pytest.raises(UsageError, match=r"at most 2 tasks .*MaxArraySize.*got 3"):
        submit(runs, SiteProfile())
    assert not any(call.startswith("sbatch") for call in slurm.calls())
    slurm.answer("sbatch", "Submitted batch job 8\n")
    assert len(submit(runs[:2], SiteProfile()).tasks) == 2


@pytest.fixture
def masks(tmp_path, monkeypatch) -> Path:
    """Two folders with the same label image."""
    labels = np.zeros((16, 16), np.uint16)
    labels[2:8, 2:8] = 1
    for name in ("pred", "truth"):
        write_labels(tmp_path / name / "a.tif", labels)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_local_leaves_a_record_and_a_log(masks, capsys):
    code = exit_code("submit", "evaluate", "--pred", "pred", "--truth", "truth", "--out", "s.json",
                     "--local", "--set", "environment.COLUMNS=60")  # fmt: skip
    assert code == 0
    assert json.loads((masks / "s.json").read_text())
    (folder,) = Path("runs/evaluate").glob("s-*")
    record = read_record(folder)
    assert record is not None
    assert record.state == "done"
    assert [start.job for start in record.starts] == [""]
    (log,) = (folder / "slurm").glob("*.log")
    assert "written: s.json" in log.read_text()
    assert f"exit code 0, log {log}" in capsys.readouterr().err


def test_local_failure_keeps_the_reason(masks, capfd):
    run = PlannedRun("e", ("evaluate", "--pred", "nowhere", "--truth", "truth"), Path("r"))
    assert run_here([run], SiteProfile()) == 2
    shown = capfd.readouterr().err
    assert "Traceback" not in shown  # a wrong call
    assert shown.count("nowhere") == 2  # in the command, and in the sentence
    record = read_record("r")
    assert record is not None
    assert record.state == "refused"
    assert "nowhere" in record.reason


def test_local_inside_of_a_job_is_not_that_job(masks, slurm, monkeypatch):
    """In somebody's interactive job: nothing of it is requeued, and no process of it is awaited."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    run = PlannedRun("e", ("evaluate", "--pred", "pred", "--truth", "truth"), Path("r"))
    assert run_here([run], SiteProfile()) == 0
    record = read_record("r")
    assert record is not None
    assert [(start.job, start.progress) for start in record.starts] == [("", 0)]
    assert isinstance(record.starts[0], Start)
    assert slurm.calls() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrane", "c.yaml"], "`submit` must get one of pretrain, train, ablate, segment, evaluate"),
        (["evaluate", "--pred", "pred"], "got half a pair"),
        (["segment", "nowhere", "-o", "out"], "nowhere"),
        (["segment", "pred", "-o", "out", "--format", "bmp"], "--format must be one of"),
        (["segment", "pred", "-o", "out", "--gpus", "2"], "divide images with --shards"),
        (["evaluate", "--pred", "pred", "--truth", "truth", "--shards", "2"], "must come with segment"),
        (["evaluate", "--pred", "pred", "--truth", "truth", "--local", "--dependency", "5"],
         "--local must be without --dependency"),
        (["evaluate", "--pred", "pred", "--truth", "truth", "--local", "--dry-run"],
         "--local must be without --dry-run"),
        (["evaluate", "--pred", "pred", "--truth", "truth", "--local", "--nodes", "2"],
         "must have one process"),
        (["evaluate", "--wrong", "x"], "No such option: --wrong"),
        (["evaluate", "--pred", "p", "--truth", "t", "--set", "partion=x"], "did you mean partition"),
        (["evaluate", "--pred", "p", "--truth", "t", "--set", "extra.output=x"], "that no key of the site sets"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused_at_once(masks, capsys, arguments, message):
    assert exit_code("submit", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in masks.iterdir()) == ["pred", "truth"]


@pytest.fixture
def comparison(masks):
    """A file of two variants and two seeds, whose images are here."""
    for part in ("images", "labels"):
        for name in "ab":
            write_image(f"data/{part}/{name}.tif", np.ones((8, 8), np.uint8))
    Path("train.yaml").write_text(
        "model: {size: tiny}\ndata: {datasets: [{name: a, images: data/images, labels: data/labels}]}\n"
    )
    Path("compared.yaml").write_text(
        "base: train.yaml\noutput_dir: out/compared\nseeds: [3, 4]\n"
        "variants: [{name: plain}, {name: bce, overrides: [loss.kind=bce]}]\n"
        "test: [{name: own, folder: data}]\n"
    )
    return Path("compared.yaml")


def test_an_ablation_becomes_an_array_and_its_tables(comparison, capsys):
    assert exit_code("submit", "ablate", "compared.yaml", "--dry-run") == 0
    shown = capsys.readouterr()
    planned = [line for line in shown.err.splitlines() if "dinocell ablate" in line]
    assert planned == [
        f"out/compared/{variant}/seed{seed}: dinocell ablate compared.yaml --only {index}"
        for index, (variant, seed) in enumerate(product(("plain", "bce"), (3, 4)))
    ]
    tasks, tables = shown.out.split("#!/bin/bash")[1:]
    assert "#SBATCH --array=0-3" in tasks
    assert "#SBATCH --job-name=ablate-compared" in tasks
    assert "out/compared/slurm/" in tasks
    assert "#SBATCH --dependency=afterany:JOB_ABOVE" in tables
    assert "#SBATCH --job-name=tables-compared" in tables
    gpus = [[line for line in part.splitlines() if "gres" in line] for part in (tasks, tables)]
    assert gpus[0] == gpus[1], "the tables need the network"
    assert not Path("out").exists()


def test_runs_of_an_ablation_that_have_a_model_are_left_out(comparison, capsys):
    for place in ("plain/seed3", "bce/seed3", "bce/seed4"):
        (Path("out/compared") / place).mkdir(parents=True)
        (Path("out/compared") / place / "model.safetensors").touch()
    assert exit_code("submit", "ablate", "compared.yaml", "--dry-run") == 0
    shown = capsys.readouterr()
    assert re.findall(r"--only \d", shown.err) == ["--only 1"]
    assert "--array" not in shown.out
    assert exit_code("submit", "ablate", "compared.yaml", "--only", "2", "--dry-run") == 0
    assert "bce/seed3: dinocell ablate compared.yaml --only 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("", ["--only", "4"], "--only must be a run from 0 to 3, got 4"),
        ("", ["--gpus", "2"], "ablate must have one process"),
        ("", ["--shards", "2"], "must come with segment"),
        ("", ["--array", "table.csv"], "must be without --array"),
        ("test: [{name: own, folder: far}]", [], "far"),
        ("overrides: [data.datasets.0.images=far]", [], "far"),
        ("overrides: [loss.kind=hinge]", [], "mse, bce"),
    ],
)
def test_faults_of_an_ablation_are_met_before_it_waits(
    comparison, capsys, change, options, message
):
    Path("table.csv").write_text("name,seed\na,1\n")
    kept = [line for line in comparison.read_text().splitlines() if not change.startswith(line[:5])]
    comparison.write_text("\n".join([*kept, change]))
    assert exit_code("submit", "ablate", "compared.yaml", "--dry-run", *options) == 2
    assert message in capsys.readouterr().err
    unseen = exit_code("submit", "ablate", "compared.yaml", "--dry-run", "--no-look", *options)
    assert unseen == (0 if message == "far" else 2)


def test_an_ablation_tells_how_far_it_is(comparison):
    command = command_of(["ablate"])
    for place, step in (("plain/seed3", 40), ("bce/seed4", 2)):
        (Path("out/compared") / place / "checkpoints").mkdir(parents=True)
        (Path("out/compared") / place / f"checkpoints/step_{step:08d}.pt").touch()
    assert command.saved(Path("out/compared/plain/seed3")) == 40
    assert command.saved(Path("out/compared")) == 42
    given = {"config": "compared.yaml", "only": None}
    assert run_dir_of("ablate", given) == Path("out/compared")
    assert run_dir_of("ablate", given | {"only": 3}) == Path("out/compared/bce/seed4")


def test_dry_run_of_shards_writes_nothing(masks, capsys):
    assert exit_code("submit", "segment", "pred", "-o", "out", "--shards", "2", "--dry-run") == 0
    shown = capsys.readouterr()
    assert shown.out.count("#!/bin/bash") == 2  # the parts, and the merging after them
    assert "dependency=afterany:JOB_ABOVE" in shown.out
    assert "dinocell shards run out 0" in shown.err
    assert not Path("out").exists()
