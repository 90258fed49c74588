"""`dinocell export` refuses options that do not fit before it begins."""

import sys

import pytest

from dinocell.errors import MissingExtraError, UsageError
from dinocell.export import export_model
from dinocell.network.info import describe_bundled
from dinocell.network.model import load_model


def test_without_the_extra_the_fast_model_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[onnx\]'"):
        load_model("dinocell-fast")
    lines = describe_bundled().splitlines()
    assert [line for line in lines if line.startswith("dinocell-fast  ONNX files need the package")]
    assert [line for line in lines if line.startswith("dinocell-cells  convolutions")]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.pt2", {}, "ends in .onnx"),
        ("a.onnx", {"to": "torch"}, "ends in .pt2"),
        ("a.onnx", {"to": "tensorflow"}, "`to` must be"),
        ("a.onnx", {"precision": "int4"}, "`precision` must be"),
        ("a.pt2", {"to": "torch", "precision": "int8"}, "`precision` must be one of fp32, fp16"),
        ("a.onnx", {"to": "bioimageio"}, "ends in .zip"),
        ("a.zip", {"to": "bioimageio", "precision": "fp16"}, "must be one of fp32 for bioimageio"),
        ("a.onnx", {"precision": "int8"}, "`images` must be given"),
        ("a.onnx", {"images": "."}, "only there"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, options, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        export_model("dinocell-cells", tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []
