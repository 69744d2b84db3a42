"""`create_app`: the service for any ASGI server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

import pymeta
from pymeta.models.adapter import Adapter
from pymeta.serve import schemas
from pymeta.serve.auth import Guard
from pymeta.serve.batching import Batcher
from pymeta.serve.cache import Cache
from pymeta.serve.entities import Entities
from pymeta.serve.gate import Arrivals, Gate
from pymeta.serve.metrics import Metrics
from pymeta.serve.problem import Problem
from pymeta.serve.registry import Registry
from pymeta.serve.retraining import Retraining
from pymeta.serve.routes import entities, models, operations, stateless
from pymeta.serve.routes.base import Route
from pymeta.serve.service import Service
from pymeta.serve.serving import Serving
from pymeta.serve.settings import Settings
from pymeta.serve.store import Store, Window
from pymeta.spec.show import counted

_ROUTERS = (stateless.router, entities.router, models.router, operations.router)
_BODIES = (schemas.AdaptPredict, schemas.Rows, schemas.Queries, schemas.ProblemBody)


def create_app(
    adapter: str | Path | None = None,
    *,
    models: str | Path | None = None,
    store: str | None = None,
    token_file: str | Path | None = None,
    features: Sequence[str] | None = None,
    settings: Settings | None = None,
    listen_without_tokens: bool = False,
    retrain: str | None = None,
    retrain_options: Sequence[str] = (),
) -> FastAPI:
    """The service as an ASGI app. One process may have several.

    Args:
        adapter: the file of an adapter; it is copied into `models` whenever it changes. None
            where `models` has versions already.
        models: the folder of versions; None for one beside the file, adapter.versions.
        store: the URL of a database for entities' rows; None for a service without entities.
        token_file: who may do what (pymeta/serve/auth.py); None for requests of this machine
            alone.
        features: the features' names, for reasons.
        settings: how it runs.
        listen_without_tokens: serve other machines even without tokens.
        retrain: when to retrain: five fields as cron has them, in UTC.
        retrain_options: of `pymeta retrain`.

    Raises:
        ValueError: an argument will not do, a file is damaged.
        OSError: a file cannot be read, a folder cannot be written.
        pymeta.serve.problem.Problem: the database cannot be reached.
    """
    service = _service(
        adapter, models, store, token_file, features, settings, listen_without_tokens,
        retrain, retrain_options,
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="pymeta",
        version=pymeta.__version__,
        lifespan=lifespan,
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.state.service = service
    for router in _ROUTERS:
        app.include_router(router)
    app.exception_handler(404)(_nothing_there)
    app.exception_handler(405)(_not_so)
    direct = {
        (method, route.path): route.get_route_handler()
        for route in stateless.router.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    app.add_middleware(Gate, metrics=service.metrics, arrivals=service.arrivals, direct=direct)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _service(
    adapter: str | Path | None,
    models: str | Path | None,
    store: str | None,
    token_file: str | Path | None,
    features: Sequence[str] | None,
    settings: Settings | None,
    listen_without_tokens: bool,
    retrain: str | None,
    retrain_options: Sequence[str],
) -> Service:
    settings = settings or Settings()
    if adapter is None and models is None:
        raise ValueError("adapter, models: expected at least one of them, got neither")
    if retrain is not None and store is None:
        raise ValueError("retrain: expected a store to train on, got none")
    source = None if adapter is None else Path(adapter)
    folder = Path(models) if models is not None else Path(adapter or "").with_suffix(".versions")
    if source is not None and not folder.exists():
        Adapter.load(source)  # what is none is refused before it leaves a folder behind
    metrics, arrivals = Metrics(), Arrivals()
    serving = Serving(Registry(folder), source, metrics)
    if features is not None and len(features) != serving.model.shape.in_features:
        raise ValueError(
            f"features: expected {counted(serving.model.shape.in_features, 'name')}, got "
            f"{len(features)}"
        )
    guard = Guard(
        None if token_file is None else Path(token_file),
        open_beyond_loopback=listen_without_tokens,
    )
    threads = ThreadPoolExecutor(2 * settings.threads, "pymeta-serve")
    batcher = Batcher(settings, metrics, threads, arrivals)
    kept = retraining = None
    if store is not None:
        window = Window(settings.window_rows, settings.window_days)
        database = Store(store, kept_rows=settings.limits.kept_rows, window=window)
        cache = Cache(settings.limits.cached_entities)
        kept = Entities(database, batcher, cache, metrics, threads)
        retraining = Retraining(store, folder, retrain_options, retrain)
    return Service(
        settings, serving, guard, metrics, arrivals, batcher, kept, retraining, threads, features
    )


async def _nothing_there(request: Any, error: Exception) -> Any:
    return Problem(404, "there is nothing at this path").response(_id(request))


async def _not_so(request: Any, error: Any) -> Any:
    allowed = dict(error.headers or {})
    return Problem(405, "this path knows other methods", headers=allowed).response(_id(request))


def _id(request: Any) -> str:
    found: str = request.scope["pymeta.request_id"]
    return found


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's page with the schemas of the bodies that we read ourselves."""
    if app.openapi_schema is None:
        page = get_openapi(title=app.title, version=app.version, routes=app.routes)
        reference = "#/components/schemas/{model}"
        _, made = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template=reference
        )
        page.setdefault("components", {}).setdefault("schemas", {}).update(made["$defs"])
        bearer = {"type": "http", "scheme": "bearer"}
        page["components"]["securitySchemes"] = {"token": bearer}
        page["security"] = [{"token": []}]
        app.openapi_schema = page
    return app.openapi_schema
