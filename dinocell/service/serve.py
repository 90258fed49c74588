"""Start the service: the worker, then the web server."""

import socket
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dinocell.batch.claims import Claimant, claimed
from dinocell.batch.folder import make_folder
from dinocell.batch.options import SegmentOptions, check_options
from dinocell.errors import DINOCellError
from dinocell.service.options import ServiceOptions, check_service, require_extra

if TYPE_CHECKING:
    from dinocell.service.service import Service


def shared_options(options: ServiceOptions) -> SegmentOptions:
    """What all jobs of a service have in common."""
    return SegmentOptions(
        model=options.model,
        device=options.device,
        batch_size=options.batch_size,
        precision=options.precision,
        overlay=False,  # drawn when somebody asks for it
        overwrite=True,  # a job that a killed worker has begun
        max_pixels=options.max_pixels,
    )


def _listening(options: ServiceOptions) -> socket.socket:
    """An open port, before the model is loaded: connections wait until the service answers them."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise DINOCellError(
            f"The service cannot listen at {options.host}, port {options.port} ({error.strerror}): stop "
            "the program that does, or choose another `port`"
        ) from error


def run_service(options: ServiceOptions) -> None:
    """Serve until a signal ends the process.

    Raises MissingExtraError (fastapi, uvicorn or python-multipart is not installed); UsageError (see
    `check_service`; the model or the device does not exist); DINOCellError (the folder is used by
    another service, or the port by another program).
    """
    require_extra()
    check_service(options)
    shared = shared_options(options)
    check_options(shared)
    make_folder(options.jobs)
    from dinocell.service.queue import Queue
    from dinocell.service.service import Service
    from dinocell.service.supervision import WorkerProcess

    with (
        claimed(options.jobs / "service", Claimant(), "A folder of jobs"),
        _listening(options) as listener,
    ):
        queue = Queue(options.jobs)
        queue.sweep()
        service = Service(options, queue)
        worker = WorkerProcess(options.jobs, asdict(shared), service.hear)
        worker.limit_s, worker.places = 60 * options.max_minutes, service.readable
        worker.start()
        service.worker = worker
        try:
            kept = (
                f"Results are deleted {options.keep_hours:g} hours after they were made or last corrected, "
                f"the oldest earlier if all need more than {options.keep_gb:g} GB"
            )
            _serve(service, listener, [kept])
        finally:
            worker.stop()


def run_view(out: Path, options: ServiceOptions) -> None:
    """Show a folder of results until a signal ends the process.

    `options.jobs` is not used.

    Raises MissingExtraError, UsageError, DINOCellError (as for `run_service`; or `out` holds no results
    of `segment`).
    """
    require_extra()
    check_service(options)
    from dinocell.service.queue import Queue
    from dinocell.service.viewing import CORRECTIONS, Viewed, ViewService

    viewed = Viewed(out, options.model, options.device)
    folder = out / CORRECTIONS
    make_folder(folder)
    with (
        claimed(folder / "service", Claimant(), "A folder of results"),
        _listening(options) as listener,
    ):
        service = ViewService(replace(options, jobs=folder), Queue(folder), viewed)
        _serve(service, listener, viewed.notes())


def _serve(service: "Service", listener: socket.socket, notes: Sequence[str]) -> None:
    import uvicorn

    from dinocell.service.app import create_app

    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
    )

    class Server(uvicorn.Server):
        """Lets go of those who follow a job before it waits for them."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if service.news is not None:
                service.news.end()
            super().handle_exit(sig, frame)

    host = service.options.host
    name = f"[{host}]" if ":" in host else host
    print(f"DINOCell is at http://{name}:{listener.getsockname()[1]}", *notes, sep="\n", flush=True)
    Server(config).run(sockets=[listener])
