"""What frozen features are worth for segmentation: a small decoder on them, quickly trained.

`probe_features` trains and scores one decoder; `channel_scores` does so for every channel of
labelled fields and reports the mean and the standard deviation over channels: a backbone that is
consistent across channels should serve each of them.  The backbone never learns here, so its
features are computed once.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dinocell.errors import DataSetError, DINOCellError
from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.evaluation.tuning import ThresholdGrids, tune_thresholds, tuned_values
from dinocell.io import find_images
from dinocell.network.backbone import feature_blocks
from dinocell.network.decoder import DECODERS, create_decoder
from dinocell.pairs import Pair, find_pairs
from dinocell.progress import progress
from dinocell.segmentation.distance_map import labels_to_distance_map
from dinocell.segmentation.preprocess import normalize_intensity, to_model_input
from dinocell.segmentation.watershed import separate_cells
from dinocell.training.datasets import read_pair

__all__ = [
    "ChannelScores",
    "LabelledWindow",
    "ProbeConfig",
    "ProbeResult",
    "ProbeTimeError",
    "channel_scores",
    "cut_windows",
    "find_channel_pairs",
    "probe_features",
    "read_windows",
]

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
    """How the small decoder is trained.

    Attributes
    ----------
    window_px : edge of the square windows, a multiple of the patch size.
    windows_per_image : at most so many windows of an image, those with the most cell pixels.
    decoder : `unet`, `unet_wide` or `linear`.
    steps, batch_size, lr : AdamW with linear warm-up and cosine to 0.
    max_seconds : bound of the whole probe; a training that takes more than 0.7 of it is cut short.
    seed : start values of the decoder and order of the windows.
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
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}: raise it"
                )
        for name in ("lr", "max_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}: raise it")
        if self.decoder not in DECODERS:
            raise ValueError(
                f"`decoder` must be one of {', '.join(DECODERS)}, got {self.decoder!r}: choose one"
            )


@dataclass(frozen=True)
class LabelledWindow:
    """A square window of a normalised image with its truth.

    Attributes
    ----------
    name : str
    image : (window, window) float32 ndarray in [0, 1]
    labels : (h, w) integer ndarray
        Smaller than the window where the image is: the rest of the window is reflection.
    target : (window, window) float32 ndarray
        Distance map made from the whole image, so that cut cells keep their true distances.
    """

    name: str
    image: NDArray[np.float32]
    labels: NDArray[Any]
    target: NDArray[np.float32]


@dataclass(frozen=True)
class ProbeResult:
    """Scores of the decoder on windows it did not see.

    Attributes
    ----------
    scores : dict
        ``op_csb seg det ap50 ap75 f1_50``, pooled, and ``mse`` of the distance map.
    thresholds : dict
        Chosen on training windows.
    steps : int
        Steps done; fewer than configured when the time was over.
    train_loss : float
        Mean of the last tenth of the steps.
    seconds : float
    num_train, num_val : int
        Windows.
    """

    scores: dict[str, float]
    thresholds: dict[str, float]
    steps: int
    train_loss: float
    seconds: float
    num_train: int
    num_val: int


@dataclass(frozen=True)
class ChannelScores:
    """A probe per channel.

    Attributes
    ----------
    results : dict of ProbeResult by channel
    split : str
        How training and held-out windows were divided, as a sentence.
    """

    results: dict[str, ProbeResult]
    split: str

    @property
    def mean(self) -> dict[str, float]:
        """Mean over channels of every score."""
        return {name: float(np.mean(values)) for name, values in self._columns().items()}

    @property
    def std(self) -> dict[str, float]:
        """Standard deviation over channels (of a sample, n − 1); nan for one channel."""
        return {
            name: float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            for name, values in self._columns().items()
        }

    def to_mapping(self) -> dict[str, Any]:
        """Everything for JSON, nan as null."""

        def plain(scores: dict[str, float]) -> dict[str, float | None]:
            return {key: value if math.isfinite(value) else None for key, value in scores.items()}

        return {
            "split": self.split,
            "channels": {
                channel: {
                    "scores": plain(result.scores),
                    "thresholds": result.thresholds,
                    "steps": result.steps,
                    "train_loss": result.train_loss,
                    "num_train_windows": result.num_train,
                    "num_val_windows": result.num_val,
                }
                for channel, result in self.results.items()
            },
            "mean": plain(self.mean),
            "std": plain(self.std),
        }

    def _columns(self) -> dict[str, list[float]]:
        names = next(iter(self.results.values())).scores
        return {name: [result.scores[name] for result in self.results.values()] for name in names}


