"""`evaluate` as a job of a cluster."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinocell.errors import UsageError
from dinocell.submitted import SubmittedCommand


class Evaluate(SubmittedCommand):
    """`evaluate`: short, so that it starts over and reports no progress."""

    name = "evaluate"

    def run_dir(self, parameters: Mapping[str, Any]) -> Path:
        """A folder below runs/evaluate; other models or data have another one."""
        given = [parameters[key] for key in ("out", "model", "data", "pred", "truth")]
        paths = [str(Path(value).resolve()) for value in given if value is not None]
        digest = hashlib.sha256("\n".join(paths).encode()).hexdigest()[:8]
        return Path("runs/evaluate") / f"{Path(paths[0]).stem}-{digest}"

    def options_of_folder(self, run_dir: Path, parameters: Mapping[str, Any]) -> list[str]:
        """Write the scores to `run_dir`, in the format that was asked for; a job that starts over replaces them."""
        suffix = Path(parameters["out"]).suffix if parameters["out"] else ".json"
        return ["--overwrite", "--out", str(run_dir / f"scores{suffix}")]

    def check_inputs(self, parameters: Mapping[str, Any]) -> None:
        """Refuse folders that do not exist or have no pairs, and unreadable models."""
        for option in ("pred", "truth", "data"):
            folder = parameters[option]
            if folder is not None and not folder.is_dir():
                raise UsageError(
                    f"`{option}` must be a folder that exists, got {folder}: correct the path, or use "
                    "`look=False` if it exists only on the nodes"
                )
        if parameters["data"] is not None:
            from dinocell.evaluation.model_evaluation import check_data_folder

            check_data_folder(parameters["data"])
        if parameters["model"] is not None:
            from dinocell.network.model import read_model_header

            read_model_header(parameters["model"])
