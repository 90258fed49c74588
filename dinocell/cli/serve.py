"""`dinocell serve`: the service for browsers and programs."""

from dataclasses import dataclass
from pathlib import Path

from dinocell.cli.options import App, Device, ModelOption, argument, option

app = App()


@dataclass(frozen=True)
class ServiceFlags:
    """Options of `serve`, named as the fields of `ServiceOptions`."""

    jobs: Path = option(
        "Keep uploads, results and the queue in this folder.",
        Path("dinocell_jobs"),
        names="--jobs -o",
    )
    model: ModelOption = "dinocell-cells"
    device: Device = "auto"
    batch_size: int = option("Run the network on this many image windows at once.", 8, min=1)
    precision: str = option(
        "Compute with numbers of 32 bits (fp32) or 16 bits (bf16). The value auto takes bf16 on processors "
        "that are fast with it, else fp32.",
        "auto",
    )
    host: str = option(
        "Accept connections to this address of the computer. Others than 127.0.0.1 need a token.",
        "127.0.0.1",
    )
    port: int = option("Accept connections to this port.", 8000, min=0, max=65535)
    token: str | None = option(
        "Accept requests only if they carry this token of at least 16 characters. The environment variable "
        "DINOCELL_TOKEN does the same, and other users of the computer do not see it.",
        envvar="DINOCELL_TOKEN",
        show_envvar=False,
    )
    queue: int = option("Refuse uploads while this many jobs wait.", 100, min=1)
    max_mb: float = option("Refuse files that are larger than this, in MB.", 256.0)
    max_megapixels: float = option("Refuse images with more pixels than this, in millions.", 100.0)
    max_minutes: float = option("Stop a job that takes longer than this, in minutes.", 60.0)
    learn_minutes: float = option(
        "Take about this long to learn from corrected images, in minutes.", 5.0
    )
    keep_hours: float = option(
        "Keep finished jobs for this long after their last correction, in hours.", 24.0
    )
    keep_gb: float = option(
        "Keep at most this much of finished jobs, in GB; the oldest are deleted first. Uploads that wait "
        "may need as much.",
        10.0,
    )
    read_from: list[str] | None = option(
        "Read images by their path, too, if they are in this folder or below this address on S3 or the web; "
        "repeat the option for several. Everybody who can use the service can then read all images there.",
        names="--read-from",
    )
    wandb: str | None = option(
        "Record the figures of /metrics in this project of Weights & Biases, as production/... Without an "
        "API key they are kept in the folder of jobs.",
        metavar="PROJECT",
    )
    wandb_seconds: float = option("Record them at this interval, in seconds.", 60.0)


@app.command()
def serve(*, flags: ServiceFlags) -> None:
    """Segment images that a browser or another program sends.

    Open http://127.0.0.1:8000 in a browser, or send requests to the HTTP API. The network is loaded
    once; uploads wait in a queue on the disk, which survives a restart. docs/service.md describes the
    API, its limits and its safety.

    Only programs on this computer can connect, unless you give a host and a token.

    Example: `dinocell serve`
    """
    from dinocell.service.options import ServiceOptions
    from dinocell.service.serve import run_service

    values = {**vars(flags), "read_from": tuple(flags.read_from or ())}
    run_service(ServiceOptions(**values))


@dataclass(frozen=True)
class ViewFlags:
    """Options of `view`, named as the fields of `ServiceOptions`."""

    model: ModelOption = "dinocell-cells"
    device: Device = "auto"
    port: int = option("Open the page at this port.", 8001, min=0, max=65535)
    learn_minutes: float = option(
        "Take about this long to learn from corrected images, in minutes.", 5.0
    )


@app.command()
def view(
    out: Path = argument("Folder that segment wrote its results to."), *, flags: ViewFlags
) -> None:
    """Look at what segment wrote, and correct it, in the browser.

    Open http://127.0.0.1:8001. Corrected labels are written beside the others as NAME_labels_v2.tif
    with NAME_cells_v2.csv; the next start writes v3, and the original files stay as they are. What was
    corrected is kept in the folder corrections of the results, so that you can continue later.

    The model is needed for other thresholds and for missed cells; it must be the one that made the results.

    Example: `dinocell view results`
    """
    from dinocell.service.options import ServiceOptions
    from dinocell.service.serve import run_view

    run_view(out, ServiceOptions(**vars(flags)))
