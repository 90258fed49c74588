"""One step of self-supervised training: its losses, gradients and teachers."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinov3.train.ssl_meta_arch import SSLMetaArch

GOLDEN = Path(__file__).parents[1] / "golden" / "ssl_step.json"


def built(cfg, seed: int = 0) -> SSLMetaArch:
    torch.manual_seed(seed)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    model.init_weights()
    return model


def gradients(model: SSLMetaArch) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.student.named_parameters() if p.grad is not None}


def step(model: SSLMetaArch, batch, iteration: int = 0, temp: float = 0.05):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(iteration)
    loss, metrics = model.forward_backward(batch, teacher_temp=temp, iteration=iteration)
    return float(loss.detach()), {name: float(value) for name, value in metrics.items()}


_plain: list[tuple[float, dict[str, float]]] = []


def plain_step(make_cfg, batch) -> tuple[float, dict[str, float]]:
    """A step of the configuration without changes, which families of options compare with."""
    if not _plain:
        _plain.append(step(built(make_cfg()), batch))
    loss, metrics = _plain[0]
    return loss, dict(metrics)


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    return x.double().log_softmax(-1)


def test_total_from_the_parts(make_cfg, batch):
    """The weighted sum of facts: lambda, crop pairs, KoLeo per crop; each part in float64."""
    cfg = make_cfg("dino.loss_weight=0.7", "ibot.loss_weight=0.4", "dino.koleo_loss_weight=0.2")
    model = built(cfg)
    loss, metrics = step(model, batch)
    out = model.get_teacher_output(
        batch["collated_global_crops"].unflatten(0, (2, 3)),
        upperbound=14,
        mask_indices_list=batch["mask_indices_list"],
        teacher_temp=0.05,
        n_masked_patches_tensor=batch["n_masked_patches"],
    )
    student, local = model.get_student_output(
        global_crops=batch["collated_global_crops"].unflatten(0, (2, 3)),
        local_crops=batch["collated_local_crops"].unflatten(0, (2, 3)),
        upperbound=14,
        masks=batch["collated_masks"],
        mask_indices_list=batch["mask_indices_list"],
    )
    teacher = out["cls_centered"].double()
    own = log_softmax(student["cls_after_head"] / 0.1)
    other = log_softmax(local["cls_after_head"] / 0.1)
    dino_global = -((teacher[0] * own[1]).sum() + (teacher[1] * own[0]).sum()) / 6
    dino_local = -sum((teacher[t] * other[s]).sum() for t in range(2) for s in range(2)) / 12
    logits = model.student.ibot_head(student["masked_patch_pre_head"])
    targets = out["masked_patch_centered"].probabilities().double()
    rows = (targets * log_softmax(logits / 0.1)).sum(-1)
    ibot = -(rows * batch["masks_weight"].double()).sum() / 6
    koleo = []
    for crop in student["cls_pre_head"].double():
        x = torch.nn.functional.normalize(crop, dim=-1)
        products = (x @ x.T).fill_diagonal_(-1)
        koleo.append(-torch.log((x - x[products.argmax(1)]).norm(dim=1)).mean())
    expected = {
        "dino_global_crops_loss": dino_global,
        "dino_local_crops_loss": dino_local,
        "ibot_loss": ibot,
        "koleo_loss": sum(koleo) / 2,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value.detach()), rel=1e-4), name
    # 2 ordered pairs of global crops, 4 of a global and a local one.
    total = 0.7 * (4 / 6 * dino_local + 2 / 6 * dino_global) + 0.4 * ibot + 0.2 * sum(koleo)
    assert loss == pytest.approx(float(total.detach()), rel=1e-4)
    assert metrics["local_batch_size"] == 3
    assert metrics["global_batch_size"] == 3


def test_recorded_step(make_cfg, batch):
    """Losses and gradient norms of three steps, as recorded.

    `DINOV3_RECORD=1 pytest tests/dinov3/train/test_ssl_meta_arch.py -k recorded` renews the file.
    """
    import os

    cfg = make_cfg("student.drop_path_rate=0.3", "gram.use_loss=true", "gram.ema_teacher=true",
                   "gram.rep_update=false", "gram.img_level=true")  # fmt: skip
    model = built(cfg)
    optimizer = torch.optim.AdamW(model.get_params_groups(), lr=1e-3)
    records = []
    for iteration in range(3):
        loss, metrics = step(model, batch, iteration)
        norms = {
            name: float(torch.nn.utils.clip_grad_norm_(module.parameters(), math.inf))
            for name, module in model.student.items()
        }
        optimizer.step()
        model.update_ema(0.9)
        records.append({"loss": loss, **metrics, **{f"{n}_grad_norm": v for n, v in norms.items()}})
    if os.environ.get("DINOV3_RECORD"):
        GOLDEN.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for got, wanted in zip(records, expected, strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_fused_loss_changes_nothing(make_cfg, batch):
    fused, plain = built(make_cfg()), built(make_cfg("accelerator.fused_loss=false"))
    loss_a, metrics_a = step(fused, batch)
    loss_b, metrics_b = step(plain, batch)
    assert loss_a == pytest.approx(loss_b, rel=1e-6)
    assert metrics_a == pytest.approx(metrics_b, rel=1e-6)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(fused)[name], gradient, rtol=1e-4, atol=1e-6)


def test_teacher_gets_no_gradient_and_stays_in_eval_mode(make_cfg, batch):
    model = built(make_cfg())
    step(model, batch)
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())
    assert not any(module.training for module in model.teacher.modules())
    assert model.student.training
    assert all(p.grad is not None for p in model.student.parameters())


def test_ema(make_cfg, batch):
    model = built(make_cfg())
    before = copy.deepcopy(model.model_ema.state_dict())
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)
    model.update_ema(0.75)
    student = model.student.state_dict()
    for name, value in model.model_ema.named_parameters():
        expected = 0.75 * before[name].double() + 0.25 * student[name].double()
        np.testing.assert_allclose(value.detach(), expected, rtol=1e-6, atol=1e-7)


def test_start_is_the_same_for_student_and_teacher(make_cfg):
    model = built(make_cfg())
    for name, value in model.student.state_dict().items():
        assert torch.equal(value, model.teacher.state_dict()[name]), name
        assert torch.isfinite(value).all(), name
    other = built(make_cfg(), seed=1)
    assert not torch.equal(other.student.backbone.cls_token, model.student.backbone.cls_token)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("dino.loss_weight=2", {"total"}),
        ("ibot.loss_weight=3", {"total"}),
        ("dino.koleo_loss_weight=1", {"total"}),
        ("dino.global_ignore_diagonal=false", {"dino_global_crops_loss", "total"}),
        ("student.norm_layer=rmsnorm", {"dino_local_crops_loss", "total"}),
        ("student.layerscale=0.1", {"dino_local_crops_loss", "total"}),
        ("student.n_storage_tokens=3", {"dino_local_crops_loss", "total"}),
        ("student.untie_cls_and_patch_norms=true", set()),
        ("student.pos_embed_rope_base=10", {"koleo_loss", "total"}),
        ("student.drop_path_rate=0.6", {"dino_local_crops_loss", "total"}),
        ("dino.head_nlayers=2", {"dino_local_crops_loss", "total"}),
        ("ibot.head_nlayers=2", {"ibot_loss", "total"}),
        ("train.centering=softmax", {"ibot_loss", "total"}),
        ("compute_precision.param_dtype=bf16", {"ibot_loss", "total"}),
        ("train.checkpointing=true", set()),
        ("train.checkpointing_full=true", set()),
        ("accelerator.loss_chunk_mb=1", set()),
    ],
)
def test_option_changes_what_it_says(make_cfg, batch, change, names):
    """Names that change; the others stay equal (an option that only saves memory changes none)."""
    loss_a, metrics_a = plain_step(make_cfg, batch)
    loss_b, metrics_b = step(built(make_cfg(change)), batch)
    metrics_a["total"], metrics_b["total"] = loss_a, loss_b
    changed = {n for n in metrics_a if abs(metrics_a[n] - metrics_b[n]) > 1e-6 * abs(metrics_a[n])}
    assert names <= changed
    if not names:
        assert not changed


def test_local_loss_reweighted(make_cfg, batch):
    cfg = make_cfg(
        "dino.reweight_dino_local_loss=true",
        "dino.local_loss_weight_schedule.start=0.0",
        "dino.local_loss_weight_schedule.peak=1.0",
        "dino.local_loss_weight_schedule.end=1.0",
        "dino.local_loss_weight_schedule.warmup_epochs=1",
    )
    model = built(cfg)
    losses = [step(model, batch, iteration) for iteration in (0, 2, 4)]
    assert [metrics["dino_local_loss_weight"] for _, metrics in losses] == [0.0, 0.5, 1.0]
    local = losses[0][1]["dino_local_crops_loss"]
    assert losses[2][0] - losses[0][0] == pytest.approx(4 / 6 * local, rel=1e-5)


def test_accumulation_divides_gradients(make_cfg, batch):
    one, four = built(make_cfg()), built(make_cfg("accelerator.accumulation_steps=4"))
    assert step(one, batch)[0] == step(four, batch)[0]
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradients(four)[name] * 4, gradient)


def test_koleo_in_float32(make_cfg, batch):
    """bfloat16 features are rounded to 3 digits, and so are the distances between them."""
    values = {}
    for koleo in ("true", "false"):
        cfg = make_cfg("compute_precision.param_dtype=bf16", f"accelerator.koleo_fp32={koleo}")
        model = built(cfg)
        features = torch.ones(3, 16) + 1e-2 * torch.randn(3, 16, generator=torch.manual_seed(0))
        features = features.bfloat16()
        value = model.koleo_loss(features.float() if koleo == "true" else features)
        values[koleo] = float(value)
    assert abs(values["true"] - values["false"]) > 1e-3


# --- Gram ---


def gram_cfg(make_cfg, *changes: str):
    return make_cfg("gram.use_loss=true", "crops.gram_teacher_crops_size=64", *changes)


def test_gram_from_ema_copies_updates_and_weight(make_cfg, batch):
    batch["collated_gram_teacher_crops"] = torch.randn(6, 3, 64, 64, generator=torch.manual_seed(3))
    model = built(gram_cfg(make_cfg, "gram.loss_weight=2.0"))
    loss, metrics = step(model, batch)
    plain, _ = step(built(make_cfg()), batch)
    assert metrics["gram_loss_weight"] == 2.0
    assert loss == pytest.approx(plain + 2.0 * metrics["gram_loss"], rel=1e-5)
    with torch.no_grad():
        model.model_ema.backbone.cls_token.add_(1)
    assert not torch.equal(
        model.gram_teacher.backbone.cls_token, model.model_ema.backbone.cls_token
    )
    model.update_gram(0.5)
    gap = model.model_ema.backbone.cls_token - model.gram_teacher.backbone.cls_token
    torch.testing.assert_close(gap, torch.full_like(gap, 0.5))
    model.update_gram()
    assert torch.equal(model.gram_teacher.backbone.cls_token, model.model_ema.backbone.cls_token)


def test_gram_waits_for_its_teacher(make_cfg, batch):
    batch["collated_gram_teacher_crops"] = torch.randn(6, 3, 32, 32)
    cfg = gram_cfg(make_cfg, "gram.it_load_ema_teacher=1", "gram.rep_update=false")
    model = built(cfg)
    assert "gram_loss" not in step(model, batch)[1]
    model.gram_load_ema_teacher()
    assert "gram_loss" in step(model, batch)[1]


@pytest.mark.parametrize(
    "change",
    [
        "gram.normalized=false",
        "gram.img_level=true",
        "gram.remove_neg=true",
        "gram.remove_only_teacher_neg=true",
        "gram.tokens_used=masked",
        "gram.tokens_used=unmasked",
    ],
)
def test_gram_options(make_cfg, batch, change):
    cfg = ["gram.use_loss=true", "gram.ema_teacher=true", "gram.rep_update=false"]
    values = []
    for changes in (cfg, [*cfg, change]):
        model = built(make_cfg(*changes))
        with torch.no_grad():  # teacher and student must differ for Gram to have a loss
            for parameter in model.model_ema.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
        values.append(step(model, batch)[1]["gram_loss"])
    assert values[0] != pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("change", ["method=bilinear", "antialias=true"])
def test_gram_resizing(make_cfg, batch, change):
    batch["collated_gram_teacher_crops"] = torch.randn(6, 3, 64, 64, generator=torch.manual_seed(3))
    plain = step(built(gram_cfg(make_cfg)), batch)[1]["gram_loss"]
    other = built(gram_cfg(make_cfg, f"gram.global_teacher_resize_{change}"))
    assert step(other, batch)[1]["gram_loss"] != pytest.approx(plain, rel=1e-6)


def test_gram_statistics_and_schedule(make_cfg, batch):
    cfg = make_cfg(
        "gram.use_loss=true",
        "gram.ema_teacher=true",
        "gram.rep_update=false",
        "gram.compute_stats=true",
        "gram.loss_weight_schedule={start: 0.0, peak: 4.0, end: 4.0, warmup_epochs: 1}",
    )
    _, metrics = step(built(cfg), batch, iteration=1)
    assert metrics["gram_loss_weight"] == 1.0
    assert "stats_only/masked_gram_loss" in metrics
    assert "stats_only/unmasked_gram_loss" in metrics


# --- distillation ---


def test_distillation(make_cfg, batch, tmp_path):
    """A frozen teacher of another width; the student sees no masks and has an EMA of its own."""
    teacher_cfg = make_cfg("student.layerscale=0.9", "dino.head_hidden_dim=20")
    teacher = built(teacher_cfg, seed=4)
    torch.save({"teacher": teacher.model_ema.state_dict()}, tmp_path / "teacher.pth")
    OmegaConf.save(teacher_cfg, tmp_path / "config.yaml")
    cfg = make_cfg(
        "distillation.enabled=true",
        f"distillation.full_cfg_path={tmp_path / 'config.yaml'}",
        f"distillation.checkpoint_path={tmp_path / 'teacher.pth'}",
    )
    model = built(cfg)
    assert model.teacher is not model.model_ema
    for name, value in teacher.model_ema.state_dict().items():
        assert torch.equal(model.teacher.state_dict()[name], value), name
    loss, _ = step(model, batch)
    batch["collated_masks"] = ~batch["collated_masks"]
    without_masks, _ = step(model, batch)
    assert loss == without_masks, "masks are not shown to the student"
    frozen = copy.deepcopy(model.teacher.state_dict())
    model.update_ema(0.5)
    assert all(
        torch.equal(value, frozen[name]) for name, value in model.teacher.state_dict().items()
    )


@pytest.mark.parametrize("kind", ["file", "run", "sharded"])
def test_gram_teacher_from_a_file(make_cfg, batch, tmp_path, kind):
    """Of a run's files; only the backbone is taken."""
    from dinov3.checkpointer import save_checkpoint

    source = built(make_cfg(), seed=8)
    path = tmp_path / "teacher"
    if kind == "file":
        torch.save({"teacher": source.model_ema.state_dict()}, path)
    else:
        save_checkpoint(path, iteration=0, model=source.model_ema if kind == "sharded" else source)
    model = built(gram_cfg(make_cfg, f"gram.ckpt={path}", "gram.rep_update=false"))
    for name, value in source.model_ema.backbone.state_dict().items():
        assert torch.equal(model.gram_teacher.backbone.state_dict()[name], value), name
    batch["collated_gram_teacher_crops"] = torch.randn(6, 3, 64, 64)
    assert step(model, batch)[1]["gram_loss"] > 0


