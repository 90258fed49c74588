"""Brightness, contrast, gamma, noise and blur of fluorescence images, on CPU or GPU (ours).

What is random is drawn first (`draw`), then applied (`apply`), so that the second half is tested
without chance.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_KERNEL = 11  # edge of the largest blur, in pixels


@dataclass(kw_only=True, eq=False)
class FluorescencePhotometrics:
    """Brightness, contrast, gamma, noise, blur and defocus of gray images in [0, 1], in batches.

    The widths a of the first three draw a factor exp(U(-a, a)).
    """

    brightness: float = 0.3
    contrast: float = 0.3  # about the image's mean
    gamma: float = 0.3
    noise: float = 0.05  # most of Gaussian noise, and of shot noise at full brightness (std)
    blur_sigma: float = 1.5  # largest standard deviation of a Gaussian blur, in pixels, at most 3
    defocus_radius: float = 3.0  # largest radius of a disc, in pixels, at most 5
    p: float = 0.5  # probability of each

    def __post_init__(self) -> None:
        if self.blur_sigma > 3 or self.defocus_radius > 5:
            raise ValueError(
                "`blur_sigma` must be at most 3 and defocus_radius at most 5 pixels, got "
                f"{self.blur_sigma} and {self.defocus_radius}: choose smaller values"
            )

    def draw(
        self, count: int, generator: torch.Generator | None = None, device: Any = "cpu"
    ) -> dict[str, Tensor]:
        """Parameters of `count` images, each a tensor [count]; what does not act is 1, or 0."""

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator, device=device)

        def acts() -> Tensor:
            return uniform() < self.p

        def factor(width: float) -> Tensor:
            return torch.where(
                acts(), ((2 * uniform() - 1) * width).exp(), torch.ones_like(uniform())
            )

        def amount(most: float) -> Tensor:
            return torch.where(acts(), uniform() * most, torch.zeros_like(uniform()))

        parameters = {
            "brightness": factor(self.brightness),
            "contrast": factor(self.contrast),
            "gamma": factor(self.gamma),
            "gauss": amount(self.noise),
            "shot": amount(self.noise),
            "sigma": amount(self.blur_sigma),
            "radius": amount(self.defocus_radius),
            "noise_seed": (uniform() * 2**31).long(),
        }
        # Blurred and out of focus at once is one too many.
        parameters["radius"] = torch.where(
            parameters["sigma"] > 0, torch.zeros_like(uniform()), parameters["radius"]
        )
        return parameters

    def apply(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Images [B, C, H, W] in [0, 1] with their parameters → the same shape and range."""

        def column(name: str) -> Tensor:
            return parameters[name].to(x)[:, None, None, None]

        x = self._blurred(x, parameters)
        x = x.clamp(0, 1) ** column("gamma")
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - mean) * column("contrast") + mean
        x = x * column("brightness")
        spread = (column("gauss") ** 2 + column("shot") ** 2 * x.clamp(min=0)).sqrt()
        if x.device.type != "cpu":
            x = x + spread * torch.randn_like(x)
        elif bool((spread > 0).any()):
            generator = torch.Generator().manual_seed(int(parameters["noise_seed"][0]))
            x = x + spread * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x.clamp(0, 1)

    def _blurred(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Each image by a kernel of its own: a Gaussian, a disc, or nothing."""
        sigma, radius = parameters["sigma"].to(x), parameters["radius"].to(x)
        if x.device.type == "cpu":  # there, images that stay sharp are left out
            chosen = ((sigma > 0) | (radius > 0)).nonzero().flatten()
            if len(chosen) == 0:
                return x
            result = x.clone()
            result[chosen] = _convolved(x[chosen], _kernels(sigma[chosen], radius[chosen]))
            return result
        return _convolved(x, _kernels(sigma, radius))


def _kernels(sigma: Tensor, radius: Tensor) -> Tensor:
    """[B, k, k], each summing to 1."""
    offsets = torch.arange(_KERNEL, device=sigma.device, dtype=sigma.dtype) - _KERNEL // 2
    squared = offsets[:, None] ** 2 + offsets[None] ** 2  # [k, k]
    gauss = torch.exp(-squared / (2 * sigma.clamp_min(1e-3)[:, None, None] ** 2))
    # The rim of the disc is one pixel wide, so that the kernel changes smoothly with the radius.
    disc = (radius[:, None, None] + 0.5 - squared.sqrt()).clamp(0, 1)
    kernel = torch.where((radius > 0)[:, None, None], disc, gauss)
    return kernel / kernel.sum(dim=(1, 2), keepdim=True)


def _convolved(x: Tensor, kernels: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    pad = _KERNEL // 2
    padded = functional.pad(x, (pad, pad, pad, pad), mode="reflect")
    weight = kernels[:, None].repeat_interleave(channels, dim=0)
    out = functional.conv2d(
        padded.reshape(1, batch * channels, *padded.shape[2:]), weight, groups=batch * channels
    )
    return out.reshape(batch, channels, height, width)


def photometrics_from_config(cfg: Any) -> FluorescencePhotometrics:
    """As the section `multiview` of a configuration says."""
    names = ("brightness", "contrast", "gamma", "noise", "blur_sigma", "defocus_radius")
    widths = {name: cfg.multiview[name] for name in names}
    return FluorescencePhotometrics(**widths, p=cfg.multiview.photometrics_p)


def photometrics_on_batch(
    data: dict[str, Any], cfg: Any, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Augment a batch of gray crops on its device, then expand and normalise them.

    `data`: with `collated_*_crops` [n, 1, s, s] in [0, 1]; `generator`: of the crops' device.
    Returns a copy whose crops are [n, 3, s, s], normalised with crops.rgb_mean and rgb_std.
    """
    photometrics = photometrics_from_config(cfg)
    out = dict(data)
    for name in sorted(data):
        if not (name.startswith("collated_") and name.endswith("_crops")):
            continue
        x = data[name].float()
        if name != "collated_gram_teacher_crops":
            parameters = photometrics.draw(len(x), generator, x.device)
            if x.device.type == "cpu":
                parts = [
                    photometrics.apply(
                        x[i : i + 1], {k: v[i : i + 1] for k, v in parameters.items()}
                    )
                    for i in range(len(x))
                ]
                x = torch.cat(parts)
            else:
                x = photometrics.apply(x, parameters)
        mean = x.new_tensor(list(cfg.crops.rgb_mean))[:, None, None]
        std = x.new_tensor(list(cfg.crops.rgb_std))[:, None, None]
        out[name] = (x - mean) / std
    return out
