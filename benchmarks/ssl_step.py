"""Time, FLOPs and memory of one self-supervised training step, beside upstream's own step.

    python benchmarks/ssl_step.py                                  # ViT-S/8, batch 64, bf16: for a GPU
    python benchmarks/ssl_step.py --preset cpu                     # small sizes, seconds on a CPU
    python benchmarks/ssl_step.py --upstream DIR                   # also the step of a DINOv3 checkout
    python benchmarks/ssl_step.py --fields FOLDER                  # also the share of waiting for data
    python benchmarks/ssl_step.py --profile                        # also the costliest operations

Each side runs in a process of its own on the same synthetic batch; rounds alternate between them.
FLOPs are those of the matrix products, convolutions and attention of a step without recomputation:
fvcore counts the forward passes of backbones and heads on a batch of 10 (they are linear in the
batch), and the student's count three times, for its backward pass.  The student's drop path leaves
out 3 of 10 samples of each residual branch, and so do the counts.
Goal on an H100 with the default sizes: at most 0.12 s, stretch 0.092 s; the floor is 0.037 s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_COUNTED = 10  # samples; 0.3 of them is a whole number
PRESETS = {
    "gpu": {
        "arch": "vit_small", "batch": 64, "global_px": 224, "local_px": 96, "locals": 8,
        "prototypes": 65536, "hidden": 2048, "bottleneck": 256, "dtype": "bf16", "steps": 20,
        "warmup": 5, "rounds": 2, "compile": True,
    },
    "cpu": {
        "arch": "vit_small", "batch": 4, "global_px": 64, "local_px": 32, "locals": 3,
        "prototypes": 8192, "hidden": 1024, "bottleneck": 256, "dtype": "fp32", "steps": 3,
        "warmup": 1, "rounds": 2, "compile": False,
    },
}  # fmt: skip


def overrides(size: dict[str, Any]) -> list[str]:
    """Configuration keys of a preset, known to both trees."""
    return [
        f"student.arch={size['arch']}", "student.patch_size=8", "student.drop_path_rate=0.3",
        "student.layerscale=1.0e-05", "student.n_storage_tokens=4", "student.mask_k_bias=true",
        "student.norm_layer=layernormbf16", f"train.batch_size_per_gpu={size['batch']}",
        f"crops.global_crops_size={size['global_px']}", f"crops.local_crops_size={size['local_px']}",
        f"crops.local_crops_number={size['locals']}", f"train.compile={str(size['compile']).lower()}",
        *(f"{head}.head_n_prototypes={size['prototypes']}" for head in ("dino", "ibot")),
        *(f"{head}.head_hidden_dim={size['hidden']}" for head in ("dino", "ibot")),
        *(f"{head}.head_bottleneck_dim={size['bottleneck']}" for head in ("dino", "ibot")),
        f"compute_precision.param_dtype={size['dtype']}",
    ]  # fmt: skip


def make_batch(size: dict[str, Any], count: int, device: Any) -> dict[str, Any]:
    """A batch as the loader gives it: half of the global crops masked by 10 to 50 percent."""
    import torch

    generator = torch.Generator().manual_seed(0)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[size["dtype"]]
    patches = (size["global_px"] // 8) ** 2
    masks = torch.zeros(2 * count, patches, dtype=torch.bool)
    for row, share in enumerate(torch.linspace(0.1, 0.5, count + 1)[1:].tolist()):
        chosen = torch.randperm(patches, generator=generator)[: int(patches * share)]
        masks[row, chosen] = True
    masks = masks[torch.randperm(2 * count, generator=generator)]

    def crops(number: int, edge: int) -> Any:
        return torch.randn(number, 3, edge, edge, generator=generator).to(device, kind)

    weights = (1 / masks.sum(-1).clamp(min=1.0))[:, None].expand_as(masks)[masks]
    indices = masks.flatten().nonzero().flatten()
    return {
        "collated_global_crops": crops(2 * count, size["global_px"]),
        "collated_local_crops": crops(size["locals"] * count, size["local_px"]),
        "collated_masks": masks.to(device),
        "mask_indices_list": indices.to(device),
        "masks_weight": weights.to(device),
        "upperbound": int(masks.sum()),
        "n_masked_patches": torch.tensor([len(indices)], device=device),
        "global_batch_size": count,
    }


def stand_in_for_cuda() -> None:
    """Let upstream's step run on a CPU: its CUDA names do nothing, and torchvision imports."""
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "conformance"))
    from stand_ins import declare_torchvision_operators

    declare_torchvision_operators()
    torch.Tensor.cuda = lambda self, *_, **__: self


