"""The batches of a training run in an order that the configuration sets, and what they hold (ours)."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dinov3.data import (
    CombinedDataLoader,
    MaskingGenerator,
    SamplerType,
    collate_data_and_cast,
    make_data_loader,
    make_dataset,
)
from dinov3.data.samplers import sample_order


def data_loader(cfg: DictConfig, model: Any, batches_done: int, seed_offset: int) -> Any:
    """Batches of one resolution after the first `batches_done`.

    `model`: the `SSLMetaArch`, which makes the augmentation; `seed_offset`: added to `train.seed`:
    loaders of several resolutions have orders of their own.  Raises ValueError (crops that are no
    whole number of patches, or a data set without samples).
    """
    size = cfg.crops.global_crops_size
    patch = cfg.student.patch_size
    # The masks' grid is the student's; see `teacher_to_student_resolution_scale` upstream.
    mask_px = int(size * cfg.crops.teacher_to_student_resolution_scale)
    if mask_px % patch or cfg.crops.local_crops_size % patch:
        raise ValueError(
            f"Crop sizes must be multiples of the patch size {patch}, got {mask_px} and "
            f"{cfg.crops.local_crops_size}: change crops.global_crops_size or crops.local_crops_size"
        )
    grid = mask_px // patch
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=tuple(cfg.ibot.mask_ratio_min_max),
        mask_probability=cfg.ibot.mask_sample_probability,
        # Crops that the device augments keep full precision.
        dtype=torch.float32 if photometrics_on_device(cfg) else model.param_dtype,
        n_tokens=grid**2,
        mask_generator=MaskingGenerator(
            input_size=(grid, grid), max_num_patches=int(0.5 * mask_px // patch * mask_px // patch)
        ),
        random_circular_shift=cfg.ibot.mask_random_circular_shift,
    )
    dataset = make_dataset(
        dataset_str=cfg.train.dataset_path,
        transform=model.build_data_augmentation_dino(cfg),
        target_transform=_no_target,
    )
    if len(dataset) == 0:
        raise ValueError(
            f"`train.dataset_path` must hold samples, got none in {cfg.train.dataset_path!r}: check its folder or index"
        )
    if getattr(dataset, "gives_fields", False) != bool(cfg.multiview.strategy):
        what, advice = "set for a data set of fields", "for example multiview.strategy=multiview"
        if cfg.multiview.strategy:
            what, advice = "'' for a data set of pictures", "JUMPCellPaintingMultiView reads fields"
        raise ValueError(
            f"`multiview.strategy` must be {what}, got {cfg.multiview.strategy!r} for "
            f"{cfg.train.dataset_path}: {advice}"
        )
    if hasattr(dataset, "set_options"):  # fields that arrive over a network
        dataset.set_options(
            type(dataset.options).from_config(OmegaConf.to_container(cfg.streaming)),
            report_folder=cfg.train.output_dir,
            seed=cfg.train.seed + seed_offset,
            batch_size=cfg.train.batch_size_per_gpu,
        )
    sampler = SamplerType.SHARDED_INFINITE if cfg.train.cache_dataset else SamplerType.INFINITE
    loader = make_data_loader(
        dataset=dataset,
        batch_size=cfg.train.batch_size_per_gpu,
        num_workers=cfg.train.num_workers,
        shuffle=True,
        seed=cfg.train.seed + seed_offset,
        sampler_type=sampler,
        sampler_advance=batches_done * cfg.train.batch_size_per_gpu,
        drop_last=True,
        collate_fn=collate,
        persistent_workers=False,
    )
    if cfg.train.num_workers > 0:
        loader.prefetch_factor = int(cfg.accelerator.prefetch_factor)
    return loader


def _no_target(_: Any) -> tuple[()]:
    return ()


def photometrics_on_device(cfg: DictConfig) -> bool:
    """Whether the photometric augmentation of fields runs on the device of the network."""
    return bool(cfg.multiview.strategy) and cfg.multiview.photometrics == "device"


def grouped(loader: Any, count: int) -> Iterator[list[dict[str, Any]]]:
    """`count` batches at a time."""
    batches = iter(loader)
    while len(group := list(islice(batches, count))) == count:
        yield group


def crops_ahead(
    batches: Iterable[dict[str, Any]], device: torch.device
) -> Iterator[dict[str, Any]]:
    """The batches with their crops on `device`.

    On a GPU the crops of the next batch are copied on a stream of their own, beside the kernels of the
    step before.  Elsewhere the batches pass unchanged.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[dict[str, Any], Any] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = {
                name: value.to(device, non_blocking=True) if name.startswith("collated_") else value
                for name, value in batch.items()
            }
            upcoming = moved, stream.record_event()
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = upcoming
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(batch: dict[str, Any], copied: Any, device: torch.device) -> dict[str, Any]:
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for name, value in batch.items():
        if name.startswith("collated_"):
            value.record_stream(current)  # its memory belongs to the other stream
    return batch


def sample_names(cfg: DictConfig, loader: Any, iteration: int) -> list[str]:
    """Names of this process's samples of an iteration, from the data order itself."""
    if isinstance(loader, CombinedDataLoader):
        return [f"several resolutions, iteration {iteration}"]
    per_step = cfg.train.batch_size_per_gpu * cfg.accelerator.accumulation_steps
    order = sample_order(loader, start=iteration * per_step)
    return [loader.dataset.get_sample_name(index) for index in islice(order, per_step)]
