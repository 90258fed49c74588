"""`pretrain` as a job of a cluster."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dinocell.errors import UsageError, raised_as
from dinocell.submitted import (
    RunProgress,
    SubmittedCommand,
    last_line_with,
    read_yaml,
    require_weights_file,
)


def run_folder(config: str | Path, output_dir: str | Path | None) -> Path:
    """The output folder of a run: as given, or below runs/ssl with the name of the configuration."""
    return Path(output_dir) if output_dir is not None else Path("runs/ssl") / Path(config).stem


class Pretrain(SubmittedCommand):
    """`pretrain`: one process for each GPU; continues from its newest checkpoint by itself."""

    name = "pretrain"
    many_processes = True
    start_over_flag = "--no-resume"
    replaced_name = "ckpt"

    def run_dir(self, parameters: Mapping[str, Any]) -> Path:
        """The output folder, or one below runs/ssl that is named as the configuration."""
        return run_folder(parameters["config"], parameters["output_dir"])

    def options_of_row(self, values: Mapping[str, str]) -> list[str]:
        """Columns are keys of the configuration."""
        return [f"{key}={value}" for key, value in values.items()]

    def options_of_folder(self, run_dir: Path, parameters: Mapping[str, Any]) -> list[str]:
        """Train in `run_dir`."""
        return ["--output-dir", str(run_dir)]

    def check(
        self, parameters: Mapping[str, Any], run_dir: Path, *, look: bool, continues: bool
    ) -> None:
        """Refuse a wrong configuration, missing data and weights, and a folder that has another run.

        With another tree than the bundled one, the tree itself checks its configuration later.
        """
        from dinocell.tree import tree_is_bundled

        path = Path(parameters["config"])
        if not path.is_file():
            raise UsageError(f"The configuration must be a file, got {path}: see configs/ssl")
        from dinov3 import configs

        if not tree_is_bundled():
            return
        overrides = list(parameters["overrides"] or [])
        arguments = SimpleNamespace(config_file=str(path), output_dir=str(run_dir), opts=overrides)
        from dinov3.data.loaders import find_dataset_class

        with raised_as(UsageError, ValueError, FileNotFoundError):
            settings = configs.get_cfg_from_args(arguments, strict=True)
            _, data = find_dataset_class(str(settings.train.dataset_path))
        if not look:
            return
        from dinocell.network.weights import find_weights

        weights = settings.student.pretrained_weights
        found = find_weights(weights) if weights else None
        require_weights_file("student.pretrained_weights", found)
        _require_fields(data)
        if (run_dir / "ckpt").is_dir() and not parameters["no_resume"]:
            from dinov3.train import train as program

            with raised_as(UsageError, ValueError):
                program.check_resumption(settings, run_dir, resume=True)

    def saved(self, run_dir: Path) -> int:
        """Iterations of the newest checkpoint."""
        names = [path.name for path in (run_dir / "ckpt").glob("*")]
        return max((int(name) + 1 for name in names if name.isdigit()), default=0)

    def progress(self, run_dir: Path) -> RunProgress | None:
        """Iterations, from the metrics and the checkpoints."""
        settings = read_yaml(run_dir / "config.yaml")
        line = last_line_with(run_dir / "training_metrics.json", "iter_time")
        if line is None or "optim" not in settings:
            return None
        total = settings["optim"]["epochs"] * settings["train"]["OFFICIAL_EPOCH_LENGTH"]
        # Metrics are written at intervals, a checkpoint also when a signal arrives.
        done = max(int(line["iteration"]) + 1, self.saved(run_dir))
        return RunProgress(done, total, "iterations", line["iter_time"] * (total - done))


def _require_fields(given: Mapping[str, Any]) -> None:
    """The folder or index of a data set such as `JUMPS3MultiView:index=pilot.arrow`, from its arguments."""
    for key in ("root", "index"):
        value = given.get(key, "")
        # A relative index may be in the root.
        if value and not (Path(value).exists() or Path(given.get("root", ""), value).exists()):
            raise UsageError(
                f"`train.dataset_path` must have a root or index that exists, got {key}={value}: correct "
                "the path, or use `look=False` if it exists only on the nodes"
            )
