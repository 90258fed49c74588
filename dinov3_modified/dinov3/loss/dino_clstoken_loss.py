"""DINO loss on CLS tokens (matches `dinov3.loss.dino_clstoken_loss`; Caron et al. 2021, eq. 2-4)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dinov3.cells.sinkhorn import sinkhorn_knopp
from dinov3.distributed import get_process_subgroup


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's assignment and the student's, over pairs of crops.

    Args:
        out_dim: number of prototypes K.
        student_temp: temperature of the student's softmax.
        center_momentum: share of the old centre in its running mean (softmax centring).
    """

    center: Tensor

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        # NaN until `init_weights`, so that a forgotten start cannot go unnoticed.
        self.register_buffer("center", torch.full((1, out_dim), torch.nan))
        self._pending: tuple[Tensor, Tensor] | None = None

    def init_weights(self) -> None:
        """The centre starts at zero."""
        self.center.zero_()

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> Tensor:
        """softmax((logits - centre) / temperature) (eq. 4).

        Args:
            teacher_output: [..., K].
            update_centers: first apply an update that `reduce_center_update` has summed.
        """
        if update_centers:
            self.apply_center_update()
        return ((teacher_output.float() - self.center) / teacher_temp).softmax(dim=-1)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
    ) -> Tensor:
        """Equal shares for all prototypes over the batch of all processes.

        Args:
            teacher_output: logits [B, K].

        Returns:
            Probabilities [B, K], float32; rows sum to 1.
        """
        group = get_process_subgroup() if _is_distributed() else None
        return sinkhorn_knopp(
            teacher_output, teacher_temp, n_iterations=n_iterations, group=group
        ).probabilities()

    def forward(
        self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
    ) -> Tensor:
        """Mean cross-entropy over student crops S, teacher crops T and samples B.

        Args:
            student_logits: [S, B, K].
            teacher_probs: [T, B, K].
            ignore_diagonal: leave out crop s against the same crop t = s.
        """
        num_student, batch, _ = student_logits.shape
        num_teacher = teacher_probs.shape[0]
        log_probs = functional.log_softmax(student_logits.float() / self.student_temp, dim=-1)
        pairs = torch.einsum("sbk,tbk->st", log_probs, teacher_probs.float())
        count = batch * num_student * num_teacher
        if ignore_diagonal:
            shorter = min(num_student, num_teacher)
            same = torch.eye(num_student, num_teacher, dtype=torch.bool, device=pairs.device)
            pairs = pairs.masked_fill(same, 0.0)
            count -= batch * shorter
        return -pairs.sum() / count

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Move the centre towards the mean of `teacher_output` [..., K]."""
        self.reduce_center_update(teacher_output)
        self.apply_center_update()

    @torch.no_grad()
    def reduce_center_update(self, teacher_output: Tensor) -> None:
        """Sum the logits over this batch and over processes."""
        logits = teacher_output.float().flatten(0, -2)
        total = logits.sum(dim=0, keepdim=True)
        count = torch.tensor(float(logits.shape[0]), device=logits.device)
        if _is_distributed():
            dist.all_reduce(total, group=get_process_subgroup())
            dist.all_reduce(count, group=get_process_subgroup())
        self._pending = (total, count)

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Apply what `reduce_center_update` summed; nothing happens twice."""
        if self._pending is None:
            return
        total, count = self._pending
        self._pending = None
        self.center.lerp_((total / count).to(self.center.dtype), 1 - self.center_momentum)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
