"""The seam: what a training program calls, upstream's with our patches or the one of this tree (ours).

`patches/` holds the lines that call these functions; `dinocell upstream` puts them and our files into
a checkout.  Everything is imported where it is used, so that a run without DINOCell's keys is
upstream's own.  `watched` and `evaluate` are called by `dinov3.train.train` of this tree too.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

logger = logging.getLogger("dinov3")

_MOVED_HOOKS = {
    "dinocell.training.ssl_evaluation:make_evaluation": (
        "dinocell.pretraining.teacher_evaluation:make_evaluation"
    )
}
_LOG_EVERY = 10  # iterations, as upstream's log lines


def sections(cfg: Any) -> DictConfig:
    """`cfg` with the sections of `dinocell.yaml`, whose values it may replace in part.

    Raises ValueError (a key in one of these sections that does not exist).
    """
    defaults = OmegaConf.load(Path(__file__).parent / "dinocell.yaml")
    OmegaConf.set_struct(defaults, True)
    own = OmegaConf.create({name: cfg[name] for name in defaults if name in cfg})
    try:
        filled = OmegaConf.merge(defaults, own)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Keys of {', '.join(str(name) for name in defaults)} must be those of dinocell.yaml, got "
            f"another ({reason}): correct the key"
        ) from error
    merged = OmegaConf.merge(cfg, OmegaConf.create(OmegaConf.to_container(filled)))
    assert isinstance(merged, DictConfig)
    return merged


# --- weights ---


def load_pretrained(model: nn.Module, path: str | Path) -> bool:
    """Fill a network from a file that upstream's loader cannot take.

    That is a backbone alone (Meta's, Hugging Face's, timm's or our format), a backbone of another
    patch size, or a teacher file without some of its heads.  What the file does not contain keeps its
    initial values.

    `model`: with the module `backbone`, and perhaps heads; sharded or not.  `path`: file or
    folder.  Returns False where upstream's own loader fits: nothing was changed then.  Raises
    FileNotFoundError, WeightsError (see `weights.read_backbone`).
    """
    from dinov3.cells.weights import fit_backbone

    path = Path(path)
    if path.is_dir() and (path / ".metadata").is_file():
        return False  # sharded by torch.distributed.checkpoint
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    teacher = _teacher(path)
    found = {key: tuple(value.shape) for key, value in teacher.items()}
    if found and all(found.get(key) == shape for key, shape in expected.items()):
        return False
    backbone: Any = model.backbone
    state, report = fit_backbone(backbone.state_dict(), path)
    logger.info("%s: %s", path, report)
    filled = {f"backbone.{key}": value for key, value in state.items()}
    for key, value in teacher.items():
        if not key.startswith("backbone.") and expected.get(key) == tuple(value.shape):
            filled[key] = value
    for name in sorted({key.split(".")[0] for key in expected} - {"backbone"}):
        if not any(key.startswith(f"{name}.") for key in filled):
            logger.warning("%s keeps its initial values: %s does not contain it", name, path)
    _set_state(model, filled)
    return True


def _teacher(path: Path) -> dict[str, Tensor]:
    """Entries of a teacher file; none of other files."""
    from dinov3.cells.weights import WeightsError, read_teacher

    try:
        return read_teacher(path)
    except (FileNotFoundError, WeightsError):  # `fit_backbone` says what is wrong
        return {}


def _set_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)


def fit_patch_size(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A backbone's entries with a patch embedding of the network's patch size.

    `state_dict`: by the names of `model`; without a patch embedding it comes back as it is.
    """
    from dinov3.checkpointer.patch_size_adaptation import adapt_state_dict

    key = "patch_embed.proj.weight"
    if key not in state_dict:
        return state_dict
    adapted, note = adapt_state_dict(state_dict, int(model.state_dict()[key].shape[-1]))
    if note is not None:
        logger.info("%s", note)
    return adapted


def start_from_backbone(cfg: Any, model: Any) -> None:
    """Continue the pretraining of `student.pretrained_weights`, a backbone without heads.

    Fills student and EMA; heads keep their initial values.

    `model`: the `SSLMetaArch` after `init_weights`.  Raises FileNotFoundError, WeightsError (see
    `weights.read_backbone`).
    """
    from dinov3.cells.weights import fit_backbone

    path = cfg.student.get("pretrained_weights")
    if not path:
        return
    method = sections(cfg).patch_adaptation.method
    backbone = model.student["backbone"]
    state, report = fit_backbone(backbone.state_dict(), path, patch_method=method)
    logger.info("`student.pretrained_weights`: %s", report)
    for network in (backbone, model.model_ema["backbone"]):
        _set_state(network, state)


# --- data ---


def find_dataset(dataset_str: str) -> tuple[type, dict[str, Any]] | None:
    """Class and arguments of a dataset of ours; None of all others.

    Raises ValueError (an unknown key, split or type; a missing key).
    """
    from dinov3.cells.registry import DATASETS, check_needed, parse_dataset_str

    if dataset_str.partition(":")[0] not in DATASETS:
        return None
    found = parse_dataset_str(dataset_str)
    check_needed(dataset_str, *found)
    return found


def with_views(dataset: Any, cfg: Any, start_iter: int = 0) -> Any:
    """A dataset of fields with the views that `multiview` asks for; others as they are.

    `dataset`: just made, with upstream's augmentation.  `cfg`: of the run; its sections `multiview`
    and `streaming` count.  `start_iter`: number of finished iterations.  Raises ValueError (fields
    without `multiview.strategy`, or photometrics on the device).
    """
    if not getattr(dataset, "gives_fields", False):
        return dataset
    whole = sections(cfg)
    view = whole.multiview
    if not view.strategy:
        raise ValueError(
            f"`multiview.strategy` must be set for {type(dataset).__name__}, got '': for example "
            "multiview.strategy=multiview"
        )
    if view.dense_weight > 0:
        raise ValueError(
            "`multiview.dense_weight` must be 0 with upstream's training program, got "
            f"{view.dense_weight}: use the bundled tree"
        )
    if view.photometrics == "device":
        raise ValueError(
            "`multiview.photometrics` must be worker or none with upstream's training program, got device: "
            "change it"
        )
    from dinov3.data.augmentations_multiview import build_multiview_augmentation

    views = build_multiview_augmentation(whole)
    dataset.transform = views
    if hasattr(dataset.transforms, "transform"):  # torchvision keeps it a second time
        dataset.transforms.transform = views
    if not getattr(dataset, "orders_itself", False):
        return dataset
    from dinov3.data.datasets.jump_s3 import USUAL_FIELD_BYTES

    section: Any = OmegaConf.to_container(whole.streaming)
    dataset.set_options(
        type(dataset.options).from_config(section),
        report_folder=whole.train.output_dir,
        seed=whole.train.seed,
        batch_size=whole.train.batch_size_per_gpu,
    )
    # Upstream's workers are forked: this process must not fetch before.
    dataset.prepare(field_bytes=USUAL_FIELD_BYTES)
    return _Counted(dataset, start_iter * whole.train.batch_size_per_gpu)


@dataclass(eq=False)
class _Counted(Dataset[Any]):
    """Positions in place of the indices that upstream's sampler draws.

    A dataset with an order of its own must be read in that order.  Workers get the batches in turn,
    so that each finds the positions of its batches by counting them.
    """

    dataset: Any  # with `orders_itself`
    advance: int  # number of samples that this process has had
    batches: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        first = self.advance + (self.batches * workers + worker) * len(indices)
        self.batches += 1
        rank, world = self.dataset.rank, self.dataset.world
        return [self.dataset[rank + (first + number) * world] for number in range(len(indices))]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]


