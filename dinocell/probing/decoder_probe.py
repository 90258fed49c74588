"""How well frozen features segment cells: train a small decoder on them and score it.

The backbone does not learn here, so its features are computed once and the decoder trains in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dinocell.errors import DINOCellError
from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.evaluation.tuning import ThresholdGrids, tune_thresholds, tuned_values
from dinocell.network.backbone import feature_blocks
from dinocell.network.decoder import DECODERS, create_decoder
from dinocell.probing.feature_extraction import check_window, to_batch
from dinocell.probing.labelled_windows import LabelledWindow, inside_image
from dinocell.segmentation.thresholds import Thresholds
from dinocell.segmentation.watershed import separate_cells
from dinocell.training.config import OptimizerConfig
from dinocell.training.datasets import spread_evenly
from dinocell.training.optimizer import learning_rate_factor

# Few values: the decoder is small and early, and the search must not take longer than its training.
_GRIDS = ThresholdGrids(
    peak_grid=(0.3, 0.45, 0.6), fill_grid=(0.1, 0.2, 0.3), prominence_grid=(0.1,)
)
_TUNING_WINDOWS = 16
_SCORES = ("op_csb", "seg", "det", "ap50", "ap75", "f1_50")
_SHARE_FOR_TRAINING = 0.7
_WARMUP_SHARE = 0.1


class ProbeTimeError(DINOCellError):
    """The time limit was over before the features were computed and scored."""


@dataclass(frozen=True)
class ProbeConfig:
    """How the small decoder is trained: AdamW with linear warm-up and cosine to 0.

    `window_px` is a multiple of the patch size.  Of an image at most `windows_per_image` windows are
    used, those with the most cell pixels.  `max_seconds` bounds the whole probe; a training that takes
    more than 0.7 of it is cut short.  `seed` is that of the decoder's weights and the order of windows.
    """

    window_px: int = 192
    windows_per_image: int = 1
    decoder: str = "unet"
    steps: int = 200
    batch_size: int = 4
    lr: float = 3e-3
    max_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window_px", "windows_per_image", "steps", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}: give a larger number")
        for name in ("lr", "max_seconds"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}: give a larger number")
        if self.decoder not in DECODERS:
            raise ValueError(
                f"`decoder` must be one of {', '.join(DECODERS)}, got {self.decoder!r}: choose one of these"
            )


@dataclass(frozen=True)
class ProbeResult:
    """Scores of the decoder on windows it did not see."""

    # ``op_csb seg det ap50 ap75 f1_50``, pooled, and ``mse`` of the distance map
    scores: dict[str, float]
    thresholds: dict[str, float]  # chosen on training windows
    steps: int  # done; fewer than configured when the time was over
    train_loss: float  # mean of the last tenth of the steps
    seconds: float
    num_train: int  # windows
    num_val: int
    # scores of the same decoder on other windows, by their name
    elsewhere: dict[str, dict[str, float]] = field(default_factory=dict)


def probe_features(
    vit: nn.Module,
    train: Sequence[LabelledWindow],
    val: Sequence[LabelledWindow],
    config: ProbeConfig,
    *,
    elsewhere: Mapping[str, Sequence[LabelledWindow]] | None = None,
    advance: Callable[[float], None] | None = None,
) -> ProbeResult:
    """Train a decoder on frozen features of `train`, score it on `val`.

    The result is the same for the same weights, windows and config, as long as the time suffices.  The
    random generators of the caller are left as they were.

    Parameters
    ----------
    vit : DinoVisionTransformer in eval mode; read only
    train, val : windows, all of `config.window_px`
    elsewhere : more windows to score the decoder on, for example of other channels, by name
    advance : called with the loss after every step

    Raises ProbeTimeError (`max_seconds` were over before training could start or before all windows
    were scored); ValueError (the window does not fit the patch size).
    """
    started = time.monotonic()
    check_window(config.window_px, vit)
    device = next(vit.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        probe = _Probe(vit, config, device, started)
        train_features = probe.features(train)
        val_features = probe.features(val)
        steps, train_loss = probe.fit(train, train_features, advance)
        thresholds = probe.tune(train, train_features)

        def scores(windows: Sequence[LabelledWindow], found: Sequence[Tensor]) -> dict[str, float]:
            maps = probe.predict(windows, found, range(len(windows)))
            return _scores_of(maps, windows, thresholds)

        own = scores(val, val_features)
        others = {
            name: scores(windows, probe.features(windows))
            for name, windows in (elsewhere or {}).items()
        }
    return ProbeResult(
        scores=own,
        thresholds=tuned_values(thresholds),
        steps=steps,
        train_loss=train_loss,
        seconds=time.monotonic() - started,
        num_train=len(train),
        num_val=len(val),
        elsewhere=others,
    )


def _scores_of(
    maps: Sequence[NDArray[np.float32]], windows: Sequence[LabelledWindow], thresholds: Thresholds
) -> dict[str, float]:
    """Pooled scores of the labels that distance maps give, and the mean squared error of the maps."""
    pairs, squared = [], []
    for found, window in zip(maps, windows, strict=True):
        inside = inside_image(found, window)
        squared.append(float(np.mean((inside - inside_image(window.target, window)) ** 2)))
        pairs.append((window.name, window.labels, separate_cells(inside, thresholds)))
    report = evaluate_pairs(pairs, iou_thresholds=(0.5, 0.75))
    scores = {name: report.pooled[f"{name}_pooled"] for name in _SCORES}
    return scores | {"mse": float(np.mean(squared))}


class _Probe:
    """Cached features, the decoder and its training."""

    def __init__(
        self, vit: nn.Module, config: ProbeConfig, device: torch.device, started: float
    ) -> None:
        self.vit = vit
        self.config = config
        self.device = device
        self.deadline = started + config.max_seconds
        self.training_ends = started + _SHARE_FOR_TRAINING * config.max_seconds
        depth = len(vit.blocks)  # type: ignore[arg-type]
        # Networks of fewer than four blocks exist in tests only: all their blocks are read.
        self.blocks = list(feature_blocks(depth)) if depth >= 4 else list(range(depth))
        torch.manual_seed(config.seed)
        self.decoder = create_decoder(
            config.decoder,
            int(vit.embed_dim),  # type: ignore[arg-type]
            int(vit.patch_size),  # type: ignore[arg-type]
            num_features=len(self.blocks),
        ).to(device)

    def features(self, windows: Sequence[LabelledWindow]) -> list[Tensor]:
        """[L, D, h, w] float16 per window, on the CPU."""
        found: list[Tensor] = []
        for start in range(0, len(windows), self.config.batch_size):
            self._require_time("computing features")
            part = windows[start : start + self.config.batch_size]
            batch = to_batch([window.image for window in part], self.device)
            with torch.no_grad():
                maps = self.vit.get_intermediate_layers(  # type: ignore[operator]
                    batch, n=self.blocks, reshape=True, norm=True
                )
                stacked = torch.stack(list(maps), dim=1)  # [B, L, D, h, w]
            found += list(stacked.to("cpu", torch.float16))
        return found

    def fit(
        self,
        windows: Sequence[LabelledWindow],
        features: Sequence[Tensor],
        advance: Callable[[float], None] | None,
    ) -> tuple[int, float]:
        """Steps done and the mean loss of the last tenth of them."""
        config = self.config
        self._require_time("training")
        optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=config.lr, weight_decay=1e-2)
        warmup = max(1, round(_WARMUP_SHARE * config.steps))
        schedule = OptimizerConfig(warmup_steps=warmup, min_lr_ratio=0.0)
        rng = np.random.default_rng([config.seed, 4])
        order: list[int] = []
        losses: list[float] = []
        self.decoder.train()
        for step in range(config.steps):
            # One step at least, so that a decoder of random weights is never scored.
            if step and time.monotonic() > self.training_ends:
                break
            while len(order) < config.batch_size:
                order += rng.permutation(len(windows)).tolist()
            chosen, order = order[: config.batch_size], order[config.batch_size :]
            # The same turn for the features and the target: positions are in them already, so
            # only the decoder sees turned ones.
            turns, flip = int(rng.integers(4)), bool(rng.integers(2))
            inputs = torch.stack([features[index] for index in chosen]).to(self.device).float()
            target = torch.stack([torch.from_numpy(windows[i].target) for i in chosen])[:, None]
            inputs, target = (_turned(x, turns, flip) for x in (inputs, target.to(self.device)))
            image = torch.empty(target.shape, device=self.device)  # decoders read its size only
            for group in optimizer.param_groups:
                # One step more than there are: the last one still learns.
                group["lr"] = config.lr * learning_rate_factor(step, schedule, config.steps + 1)
            logits = self.decoder(list(inputs.unbind(dim=1)), image)
            loss = functional.mse_loss(logits.float().sigmoid(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if advance is not None:
                advance(losses[-1])
        return len(losses), float(np.mean(losses[-max(1, len(losses) // 10) :]))

    def predict(
        self, windows: Sequence[LabelledWindow], features: Sequence[Tensor], chosen: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """(window, window) distance maps of the chosen windows."""
        self.decoder.eval()
        found: list[NDArray[np.float32]] = []
        for start in range(0, len(chosen), self.config.batch_size):
            self._require_time("scoring")
            part = chosen[start : start + self.config.batch_size]
            inputs = torch.stack([features[index] for index in part]).to(self.device).float()
            edge = windows[part[0]].image.shape
            with torch.no_grad():
                image = torch.empty((len(part), 3, *edge), device=self.device)
                logits = self.decoder(list(inputs.unbind(dim=1)), image)
            found += list(logits[:, 0].float().sigmoid().cpu().numpy())
        return found

    def tune(self, windows: Sequence[LabelledWindow], features: Sequence[Tensor]) -> Thresholds:
        """The thresholds of the post-processing that suit some training windows best."""
        chosen = spread_evenly(range(len(windows)), _TUNING_WINDOWS)
        maps = self.predict(windows, features, chosen)
        samples = [
            (inside_image(found, windows[place]), windows[place].labels)
            for place, found in zip(chosen, maps, strict=True)
        ]
        return tune_thresholds(samples, _GRIDS, metric="ap50").thresholds

    def _require_time(self, what: str) -> None:
        if time.monotonic() > self.deadline:
            raise ProbeTimeError(
                f"The evaluation must finish in max_seconds, got {self.config.max_seconds:g} s over "
                f"while {what}: raise max_seconds, or take fewer or smaller windows"
            )


def _turned(x: Tensor, turns: int, flip: bool) -> Tensor:
    x = torch.rot90(x, turns, dims=(-2, -1))
    return torch.flip(x, dims=(-1,)) if flip else x
