"""`train` and `ablate` as jobs of a cluster."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinocell.errors import UsageError
from dinocell.submitted import (
    RunProgress,
    SubmittedCommand,
    last_line_with,
    read_yaml,
    require_weights_file,
)


class Train(SubmittedCommand):
    """`train`: one process for each GPU; continues from its newest checkpoint by itself."""

    name = "train"
    many_processes = True

    def read(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, and the configuration as `settings`."""
        from dinocell.training.start import load_train_config

        settings = load_train_config(parameters["config"], parameters["overrides"] or [])
        return {**parameters, "settings": settings}

    def run_dir(self, parameters: Mapping[str, Any]) -> Path:
        """The output folder of the configuration."""
        return Path(parameters["settings"].output_dir)

    def options_of_row(self, values: Mapping[str, str]) -> list[str]:
        """Columns are keys of the configuration."""
        return [f"{key}={value}" for key, value in values.items()]

    def options_of_folder(self, run_dir: Path, parameters: Mapping[str, Any]) -> list[str]:
        """Train in `run_dir`."""
        return [f"output_dir={run_dir}"]

    def check(
        self, parameters: Mapping[str, Any], run_dir: Path, *, look: bool, continues: bool
    ) -> None:
        """Refuse missing data and weights, and a folder that has another run."""
        if not look:
            return
        from dinocell.network.weights import find_weights
        from dinocell.training.datasets import split_pairs

        config = parameters["settings"]
        split_pairs(config.data, config.seed)
        weights = config.backbone.weights
        require_weights_file("backbone.weights", find_weights(weights) if weights else None)
        if (run_dir / "config.yaml").exists():
            from dinocell.training.run_folder import refuse_other_run

            refuse_other_run(config)

    def saved(self, run_dir: Path) -> int:
        """Step of the newest checkpoint."""
        names = [path.stem for path in (run_dir / "checkpoints").glob("*.pt")]
        steps = [re.fullmatch(r"step_(\d+)", name) for name in names]
        return max((int(match[1]) for match in steps if match), default=0)

    def progress(self, run_dir: Path) -> RunProgress | None:
        """Steps, from the metrics and the checkpoints."""
        settings = read_yaml(run_dir / "config.yaml")
        line = last_line_with(run_dir / "metrics.jsonl", "crops_per_s")
        if line is None or "schedule" not in settings:
            return None
        total = int(settings["schedule"]["steps"])
        done = max(int(line["step"]), self.saved(run_dir))
        if done >= total and not (run_dir / "model.safetensors").exists():
            return RunProgress(done, total, "steps", note="validating")
        step_s = line.get("global_batch_size", 0) / max(line["crops_per_s"], 1e-9)
        return RunProgress(done, total, "steps", step_s * (total - done))


class Ablate(Train):
    """`ablate`: with `--only` one training and its scores, else the tables (and what is not trained yet)."""

    name = "ablate"
    many_processes = False

    def read(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, the comparison as `ablation`, and its `runs`."""
        from dinocell.training.ablation import load_ablation

        ablation, runs = load_ablation(parameters["config"], look=False)
        return {**parameters, "ablation": ablation, "runs": runs}

    def chosen(self, parameters: Mapping[str, Any]) -> list[Any]:
        """The run `only`, or all; ConfigError if there is none of this number."""
        from dinocell.training.ablation import chosen_runs

        return chosen_runs(parameters["runs"], parameters["only"])

    def run_dir(self, parameters: Mapping[str, Any]) -> Path:
        """The folder of the one run, or that of all with the tables."""
        (first, *_) = self.chosen(parameters)
        alone = parameters["only"] is not None
        return Path(first.config.output_dir if alone else parameters["ablation"].output_dir)

    def options_of_row(self, values: Mapping[str, str]) -> list[str]:
        """Refused: the file itself lists the runs."""
        raise UsageError(
            "An ablation must be without `array`, because its file lists the runs: leave out `array`"
        )

    def check(
        self, parameters: Mapping[str, Any], run_dir: Path, *, look: bool, continues: bool
    ) -> None:
        """As for each training; also refuse missing test sets."""
        if look:
            parameters["ablation"].check_test_sets()
        for run in self.chosen(parameters):
            folder, settings = Path(run.config.output_dir), {"settings": run.config}
            super().check(settings, folder, look=look, continues=continues)

    def saved(self, run_dir: Path) -> int:
        """Steps of the newest checkpoints of all runs in the folder."""
        folders = [run_dir, *(path.parent for path in run_dir.glob("*/seed*/checkpoints"))]
        return sum(super(Ablate, self).saved(folder) for folder in folders)
