"""The part of the HTTP API that teaches the model: `/api/v1/learning`."""

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from dinocell.service.learning import LEAST_IMAGES
from dinocell.service.routes import PROBLEMS
from dinocell.service.service import Service

learning_routes = APIRouter(responses=PROBLEMS, prefix="/learning")


class Judged(BaseModel):
    """A model on the image that was held out."""

    num_cells: int
    ap: float = Field(description="Mean average precision at IoU 0.5, 0.75 and 0.9.")
    ap50: float = Field(description="Average precision at IoU 0.5.")


class LearningInfo(BaseModel):
    """How far the model is with learning from corrected images."""

    state: Literal["idle", "running", "done", "failed"]
    images: int = Field(description="Corrected images; the last one judges the result.")
    needed: int = Field(description="Corrected images that are needed.")
    note: str = Field(description="What happens now.")
    done: int = Field(description="Steps; 0 of 0 while the speed is measured.")
    total: int
    error: str | None = None
    held_out: str | None = Field(None, description="Name of the image that judges.")
    chosen: str | None = Field(
        None, description="What learned: decoder, last, all, thresholds; or start."
    )
    before: Judged | None = None
    after: Judged | None = None


def _info(service: Service) -> LearningInfo:
    images = len(service.corrected())
    return LearningInfo(images=images, needed=LEAST_IMAGES, **service.learning.status())


@learning_routes.get("", summary="How far learning is")
def get_learning(request: Request) -> LearningInfo:
    """With the scores of both models when it is done."""
    return _info(request.app.state.service)


@learning_routes.post("", status_code=202, summary="Learn from corrected images")
def start_learning(request: Request) -> LearningInfo:
    """In the background; 422 if there are too few images."""
    service: Service = request.app.state.service
    service.learn()
    return _info(service)


@learning_routes.delete("", summary="Stop learning, or discard what was learned")
def discard_learning(request: Request) -> LearningInfo:
    """The model stays as it was."""
    service: Service = request.app.state.service
    service.learning.discard()
    return _info(service)


@learning_routes.post("/keep", summary="Use the model that was learned")
def keep_learning(request: Request) -> LearningInfo:
    """From the next image on, until the service stops."""
    service: Service = request.app.state.service
    service.keep_learned()
    return _info(service)


@learning_routes.get(
    "/pictures/{name}",
    summary="The image that was held out, with cells",
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}}, "description": "A picture (PNG)."}},
)
def get_picture(request: Request, name: Literal["truth", "before", "after"]) -> FileResponse:
    """The corrected cells, and those of both models."""
    path = request.app.state.service.learning.picture(name)
    if not path.exists():
        raise HTTPException(404, "Nothing was learned: start learning")
    return FileResponse(path, media_type="image/png", headers={"cache-control": "no-store"})
