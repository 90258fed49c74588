"""The options of the service, and what is refused before it starts."""

import importlib.util
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dinocell.errors import MissingExtraError, UsageError
from dinocell.service.reading import places_to_read
from dinocell.service.web import web_places

MIN_TOKEN = 16
"""Characters of a token: short ones can be guessed."""


@dataclass(frozen=True)
class ServiceOptions:
    """The options of `dinocell serve`.

    Attributes
    ----------
    jobs : folder of the jobs: uploads, results, and the queue
    model, device, batch_size, precision : as in `SegmentOptions`
    host, port : where the service listens; another host than this computer needs `token`
    token : what requests must carry; None asks for nothing
    queue : jobs that may wait; more are refused
    max_mb : largest upload in MB (10⁶ bytes)
    max_megapixels : largest image in 10⁶ pixels
    learn_minutes : about how long the model may learn from corrected images
    max_minutes : a job that takes longer fails
    keep_hours, keep_gb : finished jobs are deleted so long after the last change of their labels, the oldest
        first if all need more; uploads that wait may need as much, and unfinished ones are deleted after so long
    wandb, wandb_seconds : project at Weights & Biases that gets the figures, and how often; None: none does
    read_from : folders, and addresses on S3 and the web, below which images may be read by their path
    """

    jobs: Path = Path("dinocell_jobs")
    model: str = "dinocell-cells"
    device: str = "auto"
    batch_size: int = 8
    precision: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    queue: int = 100
    max_mb: float = 256.0
    max_megapixels: float = 100.0
    max_minutes: float = 60.0
    learn_minutes: float = 5.0
    keep_hours: float = 24.0
    keep_gb: float = 10.0
    read_from: tuple[str, ...] = ()
    wandb: str | None = None
    wandb_seconds: float = 60.0

    @property
    def max_bytes(self) -> int:
        """Largest upload in bytes."""
        return round(self.max_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        """Largest image in pixels."""
        return round(self.max_megapixels * 1e6)


def check_service(options: ServiceOptions) -> None:
    """Refuse what cannot be served.

    Raises UsageError (a value is out of its range, other computers could use the service without a
    token, or `read_from` names no folder); MissingExtraError (wandb is not installed).
    """
    for fault in _faults(options):
        raise UsageError(fault)
    places_to_read(options.read_from)
    web_places(options.read_from)
    if options.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise MissingExtraError(
            "`wandb` needs the package wandb, which is not installed: run pip install '.[wandb]' in the "
            "clone of DINOCell"
        )


def _faults(options: ServiceOptions) -> Iterator[str]:
    if options.token is None and not is_loopback(options.host):
        yield (
            f"`token` must be given where other computers can connect, got none for host {options.host}: "
            "set the environment variable DINOCELL_TOKEN, or leave `host` out"
        )
    if options.token is not None and len(options.token) < MIN_TOKEN:
        yield (
            f"`token` must have at least {MIN_TOKEN} characters, got {len(options.token)}: make one with "
            "`openssl rand -hex 16`"
        )
    if options.token is not None and not (options.token.isascii() and options.token.isprintable()):
        yield (
            "`token` must have printable ASCII characters only, got others: make one with "
            "`openssl rand -hex 16`"
        )
    for name in (
        "max_mb",
        "max_megapixels",
        "max_minutes",
        "learn_minutes",
        "keep_hours",
        "keep_gb",
        "wandb_seconds",
    ):
        value = getattr(options, name)
        if not 0 < value < float("inf"):
            yield f"`{name}` must be above 0, got {value}: leave it out"


def is_loopback(host: str) -> bool:
    """Whether only this computer can connect to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_extra() -> None:
    """Load what the service needs beyond the base install.

    Raises MissingExtraError (it is not installed).
    """
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"The service needs the package {error.name}, which is not installed: run "
            "pip install '.[serve]' in the clone of DINOCell"
        ) from error
