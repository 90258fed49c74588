"""A job's set-up and end as a context (matches `dinov3.run.init`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from dinov3.configs import exit_job, setup_job


@contextmanager
def job_context(
    output_dir: str | None = None,
    distributed_enabled: bool = True,
    logging_enabled: bool = True,
    seed: int | None = 0,
    restrict_print_to_main_process: bool = True,
    distributed_timeout: timedelta | None = None,
) -> Iterator[None]:
    """`setup_job` before, `exit_job` after, also when the job fails."""
    setup_job(**locals())
    try:
        yield
    finally:
        exit_job(distributed_enabled=distributed_enabled, logging_enabled=logging_enabled)