def cut_windows(
    name: str,
    image: NDArray[Any],
    labels: NDArray[Any],
    *,
    window_px: int,
    count: int = 1,
    columns: tuple[int, int] | None = None,
) -> list[LabelledWindow]:
    """At most `count` windows of a centred grid, those with the most cell pixels first.

    Parameters
    ----------
    name : str
    image : (H, W) ndarray
        Raw; normalised as a whole before it is cut.
    labels : (H, W) integer ndarray
    window_px, count : int
    columns : (first, last + 1), optional
        Cut from these columns only.

    Returns
    -------
    list of LabelledWindow
        An image smaller than the window is padded by reflection.
    """
    normalized = normalize_intensity(image)
    target = labels_to_distance_map(labels, target="sqrt")
    if columns is not None:
        part = slice(*columns)
        normalized, target, labels = normalized[:, part], target[:, part], labels[:, part]
    height, width = labels.shape
    padding = ((0, max(0, window_px - height)), (0, max(0, window_px - width)))
    if any(after for _, after in padding):
        normalized = np.pad(normalized, padding, mode="symmetric")
        target = np.pad(target, padding, mode="symmetric")
    rows, columns_of_grid = normalized.shape[0] // window_px, normalized.shape[1] // window_px
    top = (normalized.shape[0] - rows * window_px) // 2
    left = (normalized.shape[1] - columns_of_grid * window_px) // 2
    found = []
    for row in range(rows):
        for column in range(columns_of_grid):
            y, x = top + row * window_px, left + column * window_px
            window = (slice(y, y + window_px), slice(x, x + window_px))
            found.append(
                LabelledWindow(
                    name=f"{name}@{y},{x}",
                    image=np.ascontiguousarray(normalized[window]),
                    labels=np.ascontiguousarray(labels[window]),
                    target=np.ascontiguousarray(target[window]),
                )
            )
    order = sorted(
        range(len(found)), key=lambda index: (-np.count_nonzero(found[index].labels), index)
    )
    return [found[index] for index in order[:count]]


def read_windows(
    pairs: Sequence[Pair], *, window_px: int, windows_per_image: int, max_images: int | None = None
) -> list[LabelledWindow]:
    """Windows of at most `max_images` image files, spread evenly over the sorted names.

    Raises
    ------
    DataSetError, ImageFileError
        A file does not fit; or no window holds a cell.
    """
    chosen = list(pairs)
    if max_images is not None and len(chosen) > max_images:
        places = np.linspace(0, len(chosen) - 1, max_images).round().astype(int)
        chosen = [chosen[place] for place in places]
    windows = []
    for pair in chosen:
        image, labels = read_pair(pair)
        windows += cut_windows(
            pair.image_path.stem, image, labels, window_px=window_px, count=windows_per_image
        )
    _require_cells(windows, str(pairs[0].labels_path.parent) if pairs else "no folder")
    return windows


