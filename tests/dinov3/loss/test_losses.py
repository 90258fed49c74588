"""Losses against float64 references written here from the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinov3.cells import sinkhorn
from dinov3.cells.sinkhorn import sinkhorn_knopp
from dinov3.loss import (
    DINOLoss,
    GramLoss,
    KoLeoLoss,
    KoLeoLossDistributed,
    iBOTPatchLoss,
    koleo_loss,
)
from dinov3.loss.ibot_patch_loss import lossfunc


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference_sinkhorn(logits: np.ndarray, temperature: float, n_iterations: int = 3) -> np.ndarray:
    """Alternating normalisation of the transposed matrix, as the papers write it."""
    q = np.exp(logits.astype(np.float64) / temperature).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(n_iterations):
        q /= q.sum(axis=1, keepdims=True) * prototypes
        q /= q.sum(axis=0, keepdims=True) * samples
    return (q * samples).T


# --- Sinkhorn-Knopp ---


@pytest.mark.parametrize("chunk_bytes", [2**28, 7 * 4 * 13])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_sinkhorn(temperature, chunk_bytes):
    logits = normal(0, 23, 13) * 0.3
    q = sinkhorn_knopp(logits, temperature, chunk_bytes=chunk_bytes)
    expected = reference_sinkhorn(logits.numpy(), temperature)
    np.testing.assert_allclose(q.probabilities(), expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(q.probabilities().sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(q.rows(5, 9), expected[5:9], rtol=1e-4, atol=1e-9)


def test_sinkhorn_balances_prototypes():
    logits = normal(1, 40, 4)
    logits[:, 0] += 3  # all like the first prototype best
    plain = (logits / 0.5).softmax(1).mean(0)
    shared = sinkhorn_knopp(logits, 0.5, n_iterations=50).probabilities().mean(0)
    assert plain[0] > 0.8
    np.testing.assert_allclose(shared, 0.25, atol=0.01)


def test_sinkhorn_iterations_matter():
    logits = normal(2, 9, 5)
    one = sinkhorn_knopp(logits, 0.1, n_iterations=1).probabilities()
    three = sinkhorn_knopp(logits, 0.1, n_iterations=3).probabilities()
    np.testing.assert_allclose(one, reference_sinkhorn(logits.numpy(), 0.1, 1), rtol=1e-4)
    assert (one - three).abs().max() > 1e-3


def test_the_teachers_take_three_iterations():
    logits = normal(35, 9, 5)
    expected = reference_sinkhorn(logits.numpy(), 0.1)
    ibot = iBOTPatchLoss(5).sinkhorn_knopp_teacher
    for found in (
        DINOLoss(5).sinkhorn_knopp_teacher(logits, 0.1),
        ibot(logits, 0.1, torch.tensor(9)),
        ibot.assign(logits, 0.1).probabilities(),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_sinkhorn_survives_large_logits():
    """exp(60 / 0.04) overflows even float64; the shares stay numbers that sum to one."""
    q = sinkhorn_knopp(normal(3, 12, 6) * 60, 0.04).probabilities()
    assert torch.isfinite(q).all()
    np.testing.assert_allclose(q.sum(1), 1.0, rtol=1e-4)


def test_sinkhorn_holds_exponentials_of_one_chunk(monkeypatch):
    """23 rows of 13 float32 in the memory of 7 rows: 7, 7, 7 and 2, twice an iteration."""
    sizes = []
    honest = sinkhorn._exponentials

    def noted(logits, *rest):
        sizes.append(len(logits))
        return honest(logits, *rest)

    monkeypatch.setattr(sinkhorn, "_exponentials", noted)
    logits = normal(34, 23, 13)
    q = sinkhorn_knopp(logits, 0.1, n_iterations=2, chunk_bytes=7 * 4 * 13)
    assert q.exponentials is None
    assert sizes == [7, 7, 7, 2] * 3  # one visit of the rows for each iteration, and one before
    sizes.clear()
    assert sinkhorn_knopp(logits, 0.1, chunk_bytes=23 * 4 * 13).exponentials is not None
    sinkhorn_knopp(logits, 0.1)
    assert sizes == [23, 23], "what fits is calculated once"


def test_sinkhorn_of_nothing():
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.1).probabilities().shape == (0, 5)


# --- DINO ---


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dino(ignore_diagonal):
    student, teacher = normal(4, 3, 4, 7), normal(5, 2, 4, 7).softmax(-1)
    log_probs = log_softmax(student.double().numpy() / 0.1)
    total, count = 0.0, 0
    for s in range(3):
        for t in range(2):
            if ignore_diagonal and s == t:
                continue
            total -= (teacher[t].double().numpy() * log_probs[s]).sum()
            count += 4
    result = DINOLoss(7)(student, teacher, ignore_diagonal=ignore_diagonal)
    np.testing.assert_allclose(result, total / count, rtol=1e-5)


def test_dino_student_temperature():
    student, teacher = normal(6, 2, 3, 5), normal(7, 2, 3, 5).softmax(-1)
    expected = -(teacher[:, None].double() * (student[None].double() / 0.5).log_softmax(-1)).sum()
    np.testing.assert_allclose(
        DINOLoss(5, student_temp=0.5)(student, teacher), expected / 12, rtol=1e-5
    )


def test_dino_of_equal_logits_is_log_k():
    loss = DINOLoss(11)(torch.zeros(2, 3, 11), torch.full((2, 3, 11), 1 / 11))
    assert float(loss) == pytest.approx(math.log(11))


def test_centring():
    loss = DINOLoss(5, center_momentum=0.9)
    assert torch.isnan(loss.center).all()
    loss.init_weights()
    logits = normal(8, 6, 5)
    first = loss.softmax_center_teacher(logits, 0.07)
    assert float(loss.center.abs().max()) == 0, "a batch moves the centre of those after it"
    loss.update_center(logits)
    np.testing.assert_allclose(first, (logits / 0.07).softmax(-1), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(loss.center[0], 0.1 * logits.mean(0), rtol=1e-5)
    kept = loss.center.clone()
    second = loss.softmax_center_teacher(logits, 0.07, update_centers=False)
    expected = ((logits - kept) / 0.07).softmax(-1)
    np.testing.assert_allclose(second, expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(loss.center, kept)
    views = loss.softmax_center_teacher(logits.reshape(2, 3, 5), 0.07, update_centers=False)
    np.testing.assert_array_equal(views.flatten(0, 1), second)
    loss.reduce_center_update(logits)
    loss.softmax_center_teacher(logits, 0.07, update_centers=False)
    assert torch.equal(loss.center, kept), "a summed update waits"
    loss.softmax_center_teacher(logits, 0.07)
    np.testing.assert_allclose(loss.center[0], 0.9 * kept[0] + 0.1 * logits.mean(0), rtol=1e-5)


# --- iBOT ---


def masked_batch() -> tuple[torch.Tensor, torch.Tensor]:
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[0, [1, 4, 5]] = True
    masks[2, [0, 8]] = True
    weights = torch.tensor([1 / 3] * 3 + [1 / 2] * 2)
    return masks, weights


def test_ibot_masked():
    masks, weights = masked_batch()
    student, teacher = normal(9, 5, 6), normal(10, 5, 6).softmax(-1)
    rows = (teacher.double().numpy() * log_softmax(student.double().numpy() / 0.1)).sum(-1)
    expected = -(rows * weights.double().numpy()).sum() / 4
    loss = iBOTPatchLoss(6)
    np.testing.assert_allclose(
        loss.forward_masked(student, teacher, masks, masks_weight=weights), expected, rtol=1e-5
    )
    np.testing.assert_allclose(loss.forward_masked(student, teacher, masks), expected, rtol=1e-5)
    padded_s, padded_t = torch.cat([student, student]), torch.cat([teacher, teacher])
    result = loss.forward_masked(
        padded_s, padded_t, masks, n_masked_patches=5, masks_weight=weights
    )
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_ibot_all_patches_equals_masked():
    masks, weights = masked_batch()
    student, teacher = normal(11, 4, 9, 6), normal(12, 4, 9, 6).softmax(-1)
    loss = iBOTPatchLoss(6)
    whole = loss(student, teacher, masks)
    some = loss.forward_masked(student[masks], teacher[masks], masks, masks_weight=weights)
    np.testing.assert_allclose(whole, some, rtol=1e-5)


def test_lossfunc_temperature():
    t, s = normal(13, 3, 4).softmax(-1), normal(14, 3, 4)
    expected = (t.double() * (s.double() / 0.3).log_softmax(-1)).sum(-1)
    np.testing.assert_allclose(lossfunc(t, s, 0.3), expected, rtol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [2**28, 2 * 4 * 17, 1])
def test_fused_loss_and_gradients_equal_the_plain_ones(chunk_bytes):
    """Value, gradient of the bottleneck and of the prototypes, against float64 autograd."""
    masks, weights = masked_batch()
    x, w = normal(15, 5, 8), normal(16, 17, 8) * 0.5
    assignment = sinkhorn_knopp(normal(17, 5, 17) * 0.2, 0.05, chunk_bytes=chunk_bytes)
    x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
    rows = assignment.probabilities().double() * ((x64 @ w64.T) / 0.1).log_softmax(-1)
    expected = -(rows.sum(-1) * weights.double()).sum() / 4
    (3 * expected).backward()

    x.requires_grad_()
    w.requires_grad_()
    fused = iBOTPatchLoss(17).forward_fused(
        x, w, assignment, masks, masks_weight=weights, chunk_bytes=chunk_bytes
    )
    (3 * fused).backward()
    np.testing.assert_allclose(fused.detach(), expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(x.grad, x64.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(w.grad, w64.grad, rtol=1e-4, atol=1e-6)


def test_fused_loss_without_masked_patches():
    masks = torch.zeros(4, 9, dtype=torch.bool)
    x = torch.zeros(0, 8, requires_grad=True)
    w = normal(18, 6, 8).requires_grad_()
    empty = sinkhorn_knopp(torch.zeros(0, 6), 0.05)
    loss = iBOTPatchLoss(6).forward_fused(x, w, empty, masks, masks_weight=torch.zeros(0))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(w.grad.abs().max()) == 0


def test_fused_loss_with_frozen_parts():
    masks, weights = masked_batch()
    x, w = normal(19, 5, 8), normal(20, 6, 8)
    assignment = sinkhorn_knopp(normal(21, 5, 6), 0.1)
    both = x.clone().requires_grad_(), w.clone().requires_grad_()
    iBOTPatchLoss(6).forward_fused(*both, assignment, masks, weights).backward()
    only_x = x.clone().requires_grad_()
    iBOTPatchLoss(6).forward_fused(only_x, w, assignment, masks, weights).backward()
    assert torch.equal(only_x.grad, both[0].grad)


def test_ibot_centring():
    loss = iBOTPatchLoss(5)
    loss.init_weights()
    logits = normal(22, 7, 5)
    assignment = loss.softmax_center_assignment(logits, 0.1)
    expected = (logits / 0.1).softmax(-1)
    np.testing.assert_allclose(assignment.probabilities(), expected, rtol=1e-4, atol=1e-8)
    loss.update_center(logits)
    np.testing.assert_allclose(loss.center[0, 0], 0.1 * logits.mean(0), rtol=1e-5)
    kept = loss.center.clone()
    second = loss.softmax_center_teacher(logits, 0.1, update_centers=False)
    expected = ((logits - kept[0]) / 0.1).softmax(-1)
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-8)
    images = loss.softmax_center_teacher(logits[:6].reshape(2, 3, 5), 0.1, update_centers=False)
    np.testing.assert_array_equal(images.flatten(0, 1), second[:6])
    nothing = torch.zeros(0, 5)
    assert loss.softmax_center_assignment(nothing, 0.1).probabilities().shape == (0, 5)
    loss.update_center(nothing)
    assert torch.equal(loss.center, kept), "a batch without masks leaves the centre alone"


# --- KoLeo ---


def reference_koleo(x: np.ndarray, topk: int = 1) -> float:
    x = x.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    products = x @ x.T
    np.fill_diagonal(products, -1)
    order = np.argsort(-products, axis=1)[:, :topk]
    distances = [np.linalg.norm(x[i] - x[j] + 1e-8) for i in range(len(x)) for j in order[i]]
    return float(-np.mean(np.log(np.array(distances) + 1e-8)))


def test_koleo():
    x = normal(23, 9, 6)
    np.testing.assert_allclose(KoLeoLoss()(x), reference_koleo(x.numpy()), rtol=1e-4)
    np.testing.assert_allclose(KoLeoLossDistributed()(x), reference_koleo(x.numpy()), rtol=1e-4)
    three = KoLeoLossDistributed(topk=3)(x)
    np.testing.assert_allclose(three, reference_koleo(x.numpy(), 3), rtol=1e-4)
    assert float(three) < float(KoLeoLoss()(x)), "farther neighbours: smaller loss"


@pytest.mark.parametrize("loss", [KoLeoLoss(), KoLeoLossDistributed()])
def test_koleo_finds_neighbours_in_full_precision(loss):
    """Directions at 0, 0.10 and -0.09: bfloat16 cannot tell which of the two is nearer to the first."""
    angles = torch.tensor([0.0, 0.10, -0.09])
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(torch.stack([angles.cos(), angles.sin()], dim=1))
    distances = [2 * math.sin(angle / 2) for angle in (0.09, 0.10, 0.09)]
    assert float(result) == pytest.approx(-np.log(distances).mean(), rel=1e-5)


def test_koleo_compares_within_a_group_of_processes(monkeypatch):
    """Six processes with three samples each, in groups of three: this one is amid the second group."""
    everything = normal(33, 18, 6)
    x = torch.nn.functional.normalize(everything)
    monkeypatch.setattr(koleo_loss, "_gather_rows", lambda own: (x, 4))
    group, own = x[9:], x[12:15]
    products = own @ group.T
    products[[0, 1, 2], [3, 4, 5]] = -1  # the samples themselves
    expected = -np.log(np.linalg.norm(own - group[products.argmax(1)], axis=1)).mean()
    result = KoLeoLossDistributed(loss_group_size=9)(everything[12:15])
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    for size in (4, 12):  # no multiple of the local batch, no divisor of the global one
        with pytest.raises(ValueError, match=f"got {size} with 3 and 18"):
            KoLeoLossDistributed(loss_group_size=size)(everything[12:15])


def test_koleo_pushes_close_points_apart():
    x = torch.tensor([[1.0, 0.02], [1.0, -0.02], [-1.0, 0.5]], requires_grad=True)
    loss = KoLeoLoss()(x)
    loss.backward()
    assert float(KoLeoLoss()((x - 1e-3 * x.grad).detach())) < float(loss.detach())


def test_koleo_needs_neighbours():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        KoLeoLoss()(torch.ones(1, 4))
    with pytest.raises(ValueError, match="more samples than neighbours, got 3 and 3"):
        KoLeoLossDistributed(topk=3)(normal(24, 3, 4))
    with pytest.raises(ValueError, match="must be a multiple of the local batch"):
        KoLeoLossDistributed(loss_group_size=3)(normal(25, 4, 4))


def test_koleo_identical_samples_are_finite():
    x = torch.ones(4, 3, requires_grad=True)
    loss = KoLeoLoss()(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


# --- Gram ---


def reference_gram(student, teacher, norm: bool, clamp_student: bool, clamp_teacher: bool) -> float:
    student, teacher = student.double().numpy(), teacher.double().numpy()
    if norm:
        student = student / np.linalg.norm(student, axis=-1, keepdims=True)
        teacher = teacher / np.linalg.norm(teacher, axis=-1, keepdims=True)
    s = student @ np.swapaxes(student, -1, -2)
    t = teacher @ np.swapaxes(teacher, -1, -2)
    s = np.maximum(s, 0) if clamp_student else s
    t = np.maximum(t, 0) if clamp_teacher else t
    return float(((s - t) ** 2).mean())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("remove", "only_teacher"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("img_level", [True, False])
def test_gram(norm, remove, only_teacher, img_level):
    student, teacher = normal(26, 3, 5, 4), normal(27, 3, 5, 4)
    loss = GramLoss(norm, img_level, remove_neg=remove, remove_only_teacher_neg=only_teacher)
    result = loss(student, teacher, img_level=img_level)
    if not img_level:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    expected = reference_gram(student, teacher, norm, remove, remove or only_teacher)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_gram_clamps_both_sides_by_default():
    student, teacher = normal(36, 3, 5, 4), normal(37, 3, 5, 4)
    expected = reference_gram(student, teacher, True, True, True)
    np.testing.assert_allclose(GramLoss()(student, teacher), expected, rtol=1e-5)


def test_gram_bad_shapes():
    with pytest.raises(ValueError, match=r"must have patches \[B, N, D\], got \(2, 3, 4, 5\)"):
        GramLoss()(normal(38, 2, 3, 4, 5), normal(39, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="must have one shape"):
        GramLoss()(normal(28, 2, 4, 3), normal(29, 2, 5, 3))
    with pytest.raises(ValueError, match=r"gram\.img_level to false"):
        GramLoss()(normal(30, 4, 3), normal(31, 4, 3), img_level=True)
