"""Sinkhorn-Knopp assignment by two scaling vectors (ours; Caron et al. 2020, SwAV, eq. 3 and 5).

The assignment is Q = diag(b) exp(Z / t) diag(a).  Sinkhorn's iteration divides columns, then rows, by
their sums; a product of such divisions is again a scaling of rows and columns, so it is enough to
update the vectors a [K] and b [M], and the result is that of rewriting the matrix.  The [M, K] matrix
is only read, in chunks: two passes an iteration, O(M K) time, memory of one chunk.  At 15,000 masked
patches and 65,536 prototypes the whole matrix would have 3.9 GB in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.distributed import is_enabled

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Assignment:
    """Soft assignment of samples to prototypes, made row by row when asked for.

    Row m is exp((logits[m] - shift[m]) / temperature) * prototype_scale * sample_scale[m], and sums
    to 1.

    Args:
        logits: [M, K], of any float type.
        temperature: above 0.
        shift: [M, 1] float32, keeps the exponential from overflowing.
        prototype_scale: [K] float32.
        sample_scale: [M, 1] float32.
        exponentials: exp((logits - shift) / temperature) where it is small enough to be kept.
    """

    logits: Tensor
    temperature: float
    shift: Tensor
    prototype_scale: Tensor
    sample_scale: Tensor
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
