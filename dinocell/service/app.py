"""The web application: the routes, the page, errors as problem+json, and what runs beside them."""

import asyncio
import contextlib
import errno
import sqlite3
import sys
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from dinocell import __version__
from dinocell.errors import DINOCellError, MissingExtraError, UsageError
from dinocell.service.download import download_routes
from dinocell.service.guard import Guard, problem
from dinocell.service.history import ChangedError
from dinocell.service.large_routes import large_routes
from dinocell.service.learning_routes import learning_routes
from dinocell.service.news import News
from dinocell.service.queue import QueueFullError
from dinocell.service.reading import ForbiddenError
from dinocell.service.routes import api, open_routes
from dinocell.service.schemas import PLANE, SHA256
from dinocell.service.service import Service
from dinocell.service.tiles import tile_routes
from dinocell.service.uploads import BusyError
from dinocell.service.web import WebError

STATIC = Path(__file__).parent / "static"
_RETRY_AFTER_S = 5
_LONGEST_NAME, _MOST_FAULTS = 100, 10  # of a field, and in one answer: a body may hold any
_PATTERNS = {PLANE: "max, mean or a whole number", SHA256: "64 digits from 0 to 9 and a to f"}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def create_app(service: Service) -> FastAPI:
    """The application; `service.worker` must be set before it starts, and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.news = News(asyncio.get_running_loop(), service.queue.get)
        sweeper = asyncio.create_task(_sweep(service))
        if service.production is not None:
            service.production.start()
        try:
            yield
        finally:
            sweeper.cancel()
            if service.worker is not None:
                await asyncio.to_thread(service.worker.stop)
            await asyncio.to_thread(service.learning.discard)
            await asyncio.to_thread(service.expire)
            service.queue.recover(killed=False)
            if service.production is not None:
                await asyncio.to_thread(service.production.stop)
            service.queue.close()

    app = FastAPI(
        title="DINOCell",
        version=__version__,
        description="Find the cells in microscopy images.",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,  # these pages would load scripts from other sites
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(open_routes)
    app.include_router(api, prefix="/api/v1")
    for others in (large_routes, tile_routes, download_routes, learning_routes):
        app.include_router(others, prefix="/api/v1")
    _handle_errors(app)
    if STATIC.is_dir() and (STATIC / "index.html").exists():
        app.mount("/static", StaticFiles(directory=STATIC))
        app.add_api_route("/", _page, include_in_schema=False)
    app.add_middleware(Guard, options=service.options)
    return app


def _page() -> Response:
    return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


async def _sweep(service: Service) -> None:
    while True:
        try:
            await asyncio.to_thread(service.expire)
        except (OSError, sqlite3.Error) as error:  # such as a full disk; later it may work
            print(f"dinocell: warning: old jobs cannot be deleted: {error}", file=sys.stderr)
        await asyncio.sleep(service.sweep_s)


def _answer(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    body, headers = problem(status, detail, headers)
    return Response(body, status, headers)


def _fault(fault: Mapping[str, Any]) -> str:
    """A fault of a request in words of its own, as pydantic's name its types."""
    name = ".".join(map(str, fault["loc"][1:])) or str(fault["loc"][0])
    name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
    kind, limits = fault["type"], fault.get("ctx", {})
    if kind == "missing":
        return f"`{name}` must be given"
    if kind == "extra_forbidden":
        return f"`{name}` is unknown: leave it out"
    if kind == "value_error":
        return f"`{name}` must be a file: send it as a part of a form with a file name"
    words = {
        "json_invalid": "valid JSON",
        "greater_than": f"above {limits.get('gt')}",
        "greater_than_equal": f"at least {limits.get('ge')}",
        "less_than": f"below {limits.get('lt')}",
        "less_than_equal": f"at most {limits.get('le')}",
        "literal_error": f"one of {limits.get('expected')}",
        "string_pattern_mismatch": _PATTERNS.get(limits.get("pattern"), ""),
        "string_type": "text",
        "string_too_long": f"up to {limits.get('max_length')} characters long",
        "too_long": f"a list of up to {limits.get('max_length')} values",
    }
    for ending, text in (
        ("int_parsing", "a whole number"),
        ("int_type", "a whole number"),
        ("int_from_float", "a whole number"),
        ("float_parsing", "a number"),
        ("float_type", "a number"),
        ("bool_parsing", "true or false"),
    ):
        words[ending] = text
    return f"`{name}` must be {words[kind]}" if kind in words else f"`{name}`: {fault['msg']}"


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return _answer(
            error.status_code,
            str(error.detail or HTTPStatus(error.status_code).phrase),
            dict(error.headers or {}),
        )

    @app.exception_handler(RequestValidationError)
    async def of_values(request: Request, error: RequestValidationError) -> Response:
        return _answer(422, "; ".join(map(_fault, error.errors()[:_MOST_FAULTS])))

    @app.exception_handler(DINOCellError)
    async def of_ours(request: Request, error: DINOCellError) -> Response:
        if isinstance(error, QueueFullError):
            return _answer(429, str(error), {"retry-after": str(_RETRY_AFTER_S)})
        for kind, status in ((ChangedError, 409), (BusyError, 409), (ForbiddenError, 403)):
            if isinstance(error, kind):
                return _answer(status, str(error))
        if isinstance(error, WebError):
            return _answer(error.status, str(error))
        if isinstance(error, MissingExtraError):
            return _answer(501, str(error))
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
            return await of_the_system(request, error.__cause__)  # the sentence names our folders
        return _answer(422 if isinstance(error, UsageError) else 500, str(error))

    @app.exception_handler(OSError)
    async def of_the_system(request: Request, error: OSError) -> Response:
        if error.errno in _FULL:
            return _answer(507, "The disk of the service is full: try again later")
        if isinstance(error, FileNotFoundError):  # deleted by another request, or too old
            return _answer(410, "The files of the job are gone: upload it again")
        return _answer(500, "The service could not read or write a file")

    @app.exception_handler(Exception)
    async def of_the_rest(request: Request, error: Exception) -> Response:
        return _answer(500, "The service has failed; its log says why")
