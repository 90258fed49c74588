"""A script as a SLURM job that requeues itself (matches `dinov3.run.submit`).

    python -m dinov3.run.submit --nodes 1 --ngpus 8 --slurm-partition gpu \\
        dinov3/train/train.py --config-file F --output-dir D key=value
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from dinov3.logging import setup_logging
from dinov3.utils.cluster import (
    get_slurm_account,
    get_slurm_executor_parameters,
    get_slurm_partition,
    get_slurm_qos,
    get_user_checkpoint_path,
)
from dinov3.utils.custom_callable import load_custom_callable

logger = logging.getLogger("dinov3")

_SIGNAL_AHEAD_S = 120
_MAX_TIMEOUTS = 30


def get_submitit_parser() -> argparse.ArgumentParser:
    """Options of the job; those of a site come from the environment, see `utils.cluster`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ngpus", "--gpus", "--gpus-per-node", default=8, type=int, help="a node")
    parser.add_argument("--nodes", default=1, type=int, help="number of nodes")
    parser.add_argument("--timeout", default=2800, type=int, help="minutes")
    parser.add_argument("--slurm-partition", default=get_slurm_partition(), type=str)
    parser.add_argument("--slurm-qos", default=get_slurm_qos(), type=str)
    parser.add_argument("--slurm-array-parallelism", default=256, type=int)
    parser.add_argument("--slurm-nice", default=0, type=int)
    parser.add_argument("--slurm-account", default=get_slurm_account(), type=str)
    parser.add_argument("--comment", default="", type=str, help="of the job")
    parser.add_argument("--exclude", default="", type=str, help="nodes to avoid")
    parser.add_argument("--output-dir", default=None, type=str, help="of log files; %%j is the job")
    return parser


def get_run_parser() -> argparse.ArgumentParser:
    """The job's options, the script and its function; all else goes to the script."""
    # A shortened option could be one of the script.
    parser = argparse.ArgumentParser("run", parents=[get_submitit_parser()], allow_abbrev=False)
    parser.add_argument("module_path", type=str, help="of a Python file")
    parser.add_argument("--callable-name", type=str, default="main", help="function to call")
    return parser


def get_shared_folder() -> Path:
    """Folder of experiments that all nodes see.

    Raises RuntimeError (DINOV3_CHECKPOINT_DIR is not set).
    """
    folder = get_user_checkpoint_path()
    if folder is None:
        raise RuntimeError(
            "A job needs a folder that all nodes see, got neither --output-dir nor "
            "DINOV3_CHECKPOINT_DIR: set one"
        )
    return folder / "experiments"


class CheckpointableSubmitter:
    """What runs on the node: the function with its arguments; submitted again when preempted.

    `module_path`, `callable_name`: see `load_custom_callable`; `args`: of the script; `output_dir`:
    given to the script as --output-dir, with %j as the job's number.
    """

    def __init__(
        self, module_path: str, callable_name: str, args: list[str], output_dir: str | Path
    ) -> None:
        self.module_path = os.path.realpath(module_path)
        self.callable_name = callable_name
        self.args = list(args)
        self.output_dir = str(output_dir)

    def __call__(self) -> Any:
        import submitit

        job = submitit.JobEnvironment()
        folder = self.output_dir.replace("%j", str(job.job_id))
        arguments = self.args
        if not any(item.startswith("--output-dir") for item in arguments):
            arguments = [f"--output-dir={folder}", *arguments]
        return load_custom_callable(self.module_path, self.callable_name)(arguments)

    def checkpoint(self) -> Any:
        """Called by submitit before the job ends early: the same call in a new job."""
        import submitit

        logger.info("Requeueing %s %s", self.module_path, self.args)
        return submitit.helpers.DelayedSubmission(
            type(self)(self.module_path, self.callable_name, self.args, self.output_dir)
        )


def submit_jobs(
    class_to_submit: Any, output_dir: str | Path, submitit_args: Any, name: str = "fairvit"
) -> Any:
    """Submit one job; returns submitit's."""
    try:
        import submitit
    except ImportError as error:
        raise RuntimeError(
            "Submitting needs the package submitit, which is not installed: run pip install '.[slurm]' "
            "in the clone of DINOCell"
        ) from error
    executor = submitit.AutoExecutor(folder=str(output_dir), slurm_max_num_timeout=_MAX_TIMEOUTS)
    options = {
        "slurm_comment": submitit_args.comment,
        "slurm_exclude": submitit_args.exclude,
        "slurm_qos": submitit_args.slurm_qos,
        "slurm_account": submitit_args.slurm_account,
    }
    parameters = get_slurm_executor_parameters(
        nodes=submitit_args.nodes,
        num_gpus_per_node=submitit_args.ngpus,
        timeout_min=submitit_args.timeout,
        slurm_signal_delay_s=_SIGNAL_AHEAD_S,
        slurm_array_parallelism=submitit_args.slurm_array_parallelism,
        slurm_additional_parameters={"nice": submitit_args.slurm_nice},
        slurm_partition=submitit_args.slurm_partition,
        **{key: value for key, value in options.items() if value},
    )
    executor.update_parameters(
        name=name, **{key: value for key, value in parameters.items() if value is not None}
    )
    job = executor.submit(class_to_submit)
    logger.info("Job %s; logs in %s", job.job_id, str(output_dir).replace("%j", str(job.job_id)))
    return job


def main() -> None:
    """Submit what the command line says."""
    args, script_args = get_run_parser().parse_known_args()
    setup_logging(level=logging.INFO)
    setup_logging(level=logging.INFO, name="dinov3")
    if not os.path.isfile(args.module_path):
        sys.exit(f"error: a script must be a file, got {args.module_path}: check the path")
    try:
        folder = Path(args.output_dir) if args.output_dir else get_shared_folder() / "%j"
        job = CheckpointableSubmitter(args.module_path, args.callable_name, script_args, folder)
        submit_jobs(job, folder, args, name=Path(args.module_path).stem)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
