"""The versions of the model: list, reload, promote, roll back, retrain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from pymeta.serve import schemas
from pymeta.serve.problem import Problem
from pymeta.serve.registry import Refused
from pymeta.serve.routes.base import Route, declared, parameter, service_of

router = APIRouter(route_class=Route, tags=["models"])
T = TypeVar("T")
_VERSION = parameter("version", "path", "as GET /v1/models lists it")


@declared(router, "GET /v1/models", "read", "All versions, newest first", schemas.Models)
async def models(request: Request) -> Response:
    """The versions, and what the serving one asks for."""
    service = service_of(request)
    model = service.model
    manifest = await _in_thread(service.serving.registry.manifest)
    versions = [
        {
            "version": v.name,
            "created": v.created,
            "source": v.source,
            "sha256": v.sha256,
            "serving": v.name == model.version,
            "report": v.report,
        }
        for v in reversed(manifest.versions)
    ]
    shape = model.shape
    body = {
        "serving": model.version,
        "in_features": shape.in_features,
        "out_features": shape.out_features,
        "loss": shape.loss,
        "dtype": str(model.adapter.dtype),
        "versions": versions,
    }
    return Response(to_json(body), media_type="application/json")


@declared(router, "POST /v1/models/reload", "admin", "Serve what the files say", schemas.Switched)
async def reload(request: Request) -> Response:
    """Import the service's file where it has changed; 409 with the reason where it will not do."""
    return _switched(await _in_thread(service_of(request).serving.reload))


@declared(router, "POST /v1/models/rollback", "admin", "Serve the version before", schemas.Switched)
async def rollback(request: Request) -> Response:
    """The version that served before this one serves again."""
    return _switched(await _in_thread(service_of(request).serving.roll_back))


@declared(
    router,
    "POST /v1/models/{version}/promote",
    "admin",
    "Serve one of the versions",
    schemas.Switched,
    parameters=(_VERSION,),
)
async def promote(request: Request) -> Response:
    """It serves from the next batch on."""
    version = request.path_params["version"]
    return _switched(await _in_thread(service_of(request).serving.promote, version))


@declared(
    router, "POST /v1/models/retrain", "admin", "Begin to train on the store's rows", status=202
)
async def retrain(request: Request) -> Response:
    """In a process of its own; what it finds is promoted only if it is not worse."""
    retraining = service_of(request).retraining
    if retraining is None:
        raise Problem(404, "this service was started without a store")
    if not retraining.begin():
        raise Problem(409, "a retraining is running")
    return Response(b'{"status":"started"}', 202, media_type="application/json")


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """A call in a thread; 409 where the registry refuses, with its reason."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except Refused as refused:
        raise Problem(409, str(refused)) from None
    except OSError:
        raise Problem(503, "the models' folder cannot be read or written") from None


def _switched(found: tuple[str, str]) -> Response:
    body = {"serving": found[0], "before": found[1]}
    return Response(to_json(body), media_type="application/json")
