"""wandb: offline files read back; whatever fails there costs records, never the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import wait_until

from dinov3.logging.wandb_logger import WandbLogger, create_wandb_logger

ROOT = Path(__file__).parents[3]


# --- a stand-in for the package ---


class FakeRun:
    def __init__(self, package: FakeWandb) -> None:
        self.package = package

    def log(self, row, step):
        self.package.attempts += 1
        if self.package.failing():
            raise OSError("no route to host")
        self.package.rows.append((step, row))

    def finish(self, exit_code):
        if self.package.finish_error:
            raise ConnectionError("gone")
        self.package.exit_codes.append(exit_code)


class FakeWandb(types.ModuleType):
    """Records what wandb would get, and fails on request."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.rows: list = []
        self.exit_codes: list = []
        self.inits: list = []
        self.attempts = 0
        self.failing = lambda: False
        self.init_error: BaseException | None = None
        self.failing_modes = ("online", "offline")
        self.finish_error = False
        self.ended = 0
        self.Settings = dict
        self.Image = lambda array: ("image", array.shape)

    def init(self, **arguments):
        self.inits.append(arguments)
        if self.init_error is not None and arguments["mode"] in self.failing_modes:
            raise self.init_error
        return FakeRun(self)

    def teardown(self):
        self.ended += 1


@pytest.fixture
def fake(monkeypatch, tmp_path):
    package = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return package


@pytest.fixture
def make(make_cfg):
    def build(*changes: str, **options) -> WandbLogger:
        return create_wandb_logger(make_cfg("wandb.enabled=true", *changes), **options)

    return build


# --- what wandb gets ---


