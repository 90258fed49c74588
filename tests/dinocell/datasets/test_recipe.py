"""The original recipe trains on what `prepare` writes."""

from __future__ import annotations

from pathlib import Path

import layout_doubles as doubles

from dinocell.datasets import SplitOptions, prepare
from dinocell.settings import load_settings
from dinocell.training.config import TrainConfig
from dinocell.training.trainer import train

RECIPE = Path(__file__).parents[3] / "configs" / "finetune" / "generalist_livecell_cyto.yaml"


def test_the_original_recipe_runs_on_stand_ins(tmp_path, monkeypatch):
    splits = SplitOptions(val_fraction=0.34, test_fraction=0, resplit=True)
    for name in ("livecell", "cellpose"):
        doubles.MAKERS[name](tmp_path / name)
        prepare(name, tmp_path / name, tmp_path / "data" / name, splits=splits, shown=False)
    monkeypatch.setenv("DINOCELL_DATA", str(tmp_path / "data"))
    small = ["model.size=tiny", "model.patch_size=16", "model.window_px=32", "model.overlap_px=8"]
    short = ["schedule.steps=1", "schedule.batch_size=2", "schedule.eval_every=1"]
    places = ["data.num_workers=0", "device=cpu", f"output_dir={tmp_path / 'run'}"]
    result = train(load_settings(TrainConfig, RECIPE, [*small, *short, *places]))
    assert result.model_path.is_file()
