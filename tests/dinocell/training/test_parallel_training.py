"""Fine-tuning in two processes: the same numbers as one, exact resumption, and one end for all.

The processes are real ones of torchrun, on the CPU with gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ports import held_port
from small_runs import small_run
from torch import nn

from dinocell.errors import ConfigError
from dinocell.network.model import DINOCell
from dinocell.settings import config_from_mapping, config_to_mapping
from dinocell.training.config import TrainConfig
from dinocell.training.optimizer import process_factor, step_seed
from dinocell.training.processes import Processes, is_main_process, processes_of_run
from dinocell.training.run_folder import find_checkpoints, load_checkpoint
from dinocell.training.synchronized_norm import SynchronizedBatchNorm2d, synchronize_batch_norm
from dinocell.training.trainer import train

ROOT = Path(__file__).parents[3]


def settings(data: Path, out: Path, **changes) -> dict:
    # Three images to validate on: the shares of two processes are uneven.
    return small_run(data, out, **{"data__val_fraction": 0.5, **changes})


def torchrun(*command: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *command,
    ]


def environment() -> dict[str, str]:
    named = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'dinov3_modified'}"}
    named["PYTHONFAULTHANDLER"] = "1"  # a process that dies by a signal shows where
    return {**os.environ, **named}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(*command),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=900,
        check=False,
    )


def run_two(mapping: dict) -> subprocess.CompletedProcess[str]:
    """`dinocell train` in two processes."""
    path = Path(f"{mapping['output_dir']}.yaml")
    path.write_text(yaml.safe_dump(mapping))
    return run("-m", "dinocell", "train", str(path))


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def column(out: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows(out) if name in row]


def newest_state(out: Path) -> dict:
    return load_checkpoint(find_checkpoints(out / "checkpoints")[-1][1])


# Ten steps that bring the AP from 0 over values between to nearly 1, looked at three times.
LEARNING = {
    "model__patch_size": 8,
    "optimizer__scaling_rule": "none",
    "augment__empty_probability": 0.0,
    "schedule__steps": 10,
    "schedule__eval_every": 4,
    "schedule__ema_decay": 0.8,
}


@pytest.fixture(scope="module")
def pair_run(blob_data, tmp_path_factory):
    """Ten steps of 2 x 2 crops."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = run_two(settings(blob_data, out, **LEARNING))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(blob_data, tmp_path, pair_run):
    out, _ = pair_run
    mapping = settings(blob_data, tmp_path, **LEARNING, schedule__batch_size=4)
    result = train(config_from_mapping(TrainConfig, mapping), shown=False)
    for name in ("loss", "gradient_norm", "lr"):
        one, two = column(tmp_path, name), column(out, name)
        assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 11))
        # On a processor with AMX the norms of gradients differ by up to .0015.
        assert [v for _, v in two] == pytest.approx([v for _, v in one], rel=3e-3), name
    one, two = column(tmp_path, "val_ap50_pooled"), column(out, "val_ap50_pooled")
    assert max(ap for _, ap in one) > 0.5
    curve = [loss for _, loss in column(tmp_path, "loss")]
    assert sum(curve[-3:]) < 0.8 * sum(curve[:3])
    one_cell = 0.1  # of the twelve: a pixel on the edge of a threshold may go either way
    assert dict(two) == pytest.approx(dict(one), abs=one_cell)
    one, two = newest_state(tmp_path), newest_state(out)
    assert two["best_step"] == one["best_step"]
    for part in ("model", "averaged"):
        assert list(one[part]) == list(two[part])
        for key, value in one[part].items():
            # Adam divides by the gradient's size: where that is rounding only, steps differ.
            torch.testing.assert_close(two[part][key], value, rtol=1e-2, atol=5e-3, msg=key)
    shipped = DINOCell.from_pretrained(out / "model.safetensors")  # a plain model again
    # Among thresholds of equal mean AP, rounding decides: their AP at one IoU may differ more.
    assert min(shipped.card["metrics"]["val_ap50_pooled"], result.val_ap50) > 0.5
    assert type(shipped.decoder.convolve[0][0][1]) is nn.BatchNorm2d


@pytest.mark.slow
def test_one_process_writes_and_speaks(pair_run):
    out, done = pair_run
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.yaml", "metrics.jsonl", "checkpoints"),
        *("best.safetensors", "model.safetensors", "curves.png"),
    }
    assert done.stdout.count("model: ") == 1
    assert done.stderr.count("10 steps of 4 crops (2 x 2 processes), learning rate 0.002") == 1
    assert "(none rule, configured 0.002)" in done.stderr
    assert done.stderr.count("step 10: validation AP") == 1
    assert newest_state(out)["processes"] == 2


