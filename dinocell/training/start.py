"""The configuration of a training from its file, and the start that a small data set has by default."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinocell.errors import DataSetError
from dinocell.network.model import ARCHITECTURE, config_with_start
from dinocell.settings import config_from_mapping, read_settings
from dinocell.submitted import read_yaml
from dinocell.training.config import TrainConfig
from dinocell.training.datasets import split_pairs

START_OF_SMALL_SETS = "dinocell-cells"
"""The bundled model that a small data set starts from where the configuration names no network."""

MOST_IMAGES_OF_SMALL_SETS = 50
"""Training images up to which that is so: the "some tens" that random weights do not suffice for."""


def load_train_config(
    path: str | Path, overrides: Sequence[str] = (), *, note: Callable[[str], None] | None = None
) -> TrainConfig:
    """The configuration in a YAML file, changed by `key=value`; see `dinocell.settings.load_settings`.

    With `model.init` the other keys of `model` are those of that model unless they are given.  Where
    neither a start nor a network is named (`model.init`, a key of the architecture, a key of
    `backbone`) and the training images are few, `model.init` is `START_OF_SMALL_SETS`.  A run that
    has begun keeps its start, however many images there are now.  `note` gets a line that says so.

    Raises ConfigError (as `load_settings`); UsageError, CheckpointError (`model.init` is no model).
    """
    settings = read_settings(path, overrides)
    if not names_a_network(settings):
        plain = config_from_mapping(TrainConfig, settings)
        begun = read_yaml(Path(plain.output_dir, "config.yaml")).get("model")
        few = None if isinstance(begun, dict) else _few_images(plain)
        if few is not None or (
            isinstance(begun, dict) and begun.get("init") == START_OF_SMALL_SETS
        ):
            settings["model"] = {**(settings.get("model") or {}), "init": START_OF_SMALL_SETS}
        if few is not None and note is not None:
            note(
                f"{few} training images are few (at most {MOST_IMAGES_OF_SMALL_SETS}), and the configuration "
                f"names no network: training starts from {START_OF_SMALL_SETS}; set `model.init=null` to "
                "start from random weights, `model.size` or `backbone.weights` to choose another network"
            )
    if isinstance(settings.get("model"), dict):
        settings["model"] = config_with_start(settings["model"])
    return config_from_mapping(TrainConfig, settings)


def names_a_network(settings: Mapping[str, Any]) -> bool:
    """Whether the user chose the weights or the network; null is a choice, too."""
    model = settings.get("model") or {}
    chosen = isinstance(model, Mapping) and any(key in model for key in ("init", *ARCHITECTURE))
    return chosen or bool(settings.get("backbone"))


def _few_images(config: TrainConfig) -> int | None:
    """The number of training images where it is small; None where it is not, or cannot be known here."""
    try:
        images = len(split_pairs(config.data, config.seed)[0])
    except DataSetError:
        return None  # the training refuses them, or a job will see them on its node
    return images if images <= MOST_IMAGES_OF_SMALL_SETS else None
