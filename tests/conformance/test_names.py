"""Names, configuration, networks and dataset strings of a tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

# Everything of the mirrored modules that DINOCell calls, with the parameters that it gives.
WANTED = {
    "models": {"build_model": ["args", "only_teacher", "device"]},
    "models.vision_transformer": {
        "DinoVisionTransformer": [
            "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "ffn_ratio",
            "qkv_bias", "layerscale_init", "norm_layer", "ffn_layer", "ffn_bias", "proj_bias",
            "n_storage_tokens", "mask_k_bias", "pos_embed_rope_base", "pos_embed_rope_dtype",
            "pos_embed_rope_rescale_coords", "untie_cls_and_patch_norms", "device",
        ],
        "DinoVisionTransformer.get_intermediate_layers": [
            "self", "x", "n", "reshape", "return_class_token", "return_extra_tokens", "norm",
        ],
        "DinoVisionTransformer.forward_features": ["self", "x", "masks"],
        "DinoVisionTransformer.init_weights": ["self"],
        "vit_small": ["patch_size"],
    },
    "layers.dino_head": {"DINOHead": ["in_dim", "out_dim", "hidden_dim", "bottleneck_dim", "nlayers"]},
    "loss": {
        "DINOLoss": ["out_dim"],
        "iBOTPatchLoss": ["patch_out_dim"],
        "KoLeoLoss": [],
        "GramLoss": [],
    },
    "configs": {
        "get_default_config": [],
        "setup_config": ["args", "strict_cfg"],
        "setup_job": ["output_dir", "seed"],
    },
    "distributed": {"get_rank": [], "get_world_size": [], "is_main_process": [], "enable": []},
    "checkpointer": {
        "save_checkpoint": ["ckpt_dir", "iteration", "model", "optimizer", "overwrite"],
        "load_checkpoint": ["ckpt_dir", "model", "optimizer", "strict_loading"],
        "find_latest_checkpoint": ["ckpt_dir"],
        "init_fsdp_model_from_checkpoint": ["model", "checkpoint_path", "process_group"],
    },
    "checkpointer.checkpointer": {
        "init_model_from_checkpoint_for_evals": ["model", "pretrained_weights", "checkpoint_key"],
    },
    "data": {
        "make_dataset": ["dataset_str", "transform", "target_transform"],
        "make_data_loader": [
            "dataset", "batch_size", "num_workers", "shuffle", "seed", "sampler_type",
            "sampler_advance", "drop_last", "collate_fn",
        ],
        "collate_data_and_cast": ["mask_ratio_tuple", "mask_probability", "dtype", "n_tokens"],
        "MaskingGenerator": ["input_size", "max_num_patches"],
        "DataAugmentationDINO": ["global_crops_scale", "local_crops_scale", "local_crops_number"],
    },
    "train.train": {
        "do_train": ["cfg", "model", "resume"],
        "do_test": ["cfg", "model", "iteration", "process_group"],
        "build_data_loader_from_cfg": ["cfg", "model", "start_iter"],
        "main": ["argv"],
    },
    "train.ssl_meta_arch": {
        "SSLMetaArch.forward_backward": ["self", "data", "teacher_temp"],
        "SSLMetaArch.update_ema": ["self"],
        "SSLMetaArch.get_params_groups": ["self"],
        "SSLMetaArch.build_data_augmentation_dino": ["self", "cfg"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def found(ask, given):
    folder = given()
    wanted = {module: list(names) for module, names in WANTED.items()}
    (folder / "wanted.json").write_text(json.dumps(wanted))
    return ask("names", folder)


@pytest.mark.parametrize("module", WANTED)
def test_names_and_parameters(found, module):
    if module in found:
        pytest.skip(f"dinov3.{module} cannot be imported here: {found[module]}")
    for name, parameters in WANTED[module].items():
        has = found[f"{module}.{name}"]
        assert has is not None, f"dinov3.{module}.{name} must exist"
        free = {"kwargs", "ignored_kwargs"} & set(has)
        missing = [parameter for parameter in parameters if parameter not in has]
        assert not missing or free, f"dinov3.{module}.{name} must take {missing}, has {has}"


@pytest.fixture(scope="module")
def configurations(ask, ask_bundled, given):
    """Leaves of the default configuration of the tree, and of the bundled one."""
    return ask("config", given()), ask_bundled("config", given())


def test_configuration_has_the_keys(configurations):
    theirs, ours = configurations
    wanted = set()
    for path in sorted((ROOT / "configs" / "ssl").glob("*.yaml")):
        wanted |= {key for key in _leaves(yaml.safe_load(path.read_text())) if key in ours}
    assert wanted, "the configurations of the project set keys of upstream's"
    assert sorted(wanted - set(theirs)) == [], "keys that configs/ssl sets must exist"


def test_configuration_defaults(configurations):
    theirs, ours = configurations
    changed = {
        key: (ours[key], theirs[key])
        for key in ours.keys() & theirs.keys()
        if ours[key] != theirs[key] and key != "checkpointing.period"
    }
    assert changed == {}, "defaults must be those that the project was measured with"


def _leaves(section, prefix=""):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_networks_have_the_keys_and_shapes(ask, ask_bundled, given):
    theirs, ours = ask("shapes", given()), ask_bundled("shapes", given())
    assert theirs == ours


STRINGS = {
    "JUMPCellPainting:root=a": "JUMPCellPainting",
    "JUMPCellPaintingMultiView:root=a:channels=DNA+ER:cache_mb=7": "JUMPCellPaintingMultiView",
    "JUMPS3MultiView:index=a:visits=4": "JUMPS3MultiView",
    "ImageFolder:root=a": "ImageFolder",
    "ImageNet:split=TRAIN:root=a:extra=b": "ImageNet",
}


def test_dataset_strings(ask, given):
    folder = given()
    wrong = ["JUMPS3MultiView:index=a:visit=4", "Nothing:root=a"]
    (folder / "strings.json").write_text(json.dumps([*STRINGS, *wrong]))
    found = ask("datasets", folder)
    assert {text: found[text][0] for text in STRINGS} == STRINGS
    assert found["JUMPCellPaintingMultiView:root=a:channels=DNA+ER:cache_mb=7"][1] == {
        "root": "a",
        "channels": "DNA+ER",
        "cache_mb": "7",
    }
    assert "Keys of JUMPS3MultiView must be among" in found[wrong[0]]
    assert found[wrong[1]].startswith("ValueError")
