"""Questions to a tree, each answered in a process of its own.

An answer is FOLDER/NAME.pt with plain values and tensors, or {"absent": reason} if a part of the tree
cannot be imported.  The tree is the first `dinov3` on the path.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from torch import Tensor

torch.set_num_threads(1)

FLAGS = {"n_storage_tokens": 4, "layerscale_init": 1e-5, "mask_k_bias": True}
SMALL = [
    "student.arch=vit_small", "student.patch_size=8", "student.drop_path_rate=0.0",
    "student.n_storage_tokens=4", "student.mask_k_bias=true", "student.layerscale=0.1",
    "dino.head_n_prototypes=64", "dino.head_hidden_dim=48", "dino.head_bottleneck_dim=32",
    "ibot.head_n_prototypes=64", "ibot.head_hidden_dim=48", "ibot.head_bottleneck_dim=32",
    "crops.global_crops_size=32", "crops.local_crops_size=16", "crops.local_crops_number=2",
    "train.batch_size_per_gpu=4", "train.compile=false", "train.num_workers=0",
    "train.OFFICIAL_EPOCH_LENGTH=4", "optim.epochs=1", "optim.warmup_epochs=0",
    "optim.freeze_last_layer_epochs=0", "teacher.warmup_teacher_temp_epochs=1",
    "compute_precision.param_dtype=fp32",
]  # fmt: skip


def _config(*changes: str) -> Any:
    from omegaconf import OmegaConf

    from dinov3.configs import get_default_config

    return OmegaConf.merge(get_default_config(), OmegaConf.from_dotlist([*SMALL, *changes]))


def _is_ours() -> bool:
    import dinov3

    return bool(getattr(dinov3, "DINOCELL_TREE", False))


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what others use ---


def fields(folder: Path) -> dict[str, Any]:
    """Twelve fields of two channels: TIFFs, a table for folders, an index for stores."""
    import numpy as np
    import tifffile

    from dinov3.cells.streaming.index import FieldRecord, IndexWriter

    rng = np.random.default_rng(4)
    (folder / "store").mkdir()
    writer = IndexWriter(str(folder / "store"))
    rows = ["field,plate,channel,file"]
    for number in range(12):
        keys = {}
        for channel in ("DNA", "ER"):
            key = f"f{number}_{channel}.tif"
            plane = rng.integers(100, 4000, (64, 64)).astype(np.uint16)
            tifffile.imwrite(folder / "store" / key, plane)
            keys[channel] = key
            rows.append(f"f{number},P{number % 3},{channel},{key}")
        writer.add(FieldRecord(f"P{number % 3}", "A01", str(number), keys))
    (folder / "store" / "table.csv").write_text("\n".join(rows) + "\n")
    writer.write(folder / "index.arrow")
    return {}


# --- names ---


def names(folder: Path) -> dict[str, Any]:
    """Parameters of everything that the project calls, and a reason where a module is missing."""
    found: dict[str, Any] = {}
    for module, attributes in json.loads((folder / "wanted.json").read_text()).items():
        try:
            loaded = importlib.import_module(f"dinov3.{module}")
        except ImportError as error:
            found[module] = str(error)
            continue
        for attribute in attributes:
            value: Any = loaded
            for part in attribute.split("."):
                value = getattr(value, part, None)
            key = f"{module}.{attribute}"
            found[key] = None if value is None else list(inspect.signature(value).parameters)
    return found


def config(folder: Path) -> dict[str, Any]:
    """Leaves of the tree's own default configuration."""
    del folder
    from omegaconf import DictConfig, OmegaConf

    import dinov3.configs

    def leaves(section: Any, prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in section.items():
            inner = leaves(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else None
            flat |= inner if inner is not None else {f"{prefix}{key}": value}
        return flat

    path = Path(dinov3.configs.__file__).parent / "ssl_default_config.yaml"
    return {key: str(value) for key, value in leaves(OmegaConf.load(path)).items()}


def shapes(folder: Path) -> dict[str, Any]:
    """State-dict keys and shapes of the networks that released files fill."""
    del folder
    from dinov3.models import vision_transformer as vits

    made = {}
    with torch.device("meta"):
        for arch in ("vit_small", "vit_base", "vit_large"):
            for patch in (8, 16):
                vit = getattr(vits, arch)(patch_size=patch, **FLAGS)
                made[f"{arch}/{patch}"] = {k: tuple(v.shape) for k, v in vit.state_dict().items()}
    return made


# --- numbers ---


def _vit(**flags: Any) -> Any:
    from dinov3.models.vision_transformer import DinoVisionTransformer

    chosen = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, **FLAGS, **flags}
    return DinoVisionTransformer(**chosen)


def weights(folder: Path) -> dict[str, Any]:
    """Values for `forward`, the same for all trees; made by the bundled one."""
    del folder
    torch.manual_seed(3)
    state = {}
    for patch in (8, 16):
        vit = _vit(patch_size=patch)
        vit.init_weights()
        for key, value in vit.state_dict().items():
            if value.is_floating_point() and "periods" not in key and "mask" not in key:
                value.add_(0.05 * torch.randn_like(value))
        state[f"tiny/{patch}"] = vit.state_dict()
    return state


def forward(folder: Path) -> dict[str, Any]:
    """Outputs and gradients of a small network on given weights."""
    vit = _vit()
    vit.load_state_dict(torch.load(folder / "weights.pt")["tiny/8"])
    images = _random(2, 3, 32, 48, seed=1)
    masks = _random(2, 24, seed=2) > 0.4
    out = {"cls": vit(images, is_training=False)}
    for name, value in vit.forward_features(images, masks).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            out[f"features/{name}"] = value
    for number, layer in enumerate(vit.get_intermediate_layers(images, n=[0, 1, 3], norm=True)):
        out[f"layer/{number}"] = layer
    vit.train()
    vit(images, is_training=True)["x_norm_patchtokens"].square().mean().backward()
    out |= {
        f"gradient/{name}": parameter.grad
        for name, parameter in vit.named_parameters()
        if parameter.grad is not None
    }
    return {name: value.detach() for name, value in out.items()}


def losses(folder: Path) -> dict[str, Any]:
    """Values of the losses on given outputs."""
    del folder
    from dinov3.loss import DINOLoss, GramLoss, KoLeoLoss, iBOTPatchLoss

    _one_process()
    student, teacher = _random(2, 6, 32, seed=1), _random(2, 6, 32, seed=2)
    dino = DINOLoss(32)
    dino.init_weights()
    centred = dino.sinkhorn_knopp_teacher(teacher.flatten(0, 1), 0.05).view(2, 6, 32)
    ibot = iBOTPatchLoss(32)
    ibot.init_weights()
    masks = _random(4, 9, seed=3) > 0.2
    count = int(masks.sum())
    patches, targets = _random(count, 32, seed=4), _random(count, 32, seed=5)
    shares = torch.tensor([count])
    assigned = ibot.sinkhorn_knopp_teacher(targets, 0.05, n_masked_patches_tensor=shares)
    return {
        "sinkhorn": centred,
        "dino": dino(student, centred),
        "dino/off diagonal": dino(student, centred, ignore_diagonal=True),
        "ibot": ibot.forward_masked(patches, assigned, masks, n_masked_patches=count),
        "koleo": KoLeoLoss()(_random(8, 16, seed=6)),
        "gram": GramLoss()(_random(2, 9, 16, seed=7), _random(2, 9, 16, seed=8)),
    }


def _one_process() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group(backend="gloo", store=store, rank=0, world_size=1)


# --- training ---


def _ssl_model(cfg: Any) -> Any:
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    if _is_ours():
        cfg.accelerator.device, cfg.accelerator.strategy = "cpu", "none"
        model = SSLMetaArch(cfg)
        model.prepare_for_distributed_training()
        return model
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    return model.to_empty(device="cpu")


def _batch(cfg: Any) -> dict[str, Any]:
    import random

    import numpy as np

    from dinov3.data.collate import collate_data_and_cast
    from dinov3.data.masking import MaskingGenerator

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - upstream draws masks from it
    samples = [
        (
            {
                "global_crops": [_random(3, 32, 32, seed=10 * n + i) for i in range(2)],
                "global_crops_teacher": [_random(3, 32, 32, seed=10 * n + i) for i in range(2)],
                "local_crops": [_random(3, 16, 16, seed=10 * n + 4 + i) for i in range(2)],
                "offsets": (),
            },
            (),
        )
        for n in range(4)
    ]
    batch = collate_data_and_cast(
        samples,
        mask_ratio_tuple=(0.1, 0.5),
        mask_probability=0.5,
        dtype=torch.float32,
        n_tokens=16,
        mask_generator=MaskingGenerator(input_size=(4, 4), max_num_patches=8),
    )
    batch["global_batch_size"] = 4
    return batch


def start(folder: Path) -> dict[str, Any]:
    """Start values of `step`, made by the bundled tree."""
    del folder
    torch.manual_seed(0)
    model = _ssl_model(_config())
    model.init_weights()
    return {key: value.clone() for key, value in model.student.state_dict().items()}


def step(folder: Path) -> dict[str, Any]:
    """Losses and some weights of two training steps from given start values."""
    _one_process()
    cfg = _config()
    model = _ssl_model(cfg)
    model.init_weights()
    state = torch.load(folder / "start.pt")
    model.student.load_state_dict(state)
    model.model_ema.load_state_dict(state)
    model.train()
    # Not AdamW, which turns the rounding of a gradient near 0 into a whole step.
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05)
    out: dict[str, Any] = {}
    for number in range(2):
        optimizer.zero_grad(set_to_none=True)
        total, metrics = model.forward_backward(_batch(cfg), teacher_temp=0.05, iteration=number)
        optimizer.step()
        model.update_ema(0.9)
        out[f"{number}/total"] = total.detach()
        for name in ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss"):
            out[f"{number}/{name}"] = torch.as_tensor(metrics[name]).detach()
    student, teacher = model.student["backbone"], model.model_ema["backbone"]
    out["student"] = student.blocks[5].mlp.fc1.weight.detach()
    out["teacher"] = teacher.blocks[5].mlp.fc1.weight.detach()
    return out


