"""The running centre of a teacher's logits, which two losses have (ours; DINO, Caron et al. 2021, eq. 4)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3.distributed import get_process_subgroup, is_enabled


class CentredLoss(nn.Module):
    """A loss with the buffer `center`.

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
        """The centre starts at zero."""
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
