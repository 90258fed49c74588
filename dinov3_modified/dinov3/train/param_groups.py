"""Parameter groups with their learning-rate and weight-decay multipliers (matches `dinov3.train.param_groups`).

Layer-wise decay after BEiT (Bao et al. 2022): a block's rate falls by a constant factor per layer
away from the output.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

_WRAPPERS = (
    "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "parametrizations.",
)  # fmt: skip
_INPUT_TOKENS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "storage_tokens")


def get_vit_lr_decay_rate(
    name: str,
    lr_decay_rate: float = 1.0,
    num_layers: int = 12,
    force_is_backbone: bool = False,
    chunked_blocks: bool = False,
) -> float:
    """Rate multiplier of a parameter: `lr_decay_rate` to the power of its distance to the output.

    Args:
        name: dotted name; below "backbone", or of the backbone itself with `force_is_backbone`.
        num_layers: number of blocks L.  Inputs and tokens are layer 0, block i is layer i + 1, all
            else (final norms, heads) is layer L + 1.
        chunked_blocks: names are blocks.CHUNK.INDEX, the block's number is the second.
    """
    layer = num_layers + 1
    if name.startswith("backbone") or force_is_backbone:
        if any(token in name for token in _INPUT_TOKENS):
            layer = 0
        elif "blocks." in name and "residual." not in name:
            numbers = name[name.index("blocks.") :].split(".")
            layer = int(numbers[2 if chunked_blocks else 1]) + 1
    return lr_decay_rate ** (num_layers + 1 - layer)


def remove_fsdp_compile_names(name: str) -> str:
    """A parameter's name without what FSDP, checkpointing and compilation put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def get_params_groups_with_decay(
    model: nn.Module,
    lr_decay_rate: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    dino_head_wd_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """One group a trainable parameter: name, params, is_last_layer, lr_multiplier, wd_multiplier.

    Args:
        lr_decay_rate: per layer, see `get_vit_lr_decay_rate`.
        patch_embed_lr_mult: on top, for the patch embedding.
        dino_head_wd_multiplier: weight decay of parameters with "dino_head" in their name.
    """
    depth = _depth(model)
    groups = []
    for raw_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = remove_fsdp_compile_names(raw_name)
        rate = get_vit_lr_decay_rate(name, lr_decay_rate, **depth)
        decay = dino_head_wd_multiplier if "dino_head" in name else 1.0
        # Biases, norms and LayerScale are not pulled to zero.
        if name.endswith("bias") or any(part in name for part in ("norm", "gamma", "fourier_w")):
            decay = 0.0
        if "patch_embed" in name:
            rate *= patch_embed_lr_mult
        groups.append(
            {
                "name": name,
                "params": parameter,
                "is_last_layer": "last_layer" in name,
                "lr_multiplier": rate,
                "wd_multiplier": decay,
            }
        )
    return groups


# Upstream's name for sharded networks; wrappers are seen through in both.
get_params_groups_with_decay_fsdp = get_params_groups_with_decay


def fuse_params_groups(
    all_params_groups: Iterable[dict[str, Any]],
    keys: tuple[str, ...] = ("lr_multiplier", "wd_multiplier", "is_last_layer"),
) -> list[dict[str, Any]]:
    """Join groups that agree in `keys`, in order of first appearance; "params" becomes a list."""
    fused: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in all_params_groups:
        identity = tuple(group[key] for key in keys)
        joined = fused.setdefault(identity, {"params": [], **{key: group[key] for key in keys}})
        joined["params"].append(group["params"])
    return list(fused.values())


def _depth(model: Any) -> dict[str, Any]:
    """Arguments of `get_vit_lr_decay_rate` on the blocks of a backbone, or of what contains one."""
    if (backbone := getattr(model, "backbone", None)) is not None:
        return _depth(backbone) | {"force_is_backbone": False}
    count = getattr(model, "n_blocks", len(getattr(model, "blocks", ())))
    return {
        "num_layers": int(count),
        "chunked_blocks": bool(getattr(model, "chunked_blocks", False)),
        "force_is_backbone": hasattr(model, "n_blocks") or hasattr(model, "blocks"),
    }
