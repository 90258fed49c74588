"""What teachers' logits become: Sinkhorn-Knopp assignments, and centred softmax (ours).

Sinkhorn-Knopp works on two scaling vectors (Caron et al. 2020, SwAV, eq. 3 and 5).  The
assignment is Q = diag(b) exp(Z / t) diag(a).  Sinkhorn's iteration divides columns, then rows, by
their sums; a product of such divisions is again a scaling of rows and columns, so it is enough to
update the vectors a [K] and b [M], and the result is that of rewriting the matrix.  The [M, K]
matrix is only read, in chunks: two passes an iteration, O(M K) time, memory of one chunk.  At
15,000 masked patches and 65,536 prototypes the whole matrix would have 3.9 GB in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3.distributed import get_process_subgroup, is_enabled

_TINY = torch.finfo(torch.float32).tiny


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

    def probabilities(self) -> Tensor:
        """All rows [M, K], float32."""
        return self.rows(0, self.logits.shape[0])


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    temperature: float,
    *,
    n_iterations: int = 3,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = 2**28,
) -> Assignment:
    """Assign samples to prototypes so that every prototype gets an equal share.

    Args:
        logits: [M, K] of this process; M may be 0.
        temperature: of the teacher.
        n_iterations: rescalings of columns, then rows.
        group: processes that share the assignment, None for all that a process group has.
        chunk_bytes: float32 memory that may be held for exponentials at once.

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
    kept = _exponentials(logits, shift, temperature) if rows <= chunk else None

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        if kept is not None:
            yield slice(0, rows), kept
            return
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            yield part, _exponentials(logits[part], shift[part], temperature)

    prototype_scale = logits.new_ones(prototypes, dtype=torch.float32)
    for _ in range(n_iterations):
        mass = logits.new_zeros(prototypes, dtype=torch.float32)
        for part, exponentials in chunks():
            mass += (sample_scale[part].T @ exponentials)[0]
        if reduce:
            dist.all_reduce(mass, group=group)
        # Only ratios matter: a common factor goes into the samples' scale.  A prototype that
        # underflows for every sample gets no mass instead of 0 / 0.
        prototype_scale = mass.mean() / mass.clamp_min(_TINY)
        new_scale = torch.empty_like(sample_scale)
        for part, exponentials in chunks():
            new_scale[part] = 1.0 / (exponentials @ prototype_scale[:, None]).clamp_min(_TINY)
        sample_scale = new_scale
    return Assignment(logits, temperature, shift, prototype_scale, sample_scale, kept)


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
