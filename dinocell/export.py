"""A model as a graph for other programs: ONNX, and the program of `torch.export`.

The graph takes normalised windows and gives their distance maps and what tells kinds of images apart,
so that a model from an ONNX file gives all that `segment` reports.  It carries the header of the model
file (architecture, thresholds, licence, training data, statistics) and the SHA-256 of the weights.
"""

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dinocell.errors import UsageError
from dinocell.files import require_writable, saying_what_failed, write_text_atomically, writing
from dinocell.io import search_images
from dinocell.io.optional import library
from dinocell.model_zoo import package
from dinocell.network.config import IMAGENET_MEAN, IMAGENET_STD
from dinocell.network.model import HEADER_KEY, DINOCell, header_text, load_trainable, model_path
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.rescale import resample, rescaled_shape

PRECISIONS = ("fp32", "fp16", "int8")
ENDINGS = {"onnx": ".onnx", "torch": ".pt2", "bioimageio": ".zip"}
_OPSET = 18  # onnxruntime reads it since 1.14, OpenVINO since 2023.0
_MOST_PATCHES = 512  # edge of the largest window, in patches
_WINDOWS = 100  # that int8 is calibrated with, at most
_Windows = Iterable[NDArray[np.float32]]


class Graph(nn.Module):
    """What is exported of a model: in eval mode, on the CPU.  `half` computes in float16."""

    def __init__(self, model: DINOCell, *, half: bool = False) -> None:
        super().__init__()
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.model = model.half() if half else model
        self.dtype = torch.float16 if half else torch.float32

    def forward(self, gray: Tensor) -> tuple[Tensor, Tensor]:
        """Map and features of windows.

        `gray`: (B, 1, H, W) float32 in [0, 1]; H and W are multiples of the patch size p, 2 p at least.

        Returns the distance map (B, 1, H, W) in [0, 1], and features (B, D, H / p, W / p): those of finer
        strides are averaged over the patches.
        """
        image = torch.cat(
            [(gray - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)],
            dim=1,
        )
        maps, features = self.model.map_and_features(image.to(self.dtype))
        last = len(features) - 1  # each level has half the stride of the next
        pooled = [
            functional.avg_pool2d(level.float(), 2 ** (last - index))
            if index < last
            else level.float()
            for index, level in enumerate(features)
        ]
        return maps.float(), torch.cat(pooled, dim=1)


def export_model(
    name: str | Path,
    out: str | os.PathLike[str],
    *,
    to: str = "onnx",
    precision: str = "fp32",
    images: str | os.PathLike[str] | None = None,
    channels: Sequence[int | str] | None = None,
) -> str:
    """Write the graph of a model, and beside it `OUT.sha256`, which `sha256sum -c` reads.

    Parameters
    ----------
    name : bundled name or model file
    out : file that does not exist yet, ending in .onnx, .pt2 or .zip
    to : `onnx`; `torch`: the program of `torch.export`, which loads without DINOCell; or `bioimageio`: a
        package of the BioImage Model Zoo with the ONNX graph
    precision : `fp32`, `fp16`, or for ONNX `int8`: weights (by channel) and activations in 8 bit
    images : for `int8`: folder of images like those that will be segmented, from which the ranges of the
        activations come
    channels : names or positions of the channels of these images; several are averaged

    Returns what was written, in one line.  Raises UsageError (an option or a file does not fit);
    CheckpointError (no model file); ImageFileError (an image cannot be read); MissingExtraError (the
    extra `onnx` is not installed).
    """
    path = Path(out)
    _check(path, to, precision, images, channels)
    model = load_trainable(name)
    model.card |= {"name": path.stem, "exported_from": model.card.get("name") or Path(name).name}
    windows = [] if images is None else list(calibration_windows(model, images, channels))
    require_writable("out", path)
    digest = hashlib.sha256(model_path(name).read_bytes()).hexdigest()
    header = header_text(model, source_sha256=digest)
    graph = Graph(model, half=precision == "fp16").eval()
    with writing(path) as temporary:
        if to == "torch":
            program = torch.export.export(graph, (_example(model),), dynamic_shapes=_shapes(model))
            for node in program.graph.nodes:  # where it was made: paths of this machine
                node.meta.pop("stack_trace", None)
            # torch refuses a name that does not end in .pt2
            with tempfile.TemporaryDirectory() as folder:
                whole = Path(folder, "model.pt2")
                torch.export.save(program, whole, extra_files={HEADER_KEY: header})
                temporary.write_bytes(whole.read_bytes())
        else:
            content = _onnx(graph, header, windows)
            if to == "bioimageio":
                content = package(graph, model, content, _OPSET, header)
            temporary.write_bytes(content)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        megabytes = temporary.stat().st_size / 1e6
    beside = path.with_name(f"{path.name}.sha256")
    with saying_what_failed(beside):
        write_text_atomically(beside, f"{digest}  {path.name}\n")
    return f"{path}: {to}, {precision}, {megabytes:.1f} MB, SHA-256 {digest}"


