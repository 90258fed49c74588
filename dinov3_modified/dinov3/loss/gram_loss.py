"""Gram anchoring (matches `dinov3.loss.gram_loss`; Siméoni et al. 2025, DINOv3, eq. 2)."""

from torch import Tensor, nn
from torch.nn import functional


class GramLoss(nn.Module):
    """Mean squared difference of the patch similarities of student and Gram teacher.

    Args:
        apply_norm: similarities are cosines; otherwise dot products.
        img_level: between the patches of one image; otherwise between all patches of the batch.
        remove_neg: set negative similarities to zero on both sides.
        remove_only_teacher_neg: set only the teacher's to zero.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        self.apply_norm = apply_norm
        self.img_level = img_level
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg
        self.mse_loss = nn.MSELoss()

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> Tensor:
        """Scalar loss.

        `output_feats`: the student's patches [B, N, D], or [M, D] with `img_level` false;
        `target_feats`: the Gram teacher's, same shape; `img_level`: as in the constructor, for this
        call.  Raises ValueError (the shapes differ, or `img_level` meets patches without an image
        axis).
        """
        if output_feats.shape != target_feats.shape:
            raise ValueError(
                "Patches of student and Gram teacher must have one shape, got "
                f"{tuple(output_feats.shape)} and {tuple(target_feats.shape)}: resize the teacher's"
            )
        if img_level and output_feats.ndim != 3:
            raise ValueError(
                f"Image level must have patches [B, N, D], got {tuple(output_feats.shape)}: set "
                "gram.img_level to false for gram.tokens_used other than all"
            )
        student = self._similarity(output_feats.float(), img_level)
        teacher = self._similarity(target_feats.float(), img_level)
        if self.remove_neg:
            teacher = teacher.clamp(min=0.0)
            student = student.clamp(min=0.0)
        elif self.remove_only_teacher_neg:
            teacher = teacher.clamp(min=0.0)
        return self.mse_loss(student, teacher)

    def _similarity(self, feats: Tensor, img_level: bool) -> Tensor:
        if self.apply_norm:
            feats = functional.normalize(feats, dim=-1)
        if not img_level and feats.ndim == 3:
            feats = feats.flatten(0, 1)
        return feats @ feats.transpose(-1, -2)
