"""Signs of collapse, and how much a step changes the weights (ours).

The figures come from tensors that a step has anyway, or from one forward pass of the teacher on a
few images; what is expensive is cut to `monitor.max_rows` rows.  What each figure says, and its
healthy range, is in docs/monitoring.md.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger("dinov3")

_TINY = 1e-30
_ATTENTION_IMAGES = 4


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values (RankMe, Garrido et al. 2023, eq. 1).

    `features`: [M, D], as they are: not centred, not normalised.  Returns from 1 (all rows on a
    line) to min(M, D); 0 when all are 0, NaN when one is not finite.
    """
    rows = features.detach().cpu().double()
    # Roots of the smaller Gram matrix's eigenvalues.  They are wrong by 1e-8 of the largest, which
    # float64 makes less than the rounding of the features, at a tenth of a decomposition's time.
    gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    if not torch.isfinite(gram).all():
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-(shares * torch.log(shares.clamp_min(_TINY))).sum()))


def feature_std(features: Tensor) -> float:
    """Mean standard deviation per dimension of L2-normalised rows [M, D].

    1/sqrt(D) for rows spread evenly over the sphere, 0 for equal ones (SimSiam, Chen and He 2021,
    section 4.1).
    """
    unit = nn.functional.normalize(features.detach().double(), dim=-1)
    return float(unit.std(dim=0, unbiased=False).mean())


def feature_spread(features: Tensor) -> float:
    """`feature_std` times sqrt(D): 1 for rows [M, D] spread evenly, 0 for equal ones."""
    return feature_std(features) * math.sqrt(features.shape[1])


@torch.no_grad()
def module_statistics(
    modules: Mapping[str, nn.Module] | nn.ModuleDict,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    per_block: bool = True,
) -> dict[str, Tensor]:
    """Weight norm, gradient norm and relative size of the last update, part by part.

    The update is worked out from AdamW's own state (Loshchilov and Hutter 2019, algorithm 2), so
    that no copy of the weights is needed.  With sharded weights all processes must call this.

    Args:
        modules: such as the student: backbone, dino_head, ibot_head.
        optimizer: for the updates, after its step and before its rates change; None, or one that
            is not AdamW: no updates.
        per_block: divide modules into their parts (patch embedding, tokens, each block, ...).

    Returns `weight_norm/PART`, `grad_norm/PART` (as the optimiser saw them, hence after clipping)
    and `update_ratio/PART`, the norm of the update over that of the weights; 0-dim tensors on the
    device.  Parts without gradient have the first only.
    """
    parts = _parts(modules, per_block)
    weights = _norms({part: _locals(params) for part, params in parts.items()}, parts)
    found = {f"weight_norm/{part}": norm for part, norm in weights.items()}
    grads = {part: [p.grad for p in params if p.grad is not None] for part, params in parts.items()}
    grads = {part: given for part, given in grads.items() if given}
    for part, norm in _norms({k: _locals(v) for k, v in grads.items()}, grads).items():
        found[f"grad_norm/{part}"] = norm
    if isinstance(optimizer, torch.optim.AdamW):
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        sums, owners = {}, {}
        for part, params in parts.items():
            moved = [p for p in params if "exp_avg" in optimizer.state.get(p, {})]
            if moved:
                owners[part] = moved
                sums[part] = torch.stack(
                    [
                        _adamw_update_norm(p, optimizer.state[p], groups[id(p)]).square()
                        for p in moved
                    ]
                ).sum()
        for part, norm in _finish_norms(sums, owners).items():
            found[f"update_ratio/{part}"] = norm / weights[part].clamp_min(_TINY)
    return found