def save(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint and a teacher file, in FOLDER/saved."""
    from dinov3.checkpointer import save_checkpoint

    _one_process()
    torch.manual_seed(5)
    model = _ssl_model(_config())
    model.init_weights()
    optimizer = torch.optim.AdamW(model.get_params_groups(), lr=1e-3)
    model.train()
    model.forward_backward(_batch(_config()), teacher_temp=0.05, iteration=0)
    optimizer.step()
    (folder / "saved" / "ckpt").mkdir(parents=True)
    save_checkpoint(folder / "saved/ckpt/6", iteration=6, model=model, optimizer=optimizer)
    torch.save({"teacher": model.model_ema.state_dict()}, folder / "saved/teacher_checkpoint.pth")
    return {
        "student": dict(model.student.state_dict()),
        "teacher": dict(model.model_ema.state_dict()),
    }


def load(folder: Path) -> dict[str, Any]:
    """What a tree reads of another's `save`."""
    from dinov3.checkpointer import init_fsdp_model_from_checkpoint, load_checkpoint

    _one_process()
    torch.manual_seed(6)
    model = _ssl_model(_config())
    model.init_weights()
    optimizer = torch.optim.AdamW(model.get_params_groups(), lr=1e-3)
    other = Path((folder / "other.txt").read_text()) / "saved"
    iteration = load_checkpoint(
        other / "ckpt/6", model=model, optimizer=optimizer, strict_loading=False
    )
    student = {key: value.clone() for key, value in model.student.state_dict().items()}
    ema = {key: value.clone() for key, value in model.model_ema.state_dict().items()}
    steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    second = _ssl_model(_config())
    second.init_weights()
    _read_teacher(init_fsdp_model_from_checkpoint, second.student, other / "teacher_checkpoint.pth")
    return {
        "iteration": iteration,
        "student": student,
        "teacher": ema,
        "steps": sorted(steps),
        "from the teacher file": dict(second.student.state_dict()),
    }


def _read_teacher(read: Any, model: Any, path: Path) -> None:
    """With nothing sharded: what upstream's reader hands out is a tensor again."""
    if not _is_ours():
        import torch.distributed.tensor as tensors

        tensors.distribute_tensor = lambda tensor, *_, **__: tensor
    read(
        model,
        str(path),
        ["dino_loss.center", "ibot_patch_loss.center"],
        ["backbone.rope_embed.periods", "qkv.bias_mask"],
    )


# --- additions ---


def pretrained(folder: Path) -> dict[str, Any]:
    """A backbone of 16 px patches, without heads, in networks of 8 px."""
    from dinov3.checkpointer.checkpointer import (
        init_fsdp_model_from_checkpoint,
        init_model_from_checkpoint_for_evals,
    )

    _one_process()
    path = folder / "backbone16.pth"
    torch.save(torch.load(folder / "weights.pt")["tiny/16"], path)
    plain = _vit()
    plain.init_weights()
    init_model_from_checkpoint_for_evals(plain, path)
    network = torch.nn.ModuleDict({"backbone": _vit(), "dino_head": torch.nn.Linear(3, 3)})
    network["backbone"].init_weights()
    before = network["dino_head"].weight.clone()
    if _is_ours():
        from dinov3.cells.hooks import load_pretrained

        # The bundled tree reads teachers here and backbones by their own key.
        assert load_pretrained(network, path)
    else:
        init_fsdp_model_from_checkpoint(network, str(path), [], [])
    return {
        "evals": dict(plain.state_dict()),
        "student": dict(network["backbone"].state_dict()),
        "heads are as before": torch.equal(before, network["dino_head"].weight),
    }


def datasets(folder: Path) -> dict[str, Any]:
    """Classes of dataset strings."""
    from dinov3.data.loaders import _parse_dataset_str

    out = {}
    for text in json.loads((folder / "strings.json").read_text()):
        try:
            class_, arguments = _parse_dataset_str(text)
            out[text] = [class_.__name__, {k: str(v) for k, v in arguments.items()}]
        except Exception as error:
            out[text] = f"{type(error).__name__}: {error}"
    return out


def views(folder: Path) -> dict[str, Any]:
    """Batches of the training program's own loader on fields of a folder and of a store."""
    from dinov3.train.train import build_data_loader_from_cfg

    out: dict[str, Any] = {}
    for name, changes in json.loads((folder / "views.json").read_text()).items():
        cfg = _config(f"train.output_dir={folder}/{name}", *changes)
        try:
            loader = iter(build_data_loader_from_cfg(cfg, _AnyModel(cfg), start_iter=1))
            batches = [next(loader) for _ in range(3)]
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
            continue
        out[name] = [
            {
                "shapes": {k: tuple(v.shape) for k, v in batch.items() if k.endswith("_crops")},
                # Gray views: the three channels are one, before normalisation by their own means.
                "crops": batch["collated_global_crops"].float(),
            }
            for batch in batches
        ]
    return out


def order(folder: Path) -> dict[str, Any]:
    """Names of the fields of a store as loaders bring them, without and with workers."""
    from dinov3.cells.hooks import with_views
    from dinov3.data import SamplerType, make_data_loader, make_dataset

    changes, start_iter = json.loads((folder / "order.json").read_text())
    cfg = _config(f"train.output_dir={folder}/order", *changes)
    out: dict[str, Any] = {}
    for workers in (0, 2):
        dataset = make_dataset(
            dataset_str=cfg.train.dataset_path, transform=len, target_transform=_nothing
        )
        loaded = with_views(dataset, cfg, start_iter)
        dataset.transform = _name
        if hasattr(dataset.transforms, "transform"):
            dataset.transforms.transform = _name
        loader = make_data_loader(
            dataset=dataset if _is_ours() else loaded,
            batch_size=cfg.train.batch_size_per_gpu,
            num_workers=workers,
            shuffle=True,
            seed=0,
            sampler_type=SamplerType.INFINITE,
            sampler_advance=start_iter * cfg.train.batch_size_per_gpu,
            drop_last=True,
            collate_fn=_names_of,
        )
        batches = iter(loader)
        out[f"{workers} workers"] = [next(batches) for _ in range(9)]
    return out


def positions(folder: Path) -> dict[str, Any]:
    """Which samples of a store the training program's own loader asks for after a resumption."""
    from dinov3.data.datasets.jump_s3 import JUMPS3Dataset
    from dinov3.train.train import build_data_loader_from_cfg

    asked: list[int] = []
    get = JUMPS3Dataset.__getitem__

    def noted(self: Any, position: int) -> Any:
        asked.append(int(position))
        return get(self, position)

    JUMPS3Dataset.__getitem__ = noted  # type: ignore[method-assign]
    changes, start_iter = json.loads((folder / "positions.json").read_text())
    cfg = _config(f"train.output_dir={folder}/positions", *changes)
    batches = iter(build_data_loader_from_cfg(cfg, _AnyModel(cfg), start_iter=start_iter))
    for _ in range(2):
        next(batches)
    return {"batch": cfg.train.batch_size_per_gpu, "asked": asked}


def _name(field: Any) -> str:
    return str(field.name)


def _names_of(samples: Any) -> list[str]:
    return [image for image, _ in samples]


def _nothing(target: Any) -> tuple[()]:
    del target
    return ()


class _AnyModel:
    """The part of the networks that the loader reads."""

    param_dtype = torch.float32

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def build_data_augmentation_dino(self, cfg: Any) -> Any:
        from dinov3.train.ssl_meta_arch import SSLMetaArch

        return SSLMetaArch.build_data_augmentation_dino(self, cfg)  # type: ignore[arg-type]


def program(folder: Path) -> dict[str, Any]:
    """The training program itself, with every addition in use.

    Of upstream's tree also: which `resume` its loop hands to `watched`, where `do_train` gets 2.
    """
    import torch.distributed as dist
    from ports import held_port

    from dinov3.train import train

    changes = [*SMALL, *json.loads((folder / "program.json").read_text())]
    if _is_ours():
        changes += ["accelerator.device=cpu", "accelerator.strategy=none"]
    (folder / "empty.yaml").write_text("train: {seed: 0}\n")
    arguments = ["--config-file", f"{folder}/empty.yaml", "--output-dir", f"{folder}/run", *changes]
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if _is_ours():
        for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
        train.main(arguments)
    else:
        with held_port() as port:
            os.environ["MASTER_PORT"] = str(port)
            sys.argv = ["train.py", *arguments]
            handed = _note_resume(train)
            train.main()
            dist.destroy_process_group()
        return {"handed to watched": handed}
    return {}


def _note_resume(train: Any) -> list[Any]:
    """Give `do_train` the value 2 for `resume`, and note what its loop makes of it."""
    from dinov3.cells import hooks

    handed: list[Any] = []
    watched, do_train = hooks.watched, train.do_train

    def noted(metric_logger: Any, cfg: Any, resume: Any = None) -> Any:
        handed.append(resume)
        return watched(metric_logger, cfg, resume)

    hooks.watched = noted
    train.do_train = lambda cfg, model, resume: do_train(cfg, model, resume=2)
    return handed


def answer(name: str, folder: Path) -> None:
    sys.path[:0] = [str(folder), str(Path(__file__).parent)]
    sys.path.append(str(Path(__file__).parents[1]))  # last: it has a folder `dinov3` of tests
    if not _is_ours():
        import stand_ins

        stand_ins.provide_torchvision()
        if not torch.cuda.is_available():
            stand_ins.use_the_cpu()
    try:
        result = globals()[name](folder)
    except ImportError as error:
        if "dinov3" in str(error) and "cannot import name" in str(error):
            raise
        result = {"absent": str(error)}
    torch.save(result, folder / f"{name}.pt")


def main() -> None:
    """Answer one question a line, `NAME FOLDER`, each in a fork of this process: imports take seconds.

    Prints the exit code of each; what it wrote to standard error is in FOLDER/NAME.err.
    """
    with contextlib.suppress(ImportError):  # the question that needs it reports it
        if _is_ours():
            importlib.import_module("dinov3.train.train")
    for line in sys.stdin:
        name, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(code, flush=True)
            continue
        code = 1
        try:
            os.chdir(folder)
            with open(f"{name}.err", "w") as errors:
                os.dup2(errors.fileno(), 1)  # standard output is for the exit codes
                os.dup2(errors.fileno(), 2)
            answer(name, Path(folder))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main()
