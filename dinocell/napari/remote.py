"""A result that a `dinocell serve` keeps: the same calls as on this computer, over HTTP."""

import base64
import io
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray

from dinocell.errors import DINOCellError, UsageError
from dinocell.files import atomic_path
from dinocell.napari.session import UPLOAD, write_pixels
from dinocell.service.history import ChangedError, Revision
from dinocell.service.stored import Change

_CONNECT_S, _READ_S = 5.0, 120.0
_ASK_AGAIN_S = 0.3


class Server:
    """The HTTP API of a service.

    Parameters
    ----------
    url : as `http://127.0.0.1:8000`
    token : of the service, if it asks for one
    """

    def __init__(self, url: str, token: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(
                f"`url` must start with http:// or https://, got {url}: write the address that "
                "dinocell serve prints"
            )
        self.base = url.rstrip("/") + "/api/v1"
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between this computer and the one down the hall
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """An answer without an error.

        Raises ChangedError (409), UsageError (422), DINOCellError (other errors, or no answer); with the
        sentence of the service.
        """
        try:
            answer = self._session.request(
                method, self.base + path, timeout=(_CONNECT_S, _READ_S), **options
            )
        except requests.RequestException as error:
            raise DINOCellError(
                f"The service at {self.base.removesuffix('/api/v1')} does not answer: is it running?"
            ) from error
        if answer.ok:
            return answer
        try:
            detail = str(answer.json()["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"The service answered {answer.status_code} {answer.reason}"
        kinds: dict[int, type[DINOCellError]] = {409: ChangedError, 422: UsageError}
        raise kinds.get(answer.status_code, DINOCellError)(detail)


def segment_there(
    pixels: NDArray[Any],
    *,
    url: str,
    token: str = "",
    name: str = "image",
    pixel_size_um: float | None = None,
    channel_names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "RemoteResult":
    """Segment at a service, which has its own model; parameters as for `segment_here`.

    Raises UsageError, DINOCellError (the service refuses the image, fails, or does not answer).
    """
    server = Server(url, token)
    form: dict[str, Any] = {}
    if channel_names is not None:
        form["channels"] = [str(number) for number in range(len(channel_names))]
    with TemporaryDirectory(prefix="dinocell_napari_") as folder:
        path = Path(folder) / UPLOAD
        write_pixels(path, pixels, pixel_size_um=pixel_size_um, channel_names=channel_names)
        with path.open("rb") as file:
            job = server.ask(
                "POST", "/jobs", files={"image": (f"{name}.tif", file)}, data=form
            ).json()
    while job["state"] in ("queued", "running"):
        if progress is not None and job["windows_total"]:
            progress(job["windows_done"], job["windows_total"])
        time.sleep(_ASK_AGAIN_S)
        job = server.ask("GET", f"/jobs/{job['id']}").json()
    if job["state"] != "done":
        raise DINOCellError(job["error"] or f"The job was {job['state']}: segment the image again")
    return RemoteResult(server, job)


class RemoteResult:
    """A finished job; see `dinocell.napari.session.Result`."""

    def __init__(self, server: Server, job: Mapping[str, Any]) -> None:
        self.server, self.path, self.name = server, f"/jobs/{job['id']}", job["name"]
        self._warnings = job["summary"].get("warnings", "")

    def state(self) -> Change:
        """The labels of the whole image and their revision."""
        while True:
            before = self.server.ask("GET", f"{self.path}/labels").json()
            body = self.server.ask("GET", f"{self.path}/labels/npy").content
            after = self.server.ask("GET", f"{self.path}/labels").json()
            if before["revision"] == after["revision"]:
                labels = np.load(io.BytesIO(body), allow_pickle=False)
                return _change(after, labels, (0, 0))

    def relabel(
        self, changes: Mapping[str, Any], *, revision: int | None, amend: bool = False
    ) -> Change:
        """Other thresholds."""
        query = {"revision": revision, "amend": str(amend).lower()}
        answer = self.server.ask("POST", f"{self.path}/relabel", params=query, json=dict(changes))
        return _with_pixels(answer.json())

    def correct(self, kind: str, values: Mapping[str, Any], *, revision: int | None) -> Change:
        """One correction."""
        body = {"kind": kind, **values}
        query = {"revision": revision}
        answer = self.server.ask("POST", f"{self.path}/corrections", params=query, json=body)
        return _with_pixels(answer.json())

    def replace_labels(self, labels: NDArray[Any], *, revision: int) -> Change:
        """Labels that were painted."""
        buffer = io.BytesIO()
        np.save(buffer, labels, allow_pickle=False)
        self.server.ask(
            *("PUT", f"{self.path}/labels"),
            params={"revision": revision},
            data=buffer.getvalue(),
            headers={"Content-Type": "application/octet-stream"},
        )
        return self.state()

    def columns(self) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Numbers of the cells, and their measurements."""
        cells = self.server.ask("GET", f"{self.path}/cells").json()
        return np.asarray(cells["numbers"], np.int64), cells["columns"]

    def copy_file(self, kind: str, target: Path) -> None:
        """Write a file of `dinocell.service.stored.KINDS`."""
        body = self.server.ask("GET", f"{self.path}/result/{kind}").content
        with atomic_path(target) as temporary:
            temporary.write_bytes(body)

    def notes(self) -> tuple[str, ...]:
        """What a careful user should know of the image."""
        return tuple(self._warnings.split("; ")) if self._warnings else ()

    def close(self) -> None:
        """The service keeps its jobs as long as it is set to."""


def _change(info: Mapping[str, Any], labels: NDArray[np.uint32], corner: tuple[int, int]) -> Change:
    touched = np.asarray(info["touched"], np.int64)
    return Change(Revision.of(info), np.unique(labels[labels > 0]), touched, corner, labels)


def _with_pixels(info: Mapping[str, Any]) -> Change:
    shape = info["height"], info["width"]
    pixels = zlib.decompress(base64.b64decode(info["labels"]))
    labels = np.frombuffer(pixels, "<u4").reshape(shape).astype(np.uint32)
    return _change(info, labels, (info["row"], info["column"]))
