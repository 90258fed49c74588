"""What teachers' logits become: Sinkhorn-Knopp assignments, and centred softmax (ours).

Sinkhorn-Knopp works on two scaling vectors (Caron et al. 2020, SwAV, eq. 3 and 5).  The
assignment is Q = diag(b) exp(Z / t) diag(a).  Sinkhorn's iteration divides columns, then rows, by
their sums; a product of such divisions is again a scaling of rows and columns, so it is enough to
update the vectors a [K] and b [M], and the result is that of rewriting the matrix.  A row's scale
needs that row alone, so that one visit of a row gives its scale and its part of the columns' sums:
one visit an iteration and one before, O(M K) time.  At 15,000 masked patches and 65,536 prototypes
the whole matrix would have 3.9 GB in float32; it is never written: without compilation its
exponentials are made in chunks, compiled they stay in registers.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3.distributed import get_process_subgroup, is_enabled

_TINY = torch.finfo(torch.float32).tiny


def _on_device(value: float, device: torch.device) -> Tensor:
    """A number as a tensor, filled on the device: a copy of it would make the host wait."""
    return torch.full((), value, device=device)


@dataclass(frozen=True)
class Assignment:
    """Soft assignment of samples to prototypes, made row by row when asked for.

    Row m is exp((logits[m] - shift[m]) / temperature) * prototype_scale * sample_scale[m], and sums
    to 1.
    """

    logits: Tensor  # [M, K], of any float type
    temperature: float  # above 0
    shift: Tensor  # [M, 1] float32, keeps the exponential from overflowing
    prototype_scale: Tensor  # [K] float32
    sample_scale: Tensor  # [M, 1] float32
    # exp((logits - shift) / temperature) where it is small enough to be kept
    exponentials: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Probabilities [stop - start, K], float32."""
        part = slice(start, stop)
        if self.exponentials is not None:
            rows = self.exponentials[part] * self.prototype_scale
        else:
            rows = _exponentials(self.logits[part], self.shift[part], self.temperature)
            rows.mul_(self.prototype_scale)
        return rows.mul_(self.sample_scale[part])

    def parts(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Some rows of all that a compiled kernel makes probabilities of."""
        temperature = _on_device(self.temperature, self.logits.device)
        rows = (self.logits[part], self.shift[part])
        return *rows, temperature, self.prototype_scale, self.sample_scale[part]

    def probabilities(self) -> Tensor:
        """All rows [M, K], float32."""
        return self.rows(0, self.logits.shape[0])


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, **options: Any) -> Assignment:
    """As `_sinkhorn_knopp`, in float32 also where the caller computes in half precision."""
    with torch.autocast(logits.device.type, enabled=False):
        return _sinkhorn_knopp(logits, temperature, **options)


def _sinkhorn_knopp(
    logits: Tensor,
    temperature: float,
    *,
    n_iterations: int = 3,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = 2**28,
    compiled: bool = False,
) -> Assignment:
    """Assign samples to prototypes so that every prototype gets an equal share.

    Args:
        logits: [M, K] of this process; M may be 0.
        temperature: of the teacher.
        n_iterations: rescalings of columns, then rows.
        group: processes that share the assignment, None for all that a process group has.
        chunk_bytes: float32 memory that may be held for exponentials at once.
        compiled: run compiled kernels, which hold none.

    Returns an `Assignment` whose rows sum to 1.
    """
    reduce = is_enabled()
    rows, prototypes = logits.shape
    chunk = max(1, chunk_bytes // (4 * prototypes))
    # Each row is shifted by its own maximum; the difference to the common maximum goes into the
    # first scaling of the rows, so that the result is that of the unshifted exponentials.
    if rows:
        shift = logits.amax(dim=1, keepdim=True).float()
        top = shift.amax()
    else:
        shift = logits.new_zeros((0, 1), dtype=torch.float32)
        top = logits.new_full((), -math.inf, dtype=torch.float32)
    if reduce:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    sample_scale = ((shift - top) / temperature).exp()  # [M, 1]
    kept = None
    if rows <= chunk and not compiled:
        kept = _exponentials(logits, shift, temperature)

    def visit(
        scale: Tensor, prototype_scale: Tensor | None, *, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Scales of the rows, and the sums of the columns that follow; `last`: nobody reads the sums."""
        if compiled and rows:
            t = torch.tensor(
                temperature, device=logits.device
            )  # for a number it would compile again
            if prototype_scale is not None:
                scale = _compiled(row_scales)(logits, shift, t, prototype_scale)
            if last:
                return scale, scale[:0]
            return scale, _compiled(column_sums)(logits, shift, t, scale)
        mass = logits.new_zeros(prototypes, dtype=torch.float32)
        scales = [scale[:0]]
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            e = kept if kept is not None else _exponentials(logits[part], shift[part], temperature)
            scales.append(scale[part])
            if prototype_scale is not None:
                scales[-1] = 1.0 / (e @ prototype_scale[:, None]).clamp_min(_TINY)
            if not last:
                mass += (scales[-1].T @ e)[0]
        return torch.cat(scales), mass

    prototype_scale = None
    for _ in range(n_iterations):
        sample_scale, mass = visit(sample_scale, prototype_scale)
        if reduce:
            dist.all_reduce(mass, group=group)
        # Only ratios matter: a common factor goes into the samples' scale.  A prototype that
        # underflows for every sample gets no mass instead of 0 / 0.
        prototype_scale = mass.mean() / mass.clamp_min(_TINY)
    if prototype_scale is None:
        prototype_scale = logits.new_ones(prototypes, dtype=torch.float32)
    else:
        sample_scale, _ = visit(sample_scale, prototype_scale, last=True)
    return Assignment(logits, temperature, shift, prototype_scale, sample_scale, kept)


# The next two are compiled apart, each to one pass over the logits: together the compiler would write
# the exponentials that both need.  A matrix product would write them as well.


def row_scales(
    logits: Tensor, shift: Tensor, temperature: Tensor, prototype_scale: Tensor
) -> Tensor:
    """[M, 1]: one over the sums of exp((logits - shift) / temperature) * prototype_scale."""
    e = torch.exp((logits.float() - shift) / temperature)
    return 1.0 / (e * prototype_scale).sum(dim=1, keepdim=True).clamp_min(_TINY)


def column_sums(logits: Tensor, shift: Tensor, temperature: Tensor, sample_scale: Tensor) -> Tensor:
    """[K]: sums over rows of exp((logits - shift) / temperature) * sample_scale."""
    e = torch.exp((logits.float() - shift) / temperature)
    return (e * sample_scale).sum(dim=0)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


@torch.no_grad()
def softmax_assignment(logits: Tensor, center: Tensor, temperature: float) -> Assignment:
    """softmax((logits - center) / temperature) in the same form (DINO, Caron et al. 2021, eq. 4).

    `logits`: [M, K]; `center`: [1, K], the running mean of the logits.
    """
    centred = logits.float() - center
    shift = centred.amax(dim=1, keepdim=True) if centred.shape[0] else centred[:, :1]
    exponentials = _exponentials(centred, shift, temperature)
    scale = 1.0 / exponentials.sum(dim=1, keepdim=True)
    ones = centred.new_ones(centred.shape[1])
    return Assignment(centred, temperature, shift, ones, scale, exponentials)


def _exponentials(logits: Tensor, shift: Tensor, temperature: float) -> Tensor:
    return ((logits.float() - shift) / temperature).exp_()


class CentredLoss(nn.Module):
    """A loss with the buffer `center`, the running centre of a teacher's logits (DINO, eq. 4).

    Args:
        shape: of the centre; its last axis is the number of prototypes K.
        student_temp: temperature of the student's softmax.
        center_momentum: share of the old centre in its running mean (softmax centring).
    """

    center: Tensor

    def __init__(self, shape: tuple[int, ...], student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        # NaN until `init_weights`, so that a forgotten start cannot go unnoticed.
        self.register_buffer("center", torch.full(shape, torch.nan))
        self._pending: tuple[Tensor, Tensor] | None = None

    def init_weights(self) -> None:
        self.center.zero_()

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Move the centre towards the mean of `teacher_output` [..., K]."""
        self.reduce_center_update(teacher_output)
        self.apply_center_update()

    @torch.no_grad()
    def reduce_center_update(self, teacher_output: Tensor) -> None:
        """Sum the logits [..., K] over this batch and over processes."""
        logits = teacher_output.float().flatten(0, -2)
        total = logits.sum(dim=0)
        count = torch.tensor(float(logits.shape[0]), device=logits.device)
        if is_enabled():
            dist.all_reduce(total, group=get_process_subgroup())
            dist.all_reduce(count, group=get_process_subgroup())
        self._pending = (total, count)

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Apply what `reduce_center_update` summed, once; without rows the centre stays as it is."""
        if self._pending is None:
            return
        total, count = self._pending
        self._pending = None
        mean = (total / count.clamp(min=1.0)).to(self.center.dtype)
        moved = torch.lerp(self.center, mean.expand_as(self.center), 1 - self.center_momentum)
        self.center.copy_(torch.where(count > 0, moved, self.center))
