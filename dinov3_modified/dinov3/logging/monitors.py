"""Signs of collapse in the features of a batch (ours)."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "CollapseMonitor",
    "assignment_statistics",
    "attention_entropy",
    "effective_rank",
    "feature_spread",
    "module_norms",
]

logger = logging.getLogger("dinov3")


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values (RankMe, Garrido et al. 2023, eq. 1).

    Args:
        features: [B, D]; from 1 (all rows on a line) to min(B, D).
    """
    values = torch.linalg.svdvals(features.double())
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-(shares * torch.log(shares.clamp_min(1e-30))).sum()))


def feature_spread(features: Tensor) -> float:
    """Mean standard deviation per dimension of L2-normalised rows, times sqrt(D).

    Near 1 for features spread over the sphere, 0 for equal ones (SimSiam, Chen and He 2021, section 4.1).
    """
    unit = nn.functional.normalize(features.float(), dim=-1)
    return float(unit.std(dim=0, unbiased=False).mean() * math.sqrt(features.shape[1]))


def assignment_statistics(probabilities: Tensor) -> dict[str, float]:
    """Of soft assignments [B, K]: entropy of the mean over log K (1: all prototypes equally used),
    mean entropy of a row over log K (1: undecided), share of prototypes that are some row's first."""
    probabilities = probabilities.float()
    scale = math.log(probabilities.shape[1])
    mean = probabilities.mean(dim=0)
    rows = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(dim=1)
    used = probabilities.argmax(dim=1).unique().numel()
    return {
        "prototype_entropy": float(-(mean * mean.clamp_min(1e-30).log()).sum() / scale),
        "assignment_entropy": float(rows.mean() / scale),
        "prototypes_used": used / min(probabilities.shape),
    }


def attention_entropy(attention: Tensor) -> float:
    """Mean entropy of the CLS token's attention over log T (1: it looks everywhere alike).

    Args:
        attention: [B, heads, T, T], rows sum to 1.
    """
    cls = attention[:, :, 0].float()
    entropy = -(cls * cls.clamp_min(1e-30).log()).sum(dim=-1)
    return float(entropy.mean() / math.log(cls.shape[-1]))


def module_norms(modules: dict[str, nn.Module] | nn.ModuleDict) -> dict[str, Tensor]:
    """L2 norm of all weights of each module, by name; on their device."""
    found = {}
    for name, module in modules.items():
        norms: list[Any] = list(torch._foreach_norm([p.detach() for p in module.parameters()]))
        whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
        found[f"{name}_weight_norm"] = torch.stack(whole).norm()
    return found


class CollapseMonitor:
    """Figures of the teacher's features at intervals, with a warning where they look collapsed.

    Args:
        cfg: a configuration; reads its `monitor` section and the number of prototypes.
    """

    def __init__(self, cfg: Any) -> None:
        self.settings = cfg.monitor
        self.flat_loss = math.log(cfg.dino.head_n_prototypes)
        self._warned: set[str] = set()

    def is_due(self, iteration: int) -> bool:
        """Whether this iteration is measured."""
        period = self.settings.period_iterations
        return bool(self.settings.enabled) and period > 0 and iteration % period == 0

    @torch.no_grad()
    def measure(
        self, vit: nn.Module, images: Tensor, head: nn.Module | None = None
    ) -> dict[str, float]:
        """Figures of a network in eval mode on some images.

        Args:
            images: [B, 3, H, W]; at most `monitor.images` of them are looked at.
            head: also the statistics of its assignments, softmax at temperature 0.07.
        """
        images = images[: self.settings.images]
        out = vit(images, is_training=True)
        cls, patches = out["x_norm_clstoken"].float(), out["x_norm_patchtokens"].float()
        figures = {
            "monitor/cls_spread": feature_spread(cls),
            "monitor/cls_effective_rank": effective_rank(cls),
            "monitor/patch_spread": feature_spread(patches.flatten(0, 1)),
            "monitor/patch_effective_rank": effective_rank(patches.flatten(0, 1)),
        }
        look: Any = getattr(vit, "get_last_selfattention", None)
        if look is not None:
            attention = look(images[:4])
            figures["monitor/attention_entropy"] = attention_entropy(attention)
        if head is not None:
            probabilities = (head(out["x_norm_clstoken"]).float() / 0.07).softmax(dim=-1)
            statistics = assignment_statistics(probabilities)
            figures |= {f"monitor/{name}": value for name, value in statistics.items()}
        return figures

    def check(
        self, figures: dict[str, float], iteration: int, dino_loss: float | None
    ) -> list[str]:
        """Warn, once a sign, of what looks collapsed; returns the signs."""
        settings = self.settings
        signs: dict[str, str] = {}
        if iteration < settings.warn_after:
            return []
        if figures.get("monitor/cls_effective_rank", math.inf) < settings.min_effective_rank:
            signs["rank"] = (
                f"the effective rank of CLS features is {figures['monitor/cls_effective_rank']:.2f}, "
                f"below monitor.min_effective_rank {settings.min_effective_rank}"
            )
        if figures.get("monitor/cls_spread", math.inf) < settings.min_spread:
            signs["spread"] = (
                f"CLS features hardly differ (spread {figures['monitor/cls_spread']:.4f}, below "
                f"monitor.min_spread {settings.min_spread})"
            )
        flat = dino_loss is not None and abs(dino_loss - self.flat_loss) < 0.005 * self.flat_loss
        if flat:
            signs["flat"] = (
                f"the DINO loss {dino_loss:.3f} is still that of even assignments, log K = "
                f"{self.flat_loss:.3f}"
            )
        for name, text in signs.items():
            if name not in self._warned:
                logger.warning("iteration %d: %s: the features may have collapsed", iteration, text)
                self._warned.add(name)
        self._warned &= signs.keys()
        return list(signs)