# --- what is called around the training loop ---


class Watched:
    """A metric logger whose values also go to wandb; everything else is the logger's own.

    The logger of this tree hands over each line that it writes.  Upstream's does not, so that the
    medians of its meters are taken every tenth iteration, as its log lines.
    """

    def __init__(self, metric_logger: Any, wandb: Any) -> None:
        self._metrics = metric_logger
        self._wandb = wandb
        # Called when the loop has ended, before wandb is closed.
        self.before_finish: list[Callable[[], Any]] = []
        self._hands_over = hasattr(metric_logger, "add_listener")
        if self._hands_over:
            metric_logger.add_listener(lambda iteration, values: wandb.log(values, iteration))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metrics, name)

    def __str__(self) -> str:
        return str(self._metrics)

    def log_pictures(self, pictures: Mapping[str, Any], iteration: int) -> None:
        """Pictures (H, W, 3) of uint8 by their names."""
        self._wandb.log_images({f"visuals/{k}": v for k, v in pictures.items()}, iteration)

    def log_every(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        iteration = kwargs.get("start_iteration", 0)
        exit_code = 1
        try:
            for batch in self._metrics.log_every(*args, **kwargs):
                yield batch
                if iteration % _LOG_EVERY == 0:
                    self._record(iteration)
                iteration += 1
            self._record(iteration - 1)
            exit_code = 0
        finally:
            for call in self.before_finish:
                call()
            self._wandb.finish(exit_code)

    def _record(self, iteration: int) -> None:
        if self._hands_over or iteration < 0:
            return
        meters = self._metrics.meters
        if meters:
            self._wandb.log({name: meter.median for name, meter in meters.items()}, iteration)


def watched(metric_logger: Any, cfg: Any, resume: bool = True) -> Any:
    """Before the loop: the metric logger, which also reports to wandb if `wandb.enabled`.

    The evaluation of the teacher is made here too, so that a wrong folder stops the run before its
    first step.

    `resume`: false starts another wandb run in the same folder.  Raises ValueError (a setting of
    `wandb` or `ssl_evaluation` is wrong).
    """
    from dinov3.logging.wandb_logger import create_wandb_logger

    whole = sections(cfg)
    _evaluations.clear()
    _evaluation(whole)
    wandb = create_wandb_logger(whole, resume=resume)
    return Watched(metric_logger, wandb) if whole.wandb.enabled else metric_logger


def load_hook(address: str) -> Callable[..., Any]:
    """A function by "package.module:function"; raises ValueError (no such module or function)."""
    if address in _MOVED_HOOKS:  # a run that an earlier version started
        logger.warning(
            "`ssl_evaluation.hook` %s has moved: write %s", address, _MOVED_HOOKS[address]
        )
        address = _MOVED_HOOKS[address]
    module, _, name = address.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`ssl_evaluation.hook` must be package.module:function, got {address!r} ({error}): correct the name"
        ) from error


