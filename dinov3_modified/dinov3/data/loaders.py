"""Datasets by their string, and loaders whose batches do not depend on how they are made
(matches `dinov3.data.loaders`).

Every sample seeds the global generators from (seed, position) before it is read and augmented, and
every batch before its masks are drawn; afterwards they are put back.  So workers, their number and
their start method change nothing, neither in the batches nor in the draws of the caller, and a run
resumes exactly from its position alone.
"""

import hashlib
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from multiprocessing import forkserver, resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from dinov3.cells.interruption import STOP_SIGNALS
from dinov3.cells.registry import (
    DATASETS,
    DatasetKeyError,
    DatasetSplitError,
    check_needed,
    parse_dataset_str,
    register_dataset,
)
from dinov3.data.datasets import ImageNet
from dinov3.data.samplers import (
    CountingSampler,
    EpochSampler,
    InfiniteSampler,
    PositionedSampler,
    SamplePosition,
    ShardedInfiniteSampler,
)

logger = logging.getLogger("dinov3")

# Upstream's that serve evaluation only, or have no public file list.
_ABSENT = ("ImageNet22k", "ADE20K", "CocoCaptions", "NYU")
register_dataset("ImageNet", "dinov3.data.datasets.image_net:ImageNet")


class SamplerType(Enum):
    """Order of the samples."""

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4


def _parse_dataset_str(dataset_str: str) -> tuple[type, dict[str, Any]]:
    name = dataset_str.partition(":")[0]
    if name in _ABSENT:
        raise ValueError(
            f"A dataset string must name one of {', '.join(DATASETS)}, got {name!r}, which is not part "
            "of this tree: use one of them"
        )
    return parse_dataset_str(dataset_str)


def find_dataset_class(dataset_str: str) -> tuple[type, dict[str, Any]]:
    """Class and arguments of the dataset that a string names; ValueError for a wrong string."""
    class_, kwargs = _parse_dataset_str(dataset_str)
    check_needed(dataset_str, class_, kwargs)
    return class_, kwargs


def make_dataset(
    *,
    dataset_str: str,
    transform: Callable[..., Any] | None = None,
    target_transform: Callable[..., Any] | None = None,
    transforms: Callable[..., Any] | None = None,
) -> Any:
    """The dataset that a string names, such as `ImageFolder:root=images`; ValueError for a wrong one."""
    class_, kwargs = find_dataset_class(dataset_str)
    dataset = class_(
        transform=transform, target_transform=target_transform, transforms=transforms, **kwargs
    )
    logger.info("Data set %s: %d samples", dataset_str, len(dataset))
    # Loaders ask for these whatever the dataset is.
    given = {"transform": transform, "target_transform": target_transform, "transforms": transforms}
    for attribute, value in given.items():
        if not hasattr(dataset, attribute):
            setattr(dataset, attribute, value)
    return dataset


# --- seeds ---


def seed_everything(*place: object) -> int:
    """Seed Python's, NumPy's and torch's CPU generators from a place in the run."""
    text = "/".join(str(part) for part in place)
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value >> 1)
    return value


@contextmanager
def seeded(*place: object) -> Iterator[None]:
    """Global generators seeded from a place in the run, and put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(*place)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass(eq=False)
class SeededDataset(Dataset[Any]):
    """Seeds the generators from (seed, position) for each sample."""

    dataset: Any
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        position = index.position if isinstance(index, SamplePosition) else int(index)
        with seeded(self.seed, position):
            return position, self.dataset[int(index)]

    def get_sample_name(self, index: int) -> str:
        name = getattr(self.dataset, "get_sample_name", None)
        return name(int(index)) if name is not None else f"sample {int(index)}"

    def get_sample_channels(self, index: int) -> tuple[str, ...]:
        """Channels of a field; () of other samples."""
        channels = getattr(self.dataset, "get_sample_channels", None)
        return channels(int(index)) if channels is not None else ()


def _seeded_batch(
    samples: Sequence[tuple[int, Any]], collate_fn: Callable[[list[Any]], Any], seed: int
) -> Any:
    """Make a batch with generators seeded from (seed, position of the last sample)."""
    with seeded(seed, samples[-1][0], "collate"):
        return collate_fn([sample for _, sample in samples])


# Of workers; a fork would not be safe in a process that has used CUDA or threads.
_START_METHOD = "forkserver"


def _start_worker(worker_id: int, inner: Callable[[int], None] | None = None) -> None:
    """The main process saves and ends its workers; a signal to the whole group must not."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A worker of a fork server outlives a main process that was killed, unless it looks itself.
    if (main_process := multiprocessing.parent_process()) is not None:

        def watch() -> None:
            multiprocessing.connection.wait([main_process.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="main process").start()
    if inner is not None:
        inner(worker_id)


_exit_is_arranged = False


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def plain_message(error: BaseException) -> str:
    """What an error says, without the traceback that a worker's error carries in its text."""
    text = str(error)
    if not text.startswith("Caught ") or "Original Traceback" not in text:
        return text
    return re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])