# --- starting from files ---


def test_start_from_a_patch_16_backbone(make_cfg, tmp_path, batch):
    """The released file is a bare patch-16 backbone: it starts a patch-8 run, exactly adapted."""
    wide = built(make_cfg("student.patch_size=16", "crops.global_crops_size=64"), seed=9)
    state = wide.student.backbone.state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    cfg = make_cfg(f"student.pretrained_weights={tmp_path / 'backbone.pth'}")
    model = built(cfg)
    images = batch["collated_global_crops"]
    enlarged = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for network in (model.student, model.model_ema):
        network.eval()
        small = network.backbone(images, is_training=True)["x_norm_patchtokens"]
        wide.eval()
        large = wide.student.backbone(enlarged, is_training=True)["x_norm_patchtokens"]
        torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-5)
    assert model.load_report is not None


def test_start_from_a_teacher_file_with_and_without_heads(make_cfg, tmp_path, caplog):
    source = built(make_cfg(), seed=9)
    state = source.model_ema.state_dict()
    torch.save({"teacher": state}, tmp_path / "whole.pth")
    path = tmp_path / "whole.pth"
    model = built(make_cfg(f"student.resume_from_teacher_chkpt={path}"))
    for name, value in state.items():
        assert torch.equal(model.student.state_dict()[name], value), name
    bare = {name: value for name, value in state.items() if name.startswith("backbone.")}
    torch.save({"teacher": bare}, tmp_path / "bare.pth")
    with caplog.at_level("WARNING", logger="dinov3"):
        model = built(make_cfg(f"student.resume_from_teacher_chkpt={tmp_path / 'bare.pth'}"))
    assert torch.equal(model.student.backbone.cls_token, source.model_ema.backbone.cls_token)
    assert "dino_head starts at random" in caplog.text
    other = make_cfg(f"student.resume_from_teacher_chkpt={path}", "dino.head_n_prototypes=50")
    with pytest.raises(ValueError, match=r"dino_head of .* must fit this configuration"):
        built(other)


