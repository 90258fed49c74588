"""What the patches call, with the bundled tree in the place of upstream's.

On trees of upstream's the same functions are tried by tests/conformance.
"""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import tifffile
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from dinov3.cells import hooks
from dinov3.cells.hooks import (
    evaluate,
    find_dataset,
    fit_patch_size,
    load_hook,
    load_pretrained,
    sections,
    start_from_backbone,
    watched,
    with_views,
)
from dinov3.cells.streaming.index import FieldRecord, IndexWriter
from dinov3.configs import get_default_config
from dinov3.data import DataAugmentationDINO
from dinov3.data.datasets import ImageFolder
from dinov3.data.datasets.jump_cellpainting import JUMPCellPaintingMultiView
from dinov3.logging import MetricLogger
from dinov3.models.vision_transformer import DinoVisionTransformer


def plain(*changes: str):
    """A configuration as upstream's program has it: without our sections, but for what is set."""
    cfg = get_default_config()
    ours = OmegaConf.load(__import__("pathlib").Path(hooks.__file__).parent / "dinocell.yaml")
    for name in ours:
        del cfg[name]
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(changes)))


def vit(patch_size: int = 8, seed: int = 0) -> DinoVisionTransformer:
    torch.manual_seed(seed)
    made = DinoVisionTransformer(
        patch_size=patch_size, embed_dim=48, depth=2, num_heads=3, n_storage_tokens=4,
        layerscale_init=0.1, mask_k_bias=True,
    )  # fmt: skip
    made.init_weights()
    return made


# --- sections ---


def test_sections_are_filled_where_they_are_absent():
    cfg = sections(plain("multiview.strategy=multiview"))
    assert cfg.multiview.strategy == "multiview"
    assert cfg.multiview.min_overlap == 0.4
    assert cfg.wandb.enabled is False
    assert cfg.optim.lr == 0.001


def test_an_unknown_key_of_ours_is_refused():
    with pytest.raises(ValueError, match=r"must be those of dinocell\.yaml.*strategie"):
        sections(plain("multiview.strategie=x"))


# --- weights ---


