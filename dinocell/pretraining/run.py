"""Self-supervised pretraining: DINOCell runs the training program of the `dinov3` tree."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinocell.errors import DINOCellError, StoppedError, UsageError
from dinocell.network.weights import find_weights
from dinocell.pretraining.submitted import run_folder
from dinocell.submitted import read_yaml
from dinocell.tree import tree_is_bundled

_WEIGHTS = ("student.pretrained_weights", "student.resume_from_teacher_chkpt")


def pretrain(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    output_dir: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
) -> Path:
    """Train a backbone without labels, or continue the run of the output folder.

    Parameters
    ----------
    config : YAML with keys of `ssl_default_config.yaml` and `dinocell.yaml`
    overrides : `key=value`, which replace values of the file.  `student.pretrained_weights` may be
        the name of a bundled model or of a fetched backbone, also in the file.
    output_dir : `runs/ssl/NAME` of the configuration's file name by default
    resume : continue from the newest complete checkpoint.  Otherwise start over; what an earlier
        run left is moved aside.
    seed : random seed of weight initialisation, dropout and drop path; `train.seed` is that of the
        data

    Returns the teacher file of the last iteration.

    Raises UsageError (the configuration or the data are wrong, or the output folder belongs to
    another run); StoppedError, DINOCellError (a signal ended the run; the loss was not finite.  A
    checkpoint was saved).
    """
    config = Path(config)
    if not config.is_file():
        raise UsageError(f"`config` must be a file, got {config}: see configs/ssl")
    output_dir = run_folder(config, output_dir)
    overrides = [*_named_weights(config, overrides), *(_with_path(c) for c in overrides)]
    argv = ["--config-file", str(config), "--output-dir", str(output_dir), "--seed", str(seed)]
    if not resume:
        argv.append("--no-resume")
    from dinov3.train import train as program

    if not tree_is_bundled():
        _run_foreign(program, [*argv, *overrides])
        return _newest_teacher(output_dir)
    from dinov3.data.loaders import plain_message

    try:
        program.main([*argv, *overrides])
    except program.Stopped as error:
        raise StoppedError(str(error)) from error
    except program.NonFiniteLossError as error:
        raise DINOCellError(str(error)) from error
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        raise UsageError(plain_message(error)) from error
    except OSError as error:
        raise DINOCellError(plain_message(error)) from error
    return _newest_teacher(output_dir)


def _run_foreign(program: Any, arguments: list[str]) -> None:
    """Run the training program of upstream's tree, which reads `sys.argv` and needs CUDA."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "Pretraining with upstream's tree must have a CUDA device, got none: unset "
            "DINOCELL_DINOV3 to train with the bundled tree, which runs everywhere"
        )
    before = sys.argv
    sys.argv = ["train.py", *arguments]
    try:
        program.main()
    except (ValueError, FileNotFoundError, AssertionError) as error:
        raise UsageError(str(error) or f"{type(error).__name__} in upstream's tree") from error
    finally:
        sys.argv = before


def _newest_teacher(output_dir: Path) -> Path:
    files = sorted(
        (output_dir / "eval").glob("training_*/teacher_checkpoint.pth"),
        key=lambda path: int(path.parent.name.removeprefix("training_")),
    )
    return files[-1] if files else output_dir


def _with_path(change: str) -> str:
    """The override with the path of the weights where it names fetched weights."""
    key, _, value = change.partition("=")
    return f"{key}={find_weights(value)}" if key in _WEIGHTS and value else change


def _named_weights(config: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides with the paths of weights that the file gives by name."""
    student = read_yaml(config).get("student")
    given = {change.partition("=")[0] for change in overrides}
    found = []
    for key in _WEIGHTS:
        name = student.get(key.partition(".")[2]) if isinstance(student, dict) else None
        if isinstance(name, str) and name and key not in given:
            path = find_weights(name)
            found += [f"{key}={path}"] if str(path) != name else []
    return found
