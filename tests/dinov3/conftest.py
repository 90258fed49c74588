"""What several rooms of these tests share."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from dinov3.configs import get_default_config


@pytest.fixture
def read_history() -> Callable[[Path], list[dict]]:
    """Reader of wandb's offline files."""
    return _read_history


def _read_history(path: Path) -> list[dict]:
    """Rows of a .wandb file: a log of LevelDB's form, blocks of 32 KiB, protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    offset, whole, rows = 7, b"", []
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        body = data[offset + 7 : offset + 7 + length]
        if len(body) < length or kind not in (1, 2, 3, 4):
            break
        assert checksum == zlib.crc32(body, zlib.crc32(bytes([kind])))
        offset += 7 + length
        whole = body if kind in (1, 2) else whole + body
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(whole)
            if record.HasField("history"):
                rows.append(
                    {
                        item.key or ".".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
    return rows


@pytest.fixture
def make_cfg(tmp_path):
    """The default configuration with the output folder `tmp_path` and `key=value` changes."""

    def make(*changes: str) -> DictConfig:
        merged = OmegaConf.merge(
            get_default_config(),
            OmegaConf.from_dotlist([f"train.output_dir={tmp_path}", *changes]),
        )
        assert isinstance(merged, DictConfig)
        return merged

    return make
