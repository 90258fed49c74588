"""DINO loss on CLS tokens (matches `dinov3.loss.dino_clstoken_loss`; Caron et al. 2021, eq. 2-4)."""

import torch
from torch import Tensor
from torch.nn import functional

from dinov3.cells.sinkhorn import CentredLoss, sinkhorn_knopp
from dinov3.distributed import get_process_subgroup


class DINOLoss(CentredLoss):
    """Cross-entropy between the teacher's assignment and the student's, over pairs of crops.

    `out_dim`: number of prototypes K; `student_temp`, `center_momentum`: as in `CentredLoss`.
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__((1, out_dim), student_temp, center_momentum)

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> Tensor:
        """softmax((logits - centre) / temperature) (eq. 4).

        `teacher_output`: [..., K]; `update_centers`: first apply an update that
        `reduce_center_update` has summed.
        """
        if update_centers:
            self.apply_center_update()
        return ((teacher_output.float() - self.center) / teacher_temp).softmax(dim=-1)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
    ) -> Tensor:
        """Equal shares for all prototypes over the batch of all processes.

        `teacher_output`: logits [B, K].  Returns Probabilities [B, K], float32; rows sum to 1.
        """
        group = get_process_subgroup()
        return sinkhorn_knopp(
            teacher_output, teacher_temp, n_iterations=n_iterations, group=group
        ).probabilities()

    def forward(
        self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
    ) -> Tensor:
        """Mean cross-entropy over student crops S, teacher crops T and samples B.

        `student_logits`: [S, B, K]; `teacher_probs`: [T, B, K]; `ignore_diagonal`: leave out crop s
        against the same crop t = s.
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