@pytest.fixture
def file16(tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save(vit(16, seed=5).state_dict(), path)
    return path


def summed(path) -> torch.Tensor:
    kernel = torch.load(path)["patch_embed.proj.weight"]
    return kernel.unflatten(2, (8, 2)).unflatten(4, (8, 2)).sum(dim=(3, 5))


def test_a_backbone_of_another_patch_size(file16):
    network = nn.ModuleDict({"backbone": vit(), "dino_head": nn.Linear(3, 2)})
    head = network["dino_head"].weight.clone()
    assert load_pretrained(network, file16)
    torch.testing.assert_close(network["backbone"].patch_embed.proj.weight, summed(file16))
    assert torch.equal(network["dino_head"].weight, head)


def test_heads_come_along_where_they_fit(tmp_path):
    source = nn.ModuleDict(
        {"backbone": vit(16), "dino_head": nn.Linear(3, 2), "ibot_head": nn.Linear(3, 5)}
    )
    torch.save({"teacher": source.state_dict()}, tmp_path / "t.pth")
    network = nn.ModuleDict(
        {"backbone": vit(8), "dino_head": nn.Linear(3, 2), "ibot_head": nn.Linear(3, 4)}
    )
    other = network["ibot_head"].weight.clone()
    assert load_pretrained(network, tmp_path / "t.pth")
    assert torch.equal(network["dino_head"].weight, source["dino_head"].weight)
    assert torch.equal(network["ibot_head"].weight, other)


def test_what_upstream_reads_itself_is_left_to_it(tmp_path):
    network = nn.ModuleDict({"backbone": vit(seed=1), "dino_head": nn.Linear(3, 2)})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    source = nn.ModuleDict({"backbone": vit(seed=2), "dino_head": nn.Linear(3, 2)})
    torch.save({"teacher": source.state_dict()}, tmp_path / "t.pth")
    assert not load_pretrained(network, tmp_path / "t.pth")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").write_text("")
    assert not load_pretrained(network, tmp_path / "sharded")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_a_file_that_is_no_backbone(tmp_path):
    (tmp_path / "t.pth").write_text("page not found")
    with pytest.raises(ValueError, match=r"t\.pth"):
        load_pretrained(nn.ModuleDict({"backbone": vit()}), tmp_path / "t.pth")
    with pytest.raises(FileNotFoundError):
        load_pretrained(nn.ModuleDict({"backbone": vit()}), tmp_path / "none.pth")


def test_the_patch_size_of_a_state_dict(file16):
    adapted = fit_patch_size(torch.load(file16), vit())
    torch.testing.assert_close(adapted["patch_embed.proj.weight"], summed(file16))
    same = vit(8).state_dict()
    assert fit_patch_size(same, vit(8))["patch_embed.proj.weight"] is not None
    assert fit_patch_size({"other": torch.ones(1)}, vit()) == {"other": torch.ones(1)}


def test_a_start_without_heads_fills_student_and_ema(file16):
    networks = {
        name: nn.ModuleDict({"backbone": vit(seed=seed)}) for seed, name in enumerate("se", 1)
    }
    model = types.SimpleNamespace(student=networks["s"], model_ema=networks["e"])
    before = networks["s"]["backbone"].patch_embed.proj.weight.clone()
    start_from_backbone(plain(), model)
    assert torch.equal(networks["s"]["backbone"].patch_embed.proj.weight, before)
    start_from_backbone(plain(f"student.pretrained_weights={file16}"), model)
    for network in networks.values():
        torch.testing.assert_close(network["backbone"].patch_embed.proj.weight, summed(file16))
    exact = networks["s"]["backbone"].patch_embed.proj.weight.clone()
    change = f"student.pretrained_weights={file16}"
    start_from_backbone(plain(change, "patch_adaptation.method=bicubic"), model)
    assert not torch.allclose(networks["s"]["backbone"].patch_embed.proj.weight, exact)


# --- data ---


def test_only_datasets_of_ours_are_found():
    class_, arguments = find_dataset("ImageFolder:root=a")
    assert (class_, arguments) == (ImageFolder, {"root": "a"})
    assert find_dataset("CocoCaptions:split=TRAIN") is None
    with pytest.raises(ValueError, match="must have root"):
        find_dataset("ImageFolder")
    with pytest.raises(ValueError, match="must be among"):
        find_dataset("ImageFolder:rout=a")


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "store").mkdir()
    writer = IndexWriter(str(tmp_path / "store"))
    rows = ["field,channel,file"]
    for number in range(8):
        keys = {}
        for channel in ("DNA", "ER"):
            key = f"f{number}_{channel}.tif"
            plane = rng.integers(100, 4000, (64, 64)).astype(np.uint16)
            tifffile.imwrite(tmp_path / "store" / key, plane)
            keys[channel] = key
            rows.append(f"f{number},{channel},{key}")
        writer.add(FieldRecord("P0", "A01", str(number), keys))
    (tmp_path / "store" / "table.csv").write_text("\n".join(rows) + "\n")
    writer.write(tmp_path / "index.arrow")
    return tmp_path


VIEW = ("multiview.strategy=average", "crops.global_crops_size=32", "crops.local_crops_size=16")


def rgb() -> DataAugmentationDINO:
    return DataAugmentationDINO((0.3, 1), (0.1, 0.3), 2)


def test_views_take_the_place_of_rgb_crops(store):
    dataset = JUMPCellPaintingMultiView(
        root=str(store / "store"), index="table.csv", transform=rgb()
    )
    assert with_views(dataset, plain(*VIEW)) is dataset
    crops, _ = dataset[0]
    assert crops["global_crops"][0].shape == (3, 32, 32)
    assert len(crops["local_crops"]) == 8


def test_views_where_torchvision_keeps_the_transform_twice(store):
    class Both:
        transform = staticmethod(rgb())

        def __call__(self, image, target):
            return self.transform(image), target

    dataset = JUMPCellPaintingMultiView(root=str(store / "store"), index="table.csv")
    dataset.transforms = Both()
    with_views(dataset, plain(*VIEW))
    crops, target = dataset[0]
    assert crops["global_crops"][0].shape == (3, 32, 32)
    assert target == ()