def probe_features(
    vit: nn.Module,
    train: Sequence[LabelledWindow],
    val: Sequence[LabelledWindow],
    config: ProbeConfig,
    *,
    advance: Callable[[float], None] | None = None,
) -> ProbeResult:
    """Train a decoder on frozen features of `train`, score it on `val`.

    Parameters
    ----------
    vit : DinoVisionTransformer
        In eval mode; read only.
    train, val : sequences of LabelledWindow
        All of `config.window_px`.
    config : ProbeConfig
    advance : callable, optional
        Called with the loss after every step.

    Returns
    -------
    ProbeResult
        The same for the same weights, windows and config, as long as the time suffices.  The
        generators of the caller are as before.

    Raises
    ------
    ProbeTimeError
        `max_seconds` were over before training could start or before all windows were scored.
    ValueError
        The window does not fit the patch size.
    """
    started = time.monotonic()
    patch: int = vit.patch_size  # type: ignore[assignment]
    if config.window_px % patch:
        raise ValueError(
            f"`window_px` must be a multiple of the patch size {patch}, got {config.window_px}: "
            f"{max(1, round(config.window_px / patch)) * patch} is next"
        )
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
        picked = np.linspace(0, len(train) - 1, min(len(train), _TUNING_WINDOWS)).round()
        chosen = [int(place) for place in picked]
        tuned = tune_thresholds(
            [
                (_valid(found, train[place]), train[place].labels)
                for place, found in zip(
                    chosen, probe.predict(train, train_features, chosen), strict=True
                )
            ],
            _GRIDS,
            metric="ap50",
        )
        maps = probe.predict(val, val_features, range(len(val)))
    squared = [
        float(np.mean((_valid(found, window) - _valid(window.target, window)) ** 2))
        for found, window in zip(maps, val, strict=True)
    ]
    report = evaluate_pairs(
        (
            (
                window.name,
                window.labels,
                separate_cells(_valid(found, window), tuned.thresholds),
            )
            for found, window in zip(maps, val, strict=True)
        ),
        iou_thresholds=(0.5, 0.75),
    )
    scores = {name: report.pooled[f"{name}_pooled"] for name in _SCORES}
    return ProbeResult(
        scores=scores | {"mse": float(np.mean(squared))},
        thresholds=tuned_values(tuned.thresholds),
        steps=steps,
        train_loss=train_loss,
        seconds=time.monotonic() - started,
        num_train=len(train),
        num_val=len(val),
    )


