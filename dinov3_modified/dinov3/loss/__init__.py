"""Losses of self-supervised training (matches `dinov3.loss`)."""

from dinov3.loss.dino_clstoken_loss import DINOLoss
from dinov3.loss.gram_loss import GramLoss
from dinov3.loss.ibot_patch_loss import iBOTPatchLoss
from dinov3.loss.koleo_loss import KoLeoLoss, KoLeoLossDistributed

__all__ = ["DINOLoss", "GramLoss", "KoLeoLoss", "KoLeoLossDistributed", "iBOTPatchLoss"]
