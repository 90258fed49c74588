"""A model as a package of the BioImage Model Zoo (bioimage.io, format 0.5): a zip that its programs open."""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dinocell.network.config import ModelConfig
from dinocell.network.model import DINOCell

_FORMAT = "0.5.4"
_EPSILON = 1e-6  # of their operation `scale_range`
_DATE = (1980, 1, 1, 0, 0, 0)  # the first of a zip: the same model gives the same bytes
# Programs of the zoo show a reference; this is the one for the training data of all bundled models.
_CITED = {
    "text": "Caicedo et al. 2019, Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl",
    "doi": "10.1038/s41592-019-0612-7",
}
_SPDX = {"CC0": "CC0-1.0", "MIT": "MIT", "CC BY 4.0": "CC-BY-4.0"}
_SIDE = 256  # of the test image in px, rounded to patches


def package(
    graph: torch.nn.Module, model: DINOCell, onnx_file: bytes, opset: int, header: str
) -> bytes:
    """The zip: description, graph, test tensors, cover and README.

    `graph` (see `dinocell.export.Graph`) gives the expected outputs of the test image; `onnx_file` is
    the same graph as a file; `header`: the JSON that it carries.
    """
    from dinocell.io import read_image
    from dinocell.results.pictures import overlay_panel

    config = model.config
    side = _SIDE // config.patch_size * config.patch_size
    sample = Path(__file__).parent / "samples" / "nuclei.png"
    pixels = read_image(sample).pixels[:side, :side].astype(np.float32)
    low, high = np.percentile(pixels, (config.low_percentile, config.high_percentile))
    gray = np.clip((pixels - low) / (high - low + _EPSILON), 0, 1).astype(np.float32)
    with torch.inference_mode():
        maps, features = graph(torch.from_numpy(gray)[None, None])
    labels = _labels(maps[0, 0].numpy(), config)
    files = {
        "rdf.yaml": yaml.safe_dump(
            _description(model, features.shape[1], opset, header),
            sort_keys=False,
            allow_unicode=True,
        ).encode(),
        "weights.onnx": onnx_file,
        "test_input.npy": _npy(pixels[None, None]),
        "test_map.npy": _npy(maps.numpy()),
        "test_features.npy": _npy(features.numpy()),
        "cover.png": _png(overlay_panel(pixels, labels)),
        "README.md": _readme(model).encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _labels(distance_map: Any, config: ModelConfig) -> Any:
    from dinocell.segmentation.thresholds import Thresholds
    from dinocell.segmentation.watershed import separate_cells

    return separate_cells(distance_map, Thresholds.of(config))


def _png(rgb: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=np.float32))
    return buffer.getvalue()


def _description(model: DINOCell, num_features: int, opset: int, header: str) -> dict[str, Any]:
    config, card = model.config, model.card
    patch = config.patch_size

    def space(axis: str, size: Any, **more: Any) -> dict[str, Any]:
        return {"type": "space", "id": axis, "size": size} | more

    def of_input(scale: float = 1.0) -> list[dict[str, Any]]:
        return [
            space(axis, {"tensor_id": "gray", "axis_id": axis, "offset": 0}, scale=scale)
            for axis in ("y", "x")
        ]

    return {
        "type": "model",
        "format_version": _FORMAT,
        "name": f"{card.get('name') or 'model'} (DINOCell)",  # theirs have five characters at least
        "description": str(card.get("description") or "Distance maps of cells."),
        "authors": [{"name": "the authors of DINOCell"}],
        "cite": [_CITED],
        **_licence(card),
        "documentation": "README.md",
        "covers": ["cover.png"],
        "tags": ["cells", "nuclei", "instance-segmentation", "2d"],
        "inputs": [
            {
                "id": "gray",
                "description": "gray image",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["intensity"]},
                    *(space(axis, {"min": 2 * patch, "step": patch}) for axis in ("y", "x")),
                ],
                "data": {"type": "float32"},
                "preprocessing": [
                    {
                        "id": "scale_range",
                        "kwargs": {
                            "axes": ["y", "x"],
                            "min_percentile": config.low_percentile,
                            "max_percentile": config.high_percentile,
                            "eps": _EPSILON,
                        },
                    },
                    {"id": "clip", "kwargs": {"min": 0.0, "max": 1.0}},
                ],
                "test_tensor": {"source": "test_input.npy"},
            }
        ],
        "outputs": [
            {
                "id": "map",
                "description": "distance map: how deep a pixel lies in its cell",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["depth"]},
                    *of_input(),
                ],
                "data": {"type": "float32", "range": [0.0, 1.0]},
                "test_tensor": {"source": "test_map.npy"},
            },
            {
                "id": "features",
                "description": "mean features of each patch, which tell kinds of images apart",
                "axes": [
                    {"type": "batch"},
                    {
                        "type": "channel",
                        "channel_names": [f"feature{number}" for number in range(num_features)],
                    },
                    *of_input(float(patch)),
                ],
                "data": {"type": "float32"},
                "test_tensor": {"source": "test_features.npy"},
            },
        ],
        "weights": {"onnx": {"source": "weights.onnx", "opset_version": opset}},
        "config": {"dinocell": json.loads(header)},
    }


def _licence(card: dict[str, Any]) -> dict[str, str]:
    """The identifier of SPDX of a free licence; nothing where it is another or unknown."""
    free = re.search(r"CC0|MIT|CC[- ]BY[- ]4\.0", str(card.get("licence")))
    return {"license": _SPDX[free[0].replace("-", " ")]} if free else {}


def _readme(model: DINOCell) -> str:
    config, card = model.config, model.card
    return f"""# {card.get("name") or "DINOCell model"}

{card.get("description") or ""} The graph gives a distance map: 0 outside cells, 1 at the deepest point of each.

Cells are the basins of a watershed on the map: a peak above {config.peak_threshold:g} that rises
{config.min_prominence:g} above the saddle to a higher peak is a cell, and pixels above {config.fill_threshold:g}
belong to it. `dinocell segment` does this, larger images, measurements, and notes on images of
another kind.

Licence: {card.get("licence") or "not recorded"}.

## Validation

{json.dumps(card.get("metrics", {}))}
"""