def find_channel_pairs(
    data: str | os.PathLike[str], *, labels_name: str = "labels"
) -> dict[str, list[Pair]]:
    """Labelled images by channel.

    Parameters
    ----------
    data : folder, one of two layouts
        ``CHANNEL/images`` and ``CHANNEL/labels``, paired by name; or a folder per field
        (``FIELD/CHANNEL.tif``) with a label image ``FIELD/<labels_name>.png`` for all its channels.
    labels_name : str
        Name without suffix of that label image.

    Raises
    ------
    DataSetError
        Neither layout, or no channel.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise DataSetError(f"labelled channels must be a folder, got {folder}: check the path")
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    found: dict[str, list[Pair]] = {}
    if any((part / "images").is_dir() for part in parts):
        for part in parts:
            found[part.name] = find_pairs(part / "images", part / "labels", part.name)
    else:
        for part in parts:
            files = {path.stem: path for path in find_images([part], include_outputs=True)}
            labels = files.pop(labels_name, None)
            if labels is None:
                raise DataSetError(
                    f"a labelled field must hold the label image {labels_name}, got "
                    f"{', '.join(files) or 'nothing'} in {part}: name it with "
                    "--per-channel-labels"
                )
            for stem, path in files.items():
                if not _holds_labels(path):
                    found.setdefault(stem, []).append(Pair(part.name, path, labels))
    if not found or not all(found.values()):
        raise DataSetError(
            f"labelled channels must be CHANNEL/images with CHANNEL/labels, or FIELD/CHANNEL.tif with "
            f"FIELD/{labels_name}.png, got neither in {folder}: arrange the files so"
        )
    return found


def channel_scores(
    vit: nn.Module,
    data: str | os.PathLike[str],
    config: ProbeConfig,
    *,
    labels_name: str = "labels",
    channels: Sequence[str] | None = None,
    val_fraction: float = 1 / 3,
    shown: bool = False,
) -> ChannelScores:
    """Train and score a decoder per channel on the same places.

    Parameters
    ----------
    vit : DinoVisionTransformer
        In eval mode.
    data, labels_name
        As `find_channel_pairs`.
    config : ProbeConfig
        `max_seconds` holds for each channel.
    channels : sequence of str, optional
        Of these only, in any case of letters.
    val_fraction : float
        Share of the images held out, at least one, the same fields for every channel.  Of a single
        image the left half trains and the right half is held out.

    Raises
    ------
    DataSetError, ImageFileError, ProbeTimeError, ValueError
        As `find_channel_pairs`, `read_windows` and `probe_features`.
    """
    by_channel = find_channel_pairs(data, labels_name=labels_name)
    if channels is not None:
        wanted = {name.lower() for name in channels}
        kept = {name: pairs for name, pairs in by_channel.items() if name.lower() in wanted}
        if not kept:
            raise DataSetError(
                f"labelled channels must include one of {', '.join(channels)}, got "
                f"{', '.join(by_channel)} in {data}: correct --channels"
            )
        by_channel = kept
    # Fields are known by the folder that holds them, or by file name where channels have folders.
    by_place = {
        channel: {_place(pair): pair for pair in pairs} for channel, pairs in by_channel.items()
    }
    places = sorted(set().union(*by_place.values()))
    halves = len(places) == 1
    held_out: set[str] = set()
    if not halves:
        order = np.random.default_rng([config.seed, 3]).permutation(len(places))
        count = max(1, min(len(places) - 1, round(val_fraction * len(places))))
        held_out = {places[index] for index in order[:count]}
    results = {}
    with progress("per channel", len(by_place) * config.steps, shown=shown) as bar:
        for channel, pairs in by_place.items():
            train: list[LabelledWindow] = []
            val: list[LabelledWindow] = []
            for place, pair in sorted(pairs.items()):
                image, labels = read_pair(pair)
                middle = image.shape[1] // 2
                parts: list[tuple[list[LabelledWindow], tuple[int, int] | None]]
                if halves:
                    parts = [(train, (0, middle)), (val, (middle, image.shape[1]))]
                else:
                    parts = [(val if place in held_out else train, None)]
                for into, columns in parts:
                    into += cut_windows(
                        place,
                        image,
                        labels,
                        window_px=config.window_px,
                        count=config.windows_per_image,
                        columns=columns,
                    )
            _require_cells(train, f"the training part of channel {channel}")
            _require_cells(val, f"the held-out part of channel {channel}")

            def note(loss: float, channel: str = channel) -> None:
                bar.advance(note=f"{channel} loss {loss:.4f}")

            results[channel] = probe_features(vit, train, val, config, advance=note)
    split = (
        "one field: its left half trains, its right half is held out"
        if halves
        else f"{len(held_out)} of {len(places)} fields are held out"
    )
    return ChannelScores(results=results, split=split)


# ------------------------------------------------------------------------------------- internals


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
            with torch.no_grad():
                maps = self.vit.get_intermediate_layers(  # type: ignore[operator]
                    _batch(part, self.device), n=self.blocks, reshape=True, norm=True
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
                group["lr"] = config.lr * _rate(step, config.steps)
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

    def _require_time(self, what: str) -> None:
        if time.monotonic() > self.deadline:
            raise ProbeTimeError(
                f"the evaluation must finish in max_seconds, got {self.config.max_seconds:g} s over "
                f"while {what}: raise max_seconds, or take fewer or smaller windows"
            )


def _batch(windows: Sequence[LabelledWindow], device: torch.device) -> Tensor:
    arrays = np.stack([to_model_input(window.image) for window in windows])
    return torch.from_numpy(arrays).to(device)  # [B, 3, window, window]


def _valid(array: NDArray[np.float32], window: LabelledWindow) -> NDArray[np.float32]:
    """The part of a window that lies in its image."""
    height, width = window.labels.shape
    return array[:height, :width]


def _turned(x: Tensor, turns: int, flip: bool) -> Tensor:
    x = torch.rot90(x, turns, dims=(-2, -1))
    return torch.flip(x, dims=(-1,)) if flip else x


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, cosine to 0."""
    warmup = max(1, round(_WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _require_cells(windows: Sequence[LabelledWindow], where: str) -> None:
    if not any(window.labels.any() for window in windows):
        raise DataSetError(
            f"labelled windows must hold cells, got {len(windows)} without any from {where}: name "
            "other labels"
        )


def _holds_labels(path: Path) -> bool:
    from dinocell.io import read_image
    from dinocell.labels import looks_like_labels

    return looks_like_labels(read_image(path).pixels)


def _place(pair: Pair) -> str:
    return pair.dataset if pair.image_path.parent.name != "images" else pair.image_path.stem