def _check(path: Path, to: str, precision: str, images: object, channels: object) -> None:
    if to not in ENDINGS:
        raise UsageError(f"`to` must be one of {', '.join(ENDINGS)}, got {to}: choose one of these")
    known = {"onnx": PRECISIONS, "torch": PRECISIONS[:2]}.get(to, PRECISIONS[:1])
    if precision not in known:
        raise UsageError(
            f"`precision` must be one of {', '.join(known)} for {to}, got {precision}: choose one of these"
        )
    if path.suffix != ENDINGS[to] or os.path.exists(path):
        raise UsageError(
            f"`out` must be a new file that ends in {ENDINGS[to]}, got {path}: choose another name"
        )
    if (precision == "int8") != (images is not None):
        raise UsageError(
            f"`images` must be given for int8, and only there, got {images} for {precision}: name a folder of "
            "images like those that will be segmented, or leave it out"
        )
    if channels is not None and images is None:
        raise UsageError(
            f"`channels` must come with `images`, got {channels} for {precision}: leave it out"
        )


def calibration_windows(
    model: DINOCell,
    images: str | os.PathLike[str],
    channels: Sequence[int | str] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Up to 100 windows (1, 1, H, W) in [0, 1] as `segment` would show them, two of each image."""
    pipeline, side = DINOCellPipeline(model), model.config.window_px
    paths = search_images([os.fspath(images)]).paths
    for path in paths[:: -(-2 * len(paths) // _WINDOWS)]:
        loaded = pipeline.load(path, channels=channels)
        gray = loaded.intensity.apply(loaded.plane)
        if loaded.rescale != 1:
            seen = np.empty(rescaled_shape(gray.shape, loaded.rescale), np.float32)
            resample(gray, seen)
            gray = seen.clip(0.0, 1.0)
        gray = np.pad(gray, [(0, max(0, side - size)) for size in gray.shape], mode="symmetric")
        for place in (0.25, 0.75):
            top, left = (int(place * (size - side)) for size in gray.shape)
            yield np.ascontiguousarray(gray[top : top + side, left : left + side])[None, None]


def _example(model: DINOCell) -> Tensor:
    patch = model.config.patch_size
    return torch.zeros(2, 1, 3 * patch, 4 * patch)


def _shapes(model: DINOCell) -> Any:
    """Any number of windows, of any size in whole patches, two at least."""
    patch = model.config.patch_size
    rows, columns = (
        torch.export.Dim(side, min=2, max=_MOST_PATCHES) for side in ("rows", "columns")
    )
    return ({0: torch.export.Dim("batch", min=1), 2: patch * rows, 3: patch * columns},)


def _onnx(graph: Graph, header: str, windows: list[NDArray[np.float32]]) -> bytes:
    """The file; in 8 bit if there are windows to calibrate with."""
    onnx = library("onnx", "ONNX files", "onnx")
    library("onnxscript", "ONNX files", "onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells that torchvision is missing
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch by torch
        program = torch.onnx.export(
            graph,
            (_example(graph.model),),
            dynamo=True,
            dynamic_shapes=_shapes(graph.model),
            input_names=["gray"],
            output_names=["map", "features"],
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    proto = _quantized(program.model_proto, windows) if windows else program.model_proto
    forget_source_lines(proto)
    onnx.helper.set_model_props(proto, {HEADER_KEY: header})
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def forget_source_lines(proto: Any) -> None:
    """Remove from an ONNX model where in the program each node was made: these are paths of this machine."""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep back the advice of onnxruntime to change a graph before it is quantized: it is for developers."""

    def is_no_advice(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_no_advice)
    try:
        yield
    finally:
        root.removeFilter(is_no_advice)


def _quantized(proto: Any, windows: list[NDArray[np.float32]]) -> Any:
    """The graph with convolutions and matrix products in 8 bit, in the form of QDQ nodes."""
    onnx = library("onnx", "ONNX files", "onnx")
    library("onnxruntime", "ONNX files", "onnx")
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(windows)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            window = next(self.left, None)
            return None if window is None else {"gray": window}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        onnx.save(proto, source)
        with _without_advice():
            quantize_static(
                source,
                target,
                Reader(),
                per_channel=True,
                reduce_range=True,  # processors without VNNI add pairs in 16 bit, which 8-bit weights overflow
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            )
        return onnx.load(target)
