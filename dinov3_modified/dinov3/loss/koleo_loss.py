"""KoLeo: spread the features of a batch (matches `dinov3.loss.koleo_loss`; Sablayrolles et al. 2019, eq. 1)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-8


class KoLeoLoss(nn.Module):
    """-mean log of the distance to the nearest other sample, on the unit sphere.

    Features are taken in the type they come in; convert them to float32 first unless bfloat16's
    three digits are wanted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pdist = nn.PairwiseDistance(2, eps=_EPS)

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:
        """Index of the nearest other row (largest dot product): unit rows [B, D] → [B]."""
        products = x @ x.T
        products.fill_diagonal_(-1.0)
        return products.argmax(dim=1)

    def forward(self, student_output: Tensor, eps: float = _EPS) -> Tensor:
        """Features [B, D], B at least 2, → scalar.

        Raises ValueError (a single sample has no neighbour).
        """
        if student_output.shape[0] < 2:
            raise ValueError(
                f"KoLeo must have at least 2 samples, got {student_output.shape[0]}: raise "
                "train.batch_size_per_gpu or set dino.koleo_loss_weight to 0"
            )
        with torch.autocast(student_output.device.type, enabled=False):
            x = functional.normalize(student_output, p=2.0, dim=-1, eps=eps)
            with torch.no_grad():
                nearest = self.pairwise_NNs_inner(x)
            distances = self.pdist(x, x[nearest])
            return -torch.log(distances + eps).mean()


class KoLeoLossDistributed(nn.Module):
    """KoLeo with neighbours among the samples of all processes.

    `topk`: neighbours of each sample.  `loss_group_size`: samples are compared within groups of
    this many (a multiple of the local batch, a divisor of the global one); None: all.
    """

    def __init__(self, topk: int = 1, loss_group_size: int | None = None) -> None:
        super().__init__()
        self.pdist = nn.PairwiseDistance(2, eps=_EPS)
        self.topk = topk
        self.loss_group_size = loss_group_size

    def pairwise_NNs_inner(self, x: Tensor, all_x: Tensor, rank: int) -> Tensor:
        """Indices [B, topk] into `all_x` [B·W, D] of the nearest rows, the row itself left out."""
        batch = x.shape[0]
        products = x @ all_x.T
        own = torch.arange(batch, device=x.device)
        products[own, own + rank * batch] = -1.0
        return products.topk(k=self.topk, dim=1).indices

    def forward(self, student_output: Tensor, eps: float = _EPS) -> Tensor:
        """Features [B, D] of this process → scalar; gradients flow to neighbours elsewhere too."""
        with torch.autocast(student_output.device.type, enabled=False):
            x = functional.normalize(student_output, p=2.0, dim=-1, eps=eps)
            everything, rank = _gather_rows(x)
            batch = x.shape[0]
            if self.loss_group_size is not None:
                size = self.loss_group_size
                total = everything.shape[0]
                if size % batch or total % size:
                    raise ValueError(
                        "The KoLeo group must be a multiple of the local batch and a divisor of the "
                        f"global one, got {size} with {batch} and {total}: change "
                        "dino.koleo_distributed_loss_group_size"
                    )
                ranks = size // batch
                first = rank // ranks * size
                everything = everything[first : first + size]
                rank %= ranks
            if everything.shape[0] <= self.topk:
                raise ValueError(
                    f"KoLeo must have more samples than neighbours, got {everything.shape[0]} and "
                    f"{self.topk}: raise the batch or lower dino.koleo_topk"
                )
            with torch.no_grad():
                nearest = self.pairwise_NNs_inner(x, everything, rank)  # [B, topk]
            own = x[:, None].expand(-1, self.topk, -1).flatten(0, 1)
            distances = self.pdist(own, everything[nearest.flatten()])
            return -torch.log(distances + eps).mean()


def _gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes in rank order, with gradient, and this process's rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return x, 0
    from torch.distributed.nn.functional import all_gather

    return torch.cat(tuple(all_gather(x.contiguous()))), dist.get_rank()