# --- settings that exclude one another ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["crops.local_crops_number=0"], "local_crops_number` must be at least 1"),
        (["ibot.separate_head=false"], "separate_head` must be True"),
        (["train.centering=mean"], "train.centering` must be one of sinkhorn_knopp, softmax"),
        (["dino.koleo_topk=2"], "koleo_topk` must be 1 without"),
        (["gram.use_loss=true"], "gram_teacher_crops_size` must be set"),
        (
            ["gram.use_loss=true", "gram.ema_teacher=true"],
            "must come without gram.ckpt, gram.rep_update",
        ),
        (
            ["gram.use_loss=true", "gram.tokens_used=masked", "gram.img_level=true"],
            "gram.img_level` must be false",
        ),
        (
            ["schedules.lr={start: 0, peak: 1}"],
            "got none of end, warmup_epochs: add what is missing",
        ),
        (["schedules={}"], "`schedules.lr` must have start, peak, end, warmup_epochs, got none of"),
        (
            ["gram.loss_weight_schedule={peak: 1}"],
            "`gram.loss_weight_schedule` must have .*got none of start, end",
        ),
        (["accelerator.accumulation_steps=0"], "accumulation_steps` must be at least 1"),
        (["accelerator.strategy=dream"], "accelerator.strategy` must be one of"),
        (["accelerator.device=toaster"], "accelerator.device` must be auto"),
        (["multidistillation.enabled=true"], "this tree trains one student"),
        (["student.arch=vit_gigantic"], "student.arch` must be one of"),
        (["distillation.enabled=true"], "must be the teacher's configuration"),
    ],
)
def test_refused_settings(make_cfg, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        SSLMetaArch(make_cfg(*changes))


@pytest.mark.parametrize(("batch", "chosen"), [(63, "softmax"), (64, "sinkhorn_knopp")])
def test_automatic_centring_follows_the_batch(make_cfg, caplog, batch, chosen):
    with caplog.at_level("INFO", logger="dinov3"):
        cfg = make_cfg("train.centering=auto", f"train.batch_size_per_gpu={batch}")
        assert SSLMetaArch(cfg).centering == chosen
    assert f"{chosen}, for {batch} samples in a forward batch" in caplog.text


ALIGNED = ("multiview.strategy=multiview", "multiview.window=same", "multiview.turn_together=true")


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax"])
def test_dense_loss_from_the_parts(make_cfg, batch, centering):
    """Every patch of a crop against the teacher's assignment of the other crop's, in float64."""
    cfg = make_cfg(*ALIGNED, "multiview.dense_weight=0.3", f"train.centering={centering}")
    model = built(cfg)
    loss, metrics = step(model, batch)
    plain = built(make_cfg(*ALIGNED, f"train.centering={centering}"))
    without, other = step(plain, batch)
    assert loss == pytest.approx(without + 0.3 * metrics["dense_loss"], rel=1e-5)
    assert "dense_loss" not in other
    crops = batch["collated_global_crops"]
    with torch.no_grad():
        seen = model.student.backbone(crops, masks=batch["collated_masks"], is_training=True)
        whole = model.teacher.backbone(crops, is_training=True)["x_norm_patchtokens"]
        logits = model.teacher.ibot_head(whole).double()  # [6, 16, K]
        if centering == "softmax":
            targets = (logits / 0.05).softmax(-1)
        else:
            shares = (logits.flatten(0, 1) / 0.05).exp()
            for _ in range(3):
                shares = shares / shares.sum(0)
                shares = shares / shares.sum(1, keepdim=True)
            targets = shares.unflatten(0, (6, 16))
        own = log_softmax(model.student.ibot_head(seen["x_norm_patchtokens"]) / 0.1)
    pairs = [(targets[index + 3], own[index]) for index in range(3)]
    pairs += [(targets[index], own[index + 3]) for index in range(3)]
    expected = -sum((target * log).sum(-1).mean() for target, log in pairs) / 6
    assert metrics["dense_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_dense_loss_needs_aligned_crops(make_cfg):
    for change in ("multiview.window=overlapping", "multiview.turn_together=false"):
        with pytest.raises(
            ValueError, match="dense_weight` must be 0 unless both global crops show"
        ):
            SSLMetaArch(make_cfg(*ALIGNED, "multiview.dense_weight=1", change))


def test_unit_prototypes_make_logits_cosines(make_cfg, batch):
    """In both heads and in the fused patch loss, whose logits are never whole in memory."""
    losses = {}
    for fused in ("true", "false"):
        changes = ("accelerator.unit_prototypes=true", f"accelerator.fused_loss={fused}")
        model = built(make_cfg(*changes))
        losses[fused] = step(model, batch)
    assert losses["true"][0] == pytest.approx(losses["false"][0], rel=1e-5)
    assert losses["true"][0] != pytest.approx(plain_step(make_cfg, batch)[0], rel=1e-3)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    for name in ("dino_head", "ibot_head"):
        head = model.student[name]
        bottleneck, rows = head(x, no_last_layer=True), head.last_layer.weight
        cosines = torch.nn.functional.cosine_similarity(bottleneck[:, None], rows[None], dim=-1)
        torch.testing.assert_close(head(x), cosines)


def test_packed_attention_needs_a_gpu(make_cfg):
    with pytest.raises(
        ValueError, match="packed_attention` must be '' without a GPU, got xformers"
    ):
        SSLMetaArch(make_cfg("accelerator.packed_attention=xformers"))