@pytest.mark.slow
def test_another_number_of_processes_is_refused(blob_data, pair_run):
    out, _ = pair_run
    mapping = settings(blob_data, out, **LEARNING)
    with pytest.raises(ConfigError, match=r"got 1 where .* is of 2: start as many processes, or"):
        train(config_from_mapping(TrainConfig, mapping), shown=False)


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_counts_as_one_process(blob_data, tmp_path):
    config = config_from_mapping(TrainConfig, settings(blob_data, tmp_path, schedule__steps=2))
    before = train(config, shown=False)
    path = find_checkpoints(tmp_path / "checkpoints")[-1][1]
    state = load_checkpoint(path)
    assert state.pop("processes") == 1
    torch.save(state, path)
    mapping = config_to_mapping(config)
    del mapping["optimizer"]["scaling_rule"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(mapping))
    assert train(config, shown=False).val_ap50 == before.val_ap50


SIGNALLED = """
import os
import signal
import sys

from dinocell.cli import main
from dinocell.network.backbone import BACKBONE_SIZES, BackboneSize
from dinocell.training import trainer

BACKBONE_SIZES["tiny"] = BackboneSize(48, 4, num_heads=3)
honest = trainer.distance_loss
calls = 0


def signalled(*maps, **options):
    global calls
    calls += 1
    if calls == int(sys.argv[1]) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR2)
    return honest(*maps, **options)


trainer.distance_loss = signalled
main(["train", sys.argv[2]])
"""


def outcomes_of_two(*command: str) -> tuple[list[str], list[int]]:
    """Outputs and codes of two processes, without torchrun, which is a third start of torch."""
    with held_port() as port:
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**environment(), **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in (0, 1)
        ]
        outputs = [process.communicate(timeout=900)[0] for process in started]
    return outputs, [process.returncode for process in started]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_the_run_continues_exactly(blob_data, tmp_path):
    """Stochastic depth is on; evaluation only at the end, checkpoints by the signal only.

    The processes ask one another whether to stop at steps 1 and 2, and at step 12 or before.
    """
    changes = {
        "model__drop_path_rate": 0.2,
        "schedule__steps": 14,
        "schedule__eval_every": 14,
        "schedule__checkpoint_every": 14,
    }
    program = tmp_path / "program.py"
    program.write_text(SIGNALLED)

    def trained(out: Path, signal_at: int = 0) -> list[int]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings(blob_data, out, **changes)))
        outputs, codes = outcomes_of_two(str(program), str(signal_at), str(path))
        assert bool(signal_at) == ("Training was interrupted at step" in outputs[0]), outputs
        assert codes == [75 if signal_at else 0] * 2, outputs
        return codes

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert trained(cut, signal_at=3) == [75, 75]
    assert 3 <= newest_state(cut)["step"] == column(cut, "loss")[-1][0] <= 12
    assert trained(cut) == trained(whole) == [0, 0]
    assert column(cut, "loss") == column(whole, "loss")
    assert [step for step, _ in column(cut, "loss")] == list(range(1, 15))
    assert column(cut, "gradient_norm") == column(whole, "gradient_norm")
    shipped = [(folder / "model.safetensors").read_bytes() for folder in (cut, whole)]
    assert shipped[0] == shipped[1]
    # The default rule: sqrt(2) times the configured rate, reached when the warm-up ends.
    assert max(rate for _, rate in column(whole, "lr")) == pytest.approx(2e-3 * 2**0.5)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_scaling_rules(rule, factor):
    assert process_factor(rule, 4) == factor
    assert process_factor(rule, 1) == 1.0  # one process: exactly as configured


def test_processes_drop_other_paths():
    assert step_seed(3, 5) == step_seed(3, 5, rank=0) == 3 * 1_000_003 + 5
    drawn = {
        tuple(
            torch.rand(
                4, generator=torch.Generator().manual_seed(step_seed(0, step, rank))
            ).tolist()
        )
        for step in range(50)
        for rank in range(50)
    }
    assert len(drawn) == 50 * 50