def build(side: str, size: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(network, optimiser, device) of one side, ready to train."""
    import torch

    on_gpu = torch.cuda.is_available()
    if side == "upstream" and not on_gpu:
        stand_in_for_cuda()
    from omegaconf import OmegaConf

    import dinov3.distributed as distributed
    from dinov3.configs import get_default_config
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    cfg = OmegaConf.merge(get_default_config(), OmegaConf.from_dotlist(overrides(size)))
    if on_gpu or side == "upstream":
        if not on_gpu:
            import torch.distributed as dist

            port = 29_500 + os.getpid() % 2_000
            dist.init_process_group(
                "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
            )
        else:
            distributed.enable(overwrite=True)
    torch.manual_seed(0)
    if side == "upstream":
        with torch.device("meta"):
            model = SSLMetaArch(cfg)
        if on_gpu:
            model.prepare_for_distributed_training()
        else:  # its bare math, without FSDP's wrappers around it
            model.to_empty(device="cpu")
    else:
        model = SSLMetaArch(cfg)
        model.prepare_for_distributed_training()
    groups = model.get_params_groups()
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    model.init_weights()
    model.train()
    return model, optimizer, torch.device("cuda" if on_gpu else "cpu")


def step(model: Any, optimizer: Any, batch: dict[str, Any]) -> Any:
    """Forward, backward, clipping, update, EMA."""
    import torch

    optimizer.zero_grad(set_to_none=True)
    loss, _ = model.forward_backward(batch, teacher_temp=0.05, iteration=0)
    for module in model.student.values():
        torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm=3.0)
    optimizer.step()
    model.update_ema(0.99)
    return loss


def measure(side: str, size: dict[str, Any], profile: bool) -> dict[str, Any]:
    """Seconds of each step, FLOPs, memory; in this process."""
    import torch

    model, optimizer, device = build(side, size)
    batch = make_batch(size, size["batch"], device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(size["warmup"]):
        step(model, optimizer, dict(batch))
    wait()
    seconds = []
    for _ in range(size["steps"]):
        begin = time.perf_counter()
        loss = step(model, optimizer, dict(batch))
        wait()
        seconds.append(time.perf_counter() - begin)
    result: dict[str, Any] = {"seconds": seconds, "loss": float(loss.detach())}
    if device.type == "cuda":
        result["max_memory_bytes"] = torch.cuda.max_memory_allocated()
    if profile:
        from torch.profiler import ProfilerActivity

        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profiler:
            step(model, optimizer, dict(batch))
            wait()
        key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        result["profile"] = profiler.key_averages().table(sort_by=key, row_limit=25)
    return result


def count_flops(size: dict[str, Any]) -> float:
    """FLOPs of a step at the full batch, counted on a CPU with a small batch."""
    import torch

    small = {**size, "dtype": "fp32", "compile": False, "batch": _COUNTED}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(ROOT))
    from omegaconf import OmegaConf

    from dinocell.network.info import count_macs
    from dinov3.configs import get_default_config
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    changes = [*overrides(small), "accelerator.device=cpu"]
    cfg = OmegaConf.merge(get_default_config(), OmegaConf.from_dotlist(changes))
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    model.init_weights()
    model.train()
    batch = make_batch(small, _COUNTED, torch.device("cpu"))

    class Forward(torch.nn.Module):
        """What one network does in a step; the teacher sees no local crops."""

        def __init__(self, parts: Any) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, crops: Any, local: Any, indices: Any) -> Any:
            sizes = [crops] if local is None else [crops, local]
            out = self.parts.backbone(sizes, masks=[None] * len(sizes), is_training=True)
            cls = torch.cat([one["x_norm_clstoken"] for one in out])
            masked = out[0]["x_norm_patchtokens"].flatten(0, 1).index_select(0, indices)
            return self.parts.dino_head(cls), self.parts.ibot_head(masked)

    crops, indices = batch["collated_global_crops"], batch["mask_indices_list"]
    local = batch["collated_local_crops"]
    student = sum(count_macs(Forward(model.student), (crops, local, indices)).values())
    teacher = sum(count_macs(Forward(model.teacher), (crops, None, indices)).values())
    per_sample = 2 * (3 * student + teacher) / _COUNTED  # a multiply-accumulate is two operations
    return per_sample * size["batch"]


def matrix_peak(dtype: str) -> float:
    """FLOP/s of large matrix products on this device."""
    import torch

    on_gpu = torch.cuda.is_available()
    edge = 8192 if on_gpu else 2048
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a = torch.randn(edge, edge, device="cuda" if on_gpu else "cpu").to(kind)
    best = float("inf")
    for _ in range(12):
        begin = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * edge**3 / best


def data_wait(
    size: dict[str, Any], folder: str, step_seconds: float, workers: int
) -> dict[str, float]:
    """Share of a step of this length that the loader of multi-view fields makes it wait."""
    from functools import partial

    import torch
    from omegaconf import OmegaConf

    if str(ROOT / "dinov3_modified") not in sys.path:  # a checkout without an installed package
        sys.path.insert(0, str(ROOT / "dinov3_modified"))

    from dinov3.configs import get_default_config
    from dinov3.data import MaskingGenerator, collate_data_and_cast, make_data_loader, make_dataset
    from dinov3.data.augmentations_multiview import build_multiview_augmentation

    changes = [*overrides(size), "multiview.strategy=multiview", "multiview.photometrics=device"]
    cfg = OmegaConf.merge(get_default_config(), OmegaConf.from_dotlist(changes))
    grid = size["global_px"] // 8
    loader = make_data_loader(
        dataset=make_dataset(
            dataset_str=f"JUMPCellPaintingMultiView:root={folder}:missing=allow",
            transform=build_multiview_augmentation(cfg),
        ),
        batch_size=size["batch"],
        num_workers=workers,
        collate_fn=partial(
            collate_data_and_cast,
            mask_ratio_tuple=(0.1, 0.5),
            mask_probability=0.5,
            dtype=torch.float32,
            n_tokens=grid**2,
            mask_generator=MaskingGenerator((grid, grid), max_num_patches=grid**2 // 2),
        ),
    )
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    waited = []
    for _ in range(20):
        time.sleep(step_seconds)
        begin = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - begin)
    mean = statistics.fmean(waited)
    return {"wait_s": mean, "share": mean / (mean + step_seconds), "workers": workers}


def in_process(arguments: list[str], tree: Path) -> dict[str, Any]:
    """Run this file for one side with its tree in front; its last line is JSON."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(tree), *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="default: gpu where there is one, else cpu"
    )
    parser.add_argument("--upstream", type=Path, help="folder of a DINOv3 checkout")
    parser.add_argument("--fields", help="folder of multi-channel fields")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "ssl_step.json")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.preset is None:
        import torch

        args.preset = "gpu" if torch.cuda.is_available() else "cpu"
    size = PRESETS[args.preset]
    if args.side == "flops":
        print(json.dumps({"flops": count_flops(size)}))
        return
    if args.side:
        print(json.dumps(measure(args.side, size, args.profile)))
        return
    import torch

    trees = {"ours": ROOT / "dinov3_modified"}
    if args.upstream:
        trees["upstream"] = args.upstream.resolve()
    preset = ["--preset", args.preset, *(["--profile"] if args.profile else [])]
    runs: dict[str, list[Any]] = {side: [] for side in trees}
    for _ in range(size["rounds"]):
        for side, tree in trees.items():
            runs[side].append(in_process([*preset, "--side", side], tree))
    flops = in_process([*preset, "--side", "flops"], trees["ours"])["flops"]
    peak = matrix_peak(size["dtype"])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    result: dict[str, Any] = {
        # Where the folders lie on this machine is nobody's business.
        "command": " ".join(
            ["python benchmarks/ssl_step.py", f"--preset {args.preset}"]
            + ["--upstream DIR"] * bool(args.upstream)
            + ["--fields FOLDER"] * bool(args.fields)
        ),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__},
        "sizes": size,
        "flops_per_step": flops,
        "matrix_peak_flops_per_s": peak,
        "runs": runs,
    }
    print(f"{flops / 1e12:.3f} TFLOP a step; matrix products reach {peak / 1e12:.2f} TFLOP/s")
    for side, found in runs.items():
        seconds = [value for run in found for value in run["seconds"]]
        median = statistics.median(seconds)
        line = f"{side:9} {median:.4f} s a step (least {min(seconds):.4f}), "
        line += f"{flops / median / 1e12:.3f} TFLOP/s = {100 * flops / median / peak:.0f} % of that peak"
        if "max_memory_bytes" in found[0]:
            line += f", {found[0]['max_memory_bytes'] / 2**30:.1f} GiB"
        print(line)
        if "profile" in found[0]:
            print(found[0]["profile"])
    if args.fields:
        ours = statistics.median(v for run in runs["ours"] for v in run["seconds"])
        result["data"] = data_wait(size, args.fields, ours, args.workers)
        print(
            f"data: waits {100 * result['data']['share']:.1f} % of a step with {args.workers} workers"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