def test_other_datasets_stay_as_they_are(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    dataset = ImageFolder(root=str(tmp_path))
    assert with_views(dataset, plain()) is dataset


def test_fields_need_a_strategy_and_worker_photometrics(store):
    dataset = JUMPCellPaintingMultiView(root=str(store / "store"), index="table.csv")
    with pytest.raises(ValueError, match="strategy` must be set for JUMPCellPaintingMultiView"):
        with_views(dataset, plain())
    with pytest.raises(ValueError, match="must be worker or none"):
        with_views(dataset, plain(*VIEW, "multiview.photometrics=device"))


class _Names:
    def __call__(self, field):
        return field.name


@pytest.mark.parametrize("start_iter", [0, 3])
def test_a_store_is_asked_for_positions(store, tmp_path, start_iter):
    """Whatever indices a sampler draws, the n-th batch of a process has its place in the order."""
    class_, arguments = find_dataset(f"JUMPS3MultiView:index={store}/index.arrow:visits=2:spread=2")
    cfg = plain(*VIEW, "train.batch_size_per_gpu=4", "streaming.ahead=2", "train.seed=7",
                f"train.output_dir={tmp_path}")  # fmt: skip
    dataset = class_(**arguments)
    counted = with_views(dataset, cfg, start_iter)
    assert len(counted) == 16
    dataset.transform = _Names()
    got = [[name for name, _ in counted.__getitems__([5, 1, 9, 0])] for _ in range(3)]
    positions = range(4 * start_iter, 4 * start_iter + 12)
    expected = [dataset.get_sample_name(position) for position in positions]
    assert [name for batch in got for name in batch] == expected
    assert dataset.order.seed == 7


def test_workers_count_their_own_batches(monkeypatch):
    class Positions:
        rank, world = 1, 2

        def __len__(self):
            return 100

        def __getitem__(self, position):
            return position

    seen = {}
    for worker in range(3):
        info = types.SimpleNamespace(id=worker, num_workers=3)
        monkeypatch.setattr(hooks, "get_worker_info", lambda info=info: info)
        counted = hooks._Counted(Positions(), advance=4)
        seen[worker] = [counted.__getitems__([0, 0]) for _ in range(2)]
    batches = [seen[worker][number] for number in range(2) for worker in range(3)]
    flat = [position for batch in batches for position in batch]
    assert flat == list(range(1 + 2 * 4, 1 + 2 * (4 + 12), 2))


# --- watching ---


class Metrics:
    """Upstream's logger as far as the training loop uses it."""

    def __init__(self):
        self.meters = {}
        self.other = "own"

    def update(self, **values):
        for name, value in values.items():
            self.meters[name] = types.SimpleNamespace(median=value)

    def log_every(self, batches, print_freq, header=None, n_iterations=None, start_iteration=0):
        del print_freq, header, n_iterations, start_iteration
        yield from batches

    def __str__(self):
        return "shown"


@pytest.fixture
def logged(monkeypatch):
    calls = []

    class Wandb:
        def log(self, values, step):
            calls.append((step, dict(values)))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    import dinov3.logging.wandb_logger as module

    def create(cfg, resume):
        calls.append(("resume", resume))
        return Wandb()

    monkeypatch.setattr(module, "create_wandb_logger", create)
    return calls


def test_values_go_to_wandb_every_ten_iterations_and_at_the_end(logged):
    metrics = Metrics()
    seen = watched(metrics, plain("wandb.enabled=true"))
    assert (seen.other, str(seen)) == ("own", "shown")
    for number, batch in enumerate(seen.log_every(range(7), 10, start_iteration=6), 6):
        assert batch == number - 6
        seen.update(loss=float(number))
    assert logged[1:] == [(10, {"loss": 10.0}), (12, {"loss": 12.0}), ("finish", 0)]


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_starts_over_is_another_one_in_wandb(logged, resume):
    watched(Metrics(), plain("wandb.enabled=true"), resume)
    assert logged == [("resume", resume)]


def test_lines_of_this_tree_go_to_wandb_as_they_are_written(logged, tmp_path):
    metrics = MetricLogger(output_file=str(tmp_path / "m.json"))
    seen = watched(metrics, plain("wandb.enabled=true"))
    seen.before_finish.append(lambda: logged.append("pictures"))
    for number, _ in enumerate(seen.log_every([1, 2], 1, n_iterations=2)):
        seen.update(loss=float(number))
    seen.record(1, {"score": 2.0})
    assert [(step, row["loss"]) for step, row in logged[1:3]] == [(0, 0.0), (1, 0.0)]
    assert logged[3:] == ["pictures", ("finish", 0), (1, {"score": 2.0})]


def test_a_failed_loop_is_finished_as_failed(logged):
    loop = watched(Metrics(), plain("wandb.enabled=true")).log_every(range(9), 10)
    next(loop)
    loop.close()
    assert logged[1:] == [("finish", 1)]


def test_without_wandb_nothing_is_wrapped(logged):
    metrics = Metrics()
    assert watched(metrics, plain()) is metrics
    assert logged == [("resume", True)]
    with pytest.raises(ValueError, match=r"must be package\.module:function"):
        watched(metrics, plain("ssl_evaluation.hook=a:b", "ssl_evaluation.period_iterations=9"))


# --- evaluation ---


@pytest.fixture
def model():
    cfg = plain("student.arch=vit_small", "student.patch_size=8", "student.layerscale=0.1")
    from dinov3.models import build_model

    torch.manual_seed(0)
    teacher = build_model(cfg.student, only_teacher=True)[0]
    teacher.init_weights()
    return types.SimpleNamespace(model_ema={"backbone": teacher})


@pytest.fixture
def scorer(monkeypatch):
    hooks._evaluations.clear()
    module = types.ModuleType("scorer")
    module.calls = []

    def make(cfg):
        module.calls.append("made")
        assert cfg.ssl_evaluation.decoder == "unet"

        def score(network, iteration, folder):
            if iteration > 10:
                raise RuntimeError("on purpose")
            module.calls.append((iteration, str(folder), network.training))
            return {"score": float(network.cls_token.sum())}

        return score

    module.make = make
    monkeypatch.setitem(sys.modules, "scorer", module)
    return module


def evaluation(*changes: str):
    return plain(
        "student.arch=vit_small", "student.patch_size=8", "student.layerscale=0.1",
        "train.output_dir=/o", *changes,
    )  # fmt: skip


def test_the_teacher_is_scored_when_it_is_due(model, scorer, caplog):
    cfg = evaluation("ssl_evaluation.hook=scorer:make", "ssl_evaluation.period_iterations=2")
    metrics = Metrics()
    state = torch.get_rng_state()
    for iteration in range(4):
        evaluate(cfg, model, iteration, metrics)
    assert torch.equal(torch.get_rng_state(), state)
    assert scorer.calls == ["made", (1, "/o", False), (3, "/o", False)]
    expected = float(model.model_ema["backbone"].cls_token.sum())
    assert metrics.meters["score"].median == pytest.approx(expected)
    evaluate(cfg, model, 11, metrics)
    assert "The evaluation of iteration 11 failed" in caplog.text


def test_scores_that_cannot_be_recorded_stop_no_training(model, scorer, caplog):
    class Full(Metrics):
        def record(self, iteration, figures):
            raise OSError(28, "No space left on device")

    cfg = evaluation("ssl_evaluation.hook=scorer:make", "ssl_evaluation.period_iterations=2")
    evaluate(cfg, model, 1, Full())
    assert scorer.calls[-1] == (1, "/o", False)
    assert "The evaluation of iteration 1 failed" in caplog.text


def test_nothing_is_scored_by_default(model, scorer):
    evaluate(evaluation("ssl_evaluation.hook=scorer:make"), model, 1, Metrics())
    evaluate(evaluation("ssl_evaluation.period_iterations=1"), model, 1, Metrics())
    assert scorer.calls == []


def test_a_wrong_hook_stops_the_run(model):
    hooks._evaluations.clear()
    cfg = evaluation("ssl_evaluation.hook=scorer:none", "ssl_evaluation.period_iterations=9")
    with pytest.raises(ValueError, match=r"must be package\.module:function, got 'scorer:none'"):
        evaluate(cfg, model, 0, Metrics())
    assert load_hook("json:dumps") is json.dumps


def test_the_old_address_of_a_hook_still_loads(caplog):
    """A run that an earlier version started has it in its configuration."""
    from dinocell.pretraining.teacher_evaluation import make_evaluation

    assert load_hook("dinocell.training.ssl_evaluation:make_evaluation") is make_evaluation
    assert "has moved: write dinocell.pretraining.teacher_evaluation:make_" in caplog.text
