"""Files that `dinocell export` wrote: their headers; ONNX graphs, run by onnxruntime."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from dinocell.errors import CheckpointError
from dinocell.io.optional import library

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""Where onnxruntime may compute, the first that its build has."""


def exported_header(path: Path, key: str) -> str | None:
    """The JSON header of an exported file, its entry `key`; None without it.

    Raises CheckpointError (the file is damaged); MissingExtraError.
    """
    if path.suffix == ".onnx":
        return open_graph(path, optimized=False).get_modelmeta().custom_metadata_map.get(key)
    try:
        with zipfile.ZipFile(path) as archive:
            if path.suffix == ".zip":
                described = yaml.safe_load(archive.read("rdf.yaml"))
                return json.dumps(described["config"][key])
            names = [name for name in archive.namelist() if name.endswith(f"/{key}")]
            return archive.read(names[0]).decode() if names else None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        zipfile.BadZipFile,
        yaml.YAMLError,
    ) as error:
        raise CheckpointError(
            f"A {path.suffix} file must be complete, as `dinocell export` wrote it, got {path} ({error}): "
            "export the model again"
        ) from error


def open_graph(path: Path, *, optimized: bool = True) -> Any:
    """An `onnxruntime.InferenceSession`, on as many threads as torch has.

    Raises CheckpointError (the file is no ONNX graph); MissingExtraError.
    """
    runtime = library("onnxruntime", "ONNX files", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what is wrong comes as an exception
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    available = runtime.get_available_providers()
    providers = [name for name in PROVIDERS if name in available]
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions have no common base
        raise CheckpointError(
            f"An ONNX file must be a complete graph, got {path} ({error}): export the model again"
        ) from error


def run_graph(session: Any, gray: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, H, W) windows in [0, 1] → maps (B, 1, H, W) and features (B, D, H / p, W / p)."""
    maps, features = session.run(None, {"gray": np.ascontiguousarray(gray.float().numpy())})
    return torch.from_numpy(maps), torch.from_numpy(features)