def test_rows_config_and_exit_code(fake, make, tmp_path):
    log = make("wandb.project=cells", "wandb.tags=[a,b]", "wandb.group=g", "wandb.entity=e")
    log.log({"loss": 1.5, "norm": torch.tensor(2.0), "count": np.int64(3)}, 0)
    log.log({"loss": 1.25}, 10)
    log.finish(exit_code=3)
    assert fake.rows == [(0, {"loss": 1.5, "norm": 2.0, "count": 3}), (10, {"loss": 1.25})]
    assert fake.exit_codes == [3]
    (init,) = fake.inits
    assert init["config"]["dino"]["head_n_prototypes"] == 65536  # nested, not text
    assert type(init["config"]["dino"]) is dict
    assert (init["project"], init["group"], init["entity"]) == ("cells", "g", "e")
    assert init["tags"] == ["a", "b"]
    assert init["name"] == tmp_path.name
    assert init["id"] == (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert init["dir"] == str(tmp_path)
    log.finish()  # a second time: nothing
    log.log({"loss": 0.0}, 20)
    assert fake.exit_codes == [3]
    assert len(fake.rows) == 2


def test_name_of_the_run(fake, make):
    make("wandb.name=mine").finish()
    assert fake.inits[0]["name"] == "mine"


def test_original_name_of_log(fake, make):
    log = make()
    log.log_metrics({"loss": 1.0}, step=4)
    log.finish()
    assert fake.rows == [(4, {"loss": 1.0})]


@pytest.mark.parametrize("images", [True, False])
def test_pictures_are_put_at_the_last_step(fake, make, images):
    log = make(f"wandb.images={images}")
    log.log({"loss": 1.0}, 110)
    log.log_images({"visuals/pca": np.zeros((4, 6, 3), np.uint8)}, 100)
    log.finish()
    row = {"visuals/pca": ("image", (4, 6, 3)), "visuals/pca_iteration": 100}
    assert fake.rows[1:] == ([(110, row)] if images else [])


@pytest.mark.parametrize("picture", [np.zeros((4, 6), np.uint8), np.zeros((4, 6, 3))])
def test_pictures_of_another_kind_are_refused(fake, make, picture):
    log = make()
    with pytest.raises(ValueError, match=r"pca must be a uint8 array \(H, W, 3\)"):
        log.log_images({"pca": picture}, 0)
    log.finish()


# --- resumption ---


def test_resumed_run_has_the_same_id_and_no_step_twice(fake, make):
    first = make()
    for step in range(0, 50, 10):
        first.log({"loss": float(step)}, step)
    first.finish()
    second = make()  # from a checkpoint of iteration 24
    for step in range(30, 70, 10):
        second.log({"loss": float(step)}, step)
    second.log_images({"old": np.zeros((2, 2, 3), np.uint8)}, 40)
    second.log({"late": 1.0}, 20)
    second.finish()
    assert [step for step, _ in fake.rows] == [0, 10, 20, 30, 40, 50, 60]
    assert second.dropped_steps == 4
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert fake.inits[1]["resume"] == "allow"


def test_without_resume_another_run_begins(fake, make):
    first = make()
    first.log({"loss": 1.0}, 100)
    first.finish()
    second = make(resume=False)
    second.log({"loss": 2.0}, 0)
    second.finish()
    assert first.run_id != second.run_id
    assert [step for step, _ in fake.rows] == [100, 0]


def test_one_step_may_come_in_several_calls(fake, make):
    log = make()
    log.log({"a": 1.0}, 7)
    log.log({"b": 2.0}, 7)
    log.finish()
    assert fake.rows == [(7, {"a": 1.0}), (7, {"b": 2.0})]


def test_step_is_recorded_before_it_is_logged(fake, make, tmp_path):
    """A kill between the two loses a step, it never repeats one."""
    log = make()
    fake.failing = lambda: True
    log.log({"loss": 1.0}, 7)
    assert json.loads((tmp_path / "wandb_state.json").read_text())["last_step"] == 7


def test_torn_state_file_keeps_the_run(fake, make, tmp_path, caplog):
    make().finish()
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    (tmp_path / "wandb_state.json").write_text('{"run_')
    log = make()
    log.finish()
    assert log.run_id == run_id
    assert "must be readable" in caplog.text


# --- modes ---


@pytest.mark.parametrize(
    ("mode", "key", "variable", "expected"),
    [
        ("auto", False, "", "offline"),
        ("auto", True, "", "online"),
        ("auto", True, "offline", "offline"),
        ("auto", False, "online", "offline"),
        ("offline", True, "", "offline"),
        ("online", True, "", "online"),
        ("online", False, "", "offline"),
    ],
)
def test_mode(fake, make, monkeypatch, caplog, mode, key, variable, expected):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    log = make(f"wandb.mode={mode}")
    log.finish()
    assert (log.mode, fake.inits[0]["mode"]) == (expected, expected)
    assert ("must have an API key" in caplog.text) == ("online" in (mode, variable) and not key)


def test_key_in_netrc_counts_for_its_host_only(fake, make, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine cells.example login user password " + "0" * 40 + "\n")
    (tmp_path / "netrc").chmod(0o600)
    first = make()
    monkeypatch.setenv("WANDB_BASE_URL", "https://cells.example:8443/")
    second = make()
    for log in (first, second):
        log.finish()
    assert (first.mode, second.mode) == ("offline", "online")


def test_without_a_home_no_key_exists(fake, make, monkeypatch):
    monkeypatch.delenv("NETRC")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown user number
    log = make()
    log.finish()
    assert log.mode == "offline"


@pytest.mark.parametrize("how", ["enabled", "mode", "variable", "rank"])
def test_disabled_logger_does_nothing(make_cfg, monkeypatch, tmp_path, how):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    changes = ["wandb.enabled=true"]
    if how == "enabled":
        changes = ["wandb.enabled=false"]
    elif how == "mode":
        changes.append("wandb.mode=disabled")
    elif how == "variable":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    else:
        monkeypatch.setattr("dinov3.logging.wandb_logger.is_main_process", lambda: False)
    log = create_wandb_logger(make_cfg(*changes))
    log.log({"loss": 1.0}, 0)
    log.log_images({"a": np.zeros((2, 2, 3), np.uint8)}, 0)
    log.finish()
    assert not log.enabled
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    ["mode=sometimes", "timeout_s=0", "finish_timeout_s=-1"],
)
def test_settings_out_of_range(make, change):
    name = change.split("=")[0]
    with pytest.raises(ValueError, match=rf"wandb\.{name}` must be"):
        make(f"wandb.{change}")


# --- what goes wrong ---


def test_not_installed(make, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = make()
    log.log({"loss": 1.0}, 0)
    log.finish()
    assert not log.enabled
    assert "pip install '.[wandb]'" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("no space"), SystemExit(1)])
def test_init_that_raises(fake, make, caplog, error):
    fake.init_error = error
    log = make()
    log.log({"loss": 1.0}, 0)
    log.finish()
    assert not log.enabled
    assert "it could not start" in caplog.text
    assert (fake.rows, fake.ended) == ([], 1)


