"""Start the service: the worker, then the web server."""

import os
from dataclasses import asdict

from dinocell.batch.claims import Claimant, claimed
from dinocell.batch.folder import make_folder
from dinocell.batch.options import SegmentOptions, check_options
from dinocell.service.options import ServiceOptions, check_service, require_extra


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
    import uvicorn

    from dinocell.service.app import create_app
    from dinocell.service.queue import Queue
    from dinocell.service.service import Service
    from dinocell.service.supervision import WorkerProcess

    with claimed(options.jobs / "service", Claimant(), "A folder of jobs"):
        queue = Queue(options.jobs)
        queue.sweep()
        service = Service(options, queue)
        worker = WorkerProcess(options.jobs, asdict(shared), service.hear)
        worker.start()
        service.worker = worker
        config = uvicorn.Config(
            create_app(service),
            host=options.host,
            port=options.port,
            log_level=os.environ.get("DINOCELL_LOG", "warning"),
            server_header=False,
            timeout_graceful_shutdown=3,
        )
        name = f"[{options.host}]" if ":" in options.host else options.host
        print(f"DINOCell is at http://{name}:{options.port}", flush=True)
        try:
            uvicorn.Server(config).run()
        finally:
            worker.stop()
