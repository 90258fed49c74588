"""`dinocell export` refuses options that do not fit before it begins."""

import pytest

from dinocell.errors import UsageError
from dinocell.export import export_model


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
