"""Damaged model files: a model or one sentence of `DINOCellError`."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinocell.cli import main
from dinocell.errors import CheckpointError, DINOCellError
from dinocell.network.config import DECODERS
from dinocell.network.info import describe_model
from dinocell.network.model import (
    create_dinocell_model,
    load_model,
    load_trainable,
    read_model_header,
    save_model,
)
from dinocell.network.weights import convert_weights
from dinocell.probing.backbones import load_backbone_of

WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from([[], {}, [1], {"a": 1}, 0, -1, 2**31, 2**63, 10**30, 0.5, 1e308]),
    st.just(float("nan")),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mini_model):
    """Keys and values of the start of a model file, DINOCell's header, and the bytes of the weights."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_model(path, mini_model)
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    start = json.loads(content[8:end])
    return start, json.loads(start["__metadata__"]["dinocell"]), content[end:]


def write(path, whole, text: str):
    """A model file with another header of DINOCell."""
    start, _, weights = whole
    content = json.dumps(start | {"__metadata__": {"dinocell": text}}).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + weights)
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"card": 1}, "must hold keys and values, also its card"),
        ({"card": "x"}, "must hold keys and values, also its card"),
        ({"model": {"image_channels": 2**63}}, "image_channels` must be between 0 and 1024"),
        ({"model": {"image_channels": 2**31}}, "image_channels` must be between 0 and 1024"),
        ({"model": []}, "known architecture"),
        ({"format": []}, "must have format 1"),
    ],
)
def test_values_that_fuzzing_found(whole, tmp_path, change, sentence):
    header = whole[1] | change
    if isinstance(change.get("model"), dict):
        header["model"] = whole[1]["model"] | change["model"]
    path = write(tmp_path / "m.safetensors", whole, json.dumps(header))
    with pytest.raises(CheckpointError, match=sentence):
        load_model(path)


# Of "[" and "9" Python has too many: RecursionError, ValueError.
@pytest.mark.parametrize("text", ["7", "[]", "null", '"x"', "{", "[" * 100_000, "9" * 5000])
def test_headers_that_hold_no_keys(whole, tmp_path, text):
    with pytest.raises(CheckpointError, match="header of a model file"):
        read_model_header(write(tmp_path / "m.safetensors", whole, text))


def test_headers_with_other_values(whole, tmp_path):
    header = whole[1]
    keys = [(key,) for key in header] + [("model", key) for key in header["model"]]

    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.dictionaries(st.sampled_from(keys), WEIRD, min_size=1, max_size=2))
    def run(changes) -> None:
        changed = json.loads(json.dumps(header))
        for key, value in sorted(changes.items(), key=lambda item: -len(item[0])):
            if len(key) == 1:
                changed[key[0]] = value
            else:
                changed["model"][key[1]] = value
        path = write(tmp_path / "m.safetensors", whole, json.dumps(changed))
        sentences = ["none"]
        try:
            load_model(path)
        except DINOCellError as error:
            sentences = str(error).splitlines()
        assert len(sentences) == 1

    run()


# --- zeros in place of weights, as behind the end of a download ---


def zeroed(path, model, *names: str):
    state = model.state_dict()
    with torch.no_grad():
        saved = {name: state[name].clone() for name in names}
        for name in names:
            state[name].zero_()
        save_model(path, model)
        for name, value in saved.items():
            state[name].copy_(value)
    return path


@pytest.mark.parametrize("part", ["backbone.vit.blocks.1.mlp.fc2.weight", "decoder.head.weight"])
def test_zeros_in_place_of_weights(mini_model, tmp_path, capsys, part):
    """The same sentence at each door, those that want the backbone alone too."""
    path = zeroed(tmp_path / "m.safetensors", mini_model, part)
    sentence = (
        f"Weights must have been trained, got zeros in {part} of {path}: the download was cut short, or "
        "the file was never filled; fetch it again"
    )
    for read in (
        load_model,
        load_trainable,
        describe_model,
        load_backbone_of,
        lambda name: load_backbone_of(name, patch_size=8),
        lambda name: convert_weights(name, tmp_path / "b.pth"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read(str(path))
        assert str(caught.value) == sentence
    with pytest.raises(SystemExit) as stop:
        main(["weights", "info", str(path)])
    assert stop.value.code not in (0, None)
    assert capsys.readouterr().err.strip().endswith(sentence)


def test_zeros_of_many_weights_are_not_all_listed(mini_model, tmp_path):
    names = [n for n, v in mini_model.state_dict().items() if n.endswith(".weight") and v.ndim > 1]
    assert len(names) > 8
    with pytest.raises(CheckpointError, match=rf"got zeros in .*, \.\.\. \({len(names)}\) of "):
        load_model(zeroed(tmp_path / "m.safetensors", mini_model, *names))


@pytest.mark.parametrize(
    ("size", "patch_size", "decoder"),
    [("conv", 16, "detail"), ("conv", 16, "fpn"), *(("tiny", 16, name) for name in DECODERS)],
)
def test_zeros_that_may_be(tmp_path, size, patch_size, decoder):
    """A model without training; and one whose biases, norms, scales and mask token are zero."""
    model = create_dinocell_model(size, patch_size=patch_size, decoder=decoder)
    path = tmp_path / "m.safetensors"
    state = model.state_dict()
    may_be = [
        n for n, v in state.items() if v.ndim < 2 and not n.endswith((".periods", ".bias_mask"))
    ]
    may_be += [name for name in state if name.endswith("mask_token")]
    for names in ((), may_be):
        zeroed(path, model, *names)
        found = load_model(path).state_dict()
        assert found.keys() == state.keys()
        assert all(not found[name].any() for name in names)
