"""Variants of a training compared: `dinocell ablate`.

Each variant is trained with each seed and evaluated on each test set.  What is reported are the
pooled AP, the spread over seeds, and the gain over the first variant with an interval from
resampling the test images, the same ones for both.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import ConfigError
from dinocell.evaluation.intervals import gain_interval
from dinocell.evaluation.metrics import pooled_ap
from dinocell.evaluation.model_evaluation import check_data_folder, evaluate_model
from dinocell.results.table import CellTable, align_columns
from dinocell.settings import load_settings, read_settings, require
from dinocell.training.config import TrainConfig
from dinocell.training.run_folder import RunFolder, refuse_other_run
from dinocell.training.start import START_OF_SMALL_SETS, load_train_config, names_a_network
from dinocell.training.trainer import train

IOU_THRESHOLDS = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Variant:
    """One way to train; `overrides` are `key=value` on the base configuration."""

    name: str
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TestSet:
    """Images and labels that no training sees: a folder that holds the folders images and labels."""

    name: str
    folder: str


@dataclass(frozen=True)
class AblationConfig:
    """What `dinocell ablate FILE` compares.  The first variant is the one that others are measured by."""

    base: str
    variants: list[Variant]
    test: list[TestSet]
    output_dir: str = "runs/ablation"
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    overrides: list[str] = field(default_factory=list)  # `key=value` for all variants

    def __post_init__(self) -> None:
        names_of = {
            "variants": [variant.name for variant in self.variants],
            "test": [item.name for item in self.test],
        }
        for what, names in names_of.items():
            require(
                len(names) > 0 and len(set(names)) == len(names) and all(names),
                f"`{what}` must be items with names that differ, got {names}: change them",
            )
        for variant in self.variants:
            require(
                Path(variant.name).name == variant.name,
                f"A variant's name must do as the name of a folder, got {variant.name!r}: leave out "
                "slashes",
            )
        require(
            len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds),
            f"`seeds` must be numbers that differ, got {self.seeds}: 0 and 1 are usual",
        )

    def check_test_sets(self) -> None:
        """Raise DataSetError if a test set is no folder with images and labels."""
        for item in self.test:
            check_data_folder(Path(item.folder))


@dataclass(frozen=True)
class Run:
    """One training of an ablation."""

    variant: str
    seed: int
    config: TrainConfig


def load_ablation(
    path: str | os.PathLike[str], *, look: bool = True, note: Callable[[str], None] | None = None
) -> tuple[AblationConfig, list[Run]]:
    """The configuration in a YAML file and its runs, variants first.

    `look` says whether the test sets must exist here; `note` as in `load_train_config`.

    Raises ConfigError, UsageError, CheckpointError (as `load_train_config`, for any of the runs);
    DataSetError (a test set is no such folder).
    """
    config = load_settings(AblationConfig, Path(path))
    if look:
        config.check_test_sets()
    runs: list[Run] = []
    by_default = set()  # whether a run starts from the model of small data sets without naming it
    for variant in config.variants:
        for seed in config.seeds:
            folder = Path(config.output_dir, variant.name, f"seed{seed}")
            own = [f"name={variant.name}", f"seed={seed}", f"output_dir={folder}"]
            overrides = [*config.overrides, *variant.overrides]
            for override in overrides:
                if override.partition("=")[0] in ("name", "seed", "output_dir"):
                    raise ConfigError(
                        f"A variant must leave name, seed and output_dir to the ablation, got {override!r}: "
                        "remove it"
                    )
            train_config = load_train_config(config.base, [*overrides, *own], note=note)
            runs.append(Run(variant.name, seed, train_config))
            named = names_a_network(read_settings(config.base, overrides))
            by_default.add(not named and train_config.model.init == START_OF_SMALL_SETS)
    require(
        len(by_default) < 2,
        f"All variants or none must name their start, got some that start from {START_OF_SMALL_SETS} because "
        "the training images are few: set `model.init` (null for random weights) in the base configuration",
    )
    return config, runs


def chosen_runs(runs: Sequence[Run], only: int | None) -> list[Run]:
    """All runs, or the one at the position `only`; ConfigError if there is none."""
    if only is not None and not 0 <= only < len(runs):
        raise ConfigError(
            f"`only` must be a run from 0 to {len(runs) - 1}, got {only}: there are {len(runs)} runs"
        )
    return list(runs) if only is None else [runs[only]]


def ablate(
    path: str | os.PathLike[str], *, only: int | None = None, shown: bool = True
) -> "AblationReport":
    """Train what is not trained yet, evaluate it, and write the tables.

    Each run is a folder of `train`, so that an interrupted ablation continues when it is started again.
    `only` is the position of a single run, from 0: as a job array, one task trains one run, and a
    last call without `only` makes the tables of all.

    Raises UsageError, ConfigError, DataSetError, CheckpointError, StoppedError (as `load_ablation`,
    `train` and `evaluate_model`); ConfigError (there is no run `only`).
    """
    notes: dict[str, None] = {}  # most runs have the same one
    config, runs = load_ablation(path, note=lambda text: notes.update({text: None}))
    if shown:
        for text in notes:
            print(f"dinocell: {text}", file=sys.stderr)
    chosen = chosen_runs(runs, only)
    rows: list[dict[str, Any]] = []
    for run in chosen:
        model = RunFolder(run.config).model
        refuse_other_run(run.config)
        if not model.exists():
            train(run.config, shown=shown)
        for item in config.test:
            evaluated = evaluate_model(
                model, item.folder, iou_thresholds=IOU_THRESHOLDS, shown=shown
            )
            for image in evaluated.report.images:
                place = {"variant": run.variant, "seed": run.seed, "set": item.name}
                rows.append({**place, "image": image.name, **image.counts()})
    report = AblationReport(config, tuple(rows))
    if only is None:
        report.write(Path(config.output_dir))
    return report


@dataclass(frozen=True)
class AblationReport:
    """Counts of every run on every test image, and what follows from them."""

    config: AblationConfig
    rows: tuple[Mapping[str, Any], ...]

    def summary(self) -> list[dict[str, Any]]:
        """A row for each test set and variant: AP at 0.5, 0.75 and 0.9, spread, gain, interval.

        `std` is the standard deviation of AP at 0.5 over the seeds (n - 1; nan for one seed), `gain` its
        mean minus that of the first variant, and `gain_low` and `gain_high` hold 95 % of 2,000 draws of
        as many images with replacement.
        """
        found = []
        for item in self.config.test:
            counts = {
                variant.name: self._counts(item.name, variant.name)
                for variant in self.config.variants
            }
            present = {name: value for name, value in counts.items() if value is not None}
            first = present.get(self.config.variants[0].name)
            for name, value in present.items():
                seeds = pooled_ap(value)  # [seeds, IoU]
                row: dict[str, Any] = {"set": item.name, "variant": name, "seeds": len(seeds)}
                for index, iou in enumerate(IOU_THRESHOLDS):
                    row[f"ap{round(100 * iou)}"] = float(seeds[:, index].mean())
                row["std"] = float(seeds[:, 0].std(ddof=1)) if len(seeds) > 1 else math.nan
                gain = low = high = math.nan
                if first is not None:
                    gain, low, high = gain_interval(first, value)
                found.append(row | {"gain": gain, "gain_low": low, "gain_high": high})
        return found

    def _counts(self, test_set: str, variant: str) -> NDArray[np.int64] | None:
        """(seeds, images, IoU, 3) true positives, false positives, misses; None without a run."""
        seeds = []
        for seed in self.config.seeds:
            place = (variant, seed, test_set)
            rows = [r for r in self.rows if (r["variant"], r["seed"], r["set"]) == place]
            if rows:
                names = [f"{{}}{round(100 * iou)}" for iou in IOU_THRESHOLDS]
                parts = ("tp", "fp", "fn")
                seeds.append([[[r[n.format(p)] for p in parts] for n in names] for r in rows])
        return np.array(seeds) if seeds else None

    def text(self) -> str:
        """The summary as a table."""
        rows = self.summary()
        shown = [list(rows[0])] if rows else []
        for row in rows:
            shown.append(
                [
                    f"{value:.4f}" if isinstance(value, float) else str(value)
                    for value in row.values()
                ]
            )
        return "\n".join(align_columns(shown))

    def write(self, folder: Path) -> None:
        """`images.csv` (counts of every run on every image) and `summary.csv`."""
        for name, rows in (("images", self.rows), ("summary", self.summary())):
            columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
            CellTable(columns).to_csv(folder / f"{name}.csv")
