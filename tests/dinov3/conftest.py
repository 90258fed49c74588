"""What several rooms of these tests share."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig, OmegaConf

from dinov3.configs import get_default_config


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
