"""Cross-entropy of masked patches without their logits (ours).

Rows are taken in chunks: the chunk's logits are made from the bottleneck and the prototypes, its
loss and gradients follow at once, and the chunk is dropped.  The [M, K] matrix of the student and
its gradient are never whole in memory.  Compiled, the teacher's probabilities are never written
either, and the student's logits are written in the type of the product.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov3.cells.sinkhorn import Assignment


def prototype_cross_entropy(
    bottleneck: Tensor,
    prototypes: Tensor,
    assignment: Assignment,
    row_weights: Tensor,
    *,
    student_temp: float,
    chunk_bytes: int = 2**28,
    compiled: bool = False,
) -> Tensor:
    """Sum over rows of weight * cross-entropy(assignment, softmax(bottleneck prototypesᵀ / t)).

    Args:
        bottleneck: [M, d], the normalised output of the head's MLP.
        prototypes: [K, d], the weight of its last layer.
        assignment: of the teacher, M rows over K prototypes.
        row_weights: [M].
        student_temp: temperature t.
        chunk_bytes: float32 memory of a chunk of logits.
        compiled: run compiled kernels.

    Returns a scalar, float32; gradients flow to `bottleneck` and `prototypes`.
    """
    rows = max(1, chunk_bytes // (4 * prototypes.shape[0]))
    return _PrototypeCrossEntropy.apply(
        bottleneck, prototypes, assignment, row_weights, student_temp, rows, compiled
    )


def chunk_and_gradients(
    x: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    row_weight: Tensor,
    student_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of some rows, the gradient of x [m, d], and `grad_weight` [K, d] with their share added.

    `teacher`: logits [m, K], shift [m, 1], temperature [], scales of prototypes [K] and rows [m, 1].
    As `_chunk`, written so that a compiler makes few kernels of it.
    """
    logits, shift, temperature, prototype_scale, sample_scale = teacher
    target = torch.exp((logits.float() - shift) / temperature) * prototype_scale * sample_scale
    student = (x @ weight.T).float() / student_temp
    student = student - student.amax(dim=1, keepdim=True)
    exponentials = student.exp()
    total = exponentials.sum(dim=1, keepdim=True)
    agreement = (target * student).sum(dim=1)
    loss = ((total[:, 0].log() - agreement) * row_weight).sum()
    gradient = (exponentials / total - target) * (row_weight / student_temp)[:, None]
    gradient = gradient.to(x.dtype)
    return loss, gradient @ weight, grad_weight + (gradient.T @ x).float()


@cache
def _compiled_chunk() -> Any:
    return torch.compile(chunk_and_gradients)


def _chunk(
    x: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor, student_temp: float
) -> tuple[Tensor, Tensor]:
    """Loss of some rows, and its gradient with respect to their logits [m, K]."""
    logits = (x @ weight.T).float().div_(student_temp)  # [m, K]
    # Relative to each row's maximum; what is subtracted cancels, since rows of the target sum to 1.
    logits.sub_(logits.amax(dim=1, keepdim=True))
    agreement = torch.linalg.vecdot(target, logits)  # [m]
    exponentials = logits.exp_()
    total = exponentials.sum(dim=1)  # [m]
    loss = ((total.log() - agreement) * row_weight).sum()
    # softmax - target, in the memory of the logits
    gradient = exponentials.mul_((1.0 / total)[:, None]).sub_(target)
    gradient.mul_((row_weight / student_temp)[:, None])
    return loss, gradient


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        bottleneck: Tensor,
        prototypes: Tensor,
        assignment: Assignment,
        row_weights: Tensor,
        student_temp: float,
        rows: int,
        compiled: bool,
    ) -> Tensor:
        # The product runs in the bottleneck's type: under mixed precision that is bfloat16.
        weight = prototypes.to(bottleneck.dtype)
        num_rows = bottleneck.shape[0]
        total = bottleneck.new_zeros((), dtype=torch.float32)
        wants_x, wants_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(bottleneck) if wants_x else None
        grad_w = torch.zeros_like(prototypes, dtype=torch.float32) if wants_w else None
        with torch.autocast(bottleneck.device.type, enabled=False):
            for start in range(0, num_rows, rows):
                part = slice(start, min(start + rows, num_rows))
                if compiled and grad_x is not None and grad_w is not None:
                    loss, grad_x[part], grad_w = _compiled_chunk()(
                        bottleneck[part],
                        weight,
                        grad_w,
                        assignment.parts(part),
                        row_weights[part].float(),
                        student_temp,
                    )
                    total += loss
                    continue
                loss, gradient = _chunk(
                    bottleneck[part],
                    weight,
                    assignment.rows(part.start, part.stop),
                    row_weights[part].float(),
                    student_temp,
                )
                total += loss
                gradient = gradient.to(bottleneck.dtype)
                if grad_x is not None:
                    grad_x[part] = gradient @ weight
                if grad_w is not None:
                    grad_w += (gradient.T @ bottleneck[part]).float()
        ctx.save_for_backward(grad_x, grad_w)
        ctx.types = bottleneck.dtype, prototypes.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        type_x, type_w = ctx.types
        if grad_x is not None:
            grad_x = (grad_x * grad_output).to(type_x)
        if grad_w is not None:
            grad_w = (grad_w * grad_output).to(type_w)
        return grad_x, grad_w, None, None, None, None, None
