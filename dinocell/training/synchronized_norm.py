"""Batch normalisation with the statistics of all processes' crops.

Each process of a run sees a few crops only; normalised by these alone, every process would train
another network than one process with the whole batch does.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes, on any device that can all-reduce.

    torch's `nn.SyncBatchNorm` asks for a GPU.  Same parameters, buffers and state-dict keys; in
    eval mode, and without a process group, it is `nn.BatchNorm2d`.  Statistics are computed in
    float32 whatever the input (Ioffe & Szegedy 2015; the variance in two passes).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape and dtype; B, H and W may differ between processes."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update_running_statistics(mean, variance, count)
        return y

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # the plain mean over all batches, as nn.BatchNorm2d
            momentum = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (count / (count - 1))
        self.running_mean.mul_(1 - momentum).add_(momentum * mean)
        self.running_var.mul_(1 - momentum).add_(momentum * unbiased)


class _Normalize(torch.autograd.Function):
    """Normalise by mean and biased variance over all processes, with their gradients."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float()  # [B, C, H, W]
        here = wide.new_tensor([x.numel() // x.shape[1]])
        sums = torch.cat([wide.sum((0, 2, 3)), here])  # [C + 1]
        dist.all_reduce(sums)
        count = sums[-1]
        if count <= 1:
            raise ValueError(
                "Batch normalisation must see more than one value per channel, got one in all "
                "processes: raise schedule.batch_size or schedule.crop_px"
            )
        mean = sums[:-1] / count  # [C]
        centred = wide - mean[:, None, None]
        squares = centred.square().sum((0, 2, 3))
        dist.all_reduce(squares)
        variance = squares / count  # [C]
        scale = torch.rsqrt(variance + eps)  # [C]
        context.save_for_backward(x, weight, mean, scale, count)
        context.has_bias = bias is not None
        context.mark_non_differentiable(mean, variance, count)
        factor = scale if weight is None else scale * weight.float()
        y = centred * factor[:, None, None]
        if bias is not None:
            y += bias.float()[:, None, None]
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(
        context: Any, gradient: Tensor, *_unused: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale, count = context.saved_tensors
        channel = (slice(None), None, None)
        wide = gradient.float()  # [B, C, H, W]
        normalized = (x.float() - mean[channel]) * scale[channel]
        of_bias = wide.sum((0, 2, 3))  # [C]
        of_weight = (wide * normalized).sum((0, 2, 3))  # [C]
        # Mean and variance depend on all crops, so the input's gradient needs the sums of all;
        # those of weight and bias stay this process's share, as of every other parameter.
        sums = torch.stack([of_bias, of_weight])
        dist.all_reduce(sums)
        sums /= count
        factor = scale if weight is None else scale * weight.float()
        of_x = (wide - sums[0][channel] - normalized * sums[1][channel]) * factor[channel]
        return (
            of_x.to(x.dtype),
            None if weight is None else of_weight.to(weight.dtype),
            of_bias if context.has_bias else None,
            None,
        )


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """The same module (shared parameters and buffers) with its batch norms over all processes.

    torch's `nn.SyncBatchNorm` on a GPU, `SynchronizedBatchNorm2d` elsewhere.  Children are replaced
    in place; where `module` is a batch norm itself, only the returned one is new.  Copy a model that
    is to be saved or deployed before: the state-dict keys are the same either way.
    """
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if type(module) is nn.BatchNorm2d:
        made = SynchronizedBatchNorm2d(module.num_features)
        vars(made).update(vars(module))  # its settings, mode, parameters and buffers
        return made
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child))
    return module
