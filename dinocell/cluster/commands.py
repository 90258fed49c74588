"""The commands that can be submitted, each described by the room that owns the files of its runs."""

from collections.abc import Sequence
from importlib import import_module

from dinocell.submitted import SubmittedCommand

COMMANDS = ("pretrain", "train", "ablate", "segment", "evaluate")
"""Commands that `dinocell submit` takes."""

_HOMES = {
    "pretrain": ("dinocell.pretraining.submitted", "Pretrain"),
    "train": ("dinocell.training.submitted", "Train"),
    "ablate": ("dinocell.training.submitted", "Ablate"),
    "segment": ("dinocell.batch.submitted", "Segment"),
    "shards": ("dinocell.batch.submitted", "Shards"),
    "evaluate": ("dinocell.evaluation.submitted", "Evaluate"),
}


def command_of(arguments: Sequence[str]) -> SubmittedCommand:
    """The command of a job's arguments; one that knows nothing of its files for any other.

    Only its own room is imported: the supervisor of a job must start quickly and stay small.
    """
    if not arguments or arguments[0] not in _HOMES:
        return SubmittedCommand()
    module, kind = _HOMES[arguments[0]]
    return getattr(import_module(module), kind)()
