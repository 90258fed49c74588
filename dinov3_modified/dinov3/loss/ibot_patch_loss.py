"""iBOT loss on masked patches (matches `dinov3.loss.ibot_patch_loss`; Zhou et al. 2022, eq. 3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov3.cells.patch_cross_entropy import prototype_cross_entropy
from dinov3.cells.sinkhorn import Assignment, CentredLoss, sinkhorn_knopp, softmax_assignment
from dinov3.distributed import get_process_subgroup


def lossfunc(t: Tensor, s: Tensor, temp: float) -> Tensor:
    """Sum over the last axis of t * log_softmax(s / temp): [..., K] twice → [...], float32."""
    return (t.float() * functional.log_softmax(s.float() / temp, dim=-1)).sum(dim=-1)


class SinkhornKnoppTeacher(nn.Module):
    """Sinkhorn-Knopp over the masked patches of all processes."""

    def assign(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_iterations: int = 3,
        chunk_bytes: int = 2**28,
        compiled: bool = False,
    ) -> Assignment:
        """As `forward`, without writing the [M, K] matrix."""
        return sinkhorn_knopp(
            teacher_output,
            teacher_temp,
            n_iterations=n_iterations,
            group=get_process_subgroup(),
            chunk_bytes=chunk_bytes,
            compiled=compiled,
        )

    @torch.no_grad()
    def forward(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor,
        n_iterations: int = 3,
    ) -> Tensor:
        """Logits [M, K] → probabilities [M, K], float32, whose rows sum to 1.

        `n_masked_patches_tensor`: masked patches of this process; the shares do not depend on the
        total, so it is left as it is (upstream sums it over processes in place).
        """
        return self.assign(teacher_output, teacher_temp, n_iterations).probabilities()


class iBOTPatchLoss(CentredLoss):
    """Cross-entropy between the teacher's view of masked patches and the student's prediction.

    `patch_out_dim`: number of prototypes K; `student_temp`, `center_momentum`: as in `CentredLoss`.
    """

    def __init__(
        self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__((1, 1, patch_out_dim), student_temp, center_momentum)
        self.sinkhorn_knopp_teacher = SinkhornKnoppTeacher()

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_patch_tokens: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> Tensor:
        """softmax((logits - centre) / temperature): [M, K] or [B, N, K] → the same, float32."""
        if update_centers:
            self.apply_center_update()
        logits = teacher_patch_tokens.float()
        center = self.center if logits.ndim == 3 else self.center[0]
        return ((logits - center) / teacher_temp).softmax(dim=-1)

    def softmax_center_assignment(
        self, teacher_patch_tokens: Tensor, teacher_temp: float
    ) -> Assignment:
        """As `softmax_center_teacher` on [M, K], in the form that the fused loss takes."""
        self.apply_center_update()
        return softmax_assignment(teacher_patch_tokens, self.center[0], teacher_temp)

    def forward(
        self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor
    ) -> Tensor:
        """Mean over images of the mean over their masked patches.

        `student_patch_tokens`: logits [B, N, K]; `teacher_patch_tokens`: probabilities [B, N, K];
        `student_masks_flat`: [B, N] booleans.
        """
        loss = lossfunc(teacher_patch_tokens, student_patch_tokens, self.student_temp)
        masks = student_masks_flat.float()
        per_image = (loss * masks).sum(dim=-1) / masks.sum(dim=-1).clamp(min=1.0)
        return -per_image.mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The same from masked patches alone.

        Args:
            student_patch_tokens_masked: logits [M, K].
            teacher_patch_tokens_masked: probabilities [M, K].
            student_masks_flat: [2B, N] booleans; images without a mask count in the mean.
            n_masked_patches: rows that are real where the rest is padding.
            masks_weight: [M], one over the number of masked patches of the row's image.
        """
        loss = lossfunc(teacher_patch_tokens_masked, student_patch_tokens_masked, self.student_temp)
        if masks_weight is None:
            masks_weight = self._row_weights(student_masks_flat)
        if n_masked_patches is not None:
            loss = loss[:n_masked_patches]
        return -(loss * masks_weight).sum() / student_masks_flat.shape[0]

    def forward_fused(
        self,
        bottleneck: Tensor,
        prototypes: Tensor,
        assignment: Assignment,
        student_masks_flat: Tensor,
        masks_weight: Tensor | None = None,
        chunk_bytes: int = 2**28,
        compiled: bool = False,
    ) -> Tensor:
        """`forward_masked` of logits = bottleneck prototypesᵀ, chunk by chunk.

        `bottleneck`: [M, d]; `prototypes`: [K, d]; `assignment`: of the teacher, M rows.
        """
        if masks_weight is None:
            masks_weight = self._row_weights(student_masks_flat)
        total = prototype_cross_entropy(
            bottleneck,
            prototypes,
            assignment,
            masks_weight,
            student_temp=self.student_temp,
            chunk_bytes=chunk_bytes,
            compiled=compiled,
        )
        return total / student_masks_flat.shape[0]

    @staticmethod
    def _row_weights(masks: Tensor) -> Tensor:
        count = masks.sum(dim=-1).clamp(min=1.0)
        return (1.0 / count)[:, None].expand_as(masks)[masks]