def test_run_that_cannot_start_online_is_written_offline(fake, make, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    fake.init_error, fake.failing_modes = TimeoutError("no answer"), ("online",)
    log = make("wandb.timeout_s=5", "wandb.finish_timeout_s=7")
    log.log({"loss": 1.0}, 0)
    log.finish()
    assert log.mode == "offline"
    assert [init["mode"] for init in fake.inits] == ["online", "offline"]
    settings = fake.inits[1]["settings"]
    assert (settings["init_timeout"], settings["finish_timeout"]) == (5, 7)
    assert "could not start online (TimeoutError: no answer)" in caplog.text
    assert fake.rows == [(0, {"loss": 1.0})]


def test_interruption_by_the_user_is_not_caught(fake, make):
    fake.init_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        make()


@pytest.mark.parametrize("method", ["log", "log_images"])
def test_first_failing_record_switches_off(fake, make, caplog, method):
    log = make()
    fake.failing = lambda: True
    for step in range(3):
        getattr(log, method)({"a": np.zeros((2, 2, 3), np.uint8)}, step)
    log.finish()
    assert (fake.attempts, fake.exit_codes, fake.ended) == (1, [], 1)
    assert caplog.text.count("switched off") == 1
    assert "OSError: no route to host" in caplog.text


def test_unwritable_state_switches_off(fake, make, monkeypatch, caplog):
    def full(path, text):
        raise OSError("no space")

    log = make()
    monkeypatch.setattr("dinov3.logging.wandb_logger.write_text_atomically", full)
    log.log({"loss": 1.0}, 0)
    assert not log.enabled
    assert "OSError: no space" in caplog.text


def test_finish_that_raises(fake, make, caplog):
    fake.finish_error = True
    log = make()
    log.finish()
    assert "could not finish (ConnectionError: gone)" in caplog.text


# --- the real package ---

REAL = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from omegaconf import OmegaConf
from dinov3.configs import get_default_config
from dinov3.logging.wandb_logger import create_wandb_logger

out, kill = sys.argv[1], sys.argv[2] == "kill"
cfg = get_default_config()
cfg.train.output_dir = out
cfg.wandb.enabled = True

def services():
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        name, fields = stat.read_text().rsplit(")", 1)
        state, parent = fields.split()[:2]
        if "wandb-core" in name and int(parent) == os.getpid() and state != "Z":
            found.append(int(stat.parent.name))
    return found

for start, stop in ((0, 50),) if kill else ((0, 50), (30, 80)):
    log = create_wandb_logger(cfg)
    for step in range(start, stop, 10):
        log.log({"loss": 1.0 / (1 + step), "block.0/norm": 2.0}, step)
        if kill and step == 20:
            (pid,) = services()
            os.kill(pid, signal.SIGKILL)
    if not kill:
        log.log_images({"visuals/pca": np.full((8, 8, 3), 200, np.uint8)}, stop - 10)
    else:
        step = stop
        while log.enabled:
            log.log({"loss": 0.0}, step)
            step += 1
            time.sleep(0.05)
    log.finish(0)
print("services", *services())
"""


def run_real(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("wandb")
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'dinov3_modified'}",
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
        "NETRC": str(folder / "no_netrc"),
        "WANDB_ERROR_REPORTING": "false",
    }
    return subprocess.run(
        [sys.executable, "-c", REAL, str(folder / "run"), how],
        env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_offline_files_read_back(tmp_path, read_history):
    done = run_real(tmp_path, "twice")
    assert done.returncode == 0, done.stderr
    (pid,) = done.stdout.removeprefix("services ").split()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    run_id = (tmp_path / "run" / "wandb_run_id.txt").read_text().strip()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    rows = [row for file in files for row in read_history(file)]
    assert len(files) == 2  # wandb writes a folder a process; `wandb sync` joins them by their id
    assert [row["_step"] for row in rows] == [0, 10, 20, 30, 40, 50, 60, 70]
    assert [row["loss"] for row in rows] == pytest.approx([1 / (1 + s) for s in range(0, 80, 10)])
    assert rows[3]["block.0/norm"] == 2.0
    assert rows[4]["visuals/pca.width"] == 8
    assert rows[4]["visuals/pca_iteration"] == 40
    assert (
        len(list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/**/*.png")))
        == 2
    )


@pytest.mark.slow
def test_service_killed_in_the_middle(tmp_path):
    """The run continues and its program ends at once, with exit code 0 and no traceback."""
    done = run_real(tmp_path, "kill")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["services"]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("switched off") == 1