# The evaluation of this process's run by its hook and folder.
_evaluations: dict[str, Callable[..., Mapping[str, float]]] = {}


def _evaluation(cfg: Any) -> Callable[..., Mapping[str, float]] | None:
    """What `ssl_evaluation.hook` makes of the configuration, once; None if there is no evaluation."""
    settings = cfg.get("ssl_evaluation") or {}
    hook = settings.get("hook", "")
    if not hook or settings.get("period_iterations", 0) <= 0:
        return None
    key = f"{hook} {cfg.train.output_dir}"
    if key not in _evaluations:
        _evaluations[key] = load_hook(hook)(sections(cfg))
    return _evaluations[key]


def empty_teacher(cfg: Any, device: str | torch.device) -> nn.Module:
    """A network of the teacher's architecture, without values."""
    from dinov3.models import build_model

    vit: nn.Module = build_model(cfg.student, only_teacher=True, device="meta")[0]
    return vit.to_empty(device=device).eval()


def evaluate(cfg: Any, model: Any, iteration: int, metric_logger: Any) -> None:
    """After each step, in all processes: score the teacher every `ssl_evaluation.period_iterations`.

    The first process evaluates a copy of the teacher, gathered if it is sharded.  The scores become
    a line of the metrics file, or meters where the logger writes no lines of its own (upstream's).
    This is the one place that catches what an evaluation, or the record of its scores, raises: it
    is logged with its traceback, and the training continues.  Raises ValueError (a setting of
    `ssl_evaluation` is wrong, unless `watched` has found that before).
    """
    evaluation = _evaluation(cfg)
    if evaluation is None or (iteration + 1) % cfg.ssl_evaluation.period_iterations:
        return
    import dinov3.distributed as distributed

    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.model_ema["backbone"].state_dict().items()
    }
    if not distributed.is_main_process():
        return
    try:
        device = next(iter(state.values())).device
        with torch.random.fork_rng(devices=[]):
            vit = empty_teacher(cfg, device)
        vit.load_state_dict(state)
        found = evaluation(vit, iteration, Path(cfg.train.output_dir))
        scores = {name: float(value) for name, value in found.items()}
        if scores and hasattr(metric_logger, "record"):
            metric_logger.record(iteration, scores)
        elif scores:
            metric_logger.update(**scores)
    except Exception:
        logger.exception(
            "The evaluation of iteration %d failed; the training continues without it", iteration
        )