class CollapseMonitor:
    """Figures of the features at intervals, with a warning where they look collapsed.

    Several processes each look at their own images.

    `cfg`: a configuration; reads its `monitor` section, the number of prototypes and the teacher's
    temperature.  Raises ValueError (a setting of the `monitor` section is out of range).
    """

    def __init__(self, cfg: Any) -> None:
        self.settings = cfg.monitor
        if self.settings.max_rows < 2:
            raise ValueError(
                f"`monitor.max_rows` must be at least 2, got {self.settings.max_rows}: 1024 is usual"
            )
        self.flat_loss = math.log(cfg.dino.head_n_prototypes)
        self.teacher_temp = float(cfg.teacher.teacher_temp)
        self._warned: set[str] = set()

    def is_due(self, iteration: int) -> bool:
        """Whether this iteration is measured."""
        period = self.settings.period_iterations
        return bool(self.settings.enabled) and period > 0 and iteration % period == 0

    @torch.no_grad()
    def measure(
        self, vit: nn.Module, images: Tensor, head: nn.Module | None = None
    ) -> dict[str, float]:
        """Figures from a forward pass of a network in eval mode, as monitor/NAME.

        `images`: [B, 3, H, W]; at most `monitor.images` of them are looked at.  `head`: also the
        statistics of its assignments, by softmax at `teacher.teacher_temp`.
        """
        images = images[: self.settings.images]
        look: Any = getattr(vit, "get_last_selfattention", None)
        with _without_compilation(vit):
            out = vit(images, is_training=True)
            cls = out["x_norm_clstoken"]
            figures = self.feature_figures("cls", cls)
            figures |= self.feature_figures("patch", out["x_norm_patchtokens"])
            if head is not None:
                logits = head(cls).float() / self.teacher_temp
                figures |= assignment_figures(logits.softmax(dim=-1))
            if look is not None:
                figures |= attention_figures(look(images[:_ATTENTION_IMAGES]))
        return {f"monitor/{name}": value for name, value in figures.items()}

    def feature_figures(self, name: str, features: Tensor) -> dict[str, float]:
        """Spread and rank of at most `monitor.max_rows` rows, evenly spaced, of features [..., D]."""
        rows = features.flatten(0, -2)
        limit = int(self.settings.max_rows)
        if rows.shape[0] > limit:
            rows = rows[torch.arange(limit, device=rows.device) * rows.shape[0] // limit]
        rows = rows.float().cpu()
        return {
            f"{name}_std": feature_std(rows),
            f"{name}_spread": feature_spread(rows),
            f"{name}_effective_rank": effective_rank(rows),
        }

    def check(
        self, figures: Mapping[str, float], iteration: int, dino_loss: float | None = None
    ) -> list[str]:
        """Warn of what looks collapsed, once until it has been well again; returns the signs.

        `figures`: of `measure`, or of `module_statistics` with monitor/ before.
        `dino_loss`: of the global crops; log K is the loss of even assignments.
        """
        settings = self.settings
        if iteration < settings.warn_after:
            return []
        signs: dict[str, str] = {}
        for name, key, what in (
            ("cls_effective_rank", "min_effective_rank", "the effective rank of CLS features"),
            ("cls_spread", "min_spread", "the spread of CLS features"),
            ("prototypes_used", "min_prototypes_used", "the share of prototypes in use"),
        ):
            value, limit = figures.get(f"monitor/{name}"), settings[key]
            if value is not None and limit is not None and not value >= limit:
                signs[name] = f"{what} is {value:.4g}, below monitor.{key} {limit}"
        limit = settings.max_update_ratio
        for name, value in figures.items():
            part = name.removeprefix("monitor/update_ratio/")
            if part != name and limit is not None and not value <= limit:
                signs[name] = (
                    f"a step changes {part} by {value:.2g} of its norm, above "
                    f"monitor.max_update_ratio {limit}: lower optim.lr"
                )
        margin = settings.flat_loss_margin
        near = math.inf if dino_loss is None else abs(dino_loss - self.flat_loss)
        if margin is not None and near <= margin * self.flat_loss:
            signs["flat_loss"] = (
                f"the DINO loss {dino_loss:.4f} is that of even assignments, log K = "
                f"{self.flat_loss:.4f}: nothing is learned"
            )
        for name, text in signs.items():
            if name not in self._warned:
                logger.warning("Iteration %d: %s (docs/monitoring.md)", iteration, text)
        self._warned = set(signs)
        return list(signs)


def assignment_figures(probabilities: Tensor) -> dict[str, float]:
    """How soft assignments [..., K], whose rows sum to 1, use the K prototypes: three shares.

    `prototype_entropy`: entropy of the mean row over log K; 1 when all prototypes are used alike.
    `assignment_entropy`: mean entropy of a row over log K; 1 when each row is undecided.
    `prototypes_used`: prototypes that are the first of some row, over min(M, K) of M rows.
    """
    rows = probabilities.flatten(0, -2).float()  # [M, K]
    count, prototypes = rows.shape
    mean = rows.sum(dim=0).double() / count
    entropy = -(rows * rows.clamp_min(_TINY).log()).sum().double()
    scale = math.log(prototypes)
    return {
        "prototype_entropy": float(-(mean * mean.clamp_min(_TINY).log()).sum() / scale),
        "assignment_entropy": float(entropy / count / scale),
        "prototypes_used": len(rows.argmax(dim=1).unique()) / min(count, prototypes),
    }


def attention_figures(attention: Tensor) -> dict[str, float]:
    """Entropy of the CLS row over log T, of attention [B, heads, T, T]: its mean, and over heads."""
    cls = attention[:, :, 0].float()
    entropies = -(cls * cls.clamp_min(_TINY).log()).sum(dim=-1)
    entropies = (entropies / math.log(cls.shape[-1])).cpu()  # [B, heads]
    by_head = entropies.mean(dim=0)
    return {
        "attention_entropy": float(entropies.mean()),
        "attention_entropy_min": float(by_head.min()),
        "attention_entropy_max": float(by_head.max()),
    }


def _parts(
    modules: Mapping[str, nn.Module] | nn.ModuleDict, per_block: bool
) -> dict[str, list[nn.Parameter]]:
    parts: dict[str, list[nn.Parameter]] = {}
    for name, module in modules.items():
        for path, param in module.named_parameters():
            parts.setdefault(_part_of(name, path) if per_block else name, []).append(param)
    return parts


def _part_of(module: str, path: str) -> str:
    """backbone + blocks.3.attn.qkv.weight → backbone.blocks.3; + cls_token → backbone.tokens."""
    # Wrappers of compilation and checkpointing put names of their own between.
    names = [n for n in path.split(".") if n not in ("_orig_mod", "_checkpoint_wrapped_module")]
    if len(names) == 1:
        return f"{module}.tokens"
    depth = 2 if names[0] == "blocks" else 1
    return ".".join([module, *names[:depth]])


def _locals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's own shards of tensors that are sharded."""
    return [_local(tensor.detach()) for tensor in tensors]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _norms(
    tensors: Mapping[str, list[Tensor]], owners: Mapping[str, Iterable[Tensor]]
) -> dict[str, Tensor]:
    """L2 norm of each list; whole where the owners are sharded."""
    sums = {}
    for name, group in tensors.items():
        norms = torch._foreach_norm([tensor.float() for tensor in group])
        sums[name] = torch.stack(list(norms)).square().sum()
    return _finish_norms(sums, owners)


def _finish_norms(
    sums: Mapping[str, Tensor], owners: Mapping[str, Iterable[Tensor]]
) -> dict[str, Tensor]:
    if not sums:
        return {}
    squares = torch.stack(list(sums.values()))
    sharded = torch.tensor(
        [any(hasattr(owner, "to_local") for owner in owners[name]) for name in sums]
    )
    if sharded.any() and dist.is_initialized():
        whole = squares.clone()
        dist.all_reduce(whole)
        squares = torch.where(sharded.to(squares.device), whole, squares)
    return dict(zip(sums, squares.sqrt(), strict=True))


def _adamw_update_norm(param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """L2 norm of the last change of a parameter (of this process's shard).

    AdamW scales the weights w by 1 - decay and then subtracts m, so that the change in terms of the
    new weights is -(m + decay * w_new) / (1 - decay).
    """
    beta1, beta2 = group["betas"]
    weights = _local(param.detach())
    step = state["step"]
    denominator = _local(state["exp_avg_sq"]) / (1 - beta2**step).to(weights.device)
    denominator.sqrt_().add_(group["eps"])
    change = _local(state["exp_avg"]) / denominator
    change.mul_(group["lr"] / (1 - beta1**step).to(weights.device))
    decay = group["lr"] * group["weight_decay"]
    change.add_(weights, alpha=decay)
    return torch.linalg.vector_norm(change) / (1 - decay)


@contextlib.contextmanager
def _without_compilation(module: nn.Module) -> Any:
    """Compiled parts run as written: another batch size would compile them again."""
    if not any(getattr(part, "_compiled_call_impl", None) for part in module.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