def test_the_scaling_rule_is_one_of_three(blob_data, tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer\.scaling_rule` must be one of none, sqrt"):
        config_from_mapping(
            TrainConfig, settings(blob_data, tmp_path, optimizer__scaling_rule="cubic")
        )


NORM = """
import sys

import torch
from torch import nn

from dinocell.training.processes import processes_of_run
from dinocell.training.synchronized_norm import synchronize_batch_norm

with processes_of_run("cpu") as processes:
    given = torch.load(sys.argv[1])
    norm = nn.BatchNorm2d(3)
    norm.load_state_dict(given["state"])
    norm = synchronize_batch_norm(norm)
    answers = []
    for batch, gradient in given["batches"]:
        rank = processes.rank
        x = batch[2 * rank : 2 * rank + 2].requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(gradient[2 * rank : 2 * rank + 2])
        answers.append(torch.stack([y.detach(), x.grad]))
    with torch.autocast("cpu", torch.bfloat16):
        low = norm(x.detach().bfloat16())
    weights = torch.stack([norm.weight.grad, norm.bias.grad])
    answers = processes.gather([(answers, weights, low)], 2)
    if processes.is_main:
        torch.save({"answers": answers, "state": norm.state_dict()}, sys.argv[2])
"""


def test_norm_over_processes_is_norm_of_the_whole_batch(tmp_path):
    generator = torch.Generator().manual_seed(5)
    whole = nn.BatchNorm2d(3)
    with torch.no_grad():
        whole.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        whole.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    batches = [
        (
            torch.randn(4, 3, 5, 6, generator=generator) * 3
            + torch.arange(4.0)[:, None, None, None],
            torch.randn(4, 3, 5, 6, generator=generator),
        )
        for _ in range(3)
    ]
    torch.save({"state": whole.state_dict(), "batches": batches}, tmp_path / "given.pt")
    program = tmp_path / "norm.py"
    program.write_text(NORM)
    outputs, codes = outcomes_of_two(
        str(program), str(tmp_path / "given.pt"), str(tmp_path / "found.pt")
    )
    assert codes == [0, 0], outputs
    found = torch.load(tmp_path / "found.pt")
    (first, first_weights, first_low), (second, second_weights, second_low) = found["answers"]
    for position, (batch, gradient) in enumerate(batches):
        x = batch.requires_grad_()
        whole.zero_grad()
        y = whole(x)
        y.backward(gradient)
        both = torch.cat([first[position], second[position]], dim=1)
        torch.testing.assert_close(both[0], y.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both[1], x.grad, rtol=1e-5, atol=1e-5)
    of_parameters = torch.stack([whole.weight.grad, whole.bias.grad])
    torch.testing.assert_close(first_weights + second_weights, of_parameters, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = whole(batches[-1][0].detach().bfloat16())
    assert first_low.dtype == low.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([first_low, second_low]), low, rtol=2e-2, atol=2e-2)
    assert list(found["state"]) == list(whole.state_dict())
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(found["state"][key], value, rtol=1e-5, atol=1e-6)


def test_a_synchronized_decoder_is_the_same_decoder(small_model):
    import copy

    model = copy.deepcopy(small_model)
    keys = list(model.state_dict())
    parameters = {id(parameter) for parameter in model.parameters()}
    model.decoder = synchronize_batch_norm(model.decoder)
    assert list(model.state_dict()) == keys
    assert {id(parameter) for parameter in model.parameters()} == parameters
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, SynchronizedBatchNorm2d) for norm in norms)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for mode in (True, False):  # without a group also training is as it was
        copies = [copy.deepcopy(network).train(mode) for network in (small_model, model)]
        assert torch.equal(copies[0](image), copies[1](image))


BROKEN = """
import os
import sys

from dinocell.cli import main
from dinocell.network.backbone import BACKBONE_SIZES, BackboneSize
from dinocell.training import trainer

BACKBONE_SIZES["tiny"] = BackboneSize(48, 4, num_heads=3)
honest = trainer.distance_loss
calls = 0


def broken(*maps, **options):
    global calls
    calls += 1
    loss = honest(*maps, **options)
    if calls == 3 and os.environ["RANK"] == "1":
        if sys.argv[1] == "nan":
            loss = loss * float("nan")
        else:
            raise OSError("the disk of process 1 went away")
    return loss


trainer.distance_loss = broken
main(["-v", "train", sys.argv[2]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("nan", "dinocell: error: The training loss must be finite, got nan at step 2"),
        ("raise", "dinocell: error: the disk of process 1 went away"),
    ],
)
def test_the_end_of_one_process_ends_all(blob_data, tmp_path, how, sentence):
    program, path = tmp_path / "broken.py", tmp_path / "run.yaml"
    program.write_text(BROKEN)
    changes = {"schedule__steps": 2000, "schedule__eval_every": 2000, "schedule__precision": "bf16"}
    path.write_text(yaml.safe_dump(settings(blob_data, tmp_path / "run", **changes)))
    done = run(str(program), how, str(path))  # it gives up long before a collective would
    assert done.returncode != 0
    assert sentence in done.stderr, done.stderr
    if how == "nan":  # both know the reason, neither meets a connection that broke
        assert "onnection" not in done.stderr
    assert [step for step, _ in column(tmp_path / "run", "loss")] == [1, 2]
    assert not (tmp_path / "run" / "model.safetensors").exists()


class TestOneProcess:
    def test_it_has_no_group(self):
        with processes_of_run("cpu") as processes:
            assert not torch.distributed.is_initialized()
            assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
        assert is_main_process()

    def test_its_exchanges_return_what_they_are_given(self):
        processes = Processes(0, 1, torch.device("cpu"))
        assert processes.mean(0.1) == 0.1
        assert processes.any(True) is True
        assert processes.gather([3, 4], 2) == [3, 4]
        assert processes.on_main(lambda: "done") == "done"

    @pytest.mark.parametrize("device", ["mps", "cuda:1"])
    def test_devices_of_several_processes(self, device, monkeypatch):
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        assert not is_main_process()
        with (
            pytest.raises(ConfigError, match="of 2 processes must be auto, cuda or cpu"),
            processes_of_run(device),
        ):
            pass