def _start_helpers() -> None:
    """Start multiprocessing's own processes with those signals blocked: their end is the workers'.

    The fork server imports torch and this module first, so that each worker is ready at once.
    """
    global _exit_is_arranged
    if not _exit_is_arranged:
        # A program that ends by an error ends its workers too, although they ignore SIGTERM.
        multiprocessing.util.Finalize(None, _kill_workers, exitpriority=100)
        _exit_is_arranged = True
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if in_main_thread else None
    try:
        resource_tracker.ensure_running()
        if in_main_thread:  # the tracker's start has let two of them through again
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        multiprocessing.set_forkserver_preload(["__main__", "torch", __name__])
        forkserver.ensure_running()
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- loaders ---


def _make_sampler(
    dataset: Any, type: SamplerType | None, size: int, advance: int, order: dict[str, Any]
) -> Any:
    if getattr(dataset, "orders_itself", False):
        if type not in (SamplerType.INFINITE, SamplerType.SHARDED_INFINITE):
            raise ValueError(
                f"Data with its own order must have an infinite sampler, got {type}: use INFINITE"
            )
        return CountingSampler(advance=advance)
    count = len(dataset)
    if size > 0 and type is not None and type is not SamplerType.EPOCH:
        raise ValueError(
            f"`sampler_size` must be given for SamplerType.EPOCH only, got {size} for {type.name}: "
            "leave it out or use EPOCH"
        )
    if type is SamplerType.INFINITE:
        return InfiniteSampler(sample_count=count, **order, advance=advance)
    if type in (SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW):
        new = type is SamplerType.SHARDED_INFINITE_NEW
        return ShardedInfiniteSampler(
            sample_count=count, **order, advance=advance, use_new_shuffle_tensor_slice=new
        )
    if advance:
        raise ValueError(
            f"`sampler_advance` must be 0 for finite samplers, got {advance}: use SamplerType.INFINITE"
        )
    if type is SamplerType.EPOCH:
        return EpochSampler(sample_count=count, **order, size=size if size > 0 else count)
    if type is SamplerType.DISTRIBUTED:
        from dinov3.distributed import get_rank, get_world_size

        return torch.utils.data.DistributedSampler(
            dataset, num_replicas=get_world_size(), rank=get_rank(), **order
        )
    return None


def make_data_loader(
    *,
    dataset: Any,
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    persistent_workers: bool = False,
    collate_fn: Callable[[Sequence[Any]], Any] | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader[Any]:
    """A loader whose batches are a function of seed and position.

    Args:
        shuffle: has no meaning for `sampler_type` None.
        seed: of the order, the augmentations and the masks.
        sampler_type: None: each sample once, in the data set's order, in every process.
        sampler_size: samples of an epoch (EPOCH).
        sampler_advance: samples of this process that are done (infinite samplers).
        collate_fn: list of samples → batch.
        worker_init_fn: called in each worker with its number.
    """
    order = {"shuffle": shuffle, "seed": seed}
    sampler = _make_sampler(dataset, sampler_type, sampler_size, sampler_advance, order)
    if num_workers:
        _start_helpers()
    return DataLoader(
        SeededDataset(dataset, seed),
        sampler=None if sampler is None else PositionedSampler(sampler, sampler_advance),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_initialized(),
        drop_last=drop_last,
        persistent_workers=persistent_workers and num_workers > 0,
        collate_fn=partial(_seeded_batch, collate_fn=collate_fn or default_collate, seed=seed),
        worker_init_fn=partial(_start_worker, inner=worker_init_fn) if num_workers else None,
        multiprocessing_context=_START_METHOD if num_workers else None,
        # Else each pass would take a number from torch's global generator.
        generator=torch.Generator().manual_seed(seed),
    )
