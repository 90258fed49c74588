"""The commands that can be submitted, each described by the room that owns the files of its runs."""

from collections.abc import Sequence

from dinocell.submitted import SubmittedCommand

COMMANDS = ("pretrain", "train", "segment", "evaluate")
"""Commands that `dinocell submit` takes."""


def command_of(arguments: Sequence[str]) -> SubmittedCommand:
    """The command of a job's arguments; one that knows nothing of its files for any other.

    Only its own room is imported: the supervisor of a job must start quickly and stay small.
    """
    name = arguments[0] if arguments else ""
    if name == "pretrain":
        from dinocell.pretraining.submitted import Pretrain

        return Pretrain()
    if name == "train":
        from dinocell.training.submitted import Train

        return Train()
    if name in ("segment", "shards"):
        from dinocell.batch.submitted import Segment, Shards

        return Segment() if name == "segment" else Shards()
    if name == "evaluate":
        from dinocell.evaluation.submitted import Evaluate

        return Evaluate()
    return SubmittedCommand()
