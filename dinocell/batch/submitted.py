"""`segment`, and a part of a divided batch, as jobs of a cluster."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinocell.batch.journal import JOURNAL_NAME, count_rows, merging_folder
from dinocell.submitted import RunProgress, SubmittedCommand


class Shards(SubmittedCommand):
    """`shards run` and `shards merge`, which continue by themselves."""

    name = "shards"
    has_pace = True

    def saved(self, run_dir: Path) -> int:
        """Images in the journal."""
        return count_rows(run_dir / JOURNAL_NAME)

    def progress(self, run_dir: Path) -> RunProgress | None:
        """Images in the journal, of those in the manifest if the folder is a part of a batch.

        Of the folder of a merging: those that are merged; None before the first merging.
        """
        whole = run_dir.parent.parent
        if run_dir == merging_folder(whole):
            journal = whole / JOURNAL_NAME
            return RunProgress(count_rows(journal), None, "images") if journal.is_file() else None
        listed = run_dir / "manifest.csv"
        total = max(count_rows(listed) - 1, 0) if listed.is_file() else None
        return RunProgress(self.saved(run_dir), total, "images")


class Segment(Shards):
    """`segment`."""

    name = "segment"
    start_over_flag = "--overwrite"
    resume_flag = "--resume"
    replaced_name = "settings.json"

    def run_dir(self, parameters: Mapping[str, Any]) -> Path:
        """The output folder."""
        return Path(parameters["out"])

    def options_of_folder(self, run_dir: Path, parameters: Mapping[str, Any]) -> list[str]:
        """Write to `run_dir`."""
        return ["--out", str(run_dir)]

    def check_inputs(self, parameters: Mapping[str, Any]) -> None:
        """Refuse calls without images, with two of one name, or with an unreadable model."""
        from dinocell.batch.options import check_call
        from dinocell.batch.remote import refuse_s3
        from dinocell.batch.units import units_of
        from dinocell.io import find_images
        from dinocell.network.model import read_model_header

        refuse_s3(parameters["out"])
        paths = find_images(parameters["images"], recursive=parameters["recursive"])
        check_call(paths, parameters["options"])
        units_of(paths, parameters["options"])
        if parameters["model"] is not None:
            read_model_header(parameters["model"])

    def check(
        self, parameters: Mapping[str, Any], run_dir: Path, *, look: bool, continues: bool
    ) -> None:
        """Refuse results of the images that the job would neither keep nor replace."""
        if not look or continues or not run_dir.is_dir():
            return
        if parameters["resume"] or parameters["overwrite"]:
            return
        from dinocell.batch.folder import refuse_results
        from dinocell.batch.units import named_as_before, units_of
        from dinocell.io import find_images

        paths = find_images(parameters["images"], recursive=parameters["recursive"])
        options = parameters["options"]
        units = named_as_before(units_of(paths, options), run_dir)
        refuse_results(units, run_dir, options.formats)
